"""The ``config.json`` that the metadata of a GGUF file amounts to.

In: ``Contents`` of a file. Out: a dict that ``ModelSpec.from_hf`` and transformers read.

    config_of(read(path))    # {"model_type": "llama", "hidden_size": 576, "rope_parameters": {...}, ...}

A key of the architecture that is not known here is refused by name, because it may change the result.
"""

from typing import Any

import numpy as np

from kardia_jax.hf.gguf_file import AGAIN, Contents, dequantised, listed
from kardia_jax.hf.gguf_names import ARCHITECTURES, EMBED, HEAD, ROPE_FACTORS, Architecture
from kardia_jax.hf.tables import HfError
from kardia_jax.model.rope import RopeSpec

KNOWN = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "tensor_data_layout"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned"),
)
KNOWN_GEMMA = (
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    "final_logit_softcapping",
)
SLIDING_PATTERN, LOCAL_THETA, LAYERS_27B = 6, 10_000.0, 62
"""What llama.cpp assumes of Gemma 3 where the file is silent: five sliding layers, then a full one. The 27B model,
told by its 62 layers, scales queries by D/H and not by E. Source: llama.cpp, src/models/gemma3.cpp."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every published Llama 3.1 to 3.3. The file has only the resulting factors, so these are tried and compared."""
FACTOR_TOLERANCE = 1e-5
"""Relative; the factors are float32 and were computed in another order."""
ORIGINAL = "Convert the original Hugging Face checkpoint instead."


def architecture_of(held: Contents) -> Architecture:
    """The row of the table; HfError names the architectures that are read."""
    name = held.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        fix = "Convert the original Hugging Face checkpoint instead if it is of a supported family."
        raise HfError(f"{held.file}: wanted general.architecture one of {tuple(ARCHITECTURES)}, got {name!r}. {fix}")
    return ARCHITECTURES[name]


