"""From sampled texts to scores: where rollouts meet rewards and judge.

In: prompts and G texts each, exactly as sampled. Out: ``Graded`` with scores per completion and rewards [P, G], and the
rows that go to rollouts.jsonl. A prompt that already holds the beginning of the answer (its prefill) is graded with it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kardia_jax.config import ConfigError, JudgeConfig, RewardConfig
from kardia_jax.dialogue.prompt import Prompt
from kardia_jax.dialogue.spans import Malformed, Spans, parse
from kardia_jax.judge.factory import Maker, make_judge
from kardia_jax.judge.failures import JudgeStopError, Tally, shortage, too_many
from kardia_jax.judge.protocol import Judge
from kardia_jax.judge.scoring import Completion, score_completions
from kardia_jax.local_judge import load_local_judge
from kardia_jax.rewards.combine import NO_VERDICT, Combined, Scores, combine
from kardia_jax.rewards.diagnostics import criterion_means, verdict_signs
from kardia_jax.rewards.rubric import Rubric
from kardia_jax.rewards.rubric.files import load_rubric


class Grader(NamedTuple):
    """Who marks, by which rubric, and how the terms are weighted."""

    judge: Judge
    rubric: Rubric
    weights: RewardConfig
    auditor: Judge | None = None
    """A second judge, which looks at a sample of what is trained on; see ``config.judge.AuditConfig``."""


MAKERS: dict[str, Maker] = {"local": load_local_judge}
"""Judges that need JAX, by ``judge.kind``: the room of judges knows the others itself."""


def make_grader(judge: JudgeConfig, weights: RewardConfig) -> Grader:
    """The grader that a config describes."""
    rubric = load_rubric(judge.rubric)
    return Grader(make_judge(judge, rubric, MAKERS), rubric, weights)


def with_auditor(grader: Grader, judge: JudgeConfig) -> Grader:
    """The grader with the second judge that the config asks for, if it does; only training has a use for it."""
    if not judge.audit.every:
        return grader
    try:
        return grader._replace(auditor=make_judge(judge.auditor, grader.rubric, MAKERS))
    except ConfigError as error:
        fix = f"Its own message, where judge stands for judge.audit: {error}"
        raise ConfigError("judge.audit", "a second judge that can be made", judge.audit.kind, fix) from error


class Graded(NamedTuple):
    """Scores of P x G completions."""

    parsed_P_G: list[list[Spans | Malformed]]
    scores_P_G: list[list[Scores]]
    combined: Combined

    @property
    def tally(self) -> Tally:
        """Verdicts asked for, and why some are missing; malformed completions are never sent to the judge."""
        scores = [scores for row in self.scores_P_G for scores in row]
        missing = (one.reasons.get("rubric", "").removeprefix(NO_VERDICT) for one in scores if not one.valid)
        return Tally(sum(one.malformed is None for one in scores), len(scores), tuple(missing))

    @property
    def failure_share(self) -> float:
        """Missing verdicts over verdicts asked for."""
        asked, _, reasons = self.tally
        return len(reasons) / asked if asked else 0.0


def read_answer(prompt: Prompt, text: str) -> Completion:
    """A sampled text as an answer at the prompt's turn; what the prompt has begun belongs to it."""
    return Completion(prompt.dialogue, prompt.turn, parse(prompt.prefill + text))


def grade(grader: Grader, prompts: Sequence[Prompt], texts_P_G: Sequence[Sequence[str]]) -> Graded:
    """Parses and scores every completion, with one call of the judge for all that it has to see."""
    rows_P_G = [[read_answer(prompt, text) for text in texts] for prompt, texts in zip(prompts, texts_P_G, strict=True)]
    rows = [row for group in rows_P_G for row in group]
    return collected(rows_P_G, score_completions(grader.judge, grader.rubric, grader.weights, rows), grader.weights)


def collected(rows_P_G: Sequence[Sequence[Completion]], scores: Sequence[Scores], weights: RewardConfig) -> Graded:
    """Scores in the order of the rows, as groups with their rewards."""
    group = len(rows_P_G[0])
    scores_P_G = [list(scores[start : start + group]) for start in range(0, len(scores), group)]
    parsed_P_G = [[row.parsed for row in rows] for rows in rows_P_G]
    return Graded(parsed_P_G, scores_P_G, combine(scores_P_G, weights))


def check_failures(graded: Graded, config: JudgeConfig) -> None:
    """Stops an evaluation whose judge fails too often; an unknown reward is never replaced by a number."""
    if too_many([graded.tally], config.max_failure_share):
        raise JudgeStopError(f"{shortage([graded.tally], config.max_failure_share)} Repair the judge and run it again.")


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
