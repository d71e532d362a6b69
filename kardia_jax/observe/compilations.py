"""How many programs JAX compiled since somebody last asked: after the first steps of a run it should be none.

    with CompilationCounter() as compilations:
        step()
        compilations.take()         # Compiled(count=14, seconds=9.8): everything was new
        step()
        compilations.take()         # Compiled(count=0, seconds=0.0)

A program that came out of the persistent cache counts too: it was traced anew, and took only less time.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax

EVENT = "/jax/core/compile/backend_compile_duration"
"""Recorded by JAX once per program, after the compiler or the persistent cache gave it."""


@dataclass(frozen=True)
class Compiled:
    """Programs, and the seconds that the compiler or the cache took for them."""

    count: int
    seconds: float


class CompilationCounter:
    """Listens while its block runs; it hears every compilation of the process."""

    def __init__(self) -> None:
        self._since = Compiled(0, 0.0)

    def take(self) -> Compiled:
        """What was compiled since the last call; starts again from zero."""
        taken, self._since = self._since, Compiled(0, 0.0)
        return taken

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == EVENT:
            self._since = Compiled(self._since.count + 1, self._since.seconds + duration_secs)
