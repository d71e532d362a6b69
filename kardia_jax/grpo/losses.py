"""Policy-gradient losses: a policy term, a level for the ratio and an average, put together by name.

In go log-probs, advantages and a mask over rows and tokens (``LossInputs``); out come the loss as an
undivided ``Mean`` and detached metrics. The functions know no model, no optimizer and no mesh. A preset is a
row of ``PRESETS``; to try another policy term, write a function like ``clipped_surrogate`` and add a row.

>>> loss = make_loss(LossConfig(name="dapo", beta=0.0), max_completion_tokens=512)
>>> mean, metrics = loss(LossInputs(policy_logprobs, advantages, mask))
>>> mean.sum / mean.weight

Worked example (grpo, bounds 0.8 and 1.2, one row of two tokens, A = 1): ratios 1.1 and 1.5 give token losses
-1.1 and -1.2 (clipped, no gradient) and the loss -1.15.

Masked positions may hold anything, NaN and infinity included: they reach neither the value nor the gradient.

Choices where implementations disagree:
- The ratio is not clamped before the exponential (TRL); verl clamps its log to +-20.
- ``k3_unbiased`` multiplies by the ratio of the loss's own level (TRL). At sequence level its gradient
  on-policy is then not the token's -d; ``k3_unbiased_token`` has that property at every level. VESPO uses the
  token's ratio in both.
- The off-policy and entropy masks silence the policy term; the KL stays, and so do the counts that divide.
- Metrics are token means at every level; TRL averages sequence-level ratios over rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kardia_jax.config import LossConfig
from kardia_jax.grpo.aggregation import AGGREGATES, counted_rows, mean_over
from kardia_jax.grpo.correction import (
    correction_weight,
    geometric_log_ratio,
    mismatch,
    off_policy_keep,
    sequence_log_ratio,
)
from kardia_jax.grpo.kl import make_kl
from kardia_jax.types import Mean

PerToken = Float[Array, "N T"]
Mask = Bool[Array, "N T"]
Ratio = Float[Array, "N #T"]
PerRow = Float[Array, "N 1"]


class LossInputs(NamedTuple):
    """Everything that a loss looks at: N = P * G rows of T completion tokens, log-probs in nats."""

    policy_logprobs: Float[Array, "N T"]
    """The only field that gradients flow through."""
    advantages: Float[Array, " N"]
    mask: Bool[Array, "N T"]
    """Completion tokens that are kept, the stop token included."""
    old_logprobs: Float[Array, "N T"] | None = None
    """By the learner at the sampling weights; None is on-policy: the ratio is exactly 1."""
    ref_logprobs: Float[Array, "N T"] | None = None
    """By the reference; None is no KL term."""
    sampler_logprobs: Float[Array, "N T"] | None = None
    """As recorded when the tokens were drawn; None is no correction and no mismatch metrics."""
    entropy: Float[Array, "N T"] | None = None
    """Of the policy's distribution at each position, nats."""
    entropy_floor: Float[Array, ""] | None = None
    """Tokens of less entropy leave the policy term; None keeps all."""


LossFn = Callable[[LossInputs], tuple[Mean, dict[str, Mean]]]
PolicyTerm = Callable[[PerToken, Ratio, PerRow], Ratio]
"""(log-probs, log of the ratio, advantages) -> loss per token, or per row where everything is."""


# ---- policy terms ----


def clipped_surrogate(ratio: Ratio, advantages: PerRow, lower: float, upper: float) -> Ratio:
    """l = -min(w A, clip(w, lower, upper) A). Source: PPO, arXiv 1707.06347, equation 7."""
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, lower, upper) * advantages)


def two_sided_surrogate(ratio: Ratio, advantages: PerRow, lower: float, upper: float, delta: float) -> Ratio:
    """l = -min(min(w, delta) A, clip(w, lower, upper) A). Source: INTELLECT-2, arXiv 2505.07291."""
    bounded = jnp.minimum(ratio, delta) * advantages
    return -jnp.minimum(bounded, jnp.clip(ratio, lower, upper) * advantages)


