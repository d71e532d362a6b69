"""Attention by fused kernels: one softmax over several sets of keys, and its gradient.

A kernel (``cudnn.py``, ``splash.py``) gives the output and log-sum-exp of one set of keys without ever storing the
scores, but no gradient of the log-sum-exp, and the merge of two sets depends on it. The gradient of the *merged*
attention needs none: with the merged O and lse

    P_i = exp(scores_i - lse),    dscores_i = P_i (dO V_i^T - rowsum(dO O)),    dV_i = P_i^T dO,

which is what a kernel's backward pass computes from whatever O and lse it is handed. So each set runs the backward pass
of its kernel with the O and lse of them all. Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kardia_jax.model.attention import ATTENDED, Part, Scoring, merge


class Keys(NamedTuple):
    """One set of keys that every query sees at least one of."""

    k: Float[Array, "B K S E"]
    v: Float[Array, "B K S E"]
    lengths: Int[Array, " B"] | None
    """Keys that count, for all queries of a row; None: query t sees the keys up to t."""


Grads = tuple[Float[Array, "B H T E"], Float[Array, "B K S E"], Float[Array, "B K S E"]]


class Kernel(NamedTuple):
    """Attention to one set of keys."""

    forward: Callable[[Float[Array, "B H T E"], Keys, Scoring], Part]
    backward: Callable[[Float[Array, "B H T E"], Keys, Scoring, Part, Float[Array, "B H T E"]], Grads]
    """(q, keys, scoring, merged, gradient of merged.out) -> gradients of q, k and v."""


def fused_attention(
    kernel: Kernel, scoring: Scoring, q: Float[Array, "B H T E"], sets: tuple[Keys, ...]
) -> Float[Array, "B H T E"]:
    """One softmax over all sets of keys, in the type of q."""
    return _merged(kernel, scoring, q, sets).out


def _merged(kernel: Kernel, scoring: Scoring, q: Array, sets: tuple[Keys, ...]) -> Part:
    parts = [kernel.forward(q, keys, scoring) for keys in sets]
    return Part(merge(parts).astype(q.dtype), functools.reduce(jnp.logaddexp, [part.lse for part in parts]))


def _forward(
    kernel: Kernel, scoring: Scoring, q: Array, sets: tuple[Keys, ...]
) -> tuple[Array, tuple[Array, tuple[Keys, ...], Part]]:
    merged = Part(*(checkpoint_name(x, ATTENDED) for x in _merged(kernel, scoring, q, sets)))
    return merged.out, (q, sets, merged)


def _backward(
    kernel: Kernel, scoring: Scoring, saved: tuple[Array, tuple[Keys, ...], Part], d_out: Array
) -> tuple[Array, tuple[Keys, ...]]:
    q, sets, merged = saved
    grads = [kernel.backward(q, keys, scoring, merged, d_out) for keys in sets]
    d_q = functools.reduce(jnp.add, [d_q.astype(jnp.float32) for d_q, _, _ in grads])
    return d_q.astype(q.dtype), tuple(Keys(d_k, d_v, None) for _, d_k, d_v in grads)


fused_attention = jax.custom_vjp(fused_attention, nondiff_argnums=(0, 1))
fused_attention.defvjp(_forward, _backward)
