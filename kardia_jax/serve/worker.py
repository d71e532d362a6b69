"""The judge in a thread and an event loop of its own.

A judge on the network waits and lets others wait beside it; a judge of rules, or a local model, keeps its thread busy.
Either way the HTTP loop stays free, so that health and metrics are answered while a batch is judged.
"""

import asyncio
import threading
from types import TracebackType
from typing import Self

from kardia_jax.judge.protocol import Judge, answers, close
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Verdict

JOIN_SECONDS = 5.0
"""How long the end waits for the thread; a judge that is busy computing does not listen, and ends with the process."""


class JudgeWorker:
    """Runs one judge for many callers; a context manager around the server."""

    def __init__(self, judge: Judge):
        self.judge = judge
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"judge {judge.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what is left and ends the thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(JOIN_SECONDS)

    async def score(self, requests: list[JudgeRequest], seconds: float) -> list[Verdict | JudgeFailure]:
        """One answer per request, in order; failures for all of them when it takes longer than ``seconds``.

        Raises JudgeUnusableError.
        """
        assert self._loop is not None
        work = asyncio.run_coroutine_threadsafe(answers(self.judge, requests), self._loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), seconds)
        except TimeoutError:
            failure = JudgeFailure(f"{self.judge.name}: no answer within {seconds:g} s (score_seconds)", retryable=True)
            return [failure] * len(requests)

    def _run(self) -> None:
        """The thread: leaving the runner cancels whatever is under way."""
        with asyncio.Runner() as runner:
            runner.run(self._until_closing())

    async def _until_closing(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        try:
            await self._closing.wait()
        finally:
            await close(self.judge)
