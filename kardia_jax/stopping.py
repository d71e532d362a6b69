"""SIGTERM: a scheduler wants its machine back. A run notices, saves at the next step's end and goes.

with StopRequest() as request:
    ...                          # SIGTERM: request.made is True, and nothing else has happened
                                 # a second SIGTERM ends the process at once
"""

import signal
import threading
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Self

EXIT_CODE = 128 + signal.SIGTERM
"""143, as of a process that the signal has ended: whoever starts jobs again knows it."""


class StopRequest:
    """Whether the process has been asked to stop since the block was entered.

    Signals reach the main thread alone: a block in another thread notices nothing and changes nothing.
    """

    def __init__(self) -> None:
        self.made = False
        self._open = ExitStack()

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._open.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, self._noticed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
