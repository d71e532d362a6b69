"""Filters against their definitions in plain Python; the draw against exact probabilities."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kardia_jax.config import SamplerConfig
from kardia_jax.rollout.sampling import Controls, draw, filter_floor, inverse_cdf

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
ROUNDING = 1e-5
"""float32 log-probs of size 10 against float64; also how near to a bound a filter may fall either way."""

compiled_draw = jax.jit(lambda logits, keys, filters: draw(logits.T, keys, filters))
compiled_floor = jax.jit(filter_floor)
compiled_inverse = jax.jit(lambda weights, uniform: inverse_cdf(weights.T, uniform))


def controls(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Controls:
    return Controls.from_config(SamplerConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))


class Filtered(NamedTuple):
    """What filters keep, and how far the nearest decision was from going the other way."""

    kept: list[int]
    margin: float


def filtered(logits, temperature: float, top_k: int, top_p: float, min_p: float) -> Filtered:
    """The filters one after the other as they are defined, for logits without ties."""
    z = [x / temperature for x in logits]
    ranked = sorted(range(len(z)), key=lambda token: -z[token])[: top_k or len(z)]
    weights = {token: math.exp(z[token] - z[ranked[0]]) for token in ranked}
    nucleus, mass, margin = [], 0.0, math.inf
    for token in ranked:
        if top_p < 1 and mass >= top_p:
            break
        nucleus.append(token)
        mass += weights[token] / sum(weights.values())
        margin = min(margin, abs(mass - top_p)) if top_p < 1 else margin
        margin = min(margin, abs(weights[token] - min_p)) if min_p > 0 else margin
    return Filtered([token for token in nucleus if weights[token] >= min_p], margin)


def kept_by_floor(logits, filters: Controls) -> list[int]:
    z = jnp.asarray([logits], jnp.float32) / filters.temperature
    return np.flatnonzero(z[0] >= compiled_floor(z, filters)[0]).tolist()


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


# ---- filters ----


@settings(deadline=None, max_examples=50)
@given(
    eighths=st.lists(st.integers(-40, 40), unique=True, min_size=11, max_size=11),
    temperature=st.floats(0.25, 4.0, width=32),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.0625, 1.0, width=32),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
    seed=st.integers(0, 1000),
)
def test_draws_come_from_the_filtered_distribution(eighths, temperature, top_k, top_p, min_p, seed):
    logits = np.array(eighths) / 8
    kept, margin = filtered(logits, temperature, top_k, top_p, min_p)
    assume(margin > ROUNDING)
    keys = jax.random.split(jax.random.key(seed), 32)
    drawn = compiled_draw(
        jnp.tile(jnp.asarray(logits, jnp.float32), (32, 1)), keys, controls(temperature, top_k, top_p, min_p)
    )
    token, z = np.asarray(drawn.token), logits / temperature
    assert set(token.tolist()) <= set(kept)
    renormalised = np.full(11, -np.inf)
    renormalised[kept] = log_softmax(z[kept])
    np.testing.assert_allclose(drawn.sampler_logprob, renormalised[token], atol=ROUNDING, rtol=ROUNDING)
    np.testing.assert_allclose(drawn.tempered_logprob, log_softmax(z)[token], atol=ROUNDING, rtol=ROUNDING)
    assert kept_by_floor(logits, controls(temperature, top_k, top_p, min_p)) == sorted(kept)


LOGITS = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
"""Ranked: 1 (0.4), 3 (0.3), 2 (0.2), 0 (0.1)."""


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (controls(), [0, 1, 2, 3]),
        (controls(top_k=1), [1]),
        (controls(top_k=2), [1, 3]),
        (controls(top_k=4), [0, 1, 2, 3]),
        (controls(top_k=1000), [0, 1, 2, 3]),
        (controls(top_p=0.3), [1]),
        (controls(top_p=0.5), [1, 3]),
        (controls(top_p=0.8), [1, 2, 3]),
        (controls(min_p=0.4), [1, 2, 3]),
        (controls(min_p=0.9), [1]),
        # Of 0.4 and 0.3 alone the first has 0.57: the nucleus is that of what top-k left.
        (controls(top_k=2, top_p=0.55), [1]),
        (controls(top_k=3, top_p=0.55), [1, 3]),
        # Squared and renormalised: 16, 9, 4, 1 of 30.
        (controls(temperature=0.5, top_p=0.5), [1]),
        (controls(temperature=0.5, min_p=0.3), [1, 3]),
        (controls(top_k=3, top_p=0.95, min_p=0.7), [1, 3]),
    ],
)
def test_filters_by_hand(filters, kept):
    assert kept_by_floor(LOGITS, filters) == kept


@pytest.mark.parametrize(
    ("filters", "kept"), [(controls(top_k=2), [0, 1, 2]), (controls(top_p=0.5), [0, 1, 2]), (controls(top_k=1), [0])]
)
def test_tokens_that_tie_with_the_last_one_kept_are_kept(filters, kept):
    # 0.4, 0.2, 0.2, 0.1, 0.1: two would do for top-k 2 and for top-p 0.5, and the third ties with the second.
    assert kept_by_floor(np.log([0.4, 0.2, 0.2, 0.1, 0.1]), filters) == kept


def test_the_most_likely_token_survives_any_top_p():
    assert kept_by_floor(LOGITS, controls(top_p=1e-9)) == [1]
    assert kept_by_floor([0.0] * 300, controls(top_p=1e-9)) == list(range(300))


def test_a_top_p_of_one_is_off_beside_another_filter():
    # The second token has probability 1e-9: the running sum of float32 is already 1 before it.
    assert kept_by_floor([20.7, 0.0, -1.0], controls(top_k=2)) == [0, 1]


def test_tokens_at_minus_infinity_stay_out_when_filters_would_keep_more():
    logits = jnp.tile(jnp.array([0.0, 0.5, -jnp.inf, -jnp.inf]), (256, 1))
    for filters in (controls(top_k=3), controls(top_k=4), controls(top_p=0.99), controls(min_p=0.01), controls()):
        drawn = compiled_draw(logits, jax.random.split(jax.random.key(0), 256), filters)
        assert set(np.asarray(drawn.token).tolist()) == {0, 1}
        assert np.isfinite(drawn.sampler_logprob).all()


def test_temperature_zero_takes_the_first_of_the_most_likely_tokens_and_filters_nothing():
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [2.0, 1.0, 0.0, -1.0]])
    drawn = compiled_draw(jnp.asarray(logits), jax.random.split(jax.random.key(0), 2), controls(0.0, 1, 0.1, 0.5))
    np.testing.assert_array_equal(drawn.token, [1, 0])
    np.testing.assert_array_equal(drawn.sampler_logprob, [0, 0])
    wanted = [log_softmax(logits[0])[1], log_softmax(logits[1])[0]]
    np.testing.assert_allclose(drawn.tempered_logprob, wanted, atol=ROUNDING)


def test_where_nothing_filters_both_log_probs_are_one_number():
    logits = 3 * jax.random.normal(jax.random.key(1), (64, 1000))
    drawn = compiled_draw(logits, jax.random.split(jax.random.key(0), 64), controls(0.7))
    np.testing.assert_array_equal(drawn.sampler_logprob, drawn.tempered_logprob)
    narrow = compiled_draw(logits, jax.random.split(jax.random.key(0), 64), controls(0.7, top_k=10))
    assert (narrow.sampler_logprob > narrow.tempered_logprob).all()


@pytest.mark.parametrize("filters", [controls(), controls(top_k=2), controls(0.0)], ids=["plain", "top-k", "greedy"])
def test_a_logit_that_is_not_a_number_shows_in_its_rows_log_prob_alone(filters):
    logits = jnp.zeros((3, 300)).at[1, 170].set(jnp.nan)
    drawn = compiled_draw(logits, jax.random.split(jax.random.key(0), 3), filters)
    assert np.isnan(drawn.tempered_logprob).tolist() == [False, True, False]
    assert ((drawn.token >= 0) & (drawn.token < 300)).all()


def test_changing_the_controls_compiles_nothing():
    traces = []

    def traced(logits, keys, filters):
        traces.append(1)
        return draw(logits.T, keys, filters)

    program = jax.jit(traced)
    logits, keys = jnp.zeros((4, 9)), jax.random.split(jax.random.key(0), 4)
    for filters in (controls(), controls(0.0), controls(0.3, 4), controls(2.0, 0, 0.5), controls(1.0, 3, 0.9, 0.1)):
        program(logits, keys, filters)
    assert len(traces) == 1


# ---- the draw ----


def random_weights(seed: int, size: int, zero_share: float) -> np.ndarray:
    """Whole numbers, whose sums are exact in float32; at least one is above 0."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 9, size) * (rng.random(size) >= zero_share)
    weights[rng.integers(size)] += 1
    return weights.astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([5, 128, 300]),
    zero_share=st.sampled_from([0.0, 0.5, 0.99]),
    uniforms=st.lists(st.floats(0, float(BELOW_ONE), width=32), min_size=4, max_size=4),
)
def test_the_first_running_sum_above_uniform_times_total_is_drawn(seed, size, zero_share, uniforms):
    weights = random_weights(seed, size, zero_share)
    uniform = np.array(uniforms, np.float32)
    token = compiled_inverse(jnp.tile(weights, (4, 1)), uniform)
    wanted = np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right")
    np.testing.assert_array_equal(token, wanted)


