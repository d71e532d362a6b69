"""Two judges on one sample, by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.judge.audit import audit_metrics, audit_sample, compare
from kardia_jax.rewards.rubric import Criterion, JudgeFailure, Mark, Rubric, Verdict

LEVELS = ("no", "hardly", "partly", "mostly", "yes")
RUBRIC = Rubric("two", "1", (Criterion("tone", "Kind?", LEVELS, 3.0), Criterion("sense", "Clear?", LEVELS)))
LOST = JudgeFailure("late", retryable=True)


def said(tone: float, sense: float = 3) -> Verdict:
    return Verdict((Mark("tone", tone, "so"), Mark("sense", sense, "so")))


def test_the_gap_by_hand():
    paid = [said(5), said(4), said(5, 1), said(2)]
    audited = [said(3), said(3), said(4, 5), said(3)]
    audit = compare(RUBRIC, paid, audited)
    assert (audit.compared, audit.missing) == (4, 0)
    tone, sense = audit.criteria["tone"], audit.criteria["sense"]
    assert (tone.mean, tone.absolute) == ((2 + 1 + 1 - 1) / 4, 5 / 4)
    assert (sense.mean, sense.absolute) == (-4 / 4, 4 / 4)
    # Unit: (3 tone + sense) / 16 apart: 6/16, 3/16, (3 - 4)/16, -3/16.
    assert audit.unit.mean == pytest.approx((6 + 3 - 1 - 3) / 64)
    # tone ranks: 3.5 2 3.5 1 against 2 2 4 2.
    assert tone.rank_correlation == pytest.approx(2 / math.sqrt(4.5 * 3))


def test_what_one_of_them_has_not_marked_is_in_no_number():
    audit = compare(RUBRIC, [said(5), LOST, said(2)], [said(4), said(1), LOST])
    assert (audit.compared, audit.missing) == (1, 2)
    assert audit.criteria["tone"].mean == 1
    assert math.isnan(audit.unit.rank_correlation)


def test_nothing_to_compare_is_nan_and_no_error():
    metrics = audit_metrics(compare(RUBRIC, [LOST], [said(4)]))
    assert math.isnan(metrics["audit/gap"])
    assert math.isnan(metrics["audit/gap/tone"])
    assert (metrics["audit/compared"], metrics["audit/missing"]) == (0, 1)


def test_items_of_a_dialogue_have_no_column():
    extra = Verdict((*said(4).marks, Mark("item_1", 5, "so")))
    assert set(compare(RUBRIC, [extra], [extra]).criteria) == {"tone", "sense"}


def test_metrics_have_a_gap_and_an_order_for_each_criterion():
    metrics = audit_metrics(compare(RUBRIC, [said(5), said(3), said(1)], [said(4), said(2), said(1)]))
    assert metrics["audit/gap/tone"] == pytest.approx(2 / 3)
    assert metrics["audit/rank_correlation/tone"] == pytest.approx(1.0)


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        compare(RUBRIC, [said(5)], [])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.integers(0, 200), st.integers(0, 50))
def test_a_sample_is_a_function_of_seed_and_step(seed, step, candidates, size):
    chosen = audit_sample(seed, step, candidates, size)
    assert chosen == audit_sample(seed, step, candidates, size)
    assert len(set(chosen)) == min(size, candidates)
    assert list(chosen) == sorted(chosen)
    assert all(0 <= place < candidates for place in chosen)


def test_other_steps_and_seeds_look_elsewhere():
    samples = {audit_sample(seed, step, 64, 8) for seed in range(4) for step in range(16)}
    assert len(samples) == 64
    assert {place for sample in samples for place in sample} == set(range(64))
