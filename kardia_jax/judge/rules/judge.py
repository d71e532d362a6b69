"""The embedded judge: five rules over text, no network, no model, the same answer every time.

>>> RuleJudge().mark(JudgeRequest("About: A baker.", "I lost my job.", (("user", "They fired me."),), "Hm."))
Verdict(marks=(Mark(criterion='relevance', mark=1, reason='names nothing of the situation'), ...))
"""

from collections.abc import Callable
from dataclasses import dataclass

from kardia_jax.judge.rules.marks import Judged, empathy, fluency, persona_consistency, relevance, safety
from kardia_jax.judge.rules.view import View, look
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Verdict

RULES: tuple[tuple[str, Callable[[View], Judged]], ...] = (
    ("relevance", relevance),
    ("empathy", empathy),
    ("persona_consistency", persona_consistency),
    ("safety", safety),
    ("fluency", fluency),
)
"""The criteria of KARDIA_FIVE, in its order."""

_NO_ITEMS = JudgeFailure("rules: wanted no rubric_items, since only a language model can answer them", retryable=False)


@dataclass(frozen=True)
class RuleJudge:
    """A ``Judge`` that marks the criteria of KARDIA_FIVE by rules; it fails only where a dialogue has items."""

    name: str = "rules-1"

    def mark(self, request: JudgeRequest) -> Verdict:
        """The verdict on one reply."""
        view = look(request)
        return Verdict(tuple(Mark(criterion, *rule(view)) for criterion, rule in RULES))

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        """One verdict per request, in order; a failure where there are items, since rules read no questions."""
        return [_NO_ITEMS if request.items else self.mark(request) for request in requests]
