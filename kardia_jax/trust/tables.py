"""A probe's numbers as tables for a terminal, plain text where there is none.

Every column is explained in ``judge/probe.py``; what is not defined (one repeat, a constant column) shows as a dash.
"""

import math
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kardia_jax.judge.probe import CriterionReport, Miss, Probe

DASH = "–"
SHOWN_MISSES = 10
COLLAPSE = 0.15
"""From so much more top marks than bands allow, the scale is said to collapse."""
LEANING = 0.3
"""From this rank correlation on, a bias is named."""
WIDTH = 110
"""Columns where the output is no terminal."""


def make_console() -> Console:
    """The terminal as it is; a fixed width in a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def print_probe(probe: Probe, console: Console) -> None:
    """The whole report."""
    for part in parts(probe):
        console.print(part, soft_wrap=isinstance(part, str))


def parts(probe: Probe) -> Iterator[RenderableType]:
    """From the general to the particular."""
    yield f"judge {probe.judge}, rubric {probe.rubric}: {probe.items} replies, asked {_times(probe.repeats)}"
    if probe.missing:
        missing = f"{probe.missing} of {probe.items * probe.repeats} verdicts are missing"
        yield Text(f"{missing}, and in no number below: {'; '.join(probe.why_missing)}")
    yield by_criterion(probe)
    yield by_kind(probe)
    yield ""
    yield from sentences(probe)
    if probe.misses:
        yield furthest_off(probe.misses)


def by_criterion(probe: Probe) -> Table:
    """Agreement, order and spread."""
    table = make_table("", "marks", "within band", "error", "bias", "rank corr.", "std", "top mark", "allowed")
    for name, report in probe.criteria.items():
        table.add_row(name, *_cells(report))
    table.add_section()
    table.add_row("all", *_cells(probe.all_criteria))
    return table


def _cells(report: CriterionReport) -> list[str]:
    return [
        str(report.marks),
        _share(report.within),
        number(report.error),
        number(report.bias, "+.2f"),
        number(report.rank_correlation),
        number(report.deviation),
        _share(report.top_share),
        _share(report.top_allowed),
    ]


def by_kind(probe: Probe) -> Table:
    """Adversarial replies by what they try, and how many get no mark above what they deserve."""
    table = make_table("adversarial replies", "caught", "of")
    for kind, (caught, judged) in probe.caught.items():
        table.add_row(kind.replace("_", " "), str(caught), str(judged))
    table.add_section()
    table.add_row("all", str(sum(c for c, _ in probe.caught.values())), str(sum(n for _, n in probe.caught.values())))
    return table


def sentences(probe: Probe) -> Iterator[str]:
    """What the numbers without a table say."""
    units = ", ".join(f"{kind} {number(unit)}" for kind, unit in probe.units.items())
    yield f"unit mark by kind: {units}"
    yield f"order: in {_share(probe.pairs_right)} of {probe.pairs} pairs the good reply gets more than the worse one"
    yield f"scale: {_scale(probe)}"
    yield f"length: {_leaning(probe.length_bias, 'longer replies', 'shorter replies')}"
    yield f"position: {_position(probe)}"
    yield f"test-retest: {_retest(probe)}"


def furthest_off(misses: tuple[Miss, ...]) -> Table:
    """The marks that lie furthest outside their bands, with the judge's own reasons."""
    shown = misses[:SHOWN_MISSES]
    table = make_table(
        f"furthest off ({len(shown)} of {len(misses)})", "criterion", "mark", "band", "the judge's reason"
    )
    for column in table.columns[1:]:
        column.justify = "left"
    table.columns[0].no_wrap = True
    for miss in shown:
        band = "-".join(str(end) for end in dict.fromkeys(miss.band))
        table.add_row(miss.item, miss.criterion, f"{miss.mark:g}", band, Text(miss.reason))
    return table


# --- words ----------------------------------------------------------------------------------------------------


def _times(repeats: int) -> str:
    return "once" if repeats == 1 else f"{repeats} times, each in another order"


def _scale(probe: Probe) -> str:
    top, allowed = _share(probe.all_criteria.top_share), _share(probe.all_criteria.top_allowed)
    fallen = [name for name, of in probe.criteria.items() if of.top_share > of.top_allowed + COLLAPSE]
    verdict = f"collapsed to the top: {', '.join(fallen)}" if fallen else "no criterion collapses to the top"
    return f"{top} of the marks are the top one, {allowed} of the bands reach it; {verdict}"


def _leaning(correlation: float, one: str, other: str) -> str:
    if math.isnan(correlation):
        return "not defined"
    lean = "no leaning" if abs(correlation) < LEANING else f"{one if correlation > 0 else other} are marked too kindly"
    return f"rank correlation {correlation:+.2f}: {lean}"


def _position(probe: Probe) -> str:
    if probe.repeats == 1:
        return "needs --repeats 2"
    if probe.same_again == 1:
        return "none: the marks are the same in every order"
    return _leaning(probe.position_bias, "later ones in a batch", "earlier ones in a batch")


def _retest(probe: Probe) -> str:
    if probe.repeats == 1:
        return "needs --repeats 2"
    return (
        f"{_share(probe.same_again)} of the marks are the same again, mean difference {number(probe.difference_again)}"
    )


def make_table(first: str, *others: str) -> Table:
    """A table whose first column is on the left and the others on the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _share(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.0%}"


def number(value: float, form: str = ".2f") -> str:
    """The number, or a dash where it is not defined."""
    return DASH if math.isnan(value) else f"{value:{form}}"
