"""The LM head of the learner: log-prob and entropy of completion tokens, in slices, never [tokens, V].

For a slice of C tokens and R rows of the table the logits [C, R] exist, are added to what is known of each token's
distribution (maximum, norm, entropy, own logit), and are gone; the backward pass makes them again. Kept tokens are
gathered to the front, and slices that hold padding alone are skipped. With
z = h·Wᵀ / temperature, p = softmax(z), entropy H = -sum_v p_v log p_v, and cotangents a (of the log-prob) and b (of the
entropy):

    dz_v = a (1[v = token] - p_v) - b p_v (log p_v + H).

A soft cap makes c tanh(h·Wᵀ / c) of h·Wᵀ, before the temperature (Gemma 2); the gradient meets its slope,
1 - tanh²(h·Wᵀ / c), on the way back.

The gradient of the table is added up in float32 over slices whatever the compute type: rounding each slice to
bfloat16 is a known way to bias training.

On a mesh each device has the tokens of its own rows and some rows of the table, whose columns are gathered once.
Maximum, norm, entropy, chosen logit and dh are added up over the vocabulary's axis after each slice of tokens, dW over
the axes of rows at the end. A slice that holds a token on some device is computed on all.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.model.sharding import Cut, cut, first_row, largest, on_each_device, summed

FLOOR = -1e9
"""Log-prob (nats) of a token that cannot be sampled; exp of it is 0."""

Carry = TypeVar("Carry")


class Slices(NamedTuple):
    """Logits that exist at once: of so many tokens, against so many rows of the table."""

    tokens: int
    rows: int = 0
    """0: all."""


class Seen(NamedTuple):
    """What some rows of the table tell of each token's distribution."""

    peak: Float[Array, " C"]
    """The largest logit."""
    total: Float[Array, " C"]
    """Sum of exp(z - peak)."""
    weighted: Float[Array, " C"]
    """Sum of exp(z - peak) (z - peak)."""
    chosen: Float[Array, " C"]
    """The token's own logit; 0 until its row is met."""


def raw_logits(hidden: Float[Array, "... D"], table: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """h·Wᵀ in the compute type of ``hidden``, accumulated in float32; not yet capped."""
    return jnp.einsum("...D,VD->...V", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)


def capped(z: Float[Array, "... V"], softcap: float | None) -> Float[Array, "... V"]:
    """c tanh(z / c): logits stay within the cap; None caps nothing."""
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def model_logits(
    hidden: Float[Array, "... D"], table: Float[Array, "V D"], softcap: float | None
) -> Float[Array, "... V"]:
    """Logits of every row of the table, padding rows included."""
    return capped(raw_logits(hidden, table), softcap)


def sampled_logits(
    hidden: Float[Array, "N D"], table: Float[Array, "V D"], sampled_tokens: int, softcap: float | None
) -> Float[Array, "V N"]:
    """Logits with the padding rows of the table at -inf: they are never sampled and take no probability.

    The vocabulary comes first, and stays first in the draw: on a CPU the few columns of a decode step are packed for
    the product instead of the whole table, and a transposed copy would cost the gain (docs/performance.md).
    """
    # The same product with its operands exchanged.
    z = model_logits(table.astype(hidden.dtype), hidden, softcap)
    if sampled_tokens >= z.shape[0]:
        return z
    return jnp.where(jnp.arange(z.shape[0])[:, None] < sampled_tokens, z, -jnp.inf)


def _without_padding(z: Float[Array, "... V"], sampled_tokens: int, first: Int[Array, ""] | int) -> Array:
    if isinstance(first, int) and sampled_tokens >= first + z.shape[-1]:
        return z
    return jnp.where(jnp.arange(z.shape[-1]) + first < sampled_tokens, z, -jnp.inf)


def _slices(x: Array, chunk: int) -> Array:
    """[N, ...] -> [ceil(N / C), C, ...], zeros at the end."""
    padding = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, chunk, *x.shape[1:])


def _scaled(z: Array, temperature: Array, sampled_tokens: int, first: Array | int) -> Array:
    """Logits as sampled from: without padding rows, over the temperature."""
    return _without_padding(z, sampled_tokens, first) / temperature


def _distribution(z: Array, lse: Array) -> tuple[Array, Array]:
    """(log p, p) of a slice of scaled logits; log p is very low but finite where p is 0, so that 0 * log 0 is 0."""
    logp = jnp.maximum(z - lse[:, None], FLOOR)
    return logp, jnp.exp(logp)