def test_evenly_spaced_uniforms_draw_every_token_as_often_as_it_weighs():
    weights = random_weights(1, 300, 0.3)
    weights[7] += 4096 - weights.sum()
    uniform = np.arange(4096, dtype=np.float32) / 4096
    token = compiled_inverse(jnp.broadcast_to(weights, (4096, 300)), uniform)
    np.testing.assert_array_equal(np.bincount(np.asarray(token), minlength=300), weights)


@pytest.mark.parametrize(("uniform", "wanted"), [(0.0, 130), (BELOW_ONE, 140)])
def test_the_ends_of_the_uniform_range_meet_the_outermost_weights(uniform, wanted):
    # Blocks of 128: the first and the last hold nothing, the second begins and ends with zeros.
    weights = np.zeros((1, 384), np.float32)
    weights[0, [130, 135, 140]] = [0.1, 0.7, 0.3]
    assert compiled_inverse(weights, jnp.float32([uniform])).tolist() == [wanted]


def test_rounding_never_draws_a_token_of_weight_zero():
    # Sums of 0.1 are not exact: for many rows uniform * total reaches the last running sum.
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((512, 300)) < 0.5, rng.random((512, 300)), 0).astype(np.float32)
    weights[:, 150:] = 0
    for uniform in (0.0, 0.5, BELOW_ONE):
        token = compiled_inverse(weights, jnp.full(512, uniform, jnp.float32))
        assert (np.take_along_axis(weights, np.asarray(token)[:, None], 1) > 0).all()


