"""Attention in parts: each part gives its output and log-sum-exp, and parts are merged.

A completion attends to its prompt (stored once per group) and to its own past. The two are computed apart,

    out = sum_i exp(lse_i - lse) out_i,        lse = log sum_i exp(lse_i),

which equals one softmax over both. The queries of a whole group meet the prompt's keys in one matrix product.

A 2-token completion on a 3-token prompt of which 2 are valid keeps (1) or drops (.) these keys::

                  prompt     own
    token 0       1 1 .      1 .
    token 1       1 1 .      1 1
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""Score of a dropped key: finite, so that a row without any key gives no NaN and weighs nothing when merged."""


Window = int | Int[Array, ""] | None
"""Positions that a query sees, its own included; an array where layers of one scan differ; None: no limit."""


class Part(NamedTuple):
    """Attention over some of the keys."""

    out: Float[Array, "B H T E"]
    lse: Float[Array, "B H T"]


class Scoring(NamedTuple):
    """How scores are made from q·k, the same for every part of one layer."""

    scale: float
    softcap: float | None = None
    """Scores become cap * tanh(score / cap) (Gemma 2)."""


def attend(
    q: Float[Array, "B H T E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    keep: Bool[Array, "#B #T S"],
    scoring: Scoring,
) -> Part:
    """softmax(q·k scale) v over the kept keys, with grouped queries; scores and sums are float32.

    The Q queries that share a key head stand in one matrix, so each of the two products is one batched matmul.
    """
    batch, heads, length, dim = q.shape
    kv_heads, size = k.shape[1:3]
    grouped = q.reshape(batch, kv_heads, -1, dim)
    scores = jnp.einsum("BKNE,BKSE->BKNS", grouped, k, preferred_element_type=jnp.float32) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    scores = jnp.where(keep[:, None], scores.reshape(batch, heads, length, size), MASKED)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1)
    grouped = weights.astype(v.dtype).reshape(batch, kv_heads, -1, size)
    out = jnp.einsum("BKNS,BKSE->BKNE", grouped, v, preferred_element_type=jnp.float32)
    return Part(out.reshape(q.shape) / total[..., None], jnp.log(total) + peak[..., 0])


def merge(parts: list[Part]) -> Float[Array, "B H T E"]:
    """One softmax out of several: outputs weighted by exp(lse_i - max lse)."""
    peak = jax.lax.stop_gradient(jnp.stack([part.lse for part in parts]).max(0))
    weights = [jnp.exp(part.lse - peak)[..., None] for part in parts]
    mixed = functools.reduce(jnp.add, [w * part.out for w, part in zip(weights, parts, strict=True)])
    return mixed / functools.reduce(jnp.add, weights)


def within(lengths: Int[Array, "B T"], size: int) -> Bool[Array, "B T S"]:
    """Keys before each query's own length."""
    return jnp.arange(size) < lengths[..., None]


def causal(size: int) -> Bool[Array, "1 T T"]:
    """Keys up to the query's own position; with right padding no valid query ever sees a pad."""
    positions = jnp.arange(size)
    return (positions[:, None] >= positions)[None]


def in_window(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: Window
) -> Bool[Array, "#B #T #S"]:
    """Keys less than ``window`` positions back (sliding-window attention); None keeps all."""
    if window is None:
        return jnp.ones((1, 1, 1), bool)
    return query_positions[:, :, None] - key_positions[:, None] < window


def causal_attention(
    q: Float[Array, "B H S E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    scoring: Scoring,
    window: Window = None,
) -> Float[Array, "B H S E"]:
    """Attention of a prompt, or of any single row, to itself."""
    positions = jnp.arange(q.shape[2])[None]
    keep = causal(q.shape[2]) & in_window(positions, positions, window)
    return attend(q, k, v, keep, scoring).out


def group_attention(
    q: Float[Array, "P G H T E"],
    k: Float[Array, "P G K T E"],
    v: Float[Array, "P G K T E"],
    prompt_k: Float[Array, "P K S E"],
    prompt_v: Float[Array, "P K S E"],
    prompt_lengths: Int[Array, "P G"],
    scoring: Scoring,
    window: Window = None,
) -> Float[Array, "P G H T E"]:
    """Attention of G completions to their one prompt and each to its own past.

    Each completion continues its prompt after ``prompt_lengths`` tokens: the same number for samples of one question,
    different ones for the answers of one conversation.
    """
    prompts, group, _, length, _ = q.shape
    size, steps = prompt_k.shape[2], jnp.arange(length)
    positions = (prompt_lengths[..., None] + steps).reshape(prompts, -1)
    keep = within(jnp.repeat(prompt_lengths, length, axis=1), size)
    keep = keep & in_window(positions, jnp.arange(size)[None], window)
    shared = attend(_together(q), prompt_k, prompt_v, keep, scoring)
    shared = Part(_apart(shared.out, group), _apart(shared.lse, group))
    own_keep = causal(length) & in_window(steps[None], steps[None], window)
    own_q, own_k, own_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    own = attend(own_q, own_k, own_v, own_keep, scoring)
    own = Part(own.out.reshape(q.shape), own.lse.reshape(q.shape[:-1]))
    return merge([shared, own])


def _together(x: Float[Array, "P G H T E"]) -> Float[Array, "P H G*T E"]:
    """The completions of a group as one row of queries."""
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, x.shape[-1])


def _apart(x: Float[Array, "P H G*T ..."], group: int) -> Float[Array, "P G H T ..."]:
    """Undoes ``_together``."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], group, -1, *x.shape[3:]), 2, 1)
