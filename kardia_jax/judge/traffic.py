"""Traffic control: how requests of a judge reach one or several servers, and what becomes of those that fail.

In: ``send``, which makes one request to the server that it is told and gives a value or raises ``Trouble``. Out of
``call``: the value, or a ``Trouble`` that says which server, what happened, after how many tries.

    calls --> door (first come, first served) --> the server with the least load, when it may be asked --> send
                                                    ^        concurrency, limits per minute, Retry-After, breaker
              <-- random pause, within the budget --'  timeouts, resets, 429, 5xx and unreadable answers come back

The decisions are in ``limits.py``. Time is the event loop's. One traffic control serves one event loop at a time and
keeps its counts when the next loop comes. Whatever cancels a call (a deadline, Ctrl-C) ends its request as well.
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from kardia_jax.config.judge import TrafficConfig
from kardia_jax.judge.limits import Breaker, Bucket, RetryBudget, backoff
from kardia_jax.judge.stats import Fault, JudgeStats

Answer = TypeVar("Answer")

SERVER_FAULTS: tuple[Fault, ...] = ("timeouts", "connection_errors", "server_errors")
"""What the breaker counts; a server that refuses, limits or writes nonsense is alive."""


class Trouble(Exception):
    """A call that gave no answer."""

    def __init__(self, what: Fault, reason: str, retryable: bool, retry_after: float | None = None):
        """``retry_after``: seconds for which the server asked to be left alone."""
        super().__init__(reason)
        self.what: Fault = what
        self.reason, self.retryable, self.retry_after = reason, retryable, retry_after


class Sent(NamedTuple, Generic[Answer]):
    """What ``send`` gives: the answer, and the tokens that the server counted (None where it does not say)."""

    answer: Answer
    tokens: int | None


@dataclass
class Lane:
    """One server as traffic control sees it."""

    name: str
    concurrency: int
    breaker: Breaker
    requests: Bucket | None
    tokens: Bucket | None
    under_way: int = 0
    asked: int = 0
    quiet_until: float = field(default=-math.inf)
    """Until then the server wants to be left alone (Retry-After)."""

    def wait(self, now: float, cost: int) -> float:
        """Seconds until a call of so many tokens may go; infinite where that hangs on another call's end."""
        if self.under_way >= self.concurrency:
            return math.inf
        waits = [self.quiet_until - now, self.breaker.wait(now)]
        waits += [self.requests.wait(now, 1)] if self.requests else []
        waits += [self.tokens.wait(now, cost)] if self.tokens else []
        return max(0.0, *waits)

    def enter(self, now: float, cost: int) -> bool:
        """A call goes; True where it is the breaker's probe."""
        self.under_way += 1
        self.asked += 1
        if self.requests:
            self.requests.spend(now, 1)
        if self.tokens:
            self.tokens.spend(now, cost)
        return self.breaker.enter()


def choose(lanes: Sequence[Lane], now: float, cost: int) -> tuple[Lane, float]:
    """The server to ask and the seconds until it may be asked: soonest first, then least load, then fewest calls."""
    waits = [lane.wait(now, cost) for lane in lanes]
    best = min(range(len(lanes)), key=lambda i: (waits[i], lanes[i].under_way, lanes[i].asked))
    return lanes[best], waits[best]


class _Gate(NamedTuple):
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    door: asyncio.Lock
    """Held by the one caller whose turn it is to be placed."""
    moved: asyncio.Event
    """A call has ended: the caller at the door looks again."""


@dataclass
class Progress:
    """One call's tries so far, for the message of its failure."""

    tries: int = 0
    last: Trouble | None = None
    server: str = ""

    def told(self, why: str = "") -> str:
        """Which server, what happened, after how many tries."""
        tries = "1 try" if self.tries == 1 else f"{self.tries} tries"
        what = "; ".join(part for part in (self.last.reason if self.last else "", why) if part)
        return f"{self.server}: {what} (after {tries})" if self.server else f"{what} (never sent)"


