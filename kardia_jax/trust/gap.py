"""The audit of a run as a plot: is the judge that pays getting kinder than the one that looks on?

In: the folder of a run with ``judge.audit.every`` above 0. Out: its ``audit/...`` metrics by step, and a table whose
last column is the plot; marks are the rubric's unit marks, in [0, 1]:

     steps      gap   size   rank corr.   compared   missing   harder | kinder
     10        +0.02   0.11         0.71          8         0          |█
     20        +0.16   0.18         0.35          8         0          |█████████

gap is the first judge minus the second, size the mean of its absolute value. A gap that grows while the reward grows is
what a policy looks like that has learnt its judge. A long run is shown in at most ``ROWS`` rows of equally many looks,
each their mean.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import RenderableType

from kardia_jax.judge.agreement import mean
from kardia_jax.observe.jsonl import read_rows
from kardia_jax.trust.show import ShowError
from kardia_jax.trust.tables import make_table, number

ROWS = 40
HALF = 20
"""Characters of the plot on either side of 0."""
FULL = 0.5
"""Gap, in unit marks, that fills one side."""


class Look(NamedTuple):
    """What the two judges said at one step, or at several in a row: means, NaN where nothing could be compared."""

    first: int
    last: int
    gap: float
    size: float
    rank_correlation: float
    compared: float
    missing: float


def looks(folder: pathlib.Path) -> list[Look]:
    """The audited steps of a run. Raises ShowError where there are none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ShowError(f"run: wanted the folder of a run, with metrics.jsonl, got {folder}.")
    found = [_look(row) for row in read_rows(path) if "audit/gap" in row]
    if not found:
        fix = "Train with --judge.audit.every N and another --judge.audit.kind."
        raise ShowError(f"run: wanted a run with an audit, got none in {path}. {fix}")
    return found


def _look(row: Mapping[str, Any]) -> Look:
    names = ("gap", "gap_absolute", "rank_correlation", "compared", "missing")
    values = (math.nan if row[f"audit/{name}"] is None else float(row[f"audit/{name}"]) for name in names)
    return Look(row["step"], row["step"], *values)


def merged(found: Sequence[Look], rows: int) -> list[Look]:
    """At most so many rows, each the mean over equally many looks (the last may have fewer)."""
    size = -(-len(found) // rows)
    parts = (list(found[start : start + size]) for start in range(0, len(found), size))
    return [_mean(part) for part in parts]


def _mean(part: Sequence[Look]) -> Look:
    columns = list(zip(*(look[2:] for look in part), strict=True))
    return Look(part[0].first, part[-1].last, *(mean([one for one in column if one == one]) for column in columns))


def parts(folder: pathlib.Path, found: Sequence[Look]) -> Iterator[RenderableType]:
    """The plot, and how the run's beginning compares with its end."""
    yield f"{folder}: the judge that pays minus the one that audits, at {len(found)} steps"
    table = make_table(
        "steps", "gap", "size", "rank corr.", "compared", "missing", f"{'harder':>{HALF}}|{'kinder':<{HALF}}"
    )
    for look in merged(found, ROWS):
        steps = "-".join(str(step) for step in dict.fromkeys((look.first, look.last)))
        gap, size, correlation = number(look.gap, "+.2f"), number(look.size), number(look.rank_correlation)
        table.add_row(steps, gap, size, correlation, f"{look.compared:.3g}", f"{look.missing:.3g}", bar(look.gap))
    yield table
    quarter = max(1, len(found) // 4)
    early, late = _mean(found[:quarter]), _mean(found[-quarter:])
    yield f"first quarter {number(early.gap, '+.3f')}, last quarter {number(late.gap, '+.3f')}"


def bar(gap: float) -> str:
    """Blocks to the left of the line where the first judge is harder, to the right where it is kinder.

    >>> bar(-0.05).strip()
    '██|'
    """
    length = 0 if math.isnan(gap) else min(HALF, round(abs(gap) / FULL * HALF))
    left, right = ("█" * length, "") if gap < 0 else ("", "█" * length)
    return f"{left:>{HALF}}|{right:<{HALF}}"
