"""A judge at work beside the training loop: one event loop in one thread, asked about completions as they end.

In: a judge, and requests one by one. Out: their answers, in the order in which they were asked, whatever happens: what
breaks, comes too late or is cancelled is a ``JudgeFailure`` and never a mark. The loop lives as long as the session,
and so do the judge's connections.

    with JudgeSession(judge, deadline=60.0) as session:
        questions = [session.submit(request) for request in requests]       # returns at once
        ...                                                                  # the device decodes the others
        answers = session.gather(questions)                                  # waits for what is not there yet
        busy_seconds(questions)                                              # how long the judge was at work

A judge that computes in this process (``InProcess``) must not be called from another thread while the loop uses the
same device: its requests are kept, and ``gather`` asks it about all of them in one batch, on the caller's thread.
"""

import asyncio
import math
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kardia_jax.judge.protocol import Judge, answers, close, is_in_process, score_all
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Verdict

Answer = Verdict | JudgeFailure

CLOSE_SECONDS = 10.0
"""How long a session that ends waits for calls that it has cancelled; a judge that ignores that is left behind."""


@dataclass(eq=False)
class Question:
    """A request on its way."""

    request: JudgeRequest
    answer: Future[Answer]
    asked_at: float
    """Seconds on the session's clock."""
    answered_at: float | None = None


class JudgeSession:
    """A context manager; ``submit`` and ``gather`` are for the thread that opened it."""

    def __init__(self, judge: Judge, deadline: float | None = None):
        """``deadline``: seconds from the last request of a batch until what is not answered counts as a failure."""
        self.judge, self.deadline = judge, deadline
        self._beside = not is_in_process(judge)
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._thread = threading.Thread(target=self._run, name=f"judge {judge.name}", daemon=True)
        self._ready = threading.Event()

    def submit(self, request: JudgeRequest) -> Question:
        """Asks, and returns at once. Raises RuntimeError outside the session's ``with`` block."""
        if not self._beside:
            return Question(request, Future(), time.monotonic())
        if self._running is None:
            raise RuntimeError(f"judge {self.judge.name}: its session is not open.")
        loop, _ = self._running
        question = Question(request, asyncio.run_coroutine_threadsafe(self._ask(request), loop), time.monotonic())
        question.answer.add_done_callback(lambda _: _note_time(question))
        return question

    def gather(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order; waits for those that are missing until the deadline, and then cancels them.

        Raises JudgeUnusableError where no question can ever be answered.
        """
        if not self._beside:
            self._ask_at_once([question for question in questions if not question.answer.done()])
        _, late = wait([question.answer for question in questions], self._seconds_left(questions))
        for answer in late:
            answer.cancel()
        return [self._said(question) for question in questions]

    def __enter__(self) -> Self:
        if self._beside:
            self._thread.start()
            self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what is still under way and ends the thread, after an error and Ctrl-C as well."""
        if self._running is None:
            return
        (loop, closing), self._running = self._running, None
        loop.call_soon_threadsafe(closing.set)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            print(f"judge {self.judge.name}: did not stop within {CLOSE_SECONDS:g} s; left behind.", file=sys.stderr)

    def _run(self) -> None:
        """The thread."""
        with asyncio.Runner() as runner:
            runner.run(self._until_closing())

    async def _until_closing(self) -> None:
        closing = asyncio.Event()
        self._running = asyncio.get_running_loop(), closing
        self._ready.set()
        await closing.wait()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await close(self.judge)

    async def _ask(self, request: JudgeRequest) -> Answer:
        (answer,) = await answers(self.judge, [request])
        return answer

    def _ask_at_once(self, questions: Sequence[Question]) -> None:
        started = time.monotonic()
        given = score_all(self.judge, [question.request for question in questions])
        for question, answer in zip(questions, given, strict=True):
            question.asked_at, question.answered_at = started, time.monotonic()
            question.answer.set_result(answer)

    def _seconds_left(self, questions: Sequence[Question]) -> float | None:
        if self.deadline is None or not questions:
            return None
        last = max(question.asked_at for question in questions)
        return max(0.0, last + self.deadline - time.monotonic())

    def _said(self, question: Question) -> Answer:
        if question.answer.cancelled():
            within = "" if self.deadline is None else f" within {self.deadline:g} s of the batch's last request"
            return JudgeFailure(f"{self.judge.name}: no answer{within}", retryable=True)
        return question.answer.result()


def busy_seconds(questions: Iterable[Question]) -> float:
    """How long at least one of the questions was open; one without an answer counts until now."""
    now = time.monotonic()
    return covered((q.asked_at, now if q.answered_at is None else q.answered_at) for q in questions)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans of time.

    >>> covered([(1.0, 3.0), (0.0, 2.0), (5.0, 6.0)])
    4.0
    """
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _note_time(question: Question) -> None:
    question.answered_at = time.monotonic()