class Traffic:
    """Limits, retries, breakers and deadlines around requests to the servers of one judge."""

    def __init__(
        self,
        servers: Sequence[str],
        config: TrafficConfig,
        stats: JudgeStats,
        uniform: Callable[[], float] = random.random,
    ):
        """``servers``: their names, for messages; ``uniform``: random numbers in [0, 1)."""
        self.config, self.stats, self._uniform = config, stats, uniform
        self.budget = RetryBudget(config.retry_share, config.retry_reserve)
        self.lanes = [
            Lane(
                name,
                config.concurrency,
                Breaker(config.breaker_failures, config.breaker_seconds),
                Bucket(config.requests_per_minute) if config.requests_per_minute else None,
                Bucket(config.tokens_per_minute) if config.tokens_per_minute else None,
            )
            for name in servers
        ]
        self._gate: _Gate | None = None
        self._waiting = 0

    async def call(
        self, send: Callable[[int, int], Awaitable[Sent[Answer]]], cost: int, deadline: float | None = None
    ) -> Answer:
        """The answer of ``send(server's number, tries before)``; ``cost`` is its estimated number of tokens.

        ``deadline``: on the loop's clock; None is ``deadline_seconds`` from now. Raises Trouble.
        """
        limit = asyncio.get_running_loop().time() + self.config.deadline_seconds if deadline is None else deadline
        progress, timeout = Progress(), asyncio.timeout_at(limit)
        self.budget.earn()
        try:
            async with timeout:
                return await self._tries(send, cost, limit, progress)
        except TimeoutError:
            if not timeout.expired():
                raise
            self.stats.count("out_of_time")
            raise Trouble("out_of_time", progress.told(self._late()), retryable=True) from None

    async def _tries(
        self, send: Callable[[int, int], Awaitable[Sent[Answer]]], cost: int, deadline: float, progress: Progress
    ) -> Answer:
        while True:
            lane, probe = await self._enter(cost, deadline, progress)
            progress.server = lane.name
            progress.tries += 1
            try:
                return await self._once(lane, probe, send, cost, progress.tries - 1)
            except Trouble as trouble:
                progress.last = trouble
                pause = self._pause(trouble, progress)
            await asyncio.sleep(pause)

    def _pause(self, trouble: Trouble, progress: Progress) -> float:
        """Seconds until the next try; raises Trouble where there is none."""
        config = self.config
        if not trouble.retryable or progress.tries >= config.max_tries:
            raise Trouble(trouble.what, progress.told(), trouble.retryable) from None
        if not self.budget.spend():
            why = f"no retries left in judge.traffic.retry_share = {config.retry_share:g}"
            raise Trouble(trouble.what, progress.told(why), trouble.retryable) from None
        self.stats.count("retries")
        return backoff(progress.tries, config.backoff_seconds, config.backoff_max_seconds, self._uniform())

    async def _once(
        self,
        lane: Lane,
        probe: bool,
        send: Callable[[int, int], Awaitable[Sent[Answer]]],
        cost: int,
        before: int,
    ) -> Answer:
        """One request, its bookkeeping and its timeout."""
        loop, seconds = asyncio.get_running_loop(), self.config.call_seconds
        began = loop.time()
        self.stats.count("calls")
        try:
            try:
                async with asyncio.timeout(seconds):
                    sent = await send(self.lanes.index(lane), before)
            except TimeoutError:
                fix = "raise it, or ask for less at once with judge.traffic.concurrency"
                late = f"no complete answer within judge.traffic.call_seconds = {seconds:g} s; {fix}"
                raise Trouble("timeouts", late, retryable=True) from None
        except Trouble as trouble:
            self._failed(lane, probe, trouble, loop.time())
            raise
        except BaseException:  # cancelled, or stopped for good: nothing is known about the server
            lane.breaker.abandon(probe)
            raise
        else:
            lane.breaker.succeed()
            self.stats.latency(loop.time() - began)
            if lane.tokens and sent.tokens is not None:
                lane.tokens.spend(loop.time(), sent.tokens - cost)
            return sent.answer
        finally:
            lane.under_way -= 1
            self._here().moved.set()

    def _failed(self, lane: Lane, probe: bool, trouble: Trouble, now: float) -> None:
        self.stats.count(trouble.what)
        if trouble.what in SERVER_FAULTS:
            lane.breaker.fail(now, probe)
        else:
            lane.breaker.succeed()
        if trouble.retry_after is not None:
            lane.quiet_until = max(lane.quiet_until, now + trouble.retry_after)

    async def _enter(self, cost: int, deadline: float, progress: Progress) -> tuple[Lane, bool]:
        """Waits for a server that may be asked; True beside it where the call is its breaker's probe."""
        gate = self._here()
        self._waiting += 1
        self.stats.queue(self._waiting)
        try:
            async with gate.door:
                while True:
                    gate.moved.clear()
                    now = gate.loop.time()
                    lane, seconds = choose(self.lanes, now, cost)
                    if seconds <= 0:
                        return lane, lane.enter(now, cost)
                    if now + seconds > deadline and math.isfinite(seconds):
                        # Nothing can come of waiting, so the step need not wait either.
                        self.stats.count("out_of_time")
                        progress.server = progress.server or lane.name
                        why = f"not to be asked for {seconds:.0f} s, and {self._late()}"
                        raise Trouble("out_of_time", progress.told(why), retryable=True)
                    await _either(gate.moved, seconds)
        finally:
            self._waiting -= 1

    def _here(self) -> _Gate:
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate.loop is not loop:
            self._gate = _Gate(loop, asyncio.Lock(), asyncio.Event())
        return self._gate

    def _late(self) -> str:
        return f"no answer within judge.traffic.deadline_seconds = {self.config.deadline_seconds:g} s"


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set or the time is over, whichever is first."""
    try:
        async with asyncio.timeout(None if math.isinf(seconds) else seconds):
            await event.wait()
    except TimeoutError:
        return


async def together(jobs: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """The results of all, in order; the first that raises ends the others, and nothing is left running."""
    if len(jobs) == 1:
        return [await jobs[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
