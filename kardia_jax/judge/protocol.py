"""What a judge is: a name and one async method; and how synchronous code asks it.

A judge takes requests and gives, in the same order, a verdict or a failure for each. ``score_all`` is the
only way in for the training loop: it runs the coroutine and turns whatever goes wrong around the judge into
failures, so that a broken judge is unknown and never 0.

>>> score_all(RuleJudge(), [request])[0].by_name()
{'relevance': 5, 'empathy': 4, 'persona_consistency': 5, 'safety': 5, 'fluency': 5}
"""

import asyncio
from typing import Protocol, runtime_checkable

from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Verdict


class Judge(Protocol):
    """Anything that marks replies: rules, an endpoint, a local model, a recording."""

    @property
    def name(self) -> str:
        """Which judge and which version, for logs and caches."""
        ...

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        """One answer per request, in order."""
        ...


@runtime_checkable
class InProcess(Protocol):
    """What a judge says that may compute on the device of this process. While True it is asked about all completions
    of a step in one batch, on the thread of the loop, and nothing of it is hidden behind the rollout."""

    @property
    def in_process(self) -> bool: ...


@runtime_checkable
class Measured(Protocol):
    """A judge that counts what it does."""

    def take_stats(self) -> dict[str, float]:
        """Metrics under ``judge/`` since the last call."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """A judge with connections of the running event loop."""

    async def close(self) -> None:
        """Gives them back; ``score`` may be called again afterwards, in this loop or another."""
        ...


class JudgeUnusableError(RuntimeError):
    """No request can ever succeed (wrong key, unknown model): it stops the run, unlike a verdict that is missing."""


def is_in_process(judge: Judge) -> bool:
    """Whether the judge has to be asked on the thread of the loop; see ``InProcess``."""
    return isinstance(judge, InProcess) and judge.in_process


def take_stats(judge: Judge) -> dict[str, float]:
    """The judge's metrics since the last call; none where it does not count."""
    return judge.take_stats() if isinstance(judge, Measured) else {}


async def close(judge: Judge) -> None:
    """Gives back the judge's connections, if it has any; for the end of an event loop."""
    if isinstance(judge, Closeable):
        await judge.close()


def score_all(judge: Judge, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
    """The judge's answers from synchronous code, one per request, whatever happens.

    An exception of the judge, or a wrong number of answers, becomes one failure per request. Raises
    JudgeUnusableError, and RuntimeError inside a running event loop: await ``answers(judge, requests)`` there.
    """
    return asyncio.run(_in_a_loop_of_its_own(judge, requests)) if requests else []


async def _in_a_loop_of_its_own(judge: Judge, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
    try:
        return await answers(judge, requests)
    finally:
        await close(judge)


async def answers(judge: Judge, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
    """``judge.score`` with its exceptions and wrong counts turned into failures; JudgeUnusableError goes through."""
    try:
        given = await judge.score(requests)
    except JudgeUnusableError:
        raise
    except Exception as error:  # a judge may sit behind any network or library; whatever breaks there is unknown, not 0
        retryable = isinstance(error, (TimeoutError, OSError))
        failure = JudgeFailure(f"{judge.name}: {type(error).__name__}: {error}", retryable)
        return [failure] * len(requests)
    if len(given) != len(requests):
        failure = JudgeFailure(f"{judge.name}: wanted {len(requests)} answers, got {len(given)}", retryable=False)
        return [failure] * len(requests)
    return given
