"""Micro-batches by tokens: every group once, within the budget, nothing computed that a shorter bucket leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import LossConfig
from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.micro_batches import WORTH_A_CUT, micro_batches, plan
from kardia_jax.grpo.update import grpo_objective, init_state, make_update, sft_objective
from kardia_jax.observe.compilations import CompilationCounter
from kardia_jax.observe.measures import to_host, values
from kardia_jax.programs import update_by_tokens
from kardia_jax.types import GroupBatch

RELATIVE = 1e-6
"""The same float32 sums in another order, relative to the largest number of an array."""
P, G, S, T, V, D = 6, 2, 8, 12, 13, 5
SGD = optax.sgd(100.0)
"""A step so large that the gradient, not the parameters of size 1, fills the digits of float32."""


def batch_of(seed: int = 0, groups: int = P) -> GroupBatch:
    """Groups of very different lengths; one completion in six is outside the loss."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, S + 1, (groups, 1)).repeat(G, 1)
    completions = rng.integers(1, 1 + rng.integers(1, T + 1, (groups, 1)), (groups, G))
    old, ref, sampler = rng.normal(-np.log(V), 0.3, (3, groups, G, T)).astype(np.float32)
    return GroupBatch(
        prompt_tokens=jnp.asarray(rng.integers(0, V, (groups, S))),
        prompt_lengths=jnp.asarray(prompts),
        completion_tokens=jnp.asarray(rng.integers(0, V, (groups, G, T))),
        completion_lengths=jnp.asarray(completions),
        advantages=jnp.asarray(rng.normal(size=(groups, G)), jnp.float32),
        loss_rows=jnp.asarray(rng.random((groups, G)) < 5 / 6),
        old_logprobs=jnp.asarray(old),
        ref_logprobs=jnp.asarray(ref),
        sampler_logprobs=jnp.asarray(sampler),
        entropy_floor=jnp.float32(2.3),
    )


def params_of(seed: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(0, 0.5, (V, D)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(0, 0.5, (D, V)), jnp.float32),
    }


def forward_of(frozen, step):
    """A completion token follows from the one before it and from the mean of the prompt."""

    def forward(params, batch: GroupBatch, place) -> tuple[jax.Array, jax.Array]:
        lengths, table = batch.prompt_lengths, params["embedding"]
        inside = jnp.arange(batch.prompt_tokens.shape[1]) < lengths[..., None]
        mean = jnp.einsum("PGS,PSD->PGD", inside / lengths[..., None], table[batch.prompt_tokens])
        last = jnp.take_along_axis(batch.prompt_tokens, lengths - 1, 1)
        previous = jnp.concatenate([last[..., None], batch.completion_tokens[..., :-1]], -1)
        logp = jax.nn.log_softmax(jnp.tanh(mean[:, :, None] + table[previous]) @ params["kernel"], -1)
        logprobs = jnp.take_along_axis(logp, batch.completion_tokens[..., None], -1)[..., 0]
        return logprobs, -(jnp.exp(logp) * logp).sum(-1)

    return forward


def objective_of(name: str):
    loss = LossConfig(name=name, beta=0.1, correction="token_tis", clip_low=0.2, clip_high=0.2)
    return sft_objective if name == "sft" else grpo_objective(make_loss(loss, T))


@functools.cache
def update(name: str, budget: int | None):
    """By tokens, or the one program in which every group is padded to the longest."""
    if budget is None:
        return jax.jit(make_update(forward_of({}, 0), objective_of(name), SGD))
    return update_by_tokens(forward_of, objective_of(name), SGD, budget, shortest=1)


def learn(name: str, batch: GroupBatch, budget: int | None):
    """The step and divided metrics."""
    state, metrics = update(name, budget)(init_state(params_of(), SGD), batch)
    return jax.tree.map(jnp.subtract, params_of(), state.params), values(to_host(metrics))


def assert_same(one, other) -> None:
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=RELATIVE, atol=RELATIVE * float(np.abs(theirs).max()))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "sft"])
def test_no_budget_changes_the_update(name):
    whole = learn(name, batch_of(), None)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[0])) > 0.1
    for budget in (1, 60):
        assert_same(learn(name, batch_of(), budget), whole)


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(P)))
def test_neither_order_nor_padding_changes_the_update(order):
    batch = batch_of()
    moved = jax.tree.map(lambda x: x if x.ndim == 0 else x[jnp.array(order)], batch)
    longer = {
        name: jnp.pad(getattr(moved, name), ((0, 0), (0, 0), (0, 5)), constant_values=filler)
        for name, filler in (
            ("completion_tokens", 7),
            ("old_logprobs", jnp.nan),
            ("ref_logprobs", jnp.nan),
            ("sampler_logprobs", jnp.nan),
        )
    }
    longer["prompt_tokens"] = jnp.pad(moved.prompt_tokens, ((0, 0), (0, 9)), constant_values=3)
    assert_same(learn("grpo", moved._replace(**longer), 60), learn("grpo", batch, 60))