def config_of(held: Contents) -> dict[str, Any]:
    """Everything in the file that changes the result, under Hugging Face's names.

    Raises HfError for a missing, misshapen or unknown key of the architecture.
    """
    row = architecture_of(held)
    _require_known(held, row)
    heads, head_dim = head_count(held, row), _head_dim(held, row)
    common = {
        "architectures": [row.model_class],
        "model_type": row.model_type,
        "vocab_size": _rows(held),
        "hidden_size": _whole(held, row, "embedding_length"),
        "intermediate_size": _whole(held, row, "feed_forward_length"),
        "num_hidden_layers": _whole(held, row, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_head_count(held, row),
        "head_dim": head_dim,
        "max_position_embeddings": _whole(held, row, "context_length"),
        "rms_norm_eps": _number(held, row, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in held.stored,
        "attention_dropout": 0.0,
    }
    return common | _family(held, row, head_dim) | _token_ids(held)


def head_count(held: Contents, row: Architecture) -> int:
    """Query heads (H)."""
    return _whole(held, row, "attention.head_count")


def kv_head_count(held: Contents, row: Architecture) -> int:
    """Key and value heads (K); as many as query heads where the file is silent."""
    return _whole(held, row, "attention.head_count_kv", head_count(held, row))


def _family(held: Contents, row: Architecture, head_dim: int) -> dict[str, Any]:
    if row.name == "gemma3":
        return _gemma3(held, row, head_dim)
    rope = _rope(held, row, head_dim)
    biased = {"attention_bias": "blk.0.attn_q.bias" in held.stored}
    own = {
        "llama": biased | {"mlp_bias": "blk.0.ffn_up.bias" in held.stored},
        "qwen2": {"use_sliding_window": False},
        "qwen3": biased | {"use_sliding_window": False},
    }
    return {"hidden_act": "silu", "rope_parameters": rope, "rope_theta": rope["rope_theta"]} | own[row.name]


def _gemma3(held: Contents, row: Architecture, head_dim: int) -> dict[str, Any]:
    layers, width = _whole(held, row, "block_count"), _whole(held, row, "embedding_length")
    window = held.metadata.get("gemma3.attention.sliding_window") or None
    slides = _sliding(held, row, layers) if window else [False] * layers
    local = {"rope_type": "default", "rope_theta": _number(held, row, "rope.freq_base_swa", LOCAL_THETA)}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": width // head_count(held, row) if layers == LAYERS_27B else head_dim,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": {"full_attention": _rope(held, row, head_dim), "sliding_attention": local},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": held.metadata.get("gemma3.final_logit_softcapping") or None,
    }


def _sliding(held: Contents, row: Architecture, layers: int) -> list[bool]:
    """Which layers see the window alone: as the file lists them, or all but every n-th."""
    pattern = held.metadata.get("gemma3.attention.sliding_window_pattern", SLIDING_PATTERN)
    if isinstance(pattern, list) and len(pattern) == layers:
        return [bool(slides) for slides in pattern]
    every = _whole(held, row, "attention.sliding_window_pattern", SLIDING_PATTERN)
    return [bool((layer + 1) % every) for layer in range(layers)]


def _rope(held: Contents, row: Architecture, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5."""
    kind = held.metadata.get(f"{row.name}.rope.scaling.type", "none")
    theta = {"rope_theta": _number(held, row, "rope.freq_base", 10_000.0)}
    if ROPE_FACTORS in held.stored and kind == "none":
        return theta | _llama3(held, theta["rope_theta"], head_dim)
    if kind == "none":
        return theta | {"rope_type": "default"}
    if kind == "linear" and ROPE_FACTORS not in held.stored:
        return theta | {"rope_type": "linear", "factor": _number(held, row, "rope.scaling.factor")}
    if kind == "yarn" and ROPE_FACTORS not in held.stored:
        return theta | {
            "rope_type": "yarn",
            "factor": _number(held, row, "rope.scaling.factor"),
            "original_max_position_embeddings": _whole(held, row, "rope.scaling.original_context_length"),
            "beta_fast": _number(held, row, "rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": _number(held, row, "rope.scaling.yarn_beta_slow", 1.0),
        }
    got = f"{kind!r}" + (f" with {ROPE_FACTORS}" if ROPE_FACTORS in held.stored else "")
    raise HfError(f"{held.file}: wanted {row.name}.rope.scaling.type none, linear or yarn, got {got}. {ORIGINAL}")


def _llama3(held: Contents, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 whose factors, one per rotated pair, are those of ``rope_freqs.weight``."""
    factors = dequantised(held.stored[ROPE_FACTORS])
    if factors.size and np.all(factors == 1):
        return {"rope_type": "default"}
    found: dict[str, Any] = {"rope_type": "llama3", "factor": float(factors.max(initial=1.0)), **LLAMA3}
    spec = RopeSpec.from_hf({"rope_parameters": found | {"rope_theta": theta}})
    expected = RopeSpec(theta).inverse_frequencies(head_dim) / spec.inverse_frequencies(head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=FACTOR_TOLERANCE, atol=0):
        wanted = f"the {head_dim // 2} factors of Llama 3.1's scaling (8192 positions, 1 and 4)"
        raise HfError(f"{held.file}: wanted {ROPE_FACTORS} to be {wanted}, got {factors.tolist()[:8]}... {ORIGINAL}")
    return found


def _head_dim(held: Contents, row: Architecture) -> int:
    """Width of a head (E), which keys, values and the rotary embedding must share."""
    plain = _whole(held, row, "embedding_length") // head_count(held, row)
    rotated = held.metadata.get(f"{row.name}.rope.dimension_count")
    # Only llama files of before `attention.key_length` tell a head width by what is rotated.
    silent = rotated if row.name == "llama" and rotated else plain
    head_dim = _whole(held, row, "attention.key_length", silent)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(held, row, key, head_dim) != head_dim:
            got = held.metadata[f"{row.name}.{key}"]
            raise HfError(f"{held.file}: wanted {row.name}.{key} = {head_dim}, as the keys are, got {got}. {ORIGINAL}")
    return head_dim


def _token_ids(held: Contents) -> dict[str, Any]:
    """Ids of the special tokens; a chat model that has an end of turn beside its end of text stops at both."""
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {name: held.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    ids: dict[str, Any] = {f"{name}_token_id": value for name, value in found.items() if value is not None}
    turn = held.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], turn] if "eos_token_id" in ids else turn
    return ids


def _rows(held: Contents) -> int:
    """Rows of the table (V), padding included; what the metadata says may be without the padding."""
    if EMBED not in held.stored:
        raise HfError(f"{held.file}: wanted a tensor {EMBED}, got {len(held.stored)} tensors without it. {AGAIN}")
    return held.stored[EMBED].shape[0]


def _whole(held: Contents, row: Architecture, key: str, silent: int | None = None) -> int:
    """A positive whole number under ``ARCHITECTURE.key``, or ``silent`` where the file has none."""
    value = held.metadata.get(f"{row.name}.{key}", silent)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HfError(f"{held.file}: wanted {row.name}.{key} to be a positive whole number, got {value!r}. {AGAIN}")
    return value


def _number(held: Contents, row: Architecture, key: str, silent: float | None = None) -> float:
    """A number under ``ARCHITECTURE.key``, as the shortest decimal of its float32: 1e-05 and not 9.999999747e-06."""
    value = held.metadata.get(f"{row.name}.{key}", silent)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise HfError(f"{held.file}: wanted {row.name}.{key} to be a positive number, got {value!r}. {AGAIN}")
    return float(str(np.float32(value)))


def _require_known(held: Contents, row: Architecture) -> None:
    known = {f"{row.name}.{key}" for key in (KNOWN + KNOWN_GEMMA if row.name == "gemma3" else KNOWN)}
    # A count of 0 says that the model does without: of experts, of a window.
    unknown = [
        f"{key} = {str(value)[:40]}"
        for key, value in held.metadata.items()
        if key.startswith(f"{row.name}.") and key not in known and (value is False or value != 0)
    ]
    if unknown:
        raise HfError(f"{held.file}: wanted a plain {row.name} model, got {listed(unknown)}. {ORIGINAL}")
