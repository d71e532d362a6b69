"""From the three terms of every completion to rewards [P, G] that know which of them are real.

In: per completion the parsed spans, the gold label and what the judge said. Out: ``Scores`` per completion
for the log, and ``Combined`` for the advantages: reward = sum_k w_k term_k over format, emotion and rubric,
weights summing to 1.

Three cases that must not be confused:

- malformed completion: a mechanical fact. The judge is not asked, the rubric term is 0, the row is valid.
- no verdict (timeout, refusal, nonsense): unknown. The row is invalid and its reward NaN, so a mistake is
  loud.
- rubric weight 0: nobody is asked, the row is valid, the rubric column is 0 and weighs nothing.

>>> said = Verdict((Mark("tone", 3, "fits anyone"),))                  # of a rubric with one criterion
>>> spans = Spans("She waits for news.", "Waiting wears her out.", "anxious", "Waiting is hard.")
>>> good = score_completion(spans, "anxious", said, rubric)             # format 1, emotion 1, rubric 0.5
>>> lost = score_completion(spans, "anxious", JudgeFailure("timeout", True), rubric)
>>> combine([[good, lost]], RewardConfig()).rewards_P_G                 # (1 + 1 + 0.5) / 3, unknown
array([[0.83333333,        nan]])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from kardia_jax.config import RewardConfig
from kardia_jax.dialogue.dataset import Dialogue
from kardia_jax.dialogue.spans import Malformed, Spans, parse
from kardia_jax.rewards.emotion import emotion_score
from kardia_jax.rewards.format import format_score
from kardia_jax.rewards.rubric import (
    JudgeFailure,
    JudgeRequest,
    Rubric,
    Span,
    Verdict,
    addresses_judge,
    apply_vetoes,
    to_unit,
)

TERMS = ("format", "emotion", "rubric")
NO_VERDICT = "no verdict: "
"""How the reason of a completion begins whose verdict is missing."""


@dataclass(frozen=True)
class Scores:
    """Everything that is known about one completion's worth."""

    format: float
    emotion: float
    marks: Mapping[str, float] | None
    """Criterion to mark, 1 to 5, after the rubric's vetoes; None where there is no verdict."""
    rubric: float | None
    """The marks as one number in [0, 1]; 0 for a malformed completion; None where nothing was judged."""
    valid: bool
    """False where a verdict was wanted and is missing."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Criterion to the judge's reason, or "rubric" to why there is no verdict."""
    malformed: str | None = None
    """Why the completion did not parse; None where it did."""
    spreads: Mapping[str, float] = field(default_factory=dict)
    """Criterion to the standard deviation of its mark, in marks, where the judge gave one."""
    vetoes: Mapping[str, str] = field(default_factory=dict)
    """Criterion to the rule that lowered its mark, with the mark before."""
    flag: str = ""
    """The words with which the completion speaks to its judge; "" where it does not, or did not parse."""


@dataclass(frozen=True)
class Combined:
    """Rewards of P prompts times G completions, the terms they are made of, and which of them are real."""

    rewards_P_G: Float[np.ndarray, "P G"]
    """float64; NaN where invalid."""
    valid_P_G: Bool[np.ndarray, "P G"]
    terms_P_G_K: Float[np.ndarray, "P G K"]
    """float64, K = format, emotion, rubric; the rubric column is NaN where invalid."""
    term_names: tuple[str, ...]
    term_weights_K: Float[np.ndarray, " K"]
    """Sum to 1."""


def judge_request(dialogue: Dialogue, turn: int, spans: Spans) -> JudgeRequest:
    """What the judge is told about ``spans`` as an answer at assistant turn number ``turn`` (from 0 on).

    The history holds the turns before it, assistant turns by their reply alone; gold label and gold reply
    stay hidden. Raises IndexError for a turn that the dialogue does not have.
    """
    count = len(dialogue.answers)
    if not 0 <= turn < count:
        raise IndexError(f"turn: wanted 0 to {count - 1} at {dialogue.where}, got {turn}.")
    before = dialogue.turns[: 2 * turn + 1]
    return JudgeRequest(
        profile=dialogue.person,
        situation=dialogue.situation,
        history=tuple((said.role, heard(said.role, said.content)) for said in before),
        reply=spans.response,
        understanding=spans.understanding,
        reasoning=spans.reasoning,
        items=dialogue.rubric_items,
    )


