"""The update: nothing that should not matter does, nothing that is not finite gets in, nothing large is made.

Tried on a small closed-form policy, for which programs compile at once; the real model has its own file.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import LossConfig, OptimizerConfig
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import (
    apply_gradient,
    completion_mask,
    grpo_objective,
    init_state,
    make_update,
    sft_objective,
    split,
)
from kardia_jax.observe.measures import to_host, values
from kardia_jax.types import GroupBatch

FLOAT32 = 1e-6
"""The same float32 sums in another order, parameters and metrics of size 1."""

P, G, S, T, V = 4, 2, 8, 6, 13
LENGTHS = np.array([[6, 3], [1, 5], [4, 4], [2, 6]])
PROMPT_LENGTHS = np.array([[8, 8], [3, 5], [1, 1], [6, 2]])
ADVANTAGES = np.array([[1.2, -0.7], [0.4, -1.5], [0.9, -0.2], [-1.1, 0.6]])
SGD = optax.sgd(1.0)
"""New parameters are old ones minus the gradient: Adam would hide its size."""


def small_batch(seed: int = 0) -> GroupBatch:
    """Every optional field is there; log-probs are near those of a flat policy, so that some ratios are clipped."""
    rng = np.random.default_rng(seed)
    old, ref, sampler = rng.normal(-np.log(V), 0.3, (3, P, G, T)).astype(np.float32)
    return GroupBatch(
        prompt_tokens=jnp.asarray(rng.integers(0, V, (P, S))),
        prompt_lengths=jnp.asarray(PROMPT_LENGTHS),
        completion_tokens=jnp.asarray(rng.integers(0, V, (P, G, T))),
        completion_lengths=jnp.asarray(LENGTHS),
        advantages=jnp.asarray(ADVANTAGES, jnp.float32),
        loss_rows=jnp.asarray([[True, True], [True, True], [True, False], [True, True]]),
        old_logprobs=jnp.asarray(old),
        ref_logprobs=jnp.asarray(ref),
        sampler_logprobs=jnp.asarray(sampler),
        entropy_floor=jnp.float32(2.3),
    )


def small_params(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(0, 0.5, (V, 5)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(0, 0.5, (5, V)), jnp.float32),
    }


def small_logits(params, batch: GroupBatch) -> jax.Array:
    """[P, G, T, V]: a completion token follows from the one before it and from the mean of the prompt."""
    lengths = batch.prompt_lengths
    inside = jnp.arange(batch.prompt_tokens.shape[1]) < lengths[..., None]
    mean = jnp.einsum("PGS,PSD->PGD", inside / lengths[..., None], params["embedding"][batch.prompt_tokens])
    last = jnp.take_along_axis(batch.prompt_tokens, lengths - 1, 1)
    previous = jnp.concatenate([last[..., None], batch.completion_tokens[..., :-1]], -1)
    return jnp.tanh(mean[:, :, None] + params["embedding"][previous]) @ params["kernel"]


def small_forward(params, batch: GroupBatch, place) -> tuple[jax.Array, jax.Array]:
    logp = jax.nn.log_softmax(small_logits(params, batch), -1)
    logprobs = jnp.take_along_axis(logp, batch.completion_tokens[..., None], -1)[..., 0]
    return logprobs, -(jnp.exp(logp) * logp).sum(-1)


def objective_of(name: str):
    if name == "sft":
        return sft_objective
    bounds = {"clip_low": 0.2, "clip_high": 0.2}
    return grpo_objective(make_loss(LossConfig(name=name, beta=0.1, correction="token_tis", **bounds), T))


@functools.cache
def small_update(name: str, parts: int = 1, optimizer: optax.GradientTransformation = SGD):
    return jax.jit(make_update(small_forward, objective_of(name), optimizer, parts))


def learn(name: str, batch: GroupBatch, parts: int = 1):
    """New parameters and divided metrics."""
    state, metrics = small_update(name, parts)(init_state(small_params(), SGD), batch)
    return state.params, values(to_host(metrics))


def assert_same(one, other, tolerance: float = FLOAT32) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance), one, other)


def equal_bits(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---- what does not matter ----


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "sft"])
def test_the_split_into_micro_batches_changes_nothing(name):
    whole = learn(name, small_batch())
    assert (
        max(
            float(jnp.abs(new - old).max())
            for new, old in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(small_params()), strict=True)
        )
        > 1e-3
    )
    for parts in (2, 4):
        assert_same(learn(name, small_batch(), parts), whole)


def prompts_of(batch: GroupBatch, half: int) -> GroupBatch:
    """Two of the four prompts."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else x[2 * half : 2 * half + 2], batch)


def test_bnpo_is_the_mean_over_micro_batches_of_their_own_means():
    batch = small_batch()
    # On its own half a token mean divides by the half's own count.
    (first, one), (second, two) = (learn("dapo", prompts_of(batch, half)) for half in range(2))
    params, metrics = learn("bnpo", batch, 2)
    assert_same(params, jax.tree.map(lambda a, b: (a + b) / 2, first, second))
    assert metrics["loss"] == pytest.approx((one["loss"] + two["loss"]) / 2, abs=FLOAT32)
    assert abs(metrics["loss"] - learn("dapo", batch)[1]["loss"]) > 1e-3


