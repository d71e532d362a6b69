"""Can a judge be trusted? It grades replies whose marks people agree on, and this says where it goes wrong.

In: a judge, a rubric, calibration items. Out: ``Probe``, plain numbers. What is compared are marks after the rubric's
vetoes, as a reward would be made of them; of several repeats, their mean.

    agreement      share of marks within their band, and how far beyond it they lie (positive: too kind)
    order          rank correlation with the bands' middles; share of pairs (good reply, worse reply to the same person)
                   in which the good one gets more: all that a group's advantages need
    spread         does the scale collapse? marks of the top level, beside the share of bands that allow it
    length         rank correlation of a reply's words with how far its marks lie above the middle of their bands
    position       rank correlation of a reply's place in the batch with its mark, less its mean over the repeats
    test-retest    share of marks that are the same again, and their mean difference
    caught         adversarial replies none of whose marks exceeds its band

Each repeat asks in another order, drawn from (seed, repeat). A verdict that is missing is missing: it is counted, and
enters no other number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kardia_jax.judge.agreement import beyond, deviation, mean, rank_correlation
from kardia_jax.judge.calibration import ADVERSARIAL, Item
from kardia_jax.judge.protocol import Judge, answers
from kardia_jax.rewards.rubric import HIGHEST, JudgeFailure, Rubric, Verdict, apply_vetoes, to_unit

Answer = Verdict | JudgeFailure
TOP = HIGHEST - 0.5
"""From here on a mark that is no whole number counts as the top level."""


class ProbeError(ValueError):
    """A rubric and a calibration set that have nothing in common."""


@dataclass(frozen=True)
class Repeat:
    """One round: what was said about each item, and where each stood in the batch."""

    answers: tuple[Answer, ...]
    """In the order of the items."""
    places: tuple[int, ...]


@dataclass(frozen=True)
class CriterionReport:
    """One criterion over the items that have a band for it."""

    marks: int
    within: float
    error: float
    """Mean distance from the band, in levels; 0 within."""
    bias: float
    """The same with its sign: above 0 the judge is too kind."""
    rank_correlation: float
    deviation: float
    """Standard deviation of the marks, in levels."""
    top_share: float
    top_allowed: float
    """Share of the bands that reach the top level."""


@dataclass(frozen=True)
class Miss:
    """A mark outside its band."""

    item: str
    kind: str
    criterion: str
    mark: float
    band: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class Probe:
    """Everything that a probe has found out; NaN where a number is not defined."""

    judge: str
    rubric: str
    items: int
    repeats: int
    missing: int
    """Verdicts that did not come, over all repeats."""
    why_missing: tuple[str, ...]
    """Their different reasons."""
    all_criteria: CriterionReport
    criteria: Mapping[str, CriterionReport]
    units: Mapping[str, float]
    """Mean of the rubric's unit mark by kind of reply; adversarial kinds together."""
    pairs: int
    pairs_right: float
    """Ties count half."""
    length_bias: float
    position_bias: float
    same_again: float
    difference_again: float
    """Mean absolute difference between the first repeat and the others, in levels."""
    caught: Mapping[str, tuple[int, int]]
    """Adversarial kind to (caught, judged)."""
    misses: tuple[Miss, ...]
    """The furthest first."""


async def ask(judge: Judge, items: Sequence[Item], repeat: int, seed: int = 0) -> Repeat:
    """One round, in an order of its own. Raises JudgeUnusableError."""
    order = np.random.default_rng([seed, repeat]).permutation(len(items))
    given = await answers(judge, [items[i].request for i in order])
    places = {int(item): place for place, item in enumerate(order)}
    return Repeat(tuple(given[places[i]] for i in range(len(items))), tuple(places[i] for i in range(len(items))))


def evaluate(judge: str, rubric: Rubric, items: Sequence[Item], repeats: Sequence[Repeat]) -> Probe:
    """The numbers. Raises ProbeError for a rubric without any criterion that the items have bands for."""
    _check(rubric, items)
    rounds = [_Round(_marks(rubric, items, repeat.answers), repeat.places) for repeat in repeats]
    marks = [_mean_marks([one.marks[i] for one in rounds]) for i in range(len(items))]
    units = [math.nan if not row else to_unit(rubric, row) for row in marks]
    failures = [answer.reason for r in repeats for answer in r.answers if isinstance(answer, JudgeFailure)]
    rows = _rows(rubric, items, marks)
    same, difference = _retest(rounds)
    pairs, right = _pairs(items, units)
    return Probe(
        judge=judge,
        rubric=f"{rubric.name} {rubric.version} ({rubric.fingerprint})",
        items=len(items),
        repeats=len(repeats),
        missing=len(failures),
        why_missing=tuple(sorted(set(failures))),
        all_criteria=_report(rows),
        criteria={name: _report(of) for name in rubric.names if (of := [row for row in rows if row.criterion == name])},
        units=_units(items, units),
        pairs=pairs,
        pairs_right=right,
        length_bias=_length_bias(items, rows),
        position_bias=_position_bias(rubric, rounds),
        same_again=same,
        difference_again=difference,
        caught=_caught(rows),
        misses=_misses(rows, items, repeats),
    )


# --- marks ----------------------------------------------------------------------------------------------------

Marks = Mapping[str, float]
"""Criterion to mark; empty where there is no verdict."""


@dataclass(frozen=True)
class _Round:
    marks: Sequence[Marks]
    places: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """A mark beside its band."""

    item: Item
    criterion: str
    mark: float
    band: tuple[int, int]

    @property
    def beyond(self) -> float:
        return beyond(self.mark, self.band)

    @property
    def above_middle(self) -> float:
        return self.mark - sum(self.band) / 2


