"""What a judge said, and what it comes to: marks, verdicts, failures; averages, vetoes and the unit mark.

A failure is unknown, never a mark of 0, and no function here turns one into a number.

>>> levels = ("no", "hardly", "partly", "mostly", "yes")
>>> rubric = Rubric("one", "1", (Criterion("tone", "Is it kind?", levels),))
>>> average([Verdict((Mark("tone", 4, "Warm."),)), Verdict((Mark("tone", 5, "Very warm."),))])
Verdict(marks=(Mark(criterion='tone', mark=4.5, reason='Warm.', spread=0.5),))
>>> to_unit(rubric, {"tone": 4.5})
0.875
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kardia_jax.rewards.rubric.criteria import Criterion, Rubric, Span
from kardia_jax.rewards.rubric.vetoes import HIGHEST, LOWEST, evidence


@dataclass(frozen=True)
class Mark:
    """One criterion's mark, from 1 to 5; whole unless a judge averages or reads it from logits."""

    criterion: str
    mark: float
    reason: str
    spread: float | None = None
    """Standard deviation, in marks, over several samples or over the levels' probabilities; None where the judge
    answered once."""


@dataclass(frozen=True)
class Verdict:
    """Every criterion of a rubric, marked once, in the rubric's order."""

    marks: tuple[Mark, ...]

    def by_name(self) -> dict[str, float]:
        """Criterion name to mark."""
        return {mark.criterion: mark.mark for mark in self.marks}


@dataclass(frozen=True)
class JudgeFailure:
    """Why there is no verdict, and whether asking again could help."""

    reason: str
    retryable: bool


class Vetoed(NamedTuple):
    """A verdict after the rubric's vetoes."""

    verdict: Verdict
    why: dict[str, str]
    """Criteria whose mark was lowered, each with the mark that the judge gave and the rule that was broken."""


def to_unit(rubric: Rubric, marks: Mapping[str, float]) -> float:
    """The weighted mean mark on a scale from 0 to 1: sum_r w_r (mark_r - 1) / 4 / sum_r w_r.

    Raises ValueError unless ``marks`` holds the rubric's criteria, no more and no fewer, each from 1 to 5.
    """
    if sorted(marks) != sorted(rubric.names):
        raise ValueError(f"marks: wanted the criteria {list(rubric.names)} of {rubric.name}, got {list(marks)}.")
    for name, mark in marks.items():
        if not LOWEST <= mark <= HIGHEST:
            raise ValueError(f"marks[{name}]: wanted {LOWEST} to {HIGHEST}, got {mark}.")
    total = sum(criterion.weight for criterion in rubric.criteria)
    if total <= 0:
        raise ValueError(f"rubric {rubric.name}: wanted at least one weight above 0.")
    gained = sum(criterion.weight * (marks[criterion.name] - LOWEST) for criterion in rubric.criteria)
    return gained / (HIGHEST - LOWEST) / total


def average(verdicts: Sequence[Verdict]) -> Verdict:
    """The mean mark of each criterion over several verdicts on one completion, with its population deviation.

    The reasons are the first verdict's. One verdict is given back as it is. Raises ValueError for none, or
    for verdicts on different criteria.
    """
    if not verdicts:
        raise ValueError("verdicts: wanted at least one, got none.")
    if len(verdicts) == 1:
        return verdicts[0]
    asked = {tuple(mark.criterion for mark in verdict.marks) for verdict in verdicts}
    if len(asked) > 1:
        raise ValueError(f"verdicts: wanted the same criteria in each, got {sorted(asked)}.")
    columns = zip(*(verdict.marks for verdict in verdicts), strict=True)
    return Verdict(tuple(_mean([mark.mark for mark in column], column[0]) for column in columns))


def _mean(marks: list[float], first: Mark) -> Mark:
    return dataclasses.replace(first, mark=statistics.fmean(marks), spread=statistics.pstdev(marks))


def join_verdicts(rubric: Rubric, parts: Sequence[Verdict | JudgeFailure]) -> Verdict | JudgeFailure:
    """The answers to a rubric's several prompts as one verdict, in the rubric's order.

    The first failure among them is the failure of the whole: a part of a verdict is no verdict. ``rubric``
    holds what was asked, items of the dialogue included.
    """
    failures = [part for part in parts if isinstance(part, JudgeFailure)]
    if failures:
        return failures[0]
    found = {mark.criterion: mark for part in parts if isinstance(part, Verdict) for mark in part.marks}
    if sorted(found) != sorted(rubric.names):
        return JudgeFailure(f"answer: wanted the criteria {list(rubric.names)}, got {list(found)}", retryable=False)
    return Verdict(tuple(found[name] for name in rubric.names))


def apply_vetoes(rubric: Rubric, verdict: Verdict, spans: Mapping[Span, str]) -> Vetoed:
    """Marks lowered to the cap of every rule that is broken in what the criterion sees.

    A rule that is broken where the mark already is at or below its cap changes nothing and is not reported.
    """
    criteria = {criterion.name: criterion for criterion in rubric.criteria}
    marks, why = [], {}
    for mark in verdict.marks:
        cap, reason = _lowest_cap(criteria[mark.criterion], spans) if mark.criterion in criteria else (HIGHEST, "")
        if mark.mark > cap:
            why[mark.criterion] = f"{mark.mark:g} lowered to {cap}: {reason}"
            mark = dataclasses.replace(mark, mark=cap)
        marks.append(mark)
    return Vetoed(Verdict(tuple(marks)), why)


def _lowest_cap(criterion: Criterion, spans: Mapping[Span, str]) -> tuple[int, str]:
    text = "\n".join(spans[span] for span in criterion.sees)
    broken = [
        (veto.cap, f"{veto.because}; {found}") for veto in criterion.vetoes if (found := evidence(veto.rule, text))
    ]
    return min(broken, default=(HIGHEST, ""))
