"""What travels between ``kardia judge serve`` and its clients: one batch of requests, one answer for each.

    POST /v1/score   {"rubric": "f3c1...", "requests": [{"profile": ..., "situation": ..., "history": [{"role":
                      "user", "text": ...}], "reply": ...}]}
    200              {"judge": "rules-1", "rubric": {"name": "kardia_five", "version": "1", "fingerprint": "f3c1..."},
                      "answers": [{"verdict": {"marks": [{"criterion": "empathy", "mark": 4, "reason": ...}]}},
                                  {"failure": {"reason": "timeout", "retryable": true}}]}
    4xx, 5xx         {"error": {"code": "rubric_mismatch", "message": ...}}

A verdict that did not come is a failure object and never a number. The models mirror the dataclasses of
``rewards/rubric`` field by field (a test holds them together) and refuse fields that they do not know.
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from kardia_jax.dialogue.dataset import RubricItem
from kardia_jax.rewards.rubric import HIGHEST, LOWEST, JudgeFailure, JudgeRequest, Mark, Rubric, Verdict, with_items

TEXT = 200_000
"""Characters in one text; a dialogue has some thousands."""

Text = Annotated[str, Field(max_length=TEXT)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WireTurn(_Wire):
    """One turn of the talk before the reply."""

    role: Text
    text: Text


class WireItem(_Wire):
    """A question of this dialogue alone."""

    question: Text
    weight: float = 1.0

    @model_validator(mode="after")
    def _is_an_item(self) -> Self:
        RubricItem(self.question, self.weight)
        return self


class WireRequest(_Wire):
    """What the judge is told about one completion."""

    profile: Text
    situation: Text
    history: list[WireTurn] = Field(description="Oldest first; earlier assistant turns by their reply alone.")
    reply: Text
    understanding: Text = ""
    reasoning: Text = ""
    items: list[WireItem] = []


class WireMark(_Wire):
    """One criterion's mark; whole unless the judge averages or reads it from logits."""

    criterion: str
    mark: StrictInt | StrictFloat
    reason: str
    spread: float | None = None


class WireVerdict(_Wire):
    """Every criterion of the rubric, and every item of the request, marked once."""

    marks: list[WireMark]


class WireFailure(_Wire):
    """Why there is no verdict, and whether asking again could help."""

    reason: str
    retryable: bool


class WireAnswer(_Wire):
    """A verdict or a failure, never both."""

    verdict: WireVerdict | None = None
    failure: WireFailure | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if (self.verdict is None) == (self.failure is None):
            raise ValueError("wanted either a verdict or a failure")
        return self


class WireRubric(_Wire):
    """Which rubric the marks belong to; two that differ in a word have two fingerprints."""

    name: str
    version: str
    fingerprint: str
    criteria: list[str]


class ScoreRequest(_Wire):
    """One batch."""

    rubric: str | None = Field(default=None, description="Fingerprint that the client expects; absent: any.")
    requests: list[WireRequest] = Field(min_length=1)


class ScoreResponse(_Wire):
    """The answers, in the order of the requests."""

    judge: str
    rubric: WireRubric
    answers: list[WireAnswer]


class WireError(_Wire):
    """What went wrong with a whole request."""

    code: str
    message: str


class ErrorResponse(_Wire):
    """The body of every answer that is not 200."""

    error: WireError


def to_wire(request: JudgeRequest) -> WireRequest:
    """A request as it is sent. Raises pydantic's ValidationError for text that cannot be (halves of characters)."""
    return WireRequest(
        profile=request.profile,
        situation=request.situation,
        history=[WireTurn(role=role, text=text) for role, text in request.history],
        reply=request.reply,
        understanding=request.understanding,
        reasoning=request.reasoning,
        items=[WireItem(question=item.question, weight=item.weight) for item in request.items],
    )


def from_wire(sent: WireRequest) -> JudgeRequest:
    """A request as it was before it was sent."""
    return JudgeRequest(
        profile=sent.profile,
        situation=sent.situation,
        history=tuple((turn.role, turn.text) for turn in sent.history),
        reply=sent.reply,
        understanding=sent.understanding,
        reasoning=sent.reasoning,
        items=tuple(RubricItem(item.question, item.weight) for item in sent.items),
    )


def rubric_to_wire(rubric: Rubric) -> WireRubric:
    """What a client compares."""
    return WireRubric(
        name=rubric.name, version=rubric.version, fingerprint=rubric.fingerprint, criteria=list(rubric.names)
    )


def answer_to_wire(answer: Verdict | JudgeFailure) -> WireAnswer:
    """An answer as it is sent."""
    if isinstance(answer, JudgeFailure):
        return WireAnswer(failure=WireFailure(reason=answer.reason, retryable=answer.retryable))
    marks = [
        WireMark(criterion=mark.criterion, mark=mark.mark, reason=mark.reason, spread=mark.spread)
        for mark in answer.marks
    ]
    return WireAnswer(verdict=WireVerdict(marks=marks))


def answer_from_wire(answer: WireAnswer) -> Verdict | JudgeFailure:
    """An answer as the judge gave it."""
    if answer.failure is not None:
        return JudgeFailure(answer.failure.reason, answer.failure.retryable)
    assert answer.verdict is not None
    return Verdict(tuple(Mark(mark.criterion, mark.mark, mark.reason, mark.spread) for mark in answer.verdict.marks))


def complete(rubric: Rubric, request: JudgeRequest, answer: Verdict | JudgeFailure) -> Verdict | JudgeFailure:
    """The answer if it marks what was asked, each criterion once and within the scale; else a failure that says so."""
    if isinstance(answer, JudgeFailure):
        return answer
    wanted = with_items(rubric, request.items).names
    came = [mark.criterion for mark in answer.marks]
    if sorted(came) != sorted(wanted):
        return JudgeFailure(f"verdict: wanted each of {list(wanted)} once, got {came}", retryable=False)
    off = [mark for mark in answer.marks if not LOWEST <= mark.mark <= HIGHEST]
    if off:
        wanted_mark = f"{LOWEST} to {HIGHEST}"
        return JudgeFailure(f"{off[0].criterion}.mark: wanted {wanted_mark}, got {off[0].mark}", retryable=False)
    return answer
