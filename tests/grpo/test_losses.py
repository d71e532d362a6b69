"""Losses: identities of on-policy gradients, clipping, masks that nothing leaks through, micro-batches."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import ConfigError, LossConfig
from kardia_jax.grpo.aggregation import AGGREGATES, counted_rows
from kardia_jax.grpo.losses import PRESETS, LossInputs, entropy_floor, make_loss

EXACT = 1e-12
LONGEST = 8
LENGTHS = np.array([5, 3, 1, 4])
MASK = np.arange(5) < LENGTHS[:, None]
ADVANTAGES = np.array([0.5625, -0.4375, 0.0625, -0.1875])


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _random(seed: int, mask: np.ndarray = MASK) -> LossInputs:
    """Log-probs that differ everywhere, with an entropy mask."""
    rng = np.random.default_rng(seed)
    policy, old, ref, sampler = rng.normal(-1.5, 0.3, (4, *mask.shape))
    entropy = jnp.asarray(rng.uniform(0, 2, mask.shape))
    advantages = jnp.asarray(rng.standard_normal(len(mask)))
    arrays = (jnp.asarray(x) for x in (old, ref, sampler))
    return LossInputs(jnp.asarray(policy), advantages, jnp.asarray(mask), *arrays, entropy, jnp.asarray(0.5))


def _on_policy() -> LossInputs:
    policy = jnp.asarray(np.random.default_rng(0).normal(-1.5, 0.3, MASK.shape))
    return LossInputs(policy, jnp.asarray(ADVANTAGES), jnp.asarray(MASK))


def _value(config: LossConfig, inputs: LossInputs) -> float:
    mean, _ = make_loss(config, LONGEST)(inputs)
    return float(mean.sum / mean.weight)


def _evaluate(config: LossConfig, inputs: LossInputs) -> tuple[float, np.ndarray]:
    """The divided loss and its gradient in the policy's log-probs."""
    loss = make_loss(config, LONGEST)

    def value(policy: jax.Array) -> jax.Array:
        mean, _ = loss(inputs._replace(policy_logprobs=policy))
        return mean.sum / mean.weight

    value_, gradient = jax.value_and_grad(value)(inputs.policy_logprobs)
    return float(value_), np.asarray(gradient)


def _gradient(config: LossConfig, inputs: LossInputs) -> np.ndarray:
    return _evaluate(config, inputs)[1]


# ---- on-policy ----

TOKENS = LENGTHS.sum()
WEIGHTS = {
    "grpo": 1 / (4 * LENGTHS),
    "gspo": 1 / (4 * LENGTHS),
    "sapo": 1 / (4 * LENGTHS),
    "luspo": np.full(4, 1 / 4),
    "dr_grpo": np.full(4, 1 / (4 * LONGEST)),
} | {name: np.full(4, 1 / TOKENS) for name in ("bnpo", "dapo", "cispo", "vespo")}


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_gradient_is_minus_advantage_times_weight(name: str):
    expected = -(ADVANTAGES * WEIGHTS[name])[:, None] * MASK
    np.testing.assert_allclose(_gradient(LossConfig(name=name), _on_policy()), expected, atol=EXACT)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_sequence_means_of_centred_groups_are_zero_on_policy(name: str):
    assert _value(LossConfig(name=name), _on_policy()) == pytest.approx(0, abs=EXACT)


def test_token_means_are_not_zero_on_policy():
    expected = -(LENGTHS * ADVANTAGES).sum() / TOKENS
    assert abs(expected) > 0.05
    assert _value(LossConfig(name="dapo"), _on_policy()) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_ratio_is_exactly_one_and_nothing_is_clipped(name: str):
    _, metrics = make_loss(LossConfig(name=name), LONGEST)(_on_policy())
    assert metrics["ratio"].sum == metrics["ratio"].weight == TOKENS
    assert metrics["clip_region"].sum == 0


