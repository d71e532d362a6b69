"""The table that an evaluation ends with.

In: by policy (base, sft, grpo), by metric, an ``Interval``. Out: a rich table, metrics down and policies
across, since nine columns of intervals would not fit a terminal:

                      base                    sft                     grpo
    format_rate       0.000 [0.000, 0.000]    0.981 [0.970, 0.990]    0.995 [0.990, 1.000]
"""

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from kardia_jax.observe.intervals import Interval

WIDTH = 100
"""Columns that three policies with their intervals take."""


def results_table(
    results: Mapping[str, Mapping[str, Interval]], title: str = "Held-out personas, mean [95 % interval]"
) -> Table:
    """One column per policy, one line per metric in order of first appearance, a dash where not measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    for policy in results:
        table.add_column(policy, no_wrap=True)
    for metric in dict.fromkeys(name for by_metric in results.values() for name in by_metric):
        table.add_row(metric, *[interval_text(by_metric.get(metric)) for by_metric in results.values()])
    return table


def wide_console() -> Console:
    """A console of at least ``WIDTH`` columns: a log file or a narrow terminal must not cut numbers off."""
    return Console(width=max(WIDTH, Console().width))


def interval_text(interval: Interval | None) -> str:
    """``0.612 [0.580, 0.640]``; the mean alone where the spread is unknown, a dash where the mean is."""
    if interval is None or math.isnan(interval.mean):
        return "–"
    if math.isnan(interval.low) or math.isnan(interval.high):
        return f"{interval.mean:.3f}"
    # The bracket is escaped: rich reads [ as markup.
    return f"{interval.mean:.3f} \\[{interval.low:.3f}, {interval.high:.3f}]"
