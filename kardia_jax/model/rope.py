"""Rotary position embedding: which angles, read from every layout of a Hugging Face ``config.json``.

In: the rope fields of a config. Out: ``RopeSpec`` and, from it, radians per position for each rotated pair.

>>> RopeSpec(theta=100.0).inverse_frequencies(4).round(3).tolist()
[1.0, 0.1]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from kardia_jax.model.families import LAYER_TYPES, SpecError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
KINDS: tuple[str, ...] = get_args(RopeKind)
WITH_CONTEXT = ("llama3", "yarn")
"""Kinds that read the context length of the pre-training."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding and its scaling (Su et al., arXiv 2104.09864).

    ``dynamic`` equals ``default`` up to ``max_positions``; runs are held below that, so nothing else is needed.
    What a kind does not use stays at its default, so that equal rotations are equal specs.
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
        """Reads both layouts: ``rope_parameters`` (transformers 5) and ``rope_theta`` + ``rope_scaling`` (before).

        Where a config has both, ``rope_scaling`` counts, as in transformers.
        """
        raw = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        for name in LAYER_TYPES:
            if name in raw:
                raise SpecError(f"rope_parameters: wanted one rotation for all layers, got an entry {name}.")
        context = config.get("original_max_position_embeddings")
        if context is not None:
            raw["original_max_position_embeddings"] = context
        return cls._read(raw, config.get("rope_theta"), config)

    @classmethod
    def by_layer_from_hf(cls, config: Mapping[str, Any]) -> "tuple[RopeSpec, RopeSpec]":
        """(full, sliding) of Gemma 3: nested ``rope_parameters`` (transformers 5), or ``rope_theta``, ``rope_scaling``
        (full layers only) and ``rope_local_base_freq`` (before)."""
        nested = config.get("rope_parameters") or {}
        if set(nested) - set(LAYER_TYPES):
            raise SpecError(f"rope_parameters: wanted an entry for each of {LAYER_TYPES}, got {sorted(nested)}.")
        full, sliding = (dict(nested.get(name) or {}) for name in LAYER_TYPES)
        full |= config.get("rope_scaling") or {}
        for name, raw in zip(LAYER_TYPES, (full, sliding), strict=True):
            # transformers looks for truncate beside the entries, not in them: it cannot be turned off.
            if not raw.get("truncate", True):
                raise SpecError(f"rope_parameters.{name}.truncate: wanted true, got false.")
        theta = config.get("rope_theta") or 1_000_000.0
        local_theta = config.get("rope_local_base_freq") or 10_000.0
        return cls._read(full, theta, config), cls._read(sliding, local_theta, config)

    @classmethod
    def _read(cls, raw: Mapping[str, Any], theta: float | None, config: Mapping[str, Any]) -> "RopeSpec":
        kind = raw.get("rope_type") or raw.get("type") or "default"
        if kind not in KINDS:
            raise SpecError(f"rope_type: wanted one of {KINDS}, got {kind!r}.")
        theta = float(raw.get("rope_theta") or theta or 10_000.0)
        partial = raw.get("partial_rotary_factor") or config.get("partial_rotary_factor")
        if partial not in (None, 1):
            raise SpecError(f"partial_rotary_factor: wanted 1 or nothing, got {partial!r}.")
        if kind == "default":
            return cls(theta)
        context = 0
        if kind in WITH_CONTEXT:
            context = int(raw.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0)
            if context < 1:
                raise SpecError(f"original_max_position_embeddings: wanted a length in tokens for {kind}, got none.")
        factor = _factor(kind, raw, config)
        if kind == "llama3":
            low, high = (_positive(name, raw.get(name), kind) for name in ("low_freq_factor", "high_freq_factor"))
            return cls(theta, kind, factor, context, low_freq_factor=low, high_freq_factor=high)
        if kind == "yarn":
            return cls(theta, kind, factor, context, **_yarn_fields(factor, raw))
        return cls(theta, kind, factor)

    def to_hf(self) -> dict[str, Any]:
        """One rotation in the ``rope_parameters`` of transformers 5."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind == "default":
            return out
        out["factor"] = self.factor
        if self.kind == "llama3":
            out |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            out |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "attention_factor": self.attention_factor}
            # Left out where it is the default: the nested layout has no place for it.
            out |= {} if self.truncate else {"truncate": False}
        if self.kind in WITH_CONTEXT:
            out["original_max_position_embeddings"] = self.original_positions
        return out


def _factor(kind: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """How much longer the context became; yarn may leave it to the ratio of the two lengths."""
    factor = raw.get("factor")
    context = raw.get("original_max_position_embeddings")
    if factor is None and kind == "yarn" and context:
        factor = config.get("max_position_embeddings", 0) / context
    return _positive("factor", factor, kind)


def _positive(name: str, value: Any, kind: str) -> float:
    if not isinstance(value, (int, float)) or value <= 0:
        raise SpecError(f"rope_parameters.{name}: wanted a positive number for {kind}, got {value!r}.")
    return float(value)


def _yarn_fields(factor: float, raw: Mapping[str, Any]) -> dict[str, Any]:
    attention = raw.get("attention_factor")
    return {
        "beta_fast": float(raw.get("beta_fast") or 32.0),
        "beta_slow": float(raw.get("beta_slow") or 1.0),
        "attention_factor": float(_yarn_attention_factor(factor, raw) if attention is None else attention),
        "truncate": bool(raw.get("truncate", True)),
    }


def _yarn_attention_factor(factor: float, raw: Mapping[str, Any]) -> float:
    """0.1 m ln(s) + 1, as a ratio when the config names both multipliers. Source: arXiv 2309.00071, eq. 22."""

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    mscale, mscale_all = raw.get("mscale"), raw.get("mscale_all_dim")
    if mscale and mscale_all:
        return scale(mscale) / scale(mscale_all)
    return scale(1.0)
