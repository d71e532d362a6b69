"""``Shown`` on the terminal: completion, prompts, verdict, reward. Plain text where there is no terminal."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kardia_jax.judge.agreement import beyond
from kardia_jax.trust.show import Shown, ShownMark

DASH = "–"


def print_shown(shown: Shown, console: Console, prompts: bool = True) -> None:
    """Everything; without ``prompts`` what a judge that is a model was asked is left out."""
    for part in parts(shown, prompts):
        # Quoted lines stay whole: one that is wrapped would seem to end its fence.
        console.print(part, markup=False, soft_wrap=isinstance(part, Text))


def parts(shown: Shown, prompts: bool) -> Iterator[RenderableType]:
    """In the order in which it came about."""
    yield Text(shown.title, style="bold")
    for label, text in shown.facts.items():
        yield Text(f"{label}: {text}")
    if shown.completion:
        yield from _title("completion")
        yield Text(shown.completion)
    elif shown.request is not None:
        yield from _title("reply")
        yield Text(shown.request.reply or "(empty)")
    for number, question in enumerate(shown.questions if prompts else (), start=1):
        which = f" {number} of {len(shown.questions)}" if len(shown.questions) > 1 else ""
        yield from _title(f"prompt{which} for a judge that is a language model")
        yield Text(question.prompt.rstrip())
    yield from _title("verdict")
    if shown.marks:
        yield _verdict(shown)
    if shown.no_verdict:
        yield Text(shown.no_verdict)
    for mark in shown.marks:
        if mark.veto:
            yield Text(f"veto on {mark.criterion}: {mark.veto}")
    if shown.flag:
        yield Text(f"flag: it speaks to its judge ({shown.flag!r})")
    yield from _title("reward")
    yield from _reward(shown)


def _title(text: str) -> Iterator[RenderableType]:
    yield ""
    yield Rule(text, align="left", characters="─")


def _verdict(shown: Shown) -> Table:
    """One line per criterion; a column for spread, and for a calibration item's bands, only where there are some."""
    spreads = any(mark.spread is not None for mark in shown.marks)
    bands = any(mark.band is not None for mark in shown.marks)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("criterion", "weight", "mark", *(["spread"] * spreads), *(["band"] * bands), "reason"):
        table.add_column(name, justify="left" if name in ("criterion", "reason", "band") else "right")
    for mark in shown.marks:
        spread = [DASH if mark.spread is None else f"{mark.spread:.2f}"] * spreads
        table.add_row(
            mark.criterion, f"{mark.weight:g}", f"{mark.mark:g}", *spread, *([_band(mark)] * bands), Text(mark.reason)
        )
    return table


def _band(mark: ShownMark) -> str:
    """4-5, with what is wrong: "1-2 too kind"."""
    if mark.band is None:
        return DASH
    off = beyond(mark.mark, mark.band)
    word = " too kind" if off > 0 else " too hard" if off < 0 else ""
    return "-".join(str(end) for end in dict.fromkeys(mark.band)) + word


def _reward(shown: Shown) -> Iterator[Text]:
    if not shown.terms:
        unit = DASH if shown.unit is None else f"{shown.unit:.3f}"
        yield Text(f"rubric {unit} in [0, 1]; format and emotion are terms of whole completions in a run")
        return
    added = " + ".join(
        f"{weight:.3g} x {name} {DASH if value is None else f'{value:.3f}'}"
        for name, (value, weight) in shown.terms.items()
    )
    yield Text(f"{added} = {'unknown' if shown.reward is None else f'{shown.reward:.4f}'}")