def dual_clip(losses: Ratio, advantages: PerRow, most: float) -> Ratio:
    """min(l, -most A) where A < 0, else l. Source: dual-clip PPO, arXiv 1912.09729."""
    return jnp.where(advantages < 0, jnp.minimum(losses, -most * advantages), losses)


def cispo_term(logprobs: PerToken, ratio: Ratio, advantages: PerRow, lower: float, upper: float) -> PerToken:
    """l = -sg[clip(w, lower, upper)] A log pi: clipped tokens keep a gradient. Source: arXiv 2506.13585."""
    weight = jax.lax.stop_gradient(jnp.clip(ratio, lower, upper))
    return -weight * advantages * logprobs


def sapo_term(ratio: Ratio, advantages: PerRow, temperatures: tuple[float, float]) -> Ratio:
    """l = -(4 / tau) sigmoid(tau (w - 1)) A, tau by the sign of A: a soft gate. Source: arXiv 2511.20347."""
    positive, other = temperatures
    temperature = jnp.where(advantages > 0, positive, other).astype(ratio.dtype)
    return -4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1)) * advantages


def vespo_term(
    logprobs: PerToken,
    log_weight: PerRow,
    advantages: PerRow,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> PerToken:
    """l = -sg[phi(W)] A log pi with phi(W) = exp(lambda) W^k exp(-lambda W), (k, lambda) by the sign of A.

    phi(1) = 1. Computed from log W, so that W may overflow: phi is then 0. Source: TRL, loss type vespo.
    """
    log_weight = jax.lax.stop_gradient(log_weight)
    power = jnp.where(advantages >= 0, positive[0], negative[0]).astype(log_weight.dtype)
    rate = jnp.where(advantages >= 0, positive[1], negative[1]).astype(log_weight.dtype)
    phi = jnp.exp(rate + power * log_weight - rate * jnp.exp(log_weight))
    return -phi * advantages * logprobs


def _clipped(config: LossConfig) -> PolicyTerm:
    lower, upper = config.ratio_bounds

    def term(logprobs: PerToken, log_ratio: Ratio, advantages: PerRow) -> Ratio:
        del logprobs
        ratio = jnp.exp(log_ratio)
        if config.delta is None:
            losses = clipped_surrogate(ratio, advantages, lower, upper)
        else:
            losses = two_sided_surrogate(ratio, advantages, lower, upper, config.delta)
        return losses if config.dual_clip is None else dual_clip(losses, advantages, config.dual_clip)

    return term


def _cispo(config: LossConfig) -> PolicyTerm:
    lower, upper = config.ratio_bounds
    return lambda logprobs, log_ratio, advantages: cispo_term(logprobs, jnp.exp(log_ratio), advantages, lower, upper)


def _sapo(config: LossConfig) -> PolicyTerm:
    return lambda _, log_ratio, advantages: sapo_term(jnp.exp(log_ratio), advantages, config.sapo_temperatures)


def _vespo(config: LossConfig) -> PolicyTerm:
    return lambda logprobs, log_ratio, advantages: vespo_term(
        logprobs, log_ratio, advantages, config.vespo_positive, config.vespo_negative
    )


# ---- levels of the ratio ----


class Importance(NamedTuple):
    """What the policy term weighs by."""

    log_ratio: Ratio
    """log w, per token or one per row."""
    weight: Ratio
    """What is left of the correction weight to multiply the policy term with."""


def token_level(log_ratio: PerToken, weight: Ratio, mask: Mask) -> Importance:
    """w_t = pi / old of the token."""
    del mask
    return Importance(log_ratio, weight)


def sequence_level(log_ratio: PerToken, weight: Ratio, mask: Mask) -> Importance:
    """s = exp(mean_t log(pi / old)), one per row. Source: GSPO, arXiv 2507.18071."""
    return Importance(geometric_log_ratio(log_ratio, mask), weight)


def sequence_token_level(log_ratio: PerToken, weight: Ratio, mask: Mask) -> Importance:
    """s_t = sg[s] pi / sg[pi]: value of the row, gradient of the token. Source: arXiv 2507.18071."""
    row = jax.lax.stop_gradient(geometric_log_ratio(log_ratio, mask))
    return Importance(row + log_ratio - jax.lax.stop_gradient(log_ratio), weight)


def product_level(log_ratio: PerToken, weight: Ratio, mask: Mask) -> Importance:
    """W = prod_t (pi / old) x weight, one per row; it takes the correction in and leaves weight 1.

    A token of weight 0 silences its row: log W = -inf, phi = 0. Only for terms that detach W. Source: TRL.
    """
    log_weight = jax.lax.stop_gradient(sequence_log_ratio(log_ratio + jnp.log(weight), mask))
    return Importance(log_weight, jnp.ones_like(log_weight))


LEVELS: dict[str, Callable[[PerToken, Ratio, Mask], Importance]] = {
    "token": token_level,
    "sequence": sequence_level,
    "sequence_token": sequence_token_level,
    "product": product_level,
}


# ---- presets ----


class Preset(NamedTuple):
    """A published loss."""

    term: Callable[[LossConfig], PolicyTerm]
    level: str
    aggregation: str


PRESETS: dict[str, Preset] = {
    "grpo": Preset(_clipped, "token", "sequence_mean"),
    "bnpo": Preset(_clipped, "token", "micro_batch_mean"),
    "dapo": Preset(_clipped, "token", "token_mean"),
    "dr_grpo": Preset(_clipped, "token", "fixed_length"),
    "gspo": Preset(_clipped, "sequence", "sequence_mean"),
    "luspo": Preset(_clipped, "sequence", "sequence_sum"),
    "cispo": Preset(_cispo, "token", "token_mean"),
    "sapo": Preset(_sapo, "token", "sequence_mean"),
    "vespo": Preset(_vespo, "product", "token_mean"),
}


def weight_then_kl(policy: Ratio, kl: Ratio, weight: Ratio) -> Ratio:
    """weight x policy term + beta KL. Source: TRL."""
    return weight * policy + kl


def kl_then_weight(policy: Ratio, kl: Ratio, weight: Ratio) -> Ratio:
    """weight x (policy term + beta KL). Source: ms-swift."""
    return weight * (policy + kl)


ORDERS: dict[str, Callable[[Ratio, Ratio, Ratio], Ratio]] = {
    "weight_then_kl": weight_then_kl,
    "kl_then_weight": kl_then_weight,
}


def entropy_floor(entropy: PerToken, mask: Mask, keep: float) -> Float[Array, ""]:
    """The (1 - keep) quantile of the entropies of all kept tokens (nats, interpolated); -inf without a token.

    Pass the whole batch, not a micro-batch. Source: arXiv 2506.01939.
    """
    floor = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1 - keep)
    return jnp.where(mask.any(), floor, -jnp.inf)


