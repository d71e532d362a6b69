"""Asking a judge from synchronous code: whatever breaks is a failure per request, and never a mark."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from kardia_jax.config import RewardConfig
from kardia_jax.dialogue.dataset import Dialogue, Turn
from kardia_jax.dialogue.spans import Spans, parse
from kardia_jax.judge.protocol import answers, score_all
from kardia_jax.judge.scoring import Completion, score_completions
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Verdict

THREES = Verdict(tuple(Mark(criterion.name, 3, "so so") for criterion in KARDIA_FIVE.criteria))
REQUESTS = [JudgeRequest("p", "s", (), f"reply {index}") for index in range(3)]


@dataclass
class ScriptedJudge:
    """Answers with what it was given, or raises it."""

    answer: Sequence[Verdict | JudgeFailure] | Exception
    asked: list[JudgeRequest] = field(default_factory=list)
    name: str = "scripted"

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        self.asked.extend(requests)
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return list(self.answer)


def test_answers_come_through_in_order():
    given = [THREES, JudgeFailure("refused", retryable=False), THREES]
    assert score_all(ScriptedJudge(given), REQUESTS) == given


@pytest.mark.parametrize(
    ("error", "retryable"),
    [(TimeoutError("10 s"), True), (ConnectionResetError(), True), (KeyError("x"), False)],
)
def test_an_exception_is_one_failure_per_request(error: Exception, retryable: bool):
    got = score_all(ScriptedJudge(error), REQUESTS)
    assert [isinstance(answer, JudgeFailure) and answer.retryable for answer in got] == [retryable] * 3
    assert type(error).__name__ in str(got[0])


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_count_cannot_be_attributed_and_fails_all(count: int):
    got = score_all(ScriptedJudge([THREES] * count), REQUESTS)
    assert all(isinstance(answer, JudgeFailure) and f"got {count}" in answer.reason for answer in got)
    assert len(got) == 3


def test_nothing_to_judge_asks_nobody():
    judge = ScriptedJudge([])
    assert score_all(judge, []) == []
    assert judge.asked == []


def test_inside_a_running_loop_one_awaits():
    async def inside() -> list[Verdict | JudgeFailure]:
        return await answers(ScriptedJudge([THREES] * 3), REQUESTS)

    assert asyncio.run(inside()) == [THREES] * 3


def test_only_well_formed_completions_reach_the_judge():
    talk = Dialogue(
        "1",
        "About: She bakes.",
        "ISFJ",
        "sad",
        "The oven broke.",
        (Turn("user", "It broke."), Turn("assistant", "-")),
        "here:1",
    )
    good = Completion(talk, 0, Spans("u", "r", "sad", "That is sad."))
    bad = Completion(talk, 0, parse("no spans"))
    judge = ScriptedJudge([THREES, JudgeFailure("timeout", retryable=True)])
    scores = score_completions(judge, KARDIA_FIVE, RewardConfig(), [good, bad, good])
    assert [score.rubric for score in scores] == [0.5, 0.0, None]
    assert [score.valid for score in scores] == [True, True, False]
    assert [request.reply for request in judge.asked] == ["That is sad.", "That is sad."]


def test_with_rubric_weight_zero_the_judge_is_not_asked():
    talk = Dialogue(
        "1",
        "About: She bakes.",
        "ISFJ",
        "sad",
        "The oven broke.",
        (Turn("user", "It broke."), Turn("assistant", "-")),
        "here:1",
    )
    judge = ScriptedJudge(TimeoutError())
    row = Completion(talk, 0, Spans("u", "r", "sad", "That is sad."))
    (scores,) = score_completions(judge, KARDIA_FIVE, RewardConfig(rubric=0.0), [row])
    assert (scores.valid, scores.rubric, judge.asked) == (True, None, [])
