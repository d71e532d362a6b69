"""What a policy is made of: read from a Hugging Face ``config.json`` or written by hand.

>>> ModelSpec.from_hf({"model_type": "qwen2", "hidden_size": 896, ...}).group_size
7

What follows from the family alone is in ``families.py``; what a checkpoint chooses is a field here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from kardia_jax.model.families import LAYER_TYPES, TRAITS, Family, LayerType, SpecError, Traits
from kardia_jax.model.rope import RopeSpec


@dataclass(frozen=True)
class ModelSpec:
    """Shape and switches of a decoder-only policy."""

    family: Family
    vocab_size: int
    """Rows of the embedding table (V), padding rows included."""
    width: int
    """Model width (D)."""
    mlp_width: int
    """Inner width of the gated MLP (F)."""
    layers: int
    """Blocks (L)."""
    heads: int
    """Query heads (H)."""
    kv_heads: int
    """Key and value heads (K); H/K queries share one."""
    head_dim: int
    """Width of a head (E)."""
    tied: bool = True
    """The head is the embedding table."""
    rope: RopeSpec = field(default_factory=RopeSpec)
    norm_epsilon: float = 1e-6
    max_positions: int = 32_768
    """Longest prompt + completion, tokens."""
    token_count: int | None = None
    """Ids that a tokenizer can produce; rows from there on are padding and are never sampled. None: all rows."""
    query_scalar: int | None = None
    """Scores are divided by the square root of this; None: of head_dim."""
    attention_softcap: float | None = None
    """Attention scores become cap * tanh(score / cap)."""
    final_softcap: float | None = None
    """The same for logits."""
    window: int | None = None
    """A sliding layer sees this many positions, its own included."""
    layer_types: tuple[LayerType, ...] = ()
    """Type of each layer; (): all are full."""
    local_rope: RopeSpec | None = None
    """Rotation of the sliding layers; None: that of the others."""

    def __post_init__(self) -> None:
        if self.family not in TRAITS:
            raise SpecError(f"family: wanted one of {tuple(TRAITS)}, got {self.family!r}.")
        if self.heads % self.kv_heads:
            raise SpecError(f"kv_heads: wanted a divisor of heads = {self.heads}, got {self.kv_heads}.")
        if self.head_dim % 2:
            raise SpecError(f"head_dim: wanted an even number, got {self.head_dim}.")
        if self.token_count is not None and not 0 < self.token_count <= self.vocab_size:
            raise SpecError(f"token_count: wanted 1 to {self.vocab_size} (the table), got {self.token_count}.")
        _require_layers(self)
        _require_expressible(self)

    @property
    def traits(self) -> Traits:
        """What follows from the family."""
        return TRAITS[self.family]

    @property
    def group_size(self) -> int:
        """Query heads per kv head (Q)."""
        return self.heads // self.kv_heads

    @property
    def score_scale(self) -> float:
        """Factor of q·k."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def slides(self) -> tuple[bool, ...]:
        """For each layer, whether it sees a window only."""
        return tuple(kind == "sliding_attention" for kind in self.layer_types) or (False,) * self.layers

    @property
    def sampled_tokens(self) -> int:
        """Ids that may be sampled."""
        return self.vocab_size if self.token_count is None else self.token_count

    @property
    def parameter_count(self) -> int:
        """Number of parameters, the tied head counted once."""
        traits = self.traits
        qkvo = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        bias = self.head_dim * (self.heads + 2 * self.kv_heads) if traits.qkv_bias else 0
        norms = (4 if traits.post_norms else 2) * self.width + (2 * self.head_dim if traits.qk_norm else 0)
        block = qkvo + bias + norms + 3 * self.width * self.mlp_width
        return self.layers * block + self.width + self.vocab_size * self.width * (1 if self.tied else 2)

    def with_tokens(self, count: int) -> "ModelSpec":
        """The same model for a tokenizer of ``count`` ids; refused when the table has fewer rows."""
        if count > self.vocab_size:
            fix = "Use the model's own tokenizer or a model with a larger table."
            raise SpecError(f"tokenizer: wanted at most {self.vocab_size} ids (the table), got {count}. {fix}")
        return dataclasses.replace(self, token_count=count)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Reads a Hugging Face ``config.json``; whatever would change the result and is not supported is refused."""
        family = config.get("model_type")
        if family not in TRAITS:
            raise SpecError(f"model_type: wanted one of {tuple(TRAITS)}, got {family!r}.")
        traits = TRAITS[family]
        config = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **traits.defaults, **config}
        _refuse_unsupported(traits, config)
        _require_sizes(config)
        heads, width = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or width // heads
        scalar = config["query_pre_attn_scalar"] if traits.query_scalar else head_dim
        rope, local_rope = _ropes_from_hf(traits, config)
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            width=width,
            mlp_width=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            tied=bool(config["tie_word_embeddings"]),
            rope=rope,
            norm_epsilon=float(config["rms_norm_eps"]),
            max_positions=config["max_position_embeddings"],
            query_scalar=None if scalar == head_dim else scalar,
            attention_softcap=_softcap(traits, config, "attn_logit_softcapping"),
            final_softcap=_softcap(traits, config, "final_logit_softcapping"),
            local_rope=local_rope,
            **_layers_from_hf(traits, config),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model; token ids and dtype are added by the writer that knows them."""
        traits = self.traits
        return {
            "architectures": [traits.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.norm_epsilon,
            "max_position_embeddings": self.max_positions,
            "attention_dropout": 0.0,
            traits.activation_field: traits.activation_names[0],
            **_ropes_to_hf(self),
            **_layers_to_hf(self),
            **traits.written,
        }


def _require_layers(spec: ModelSpec) -> None:
    """Layer types, window and local rotation fit each other and the family."""
    if not spec.layer_types:
        return
    if len(spec.layer_types) != spec.layers or set(spec.layer_types) - set(LAYER_TYPES):
        raise SpecError(f"layer_types: wanted {spec.layers} of {LAYER_TYPES}, got {spec.layer_types}.")
    if any(spec.slides) and not spec.traits.sliding:
        raise SpecError(f"layer_types: wanted full_attention everywhere in {spec.family}, got {spec.layer_types}.")
    if any(spec.slides) and (not isinstance(spec.window, int) or spec.window < 1):
        raise SpecError(f"sliding_window: wanted a positive number of tokens, got {spec.window!r}.")


def _require_expressible(spec: ModelSpec) -> None:
    """A choice that the family's config.json has no field for would be lost on export."""
    traits = spec.traits
    chosen = {
        "query_scalar": (spec.query_scalar, traits.query_scalar),
        "attention_softcap": (spec.attention_softcap, "attn_logit_softcapping" in traits.softcaps),
        "final_softcap": (spec.final_softcap, "final_logit_softcapping" in traits.softcaps),
        "local_rope": (spec.local_rope, traits.local_rope),
    }
    for name, (value, known) in chosen.items():
        if value is not None and not known:
            raise SpecError(f"{name}: wanted None, which is all that {spec.family} has, got {value!r}.")


def _require_sizes(config: Mapping[str, Any]) -> None:
    """The numbers without which there is no model, each a positive integer."""
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    optional = ("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "sliding_window_pattern")
    for name in (*needed, *(name for name in optional if config.get(name) is not None)):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{name}: wanted a positive integer in config.json, got {value!r}.")
    epsilon = config["rms_norm_eps"]
    if not isinstance(epsilon, (int, float)) or epsilon <= 0:
        raise SpecError(f"rms_norm_eps: wanted a positive number in config.json, got {epsilon!r}.")


def _refuse_unsupported(traits: Traits, config: Mapping[str, Any]) -> None:
    """Every field that would change the logits if it were ignored has a value that we compute."""
    fixed = {**traits.fixed, traits.activation_field: traits.activation_names, "quantization_config": (None,)}
    for name, allowed in fixed.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise SpecError(f"{name}: wanted {allowed[0]!r}, got {value!r}. This model is not supported.")


def _softcap(traits: Traits, config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if name not in traits.softcaps or value is None:
        return None
    if not isinstance(value, (int, float)) or value <= 0:
        raise SpecError(f"{name}: wanted a positive number or null, got {value!r}.")
    return float(value)


def _layers_from_hf(traits: Traits, config: Mapping[str, Any]) -> dict[str, Any]:
    """``layer_types`` and ``window``; a model whose layers are all full has neither."""
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or traits.layer_types(layers, config)
    if list(kinds) == ["full_attention"] * layers:
        return {}
    return {"layer_types": tuple(kinds), "window": config.get("sliding_window")}


def _ropes_from_hf(traits: Traits, config: Mapping[str, Any]) -> tuple[RopeSpec, RopeSpec | None]:
    if not traits.local_rope:
        return RopeSpec.from_hf(config), None
    full, sliding = RopeSpec.by_layer_from_hf(config)
    return full, None if sliding == full else sliding


def _ropes_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5, and the base frequencies where older readers look for them."""
    if not spec.traits.local_rope:
        return {"rope_parameters": spec.rope.to_hf(), "rope_theta": spec.rope.theta}
    full, sliding = spec.rope, spec.local_rope or spec.rope
    nested = dict(zip(LAYER_TYPES, (full.to_hf(), sliding.to_hf()), strict=True))
    return {"rope_parameters": nested, "rope_theta": full.theta, "rope_local_base_freq": sliding.theta}


def _layers_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """Windows, score scale and soft caps, of the families that have them."""
    traits = spec.traits
    caps = {"attn_logit_softcapping": spec.attention_softcap, "final_logit_softcapping": spec.final_softcap}
    out: dict[str, Any] = {name: caps[name] for name in traits.softcaps}
    if traits.query_scalar:
        out["query_pre_attn_scalar"] = spec.query_scalar or spec.head_dim
    if traits.sliding:
        kinds = spec.layer_types or cast(tuple[LayerType, ...], (LAYER_TYPES[0],) * spec.layers)
        # transformers makes both masks and wants a window even where no layer uses it.
        out |= {"layer_types": list(kinds), "sliding_window": spec.window or spec.max_positions}
    return out
