"""Traffic control on a clock that jumps: minutes of waiting, retries and limits in milliseconds, to the second."""

import asyncio
import itertools
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kardia_jax.config import TrafficConfig
from kardia_jax.judge.stats import JudgeStats
from kardia_jax.judge.traffic import Sent, Traffic, Trouble, together


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where everybody sleeps, it is the next alarm's time at once."""

    def __init__(self):
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop):
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None):
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits and no alarm is set"
            self._loop.now += max(timeout, 0.0)
        return events


def run(main: Awaitable[Any]) -> Any:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:

        async def inside():
            return await main

        return runner.run(inside())


def now() -> float:
    return asyncio.get_running_loop().time()


def traffic(uniform: Callable[[], float] = lambda: 1.0, servers: int = 1, **fields: Any) -> Traffic:
    names = [f"server {n}" for n in range(servers)]
    return Traffic(names, TrafficConfig(**fields), JudgeStats(), uniform)


def failing(times: int, trouble: Trouble, asked: list[float]) -> Callable[[int, int], Awaitable[Sent[str]]]:
    """Fails so many times, then answers; notes when it was asked."""

    async def send(server: int, before: int) -> Sent[str]:
        asked.append(now())
        if len(asked) <= times:
            raise trouble
        return Sent("good", None)

    return send


BUSY = Trouble("server_errors", "status 503: busy", retryable=True)


def test_retries_wait_twice_as_long_each_time():
    asked: list[float] = []
    control = traffic(backoff_seconds=0.5, backoff_max_seconds=3.0, max_tries=6)
    assert run(control.call(failing(4, BUSY, asked), 10)) == "good"
    assert asked == pytest.approx([0.0, 0.5, 1.5, 3.5, 6.5])
    taken = control.stats.take()
    assert (taken["judge/calls"], taken["judge/retries"], taken["judge/server_errors"]) == (5, 4, 4)


def test_after_the_last_try_the_message_says_server_reason_and_tries():
    asked: list[float] = []
    with pytest.raises(Trouble, match=r"^server 0: status 503: busy \(after 3 tries\)$") as lost:
        run(traffic(max_tries=3).call(failing(9, BUSY, asked), 10))
    assert lost.value.retryable
    assert len(asked) == 3


def test_what_is_permanent_is_tried_once():
    asked: list[float] = []
    refused = Trouble("refusals", "the model refused", retryable=False)
    with pytest.raises(Trouble, match=r"the model refused \(after 1 try\)"):
        run(traffic().call(failing(9, refused, asked), 10))
    assert len(asked) == 1


def test_the_server_is_left_alone_as_long_as_it_asked_for_by_every_call():
    asked: list[float] = []
    limited = Trouble("rate_limited", "status 429: slow down", retryable=True, retry_after=20.0)
    control = traffic(backoff_seconds=0.0)

    async def main():
        first = asyncio.ensure_future(control.call(failing(1, limited, asked), 10))
        await asyncio.sleep(5)
        await control.call(failing(0, limited, asked), 10)
        await first

    run(main())
    assert asked == pytest.approx([0.0, 20.0, 20.0])


def test_a_wait_that_outlasts_the_deadline_is_not_begun():
    limited = Trouble("rate_limited", "status 429: come back tomorrow", retryable=True, retry_after=86_400.0)

    async def main():
        with pytest.raises(Trouble, match=r"^server 0: status 429: come back tomorrow; not to be asked for 86400 s"):
            await traffic(backoff_seconds=0.0, deadline_seconds=300).call(failing(9, limited, []), 10)
        return now()

    assert run(main()) == 0.0


def test_a_dead_server_is_asked_within_the_budget_and_then_only_by_probes():
    """64 calls at a server that refuses all: 8 failures open the breaker, and retries are bounded by the budget."""
    asked: list[float] = []
    control = traffic(max_tries=50, retry_share=0.2, retry_reserve=10, concurrency=4, deadline_seconds=100.0)

    async def main():
        calls = [control.call(failing(10**9, BUSY, asked), 10) for _ in range(64)]
        return await asyncio.gather(*calls, return_exceptions=True), now()

    given, ended = run(main())
    assert all(isinstance(one, Trouble) for one in given)
    assert ended <= 100.0
    assert len(asked) <= 64 + 10 + 0.2 * 64
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked) if later > earlier]
    assert max(pauses) >= 32.0, "the breaker's pauses double"


def test_after_an_outage_one_probe_finds_out_and_then_all_go_on():
    """Down from 0 to 5 s: what was asked then is answered after it, and the probes are single."""
    asked: list[float] = []

    async def send(server: int, before: int) -> Sent[str]:
        asked.append(now())
        await asyncio.sleep(0.01)
        if now() < 5.0:
            raise Trouble("connection_errors", "refused", retryable=True)
        return Sent("good", None)

    control = traffic(concurrency=16, backoff_seconds=0.1, breaker_failures=8, breaker_seconds=2.0, retry_reserve=64)
    given = run(together([control.call(send, 10) for _ in range(32)]))
    assert given == ["good"] * 32
    probes = [at for at in asked if 1.0 < at < 5.0]
    assert len(probes) == 1
    assert control.lanes[0].breaker.wait(0.0) == 0


