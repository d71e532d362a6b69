"""SIGTERM: a scheduler wants its machine back. A run notices, saves at the next step's end and goes.

with StopRequest() as request:
    ...                          # SIGTERM: request.made is True, and nothing else has happened
                                 # another SIGTERM, seconds later, ends the process at once
"""

import signal
import threading
import time
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Self

EXIT_CODE = 128 + signal.SIGTERM
"""143, as of a process that the signal has ended: whoever starts jobs again knows it."""


SAME_SECONDS = 5
"""A signal to a whole group of processes and one that its parent passes on are one request."""


class StopRequest:
    """Whether the process has been asked to stop since the block was entered.

    Signals reach the main thread alone: a block in another thread notices nothing and changes nothing.
    """

    def __init__(self) -> None:
        self.made = False
        self._when = 0.0
        self._open = ExitStack()

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.made and now - self._when > SAME_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        if not self.made:
            self.made, self._when = True, now

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._open.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, self._noticed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