@settings(deadline=None, max_examples=20)
@given(prompts=st.permutations(range(P)), swap=st.booleans(), name=st.sampled_from(["grpo", "sft"]))
def test_the_order_of_rows_changes_nothing(prompts, swap, name):
    samples = [1, 0] if swap else [0, 1]

    def moved(x):
        return x if x.ndim == 0 else x[jnp.array(prompts)]

    batch = jax.tree.map(moved, small_batch())
    batch = jax.tree.map(lambda x: x[:, jnp.array(samples)] if x.ndim and x.shape[1] == G else x, batch)
    assert_same(learn(name, batch, 2), learn(name, small_batch(), 2))


def padded(batch: GroupBatch, prompt: int, completion: int, filler: int) -> GroupBatch:
    """Longer arrays with ``filler`` for tokens and NaN for numbers wherever no token stands."""
    inside = np.arange(batch.prompt_tokens.shape[1]) < batch.prompt_lengths.max(1)[:, None]
    tokens = jnp.where(inside, batch.prompt_tokens, filler)
    batch = batch._replace(prompt_tokens=jnp.pad(tokens, ((0, 0), (0, prompt)), constant_values=filler))
    behind = np.arange(T + completion) >= batch.completion_lengths[..., None]
    longer = {
        name: jnp.where(behind, empty, jnp.pad(getattr(batch, name), ((0, 0), (0, 0), (0, completion))))
        for name, empty in (
            ("completion_tokens", filler),
            ("old_logprobs", jnp.nan),
            ("ref_logprobs", jnp.nan),
            ("sampler_logprobs", jnp.nan),
        )
    }
    return batch._replace(**longer)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "sft"])
def test_what_stands_in_padding_changes_nothing(name):
    assert_same(learn(name, padded(small_batch(), 0, 0, filler=7)), learn(name, small_batch()))


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_more_padding_changes_nothing(name):
    assert_same(learn(name, padded(small_batch(), 3, 2, filler=7)), learn(name, small_batch()))


@pytest.mark.parametrize("name", ["grpo", "dapo", "sft"])
def test_rows_outside_the_loss_have_no_influence(name):
    batch, row = small_batch(), (2, 1)
    assert not batch.loss_rows[row]
    changed = batch._replace(
        completion_tokens=batch.completion_tokens.at[row].add(1) % V,
        completion_lengths=batch.completion_lengths.at[row].set(6),
        prompt_lengths=batch.prompt_lengths.at[row].set(5),
        advantages=batch.advantages.at[row].set(jnp.nan),
        old_logprobs=batch.old_logprobs.at[row].set(jnp.inf),
        ref_logprobs=batch.ref_logprobs.at[row].set(-jnp.inf),
        sampler_logprobs=batch.sampler_logprobs.at[row].set(jnp.nan),
    )
    equal_bits(learn(name, changed), learn(name, batch))


def test_a_prompt_without_loss_rows_might_as_well_be_absent_in_a_token_mean():
    batch = small_batch()
    muted = batch._replace(loss_rows=batch.loss_rows.at[2:].set(False))
    assert_same(learn("dapo", muted), learn("dapo", prompts_of(batch, 0)))


def test_a_batch_without_a_loss_row_changes_no_parameter():
    batch = small_batch()
    nothing = batch._replace(loss_rows=jnp.zeros((P, G), bool))
    for name in ("grpo", "dapo", "sft"):
        params, metrics = learn(name, nothing)
        equal_bits(params, small_params())
        assert metrics["skipped"] == 1


def test_without_evidence_neither_decay_nor_momentum_moves_a_parameter():
    # A gradient of exactly 0 would: AdamW decays the kernels and goes on by the moments of the step before.
    adamw = optax.adamw(0.1, weight_decay=0.5)
    update = small_update("grpo", 2, adamw)
    before, _ = update(init_state(small_params(), adamw), small_batch())
    nothing = small_batch()._replace(loss_rows=jnp.zeros((P, G), bool))
    after, metrics = update(before, nothing)
    equal_bits((after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(after.step), int(after.bad_steps)) == (2, 0)
    assert (float(metrics["skipped"].sum), float(metrics["update_norm"].sum)) == (1, 0)
    moved, _ = adamw.update(jax.tree.map(jnp.zeros_like, before.params), before.opt_state, before.params)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(moved))


def test_a_step_without_evidence_neither_adds_to_the_bad_ones_nor_forgives_them():
    update, nothing = small_update("grpo", 2, ADAM), small_batch()._replace(loss_rows=jnp.zeros((P, G), bool))
    state, _ = update(init_state(small_params(), ADAM), spoilt("nan advantage")[1])
    state, _ = update(state, nothing)
    assert int(state.bad_steps) == 1


def test_two_devices_learn_what_one_does():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        spec = jax.sharding.PartitionSpec(*(["data"] if x.ndim else []))
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    spread = jax.tree.map(place, small_batch())
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(init_state(small_params(), SGD), everywhere)
    state, metrics = small_update("grpo", 2)(state, spread)
    assert_same((state.params, values(to_host(metrics))), learn("grpo", small_batch(), 2))


