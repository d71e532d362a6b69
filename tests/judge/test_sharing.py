"""Which prompts share a prefix: counted by hand, and held to laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.judge.sharing import Shape, alone, common_prefix, divide, gathered, padded_arrays

LARGE = 10**9


def prompts(dialogue: int, reply: int, criterion: int, replies: int, criteria: int) -> tuple[list, list]:
    """Rows with so many tokens of their own at each level, all tokens different, and the rows of each reply."""
    fresh = iter(range(10**6))

    def new(count: int) -> tuple[int, ...]:
        return tuple(next(fresh) for _ in range(count))

    start, rows, places = new(dialogue), [], []
    for _ in range(replies):
        text = new(reply)
        places.append(list(range(len(rows), len(rows) + criteria)))
        rows += [start + text + new(criterion) for _ in range(criteria)]
    return rows, places


def tokens(parts) -> int:
    return sum(part.shape.tokens for part in parts)


@pytest.mark.parametrize(
    ("rows", "wanted"), [([(1, 2, 3), (1, 2, 4), (1, 2)], 2), ([(1, 2)], 2), ([(1,), (2,)], 0), ([(), (1,)], 0)]
)
def test_a_common_prefix(rows, wanted):
    assert common_prefix(rows) == wanted


def test_a_long_dialogue_is_run_once_for_all_replies():
    rows, places = prompts(dialogue=768, reply=31, criterion=96, replies=8, criteria=5)
    (part,) = divide(rows, places, LARGE)
    # One place more than the 31 + 96 tokens behind the dialogue: where the mark will stand.
    assert part == (tuple(range(40)), 768, Shape(768, 40, 128))
    # Each reply apart: 8 x (1024 + 5 x 128) with a prefix of 799, no sharing: 40 x (1024 + 16).
    assert tokens([part]) == 768 + 40 * 128 < 8 * (1024 + 5 * 128) < 40 * (1024 + 16)


def test_long_replies_are_run_once_each():
    rows, places = prompts(dialogue=32, reply=480, criterion=60, replies=4, criteria=5)
    parts = divide(rows, places, LARGE)
    assert [part.rows for part in parts] == [tuple(own) for own in places]
    assert {part.shape for part in parts} == {Shape(512, 5, 64)}


def test_a_budget_cuts_the_replies_of_a_dialogue_into_equal_parts():
    rows, places = prompts(dialogue=768, reply=31, criterion=96, replies=8, criteria=5)
    parts = divide(rows, places, budget=768 + 20 * 128)
    assert [len(part.rows) for part in parts] == [20, 20]
    assert sorted(row for part in parts for row in part.rows) == list(range(40))


def test_where_no_two_rows_fit_together_each_is_alone():
    rows, places = prompts(dialogue=10, reply=10, criterion=200, replies=2, criteria=2)
    parts = divide(rows, places, budget=alone(rows, 0).shape.tokens)
    assert [part.rows for part in parts] == [(0,), (1,), (2,), (3,)]
    assert {part.prefix for part in parts} == {220}


def test_equal_rows_share_everything():
    parts = divide([(1, 2, 3)] * 4, [[0, 1], [2, 3]], LARGE)
    assert [(part.rows, part.prefix) for part in parts] == [((0, 1, 2, 3), 3)]


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple), min_size=2, max_size=2),
        min_size=1,
        max_size=6,
    ),
    st.integers(100, 400),
)
def test_the_arrays_hold_every_row_once_and_whole(replies, budget):
    rows = [row for reply in replies for row in reply]
    places = [[2 * n, 2 * n + 1] for n in range(len(replies))]
    seen = []
    for batch in gathered(divide(rows, places, budget), budget):
        arrays = padded_arrays(rows, batch, pad=9)
        assert arrays.tokens <= budget
        assert (arrays.suffix_lengths < arrays.suffix_tokens.shape[2]).all()
        for p, part in enumerate(batch):
            for g, row in enumerate(part.rows):
                seen.append(row)
                prefix = arrays.prefix_tokens[p, : arrays.prefix_lengths[p, g]]
                suffix = arrays.suffix_tokens[p, g, : arrays.suffix_lengths[p, g]]
                assert (*prefix.tolist(), *suffix.tolist()) == rows[row]
    assert sorted(seen) == list(range(len(rows)))


def test_what_fills_up_is_padding_of_length_one():
    rows = [(1, 2, 3), (1, 2, 4), (1, 2, 5), (1, 2, 6), (1, 2, 7)]
    parts = divide(rows, [[0], [1], [2], [3], [4]], LARGE)
    (batch,) = gathered(parts, LARGE)
    arrays = padded_arrays(rows, batch, pad=9)
    assert arrays.suffix_tokens.shape == (1, 6, 16)
    assert arrays.prefix_lengths[0].tolist() == [2, 2, 2, 2, 2, 1]
    np.testing.assert_array_equal(arrays.suffix_tokens[0, 5], np.full(16, 9))


def test_batches_are_full_buckets_and_do_not_depend_on_the_order_of_parts():
    rows = [tuple(range(100 * n, 100 * n + 40)) for n in range(7)]
    parts = [alone(rows, row) for row in range(7)]
    size = parts[0].shape.tokens
    sizes = [len(batch) for batch in gathered(parts, 5 * size)]
    # Five would be padded to six, which the budget does not hold.
    assert sizes == [4, 3]
    assert sizes == [len(batch) for batch in gathered(parts[::-1], 5 * size)]
