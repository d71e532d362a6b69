"""Held-out evaluation of a policy: format, emotion, rubric, each with a 95 % interval.

In: a config, a policy, a grader. Out: ``Evaluation`` with one value per answer, from which intervals are made: over one
seed by a bootstrap of whole dialogues, over several by Student's t on the seeds' means.

A malformed answer has no reply to mark; it counts with the lowest mark, as it does in the reward, so that policies with
different format rates are compared over the same dialogues. An answer whose verdict is missing counts for format and
emotion only.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from kardia_jax.config import Config, ConfigError, EvalConfig
from kardia_jax.dialogue.dataset import load_dialogues
from kardia_jax.dialogue.emotions import EMOTIONS
from kardia_jax.dialogue.prompt import Prompt, load_system_prompt, prompts_of
from kardia_jax.dialogue.spans import Spans
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.decoding import Storage
from kardia_jax.model.sharding import make_mesh
from kardia_jax.observe.files import write_whole
from kardia_jax.observe.intervals import (
    Interval,
    bootstrap_interval,
    bootstrap_macro_f1,
    macro_f1,
    t_interval,
)
from kardia_jax.observe.jsonl import plain
from kardia_jax.policies import Policy, check_positions, placed_policy, sampler_of
from kardia_jax.programs import compute_for, make_generate, sampling_compute
from kardia_jax.rewards.rubric import Rubric
from kardia_jax.rollout.engine import Sampler, sample
from kardia_jax.rollout.sampling import Controls
from kardia_jax.scoring import Graded, Grader, check_failures, grade, rollout_rows
from kardia_jax.types import Params

LOWEST_MARK = 1.0


@dataclass(frozen=True)
class Evaluation:
    """One value per answer, by metric; NaN where a verdict is missing."""

    clusters: tuple[str, ...]
    """The dialogue that each answer belongs to."""
    values: Mapping[str, tuple[float, ...]]
    gold: tuple[str, ...]
    predicted: tuple[str | None, ...]
    rows: tuple[Mapping[str, object], ...]
    """Every answer in full, as in rollouts.jsonl."""

    def means(self) -> dict[str, float]:
        """Mean of every metric, macro-F1 included; NaN where every verdict is missing."""
        by_name = {
            name: float(np.nanmean(numbers)) if np.isfinite(numbers).any() else float("nan")
            for name, numbers in self.values.items()
        }
        return by_name | {"macro_f1": macro_f1(self.gold, self.predicted, EMOTIONS)}

    def intervals(self, seed: int) -> dict[str, Interval]:
        """95 % intervals by bootstrap over dialogues."""
        by_name = {name: bootstrap_interval(numbers, self.clusters, seed) for name, numbers in self.values.items()}
        return by_name | {"macro_f1": bootstrap_macro_f1(self.gold, self.predicted, EMOTIONS, self.clusters, seed)}


def held_out_prompts(config: Config, policy: Policy) -> list[Prompt]:
    """The test prompts: every assistant turn, or the last of each dialogue."""
    loaded = load_dialogues(config.data, "test")
    system_prompt = load_system_prompt(config.data.system_prompt)
    asked = prompts_of(loaded.dialogues, policy.tokenizer, config.data, system_prompt)
    for problem in (*loaded.problems, *asked.problems):
        print(f"left out of the evaluation: {problem}")
    if config.eval.turns == "all":
        return list(asked.prompts)
    last = [prompt for prompt in asked.prompts if prompt.turn == len(prompt.dialogue.answers) - 1]
    if not last:
        fix = "Raise data.max_prompt_tokens, or set eval.turns to all."
        raise ConfigError("eval.turns", "a last turn within data.max_prompt_tokens", "none", fix)
    return last


def evaluate(config: Config, policy: Policy, grader: Grader) -> Evaluation:
    """Answers every test prompt and grades the answers; a draw depends on seed, prompt and sample alone."""
    check_positions(policy.spec, config.data.max_prompt_tokens, config.eval.sampler.max_new_tokens, "eval.sampler")
    prompts, settings = held_out_prompts(config, policy), config.eval
    mesh = make_mesh(config.mesh)
    policy = placed_policy(policy, mesh)
    storage = Storage(settings.sampler.kv_dtype, settings.sampler.weights_dtype)
    sampling = sampling_compute(policy.spec, compute_for(config.model, mesh), config.mesh)
    generate = make_generate(policy.spec, sampling, storage, settings.sampler.rows)
    sampler = sampler_of(policy, generate)
    params, texts_P_G = policy.full(), []
    for start in range(0, len(prompts), settings.batch):
        texts_P_G += _answers(sampler, params, prompts, start, settings, config.run.seed)
    graded = grade(grader, prompts, texts_P_G)
    check_failures(graded, config.judge)
    return _collect(prompts, texts_P_G, graded, grader.rubric)


def _answers(
    sampler: Sampler, params: Params, prompts: Sequence[Prompt], start: int, settings: EvalConfig, seed: int
) -> list[list[str]]:
    """One batch; the last one is filled up with its first prompt, so that every batch has the same shape."""
    ids = list(range(start, min(start + settings.batch, len(prompts))))
    filled = ids + ids[:1] * (settings.batch - len(ids))
    keys = row_keys(seed, Purpose.EVALUATION, 0, jnp.array(filled), settings.samples)
    controls = Controls.from_config(settings.sampler)
    rows = [prompts[i].tokens for i in filled]
    sampled = sample(sampler, params, rows, keys, controls, settings.sampler.max_new_tokens)
    return sampled.texts_P_G[: len(ids)]


def _collect(
    prompts: Sequence[Prompt], texts_P_G: Sequence[Sequence[str]], graded: Graded, rubric: Rubric
) -> Evaluation:
    scores = [score for row in graded.scores_P_G for score in row]
    parsed = [answer for row in graded.parsed_P_G for answer in row]
    repeated = [prompt for prompt, row in zip(prompts, texts_P_G, strict=True) for _ in row]

    def mark(index: int, criterion: str) -> float:
        score = scores[index]
        if score.marks is not None:
            return float(score.marks[criterion])
        return LOWEST_MARK if score.malformed is not None else float("nan")

    everyone = range(len(scores))
    values = {
        "format_rate": tuple(score.format for score in scores),
        "emotion_accuracy": tuple(score.emotion for score in scores),
        **{c.name: tuple(mark(i, c.name) for i in everyone) for c in rubric.criteria},
        "reward": tuple(graded.combined.rewards_P_G.ravel().tolist()),
        "judge_failures": tuple(float(not score.valid) for score in scores),
    }
    return Evaluation(
        clusters=tuple(prompt.dialogue.where for prompt in repeated),
        values=values,
        gold=tuple(prompt.dialogue.emotion for prompt in repeated),
        predicted=tuple(answer.emotion if isinstance(answer, Spans) else None for answer in parsed),
        rows=tuple(rollout_rows(prompts, texts_P_G, graded)),
    )


def summarise(evaluations: Sequence[Evaluation], seed: int) -> dict[str, Interval]:
    """Intervals of one policy: over answers for one seed, over seeds for several."""
    if len(evaluations) == 1:
        return evaluations[0].intervals(seed)
    by_seed = [evaluation.means() for evaluation in evaluations]
    return {name: t_interval([means[name] for means in by_seed]) for name in by_seed[0]}


def write_rows(evaluation: Evaluation, path: pathlib.Path) -> None:
    """Every answer with its scores, one JSON object per line; an unknown number is null."""
    lines = [json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in evaluation.rows]
    write_whole(path, "\n".join(lines) + "\n")
