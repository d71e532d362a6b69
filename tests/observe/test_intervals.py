import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.observe.intervals import (
    T_95,
    Interval,
    bootstrap_interval,
    bootstrap_macro_f1,
    bootstrap_statistic,
    macro_f1,
    t_interval,
    t_quantile,
)

# Student's t, two-sided 95 %, from printed tables beyond the range of our own.
PRINTED_T = {40: 2.021, 60: 2.000, 120: 1.980}
# The table has three decimals.
TABLE_TOLERANCE = 6e-4


def test_t_interval_by_hand():
    mean, low, high = t_interval([0.60, 0.66, 0.63])
    assert mean == pytest.approx(0.63)
    # s = 0.03, n = 3, t(2) = 4.303: half width 0.074530.
    assert high - mean == pytest.approx(0.0745303, abs=1e-6)
    assert mean - low == pytest.approx(high - mean)


def test_one_seed_has_a_mean_and_no_spread():
    mean, low, high = t_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert math.isnan(t_interval([]).mean)


def test_quantiles_fall_with_freedom_and_meet_printed_values():
    points = [t_quantile(freedom) for freedom in range(1, 200)]
    assert all(left > right for left, right in itertools.pairwise(points))
    for freedom, printed in PRINTED_T.items():
        assert t_quantile(freedom) == pytest.approx(printed, abs=TABLE_TOLERANCE)
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile(0)


def test_every_table_entry_is_the_quantile_by_integration():
    # P(|T| <= t) = 0.95, by Simpson's rule over the density.
    for freedom, point in enumerate(T_95, start=1):
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        x = np.linspace(0, point, 4001)
        density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        weights = np.ones_like(x)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        inside = 2 * (weights @ density) * (x[1] / 3)
        assert inside == pytest.approx(0.95, abs=1e-4), freedom


def test_clusters_are_drawn_whole():
    # Two personas that are each of one mind: a resample is one, the other or both, so its mean is 0, 0.5 or
    # 1.
    values, clusters = [0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10
    assert bootstrap_interval(values, clusters, seed=0) == Interval(0.5, 0.0, 1.0)
    # The same values as 20 clusters of one answer are far less uncertain.
    _, low, high = bootstrap_interval(values, list(range(20)), seed=0)
    assert low > 0.2
    assert high < 0.8


def test_a_missing_verdict_leaves_the_mean():
    present = bootstrap_interval([1.0, 3.0], ["a", "b"], seed=1)
    assert bootstrap_interval([1.0, math.nan, 3.0], list("acb"), seed=1) == present
    assert math.isnan(bootstrap_interval([math.nan], ["a"], seed=1).mean)


def test_one_cluster_has_no_spread():
    mean, low, high = bootstrap_interval([1.0, 2.0], ["a", "a"], seed=0)
    assert mean == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 200 samples of 40 normal values with mean 0: 95 % of the intervals hold 0; 3 standard errors are 4.6
    # points.
    generator, hits = np.random.default_rng(5), 0
    for trial in range(200):
        sample = generator.normal(size=40)
        _, low, high = bootstrap_interval(sample.tolist(), list(range(40)), seed=trial, n=300)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="clusters: wanted 2"):
        bootstrap_interval([1.0, 2.0], ["a"], seed=0)
    with pytest.raises(ValueError, match="predicted: wanted 1"):
        macro_f1(["sad"], [], ["sad"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 4)), min_size=1, max_size=30), st.integers(0, 9))
def test_the_statistic_form_agrees_with_the_mean_form(rows, seed):
    values, clusters = [float(value) for value, _ in rows], [cluster for _, cluster in rows]
    data = np.array(values)
    plain = bootstrap_interval(values, clusters, seed, n=50)
    general = bootstrap_statistic(lambda index: float(data[index].mean()), clusters, seed, n=50)
    np.testing.assert_allclose(plain, general, atol=1e-9)
    assert plain == bootstrap_interval(values, clusters, seed, n=50) or math.isnan(plain.low)


LABELS = ["angry", "glad", "sad", "proud"]


def test_macro_f1_by_hand():
    gold = ["sad", "sad", "glad", "glad", "angry"]
    predicted = ["sad", "glad", "glad", None, "sad"]
    # sad: TP 1, FP 1, FN 1 -> 1/2. glad: TP 1, FP 1, FN 1 -> 1/2. angry: TP 0, FN 1 -> 0. proud: absent, left
    # out.
    assert macro_f1(gold, predicted, LABELS) == pytest.approx((0.5 + 0.5 + 0.0) / 3)


def test_macro_f1_of_a_label_that_is_only_predicted_is_zero():
    # sad: TP 1, FN 1 -> 2/3. proud: FP 1 -> 0.
    assert macro_f1(["sad", "sad"], ["sad", "proud"], LABELS) == pytest.approx(1 / 3)


def test_macro_f1_of_a_malformed_answer_blames_no_label():
    # A word that is no label only misses its gold label: sad has TP 1, FN 1 -> 2/3, and it is the only one
    # shown.
    assert macro_f1(["sad", "sad"], ["sad", "gloomy"], LABELS) == pytest.approx(2 / 3)


def test_macro_f1_edges():
    assert macro_f1(LABELS, list(LABELS), LABELS) == 1.0
    assert math.isnan(macro_f1([], [], LABELS))
    with pytest.raises(ValueError, match="gloomy"):
        macro_f1(["gloomy"], ["sad"], LABELS)


def test_macro_f1_interval_holds_its_value():
    gold = ["sad", "glad", "angry", "sad", "glad", "proud"] * 5
    predicted = ["sad", "glad", "sad", "sad", "angry", "proud"] * 5
    interval = bootstrap_macro_f1(gold, predicted, LABELS, [index // 2 for index in range(30)], seed=0, n=200)
    assert interval.mean == macro_f1(gold, predicted, LABELS)
    assert interval.low <= interval.mean <= interval.high
    assert interval.low < interval.high
