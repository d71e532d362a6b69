import io
import math

from rich.console import Console

from kardia_jax.observe.console import TrainingConsole, plain_line
from kardia_jax.observe.intervals import Interval
from kardia_jax.observe.results import interval_text, results_table

METRICS = {
    "reward": 0.6123,
    "reward/format": 1.0,
    "reward/emotion": 0.5,
    "kl": 0.0021,
    "entropy": math.nan,
    "dead_groups": 0.25,
    "judge_failures": 0.0,
    "tokens_per_second": 1830.4,
}
SECONDS = {"rollout": 3.0, "update": 1.0}


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_line():
    assert plain_line("grpo", 12, 200, METRICS, SECONDS) == (
        "grpo 12/200  reward 0.612 (format 1.000, emotion 0.500)  KL 0.0021  entropy –  dead groups 25%  "
        "judge failures 0%  1830 tok/s  rollout 3.0s update 1.0s"
    )


def test_no_terminal_gives_one_unwrapped_line_per_step():
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with TrainingConsole("grpo", steps=2, console=console) as live:
        live.update(1, METRICS, SECONDS)
        live.update(2, {"loss": 0.5}, {})
    assert text_of(console).splitlines() == [
        plain_line("grpo", 1, 2, METRICS, SECONDS),
        "grpo 2/2  loss 0.5000",
    ]


def test_a_terminal_without_live_display_gets_plain_lines():
    console = terminal()
    with TrainingConsole("sft", steps=1, live=False, console=console) as live:
        live.update(1, {"loss": 0.5}, {})
    assert text_of(console) == "sft 1/1  loss 0.5000\n"


def test_live_display_shows_progress_terms_and_phases():
    console = terminal()
    with TrainingConsole("grpo", steps=4, first_step=2, console=console) as live:
        live.message("resumed from [step] 2")
        live.update(3, METRICS, SECONDS)
    shown = text_of(console)
    for piece in (
        "3/4",
        "1830 tok/s",
        "0.612",
        "emotion",
        "0.500",
        "25%",
        "rollout",
        "3.00s  75%",
        "[step] 2",
        "–",
    ):
        assert piece in shown, piece


def test_live_display_gives_the_terminal_back_after_an_error():
    console = terminal()
    try:
        with TrainingConsole("grpo", steps=1, console=console) as live:
            live.update(1, METRICS, SECONDS)
            raise RuntimeError("judge is gone")
    except RuntimeError:
        pass
    # The sequence that shows the cursor again.
    assert text_of(console).rstrip().endswith("\x1b[?25h")


def test_results_table_puts_metrics_down_and_policies_across():
    console = terminal(90)
    known = Interval(0.95, 0.9, 0.99)
    console.print(
        results_table(
            {
                "base": {"format_rate": Interval(0.0, 0.0, 0.0)},
                "grpo": {"format_rate": known, "reward": known},
            }
        )
    )
    lines = text_of(console).splitlines()
    format_line = next(line for line in lines if "format_rate" in line)
    assert "0.000 [0.000, 0.000]" in format_line
    assert "0.950 [0.900, 0.990]" in format_line
    assert "–" in next(line for line in lines if "reward" in line)


def test_interval_text_never_invents_a_spread():
    assert interval_text(Interval(0.5, math.nan, math.nan)) == "0.500"
    assert interval_text(Interval(math.nan, math.nan, math.nan)) == "–"
    assert interval_text(None) == "–"