def test_rounding_between_blocks_never_draws_a_token_of_weight_zero():
    # Blocks weigh 0.75 ulp and 1, together 1 + ulp: the second seems to start at 1 ulp, above the target of 0.8 ulp.
    ulp = 2.0**-23
    weights = np.zeros((1, 256), np.float32)
    weights[0, [0, 130]] = [0.75 * ulp, 1.0]
    assert compiled_inverse(weights, jnp.float32([0.8 * ulp])).tolist() == [130]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom; tokens expected fewer than five times are pooled."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    filled = expected > 0
    return float(((counts - expected)[filled] ** 2 / expected[filled]).sum()), int(filled.sum()) - 1


@pytest.mark.parametrize("filters", [controls(0.8), controls(1.5, top_k=120, top_p=0.95)])
def test_drawn_frequencies_fit_the_exact_probabilities(filters):
    rows, size = 4096, 150
    logits = np.random.default_rng(3).normal(size=size).astype(np.float32)
    keys = jax.random.split(jax.random.key(9), rows)
    token = np.asarray(compiled_draw(jnp.broadcast_to(logits, (rows, size)), keys, filters).token)
    z = logits.astype(np.float64) / float(filters.temperature)
    kept, _ = filtered(logits, float(filters.temperature), int(filters.top_k), float(filters.top_p), 0.0)
    probabilities = np.zeros(size)
    probabilities[kept] = np.exp(log_softmax(z[kept]))
    statistic, freedom = chi_square(np.bincount(token, minlength=size), rows * probabilities)
    # Mean freedom, variance 2 freedom; four standard deviations are passed by chance once in ten thousand seeds.
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    assert len(set(token.tolist())) > 0.8 * len(kept)
