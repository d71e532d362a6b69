"""Signs of reward hacking, counted by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.rewards.combine import Scores
from kardia_jax.rewards.diagnostics import (
    closer,
    criterion_means,
    distinct_share,
    hacking_signs,
    length_reward_correlation,
    opener,
    repetition,
    shared_share,
)

REPLIES = ["I hear you. Rest now, dear friend.", "I hear you! Call her now, dear friend.", "Well done."]


def test_openers_and_closers_ignore_case_and_punctuation():
    assert [opener(reply) for reply in REPLIES] == ["i hear you", "i hear you", "well done"]
    assert closer(REPLIES[0]) == "now dear friend"
    assert shared_share([opener(reply) for reply in REPLIES]) == pytest.approx(2 / 3)
    assert opener("") == ""


def test_repetition_counts_ngrams_that_come_again():
    # a b c a b c: abc bca cab abc -> 3 distinct of 4
    assert repetition("a b c, a b c") == pytest.approx(1 / 4)
    assert repetition("a b c d") == 0.0
    assert repetition("a b") == 0.0


def test_distinct_share():
    assert distinct_share(["Well done.", "well done", "No."]) == pytest.approx(2 / 3)


def test_correlation_uses_valid_rows_alone():
    lengths, rewards = np.array([1.0, 2.0, 3.0, 100.0]), np.array([0.0, 0.5, 1.0, np.nan])
    valid = np.array([True, True, True, False])
    assert length_reward_correlation(lengths, rewards, valid) == pytest.approx(1.0)
    assert length_reward_correlation(lengths, -rewards, valid) == pytest.approx(-1.0)


@pytest.mark.parametrize("valid", [[False, False, False], [True, False, False], [True, True, False]])
def test_correlation_without_spread_is_nan_and_warns_of_nothing(valid: list[bool]):
    lengths, rewards = np.array([2.0, 2.0, 5.0]), np.array([0.1, 0.1, np.nan])
    assert math.isnan(length_reward_correlation(lengths, rewards, np.array(valid)))


def test_criterion_means_skip_completions_without_a_verdict_and_take_items_together():
    rows = [Scores(1, 1, {"tone": mark, "item_1": 1, "item_2": 2 * mark - 3}, 0.5, True) for mark in (2, 4)]
    lost = Scores(1, 1, None, None, False)
    # Items: 1 and 1 of the first completion, 1 and 5 of the second.
    assert criterion_means([*rows, lost]) == {"criterion/tone": 3.0, "criterion/items": 2.0}
    assert criterion_means([lost]) == {}


def test_no_replies_give_nan_and_not_an_error():
    signs = hacking_signs([], np.zeros(2), np.zeros(2), np.ones(2, dtype=bool))
    assert all(math.isnan(value) for value in signs.values())


@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_shares_stay_between_zero_and_one(replies: list[str]):
    lengths = np.array([len(reply) for reply in replies], dtype=np.float64)
    signs = hacking_signs(replies, lengths, np.zeros(len(replies)), np.ones(len(replies), dtype=bool))
    assert math.isnan(signs.pop("length_reward_correlation"))
    assert all(0 <= value <= 1 for value in signs.values())
