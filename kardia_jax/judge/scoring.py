"""Scores for a batch of completions: who is judged, what the judge says, and what it comes to.

In: completions of known dialogues, already parsed. Out: one ``Scores`` each, in order. Malformed completions
never reach the judge, and with rubric weight 0 nothing does.

>>> row = Completion(dialogue, 0, parse(text))
>>> scores = score_completions(RuleJudge(), KARDIA_FIVE, RewardConfig(), [row])
>>> scores[0].marks["empathy"], scores[0].reasons["empathy"]
(4, 'acknowledges (fear) and names the cause')
"""

from collections.abc import Sequence
from typing import NamedTuple

from kardia_jax.config import RewardConfig
from kardia_jax.dialogue.dataset import Dialogue
from kardia_jax.dialogue.spans import Malformed, Spans
from kardia_jax.judge.protocol import Judge, score_all
from kardia_jax.rewards.combine import Scores, judge_request, score_completion
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Rubric, Verdict, with_items


class Completion(NamedTuple):
    """A sampled answer at assistant turn number ``turn`` of a dialogue, from 0 on."""

    dialogue: Dialogue
    turn: int
    parsed: Spans | Malformed


def request_of(row: Completion, weights: RewardConfig) -> JudgeRequest | None:
    """What the judge is asked about a completion; None where nobody is asked."""
    if isinstance(row.parsed, Malformed) or weights.rubric == 0:
        return None
    return judge_request(row.dialogue, row.turn, row.parsed)


def scores_of(row: Completion, said: Verdict | JudgeFailure | None, rubric: Rubric) -> Scores:
    """The scores of one completion; ``said`` is None where nobody was asked."""
    return score_completion(row.parsed, row.dialogue.emotion, said, with_items(rubric, row.dialogue.rubric_items))


def score_completions(
    judge: Judge, rubric: Rubric, weights: RewardConfig, completions: Sequence[Completion]
) -> list[Scores]:
    """Format, emotion and rubric of every completion; one call of the judge for all that it has to see."""
    asked = {
        place: request for place, row in enumerate(completions) if (request := request_of(row, weights)) is not None
    }
    said = dict(zip(asked, score_all(judge, list(asked.values())), strict=True))
    return [scores_of(row, said.get(place), rubric) for place, row in enumerate(completions)]