def _check(rubric: Rubric, items: Sequence[Item]) -> None:
    banded = {name for item in items for name in item.bands}
    if not banded & set(rubric.names):
        wanted, came = ", ".join(rubric.names), ", ".join(sorted(banded))
        fix = "Write a calibration set for this rubric and name it with --items."
        raise ProbeError(f"items: wanted bands for some of {wanted} ({rubric.name}), got bands for {came}. {fix}")


def _marks(rubric: Rubric, items: Sequence[Item], given: Sequence[Answer]) -> list[Marks]:
    return [
        apply_vetoes(rubric, answer, item.request.spans).verdict.by_name() if isinstance(answer, Verdict) else {}
        for item, answer in zip(items, given, strict=True)
    ]


def _mean_marks(rounds: Sequence[Marks]) -> Marks:
    known = [marks for marks in rounds if marks]
    return {name: mean([marks[name] for marks in known]) for name in known[0]} if known else {}


def _rows(rubric: Rubric, items: Sequence[Item], marks: Sequence[Marks]) -> list[_Row]:
    return [
        _Row(item, name, row[name], item.bands[name])
        for item, row in zip(items, marks, strict=True)
        for name in rubric.names
        if name in row and name in item.bands
    ]


# --- numbers --------------------------------------------------------------------------------------------------


def _report(rows: Sequence[_Row]) -> CriterionReport:
    marks = [row.mark for row in rows]
    off = [row.beyond for row in rows]
    return CriterionReport(
        marks=len(rows),
        within=mean([float(value == 0) for value in off]),
        error=mean([abs(value) for value in off]),
        bias=mean(off),
        rank_correlation=rank_correlation(marks, [sum(row.band) / 2 for row in rows]),
        deviation=deviation(marks),
        top_share=mean([float(mark >= TOP) for mark in marks]),
        top_allowed=mean([float(row.band[1] == HIGHEST) for row in rows]),
    )


def _units(items: Sequence[Item], units: Sequence[float]) -> dict[str, float]:
    kinds = ["adversarial" if item.adversarial else item.kind for item in items]
    known = [(kind, unit) for kind, unit in zip(kinds, units, strict=True) if not math.isnan(unit)]
    return {kind: mean([u for k, u in known if k == kind]) for kind in dict.fromkeys(k for k, _ in known)}


def _pairs(items: Sequence[Item], units: Sequence[float]) -> tuple[int, float]:
    """Good replies against every other kind in the same dialogue."""
    known = [(item, unit) for item, unit in zip(items, units, strict=True) if not math.isnan(unit)]
    won = [
        1.0 if better > worse else 0.5 if better == worse else 0.0
        for good, better in known
        for other, worse in known
        if good.kind == "good" and other.kind != "good" and good.dialogue == other.dialogue
    ]
    return len(won), mean(won)


def _length_bias(items: Sequence[Item], rows: Sequence[_Row]) -> float:
    by_item = {item.id: [row.above_middle for row in rows if row.item is item] for item in items}
    known = [(len(item.request.reply.split()), mean(by_item[item.id])) for item in items if by_item[item.id]]
    return rank_correlation([words for words, _ in known], [above for _, above in known])


def _position_bias(rubric: Rubric, rounds: Sequence[_Round]) -> float:
    """NaN with one repeat, and for a judge that says the same again."""
    units = [[to_unit(rubric, marks) if marks else math.nan for marks in one.marks] for one in rounds]
    if len(rounds) < 2:
        return math.nan
    everyone = range(len(units[0]))
    own = [mean([row[i] for row in units if not math.isnan(row[i])]) for i in everyone]
    known = [
        (one.places[i], row[i] - own[i])
        for one, row in zip(rounds, units, strict=True)
        for i in everyone
        if not math.isnan(row[i])
    ]
    return rank_correlation([place for place, _ in known], [above for _, above in known])


def _retest(rounds: Sequence[_Round]) -> tuple[float, float]:
    """Share of marks that are the same in a later repeat, and the mean difference; NaN with one repeat."""
    differences = [
        abs(first[name] - again[name])
        for later in rounds[1:]
        for first, again in zip(rounds[0].marks, later.marks, strict=True)
        if first and again
        for name in first
    ]
    return mean([float(value == 0) for value in differences]), mean(differences)


def _caught(rows: Sequence[_Row]) -> dict[str, tuple[int, int]]:
    """In the order of ``ADVERSARIAL``; kinds without any verdict are left out."""
    found: dict[str, tuple[int, int]] = {}
    for kind in ADVERSARIAL:
        items = {row.item.id for row in rows if row.item.kind == kind}
        fooled = {row.item.id for row in rows if row.item.kind == kind and row.beyond > 0}
        if items:
            found[kind] = len(items) - len(fooled), len(items)
    return found


def _misses(rows: Sequence[_Row], items: Sequence[Item], repeats: Sequence[Repeat]) -> tuple[Miss, ...]:
    reasons = {
        (item.id, mark.criterion): mark.reason
        for repeat in reversed(repeats)  # so that the first repeat's reason stays
        for item, answer in zip(items, repeat.answers, strict=True)
        if isinstance(answer, Verdict)
        for mark in answer.marks
    }
    off = sorted((row for row in rows if row.beyond), key=lambda row: (-abs(row.beyond), row.item.id, row.criterion))
    return tuple(
        Miss(row.item.id, row.item.kind, row.criterion, row.mark, row.band, reasons[row.item.id, row.criterion])
        for row in off
    )