def make_loss(config: LossConfig, max_completion_tokens: int) -> LossFn:
    """The loss that a config describes; ``max_completion_tokens`` is the divisor of ``fixed_length``."""
    preset = PRESETS[config.name]
    term = preset.term(config)
    level = preset.level if config.importance == "auto" else config.importance
    token_kl = level == "product" or config.kl == "k3_unbiased_token"
    kl_level = LEVELS["token" if token_kl else level]
    aggregate = AGGREGATES[preset.aggregation if config.aggregation == "auto" else config.aggregation]
    kl_estimate = make_kl(config.kl, config.kl_clamp)
    combine = ORDERS[config.kl_order]

    def loss(inputs: LossInputs) -> tuple[Mean, dict[str, Mean]]:
        rows = _without_masked(inputs)
        policy, mask, advantages = rows.policy_logprobs, rows.mask, rows.advantages[:, None]
        old = jax.lax.stop_gradient(policy) if rows.old_logprobs is None else rows.old_logprobs
        log_ratio = policy - old
        weight = correction_weight(old, rows.sampler_logprobs, mask, config)
        importance = LEVELS[level](log_ratio, weight, mask)
        keeps = _policy_keeps(rows, old, config)
        losses = term(policy, importance.log_ratio, advantages)
        for keep in keeps.values():
            losses = jnp.where(keep, losses, 0)
        metrics = _policy_metrics(rows, importance.log_ratio, keeps, config)
        penalty = jnp.zeros_like(policy)
        if rows.ref_logprobs is not None:
            kl_ratio = jnp.exp(kl_level(log_ratio, weight, mask).log_ratio)
            kl = kl_estimate(policy, rows.ref_logprobs, kl_ratio)
            metrics["kl"] = mean_over(kl, mask)
            penalty = config.beta * kl if config.beta > 0 else penalty
        if rows.sampler_logprobs is not None:
            metrics |= _correction_metrics(weight, old, rows.sampler_logprobs, mask)
        total = combine(losses, penalty, importance.weight)
        return aggregate(total, mask, counted_rows(mask, config.empty_rows), max_completion_tokens), metrics

    return loss