def test_deepseekmath_gradient_coefficient():
    """On-policy with k3: -(A + beta (exp(d) - 1)) / (G L)."""
    inputs = _on_policy()._replace(ref_logprobs=_random(1).ref_logprobs)
    difference = np.asarray(inputs.ref_logprobs - inputs.policy_logprobs)
    coefficient = ADVANTAGES[:, None] + 0.3 * (np.exp(difference) - 1)
    expected = -coefficient / (4 * LENGTHS[:, None]) * MASK
    np.testing.assert_allclose(_gradient(LossConfig(beta=0.3, kl="k3"), inputs), expected, atol=EXACT)


@pytest.mark.parametrize("name", PRESETS)
def test_token_weighted_kl_on_policy_pulls_by_the_difference_at_every_level(name: str):
    config = LossConfig(name=name, beta=1.0, kl="k3_unbiased_token")
    inputs = _on_policy()._replace(ref_logprobs=_random(1).ref_logprobs, advantages=jnp.zeros(4))
    difference = np.asarray(inputs.ref_logprobs - inputs.policy_logprobs)
    expected = -difference * WEIGHTS[name][:, None] * MASK
    np.testing.assert_allclose(_gradient(config, inputs), expected, atol=EXACT)


# ---- clipping: one token, A = +1 and -1 ----


def _one_token(ratio: float, advantage: float, **fields) -> tuple[float, float]:
    """(loss, derivative in the log-prob) of the first token when it is the only one kept."""
    mask = jnp.asarray(MASK & (np.arange(20).reshape(4, 5) == 0))
    policy = jnp.full(MASK.shape, -1.0)
    inputs = LossInputs(policy, jnp.full(4, float(advantage)), mask, policy - np.log(ratio))
    value, gradient = _evaluate(LossConfig(**fields, empty_rows="skip"), inputs)
    return value, float(gradient[0, 0])


CLIPPED = {
    "inside": (1.1, 1, {}, (-1.1, -1.1)),
    "above, A > 0": (1.3, 1, {}, (-1.2, 0)),
    "below, A > 0": (0.7, 1, {}, (-0.7, -0.7)),
    "below, A < 0": (0.7, -1, {}, (0.8, 0)),
    "above, A < 0": (1.3, -1, {}, (1.3, 1.3)),
    "delta": (9.0, -1, {"delta": 4.0}, (4, 0)),
    "dual clip": (9.0, -1, {"dual_clip": 3.0}, (3, 0)),
    "dapo's higher bound": (1.25, 1, {"name": "dapo"}, (-1.25, -1.25)),
    "gspo's narrow range": (1.0005, 1, {"name": "gspo"}, (-1.0004, 0)),
    "cispo keeps a capped token": (9.0, 1, {"name": "cispo"}, (5, -5)),
    "cispo band keeps it too": (9.0, 1, {"name": "cispo", "cispo_clip": "band"}, (1.2, -1.2)),
    "cispo band, below": (0.1, -1, {"name": "cispo", "cispo_clip": "band"}, (-0.8, 0.8)),
    "cispo cap, below": (0.1, -1, {"name": "cispo"}, (-0.1, 0.1)),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_one_token_by_hand(name: str):
    ratio, advantage, fields, expected = CLIPPED[name]
    assert _one_token(ratio, advantage, **fields) == pytest.approx(expected, abs=EXACT)


def test_gspo_token_has_the_value_of_gspo_and_gradients_of_its_own_tokens():
    inputs = _random(3)._replace(entropy_floor=None)
    wide = {"name": "gspo", "clip_low": 0.9, "clip_high": 9.0, "beta": 0.0}
    by_row, by_token = LossConfig(**wide), LossConfig(**wide, importance="sequence_token")
    assert _value(by_row, inputs) == pytest.approx(_value(by_token, inputs), abs=EXACT)
    np.testing.assert_allclose(_gradient(by_row, inputs), _gradient(by_token, inputs), atol=EXACT)


def test_a_product_that_overflows_silences_vespo_and_is_finite():
    inputs = _on_policy()._replace(old_logprobs=jnp.full(MASK.shape, -60.0))
    assert (_gradient(LossConfig(name="vespo"), inputs) == 0).all()


def test_order_of_weight_and_kl():
    """Weight 0 (sampler far off) leaves the KL in one order and nothing in the other."""
    inputs = _on_policy()._replace(ref_logprobs=_random(1).ref_logprobs, sampler_logprobs=jnp.full(MASK.shape, -9.0))
    fields = {"correction": "token_mis", "beta": 0.1}
    assert _value(LossConfig(**fields), inputs) > 0
    assert _value(LossConfig(**fields, kl_order="kl_then_weight"), inputs) == 0


# ---- averages ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequence_mean", (7, 2)),
        ("token_mean", (9, 3)),
        ("micro_batch_mean", (3, 1)),
        ("fixed_length", (9, 8)),
        ("sequence_sum", (9, 2)),
    ],
)
def test_averages_by_hand(name: str, expected: tuple[float, float]):
    losses, mask = jnp.array([[1.0, 3.0], [5.0, jnp.nan]]), jnp.array([[True, True], [True, False]])
    mean = AGGREGATES[name](losses, mask, counted_rows(mask, "count"), 4)
    assert (float(mean.sum), float(mean.weight)) == expected