def test_bnpo_is_the_exception_it_averages_the_micro_batches():
    whole, parts = learn("bnpo", batch_of(), None)[1], learn("bnpo", batch_of(), 60)[1]
    assert abs(whole["loss"] - parts["loss"]) > 1e-4


def test_rows_outside_the_loss_may_be_cut_off_and_change_nothing():
    batch = batch_of()
    row = (0, 1)
    muted = batch._replace(
        loss_rows=batch.loss_rows.at[row].set(False), completion_lengths=batch.completion_lengths.at[0].set([2, T])
    )
    (part,) = [part for part in micro_batches(muted, 1) if (part.completion_lengths == T).any()]
    assert part.completion_tokens.shape == (1, G, 2)
    assert_same(learn("dr_grpo", muted, 1), learn("dr_grpo", muted, None))


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count():
    batch = batch_of()
    row = np.argwhere(np.asarray(batch.loss_rows))[0]
    bad = batch._replace(advantages=batch.advantages.at[tuple(row)].set(jnp.nan))
    state, metrics = update("grpo", 60)(init_state(params_of(), SGD), bad)
    jax.tree.map(np.testing.assert_array_equal, state.params, params_of())
    assert (int(state.bad_steps), float(metrics["skipped"].sum)) == (1, 1.0)


# ---- the cut


def test_the_example_of_the_module():
    sizes = [(32, 128), (48, 24), (24, 96), (32, 16)]
    assert plan(sizes, 2, 400) == [[0], [2], [1, 3]]


def tokens_of(part: GroupBatch) -> int:
    groups, size, longest = part.completion_tokens.shape
    return groups * (part.prompt_tokens.shape[1] + size * longest)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 17), budget=st.integers(1, 800))
def test_every_group_once_in_its_own_bucket_and_within_the_budget(seed, groups, budget):
    batch = batch_of(seed, groups)
    # The place of a group, to find it again.
    batch = batch._replace(prompt_tokens=batch.prompt_tokens.at[:, 0].set(jnp.arange(groups)))
    parts = micro_batches(batch, budget)
    found = np.concatenate([part.prompt_tokens[:, 0] for part in parts])
    assert sorted(found.tolist()) == list(range(groups))
    for part in parts:
        rows = len(part.prompt_tokens)
        assert rows == length_buckets(rows)
        assert rows == 1 or tokens_of(part) <= budget
        longest = np.where(part.loss_rows, part.completion_lengths, 0).max()
        assert part.completion_tokens.shape[2] == min(length_buckets(max(int(longest), 1)), T)
        assert part.prompt_tokens.shape[1] == min(length_buckets(int(part.prompt_lengths.max())), S)
        np.testing.assert_array_equal(part.advantages, np.asarray(batch.advantages)[part.prompt_tokens[:, 0]])
    longest = [part.completion_tokens.shape[2] for part in parts]
    assert longest == sorted(longest, reverse=True)


def test_a_budget_for_everything_still_cuts_where_the_padding_is_worth_it():
    # 3 long groups and 4 short ones: together 7 x (8 + 2 x 64), which no bucket holds; apart 3 x 136 + 4 x 24.
    sizes = [(8, 64)] * 3 + [(8, 8)] * 4
    assert [len(rows) for rows in plan(sizes, 2, 1200)] == [3, 4]
    # With a budget so large that a cut is worth more than all of this padding, bucketed counts alone decide.
    assert len(plan(sizes, 2, WORTH_A_CUT * 10**4)) == 2
    assert plan([(8, 8)] * 6, 2, 144) == [[0, 1, 2, 3, 4, 5]]
    assert [len(rows) for rows in plan([(8, 8)] * 6, 2, 143)] in ([4, 2], [2, 4], [3, 3])


def test_answers_that_no_conversation_of_a_part_has_are_cut_off():
    batch = batch_of()
    lengths = batch.completion_lengths.at[1:, 1].set(0)
    parts = micro_batches(batch._replace(completion_lengths=lengths, loss_rows=lengths > 0), 1)
    assert [part.completion_tokens.shape[1] for part in parts].count(1) == P - 1


def test_mixed_lengths_compile_nothing_once_their_shapes_were_met():
    step, state = update("sft", 60), init_state(params_of(), SGD)
    batches = [batch_of(0), batch_of(1)]
    for batch in batches:
        state, _ = step(state, batch)
    assert len({part.completion_tokens.shape for batch in batches for part in micro_batches(batch, 60)}) > 2
    with CompilationCounter() as compilations:
        for batch in batches[::-1]:
            state, _ = step(state, batch)
        assert compilations.take().count == 0


def test_what_is_compiled_ahead_is_what_a_call_runs():
    step, state = update_by_tokens(forward_of, sft_objective, SGD, 60, shortest=1), init_state(params_of(), SGD)
    names = [name for name, _ in step.programs(state, batch_of())]
    assert len(names) == len(set(names)) > 2
    assert names[-1] == "optimizer"
    with CompilationCounter() as compilations:
        step(state, batch_of())
        # The sum of two micro-batches' metrics, which is no program of a shape.
        assert compilations.take().count == 1
