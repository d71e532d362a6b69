"""One graded completion, whole: what the judge saw, what it said, what it came to.

In: a row of a run's rollouts.jsonl, or a reply that is graded anew. Out: ``Shown``, which ``rendering.py`` prints.

A row holds marks after the rubric's vetoes and the judge's reasons; the prompts are built again from what it quotes, by
the rubric that the run's config names. Where that is a file, it is read as it is today.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kardia_jax.config import Config, ConfigError, RewardConfig, from_json
from kardia_jax.dialogue.spans import TAGS, Spans, parse
from kardia_jax.judge.calibration import Item
from kardia_jax.rewards.combine import TERMS, heard
from kardia_jax.rewards.rubric import (
    JudgeFailure,
    JudgeRequest,
    Question,
    Rubric,
    RubricItem,
    Verdict,
    addresses_judge,
    apply_vetoes,
    load_rubric,
    questions,
    to_unit,
    with_items,
)


class ShowError(ValueError):
    """A row that is not there, or a file that cannot be shown: names what was wanted and what there is."""


@dataclass(frozen=True)
class ShownMark:
    """One line of the verdict."""

    criterion: str
    weight: float
    mark: float
    reason: str
    spread: float | None = None
    veto: str = ""
    """The rule that lowered the mark, with the mark before."""
    band: tuple[int, int] | None = None
    """What a calibration item deserves."""


@dataclass(frozen=True)
class Shown:
    """Everything about one graded completion."""

    title: str
    facts: Mapping[str, str]
    """Short lines beside the title: emotion, note, malformed."""
    completion: str
    """As it was sampled; empty where only a reply was graded."""
    request: JudgeRequest | None
    """None for a completion that did not parse: no judge saw it."""
    questions: Sequence[Question]
    marks: Sequence[ShownMark]
    unit: float | None
    """The marks as one number in [0, 1]."""
    no_verdict: str
    """Why there are no marks, or ""."""
    flag: str
    """The words with which the completion speaks to its judge, or ""."""
    terms: Mapping[str, tuple[float | None, float]]
    """Term of the reward to (value, weight); weights sum to 1. Empty where only a reply was graded."""
    reward: float | None


# --- from a run -----------------------------------------------------------------------------------------------


def from_run(folder: pathlib.Path, step: int | None, sample: int) -> Shown:
    """Completion number ``sample`` (from 0 on, in the file's order) of a step; of the last step where none is named.

    Raises ShowError.
    """
    config, rows = _config(folder), _rows(folder / "rollouts.jsonl")
    steps = sorted({row["step"] for row in rows})
    step = steps[-1] if step is None else step
    of_step = [row for row in rows if row["step"] == step]
    if not of_step:
        wanted = f"{steps[0]}" if len(steps) == 1 else f"one of the {len(steps)} from {steps[0]} to {steps[-1]}"
        raise ShowError(f"step: wanted {wanted} in {folder}, got {step}.")
    if not 0 <= sample < len(of_step):
        fix = "--run.log-rollouts -1 writes every prompt of a step."
        raise ShowError(f"sample: wanted 0 to {len(of_step) - 1} at step {step}, got {sample}. {fix}")
    title = f"{folder}, step {step}, completion {sample} of {len(of_step)} in the file"
    return from_row(of_step[sample], load_rubric(config.judge.rubric), config.rewards, title)


def from_row(row: Mapping[str, Any], rubric: Rubric, weights: RewardConfig, title: str) -> Shown:
    """A line of rollouts.jsonl. Raises ShowError where it lacks what is to be shown."""
    try:
        request = None if row["spans"] is None else _request(row)
        whole = rubric if request is None else with_items(rubric, request.items)
        reasons = row["reasons"]
        marks = [
            ShownMark(
                criterion.name,
                criterion.weight,
                row["marks"][criterion.name],
                reasons.get(criterion.name, ""),
                row.get("spreads", {}).get(criterion.name),
                row.get("vetoes", {}).get(criterion.name, ""),
            )
            for criterion in (whole.criteria if row["marks"] else ())
        ]
        return Shown(
            title=title,
            facts={
                "dialogue": f"{row['dialogue']}, turn {row['turn']}, sample {row['sample']}",
                "emotion": _emotion(row),
                **({"malformed": row["malformed"]} if row["malformed"] else {}),
            },
            completion=row["completion"],
            request=request,
            questions=questions(rubric, request) if request else (),
            marks=marks,
            unit=row["rubric"],
            no_verdict="" if marks else reasons.get("rubric", ""),
            flag=row.get("flag", ""),
            terms=_terms(row, weights),
            reward=row["reward"],
        )
    except (KeyError, TypeError) as error:
        fix = "Was it written by `kardia grpo`, with the rubric that config.json names?"
        raise ShowError(f"{title}: wanted a line of rollouts.jsonl, got one without {error}. {fix}") from error


def _request(row: Mapping[str, Any]) -> JudgeRequest:
    history = tuple((said["role"], heard(said["role"], said["content"])) for said in row["dialogue_so_far"])
    items = tuple(RubricItem(**item) for item in row.get("rubric_items", ()))
    spans = row["spans"]
    return JudgeRequest(
        row["profile"],
        row["situation"],
        history,
        spans["response"],
        spans["understanding"],
        spans["reasoning"],
        items,
    )


def _emotion(row: Mapping[str, Any]) -> str:
    said = row["spans"]["emotion"] if row["spans"] else "nothing readable"
    return f"gold {row['emotion']}, said {said}"


def _terms(row: Mapping[str, Any], weights: RewardConfig) -> dict[str, tuple[float | None, float]]:
    given = (row["format"], row["emotion_right"], row["rubric"])
    raw = (weights.format, weights.emotion, weights.rubric)
    return {name: (value, weight / sum(raw)) for name, value, weight in zip(TERMS, given, raw, strict=True)}


def _config(folder: pathlib.Path) -> Config:
    path = folder / "config.json"
    if not path.is_file():
        raise ShowError(f"run: wanted the folder of a run, with config.json and rollouts.jsonl, got {folder}.")
    try:
        return from_json(path.read_text("utf-8"))
    except ConfigError as error:
        raise ShowError(f"{path}: {error} It was written by another version.") from error


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Every whole line; the last may be torn while the run is writing."""
    if not path.is_file():
        raise ShowError(f"run: wanted {path}; only `kardia grpo` writes it.")
    lines = [line for line in path.read_text("utf-8").split("\n")[:-1] if line]
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise ShowError(f"{path}: wanted at least one completion, got none. Has the run finished a step?")
    return rows


# --- graded anew ----------------------------------------------------------------------------------------------


def read_completion(path: pathlib.Path) -> tuple[str, str, str]:
    """(understanding, reasoning, reply) of a file with the four spans; without them the text is the reply.

    Raises ShowError for a text that has tags and does not parse.
    """
    text = path.read_text("utf-8").strip()
    parsed = parse(text)
    if isinstance(parsed, Spans):
        return parsed.understanding, parsed.reasoning, parsed.response
    if any(tag in text for tag in TAGS):
        raise ShowError(f"{path}: wanted a reply, or a completion with all four spans; {parsed.detail}.")
    return "", "", text


def from_answer(
    request: JudgeRequest, answer: Verdict | JudgeFailure, rubric: Rubric, title: str, item: Item | None = None
) -> Shown:
    """A reply that was graded just now; ``item`` where it is one of a calibration set."""
    facts = {} if item is None else {"kind": item.kind, "emotion": item.emotion, "note": item.note}
    bands = {} if item is None else item.bands
    whole = with_items(rubric, request.items)
    marks, unit = [], None
    if isinstance(answer, Verdict):
        verdict, vetoes = apply_vetoes(whole, answer, request.spans)
        weights = {criterion.name: criterion.weight for criterion in whole.criteria}
        marks = [
            ShownMark(
                mark.criterion,
                weights[mark.criterion],
                mark.mark,
                mark.reason,
                mark.spread,
                vetoes.get(mark.criterion, ""),
                bands.get(mark.criterion),
            )
            for mark in verdict.marks
        ]
        unit = to_unit(whole, verdict.by_name())
    return Shown(
        title=title,
        facts=facts,
        completion="",
        request=request,
        questions=questions(rubric, request),
        marks=marks,
        unit=unit,
        no_verdict=answer.reason if isinstance(answer, JudgeFailure) else "",
        flag=addresses_judge("\n".join(request.spans.values())),
        terms={},
        reward=None,
    )