def test_empty_rows_count_or_not_by_name():
    mask = jnp.array([[True, False], [False, False]])
    assert counted_rows(mask, "count") == 2
    assert counted_rows(mask, "skip") == 1


SPLITTABLE = [name for name in PRESETS if name != "bnpo"]


@settings(deadline=None, max_examples=10)
@given(
    name=st.sampled_from(SPLITTABLE),
    seed=st.integers(0, 99),
    order=st.permutations(range(4)),
    empty=st.booleans(),
)
def test_micro_batches_add_up(name: str, seed: int, order: list[int], empty: bool):
    """Two halves of the rows, in any order, add up to the whole; also with a row without tokens."""
    mask = MASK & (np.arange(4) != 1)[:, None] if empty else MASK
    inputs = _random(seed, mask)
    loss = make_loss(LossConfig(name=name, empty_rows="skip" if seed % 2 else "count"), LONGEST)
    whole = loss(inputs)
    halves = [np.array(order[:2]), np.array(order[2:])]
    parts = [loss(jax.tree.map(lambda x, h=half: x[h] if x.ndim else x, inputs)) for half in halves]
    added = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=EXACT), added, whole)


@pytest.mark.parametrize("name", PRESETS)
def test_float32_stays_float32(name: str):
    as_float32 = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32 if x.dtype == jnp.float64 else x.dtype),
        _random(0),
    )
    made = jax.eval_shape(make_loss(LossConfig(name=name, correction="token_tis"), LONGEST), as_float32)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


# ---- masks ----


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_leaks_from_masked_positions(name: str):
    """Row 1 is masked throughout; every masked entry, and its advantage, is NaN or infinite."""
    mask = MASK & (np.arange(4) != 1)[:, None]
    inputs = _random(2, mask)
    junk = np.resize([np.nan, np.inf, -np.inf], mask.shape)
    spoil = jnp.asarray(np.where(mask, 0, junk))
    arrays = {
        field: values + spoil
        for field, values in inputs._asdict().items()
        if field.endswith("logprobs") or field == "entropy"
    }
    spoiled = inputs._replace(**arrays, advantages=inputs.advantages.at[1].set(jnp.nan))
    config = LossConfig(name=name, correction="token_tis", off_policy_threshold=0.1)
    (clean_value, clean), (value, gradient) = _evaluate(config, inputs), _evaluate(config, spoiled)
    assert value == clean_value
    np.testing.assert_array_equal(gradient, clean)
    assert (gradient[~mask] == 0).all()


def test_a_batch_without_tokens_is_finite():
    inputs = _random(2, np.zeros_like(MASK))
    mean, _ = make_loss(LossConfig(), LONGEST)(inputs)
    assert float(mean.sum) == 0
    assert (_gradient(LossConfig(), inputs) == 0).all()
    assert entropy_floor(inputs.entropy, inputs.mask, 0.5) == -jnp.inf


def test_entropy_floor_is_the_quantile_of_kept_tokens():
    entropy, mask = jnp.array([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]), jnp.array([[True, True, False]] * 2)
    assert float(entropy_floor(entropy, mask, 0.5)) == pytest.approx(2.5)
    assert float(entropy_floor(entropy, mask, 0.25)) == pytest.approx(3.25)
    assert float(entropy_floor(entropy, mask, 1.0)) == pytest.approx(1.0)


