"""Weights against the mismatch of sampler and learner: by hand, their bounds, their diagnostics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import ConfigError, LossConfig
from kardia_jax.grpo.correction import (
    CORRECTIONS,
    chi_squared,
    correction_weight,
    effective_sample_share,
    mismatch,
    off_policy_keep,
)

FLOAT32 = 1e-6
OLD = jnp.log(jnp.array([[1.2, 0.9, 1.0], [0.5, 1.0, 7.0]]))
SAMPLER = jnp.zeros((2, 3))
MASK = jnp.array([[True, True, False], [True, True, False]])


def _weight(correction: str, cap: float = 1.1, floor: float = 0.6) -> np.ndarray:
    config = LossConfig(correction=correction, correction_cap=cap, correction_floor=floor)
    return np.asarray(correction_weight(OLD, SAMPLER, MASK, config))


BY_HAND = {
    "token_tis": [[1.1, 0.9], [0.6, 1]],
    "token_mis": [[0, 0.9], [0, 1]],
    "icepop": [[0, 0.9], [0, 1]],
    "sequence_tis": [[1.08], [0.6]],
    "sequence_mis": [[1.08], [0]],
    "geometric_tis": [[1.0392305], [0.7071068]],
    "geometric_mis": [[1.0392305], [0.7071068]],
}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_weights_by_hand(correction: str):
    expected = np.array(BY_HAND[correction])
    np.testing.assert_allclose(_weight(correction)[:, : expected.shape[1]], expected, atol=FLOAT32)


def test_bounds_are_inclusive():
    config = LossConfig(correction="token_mis", correction_cap=2.0, correction_floor=0.5)
    edges = jnp.log(jnp.array([[2.0, 0.5]]))
    kept = correction_weight(edges, jnp.zeros((1, 2)), jnp.ones((1, 2), bool), config)
    np.testing.assert_allclose(kept, [[2, 0.5]], atol=FLOAT32)


@pytest.mark.parametrize("correction", ["none", *CORRECTIONS])
def test_agreement_is_weight_one(correction: str):
    config = LossConfig(correction=correction, correction_floor=0.5)
    assert (correction_weight(OLD, OLD, MASK, config) == 1).all()
    assert (correction_weight(OLD, None, MASK, config) == 1).all()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_weights_carry_no_gradient(correction: str):
    config = LossConfig(correction=correction, correction_floor=0.5)
    slope = jax.grad(lambda old: correction_weight(old, SAMPLER, MASK, config).sum())(OLD)
    assert (slope == 0).all()


@settings(deadline=None, max_examples=20)
@given(gap=st.floats(-200, 200), correction=st.sampled_from(sorted(CORRECTIONS)))
def test_weights_stay_within_their_bounds_at_any_gap(gap: float, correction: str):
    """Products over a completion overflow float32 early; the weight may not."""
    config = LossConfig(correction=correction, correction_cap=2.0, correction_floor=0.5)
    weight = np.asarray(correction_weight(SAMPLER + gap, SAMPLER, MASK, config))
    dropped = correction.endswith("mis") or correction == "icepop"
    assert ((weight >= 0.5) & (weight <= 2) | (dropped & (weight == 0))).all()


def test_off_policy_rows_leave_only_with_a_negative_advantage():
    policy = jnp.array([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0], [-1.1, -1.1], [-2.0, -2.0]])
    mask = jnp.array([[True, True]] * 4 + [[False, False]])
    advantages = jnp.array([-1.0, 1.0, 0.0, -1.0, -1.0])
    keep = off_policy_keep(policy, jnp.full((5, 2), -1.0), advantages, mask, 0.5)
    assert keep[:, 0].tolist() == [False, True, True, True, True]


def test_mismatch_by_hand():
    old, sampler = jnp.log(jnp.array([[2.0, 0.5, 9.0]])), jnp.zeros((1, 3))
    found = mismatch(old, sampler, jnp.array([[True, True, False]]))
    means = {name: float(mean.sum / mean.weight) for name, mean in found.items()}
    assert means["mismatch_abs"] == pytest.approx(np.log(2), abs=FLOAT32)
    assert means["mismatch_exp_abs"] == pytest.approx(2, abs=FLOAT32)
    assert means["mismatch_ratio"] == pytest.approx(1.25, abs=FLOAT32)
    assert means["mismatch_ratio_squared"] == pytest.approx(2.125, abs=FLOAT32)
    assert means["mismatch_k1"] == pytest.approx(0, abs=FLOAT32)
    assert means["mismatch_k3"] == pytest.approx(0.25, abs=FLOAT32)
    assert chi_squared(2.125) == 1.125
    assert effective_sample_share(1.25, 2.125) == pytest.approx(0.7352941)


IMPOSSIBLE = {
    "cap below 1": ({"correction_cap": 0.9}, "correction_cap"),
    "floor above cap": ({"correction_floor": 3.5}, "correction_floor"),
    "negative floor": ({"correction_floor": -0.1}, "correction_floor"),
    "icepop without a band": ({"correction": "icepop"}, "correction_floor"),
    "vespo by sequence": ({"name": "vespo", "correction": "sequence_tis"}, "correction"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_config_refuses(name: str):
    fields, field = IMPOSSIBLE[name]
    with pytest.raises(ConfigError, match=rf"grpo\.loss\.{field}: wanted"):
        LossConfig(**fields)
