"""The LM head of the learner: log-prob and entropy of completion tokens, in slices, never [tokens, V].

For a slice of C tokens the logits [C, V] exist, give two numbers per token, and are gone; the backward pass makes them
again. Kept tokens are gathered to the front, and slices that hold padding alone are skipped. With
z = h·Wᵀ / temperature, p = softmax(z), entropy H = -sum_v p_v log p_v, and cotangents a (of the log-prob) and b (of the
entropy):

    dz_v = a (1[v = token] - p_v) - b p_v (log p_v + H).

A soft cap makes c tanh(h·Wᵀ / c) of h·Wᵀ, before the temperature (Gemma 2); the gradient meets its slope,
1 - tanh²(h·Wᵀ / c), on the way back.

The gradient of the table is added up in float32 over slices whatever the compute type: rounding each slice to
bfloat16 is a known way to bias training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FLOOR = -1e9
"""Log-prob (nats) of a token that cannot be sampled; exp of it is 0."""


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
    hidden: Float[Array, "... D"], table: Float[Array, "V D"], sampled_tokens: int, softcap: float | None
) -> Float[Array, "... V"]:
    """Logits with the padding rows of the table at -inf: they are never sampled and take no probability."""
    return _without_padding(model_logits(hidden, table, softcap), sampled_tokens)


def _without_padding(z: Float[Array, "... V"], sampled_tokens: int) -> Float[Array, "... V"]:
    return z if sampled_tokens == z.shape[-1] else jnp.where(jnp.arange(z.shape[-1]) < sampled_tokens, z, -jnp.inf)


def _slices(x: Array, chunk: int) -> Array:
    """[N, ...] -> [ceil(N / C), C, ...], zeros at the end."""
    padding = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, chunk, *x.shape[1:])


def _scaled(z: Array, temperature: Array, sampled_tokens: int) -> Array:
    """Logits as sampled from: without padding rows, over the temperature."""
    return _without_padding(z, sampled_tokens) / temperature


def _distribution(z: Array, lse: Array) -> tuple[Array, Array]:
    """(log p, p) of a slice of scaled logits; log p is very low but finite where p is 0, so that 0 * log 0 is 0."""
    logp = jnp.maximum(z - lse[:, None], FLOOR)
    return logp, jnp.exp(logp)


def _uncapped(dz: Array, z: Array, softcap: float | None) -> Array:
    """Gradient with respect to h·Wᵀ, given that with respect to the capped logits z."""
    return dz if softcap is None else dz * (1 - jnp.square(z / softcap))


def _forward(hidden, table, tokens, keep, temperature, sampled_tokens, chunk, softcap):
    low = table.astype(hidden.dtype)

    def stats(piece):
        h, token, _ = piece
        z = _scaled(model_logits(h, low, softcap), temperature, sampled_tokens)
        peak = z.max(-1, keepdims=True)
        centred = jnp.maximum(z - peak, FLOOR)
        weights = jnp.exp(centred)
        total = weights.sum(-1)
        chosen = jnp.take_along_axis(centred, token[:, None], 1)[:, 0]
        # log p = centred - log total: one exponential gives the norm and the entropy.
        entropy = jnp.log(total) - (weights * centred).sum(-1) / total
        return jnp.maximum(chosen - jnp.log(total), FLOOR), entropy, jnp.log(total) + peak[:, 0]

    def slice_stats(_, piece):
        return None, jax.lax.cond(piece[2].any(), stats, _nothing, piece)

    order, pieces = _kept_first(keep, chunk, hidden, tokens, keep)
    _, out = jax.lax.scan(slice_stats, None, pieces)
    logprobs, entropy, lse = (jnp.where(keep, _back(x, order), 0.0) for x in out)
    return (logprobs, entropy), (hidden, table, tokens, keep, temperature, entropy, lse)


def _backward(sampled_tokens, chunk, softcap, residuals, cotangents):
    hidden, table, tokens, keep, temperature, entropy, lse = residuals
    low = table.astype(hidden.dtype)
    cotangents = [jnp.where(keep, x, 0.0) for x in cotangents]

    def gradient(total, piece):
        h, token, _, ent, norm, a, b = piece
        z = model_logits(h, low, softcap)
        logp, p = _distribution(_scaled(z, temperature, sampled_tokens), norm)
        dz = -p * (a[:, None] + b[:, None] * (logp + ent[:, None]))
        dz = dz.at[jnp.arange(token.size), token].add(a) / temperature
        dz = _uncapped(dz, z, softcap).astype(h.dtype)
        dh = jnp.einsum("CV,VD->CD", dz, low, preferred_element_type=jnp.float32)
        dw = jnp.einsum("CV,CD->VD", dz, h, preferred_element_type=jnp.float32)
        return total + dw, dh.astype(h.dtype)

    def skip(total, piece):
        return total, jnp.zeros_like(piece[0])

    def slice_gradient(total, piece):
        return jax.lax.cond(piece[2].any(), gradient, skip, total, piece)

    order, pieces = _kept_first(keep, chunk, hidden, tokens, keep, entropy, lse, *cotangents)
    dw, dh = jax.lax.scan(slice_gradient, jnp.zeros(table.shape, jnp.float32), pieces)
    return _back(dh, order), dw.astype(table.dtype), None, None, jnp.zeros_like(temperature)


def _nothing(piece):
    zeros = jnp.zeros(piece[1].shape, jnp.float32)
    return zeros, zeros, zeros


def _kept_first(keep: Bool[Array, " N"], chunk: int, *arrays: Array) -> tuple[Int[Array, " N"], tuple[Array, ...]]:
    """Kept tokens in front, in slices of at most ``chunk``: slices of padding alone are skipped when it runs."""
    order = jnp.argsort(~keep, stable=True)
    size = min(chunk, keep.size)
    return order, tuple(_slices(x[order], size) for x in arrays)


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
    chunk: int,
    softcap: float | None,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-prob of each kept token and entropy of its distribution (nats) under softmax(logits / temperature), else 0.

    ``sampled_tokens`` is the number of table rows that count; ``chunk`` the tokens per slice; ``softcap`` the bound of
    the logits. No gradient flows to the temperature.
    """
    return _forward(hidden, table, tokens, keep, temperature, sampled_tokens, chunk, softcap)[0]


token_logprobs = jax.custom_vjp(token_logprobs, nondiff_argnums=(5, 6, 7))
token_logprobs.defvjp(_forward, _backward)
