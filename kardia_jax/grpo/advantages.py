"""From rewards to advantages, group by group.

In go rewards and a mask of verdicts that arrived, both [P, G]; out comes one advantage per completion, [P,
G]. A missing verdict is unknown, not zero: it leaves the group's mean and spread, and its completion gets
exactly 0.

Example (scale none): rewards [1, 0, 0.5, 0.25] have the mean 0.4375 and the advantages [0.5625, -0.4375,
0.0625, -0.1875]; with the second verdict missing, the mean is 0.5833 and the advantages [0.4167, 0, -0.0833,
-0.3333].

Choices where implementations disagree:
- A group teaches nothing, and gets exactly 0, when it has fewer than two verdicts (verl keeps the raw score
  of a group of one), when all its rewards are *equal* (the float32 std of seven times 0.1 is 8e-9, not 0), or
  when they spread by less than ``min_spread``.
- Standard deviations are over n - 1, and epsilon is added to them (TRL, ms-swift 1e-4; verl 1e-6; the paper
  none).
- ``batch`` divides by the std of the raw rewards (TRL); ``reinforce_pp`` by that of the centred ones.
- With ``gdpo`` equality and ``min_spread`` are judged per term, and the combined reward is not looked at.
- ``maxrl`` needs rewards of 0 and more: where a group's mean is not above 0 its advantages are 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.config import AdvantageConfig, ConfigError
from kardia_jax.types import Mean

Grouped = Float[Array, "P G"]
Axis = int | None


class Scores(NamedTuple):
    """What the rules below look at; rewards and terms are 0 where not valid."""

    rewards: Float[Array, "P G"]
    valid: Bool[Array, "P G"]
    terms: Float[Array, "P G K"] | None
    term_weights: Float[Array, " K"] | None
    lengths: Int[Array, "P G"] | None


class GroupDiagnostics(NamedTuple):
    """What the groups of one step look like; add over steps, divide at the end."""

    dead: Mean
    """Share of the groups with two verdicts or more whose rewards are all equal."""
    silent: Mean
    """Share of all groups that get advantage 0 throughout, for whatever reason."""
    missing: Mean
    """Share of the completions without a verdict."""
    spread: Mean
    """Largest minus smallest reward, over groups with a verdict."""
    std: Mean
    """Standard deviation of the rewards (n - 1), over groups with two verdicts or more."""
    term_spread: tuple[Mean, ...]
    """Largest minus smallest value of each reward term, over groups with a verdict."""


# ---- masked statistics ----


def _mean(values: Array, valid: Array, axis: Axis) -> Array:
    count = jnp.maximum(valid.sum(axis, keepdims=True), 1)
    return jnp.where(valid, values, 0).sum(axis, keepdims=True) / count


def _centred(values: Array, valid: Array, axis: Axis) -> Array:
    return jnp.where(valid, values - _mean(values, valid, axis), 0)


def _std(values: Array, valid: Array, axis: Axis) -> Array:
    spare = jnp.maximum(valid.sum(axis, keepdims=True) - 1, 1)
    return jnp.sqrt((_centred(values, valid, axis) ** 2).sum(axis, keepdims=True) / spare)


def group_spread(values: Grouped, valid: Bool[Array, "P G"]) -> Float[Array, "P 1"]:
    """Largest minus smallest valid value of a group; 0 without one."""
    top = jnp.where(valid, values, -jnp.inf).max(-1, keepdims=True)
    bottom = jnp.where(valid, values, jnp.inf).min(-1, keepdims=True)
    return jnp.where(valid.any(-1, keepdims=True), top - bottom, 0)


def teaches(values: Grouped, valid: Bool[Array, "P G"], min_spread: float) -> Bool[Array, "P 1"]:
    """Groups whose verdicts are not all equal (so two at least) and spread by ``min_spread`` or more."""
    spread = group_spread(values, valid)
    return (spread > 0) & (spread >= min_spread)


# ---- rules: (scores, config) -> advantages, not yet masked ----


def group_scaled(scores: Scores, config: AdvantageConfig) -> Grouped:
    """(r - mean) / (std + eps) within the group. Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2."""
    std = _std(scores.rewards, scores.valid, -1)
    return _centred(scores.rewards, scores.valid, -1) / (std + config.epsilon)


def batch_scaled(scores: Scores, config: AdvantageConfig) -> Grouped:
    """(r - group mean) / (std of all rewards in the batch + eps). Source: Lite-PPO, arXiv 2508.08221."""
    std = _std(scores.rewards, scores.valid, None)
    return _centred(scores.rewards, scores.valid, -1) / (std + config.epsilon)


def unscaled(scores: Scores, config: AdvantageConfig) -> Grouped:
    """r - mean. Source: Dr. GRPO, arXiv 2503.20783."""
    del config
    return _centred(scores.rewards, scores.valid, -1)


def leave_one_out(scores: Scores, config: AdvantageConfig) -> Grouped:
    """r minus the mean of the others = G / (G - 1) (r - mean), G verdicts. Source: RLOO, arXiv 2402.14740."""
    count = scores.valid.sum(-1, keepdims=True)
    return unscaled(scores, config) * count / jnp.maximum(count - 1, 1)


def reinforce_pp(scores: Scores, config: AdvantageConfig) -> Grouped:
    """c / (std of all c in the batch + eps), c = r - group mean. Source: REINFORCE++, arXiv 2501.03262."""
    centred = _centred(scores.rewards, scores.valid, -1)
    return centred / (_std(centred, scores.valid, None) + config.epsilon)


def mean_scaled(scores: Scores, config: AdvantageConfig) -> Grouped:
    """(r - mean) / mean, 0 where the mean is not above 0. Source: MaxRL."""
    mean = _mean(scores.rewards, scores.valid, -1)
    positive = mean > 0
    return jnp.where(positive, unscaled(scores, config) / jnp.where(positive, mean, 1), 0)


def length_baseline(scores: Scores, config: AdvantageConfig) -> Grouped:
    """r - sum L r / sum L, the baseline of least variance. Source: OPO, arXiv 2505.23585."""
    del config
    if scores.lengths is None:
        raise ConfigError("grpo.advantage.scale", "completion lengths with opo", None, "Pass lengths_P_G.")
    lengths = jnp.where(scores.valid, scores.lengths, 0)
    total = jnp.maximum(lengths.sum(-1, keepdims=True), 1)
    return scores.rewards - (lengths * scores.rewards).sum(-1, keepdims=True) / total


def per_term(scores: Scores, config: AdvantageConfig) -> Grouped:
    """s = sum_k w_k (r_k - mean_k) / (std_k + eps) in the group; A = (s - mean) / (std + eps) in the batch.

    A term that is equal, or nearly, throughout a group adds exactly 0. Source: GDPO.
    """
    terms, weights = _terms(scores)
    total = jnp.zeros_like(scores.rewards)
    for k in range(terms.shape[-1]):
        term = Scores(terms[..., k], scores.valid, None, None, None)
        alive = teaches(term.rewards, scores.valid, config.min_spread)
        total = total + weights[k] * jnp.where(alive, group_scaled(term, config), 0)
    return _centred(total, scores.valid, None) / (_std(total, scores.valid, None) + config.epsilon)


RULES: dict[str, Callable[[Scores, AdvantageConfig], Grouped]] = {
    "group": group_scaled,
    "batch": batch_scaled,
    "none": unscaled,
    "rloo": leave_one_out,
    "reinforce_pp": reinforce_pp,
    "gdpo": per_term,
    "maxrl": mean_scaled,
    "opo": length_baseline,
}


# ---- doors ----


def group_advantages(
    rewards_P_G: Float[Array, "P G"],
    valid_P_G: Bool[Array, "P G"],
    config: AdvantageConfig,
    terms_P_G_K: Float[Array, "P G K"] | None = None,
    term_weights_K: Float[Array, " K"] | None = None,
    lengths: Int[Array, "P G"] | None = None,
) -> Float[Array, "P G"]:
    """Advantages by the config's rule; exactly 0 for missing verdicts and for groups that teach nothing.

    ``gdpo`` needs the reward terms and their weights, ``opo`` the completion lengths (tokens): ConfigError
    without.
    """
    scores = _scores(rewards_P_G, valid_P_G, terms_P_G_K, term_weights_K, lengths)
    advantages = RULES[config.scale](scores, config)
    return jnp.where(scores.valid & _alive(scores, config), advantages, 0)


def group_diagnostics(
    rewards_P_G: Float[Array, "P G"],
    valid_P_G: Bool[Array, "P G"],
    config: AdvantageConfig,
    terms_P_G_K: Float[Array, "P G K"] | None = None,
    term_weights_K: Float[Array, " K"] | None = None,
) -> GroupDiagnostics:
    """Dead groups, missing verdicts and spreads, as undivided means; gdpo needs terms and weights."""
    scores = _scores(rewards_P_G, valid_P_G, terms_P_G_K, term_weights_K, None)
    rewards, valid = scores.rewards, scores.valid
    count = valid.sum(-1, keepdims=True)
    equal = group_spread(rewards, valid) == 0
    terms = [] if scores.terms is None else list(jnp.moveaxis(scores.terms, -1, 0))
    return GroupDiagnostics(
        dead=_mean_where(equal, count >= 2),
        silent=_mean_where(~_alive(scores, config), jnp.ones_like(count, bool)),
        missing=_mean_where(~valid, jnp.ones_like(valid)),
        spread=_mean_where(group_spread(rewards, valid), count >= 1),
        std=_mean_where(_std(rewards, valid, -1), count >= 2),
        term_spread=tuple(_mean_where(group_spread(term, valid), count >= 1) for term in terms),
    )


def soft_overlong_penalty(lengths: Int[Array, " *rows"], max_tokens: int, buffer: int) -> Float[Array, " *rows"]:
    """0 up to max_tokens - buffer, then linear down to -1 at max_tokens, and -1 beyond; all in tokens.

    A buffer of 0 is off; one longer than the budget is a ConfigError. Source: DAPO, arXiv 2503.14476, section
    3.4.
    """
    if not 0 <= buffer <= max_tokens:
        wanted = f"0 (off) to the token budget = {max_tokens}"
        raise ConfigError("grpo.loss.overlong_buffer", wanted, buffer, "Shorten it or raise the budget.")
    over = jnp.asarray(lengths) - (max_tokens - buffer)
    return -jnp.clip(over / max(buffer, 1), 0, 1) * (buffer > 0)


# ---- parts ----


def _scores(
    rewards: Grouped,
    valid: Bool[Array, "P G"],
    terms: Array | None,
    weights: Array | None,
    lengths: Array | None,
) -> Scores:
    """Missing entries become 0 before any arithmetic, so that a NaN in their place cannot spread."""
    valid = jnp.asarray(valid, bool)
    rewards = jnp.where(valid, jnp.asarray(rewards), 0)
    if terms is not None:
        terms = jnp.where(valid[..., None], jnp.asarray(terms), 0)
    weights = None if weights is None else jnp.asarray(weights)
    lengths = None if lengths is None else jnp.asarray(lengths)
    return Scores(rewards, valid, terms, weights, lengths)


def _terms(scores: Scores) -> tuple[Float[Array, "P G K"], Float[Array, " K"]]:
    if scores.terms is None or scores.term_weights is None:
        fix = "Pass terms_P_G_K and term_weights_K, or choose another scale."
        raise ConfigError("grpo.advantage.scale", "reward terms and their weights with gdpo", None, fix)
    return scores.terms, scores.term_weights


def _alive(scores: Scores, config: AdvantageConfig) -> Bool[Array, "P 1"]:
    """Groups that may get advantages: judged by the reward, and with gdpo by its terms (one is enough)."""
    if config.scale != "gdpo":
        return teaches(scores.rewards, scores.valid, config.min_spread)
    terms, weights = _terms(scores)
    by_term = [teaches(term, scores.valid, config.min_spread) for term in jnp.moveaxis(terms, -1, 0)]
    # A term of weight 0 moves nothing, however much it spreads.
    return (jnp.stack(by_term) & (weights != 0)[:, None, None]).any(0)


def _mean_where(values: Array, counted: Array) -> Mean:
    dtype = jnp.result_type(float)
    return Mean(jnp.where(counted, values, 0).sum().astype(dtype), counted.sum().astype(dtype))
