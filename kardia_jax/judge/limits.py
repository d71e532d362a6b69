"""The decisions of traffic control, without a clock, a network or a random number of their own.

In: what happened and what time it is (``now``, seconds on any steady clock). Out: whether to wait, how long, whether to
ask again. ``traffic.py`` is the shell that obeys.

>>> budget = RetryBudget(share=0.2, reserve=1.0)
>>> budget.spend(), budget.spend()                     # the reserve allows one retry
(True, False)
>>> for _ in range(5): budget.earn()                   # five calls earn the next
>>> budget.spend()
True
"""

import email.utils
from dataclasses import dataclass, field

WINDOW = 60.0
"""Seconds over which a server counts requests and tokens."""
ROUNDING = 1e-6
"""Requests, tokens or retries: five shares of 0.2 are one retry, and nobody waits for a millionth of a token."""
LONGEST_PAUSE = 60.0
"""Seconds of the breaker's longest pause."""


@dataclass
class Bucket:
    """A limit per minute: what is spent in any 60 s stays within ``limit``, plus at most one cost larger than a tenth.

    A tenth may go at once and the rest comes back evenly over the minute: capacity + 60 s x rate = limit. A cost may
    take the level below 0; then the next one waits.
    """

    limit: float
    level: float = field(init=False)
    at: float = float("-inf")

    def __post_init__(self) -> None:
        self.level = self.capacity

    @property
    def capacity(self) -> float:
        """What may go at once; at least one request, while half of the limit is left for the steady flow."""
        return min(max(self.limit / 10, 1.0), self.limit / 2)

    @property
    def rate(self) -> float:
        """What comes back per second."""
        return (self.limit - self.capacity) / WINDOW

    def wait(self, now: float, cost: float) -> float:
        """Seconds until ``cost`` may be spent; a cost above the capacity needs a full bucket."""
        missing = min(cost, self.capacity) - self._level(now)
        return missing / self.rate if missing > ROUNDING else 0.0

    def spend(self, now: float, cost: float) -> None:
        """Takes ``cost`` out; a negative one gives back what was estimated too high."""
        self.level, self.at = min(self.capacity, self._level(now) - cost), max(now, self.at)

    def _level(self, now: float) -> float:
        passed = max(0.0, now - self.at)
        return min(self.capacity, self.level + passed * self.rate)


@dataclass
class RetryBudget:
    """How many retries there may be: ``share`` of the calls, and ``reserve`` for a burst."""

    share: float
    reserve: float
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.reserve

    def earn(self) -> None:
        """A call has begun."""
        # With no reserve a whole retry must still be able to gather.
        self.left = min(max(self.reserve, 1.0), self.left + self.share)

    def spend(self) -> bool:
        """Whether one more retry may be made; if so, it is paid for."""
        if self.left < 1.0 - ROUNDING:
            return False
        self.left -= 1.0
        return True


@dataclass
class Breaker:
    """Leaves a server alone that fails again and again, and lets one call at a time find out whether it is back.

    closed --(``failures`` in a row)--> open for ``pause`` s --> half open: one probe --success--> closed
                                          ^------------------------- failure, pause doubled --'
    """

    failures: int
    pause: float
    in_a_row: int = 0
    opened: int = 0
    """How often in a row it opened; 0 is closed."""
    until: float = float("-inf")
    probing: bool = False

    def wait(self, now: float) -> float:
        """Seconds until a call may go; infinite while a probe is under way."""
        if not self.opened:
            return 0.0
        return float("inf") if self.probing else max(0.0, self.until - now)

    def enter(self) -> bool:
        """A call goes; True where it is the probe."""
        self.probing = self.probing or self.opened > 0
        return self.opened > 0

    def succeed(self) -> None:
        """The server answered: closed, whatever was before."""
        self.in_a_row, self.opened, self.probing = 0, 0, False

    def fail(self, now: float, probe: bool) -> None:
        """A call failed; those that began before the breaker opened say nothing new about an open one."""
        self.in_a_row += 1
        if probe or (not self.opened and self.in_a_row >= self.failures):
            self.until = now + min(self.pause * 2**self.opened, max(LONGEST_PAUSE, self.pause))
            self.opened, self.probing = self.opened + 1, False

    def abandon(self, probe: bool) -> None:
        """A call was cancelled and says nothing; the next one may probe."""
        self.probing = self.probing and not probe


def backoff(tries: int, first: float, longest: float, uniform: float) -> float:
    """Seconds before the next try after ``tries``: uniform in [0, min(longest, first 2^(tries - 1))].

    ``uniform`` is a random number in [0, 1). Source: "full jitter" of the AWS Architecture Blog, "Exponential Backoff
    And Jitter", 2015.
    """
    return uniform * min(longest, first * 2.0 ** min(tries - 1, 60))


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds of a Retry-After header, given as a number or as an HTTP date; None where there is none to read.

    ``now`` is the time of day in seconds since 1970. Source: RFC 9110, section 10.2.3.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
