"""Weights for tokens to which sampler and learner give different probabilities, and measures of the gap.

In go the log-probs of the sampled tokens as the learner computed them at the sampling weights (``old``) and
as the sampler recorded them (``sampler``), both [N, T] and finite, and the mask of kept tokens; out comes a
weight for the policy term, [N, T] or [N, 1]. Nothing here carries a gradient.

Example: old -1.0 and sampler -1.1 on one token give the ratio exp(0.1) = 1.105; token TIS with cap 1.05
weighs the token by 1.05, token MIS drops it.

Choices where implementations disagree: ``sequence_*`` uses the product of the token ratios (TRL),
``geometric_*`` their geometric mean (ms-swift); bounds are inclusive; inside its band IcePop weighs by the
ratio, as its paper.

Source: truncated importance sampling, Yao et al., "Your efficient RL framework secretly brings you off-policy
RL training" (2025); IcePop, arXiv 2510.18855.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kardia_jax.config import LossConfig
from kardia_jax.grpo.aggregation import mean_over, sequence_lengths
from kardia_jax.types import Mean

PerToken = Float[Array, "N T"]
Mask = Bool[Array, "N T"]
Weight = Float[Array, "N #T"]


def token_log_ratio(log_ratio: PerToken, mask: Mask) -> Weight:
    """Every token by itself, [N, T]."""
    return jnp.where(mask, log_ratio, 0)


def sequence_log_ratio(log_ratio: PerToken, mask: Mask) -> Weight:
    """Sum over the kept tokens of a row, [N, 1]: the log of the product of ratios."""
    return jnp.where(mask, log_ratio, 0).sum(-1, keepdims=True)


def geometric_log_ratio(log_ratio: PerToken, mask: Mask) -> Weight:
    """Mean over the kept tokens of a row, [N, 1]: log of the geometric mean of ratios (nats per token)."""
    return sequence_log_ratio(log_ratio, mask) / sequence_lengths(mask)[:, None]


def truncate(ratio: Weight, floor: float, cap: float) -> Weight:
    """TIS: max(min(ratio, cap), floor)."""
    return jnp.clip(ratio, floor, cap)


def drop_outside(ratio: Weight, floor: float, cap: float) -> Weight:
    """MIS: the ratio where it lies in [floor, cap], else 0."""
    return jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0)


Level = Callable[[PerToken, Mask], Weight]
Bound = Callable[[Weight, float, float], Weight]
CORRECTIONS: dict[str, tuple[Level, Bound]] = {
    "token_tis": (token_log_ratio, truncate),
    "token_mis": (token_log_ratio, drop_outside),
    "sequence_tis": (sequence_log_ratio, truncate),
    "sequence_mis": (sequence_log_ratio, drop_outside),
    "geometric_tis": (geometric_log_ratio, truncate),
    "geometric_mis": (geometric_log_ratio, drop_outside),
    "icepop": (token_log_ratio, drop_outside),
}


def correction_weight(old: PerToken, sampler: PerToken | None, mask: Mask, config: LossConfig) -> Weight:
    """Weight of the policy term, exp(old - sampler) bounded; 1 without correction or sampler log-probs."""
    if sampler is None or config.correction == "none":
        return jnp.ones((old.shape[0], 1), old.dtype)
    level, bound = CORRECTIONS[config.correction]
    ratio = jnp.exp(level(old - sampler, mask))
    return jax.lax.stop_gradient(bound(ratio, config.correction_floor, config.correction_cap))


def off_policy_keep(
    policy: PerToken, behaviour: PerToken, advantages: Float[Array, " N"], mask: Mask, threshold: float
) -> Bool[Array, "N 1"]:
    """Rows that stay: all but those with A < 0 whose mean of behaviour - policy exceeds the threshold (nats).

    Source: DeepSeek-V3.2, "off-policy sequence masking".
    """
    drift = geometric_log_ratio(behaviour - policy, mask)
    return (advantages[:, None] >= 0) | (jax.lax.stop_gradient(drift) <= threshold)


def mismatch(old: PerToken, sampler: PerToken, mask: Mask) -> dict[str, Mean]:
    """How far sampler and learner disagree, as token means; ratio = exp(old - sampler).

    ``k1`` and ``k3`` estimate KL(sampler, learner) in nats per token. After the division, ``chi_squared`` and
    ``effective_sample_share`` follow from the means of ``ratio`` and ``ratio_squared``.
    """
    difference = old - sampler
    ratio = jnp.exp(difference)
    return {
        "mismatch_abs": mean_over(jnp.abs(difference), mask),
        "mismatch_exp_abs": mean_over(jnp.exp(jnp.abs(difference)), mask),
        "mismatch_ratio": mean_over(ratio, mask),
        "mismatch_ratio_squared": mean_over(ratio**2, mask),
        "mismatch_k1": mean_over(-difference, mask),
        "mismatch_k3": mean_over(jnp.expm1(difference) - difference, mask),
    }


def chi_squared(ratio_squared: float) -> float:
    """chi^2(learner, sampler) = E[ratio^2] - 1, from the mean squared ratio."""
    return ratio_squared - 1


def effective_sample_share(ratio: float, ratio_squared: float) -> float:
    """(E ratio)^2 / E[ratio^2] in (0, 1]: the share of the sample that is left, from the two means."""
    return ratio**2 / ratio_squared
