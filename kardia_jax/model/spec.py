"""What a policy is made of: read from a Hugging Face ``config.json`` or written by hand.

>>> ModelSpec.from_hf({"model_type": "qwen2", "hidden_size": 896, ...}).group_size
7
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Family = Literal["qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

ARCHITECTURES: dict[Family, str] = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class SpecError(ValueError):
    """A model that we would compute wrongly, refused by name before a weight is read."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding and its scaling (Su et al., arXiv 2104.09864).

    ``dynamic`` equals ``default`` up to ``max_positions``; runs are held below that, so nothing else is needed.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    """Context of the pre-training (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cosine and sine (yarn)."""
    truncate: bool = True
    """Round the yarn ramp's ends to whole dimensions."""

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position for each of the E/2 rotated pairs, float32 [E/2]."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain, head_dim)
        return plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Long waves divided by the factor, short waves kept, a linear blend between. Source: Llama 3.1."""
        wavelength = 2 * math.pi / plain
        span = self.high_freq_factor - self.low_freq_factor
        blend = (self.original_positions / wavelength - self.low_freq_factor) / span
        blend = np.clip(blend, 0.0, 1.0)
        return ((1 - blend) * plain / self.factor + blend * plain).astype(np.float32)

    def _yarn(self, plain: np.ndarray, head_dim: int) -> np.ndarray:
        """Interpolated for dimensions that turn slowly, plain for fast ones. Source: arXiv 2309.00071, eq. 17-18."""

        def dimension(turns: float) -> float:
            positions = self.original_positions / (turns * 2 * math.pi)
            return head_dim * math.log(positions) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = max(high - low, 1e-3)
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
        return (plain / self.factor * ramp + plain * (1 - ramp)).astype(np.float32)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeSpec":
        """Reads both layouts: ``rope_parameters`` (transformers 5) and ``rope_theta`` + ``rope_scaling`` (before)."""
        raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = raw.get("rope_type", raw.get("type", "default"))
        theta = float(raw.get("rope_theta", config.get("rope_theta", 10_000.0)))
        known = ("default", "linear", "dynamic", "llama3", "yarn")
        if kind not in known:
            raise SpecError(f"rope_type: wanted one of {known}, got {kind!r}.")
        factor = float(raw.get("factor", 1.0))
        original = raw.get("original_max_position_embeddings") or config.get("max_position_embeddings", 0)
        attention = raw.get("attention_factor")
        if kind == "yarn" and attention is None:
            attention = _yarn_attention_factor(factor, raw)
        return cls(
            theta=theta,
            kind=kind,
            factor=factor,
            original_positions=int(original),
            low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
            high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
            beta_fast=float(raw.get("beta_fast") or 32.0),
            beta_slow=float(raw.get("beta_slow") or 1.0),
            attention_factor=float(attention) if attention is not None else 1.0,
            truncate=bool(raw.get("truncate", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``rope_parameters`` of transformers 5; older readers also find ``rope_theta`` beside it."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind == "default":
            return out
        out["factor"] = self.factor
        if self.kind == "llama3":
            out |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            out |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
            out["attention_factor"] = self.attention_factor
        if self.kind in ("llama3", "yarn"):
            out["original_max_position_embeddings"] = self.original_positions
        return out


def _yarn_attention_factor(factor: float, raw: Mapping[str, Any]) -> float:
    """0.1 m ln(s) + 1, as a ratio when the config names both multipliers. Source: arXiv 2309.00071, eq. 22."""

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    mscale, mscale_all = raw.get("mscale"), raw.get("mscale_all_dim")
    if mscale and mscale_all:
        return scale(mscale) / scale(mscale_all)
    return scale(1.0)


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

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise SpecError(f"family: wanted one of {tuple(ARCHITECTURES)}, got {self.family!r}.")
        if self.heads % self.kv_heads:
            raise SpecError(f"kv_heads: wanted a divisor of heads = {self.heads}, got {self.kv_heads}.")
        if self.head_dim % 2:
            raise SpecError(f"head_dim: wanted an even number, got {self.head_dim}.")
        if self.token_count is not None and not 0 < self.token_count <= self.vocab_size:
            raise SpecError(f"token_count: wanted 1 to {self.vocab_size} (the table), got {self.token_count}.")

    @property
    def group_size(self) -> int:
        """Query heads per kv head (Q)."""
        return self.heads // self.kv_heads

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 adds a bias to queries, keys and values."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head."""
        return self.family == "qwen3"

    @property
    def sampled_tokens(self) -> int:
        """Ids that may be sampled."""
        return self.vocab_size if self.token_count is None else self.token_count

    @property
    def parameter_count(self) -> int:
        """Number of parameters, the tied head counted once."""
        qkvo = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        bias = self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        norms = 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)
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
        if family not in ARCHITECTURES:
            raise SpecError(f"model_type: wanted one of {tuple(ARCHITECTURES)}, got {family!r}.")
        _refuse_unsupported(config)
        _require_sizes(config)
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        return cls(
            family=family,
            vocab_size=int(config["vocab_size"]),
            width=width,
            mlp_width=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope=RopeSpec.from_hf(config),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            max_positions=int(config.get("max_position_embeddings", 32_768)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model; token ids and dtype are added by the writer that knows them."""
        rope = self.rope.to_hf()
        return {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.norm_epsilon,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": rope,
            "rope_theta": self.rope.theta,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
        } | ({"attention_bias": False} if self.family == "qwen3" else {})


def _require_sizes(config: Mapping[str, Any]) -> None:
    """The numbers without which there is no model, each a positive integer."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in names:
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise SpecError(f"{name}: wanted a positive integer in config.json, got {value!r}.")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Each line is a field that would change the logits if it were ignored."""
    wanted = {
        "hidden_act": ("silu", None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
    }
    if config["model_type"] == "qwen3":
        wanted["attention_bias"] = (False, None)
    for name, allowed in wanted.items():
        if config.get(name) not in allowed:
            raise SpecError(f"{name}: wanted {allowed[0]!r}, got {config[name]!r}. This model is not supported.")
    layer_types = set(config.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise SpecError(f"layer_types: wanted full_attention everywhere, got {sorted(layer_types)}.")