# ---- objectives ----


def test_completion_mask_by_hand():
    batch = small_batch()._replace(
        completion_tokens=jnp.zeros((1, 3, 4), int),
        completion_lengths=jnp.array([[2, 4, 0]]),
        loss_rows=jnp.array([[True, False, True]]),
    )
    assert completion_mask(batch).astype(int).tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]


def test_split_cuts_the_prompt_axis_and_repeats_scalars():
    pieces = split(small_batch(), 2)
    assert pieces.prompt_tokens.shape == (2, 2, S)
    assert pieces.old_logprobs.shape == (2, 2, G, T)
    np.testing.assert_array_equal(pieces.advantages[1], ADVANTAGES[2:].astype(np.float32))
    np.testing.assert_array_equal(pieces.entropy_floor, np.float32([2.3, 2.3]))


def test_sft_is_the_mean_cross_entropy_of_the_kept_tokens():
    batch, mask = small_batch(), np.asarray(completion_mask(small_batch()))

    def plain(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(small_logits(params, batch), batch.completion_tokens)
        return jnp.where(mask, losses, 0).sum() / mask.sum()

    loss, gradient = jax.jit(jax.value_and_grad(plain))(small_params())
    params, metrics = learn("sft", batch, 2)
    assert metrics["loss"] == pytest.approx(float(loss), abs=FLOAT32)
    assert_same(params, jax.tree.map(jnp.subtract, small_params(), gradient))
    assert mask.sum() == LENGTHS.sum() - 4


def test_first_on_policy_minibatch_has_ratio_one_and_clips_nothing():
    batch = small_batch()._replace(old_logprobs=None, sampler_logprobs=None)
    _, metrics = small_update("grpo", 2)(init_state(small_params(), SGD), batch)
    assert metrics["ratio"].sum == metrics["ratio"].weight == LENGTHS.sum() - 4
    assert [float(metrics[name].sum) for name in ("clip_low", "clip_high", "clip_region")] == [0, 0, 0]
    off_policy = learn("grpo", small_batch())[1]
    assert off_policy["ratio"] != 1
    assert off_policy["clip_region"] > 0


# ---- gradients that are not finite ----

ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_share=0.0), 10)


def spoilt(kind: str) -> tuple[Any, GroupBatch]:
    """Parameters and a batch of which one number is not finite."""
    params, batch = small_params(), small_batch()
    if kind == "a parameter":
        return params | {"kernel": params["kernel"].at[0, 0].set(jnp.nan)}, batch
    number = {"nan advantage": jnp.nan, "infinite advantage": jnp.inf}[kind]
    return params, batch._replace(advantages=batch.advantages.at[3, 0].set(number))


@pytest.mark.parametrize("kind", ["nan advantage", "infinite advantage", "a parameter"])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(kind):
    params, bad = spoilt(kind)
    update = small_update("grpo", 2, ADAM)
    state = init_state(params, ADAM)
    if kind != "a parameter":
        state, _ = update(state, small_batch())
    for count in (1, 2):
        after, metrics = update(state, bad)
        equal_bits((after.params, after.opt_state), (state.params, state.opt_state))
        assert (int(after.bad_steps), int(after.step)) == (count, int(state.step) + 1)
        assert (float(metrics["skipped"].sum), float(metrics["update_norm"].sum)) == (1, 0)
        state = after


def test_a_good_step_after_bad_ones_counts_from_zero_and_learns_as_if_they_had_not_been():
    update, start = small_update("grpo", 2, ADAM), init_state(small_params(), ADAM)
    state = start
    for _ in range(3):
        state, _ = update(state, spoilt("nan advantage")[1])
    state, metrics = update(state, small_batch())
    straight, _ = update(start, small_batch())
    equal_bits((state.params, state.opt_state), (straight.params, straight.opt_state))
    assert (int(state.bad_steps), int(state.step), float(metrics["skipped"].sum)) == (0, 4, 0)


def test_apply_gradient_by_hand():
    state = init_state({"kernel": jnp.array([1.0, 2.0])}, optax.sgd(0.5))
    after, norms = apply_gradient(
        state, {"kernel": jnp.array([3.0, -4.0])}, jnp.bool_(True), jnp.bool_(True), optax.sgd(0.5)
    )
    assert after.params["kernel"].tolist() == [-0.5, 4.0]
    assert {name: float(mean.sum) for name, mean in norms.items()} == {
        "grad_norm": 5.0,
        "update_norm": 2.5,
        "skipped": 0.0,
    }
    for gradient, loss_finite in (([3.0, -4.0], False), ([3.0, jnp.inf], True), ([jnp.nan, 0.0], True)):
        kept, _ = apply_gradient(
            state, {"kernel": jnp.array(gradient)}, jnp.bool_(loss_finite), jnp.bool_(True), optax.sgd(0.5)
        )
        assert kept.params["kernel"].tolist() == [1.0, 2.0]
        assert int(kept.bad_steps) == 1
