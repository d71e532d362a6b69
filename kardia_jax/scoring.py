"""From sampled texts to scores: where rollouts meet rewards and judge.

In: prompts and G texts each, exactly as sampled. Out: ``Graded`` with scores per completion and rewards [P, G], and the
rows that go to rollouts.jsonl. A prompt that already holds the beginning of the answer (its prefill) is graded with it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kardia_jax.config import JudgeConfig, RewardConfig
from kardia_jax.dialogue.prompt import Prompt
from kardia_jax.dialogue.spans import Malformed, Spans, parse
from kardia_jax.judge.factory import Maker, make_judge
from kardia_jax.judge.protocol import Judge
from kardia_jax.judge.scoring import Completion, score_completions
from kardia_jax.rewards.combine import Combined, Scores, combine
from kardia_jax.rewards.diagnostics import criterion_means, verdict_signs
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import Rubric


class Grader(NamedTuple):
    """Who marks, by which rubric, and how the terms are weighted."""

    judge: Judge
    rubric: Rubric
    weights: RewardConfig


MAKERS: dict[str, Maker] = {}
"""Judges that need JAX, by ``judge.kind``: the room of judges knows the others itself."""


def make_grader(judge: JudgeConfig, weights: RewardConfig) -> Grader:
    """The grader that a config describes."""
    return Grader(make_judge(judge, KARDIA_FIVE, MAKERS), KARDIA_FIVE, weights)


class Graded(NamedTuple):
    """Scores of P x G completions."""

    parsed_P_G: list[list[Spans | Malformed]]
    scores_P_G: list[list[Scores]]
    combined: Combined

    @property
    def failure_share(self) -> float:
        """Missing verdicts over verdicts asked for; malformed completions are never sent to the judge."""
        asked = sum(scores.malformed is None for row in self.scores_P_G for scores in row)
        return float((~self.combined.valid_P_G).sum() / asked) if asked else 0.0


class JudgeStopError(RuntimeError):
    """Too many verdicts are missing for the rewards to mean anything."""


def grade(grader: Grader, prompts: Sequence[Prompt], texts_P_G: Sequence[Sequence[str]]) -> Graded:
    """Parses and scores every completion, with one call of the judge for all that it has to see."""
    group = len(texts_P_G[0])
    parsed_P_G = [
        [parse(prompt.prefill + text) for text in texts] for prompt, texts in zip(prompts, texts_P_G, strict=True)
    ]
    asked = [
        Completion(prompt.dialogue, prompt.turn, parsed)
        for prompt, row in zip(prompts, parsed_P_G, strict=True)
        for parsed in row
    ]
    scores = score_completions(grader.judge, grader.rubric, grader.weights, asked)
    scores_P_G = [scores[start : start + group] for start in range(0, len(scores), group)]
    return Graded(parsed_P_G, scores_P_G, combine(scores_P_G, grader.weights))


def check_failures(graded: Graded, config: JudgeConfig) -> None:
    """Stops a run whose judge fails too often; an unknown reward is never replaced by a number."""
    share = graded.failure_share
    if share > config.max_failure_share:
        reasons = sorted({scores.reasons["rubric"] for row in graded.scores_P_G for scores in row if not scores.valid})
        raise JudgeStopError(
            f"judge.max_failure_share: {share:.0%} of this step's verdicts are missing, "
            f"allowed are {config.max_failure_share:.0%}. First reason: {reasons[0]}. Repair the judge and resume."
        )


def reward_metrics(graded: Graded) -> dict[str, float]:
    """Means of the reward, its terms and each criterion, and the shares of malformed and of unjudged completions.

    What needs a verdict is a mean over those that have one; format and emotion are read off the text of all.
    """
    combined, scores = graded.combined, [score for row in graded.scores_P_G for score in row]
    return {
        "reward": _mean(combined.rewards_P_G),
        "reward_std": float(np.nanstd(combined.rewards_P_G)) if combined.valid_P_G.any() else float("nan"),
        **{f"reward/{name}": _mean(combined.terms_P_G_K[..., k]) for k, name in enumerate(combined.term_names)},
        **criterion_means(scores),
        "malformed": float(np.mean([score.malformed is not None for score in scores])),
        "judge_failures": graded.failure_share,
        **verdict_signs(scores),
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def rollout_rows(
    prompts: Sequence[Prompt], texts_P_G: Sequence[Sequence[str]], graded: Graded
) -> Iterator[dict[str, object]]:
    """One readable row per completion: what was asked, what came, every score and the judge's reasons."""
    for p, prompt in enumerate(prompts):
        for g, text in enumerate(texts_P_G[p]):
            parsed, scores = graded.parsed_P_G[p][g], graded.scores_P_G[p][g]
            yield {
                "dialogue": prompt.dialogue.id,
                "turn": prompt.turn,
                "sample": g,
                "profile": prompt.dialogue.person,
                "situation": prompt.dialogue.situation,
                "dialogue_so_far": [dict(message) for message in prompt.messages[1:]],
                "rubric_items": [dataclasses.asdict(item) for item in prompt.dialogue.rubric_items],
                "emotion": prompt.dialogue.emotion,
                "completion": prompt.prefill + text,
                "spans": vars(parsed) if isinstance(parsed, Spans) else None,
                "malformed": f"{parsed.reason}: {parsed.detail}" if isinstance(parsed, Malformed) else None,
                "reward": float(graded.combined.rewards_P_G[p, g]),
                "format": scores.format,
                "emotion_right": scores.emotion,
                "rubric": scores.rubric,
                "marks": None if scores.marks is None else dict(scores.marks),
                "reasons": dict(scores.reasons),
                "spreads": dict(scores.spreads),
                "vetoes": dict(scores.vetoes),
                "flag": scores.flag,
                "valid": scores.valid,
            }
