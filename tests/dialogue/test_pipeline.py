import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.dialogue.pipeline import batches, length_buckets

NAMES = [f"row {n}" for n in range(50)]


def drawn(batch: int, seed: int, steps: int, **shards: int) -> list[str]:
    order = batches(NAMES, batch, seed, **shards)
    return [item for step in range(steps) for item in order[step]]


def test_every_epoch_visits_every_item_once_though_the_batch_does_not_divide():
    stream = drawn(batch=8, seed=3, steps=19)
    epochs = [stream[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == sorted(NAMES) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


def test_a_batch_depends_on_seed_and_step_alone():
    order = batches(NAMES, 8, seed=3)
    backwards = [order[step] for step in reversed(range(10))]
    fresh = [batches(NAMES, 8, seed=3)[step] for step in range(10)]
    assert backwards[::-1] == fresh
    assert order[4] == order[4]


def test_seeds_give_unrelated_orders():
    first, second = drawn(10, 0, 10), drawn(10, 1, 10)
    assert first[:50] != second[:50]
    # An epoch's seed must not be the next run's seed: seed 1 would start where seed 0 goes on.
    assert first[50:] != second[:50]


def test_shards_joined_by_index_are_the_batch_of_one_process():
    whole = batches(NAMES, 12, seed=5)
    shards = [batches(NAMES, 12, seed=5, shard=shard, shards=3) for shard in range(3)]
    for step in (0, 4, 11):
        joined = [item for shard in shards for item in shard[step]]
        assert joined == whole[step]


def test_steps_and_epochs_are_counted():
    order = batches(NAMES, 8, seed=0)
    assert order.steps_per_epoch == 6.25
    assert [order.epoch_of(step) for step in (0, 6, 7, 12, 13, 25)] == [0, 0, 1, 1, 2, 4]
    assert [order.steps_for(epochs) for epochs in (0.01, 1, 2, 4)] == [1, 7, 13, 25]


def test_a_batch_may_be_larger_than_the_set():
    assert sorted(batches(NAMES, 100, seed=0)[0]) == sorted(NAMES * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": [], "batch": 2}, "items: wanted at least one"),
        ({"items": NAMES, "batch": 0}, "batch: wanted a positive multiple"),
        ({"items": NAMES, "batch": 3, "shards": 2}, "shards = 2, got 3"),
        ({"items": NAMES, "batch": 4, "shard": 2, "shards": 2}, "shard: wanted 0 to 1, got 2"),
        ({"items": NAMES, "batch": 4, "window": 0}, "window: wanted at least 1, got 0"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        batches(seed=0, **arguments)


def test_there_is_no_step_before_the_first():
    with pytest.raises(IndexError, match="got -1"):
        batches(NAMES, 8, seed=0)[-1]


def test_buckets_by_hand():
    wanted = {
        1: 1,
        2: 2,
        3: 3,
        4: 4,
        5: 6,
        6: 6,
        7: 8,
        8: 8,
        9: 12,
        12: 12,
        13: 16,
        17: 24,
        25: 32,
        1000: 1024,
    }
    assert {n: length_buckets(n) for n in wanted} == wanted
    with pytest.raises(ValueError, match="got 0"):
        length_buckets(0)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**6))
def test_a_bucket_holds_its_length_and_wastes_less_than_half_of_it(n: int):
    bucket = length_buckets(n)
    assert n <= bucket < 1.5 * n
    assert length_buckets(bucket) == bucket
    assert bin(bucket).count("1") <= 2


def test_a_window_puts_like_lengths_together_and_changes_what_is_drawn_by_nothing():
    lengths = [(7 * n) % 50 for n in range(50)]
    plain = batches(range(50), 4, seed=2)
    sorted_in = batches(range(50), 4, seed=2, length=lambda n: lengths[n], window=5)
    for window in range(4):
        steps = range(5 * window, 5 * window + 5)
        assert sorted(i for s in steps for i in sorted_in[s]) == sorted(i for s in steps for i in plain[s])
        ranked = sorted(lengths[i] for s in steps for i in sorted_in[s])
        alike = sorted([lengths[i] for i in sorted_in[s]] for s in steps)
        assert alike == [ranked[start : start + 4] for start in range(0, 20, 4)]


def test_whole_batches_of_a_window_come_in_an_order_of_their_own():
    order = batches(range(64), 4, seed=2, length=lambda n: n, window=16)
    firsts = [order[step][0] for step in range(16)]
    assert firsts != sorted(firsts)
    assert firsts == [batches(range(64), 4, seed=2, length=lambda n: n, window=16)[step][0] for step in range(16)]
    assert firsts != [order[step][0] for step in range(16, 32)]


def test_shards_of_a_sorted_batch_joined_are_the_batch():
    def of(**shards: int):
        return batches(NAMES, 4, seed=1, length=len, window=3, **shards)

    for step in range(7):
        assert [*of(shard=0, shards=2)[step], *of(shard=1, shards=2)[step]] == of()[step]
