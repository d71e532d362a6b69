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
    """The run stops when more than this share of one step's verdicts is missing."""
    min_valid: int = 2
    """A group with fewer verdicts than this is left out of the update."""

    def __post_init__(self) -> None:
        share = self.max_failure_share
        require(0 <= share <= 1, "judge.max_failure_share", "a share in [0, 1]", share)
        require(self.min_valid >= 1, "judge.min_valid", "at least 1", self.min_valid)
