"""The chunked head against log_softmax over the whole table: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.model.head import Slices, model_logits, sampled_logits, token_logprobs

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(11, 8)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(23, 8)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 20, 11))
WHOLE = Slices(8)
KEEP = jnp.asarray([1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1], bool)


def plain(hidden, table, temperature, sampled, softcap):
    z = (hidden @ table.T)[:, :sampled]
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    logp = jax.nn.log_softmax(z / temperature, -1)
    logprobs, entropy = jnp.take_along_axis(logp, TOKENS[:, None], 1)[:, 0], -(jnp.exp(logp) * logp).sum(-1)
    return jnp.where(KEEP, logprobs, 0), jnp.where(KEEP, entropy, 0)


@pytest.mark.parametrize("slices", [(1, 0), (4, 0), (4, 5), (11, 23), (64, 1), (64, 22), (64, 30)])
@pytest.mark.parametrize("sampled", [20, 23])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_and_gradients_are_those_of_the_whole_table(slices, sampled, softcap):
    slices = Slices(*slices)
    weights, entropy_weights = jnp.asarray(RNG.normal(size=(2, 11)), jnp.float32)

    def ours(hidden, table):
        logprobs, entropy = token_logprobs(hidden, table, TOKENS, KEEP, jnp.float32(0.8), sampled, slices, softcap)
        return (weights * logprobs + entropy_weights * entropy).sum(), (logprobs, entropy)

    def theirs(hidden, table):
        logprobs, entropy = plain(hidden, table, 0.8, sampled, softcap)
        return (weights * logprobs + entropy_weights * entropy).sum(), (logprobs, entropy)

    (_, got), got_gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(HIDDEN, TABLE)
    (_, wanted), wanted_gradients = jax.value_and_grad(theirs, (0, 1), has_aux=True)(HIDDEN, TABLE)
    for a, b in zip(jax.tree.leaves((got, got_gradients)), jax.tree.leaves((wanted, wanted_gradients)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_by_hand():
    # Two tokens, logits (0, log 3): probabilities 1/4 and 3/4.
    logprobs, entropy = token_logprobs(
        jnp.ones((1, 1)),
        jnp.array([[0.0], [np.log(3)]]),
        jnp.array([1]),
        jnp.array([True]),
        jnp.float32(1),
        2,
        WHOLE,
        None,
    )
    assert float(logprobs[0]) == pytest.approx(np.log(0.75), abs=1e-6)
    assert float(entropy[0]) == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), abs=1e-6)


def test_soft_capped_by_hand():
    # h = 1, w = (0, 2), cap 2: logits 0 and 2 tanh 1 = t, p = 1 / (1 + exp -t) of token 1.
    def logprob(h):
        table, one = jnp.array([[0.0], [2.0]]), jnp.array([1])
        return token_logprobs(h, table, one, one == 1, jnp.float32(1), 2, WHOLE, 2.0)[0][0]

    value, gradient = jax.value_and_grad(logprob)(jnp.ones((1, 1)))
    t = 2 * np.tanh(1)
    p = 1 / (1 + np.exp(-t))
    assert float(value) == pytest.approx(np.log(p), abs=1e-6)
    # d log p / dh = (1 - p) dt/dh, and dt/dh = 2 (1 - tanh² 1).
    assert float(gradient[0, 0]) == pytest.approx((1 - p) * 2 * (1 - np.tanh(1) ** 2), abs=1e-6)


def test_capped_logits_stay_within_the_cap_and_padding_rows_below_it():
    assert float(jnp.abs(model_logits(100 * HIDDEN, TABLE, 3.0)).max()) <= 3.0
    z = sampled_logits(100 * HIDDEN, TABLE, 20, 3.0)
    assert float(jnp.abs(z[:20]).max()) <= 3.0
    assert jnp.isneginf(z[20:]).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_rows_are_minus_infinity_and_get_no_gradient(softcap):
    assert jnp.isneginf(sampled_logits(HIDDEN, TABLE, 20, softcap)[20:]).all()

    def loss(table):
        return token_logprobs(HIDDEN, table, TOKENS, KEEP, jnp.float32(1), 20, Slices(4, 7), softcap)[0].sum()

    gradient = jax.grad(loss)(TABLE)
    assert (gradient[20:] == 0).all()
    assert jnp.isfinite(gradient).all()


def test_table_gradient_is_summed_in_float32_over_bfloat16_slices():
    tokens = jnp.zeros(512, int)
    hidden = jnp.full((512, 1), 1.0, jnp.bfloat16)
    table = jnp.array([[0.0], [0.0]])
    gradient = jax.grad(
        lambda w: token_logprobs(hidden, w, tokens, tokens == 0, jnp.float32(1), 2, Slices(1), None)[0].sum()
    )(table)
    # 512 slices of 1/2 each; adding them in bfloat16 would stall at 128.
    np.testing.assert_allclose(gradient, [[256.0], [-256.0]])


@pytest.mark.parametrize("slices", [Slices(64), Slices(4096, 128)])
def test_no_array_of_tokens_by_vocabulary_in_the_compiled_gradient(slices):
    tokens, vocabulary, width = 4096, 8192, 16
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
    )

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(hidden, table):
        return token_logprobs(
            hidden, table, jnp.zeros(tokens, int), jnp.ones(tokens, bool), jnp.float32(1), vocabulary, slices, None
        )[0].sum()

    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    whole = tokens * vocabulary * 4
    assert memory.temp_size_in_bytes < whole / 8