def _uncapped(dz: Array, z: Array, softcap: float | None) -> Array:
    """Gradient with respect to h·Wᵀ, given that with respect to the capped logits z."""
    return dz if softcap is None else dz * (1 - jnp.square(z / softcap))


def _forward(hidden, table, tokens, keep, temperature, sampled_tokens, slices, softcap):
    here = functools.partial(_forward_here, cut(), sampled_tokens, slices, softcap)
    logprobs, entropy, lse = on_each_device(here, ("N", "VD", "N", "N", ""), ("N", "N", "N"))(
        hidden, table, tokens, keep, temperature
    )
    return (logprobs, entropy), (hidden, table, tokens, keep, temperature, entropy, lse)


def _forward_here(where, sampled_tokens, slices, softcap, hidden, table, tokens, keep, temperature):
    low = _gathered(table.astype(hidden.dtype), where)
    first = first_row(len(low), where.vocabulary)

    def stats(piece):
        h, token, *_ = piece

        def see(seen, rows, start):
            z = _scaled(model_logits(h, rows, softcap), temperature, sampled_tokens, first + start)
            return _seen_with(seen, z, token - first - start)

        seen = _over_rows(see, _nothing_seen(token.size), low, slices.rows)
        peak, total, weighted, chosen = _seen_by_all(seen, where.vocabulary)
        # log p = z - peak - log total: one exponential gives the norm and the entropy.
        log_total = jnp.log(total)
        return jnp.maximum(chosen - peak - log_total, FLOOR), log_total - weighted / total, log_total + peak

    def slice_stats(_, piece):
        return None, jax.lax.cond(piece[-1], stats, _nothing, piece)

    order, pieces = _kept_first(where, keep, slices.tokens, hidden, tokens)
    _, out = jax.lax.scan(slice_stats, None, pieces)
    return tuple(jnp.where(keep, _back(x, order), 0.0) for x in out)


def _nothing_seen(tokens: int) -> Seen:
    zeros = jnp.zeros(tokens, jnp.float32)
    return Seen(zeros + FLOOR, zeros, zeros, zeros)


def _seen_with(seen: Seen, z: Float[Array, "C R"], row: Int[Array, " C"]) -> Seen:
    """With the logits of further rows; ``row`` is the token's among them, if it lies there."""
    peak = jnp.maximum(seen.peak, z.max(-1))
    _, total, weighted, chosen = _seen_from(seen, peak)
    centred = jnp.maximum(z - peak[:, None], FLOOR)
    weights = jnp.exp(centred)
    found = jnp.take_along_axis(z, jnp.clip(row, 0, z.shape[1] - 1)[:, None], 1)[:, 0]
    chosen = chosen + jnp.where(_inside(row, z.shape[1]), found, 0.0)
    return Seen(peak, total + weights.sum(-1), weighted + (weights * centred).sum(-1), chosen)


def _seen_from(seen: Seen, peak: Float[Array, " C"]) -> Seen:
    """The same, with sums relative to a higher peak."""
    shift = seen.peak - peak
    scale = jnp.exp(shift)
    return Seen(peak, scale * seen.total, scale * (seen.weighted + seen.total * shift), seen.chosen)


def _seen_by_all(seen: Seen, axes: tuple[str, ...]) -> Seen:
    """Of the rows of all devices along these axes of the mesh."""
    peak = largest(seen.peak, axes)
    _, *sums = _seen_from(seen, peak)
    return Seen(peak, *summed(sums, axes))


def _over_rows(step: Callable[[Carry, Array, Array | int], Carry], carry: Carry, table: Array, size: int) -> Carry:
    """``step(carry, rows, start)`` for each slice of the table's rows, the last one shorter; size 0 is one slice."""
    count, rest = divmod(len(table), size) if size else (0, len(table))

    def whole_slice(i: Array, carry: Carry) -> Carry:
        return step(carry, jax.lax.dynamic_slice_in_dim(table, i * size, size), i * size)

    carry = jax.lax.fori_loop(0, count, whole_slice, carry) if count else carry
    return step(carry, table[count * size :], count * size) if rest else carry


def _backward(sampled_tokens, slices, softcap, residuals, cotangents):
    here = functools.partial(_backward_here, cut(), sampled_tokens, slices, softcap)
    dh, dw = on_each_device(here, ("N", "VD", "N", "N", "", "N", "N", "N", "N"), ("N", "VD"))(*residuals, *cotangents)
    return dh, dw, None, None, jnp.zeros_like(residuals[4])