def test_masked_shares_and_silent_tokens():
    inputs = _on_policy()._replace(
        entropy=jnp.tile(jnp.arange(5.0), (4, 1)),
        entropy_floor=jnp.asarray(3.0),
        old_logprobs=_on_policy().policy_logprobs + 0.3,
    )
    config = LossConfig(off_policy_threshold=0.1)
    _, metrics = make_loss(config, LONGEST)(inputs)
    # High entropy: tokens 3 and 4 of row 0, token 3 of row 3. Rows 1 and 3 have A < 0 and have drifted.
    assert float(metrics["entropy_masked"].sum) == 13 - 3
    assert float(metrics["off_policy_masked"].sum) == 3 + 4
    silent = _gradient(config, inputs) == 0
    assert silent[1:].all()
    assert silent[0].tolist() == [True, True, True, False, False]


def test_a_floor_without_entropies_is_refused():
    with pytest.raises(ValueError, match="entropy_floor"):
        _value(LossConfig(), _on_policy()._replace(entropy_floor=jnp.asarray(1.0)))


def test_gradients_flow_through_the_policy_only():
    inputs = _random(4)
    loss = make_loss(LossConfig(correction="token_tis"), LONGEST)

    def value(old: jax.Array, ref: jax.Array, sampler: jax.Array, advantages: jax.Array) -> jax.Array:
        changed = inputs._replace(old_logprobs=old, ref_logprobs=ref, sampler_logprobs=sampler, advantages=advantages)
        return loss(changed)[0].sum

    slopes = jax.grad(value, argnums=(0, 1, 2, 3))(
        inputs.old_logprobs, inputs.ref_logprobs, inputs.sampler_logprobs, inputs.advantages
    )
    assert all((slope == 0).all() for slope in slopes)


# ---- config ----

IMPOSSIBLE = {
    "sequence-level cispo": ({"name": "cispo", "importance": "sequence"}, "importance"),
    "sequence-level sapo": ({"name": "sapo", "importance": "sequence"}, "importance"),
    "levels of vespo": ({"name": "vespo", "importance": "token"}, "importance"),
    "token-level gspo": ({"name": "gspo", "importance": "token"}, "importance"),
    "dual clip with cispo": ({"name": "cispo", "dual_clip": 3.0}, "dual_clip"),
    "delta with vespo": ({"name": "vespo", "delta": 3.0}, "delta"),
    "delta within the on-policy ratio": ({"delta": 1.0}, "delta"),
    "clip with sapo": ({"name": "sapo", "clip_high": 0.2}, "clip_high"),
    "clip of 0": ({"clip_low": 0.0}, "clip_low"),
    "clip below ratio 0": ({"clip_low": 1.5}, "clip_low"),
    "cispo cap below 1": ({"name": "cispo", "clip_high": 0.28}, "clip_high"),
    "cispo cap with a lower bound": ({"name": "cispo", "clip_low": 0.2}, "clip_low"),
    "cispo's clip for another loss": ({"cispo_clip": "band"}, "cispo_clip"),
    "negative beta": ({"beta": -0.1}, "beta"),
    "no token left": ({"top_entropy": 0.0}, "top_entropy"),
    "share above 1": ({"top_entropy": 1.1}, "top_entropy"),
    "negative buffer": ({"overlong_buffer": -1}, "overlong_buffer"),
    "negative threshold": ({"off_policy_threshold": -1.0}, "off_policy_threshold"),
    "temperature of 0": ({"sapo_temperatures": (1.0, 0.0)}, "sapo_temperatures"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_config_refuses_and_names_the_field(name: str):
    fields, field = IMPOSSIBLE[name]
    with pytest.raises(ConfigError, match=rf"grpo\.loss\.{field}: wanted .*, got "):
        LossConfig(**fields)


def test_every_preset_works_by_its_name_alone():
    bounds = {name: LossConfig(name=name).ratio_bounds for name in PRESETS}
    assert bounds["grpo"] == pytest.approx((0.8, 1.2))
    assert bounds["dapo"] == pytest.approx((0.8, 1.28))
    assert bounds["gspo"] == pytest.approx((0.9997, 1.0004))
    assert bounds["cispo"] == (0, 5)
