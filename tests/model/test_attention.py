"""Group attention equals the plain, repeated form: values and gradients, over lengths, ratios, windows and caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.model import attention
from kardia_jax.model.attention import (
    MASKED,
    Part,
    Scoring,
    attend,
    causal,
    causal_attention,
    group_attention,
    merge,
    within,
)

TOLERANCE = 2e-6
"""float32 sums over up to 20 keys in another order."""


def plain_attention(q, k, v, scale, softcap, window):
    """One row by the textbook, in numpy float64: q [T, H, E] at the last T of S positions, k and v [S, K, E]."""
    length, heads, _ = q.shape
    size, kv_heads, _ = k.shape
    out = np.zeros_like(q)
    for h in range(heads):
        for t in range(length):
            at = size - length + t
            low = 0 if window is None else max(0, at - window + 1)
            keys, values = k[low : at + 1, h * kv_heads // heads], v[low : at + 1, h * kv_heads // heads]
            scores = keys @ q[t, h] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ values / weights.sum()
    return out


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    group=st.integers(1, 3),
    length=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2]),
    ratio=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 3, 6]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000),
)
def test_group_attention_is_the_repeated_form(lengths, group, length, kv_heads, ratio, window, softcap, seed):
    rng = np.random.default_rng(seed)
    prompts, size, dim = len(lengths), max(lengths) + 2, 4
    q = rng.normal(size=(prompts, group, length, kv_heads * ratio, dim))
    k, v = rng.normal(size=(2, prompts, group, length, kv_heads, dim))
    prompt_k, prompt_v = rng.normal(size=(2, prompts, size, kv_heads, dim))
    rows = rng.integers(1, np.array(lengths)[:, None] + 1, (prompts, group))
    out = jax.jit(group_attention, static_argnums=(6, 7))(
        *(jnp.asarray(x.swapaxes(-3, -2), jnp.float32) for x in (q, k, v, prompt_k, prompt_v)),
        jnp.asarray(rows),
        Scoring(0.5, softcap),
        window,
    )
    for p in range(prompts):
        for g in range(group):
            n = rows[p, g]
            keys = np.concatenate([prompt_k[p, :n], k[p, g]])
            values = np.concatenate([prompt_v[p, :n], v[p, g]])
            wanted = plain_attention(q[p, g], keys, values, 0.5, softcap, window)
            np.testing.assert_allclose(out[p, g].swapaxes(0, 1), wanted, atol=1e-5)


def test_causal_attention_is_the_textbook():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
    out = causal_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), Scoring(0.3), window=3).out
    np.testing.assert_allclose(out[0].swapaxes(0, 1), plain_attention(q[0], k[0], v[0], 0.3, None, 3), atol=TOLERANCE)


def textbook(q, k, v, keep, scoring):
    """``attend`` with all scores in memory, its gradient left to JAX."""
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = jnp.einsum("BHTE,BHSE->BHTS", q, k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    scores = jnp.where(keep[:, None], scores, -jnp.inf)
    return Part(jax.nn.softmax(scores) @ v, jax.nn.logsumexp(scores, -1))


def gradients(function, arrays, seed):
    """Of sums of output and log-sum-exp with random weights, and what they are summed of."""
    weights = jnp.asarray(np.random.default_rng(seed).normal(size=1000), jnp.float32)

    def loss(*arrays):
        part = function(*arrays)
        return sum((weights[: x.size].reshape(x.shape) * x).sum() for x in part), part

    grads, part = jax.jit(jax.grad(loss, range(len(arrays)), has_aux=True))(*arrays)
    return [*part, *grads]


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 3]),
    ratio=st.sampled_from([1, 3]),
    length=st.integers(1, 6),
    size=st.integers(1, 7),
    by_row=st.booleans(),
    by_query=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    heads_at_once=st.sampled_from([None, 0, 1, 2, 3, 100]),
    seed=st.integers(0, 1000),
)
def test_attending_by_heads_is_the_textbook_in_values_and_gradients(
    batch, kv_heads, ratio, length, size, by_row, by_query, softcap, heads_at_once, seed
):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, kv_heads * ratio, length, 4)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, batch, kv_heads, size, 4)), jnp.float32)
    keep = rng.random((batch if by_row else 1, length if by_query else 1, size)) < 0.6
    keep[..., 0] = True
    room = None if heads_at_once is None else heads_at_once * 4 * ratio * length * size
    ours, plain = (
        gradients(
            lambda *arrays, how=how, more=more: how(*arrays, jnp.asarray(keep), Scoring(0.4, softcap), *more),
            (q, k, v),
            seed,
        )
        for how, more in ((attend, (room,)), (textbook, ()))
    )
    for got, want in zip(ours, plain, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [1, 4, 7, 13])
def test_stretches_of_queries_change_nothing(size, window, monkeypatch):
    monkeypatch.setattr(attention, "SHORTEST_STRETCH", 2)
    rng = np.random.default_rng(size)
    q, k, v = jnp.asarray(rng.normal(size=(3, 2, 2, size, 4)), jnp.float32)
    scoring = Scoring(0.3, 2.0)
    ours, plain = (
        gradients(lambda *arrays, room=room: causal_attention(*arrays, scoring, window, room), (q, k, v), size)
        for room in (64, None)
    )
    for got, want in zip(ours, plain, strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=1e-5)


def test_scores_exist_within_the_room_alone():
    # 2 rows x 3 heads x 64 queries x 128 keys of float32 are 192 KiB; one head's are 32 KiB.
    q, k, v = jnp.ones((2, 3, 64, 8)), jnp.ones((2, 3, 128, 8)), jnp.ones((2, 3, 128, 8))

    def program(room):
        def total(q, k, v):
            return attend(q, k, v, jnp.ones((1, 1, 128), bool), Scoring(1.0), room).out.sum()

        return jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile().as_text()

    whole, one_head = ("f32[2,3,64,128]", "f32[6,64,128]"), "f32[1,1,64,128]"
    assert any(shape in program(None) for shape in whole)
    assert not any(shape in program(2**15) for shape in whole)
    assert one_head in program(2**15)


def test_merging_parts_by_hand():
    # One query, keys with scores log 1 and log 3: a softmax of 1/4 and 3/4 over values 10 and 20.
    parts = [Part(jnp.full((1, 1, 1, 1), x), jnp.full((1, 1, 1), jnp.log(w))) for x, w in ((10.0, 1.0), (20.0, 3.0))]
    np.testing.assert_allclose(merge(parts), np.full((1, 1, 1, 1), 17.5), rtol=1e-6)


def test_a_part_without_keys_weighs_nothing_and_has_no_nan():
    q, k, v = jnp.ones((3, 1, 1, 2, 4))
    full = attend(q, k, v, jnp.ones((1, 1, 2), bool), Scoring(1.0))

    def merged(q):
        empty = attend(q, k, v * 100, jnp.zeros((1, 1, 2), bool), Scoring(1.0))
        assert empty.lse.shape == (1, 1, 2)
        return merge([attend(q, k, v, jnp.ones((1, 1, 2), bool), Scoring(1.0)), empty]).sum()

    value, gradient = jax.value_and_grad(merged)(q)
    assert value == pytest.approx(float(full.out.sum()))
    assert jnp.isfinite(gradient).all()
    assert jnp.finfo(jnp.float32).min < MASKED


def test_masks_by_hand():
    assert within(jnp.array([[2, 3]]), 3).astype(int).tolist() == [[[1, 1, 0], [1, 1, 1]]]
    assert causal(3).astype(int).tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