def heard(role: str, content: str) -> str:
    """What the other side saw of a turn: the reply span where the assistant's text has spans."""
    parsed = parse(content) if role == "assistant" else None
    return parsed.response if isinstance(parsed, Spans) else content


def score_completion(
    parsed: Spans | Malformed, gold: str, said: Verdict | JudgeFailure | None, rubric: Rubric
) -> Scores:
    """The scores of one completion; ``said`` is None where nobody was asked (malformed, rubric weight 0).

    ``rubric`` holds all that was asked, items of the dialogue included. Raises ValueError for a verdict on
    other criteria.
    """
    form, emotion = format_score(parsed), emotion_score(parsed, gold)
    if isinstance(parsed, Malformed):
        why = {"rubric": f"not judged: {parsed.reason}"}
        return Scores(form, emotion, None, 0.0, valid=True, reasons=why, malformed=str(parsed.reason))
    flag = addresses_judge("\n".join((parsed.understanding, parsed.reasoning, parsed.response)))
    if said is None:
        why = {"rubric": "not judged: its weight is 0"}
        return Scores(form, emotion, None, None, valid=True, reasons=why, flag=flag)
    if isinstance(said, JudgeFailure):
        why = {"rubric": f"{NO_VERDICT}{said.reason}"}
        return Scores(form, emotion, None, None, valid=False, reasons=why, flag=flag)
    return _judged(parsed, form, emotion, said, rubric, flag)


def _judged(parsed: Spans, form: float, emotion: float, said: Verdict, rubric: Rubric, flag: str) -> Scores:
    spans: dict[Span, str] = {
        "understanding": parsed.understanding,
        "reasoning": parsed.reasoning,
        "reply": parsed.response,
    }
    verdict, vetoes = apply_vetoes(rubric, said, spans)
    marks = verdict.by_name()
    return Scores(
        form,
        emotion,
        marks,
        to_unit(rubric, marks),
        valid=True,
        reasons={mark.criterion: mark.reason for mark in said.marks},
        spreads={mark.criterion: mark.spread for mark in said.marks if mark.spread is not None},
        vetoes=vetoes,
        flag=flag,
    )


def combine(scores_P_G: Sequence[Sequence[Scores]], weights: RewardConfig) -> Combined:
    """Rewards [P, G] as the weighted sum of the terms, NaN where a verdict is missing.

    Raises ValueError when groups differ in size, or when a valid completion was not judged though the rubric
    has weight.
    """
    sizes = {len(group) for group in scores_P_G}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"scores_P_G: wanted groups of one size, at least 1, got sizes {sorted(sizes)}.")
    rows = [[_terms(scores, weights) for scores in group] for group in scores_P_G]
    terms_P_G_K = np.array(rows, dtype=np.float64)
    raw_K = np.array([weights.format, weights.emotion, weights.rubric], dtype=np.float64)
    weights_K = raw_K / raw_K.sum()
    return Combined(
        rewards_P_G=terms_P_G_K @ weights_K,
        valid_P_G=np.array([[scores.valid for scores in group] for group in scores_P_G]),
        terms_P_G_K=terms_P_G_K,
        term_names=TERMS,
        term_weights_K=weights_K,
    )


def _terms(scores: Scores, weights: RewardConfig) -> tuple[float, float, float]:
    if not scores.valid:
        return scores.format, scores.emotion, float("nan")
    if scores.rubric is None and weights.rubric > 0:
        raise ValueError(f"scores.rubric: wanted a verdict, since rewards.rubric is {weights.rubric}; got none.")
    return scores.format, scores.emotion, scores.rubric or 0.0
