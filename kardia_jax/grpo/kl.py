"""Estimators of the KL from the policy to the reference, one number per token.

In go log-probs of the sampled tokens [N, T] under both models, out comes nats per token [N, T]; the loss adds
beta times this. With d = ref - policy, the log-ratio of a token that the policy drew:

| name | value | derivative in the policy's log-prob | as a loss it descends |
|---|---|---|---|
| k1 | -d | 1 | nothing: 0 in expectation |
| k2 | d^2 / 2 | -d | KL(policy, reference) |
| k3 | exp(d) - d - 1 | 1 - exp(d) | KL(reference, policy) |
| k3+ | that of k3 | that of k2 | KL(policy, reference) |
| k3_unbiased, k3_unbiased_token | w k3, w the ratio | -d where w = 1 | KL(policy, reference) |

Example: policy -1.0, reference -0.5, so d = 0.5: k1 = -0.5, k2 = 0.125, k3 = 0.1487.

Choices where implementations disagree: nothing is clamped unless asked by name; under ``verl`` the clamp
applies to every estimator, where verl itself clamps its k3 only.

Source: Schulman, "Approximating KL divergence" (2020); the ratio-weighted form is DeepSeek-V3.2's.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PerToken = Float[Array, "N T"]
KlFn = Callable[[PerToken, PerToken, Float[Array, "N #T"]], PerToken]
"""(policy log-probs, reference log-probs, ratio w) -> nats per token."""


def k1(difference: PerToken) -> PerToken:
    """-d: unbiased, of high variance."""
    return -difference


def k2(difference: PerToken) -> PerToken:
    """d^2 / 2: biased, of low variance; its gradient is the unbiased one."""
    return 0.5 * difference**2


def k3(difference: PerToken) -> PerToken:
    """exp(d) - d - 1: unbiased, of low variance, never negative."""
    return jnp.expm1(difference) - difference


def k3_straight_through(difference: PerToken) -> PerToken:
    """The value of k3 with the gradient of k2."""
    surrogate = k2(difference)
    return surrogate + jax.lax.stop_gradient(k3(difference) - surrogate)


ESTIMATORS: dict[str, Callable[[PerToken], PerToken]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3+": k3_straight_through,
    "k3_unbiased": k3,
    "k3_unbiased_token": k3,
}
RATIO_WEIGHTED = frozenset({"k3_unbiased", "k3_unbiased_token"})

CLAMPS: dict[str, tuple[float, float]] = {
    "none": (math.inf, math.inf),
    "verl": (20.0, 10.0),
    "openrlhf": (math.inf, 10.0),
}
"""Largest absolute log-ratio, largest absolute estimate (nats)."""


def make_kl(name: str, clamp: str) -> KlFn:
    """The estimator ``name`` between the bounds ``clamp``; the ratio only matters to those weighted by it."""
    estimator = ESTIMATORS[name]
    widest, largest = CLAMPS[clamp]

    def kl(policy_logprobs: PerToken, ref_logprobs: PerToken, ratio: Float[Array, "N #T"]) -> PerToken:
        difference = jnp.clip(ref_logprobs - policy_logprobs, -widest, widest)
        estimate = jnp.clip(estimator(difference), -largest, largest)
        return ratio * estimate if name in RATIO_WEIGHTED else estimate

    return kl
