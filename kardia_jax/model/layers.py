"""Flax Linen modules of one decoder block; attention itself comes in as a function.

The same block serves the prompt, the completions of a group and a decode step, because what differs between them -
which keys a query sees, and what is kept of the keys - is the argument ``attend(q, k, v) -> (out, kept)``.

Parameters (float32, one entry per block stacked on a leading axis L)::

    attention_norm/scale [D]      mlp_norm/scale [D]
    attention/{q,k,v}/kernel [D, H|K, E]   (Qwen2: /bias [H|K, E])     attention/o/kernel [H, E, D]
    attention/{q_norm,k_norm}/scale [E]    (Qwen3)
    mlp/{gate,up}/kernel [D, F]            mlp/down/kernel [F, D]

Beside any kernel [in..., out...] there may be a low-rank adapter, lora_a [in..., r] and lora_b [r, out...]; see
``linear.py``.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kardia_jax.model.linear import Linear
from kardia_jax.model.spec import ModelSpec

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q [..., H, T, E], k [..., K, T, E], v) -> (out [..., H, T, E], kept), where kept goes back to the caller."""

Turn = tuple[Float[Array, "... E"], Float[Array, "... E"]]
"""Cosine and sine of every position, the pair's angle repeated in both halves."""


def rotation(spec: ModelSpec, positions: Int[Array, "..."]) -> Turn:
    """Cosine and sine [..., E] of RoPE at these positions, float32."""
    angles = positions[..., None].astype(jnp.float32) * spec.rope.inverse_frequencies(spec.head_dim)
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles) * spec.rope.attention_factor, jnp.sin(angles) * spec.rope.attention_factor


def rotate(x: Float[Array, "... N E"], turn: Turn) -> Float[Array, "... N E"]:
    """RoPE in the half-split layout of Hugging Face: pairs are (i, i + E/2)."""
    cosine, sine = (part[..., None, :] for part in turn)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = x * cosine + jnp.concatenate([-second, first], -1) * sine
    return turned.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon) * scale, computed in float32. Source: arXiv 1910.07467."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.epsilon)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


class Attention(nn.Module):
    """Projections, head norms and rotation around the attention that is passed in."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], turn: Turn, attend: Attend) -> tuple[Float[Array, "... D"], Any]:
        spec = self.spec

        def project(name: str, heads: int) -> Array:
            return Linear((heads, spec.head_dim), use_bias=spec.qkv_bias, name=name)(x)

        q, k, v = project("q", spec.heads), project("k", spec.kv_heads), project("v", spec.kv_heads)
        if spec.qk_norm:
            q = RMSNorm(spec.norm_epsilon, name="q_norm")(q)
            k = RMSNorm(spec.norm_epsilon, name="k_norm")(k)
        # Heads before positions: both products of attention are then plain batched matmuls.
        out, kept = attend(*(jnp.swapaxes(x, -3, -2) for x in (rotate(q, turn), rotate(k, turn), v)))
        out = jnp.swapaxes(out, -3, -2)
        return Linear((spec.width,), inputs=2, name="o")(out.astype(x.dtype)), kept


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x). Source: arXiv 2002.05202."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def linear(name: str, width: int) -> Linear:
            return Linear((width,), name=name)

        inner = nn.silu(linear("gate", self.spec.mlp_width)(x)) * linear("up", self.spec.mlp_width)(x)
        return linear("down", self.spec.width)(inner)


class Block(nn.Module):
    """Pre-norm residual block."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], turn: Turn, attend: Attend) -> tuple[Float[Array, "... D"], Any]:
        epsilon = self.spec.norm_epsilon
        normed = RMSNorm(epsilon, name="attention_norm")(x)
        out, kept = Attention(self.spec, name="attention")(normed, turn, attend)
        x = x + out
        return x + GatedMlp(self.spec, name="mlp")(RMSNorm(epsilon, name="mlp_norm")(x)), kept
