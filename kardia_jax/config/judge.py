"""The judge's part of the config: who marks, and what silence means."""

from dataclasses import dataclass
from typing import Literal

from kardia_jax.config.errors import require


@dataclass(frozen=True)
class JudgeConfig:
    """Who marks the rubric, and what its silence means."""

    kind: Literal["rules"] = "rules"
    """`rules`: the embedded, deterministic stand-in for an LLM judge."""
    max_failure_share: float = 0.5
    """The run saves its state and stops when more than this share of the verdicts in `failure_window` is missing, or
    all of a step that asked for more than this share of its completions."""
    failure_window: int = 10
    """Steps over which missing verdicts are counted; at the start of a run those that there are."""
    batch_deadline: float = 600.0
    """Seconds after the last completion of a step was handed in: a verdict that is not there by then is missing."""
    min_valid: int = 2
    """A group with fewer verdicts than this is left out of the update."""

    def __post_init__(self) -> None:
        share = self.max_failure_share
        require(0 <= share <= 1, "judge.max_failure_share", "a share in [0, 1]", share)
        require(self.failure_window >= 1, "judge.failure_window", "at least 1 step", self.failure_window)
        require(self.batch_deadline > 0, "judge.batch_deadline", "more than 0 seconds", self.batch_deadline)
        require(self.min_valid >= 1, "judge.min_valid", "at least 1", self.min_valid)
