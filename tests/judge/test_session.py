"""A judge beside the loop: what is asked when, what comes back, and that nothing is left running."""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from kardia_jax.judge import session as session_module
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.judge.session import JudgeSession, Question, busy_seconds, covered
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Verdict

SOON = 10.0
"""Seconds in which whatever a test waits for happens, or the test fails."""


def verdict(reply: str) -> Verdict:
    return Verdict(tuple(Mark(criterion.name, 3, reply) for criterion in KARDIA_FIVE.criteria))


def request(reply: str) -> JudgeRequest:
    return JudgeRequest("p", "s", (), reply)


@dataclass
class Gated:
    """Answers a reply when its gate is opened; says what it has begun, and what was cancelled."""

    gates: dict[str, threading.Event]
    name: str = "gated"
    begun: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    loops: set[int] = field(default_factory=set)
    closed: int = 0

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        (asked,) = requests
        self.begun.append(asked.reply)
        self.threads.add(threading.get_ident())
        self.loops.add(id(asyncio.get_running_loop()))
        try:
            while not self.gates[asked.reply].is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(asked.reply)
            raise
        return [verdict(asked.reply)]

    async def close(self) -> None:
        self.closed += 1


def gated(*replies: str) -> Gated:
    return Gated({reply: threading.Event() for reply in replies})


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def judge_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("judge ")]


def test_a_question_is_under_way_before_the_next_is_asked_and_answers_come_in_order():
    judge = gated("a", "b", "c")
    with JudgeSession(judge) as session:
        first = session.submit(request("a"))
        until(lambda: judge.begun == ["a"])
        rest = [session.submit(request(reply)) for reply in "bc"]
        # The last one is answered first.
        judge.gates["c"].set()
        rest[1].answer.result(SOON)
        assert not first.answer.done()
        judge.gates["a"].set()
        judge.gates["b"].set()
        assert session.gather([first, *rest]) == [verdict(reply) for reply in "abc"]
    assert judge_threads() == []


def test_one_loop_in_one_other_thread_serves_the_whole_session_and_closes_the_judge_once():
    judge = gated("a", "b")
    for gate in judge.gates.values():
        gate.set()
    with JudgeSession(judge) as session:
        for reply in "ab":
            session.gather([session.submit(request(reply))])
        assert judge.closed == 0
    assert len(judge.threads) == len(judge.loops) == 1
    assert threading.get_ident() not in judge.threads
    assert judge.closed == 1


def test_what_is_late_is_a_failure_that_says_so_and_is_cancelled():
    judge = gated("quick", "never")
    judge.gates["quick"].set()
    with JudgeSession(judge, deadline=0.2) as session:
        questions = [session.submit(request(reply)) for reply in ("quick", "never")]
        quick, never = session.gather(questions)
        until(lambda: judge.cancelled == ["never"])
    assert quick == verdict("quick")
    assert never == JudgeFailure("gated: no answer within 0.2 s of the batch's last request", retryable=True)


def test_the_deadline_counts_from_the_last_request():
    with JudgeSession(gated("a", "b"), deadline=0.3) as session:
        early = session.submit(request("a"))
        time.sleep(0.25)
        questions = [early, session.submit(request("b"))]
        started = time.monotonic()
        session.gather(questions)
        assert time.monotonic() - started > 0.25


@pytest.mark.parametrize(
    ("error", "retryable"), [(TimeoutError("10 s"), True), (ConnectionResetError(), True), (KeyError("x"), False)]
)
def test_an_exception_of_the_judge_is_a_failure_of_that_question_alone(error, retryable):
    class Half:
        name = "half"

        async def score(self, requests):
            if requests[0].reply == "bad":
                raise error
            return [verdict(requests[0].reply)]

    with JudgeSession(Half()) as session:
        good, bad = session.gather([session.submit(request(reply)) for reply in ("good", "bad")])
    assert good == verdict("good")
    assert isinstance(bad, JudgeFailure)
    assert bad.retryable == retryable
    assert type(error).__name__ in bad.reason


