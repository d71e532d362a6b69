"""What tells one model family from another: one row per family, and every other module reads the row.

In: a family, as Hugging Face's ``model_type`` names it. Out: the switches of the block and how its config.json is read:

>>> TRAITS["gemma2"].post_norms, TRAITS["gemma2"].activation
(True, 'gelu_tanh')

What a checkpoint may choose for itself (sizes, rotations, windows, soft caps) is in ``ModelSpec``.
Source of defaults and arithmetic: the configuration and modelling files of transformers 5.24.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Family = Literal["qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3_text"]
LayerType = Literal["full_attention", "sliding_attention"]
LAYER_TYPES: tuple[str, ...] = get_args(LayerType)

GELU = ("gelu_pytorch_tanh",)
GEMMA_GELU = (*GELU, "gelu")
"""Gemma 1 checkpoints say gelu and mean the tanh form; transformers reads them so."""


class SpecError(ValueError):
    """A model that we would compute wrongly, refused by name before a weight is read."""


def _all_full(layers: int, config: Mapping[str, Any]) -> list[str]:
    del config
    return ["full_attention"] * layers


def _every_other(layers: int, config: Mapping[str, Any]) -> list[str]:
    """Gemma 2: sliding, full, sliding, full, ..."""
    del config
    return [LAYER_TYPES[1 - i % 2] for i in range(layers)]


def _last_of_pattern(layers: int, config: Mapping[str, Any]) -> list[str]:
    """Gemma 3: every ``sliding_window_pattern``-th layer is full, the others slide."""
    pattern = int(config.get("sliding_window_pattern", 6))
    return [LAYER_TYPES[bool((i + 1) % pattern)] for i in range(layers)]


@dataclass(frozen=True)
class Traits:
    """A family."""

    architecture: str
    """The class of transformers that loads it."""
    features: tuple[str, ...]
    """What is special, for people."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias."""
    qk_norm: bool = False
    """Each query and key head is normalised."""
    norm: Literal["scale", "one_plus_scale"] = "scale"
    """Norms multiply by the scale, in the compute type; or by 1 + scale, in float32 (Gemma)."""
    post_norms: bool = False
    """What attention and mlp give is normalised before it is added to the residual stream."""
    embed_scaled: bool = False
    """Embeddings are multiplied by sqrt(D), itself rounded to the compute type."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    activation_field: str = "hidden_act"
    """Where config.json names the activation."""
    activation_names: tuple[str, ...] = ("silu",)
    """How config.json names it; the first one is written."""
    softcaps: tuple[str, ...] = ()
    """Fields of config.json that cap logits and are honoured."""
    query_scalar: bool = False
    """config.json has ``query_pre_attn_scalar``."""
    sliding: bool = False
    """config.json has ``sliding_window`` and ``layer_types``."""
    layer_types: Callable[[int, Mapping[str, Any]], list[str]] = _all_full
    """(layers, config) -> the type of every layer of a config.json that does not say."""
    local_rope: bool = False
    """Sliding layers have a rotation of their own."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where config.json says nothing."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that change the result, with the values that we compute; null counts as absent."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Constants of the config.json that we write."""


NO_BIAS = {"attention_bias": (False,)}
CAUSAL = {"use_bidirectional_attention": (False,)}
QWEN_FIXED = {"use_sliding_window": (False,)}
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
GEMMA_FEATURES = ("1 + w norms", "sqrt(D) embeddings", "tanh GELU")

TRAITS: dict[Family, Traits] = {
    "qwen2": Traits(
        architecture="Qwen2ForCausalLM",
        features=("q, k, v bias",),
        qkv_bias=True,
        defaults=QWEN,
        fixed=QWEN_FIXED,
        written={"use_sliding_window": False},
    ),
    "qwen3": Traits(
        architecture="Qwen3ForCausalLM",
        features=("q, k norm",),
        qk_norm=True,
        defaults=QWEN | {"head_dim": 128},
        fixed=QWEN_FIXED | NO_BIAS,
        written={"use_sliding_window": False, "attention_bias": False},
    ),
    "llama": Traits(
        architecture="LlamaForCausalLM",
        features=("RoPE scaling: linear, dynamic, yarn, llama3",),
        defaults={"max_position_embeddings": 2048},
        fixed=NO_BIAS | {"mlp_bias": (False,)},
        written={"attention_bias": False, "mlp_bias": False},
    ),
    "gemma": Traits(
        architecture="GemmaForCausalLM",
        features=GEMMA_FEATURES,
        norm="one_plus_scale",
        embed_scaled=True,
        activation="gelu_tanh",
        activation_names=GEMMA_GELU,
        defaults=GEMMA | {"num_key_value_heads": 16, "hidden_act": GELU[0]},
        # Older readers prefer hidden_activation to hidden_act.
        fixed=NO_BIAS | CAUSAL | {"hidden_activation": GELU},
        written={"attention_bias": False},
    ),
    "gemma2": Traits(
        architecture="Gemma2ForCausalLM",
        features=(*GEMMA_FEATURES, "soft-capping", "alternating sliding window", "pre and post norms"),
        norm="one_plus_scale",
        post_norms=True,
        embed_scaled=True,
        activation="gelu_tanh",
        activation_field="hidden_activation",
        activation_names=GELU,
        softcaps=("attn_logit_softcapping", "final_logit_softcapping"),
        query_scalar=True,
        sliding=True,
        layer_types=_every_other,
        defaults=GEMMA
        | {
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=NO_BIAS | CAUSAL,
        written={"attention_bias": False, "hidden_act": GELU[0]},
    ),
    "gemma3_text": Traits(
        architecture="Gemma3ForCausalLM",
        features=(*GEMMA_FEATURES, "q, k norm", "local and global RoPE", "sliding window", "pre and post norms"),
        qk_norm=True,
        norm="one_plus_scale",
        post_norms=True,
        embed_scaled=True,
        activation="gelu_tanh",
        activation_field="hidden_activation",
        activation_names=GELU,
        softcaps=("final_logit_softcapping",),
        query_scalar=True,
        sliding=True,
        layer_types=_last_of_pattern,
        local_rope=True,
        defaults=GEMMA
        | {
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        },
        # transformers reads an attention cap for this family and applies none.
        fixed=NO_BIAS | CAUSAL | {"attn_logit_softcapping": (None,)},
        written={"attention_bias": False, "hidden_act": GELU[0]},
    ),
}
