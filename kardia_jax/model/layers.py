"""Flax Linen modules of one decoder block; attention itself comes in as a function.

The same block serves the prompt, the completions of a group and a decode step, because what differs between them -
which keys a query sees, and what is kept of the keys - is the argument ``attend(q, k, v) -> (out, kept)``.

Parameters (float32, one entry per block stacked on a leading axis L)::

    attention_norm/scale [D]      mlp_norm/scale [D]
    attention_post_norm/scale [D] mlp_post_norm/scale [D]  (Gemma 2, 3)
    attention/{q,k,v}/kernel [D, H|K, E]   (Qwen2: /bias [H|K, E])     attention/o/kernel [H, E, D]
    attention/{q_norm,k_norm}/scale [E]    (Qwen3, Gemma 3)
    mlp/{gate,up}/kernel [D, F]            mlp/down/kernel [F, D]

Beside any kernel [in..., out...] there may be a low-rank adapter, lora_a [in..., r] and lora_b [r, out...]; see
``linear.py``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.model.attention import Window
from kardia_jax.model.linear import Linear
from kardia_jax.model.rope import RopeSpec
from kardia_jax.model.sharding import constrain_rows, spread
from kardia_jax.model.spec import ModelSpec

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [..., H, T, E], k [..., K, T, E], v) -> (out [..., H, T, E], kept), where kept goes back to the caller."""

Turn = tuple[Float[Array, "... E"], Float[Array, "... E"]]
"""Cosine and sine of every position, the pair's angle repeated in both halves."""

NO_LIMIT = 2**30
"""Window of a layer that sees everything, where layers are scanned: longer than any row."""


class Turns(NamedTuple):
    """Every rotation that some layer uses."""

    full: Turn
    local: Turn | None
    """Of the layers with a window, where they have their own."""


class Kind(NamedTuple):
    """What differs from layer to layer: plain values for one layer, [L] arrays to scan along.

    A model whose layers are all the same has (None, None), which scans along as nothing.
    """

    window: Window
    local: bool | Bool[Array, ""] | None
    """Turns as local layers do."""


def kinds(spec: ModelSpec) -> list[Kind]:
    """The kind of each layer, for an unrolled walk."""
    return [Kind(spec.window, True) if slides else Kind(None, False) for slides in spec.slides]


def stacked_kinds(spec: ModelSpec) -> Kind:
    """The same as arrays [L], for a scan over layers; no limit is a window longer than any row."""
    if not any(spec.slides):
        return Kind(None, None)
    windows = [NO_LIMIT if kind.window is None else kind.window for kind in kinds(spec)]
    return Kind(jnp.asarray(windows, jnp.int32), jnp.asarray(spec.slides))


def rotations(spec: ModelSpec, positions: Int[Array, "..."]) -> Turns:
    """Cosine and sine [..., E] of RoPE at these positions, float32."""
    local = None if spec.local_rope is None else _turn(spec.local_rope, spec.head_dim, positions)
    return Turns(_turn(spec.rope, spec.head_dim, positions), local)


def turn_of(turns: Turns, kind: Kind) -> Turn:
    """The rotation of a layer of this kind."""
    if turns.local is None or kind.local is None:
        return turns.full
    cosine, sine = (jnp.where(kind.local, ours, full) for ours, full in zip(turns.local, turns.full, strict=True))
    return cosine, sine


def _turn(rope: RopeSpec, head_dim: int, positions: Int[Array, "..."]) -> Turn:
    angles = positions[..., None].astype(jnp.float32) * rope.inverse_frequencies(head_dim)
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: Float[Array, "... N E"], turn: Turn) -> Float[Array, "... N E"]:
    """RoPE in the half-split layout of Hugging Face: pairs are (i, i + E/2)."""
    cosine, sine = (part[..., None, :] for part in turn)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = x * cosine + jnp.concatenate([-second, first], -1) * sine
    return turned.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon), computed in float32, rounded, then times the scale. Source: arXiv 1910.07467."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return scale.astype(x.dtype) * _normalised(x, self.epsilon).astype(x.dtype)


class OffsetRMSNorm(nn.Module):
    """The same times 1 + scale, rounded after the product (Gemma)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        # Through the compute type first: the sampler's copy of the scale has been rounded already.
        return (_normalised(x, self.epsilon) * (1 + scale.astype(x.dtype).astype(jnp.float32))).astype(x.dtype)


def _normalised(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)


NORMS = {"scale": RMSNorm, "one_plus_scale": OffsetRMSNorm}


def norm(spec: ModelSpec, name: str | None = None) -> RMSNorm | OffsetRMSNorm:
    """The family's norm, as a module of that name."""
    return NORMS[spec.traits.norm](spec.norm_epsilon, name=name)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh form, in float32 inside as in torch. Source: arXiv 1606.08415."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": nn.silu, "gelu_tanh": gelu_tanh}


class Attention(nn.Module):
    """Projections, head norms and rotation around the attention that is passed in."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], turn: Turn, attend: Attend) -> tuple[Float[Array, "... D"], Any]:
        spec = self.spec

        def project(name: str, heads: int) -> Array:
            return Linear((heads, spec.head_dim), use_bias=spec.traits.qkv_bias, name=name)(x)

        q, k, v = project("q", spec.heads), project("k", spec.kv_heads), project("v", spec.kv_heads)
        if spec.traits.qk_norm:
            q, k = norm(spec, "q_norm")(q), norm(spec, "k_norm")(k)
        # Heads before positions: both products of attention are then plain batched matmuls.
        q, k, v = (jnp.swapaxes(x, -3, -2) for x in (rotate(q, turn), rotate(k, turn), v))
        out, kept = attend(q, spread(k), spread(v))
        out = jnp.swapaxes(out, -3, -2)
        return Linear((spec.width,), inputs=2, name="o")(out.astype(x.dtype)), kept


class GatedMlp(nn.Module):
    """down(activation(gate x) * up x). Source: arXiv 2002.05202."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def linear(name: str, width: int) -> Linear:
            return Linear((width,), name=name)

        activation = ACTIVATIONS[self.spec.traits.activation]
        inner = activation(linear("gate", self.spec.mlp_width)(x)) * linear("up", self.spec.mlp_width)(x)
        return linear("down", self.spec.width)(inner)


class Block(nn.Module):
    """Pre-norm residual block; families with post-norms also normalise what each half adds."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], turn: Turn, attend: Attend) -> tuple[Float[Array, "... D"], Any]:
        spec = self.spec

        def added(name: str, out: Array) -> Array:
            return norm(spec, f"{name}_post_norm")(out) if spec.traits.post_norms else out

        out, kept = Attention(spec, name="attention")(norm(spec, "attention_norm")(x), turn, attend)
        x = constrain_rows(x + added("attention", out), "D")
        x = x + added("mlp", GatedMlp(spec, name="mlp")(norm(spec, "mlp_norm")(x)))
        return constrain_rows(x, "D"), kept