def _backward_here(
    where, sampled_tokens, slices, softcap, hidden, table, tokens, keep, temperature, entropy, lse, *cotangents
):
    low = _gathered(table.astype(hidden.dtype), where)
    first = first_row(len(low), where.vocabulary)
    cotangents = [jnp.where(keep, x, 0.0) for x in cotangents]

    def gradient(dw, piece):
        h, token, ent, norm, a, b, _ = piece

        def add(sums, rows, start):
            dh, dw = sums
            z = model_logits(h, rows, softcap)
            logp, p = _distribution(_scaled(z, temperature, sampled_tokens, first + start), norm)
            dz = -p * (a[:, None] + b[:, None] * (logp + ent[:, None]))
            row = token - first - start
            dz = dz.at[jnp.arange(row.size), jnp.where(_inside(row, len(rows)), row, len(rows))].add(a, mode="drop")
            dz = _uncapped(dz / temperature, z, softcap).astype(h.dtype)
            dh = dh + jnp.einsum("CR,RD->CD", dz, rows, preferred_element_type=jnp.float32)
            more = jnp.einsum("CR,CD->RD", dz, h, preferred_element_type=jnp.float32)
            here = jax.lax.dynamic_slice_in_dim(dw, start, len(rows)) + more
            return dh, jax.lax.dynamic_update_slice_in_dim(dw, here, start, 0)

        dh, dw = _over_rows(add, (jnp.zeros(h.shape, jnp.float32), dw), low, slices.rows)
        return dw, summed(dh, where.vocabulary).astype(h.dtype)

    def skip(dw, piece):
        return dw, jnp.zeros_like(piece[0])

    def slice_gradient(dw, piece):
        return jax.lax.cond(piece[-1], gradient, skip, dw, piece)

    order, pieces = _kept_first(where, keep, slices.tokens, hidden, tokens, entropy, lse, *cotangents)
    dw, dh = jax.lax.scan(slice_gradient, jnp.zeros(low.shape, jnp.float32), pieces)
    return _back(dh, order), _scattered(dw, where).astype(table.dtype)


def _inside(row: Int[Array, " C"], rows: int) -> Bool[Array, " C"]:
    return (row >= 0) & (row < rows)


def _gathered(table: Array, where: Cut) -> Array:
    """This device's rows of the table, with all columns."""
    return jax.lax.all_gather(table, where.width, axis=1, tiled=True) if where.width else table


def _scattered(dw: Array, where: Cut) -> Array:
    """The table's gradient, summed over all tokens; of its columns those that this device keeps."""
    if where.width:
        dw = jax.lax.psum_scatter(dw, where.width, scatter_dimension=1, tiled=True)
    return summed(dw, tuple(axis for axis in where.rows if axis not in where.width))


def _nothing(piece):
    zeros = jnp.zeros(piece[1].shape, jnp.float32)
    return zeros, zeros, zeros


def _kept_first(
    where: Cut, keep: Bool[Array, " N"], chunk: int, *arrays: Array
) -> tuple[Int[Array, " N"], tuple[Array, ...]]:
    """Kept tokens in front, in slices of at most ``chunk``, and beside them whether a slice holds any (on some device):
    slices of padding alone are skipped when it runs."""
    order = jnp.argsort(~keep, stable=True)
    size = min(chunk, keep.size)
    live = _slices(keep[order], size).any(1)
    live = summed(live.astype(jnp.int32), where.rows) > 0 if where.rows else live
    return order, (*(_slices(x[order], size) for x in arrays), live)


def _back(slices: Array, order: Int[Array, " N"]) -> Array:
    """Undoes ``_kept_first``."""
    flat = slices.reshape(-1, *slices.shape[2:])[: order.size]
    return jnp.zeros_like(flat).at[order].set(flat, unique_indices=True)


def token_logprobs(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    tokens: Int[Array, " N"],
    keep: Bool[Array, " N"],
    temperature: Float[Array, ""],
    sampled_tokens: int,
    slices: Slices,
    softcap: float | None,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-prob of each kept token and entropy of its distribution (nats) under softmax(logits / temperature), else 0.

    ``sampled_tokens`` is the number of table rows that count; ``slices`` how much is computed at once; ``softcap`` the
    bound of the logits. No gradient flows to the temperature.
    """
    return _forward(hidden, table, tokens, keep, temperature, sampled_tokens, slices, softcap)[0]


token_logprobs = jax.custom_vjp(token_logprobs, nondiff_argnums=(5, 6, 7))
token_logprobs.defvjp(_forward, _backward)
