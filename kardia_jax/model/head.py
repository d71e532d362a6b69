"""The LM head of the learner: log-prob and entropy of completion tokens, in slices, never [tokens, V].

For a slice of C tokens the logits [C, V] exist, give three numbers per token, and are gone; the backward pass makes
them again. With z = h·Wᵀ / temperature, p = softmax(z), entropy H = -sum_v p_v log p_v, and cotangents a (of the
log-prob) and b (of the entropy):

    dz_v = a (1[v = token] - p_v) - b p_v (log p_v + H).

The gradient of the table is added up in float32 over slices whatever the compute type: rounding each slice to
bfloat16 is a known way to bias training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FLOOR = -1e9
"""Log-prob (nats) of a token that cannot be sampled; exp of it is 0."""


def raw_logits(hidden: Float[Array, "... D"], table: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """h·Wᵀ in the compute type of ``hidden``, accumulated in float32."""
    return jnp.einsum("...D,VD->...V", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)


def sampled_logits(
    hidden: Float[Array, "... D"], table: Float[Array, "V D"], sampled_tokens: int
) -> Float[Array, "... V"]:
    """Logits with the padding rows of the table at -inf: they are never sampled and take no probability."""
    z = raw_logits(hidden, table)
    return (
        z if sampled_tokens == table.shape[0] else jnp.where(jnp.arange(table.shape[0]) < sampled_tokens, z, -jnp.inf)
    )


def _slices(x: Array, chunk: int) -> Array:
    """[N, ...] -> [ceil(N / C), C, ...], zeros at the end."""
    padding = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, chunk, *x.shape[1:])


def _distribution(hidden: Array, table: Array, temperature: Array, sampled_tokens: int) -> tuple[Array, Array]:
    """(log p, p) of a slice; log p is very low but finite where p is 0, so that 0 * log 0 is 0."""
    z = sampled_logits(hidden, table, sampled_tokens) / temperature
    logp = jnp.maximum(jax.nn.log_softmax(z, -1), FLOOR)
    return logp, jnp.exp(logp)


def _forward(hidden, table, tokens, temperature, sampled_tokens, chunk):
    low = table.astype(hidden.dtype)

    def slice_stats(_, piece):
        h, token = piece
        logp, p = _distribution(h, low, temperature, sampled_tokens)
        return None, (jnp.take_along_axis(logp, token[:, None], 1)[:, 0], -jnp.sum(p * logp, -1))

    count = tokens.shape[0]
    size = min(chunk, count)
    _, (logprobs, entropy) = jax.lax.scan(slice_stats, None, (_slices(hidden, size), _slices(tokens, size)))
    logprobs, entropy = logprobs.reshape(-1)[:count], entropy.reshape(-1)[:count]
    return (logprobs, entropy), (hidden, table, tokens, temperature, entropy)


def _backward(sampled_tokens, chunk, residuals, cotangents):
    hidden, table, tokens, temperature, entropy = residuals
    low = table.astype(hidden.dtype)
    count = tokens.shape[0]
    size = min(chunk, count)

    def slice_gradient(table_gradient, piece):
        h, token, ent, a, b = piece
        logp, p = _distribution(h, low, temperature, sampled_tokens)
        dz = -p * (a[:, None] + b[:, None] * (logp + ent[:, None]))
        dz = dz.at[jnp.arange(size), token].add(a) / temperature
        dz = dz.astype(h.dtype)
        dh = jnp.einsum("CV,VD->CD", dz, low, preferred_element_type=jnp.float32)
        dw = jnp.einsum("CV,CD->VD", dz, h, preferred_element_type=jnp.float32)
        return table_gradient + dw, dh.astype(h.dtype)

    pieces = tuple(_slices(x, size) for x in (hidden, tokens, entropy, *cotangents))
    dw, dh = jax.lax.scan(slice_gradient, jnp.zeros(table.shape, jnp.float32), pieces)
    dh = dh.reshape(-1, hidden.shape[1])[:count]
    return dh, dw.astype(table.dtype), None, jnp.zeros_like(temperature)


def token_logprobs(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    tokens: Int[Array, " N"],
    temperature: Float[Array, ""],
    sampled_tokens: int,
    chunk: int,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-prob of each token and entropy of its distribution (nats) under softmax(h·Wᵀ / temperature).

    ``sampled_tokens`` is the number of table rows that count; ``chunk`` the tokens per slice. No gradient flows to
    the temperature.
    """
    return _forward(hidden, table, tokens, temperature, sampled_tokens, chunk)[0]


token_logprobs = jax.custom_vjp(token_logprobs, nondiff_argnums=(4, 5))
token_logprobs.defvjp(_forward, _backward)
