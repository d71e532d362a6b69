"""Seconds by phase, on a monotonic clock.

In: ``with timer.phase("rollout"): ...``. Out: seconds by name since the last ``take``. A phase inside another
stops the outer one's clock, so the phases of a step add up to no more than its wall time:

    with timer.phase("rollout"):        # 5 s in all
        with timer.phase("judge"):      # 2 s of them
            ...
    timer.take() == {"judge": 2.0, "rollout": 3.0}

Work on a device is asynchronous: block on its result inside the phase, or its time lands in the next one.
A timer belongs to one thread.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Collects the time of named phases."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of this block for ``name``, also when it raises."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, open phases included; starts again from zero."""
        self._charge()
        taken, self._seconds = self._seconds, {}
        return taken

    def _charge(self) -> None:
        """Give the time since the last event to the innermost open phase."""
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
