"""A run's audit as a plot, from lines as the training loop writes them."""

import json
import pathlib

import pytest

from kardia_jax.cli import main
from kardia_jax.judge.audit import audit_metrics, compare
from kardia_jax.observe.jsonl import JsonlWriter
from kardia_jax.rewards.rubric import JudgeFailure, Mark, Verdict, load_rubric
from kardia_jax.trust.gap import bar, looks, merged

RUBRIC = load_rubric("kardia_five")


def all_marks(mark: float) -> Verdict:
    return Verdict(tuple(Mark(name, mark, "because") for name in RUBRIC.names))


def audited(first: list[float], second: list[float]) -> dict[str, float]:
    """Metrics of a step at which the two judges gave these marks to all criteria."""
    return audit_metrics(compare(RUBRIC, [all_marks(mark) for mark in first], [all_marks(mark) for mark in second]))


@pytest.fixture
def run_folder(tmp_path) -> pathlib.Path:
    """Every second of eight steps is audited; the first judge gets kinder, and once the second one is silent."""
    silent = audit_metrics(compare(RUBRIC, [all_marks(5)], [JudgeFailure("late", True)]))
    rows = {
        1: {"reward": 0.5},
        2: audited([3, 3, 4], [4, 3, 4]),
        4: audited([3, 4, 5], [3, 4, 5]),
        6: silent,
        8: audited([5, 5, 5], [3, 3, 4]),
    }
    with JsonlWriter(tmp_path / "metrics.jsonl") as file:
        for step, row in rows.items():
            file.write(step, row)
    return tmp_path


def test_the_gap_of_each_audited_step_by_hand(run_folder):
    found = looks(run_folder)
    assert [look.first for look in found] == [2, 4, 6, 8]
    # A mark is a quarter of the unit: -1 / 4 / 3, 0, unknown, (2 + 2 + 1) / 4 / 3.
    assert [look.gap for look in found] == pytest.approx([-1 / 12, 0.0, float("nan"), 5 / 12], nan_ok=True)
    assert [look.missing for look in found] == [0, 0, 1, 0]


def test_a_long_run_is_shown_in_rows_of_means_that_leave_out_what_is_unknown(run_folder):
    early, late = merged(looks(run_folder), rows=2)
    assert (early.first, early.last, late.first, late.last) == (2, 4, 6, 8)
    assert (early.gap, late.gap) == pytest.approx((-1 / 24, 5 / 12))
    assert (late.compared, late.missing) == (1.5, 0.5)


def test_bars_grow_to_both_sides_and_stay_within_the_column():
    assert [(bar(gap).index("|"), bar(gap).count("█"), bar(gap)[19]) for gap in (-0.05, 0.05, -9.0)] == [
        (20, 2, "█"),
        (20, 2, " "),
        (20, 20, "█"),
    ]
    assert bar(float("nan")).strip() == "|"


def test_the_command_prints_a_row_for_each_look(run_folder, capsys):
    assert main(["judge", "gap", "--run", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.split()[:1] == ["8"]]
    assert row == ["8", "+0.42", "0.42", "–", "3", "0", "|" + "█" * 17]
    assert lines[-1] == "first quarter -0.083, last quarter +0.417"


@pytest.mark.parametrize(("row", "said"), [(None, "metrics.jsonl"), ({"reward": 1.0}, "--judge.audit.every")])
def test_a_run_without_an_audit_is_answered_with_what_to_do(row, said, tmp_path, capsys):
    if row:
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **row}) + "\n")
    assert main(["judge", "gap", "--run", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
