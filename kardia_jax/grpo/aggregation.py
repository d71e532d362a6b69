"""How token losses become one number: an undivided ``Mean``, which micro-batches and devices add up.

In go token losses and the mask of kept tokens, both [N, T]; out comes (sum, weight), the weight made of the
mask alone.

Example: losses [[1, 3], [5, 0]], of which the last is masked (lengths 2 and 1): sequence_mean is (2 + 5) / 2,
token_mean (1 + 3 + 5) / 3, fixed_length at most 4 tokens (1 + 3 + 5) / (2 x 4), sequence_sum (4 + 5) / 2.

Choices where implementations disagree: a row without a kept token counts in N (``count``, TRL), or not
(``skip``, verl and OpenRLHF). ``micro_batch_mean`` (bnpo) is divided at once and counted as 1, so by
definition it depends on the split into micro-batches; no other does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.types import Mean

PerToken = Float[Array, "N #T"]
Mask = Bool[Array, "N T"]
Rows = Int[Array, ""]
Aggregate = Callable[[PerToken, Mask, Rows, int], Mean]
"""(token losses, mask, rows that count, longest completion in tokens) -> undivided loss."""


def masked_sum(values: PerToken, mask: Mask, axis: int | None = None) -> Array:
    """Sum of the kept entries; what is masked may be anything, NaN included."""
    return jnp.where(mask, values, 0).sum(axis)


def sequence_lengths(mask: Mask) -> Int[Array, " N"]:
    """Kept tokens of every row, at least 1 so that it can divide."""
    return jnp.maximum(mask.sum(-1), 1)


def mean_over(values: PerToken, mask: Mask) -> Mean:
    """Detached mean over the kept tokens, for metrics."""
    total = masked_sum(jax.lax.stop_gradient(values), mask)
    return Mean(total, mask.sum().astype(total.dtype))


def counted_rows(mask: Mask, empty_rows: str) -> Rows:
    """N: all rows (``count``), or those with a kept token (``skip``)."""
    return {"count": jnp.asarray(len(mask)), "skip": mask.any(-1).sum()}[empty_rows]


def sequence_mean(losses: PerToken, mask: Mask, rows: Rows, longest: int) -> Mean:
    """(1/N) sum_i (1/L_i) sum_t m l. Source: DeepSeekMath, arXiv 2402.03300."""
    del longest
    return Mean((masked_sum(losses, mask, -1) / sequence_lengths(mask)).sum(), rows.astype(losses.dtype))


def token_mean(losses: PerToken, mask: Mask, rows: Rows, longest: int) -> Mean:
    """sum m l / M, M the kept tokens of the whole batch. Source: DAPO, arXiv 2503.14476."""
    del rows, longest
    return Mean(masked_sum(losses, mask), mask.sum().astype(losses.dtype))


def micro_batch_mean(losses: PerToken, mask: Mask, rows: Rows, longest: int) -> Mean:
    """sum m l / sum m of this micro-batch, with weight 1. Source: TRL, loss type bnpo."""
    del rows, longest
    return Mean(masked_sum(losses, mask) / jnp.maximum(mask.sum(), 1), jnp.ones((), losses.dtype))


def fixed_length(losses: PerToken, mask: Mask, rows: Rows, longest: int) -> Mean:
    """sum m l / (N longest): short completions do not weigh more. Source: Dr. GRPO, arXiv 2503.20783."""
    return Mean(masked_sum(losses, mask), (rows * longest).astype(losses.dtype))


def sequence_sum(losses: PerToken, mask: Mask, rows: Rows, longest: int) -> Mean:
    """(1/N) sum_i sum_t m l. Source: LUSPO; verl's seq-mean-token-sum."""
    del longest
    return Mean(masked_sum(losses, mask), rows.astype(losses.dtype))


AGGREGATES: dict[str, Aggregate] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "micro_batch_mean": micro_batch_mean,
    "fixed_length": fixed_length,
    "sequence_sum": sequence_sum,
}
