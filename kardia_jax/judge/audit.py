"""A second judge of another kind looks at some of what the first has marked.

A policy that learns to please one judge shows it here: the first judge's marks rise and the second's do not. In: the
completions of a step, and what the two judges said about the same sample of them. Out: which ones to ask about, and the
gap as metrics. The second judge's marks never enter a reward.

>>> audit_sample(seed=0, step=10, candidates=64, size=4)
(6, 25, 41, 48)
>>> audit_metrics(compare(rubric, paid, audited))
{'audit/gap': 0.21, 'audit/gap/empathy': 1.25, 'audit/rank_correlation': 0.4, ...}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from kardia_jax.judge.agreement import mean, rank_correlation
from kardia_jax.rewards.rubric import HIGHEST, LOWEST, JudgeFailure, Rubric, Verdict, to_unit

Answer = Verdict | JudgeFailure
_PURPOSE = 0x41554449
"""Keeps this choice apart from every other that is made from (seed, step): "AUDI" in ASCII."""


@dataclass(frozen=True)
class Gap:
    """First judge minus second on the completions that both have marked; positive where the first is kinder."""

    mean: float
    """In marks."""
    absolute: float
    """Mean of the absolute differences, in marks."""
    rank_correlation: float
    """Spearman's; NaN below three completions, or where a judge gives one mark to all."""


@dataclass(frozen=True)
class Audit:
    """Two judges on one sample."""

    unit: Gap
    """Of the rubric's weighted mean, in [0, 1]."""
    criteria: Mapping[str, Gap]
    compared: int
    """Completions that both have marked."""
    missing: int
    """Completions that one of them has not marked; they are in no number above."""


def audit_sample(seed: int, step: int, candidates: int, size: int) -> tuple[int, ...]:
    """Which of the completions 0 .. candidates - 1 the second judge sees: at most ``size``, in order.

    A function of its arguments alone, so that a resumed run asks about the same ones.
    """
    chooser = np.random.default_rng([_PURPOSE, seed, step])
    return tuple(sorted(int(i) for i in chooser.choice(candidates, min(size, candidates), replace=False)))


def compare(rubric: Rubric, paid: Sequence[Answer], audited: Sequence[Answer]) -> Audit:
    """What the judge that pays and the one that looks on say about the same completions, in the same order.

    Only the rubric's own criteria count; items of single dialogues have no column of their own. Raises ValueError when
    the two differ in length.
    """
    pairs = [
        (first.by_name(), second.by_name())
        for first, second in zip(paid, audited, strict=True)
        if _marks_all(first, rubric) and _marks_all(second, rubric)
    ]
    columns = {name: [(first[name], second[name]) for first, second in pairs] for name in rubric.names}
    units = [(_unit(rubric, first), _unit(rubric, second)) for first, second in pairs]
    criteria = {name: _gap(column) for name, column in columns.items()}
    return Audit(_gap(units), criteria, len(pairs), len(paid) - len(pairs))


def audit_metrics(audit: Audit) -> dict[str, float]:
    """For metrics.jsonl; NaN where nothing could be compared."""
    return {
        "audit/gap": audit.unit.mean,
        "audit/gap_absolute": audit.unit.absolute,
        "audit/rank_correlation": audit.unit.rank_correlation,
        **{f"audit/gap/{name}": gap.mean for name, gap in audit.criteria.items()},
        **{f"audit/rank_correlation/{name}": gap.rank_correlation for name, gap in audit.criteria.items()},
        "audit/compared": float(audit.compared),
        "audit/missing": float(audit.missing),
    }


def _marks_all(answer: Answer, rubric: Rubric) -> TypeGuard[Verdict]:
    """Whether this is a verdict on the rubric's criteria; a second judge of any make must not stop a run."""
    marks = answer.by_name() if isinstance(answer, Verdict) else {}
    return all(LOWEST <= marks.get(name, math.nan) <= HIGHEST for name in rubric.names)


def _unit(rubric: Rubric, marks: Mapping[str, float]) -> float:
    return to_unit(rubric, {name: marks[name] for name in rubric.names})


def _gap(column: Sequence[tuple[float, float]]) -> Gap:
    differences = [first - second for first, second in column]
    absolute = mean([abs(difference) for difference in differences])
    correlation = rank_correlation([first for first, _ in column], [second for _, second in column])
    return Gap(mean(differences), absolute, correlation if column else math.nan)
