"""Which adapters are trained, and what the frozen base is kept in.

    LoraConfig(rank=16, alpha=32, targets=("q_proj", "v_proj")).scale == 2.0

A rank of 0 means none: every parameter is trained.
"""

from dataclasses import dataclass
from typing import Literal

from kardia_jax.config.errors import require

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, as Hugging Face names them."""
ALL = "all-linear"
TABLES = ("embed_tokens", "lm_head")
"""Layers that PEFT can adapt and this package does not."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: W x + scale B A x with W frozen. Source: arXiv 2106.09685."""

    rank: int = 0
    """Rank r of every adapter; 0 trains all parameters instead."""
    alpha: float = 16.0
    """The adapter's output is multiplied by alpha / r (or alpha / sqrt(r), see scaling)."""
    targets: tuple[str, ...] = (ALL,)
    """Linear layers that get an adapter: all-linear, or any of q_proj k_proj v_proj o_proj gate_proj up_proj
    down_proj."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are zeroed in the gradient pass; never while sampling or scoring."""
    scaling: Literal["standard", "rslora"] = "standard"
    """alpha / r, or alpha / sqrt(r) as in rsLoRA (arXiv 2312.03732)."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Type that the frozen base is kept in; adapters are always float32 masters."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "model.lora.rank", "0 (no adapter) or more", self.rank)
        require(self.alpha > 0, "model.lora.alpha", "more than 0", self.alpha)
        require(0 <= self.dropout < 1, "model.lora.dropout", "a share in [0, 1)", self.dropout)
        check_targets(self.targets, "model.lora.targets")

    def check_used(self) -> None:
        """Refuses settings for an adapter that is not asked for: they would be passed over without a word."""
        default = (LoraConfig.alpha, LoraConfig.targets, LoraConfig.dropout, LoraConfig.scaling)
        unused = (self.alpha, self.targets, self.dropout, self.scaling) == default
        fix = "Set it, or leave the other fields of model.lora as they are."
        require(self.rank > 0 or unused, "model.lora.rank", "at least 1 with settings for an adapter", self.rank, fix)

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen layers in the order of a block, ``all-linear`` written out."""
        return tuple(name for name in LINEARS if name in self.targets or ALL in self.targets)

    @property
    def scale(self) -> float:
        """Factor on B A x; of no meaning where there is no adapter."""
        return self.alpha / max(self.rank, 1) ** (0.5 if self.scaling == "rslora" else 1.0)


def check_targets(targets: tuple[str, ...], where: str) -> None:
    """Refuses what is no linear layer of a block, tables of tokens by name."""
    names = ", ".join((ALL, *LINEARS))
    require(bool(targets), where, f"at least one of {names}", targets)
    for name in targets:
        fix = "Adapters on the embedding or the LM head are not supported." if name in TABLES else ""
        require(name in (ALL, *LINEARS), where, f"one of {names}", name, fix)


FULL = LoraConfig()
"""No adapter: everything is trained."""
