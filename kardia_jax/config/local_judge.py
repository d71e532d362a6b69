"""The local judge's part of the config: which model reads the levels, and when it is not believed."""

from dataclasses import dataclass
from typing import Literal

from kardia_jax.config.errors import require


@dataclass(frozen=True)
class LocalJudgeConfig:
    """A model in this process whose next token is a mark; its expectation is read from the logits."""

    source: str = ""
    """A local Hugging Face directory, a GGUF file, or a built-in random shape; its tokenizer needs a chat template."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of its weights and arithmetic; auto is bfloat16 on accelerators and float32 on CPU."""
    max_tokens_per_batch: int = 16384
    """Most tokens of a forward pass, padding included. A prompt that is longer gets no verdict."""
    min_mass: float = 0.5
    """Least probability of the five levels among all next tokens; below it the model was about to say something else,
    and there is no verdict."""

    def __post_init__(self) -> None:
        name = "judge.local"
        require(
            self.max_tokens_per_batch >= 64, f"{name}.max_tokens_per_batch", "at least 64", self.max_tokens_per_batch
        )
        require(0 <= self.min_mass <= 1, f"{name}.min_mass", "a share in [0, 1]", self.min_mass)