def test_a_judge_that_can_never_answer_says_so_at_the_loop():
    class WrongKey:
        name = "locked"

        async def score(self, requests):
            raise JudgeUnusableError("locked: 401")

    with JudgeSession(WrongKey()) as session, pytest.raises(JudgeUnusableError, match="401"):
        session.gather([session.submit(request("a"))])
    assert judge_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_loop_leaves_nothing_running(error):
    judge = gated("a", "b")
    with contextlib.suppress(error), JudgeSession(judge) as session:
        for reply in "ab":
            session.submit(request(reply))
        until(lambda: len(judge.begun) == 2)
        raise error
    assert sorted(judge.cancelled) == ["a", "b"]
    assert judge.closed == 1
    assert judge_threads() == []


def test_ctrl_c_while_waiting_for_the_judge_ends_the_wait_and_the_thread():
    judge = gated("a")
    main = threading.main_thread().ident
    assert main is not None

    def interrupt_when_waiting() -> None:
        until(lambda: judge.begun == ["a"])
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    other = threading.Thread(target=interrupt_when_waiting)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyboardInterrupt))
        session = stack.enter_context(JudgeSession(judge))
        question = session.submit(request("a"))
        other.start()
        session.gather([question])
    other.join()
    assert judge.cancelled == ["a"]
    assert judge_threads() == []


def test_a_judge_that_ignores_its_cancellation_is_left_behind(monkeypatch, capsys):
    monkeypatch.setattr(session_module, "CLOSE_SECONDS", 0.1)
    stop, gone = threading.Event(), threading.Event()

    class Stubborn:
        name = "stubborn"

        async def score(self, requests):
            begun.set()
            while not stop.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.001)
            return [verdict("late")]

        async def close(self):
            gone.set()

    begun = threading.Event()
    with JudgeSession(Stubborn()) as session:
        session.submit(request("a"))
        begun.wait(SOON)
    assert capsys.readouterr().err == "judge stubborn: did not stop within 0.1 s; left behind.\n"
    stop.set()
    assert gone.wait(SOON)
    until(lambda: judge_threads() == [])


@dataclass
class OnTheDevice:
    """Computes where it is called."""

    calls: list[tuple[int, list[str]]] = field(default_factory=list)
    name: str = "local"
    in_process: bool = True

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        self.calls.append((threading.get_ident(), [asked.reply for asked in requests]))
        time.sleep(0.02)
        return [verdict(asked.reply) for asked in requests]


def test_a_judge_in_this_process_is_asked_in_one_batch_by_the_thread_that_waits():
    judge = OnTheDevice()
    with JudgeSession(judge) as session:
        questions = [session.submit(request(reply)) for reply in "abc"]
        assert judge.calls == []
        assert judge_threads() == []
        assert session.gather(questions) == [verdict(reply) for reply in "abc"]
        assert session.gather(questions) == [verdict(reply) for reply in "abc"]
    assert judge.calls == [(threading.get_ident(), ["a", "b", "c"])]
    assert 0.02 <= busy_seconds(questions) < SOON


def test_questions_outside_the_session_are_refused():
    session = JudgeSession(gated("a"))
    with pytest.raises(RuntimeError, match="not open"):
        session.submit(request("a"))
    with session:
        pass
    with pytest.raises(RuntimeError, match="not open"):
        session.submit(request("a"))


def test_nothing_to_gather():
    with JudgeSession(gated(), deadline=0.1) as session:
        assert session.gather([]) == []


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(1.0, 3.0), (0.0, 2.0), (5.0, 6.0)], 4.0),
        ([(0.0, 10.0), (2.0, 3.0)], 10.0),
    ],
)
def test_covered_by_hand(spans, expected):
    assert covered(spans) == expected


def test_a_question_without_an_answer_is_busy_until_now():
    open_question = Question(request("a"), Future(), time.monotonic() - 5)
    assert 5 <= busy_seconds([open_question]) < 5 + SOON