def test_no_more_under_way_than_allowed_and_first_come_first_served():
    under_way, most, order = 0, 0, []

    async def call(number: int):
        async def send(server: int, before: int) -> Sent[int]:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            order.append(number)
            await asyncio.sleep(1.0)
            under_way -= 1
            return Sent(number, None)

        return await control.call(send, 10)

    control = traffic(concurrency=3)

    async def main():
        return await together([call(n) for n in range(10)]), now()

    given, ended = run(main())
    assert (given, order, most) == (list(range(10)), list(range(10)), 3)
    assert ended == pytest.approx(4.0)
    assert control.stats.take()["judge/queue"] == 7


def test_requests_per_minute():
    asked: list[float] = []
    control = traffic(requests_per_minute=60, deadline_seconds=1000)
    run(together([control.call(failing(0, BUSY, asked), 10) for _ in range(120)]))
    assert asked[5] == 0.0
    assert max(sum(start <= at < start + 60 for at in asked) for start in asked) <= 60
    assert asked[-1] == pytest.approx(114 / 0.9)


def test_tokens_per_minute_are_corrected_by_what_was_used():
    """Each call is estimated at 100 tokens and uses 10: after the correction nobody needs to wait."""
    control = traffic(tokens_per_minute=6000, concurrency=1, deadline_seconds=1000)

    async def send(server: int, before: int) -> Sent[None]:
        return Sent(None, 10)

    async def silent(server: int, before: int) -> Sent[None]:
        return Sent(None, None)

    async def ended(one: Any) -> float:
        await together([control.call(one, 100) for _ in range(50)])
        return now()

    assert run(ended(send)) == 0.0
    control = traffic(tokens_per_minute=6000, concurrency=1, deadline_seconds=1000)
    assert run(ended(silent)) == pytest.approx((50 * 100 - 600) / 90)


def test_a_call_goes_where_the_load_is_least_and_a_dead_server_is_left_out():
    asked = [0, 0, 0]

    async def send(server: int, before: int) -> Sent[int]:
        asked[server] += 1
        await asyncio.sleep(1.0 if server == 0 else 0.1)
        if server == 2:
            raise Trouble("connection_errors", "refused", retryable=True)
        return Sent(server, None)

    control = traffic(servers=3, concurrency=4, breaker_failures=2, breaker_seconds=100.0, backoff_seconds=0.0)
    given = run(together([control.call(send, 10) for _ in range(100)]))
    assert set(given) == {0, 1}
    assert given.count(1) > 3 * given.count(0)
    # All that were under way when the second failed had begun before.
    assert asked[2] <= 4


def test_a_deadline_ends_the_call_wherever_it_is():
    ended: list[str] = []

    async def send(server: int, before: int) -> Sent[None]:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("cancelled")
        return Sent(None, None)

    control = traffic(concurrency=1, call_seconds=500.0, deadline_seconds=30.0)

    async def main():
        given = await asyncio.gather(*[control.call(send, 10) for _ in range(3)], return_exceptions=True)
        return [str(one) for one in given], now(), len(asyncio.all_tasks())

    given, at, left = run(main())
    assert at == pytest.approx(30.0)
    assert all("no answer within judge.traffic.deadline_seconds = 30 s" in one for one in given)
    assert given[0].startswith("server 0: ")
    assert "(never sent)" in given[2]
    assert (ended, left) == (["cancelled"], 1)
    assert control.lanes[0].under_way == 0


def test_one_request_has_its_own_timeout():
    async def send(server: int, before: int) -> Sent[str]:
        await asyncio.sleep(1000 if before == 0 else 0.5)
        return Sent("good", None)

    async def main():
        return await traffic(call_seconds=10.0, backoff_seconds=0.0).call(send, 10), now()

    assert run(main()) == ("good", pytest.approx(10.5))


def test_cancelling_ends_requests_and_leaves_nothing_running():
    started, ended = [], []

    async def send(server: int, before: int) -> Sent[None]:
        started.append(1)
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(1)
        return Sent(None, None)

    control = traffic(concurrency=5)

    async def main():
        calls = [control.call(send, 10) for _ in range(20)]
        whole = asyncio.create_task(together(calls))
        await asyncio.sleep(1.0)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        return len(asyncio.all_tasks())

    assert run(main()) == 1
    assert (len(started), len(ended)) == (5, 5)
    assert control.lanes[0].under_way == 0
    assert control.budget.left == 64, "a cancelled call is no retry"


def test_counts_and_breakers_outlive_an_event_loop():
    control = traffic(breaker_failures=1, max_tries=1, breaker_seconds=50.0)
    with pytest.raises(Trouble):
        run(control.call(failing(9, BUSY, []), 10))
    with pytest.raises(Trouble, match="not to be asked for"):
        run(control.call(failing(9, BUSY, []), 10, deadline=10.0))