# ---- parts ----


def _without_masked(inputs: LossInputs) -> LossInputs:
    """The same inputs with 0 wherever the mask is False, and gradients through the policy's log-probs only.

    Cleaning before any arithmetic is what keeps 0 x inf and NaN out of values and gradients.
    """
    mask = inputs.mask

    def kept(values: PerToken | None) -> PerToken | None:
        return None if values is None else jax.lax.stop_gradient(jnp.where(mask, values, 0))

    return LossInputs(
        policy_logprobs=jnp.where(mask, inputs.policy_logprobs, 0),
        advantages=jax.lax.stop_gradient(inputs.advantages),
        mask=mask,
        old_logprobs=kept(inputs.old_logprobs),
        ref_logprobs=kept(inputs.ref_logprobs),
        sampler_logprobs=kept(inputs.sampler_logprobs),
        entropy=kept(inputs.entropy),
        entropy_floor=inputs.entropy_floor,
    )


def _policy_keeps(rows: LossInputs, old: PerToken, config: LossConfig) -> dict[str, Bool[Array, "N #T"]]:
    """Masks of what feels the policy term: rows near enough to the sampler, tokens of high entropy."""
    keeps = {}
    if config.off_policy_threshold is not None:
        behaviour = old if rows.sampler_logprobs is None else rows.sampler_logprobs
        keeps["off_policy_masked"] = off_policy_keep(
            rows.policy_logprobs, behaviour, rows.advantages, rows.mask, config.off_policy_threshold
        )
    if rows.entropy_floor is not None:
        if rows.entropy is None:
            raise ValueError("entropy_floor: wanted entropies beside it, got none. Pass LossInputs.entropy too.")
        keeps["entropy_masked"] = rows.entropy >= rows.entropy_floor
    return keeps


def _policy_metrics(
    rows: LossInputs, log_ratio: Ratio, keeps: dict[str, Bool[Array, "N #T"]], config: LossConfig
) -> dict[str, Mean]:
    """Ratio, shares of tokens clipped (by the sign of A, where the bound acts) and masked, entropy."""
    lower, upper = config.ratio_bounds
    ratio, advantages = jnp.exp(log_ratio), rows.advantages[:, None]
    low = (ratio < lower) & (advantages < 0)
    high = (ratio > upper) & (advantages > 0)
    shares = {"clip_low": low, "clip_high": high, "clip_region": low | high}
    shares |= {name: ~keep for name, keep in keeps.items()}
    means = {"ratio": ratio} | {name: share.astype(ratio.dtype) for name, share in shares.items()}
    if rows.entropy is not None:
        means["entropy"] = rows.entropy
    return {name: mean_over(values, rows.mask) for name, values in means.items()}


def _correction_metrics(weight: Ratio, old: PerToken, sampler: PerToken, mask: Mask) -> dict[str, Mean]:
    """Mean weight, share of tokens that it drops, and how far sampler and learner disagree."""
    dropped = (weight == 0).astype(old.dtype)
    means = {"correction_weight": weight, "correction_masked": dropped}
    return {name: mean_over(values, mask) for name, values in means.items()} | mismatch(old, sampler, mask)
