"""KL estimators: values by hand, derivatives, Schulman's Monte Carlo check and clamps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.grpo.kl import ESTIMATORS, k1, k2, k3, k3_straight_through, make_kl

FLOAT32 = 1e-6
EXACT = 1e-12
DIFFERENCES = np.linspace(-3, 3, 20).reshape(4, 5)


def _slopes(name: str, ratio_of_policy: bool = True) -> np.ndarray:
    """Derivatives of the estimates at DIFFERENCES in the policy's log-probs, on-policy."""
    with jax.enable_x64(True):
        estimate = make_kl(name, "none")

        def value(policy: jax.Array) -> jax.Array:
            ratio = jnp.exp(policy - jax.lax.stop_gradient(policy)) if ratio_of_policy else jnp.ones_like(policy)
            return estimate(policy, jnp.asarray(DIFFERENCES), ratio).sum()

        return np.asarray(jax.grad(value)(jnp.zeros((4, 5))))


def test_values_by_hand():
    d = jnp.array([[0.5]])
    assert float(k1(d)[0, 0]) == -0.5
    assert float(k2(d)[0, 0]) == 0.125
    assert float(k3(d)[0, 0]) == pytest.approx(0.1487213, abs=FLOAT32)
    assert float(k3_straight_through(d)[0, 0]) == pytest.approx(0.1487213, abs=FLOAT32)


SLOPES = {"k1": 1, "k2": -DIFFERENCES, "k3": 1 - np.exp(DIFFERENCES), "k3+": -DIFFERENCES}


@pytest.mark.parametrize("name", SLOPES)
def test_derivatives(name: str):
    np.testing.assert_allclose(_slopes(name), np.broadcast_to(SLOPES[name], (4, 5)), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["k3_unbiased", "k3_unbiased_token"])
def test_ratio_weighted_k3_on_policy_has_the_gradient_of_k2(name: str):
    np.testing.assert_allclose(_slopes(name), -DIFFERENCES, rtol=0, atol=EXACT)
    np.testing.assert_allclose(_slopes(name, ratio_of_policy=False), 1 - np.exp(DIFFERENCES), rtol=0, atol=EXACT)


def test_small_differences_keep_their_digits_in_float32():
    """exp(d) - d - 1 would round to 0 here; d^2 / 2 is 5e-9."""
    assert float(k3(jnp.float32(1e-4))) == pytest.approx(5e-9, rel=0.02)


# Bias and standard deviation of each estimator over the true KL, p = N(shift, 1), draws of q = N(0, 1).
SCHULMAN = {
    0.1: {"k1": (0, 20), "k2": (0.002, 1.42), "k3": (0, 1.42)},
    1.0: {"k1": (0, 2), "k2": (0.25, 1.73), "k3": (0, 1.7)},
}


@pytest.mark.parametrize("shift", SCHULMAN)
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_schulmans_check(shift: float, name: str):
    """Half a million draws: the error of the mean is spread / sqrt(500,000), four of which are allowed."""
    draws = np.random.default_rng(0).standard_normal(500_000)
    truth = shift**2 / 2
    difference = jnp.asarray(shift * draws - truth, jnp.float32)
    estimate = np.asarray(ESTIMATORS[name](difference), np.float64) / truth
    bias, spread = SCHULMAN[shift][name]
    error = 4 * spread / np.sqrt(len(draws))
    assert estimate.mean() - 1 == pytest.approx(bias, abs=error + 5e-4)
    assert estimate.std() == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize(("clamp", "expected"), [("none", np.exp(25.0) - 26), ("verl", 10.0), ("openrlhf", 10.0)])
def test_clamps_by_name(clamp: str, expected: float):
    far = make_kl("k3", clamp)(jnp.zeros((1, 1)), jnp.full((1, 1), 25.0), jnp.ones((1, 1)))
    assert float(far[0, 0]) == pytest.approx(expected, rel=1e-6)


def test_verl_bounds_the_difference_first():
    estimate = make_kl("k2", "verl")
    assert float(estimate(jnp.zeros((1, 1)), jnp.full((1, 1), 4.0), jnp.ones((1, 1)))[0, 0]) == 8
    assert float(estimate(jnp.zeros((1, 1)), jnp.full((1, 1), 40.0), jnp.ones((1, 1)))[0, 0]) == 10


@pytest.mark.parametrize("name", ESTIMATORS)
def test_clamped_tokens_have_no_gradient(name: str):
    estimate = make_kl(name, "openrlhf")
    ones = jnp.ones((1, 1))
    slope = jax.grad(lambda policy: estimate(policy, jnp.full((1, 1), 30.0), ones).sum())(jnp.zeros((1, 1)))
    assert float(slope[0, 0]) == 0
