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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""Score of a dropped key: finite, so that a row without any key gives no NaN and weighs nothing when merged."""

ATTENDED = "attended"
"""Name of output and log-sum-exp for what is saved of a block (``policy.py``)."""

STRETCHES, SHORTEST_STRETCH = 4, 128
"""Into how many stretches the queries of one row are cut at most, and positions of the shortest."""


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
    room: int | None = None,
) -> Part:
    """softmax(q·k scale) v over the kept keys, with grouped queries; scores and sums are float32.

    The Q queries that share a key head stand in one matrix, so each of the two products is one batched matmul. The
    gradient makes the scores again instead of keeping them. ``room`` is how many bytes of scores exist at once, in
    whole heads and at least one (None: all): those that a CPU's cache holds cost it half the time.
    """
    return _attend_forward(q, k, v, keep, scoring, room)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, keep: Array, scoring: Scoring, room: int | None
) -> tuple[Part, tuple[Array, Array, Array, Array, Part]]:
    out, lse = _by_heads(functools.partial(_weighed, scoring), room, keep, _grouped(q, k), k, v)
    part = Part(*(checkpoint_name(x, ATTENDED) for x in (out.reshape(q.shape), lse.reshape(q.shape[:-1]))))
    return part, (q, k, v, keep, part)


def _attend_backward(
    scoring: Scoring, room: int | None, saved: tuple[Array, Array, Array, Array, Part], d_part: Part
) -> tuple[Array, Array, Array, None]:
    q, k, v, keep, part = saved
    queries, out, d_out = (_grouped(x, k) for x in (q, part.out, d_part.out))
    lse, d_lse = (x.reshape(queries.shape[:-1]) for x in (part.lse, d_part.lse))
    # What each score's gradient has in common with those of the same query.
    common = d_lse - (d_out * out).sum(-1)
    d_q, d_k, d_v = _by_heads(
        functools.partial(_differentiated, scoring), room, keep, queries, k, v, lse, d_out.astype(v.dtype), common
    )
    return d_q.reshape(q.shape).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend = jax.custom_vjp(attend, nondiff_argnums=(4, 5))
attend.defvjp(_attend_forward, _attend_backward)


def _grouped(x: Float[Array, "B H T E"], k: Float[Array, "B K S E"]) -> Float[Array, "B K N E"]:
    """The N = Q x T queries that meet each key head, or what belongs to them."""
    return x.reshape(*k.shape[:2], -1, x.shape[-1])


def _by_heads(
    function: Callable[..., tuple[Array, ...]], room: int | None, keep: Bool[Array, "#B #T S"], *arrays: Array
) -> tuple[Array, ...]:
    """function(keep, queries, keys, ...) of arrays [B, K, ...], for as many heads at a time as ``room`` has scores."""
    queries, keys = arrays[:2]
    batch, heads, count = queries.shape[:3]
    size = 4 * count * keys.shape[2]
    if room is None or batch * heads * size <= room:
        return function(keep, *arrays)
    each = next(n for n in range(max(1, room // size), 0, -1) if batch * heads % n == 0)
    rows = jnp.arange(batch * heads).reshape(-1, each) // heads

    def some(piece: tuple[Array, list[Array]]) -> tuple[Array, ...]:
        return function(keep if len(keep) == 1 else keep[piece[0]], *piece[1])

    out = jax.lax.map(some, (rows, [x.reshape(-1, each, 1, *x.shape[2:]) for x in arrays]))
    return tuple(x.reshape(batch, heads, *x.shape[3:]) for x in out)


def _weighed(
    scoring: Scoring,
    keep: Bool[Array, "#B #T S"],
    q: Float[Array, "B K N E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
) -> tuple[Float[Array, "B K N E"], Float[Array, "B K N"]]:
    """Output and log-sum-exp."""
    scores = _where(keep, _scores(scoring, q, k), MASKED)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1)
    out = jnp.einsum("BKNS,BKSE->BKNE", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out / total[..., None], jnp.log(total) + peak[..., 0]


def _differentiated(
    scoring: Scoring,
    keep: Bool[Array, "#B #T S"],
    q: Float[Array, "B K N E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    lse: Float[Array, "B K N"],
    d_out: Float[Array, "B K N E"],
    common: Float[Array, "B K N"],
) -> tuple[Float[Array, "B K N E"], Float[Array, "B K S E"], Float[Array, "B K S E"]]:
    """dscores = P (dO Vᵀ + dlse - rowsum(dO O)) with P = exp(scores - lse), and of it dQ, dK and dV.

    dK and dV are made transposed: XLA copies the left operand of such a product on a CPU, and queries are the smaller.
    """
    scores = _scores(scoring, q, k)
    weights = _where(keep, jnp.exp(scores - lse[..., None]), 0.0)
    d_weights = jnp.einsum("BKNE,BKSE->BKNS", d_out, v, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights + common[..., None]) * scoring.scale
    if scoring.softcap is not None:
        d_scores = d_scores * (1 - jnp.square(scores / scoring.softcap))
    weights, d_scores = weights.astype(v.dtype), d_scores.astype(q.dtype)
    d_q = jnp.einsum("BKNS,BKSE->BKNE", d_scores, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("BKNE,BKNS->BKES", q, d_scores, preferred_element_type=jnp.float32)
    d_v = jnp.einsum("BKNE,BKNS->BKES", d_out, weights, preferred_element_type=jnp.float32)
    return d_q, jnp.swapaxes(d_k, 2, 3), jnp.swapaxes(d_v, 2, 3)


def _scores(scoring: Scoring, q: Float[Array, "B K N E"], k: Float[Array, "B K S E"]) -> Float[Array, "B K N S"]:
    scores = jnp.einsum("BKNE,BKSE->BKNS", q, k, preferred_element_type=jnp.float32) * scoring.scale
    return scores if scoring.softcap is None else scoring.softcap * jnp.tanh(scores / scoring.softcap)


def _where(keep: Bool[Array, "#B #T S"], x: Float[Array, "B K N S"], otherwise: float) -> Float[Array, "B K N S"]:
    """x at kept keys; the N queries of a head are those of its Q query heads, one after the other."""
    by_position = x.reshape(len(x), -1, *keep.shape[1:])
    return jnp.where(keep[:, None], by_position, otherwise).reshape(x.shape)


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
    room: int | None = None,
) -> Part:
    """Attention of a prompt, or of any single row, to itself; ``room`` as in ``attend``.

    Where there is no room for all scores, queries come in at most ``STRETCHES`` stretches, each of which meets only the
    keys up to its end: five eighths of the scores instead of all.
    """
    size = q.shape[2]
    step = size if room is None else max(SHORTEST_STRETCH, -(-size // STRETCHES))
    positions = jnp.arange(size)[None]
    keep = causal(size) & in_window(positions, positions, window)

    def stretch(start: int) -> Part:
        end = min(start + step, size)
        return attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], keep[:, start:end, :end], scoring, room)

    out, lse = zip(*map(stretch, range(0, size, step)), strict=True)
    return Part(jnp.concatenate(out, 2), jnp.concatenate(lse, 2))


def group_attention(
    q: Float[Array, "P G H T E"],
    k: Float[Array, "P G K T E"],
    v: Float[Array, "P G K T E"],
    prompt_k: Float[Array, "P K S E"],
    prompt_v: Float[Array, "P K S E"],
    prompt_lengths: Int[Array, "P G"],
    scoring: Scoring,
    window: Window = None,
    room: int | None = None,
) -> Float[Array, "P G H T E"]:
    """Attention of G completions to their one prompt and each to its own past; ``room`` as in ``attend``.

    Each completion continues its prompt after ``prompt_lengths`` tokens: the same number for samples of one question,
    different ones for the answers of one conversation.
    """
    prompts, group, _, length, _ = q.shape
    size = prompt_k.shape[2]
    positions = (prompt_lengths[..., None] + jnp.arange(length)).reshape(prompts, -1)
    keep = within(jnp.repeat(prompt_lengths, length, axis=1), size)
    keep = keep & in_window(positions, jnp.arange(size)[None], window)
    shared = attend(_together(q), prompt_k, prompt_v, keep, scoring, room)
    shared = Part(_apart(shared.out, group), _apart(shared.lse, group))
    own_q, own_k, own_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    own = causal_attention(own_q, own_k, own_v, scoring, window, room)
    own = Part(own.out.reshape(q.shape), own.lse.reshape(q.shape[:-1]))
    return merge([shared, own])


def _together(x: Float[Array, "P G H T E"]) -> Float[Array, "P H G*T E"]:
    """The completions of a group as one row of queries."""
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, x.shape[-1])


def _apart(x: Float[Array, "P H G*T ..."], group: int) -> Float[Array, "P G H T ..."]:
    """Undoes ``_together``."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], group, -1, *x.shape[3:]), 2, 1)
