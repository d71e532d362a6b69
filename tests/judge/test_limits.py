"""The decisions of traffic control, with numbers computed by hand and laws that must hold for any course of events."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kardia_jax.judge.limits import Breaker, Bucket, RetryBudget, backoff, retry_after
from kardia_jax.judge.stats import JudgeStats, quantile

# ---- limits per minute


def test_a_bucket_gives_a_tenth_at_once_and_the_rest_evenly():
    bucket = Bucket(600.0)
    assert (bucket.capacity, bucket.rate) == (60.0, 9.0)
    for _ in range(60):
        assert bucket.wait(0.0, 1) == 0
        bucket.spend(0.0, 1)
    assert bucket.wait(0.0, 1) == pytest.approx(1 / 9)
    assert bucket.wait(0.05, 1) == pytest.approx(1 / 9 - 0.05)


def test_what_was_estimated_too_high_comes_back_and_too_low_is_owed():
    bucket = Bucket(1000.0)  # capacity 100, 15 a second
    bucket.spend(0.0, 90)
    assert bucket.wait(0.0, 40) == pytest.approx(30 / 15)
    bucket.spend(0.0, 60 - 90)
    assert bucket.wait(0.0, 40) == 0
    bucket.spend(0.0, 100)
    assert bucket.wait(0.0, 1) == pytest.approx(61 / 15)


@given(
    limit=st.integers(1, 300),
    gaps=st.lists(st.floats(0, 20), min_size=1, max_size=120),
)
def test_no_window_of_a_minute_holds_more_than_the_limit(limit, gaps):
    bucket, now, sent = Bucket(float(limit)), 0.0, []
    for gap in gaps:
        now += gap
        now += bucket.wait(now, 1)
        bucket.spend(now, 1)
        sent.append(now)
    most = max(sum(start <= at < start + 60 for at in sent) for start in sent)
    # A request that finds less than a whole one in the bucket of a tiny limit may start early by one.
    assert most <= max(limit, 1)


def test_a_cost_above_the_capacity_goes_when_the_bucket_is_full_and_is_paid_off_afterwards():
    bucket = Bucket(100.0)  # capacity 10, 1.5 a second
    assert bucket.wait(0.0, 1000) == 0
    bucket.spend(0.0, 1000)
    assert bucket.wait(0.0, 1000) == pytest.approx(1000 / 1.5)


# ---- retries


@given(
    share=st.floats(0, 1),
    reserve=st.integers(0, 20),
    calls=st.lists(st.integers(0, 6), min_size=1, max_size=200),
)
def test_retries_never_exceed_share_and_reserve(share, reserve, calls):
    """Each call may want several retries; all together get no more than the budget."""
    budget, spent = RetryBudget(share, reserve), 0
    for wanted in calls:
        budget.earn()
        spent += sum(budget.spend() for _ in range(wanted))
    assert spent <= reserve + share * len(calls) + 1e-6


def test_calls_that_go_well_fill_the_reserve_and_no_more():
    budget = RetryBudget(0.5, 2)
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(4)] == [True, True, False, False]


def test_backoff_doubles_up_to_its_bound_and_is_uniform_below():
    assert [backoff(tries, 0.5, 3.0, 1.0) for tries in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff(3, 0.5, 3.0, 0.25) == 0.5
    assert backoff(10_000, 0.5, 3.0, 0.5) == 1.5


NOON = 1445412480.0
"""Wed, 21 Oct 2015 07:28:00 GMT, the date of the RFC's example."""


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
def test_retry_after_in_seconds_and_as_a_date(header, seconds):
    assert retry_after(header, NOON) == seconds


# ---- the breaker


def test_the_breaker_opens_probes_doubles_and_closes():
    breaker = Breaker(failures=3, pause=2.0)
    for _ in range(2):
        breaker.fail(0.0, probe=False)
    breaker.succeed()
    for _ in range(2):
        breaker.fail(0.0, probe=False)
    assert breaker.wait(0.0) == 0
    breaker.fail(10.0, probe=False)
    assert breaker.wait(10.0) == 2.0
    assert breaker.wait(12.0) == 0
    assert breaker.enter()
    assert breaker.wait(12.0) == float("inf")
    breaker.fail(13.0, probe=True)
    assert breaker.wait(13.0) == 4.0
    assert breaker.wait(17.0) == 0
    assert breaker.enter()
    breaker.succeed()
    assert breaker.wait(17.0) == 0
    assert not breaker.enter()


def test_calls_that_began_before_do_not_prolong_the_pause_and_a_cancelled_probe_frees_the_place():
    breaker = Breaker(failures=1, pause=2.0)
    breaker.fail(0.0, probe=False)
    for _ in range(63):
        breaker.fail(1.0, probe=False)
    assert breaker.wait(1.0) == 1.0
    assert breaker.enter()
    breaker.abandon(probe=False)
    assert breaker.wait(2.0) == float("inf")
    breaker.abandon(probe=True)
    assert breaker.wait(2.0) == 0


def test_the_pause_grows_to_a_minute_and_a_longer_one_stays():
    breaker = Breaker(failures=1, pause=2.0)
    breaker.fail(0.0, probe=False)
    for _ in range(40):
        breaker.enter()
        breaker.fail(0.0, probe=True)
    assert breaker.wait(0.0) == 60.0
    patient = Breaker(failures=1, pause=90.0)
    patient.fail(0.0, probe=False)
    assert patient.wait(0.0) == 90.0


# ---- statistics


def test_quantiles_by_hand():
    tens = [float(n) for n in range(1, 21)]
    assert [quantile(tens, share) for share in (0.5, 0.95, 1.0)] == [10.0, 19.0, 20.0]
    assert quantile([7.0], 0.5) == 7.0
    assert quantile([], 0.5) != quantile([], 0.5)


def test_taking_starts_again_from_zero_but_for_the_total_cost():
    stats = JudgeStats(price_prompt=1.0, price_completion=10.0)
    stats.count("calls")
    stats.count("timeouts")
    stats.count("cache_hits")
    for _ in range(3):
        stats.count("cache_misses")
    stats.tokens(1_000_000, 100_000)
    stats.queue(5)
    stats.queue(2)
    first, second = stats.take(), stats.take()
    assert (first["judge/calls"], first["judge/timeouts"], first["judge/queue"]) == (1, 1, 5)
    assert first["judge/cache_hit_rate"] == 0.25
    assert (first["judge/cost"], first["judge/cost_total"]) == (2.0, 2.0)
    assert (second["judge/calls"], second["judge/cost"], second["judge/cost_total"]) == (0, 0.0, 2.0)
    assert second["judge/cache_hit_rate"] != second["judge/cache_hit_rate"]
    assert set(first) == set(second)


def test_what_many_threads_count_is_counted():
    stats = JudgeStats()
    taken = []

    def count():
        for _ in range(2000):
            stats.count("calls")
            stats.latency(0.25)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken.append(stats.take())
    taken.append(stats.take())
    assert sum(one["judge/calls"] for one in taken) == 4 * 2000
    assert {one["judge/latency_max"] for one in taken if not math.isnan(one["judge/latency_max"])} == {0.25}
