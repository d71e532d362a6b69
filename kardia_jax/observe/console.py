"""Progress and metrics of a run on the terminal.

In: after every step its number, its metrics (one float per name) and its seconds by phase. Out, on a
terminal: a progress bar with the time left and tokens/s, and a table that is redrawn in place. Where the
output is no terminal (a log file, CI), or live display is off: plain lines, about forty in a run,

    grpo 12/200  reward 0.612 (format 1.000, emotion 0.500, rubric 0.336)  KL 0.0021  1830 tok/s  rollout 4.1s

The names that have a place in the display are in ``ROWS``; a name that starts with ``reward/`` is a term of
the reward. A metric that is NaN was not observed and shows as a dash.
"""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

TERM_PREFIX = "reward/"
DASH = "–"
SILENT = Console(quiet=True)
"""Of processes that report nothing."""


class Row(NamedTuple):
    """How one metric is shown."""

    metric: str
    label: str
    format: str


ROWS = (
    Row("reward", "reward", ".3f"),
    Row("loss", "loss", ".4f"),
    Row("kl", "KL", ".4f"),
    Row("entropy", "entropy", ".3f"),
    Row("grad_norm", "grad norm", ".3g"),
    Row("dead_groups", "dead groups", ".0%"),
    Row("judge_failures", "judge failures", ".0%"),
    Row("judge/hidden_share", "judge hidden", ".0%"),
)
SPEED = "tokens_per_second"
PLAIN_LINES = 40
"""About as many lines as a run leaves in a log file, whatever its length; metrics.jsonl has every step."""


class TrainingConsole:
    """A context manager around the loop; ``update`` it once per step."""

    def __init__(self, title: str, steps: int, first_step: int = 0, live: bool = True, console: Console | None = None):
        self._console = console or Console()
        self._title, self._steps = title, steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(title, total=steps, completed=first_step, speed="")
        # Redrawn at every update and four times a second between, so that the clock moves during a long step.
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)
        self._is_live = live and self._console.is_terminal

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Show step ``step`` (counted from 1) as done."""
        if not self._is_live:
            if step in (1, self._steps) or step % max(1, self._steps // PLAIN_LINES) == 0:
                self._print(plain_line(self._title, step, self._steps, metrics, seconds))
            return
        self._progress.update(self._task, completed=step, speed=_speed(metrics))
        self._live.update(Group(self._progress, metrics_table(metrics, seconds)), refresh=True)

    def message(self, text: str) -> None:
        """Print a line that stays, above the live display."""
        self._print(text)

    def _print(self, text: str) -> None:
        # Plain text: square brackets are no markup, and a long line is wrapped by the reader, not here.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def metrics_table(metrics: Mapping[str, float], seconds: Mapping[str, float]) -> Table:
    """Three columns side by side: metrics, reward by term, seconds by phase with their share of the step."""
    shown = [(row.label, _number(metrics[row.metric], row.format)) for row in ROWS if row.metric in metrics]
    terms = [(name, _number(value, ".3f")) for name, value in _terms(metrics).items()]
    total = sum(seconds.values())
    phases = [(name, f"{spent:.2f}s {spent / total if total else 0:4.0%}") for name, spent in seconds.items()]
    grid = Table.grid(padding=(0, 3))
    grid.add_row(_pairs("metric", shown), _pairs("reward by term", terms), _pairs("phase", phases))
    return grid


def plain_line(title: str, step: int, steps: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    """One line for a log file; metrics that are absent are left out."""
    parts = [f"{title} {step}/{steps}"]
    for row in ROWS:
        if row.metric in metrics:
            parts.append(f"{row.label} {_number(metrics[row.metric], row.format)}{_term_note(row, metrics)}")
    parts += [_speed(metrics)] if SPEED in metrics else []
    parts += [" ".join(f"{name} {spent:.1f}s" for name, spent in seconds.items())] if seconds else []
    return "  ".join(parts)


def _term_note(row: Row, metrics: Mapping[str, float]) -> str:
    terms = _terms(metrics)
    if row.metric != "reward" or not terms:
        return ""
    return " (" + ", ".join(f"{name} {_number(value, '.3f')}" for name, value in terms.items()) + ")"


def _terms(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(TERM_PREFIX): value for name, value in metrics.items() if name.startswith(TERM_PREFIX)}


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
    table.add_column()
    table.add_column(justify="right")
    for label, text in rows:
        table.add_row(label, text)
    return table


def _speed(metrics: Mapping[str, float]) -> str:
    return f"{_number(metrics[SPEED], '.0f')} tok/s" if SPEED in metrics else ""


def _number(value: float, format: str) -> str:
    return DASH if math.isnan(value) else f"{value:{format}}"
