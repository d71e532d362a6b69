"""What a judge counts: calls, what went wrong with them, seconds, tokens and money.

In: events, from any thread. Out of ``take``: one flat dict for metrics.jsonl, counted since the last ``take``.

>>> stats = JudgeStats(price_prompt=0.5, price_completion=2.0)
>>> stats.count("calls"); stats.tokens(prompt=1500, completion=150); stats.latency(0.8)
>>> taken = stats.take()
>>> taken["judge/calls"], taken["judge/latency_p50"], taken["judge/cost"]
(1.0, 0.8, 0.00105)
"""

import math
import threading
from collections.abc import Sequence
from typing import Literal, get_args

Fault = Literal[
    "timeouts",
    "connection_errors",
    "rate_limited",
    "server_errors",
    "unreadable",
    "refusals",
    "rejected",
    "out_of_time",
]
"""Why a call failed: no answer in time, no connection, status 429, status 5xx, no verdict in the answer, content
refused, any other status; out_of_time: the deadline of all that was asked at once came first."""

Event = Literal["calls", "retries", "verdicts", "failures", "cache_hits", "cache_misses"]
"""calls: requests that were sent, retries among them; verdicts and failures: what the judge gave in the end. A verdict
from the cache is a hit and nothing else."""

MILLION = 1e6


class JudgeStats:
    """Thread-safe; the judge writes, the training loop takes."""

    def __init__(self, price_prompt: float = 0.0, price_completion: float = 0.0):
        """Prices of a million tokens."""
        self._prices = price_prompt, price_completion
        self._lock = threading.Lock()
        self._cost_total = 0.0
        self._clear()

    def _clear(self) -> None:
        names: tuple[Event | Fault, ...] = get_args(Event) + get_args(Fault)
        self._counts = dict.fromkeys(names, 0.0)
        self._tokens = [0.0, 0.0]
        self._seconds: list[float] = []
        self._deepest = 0

    def count(self, event: Event | Fault) -> None:
        """One more of these."""
        with self._lock:
            self._counts[event] += 1

    def tokens(self, prompt: int, completion: int) -> None:
        """What a request used, as the server reports it."""
        with self._lock:
            self._tokens[0] += prompt
            self._tokens[1] += completion

    def latency(self, seconds: float) -> None:
        """How long a request took that was answered with a verdict."""
        with self._lock:
            self._seconds.append(seconds)

    def queue(self, waiting: int) -> None:
        """How many calls wait for their turn; the largest number is kept."""
        with self._lock:
            self._deepest = max(self._deepest, waiting)

    def take(self) -> dict[str, float]:
        """Everything since the last call, under ``judge/``; latencies are NaN where nothing was answered."""
        with self._lock:
            counts, (prompt, completion), seconds = self._counts, self._tokens, sorted(self._seconds)
            deepest = self._deepest
            self._clear()
            cost = (prompt * self._prices[0] + completion * self._prices[1]) / MILLION
            self._cost_total += cost
            total = self._cost_total
        looked_up = counts["cache_hits"] + counts["cache_misses"]
        return {
            **{f"judge/{name}": value for name, value in counts.items()},
            "judge/cache_hit_rate": counts["cache_hits"] / looked_up if looked_up else float("nan"),
            "judge/latency_p50": quantile(seconds, 0.5),
            "judge/latency_p95": quantile(seconds, 0.95),
            "judge/latency_max": quantile(seconds, 1.0),
            "judge/prompt_tokens": prompt,
            "judge/completion_tokens": completion,
            "judge/cost": cost,
            "judge/cost_total": total,
            "judge/queue": float(deepest),
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ordered values that at least this share does not exceed; NaN where there are none.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else float("nan")
