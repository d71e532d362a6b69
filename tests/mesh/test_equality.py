"""Three full steps on eight devices are those of one: tokens, loss, parameters, moments; and compile nothing anew."""

import functools

import jax
import numpy as np
import pytest

TOLERANCE = 1e-5
"""Of float32 sums in another order, through three updates; the smallest update that counts is 1e-3."""

MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x2x4", "1x1x8")


def assert_same(one, other) -> None:
    """Tokens bit for bit, the rest within the tolerance."""
    for ours, theirs in zip(one.tokens, other.tokens, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    near = functools.partial(pytest.approx, abs=TOLERANCE, rel=TOLERANCE, nan_ok=True)
    assert one.metrics == [near(metrics) for metrics in other.metrics]
    close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=0)
    jax.tree.map(close, jax.device_get(one.state), jax.device_get(other.state))


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_one_device_learns(three_steps, name, start_of):
    """What the others are compared with: rows of several lengths, a loss, parameters that move."""
    run = three_steps(name, "1x1x1")
    assert len(np.unique((run.tokens[0] != 0).sum(-1))) > 2
    assert all(metrics["entropy"] > 1 and metrics["grad_norm"] > 100 * TOLERANCE for metrics in run.metrics)
    assert run.metrics[2]["kl"] > 10 * TOLERANCE
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), jax.device_get(run.state.params), start_of(name))
    assert min(jax.tree.leaves(moved)) > 50 * TOLERANCE


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_a_mesh_changes_nothing(three_steps, name, shape):
    assert_same(three_steps(name, shape), three_steps(name, "1x1x1"))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_after_the_first_step_nothing_is_compiled(three_steps, name, shape):
    compiled = three_steps(name, shape).compiled
    assert compiled[0] > 0
    assert compiled[1:] == [0, 0]


@pytest.mark.parametrize("shape", MESHES)
def test_the_state_comes_out_of_a_step_as_it_went_in(three_steps, state_on, shape):
    before, after = state_on("qwen", shape), three_steps("qwen", shape).state
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


@pytest.mark.parametrize("split", [{"micro_batches": 2}, {"tokens": 64}], ids=str)
def test_micro_batches_change_nothing_on_a_mesh(three_steps, steps_of, split):
    assert_same(steps_of("qwen", "1x2x4", **split), three_steps("qwen", "1x1x1"))


def test_neither_the_order_of_groups_nor_recomputation_changes_anything_on_a_mesh(three_steps, steps_of):
    run = steps_of("qwen", "2x2x2", order=(5, 0, 7, 2, 4, 1, 6, 3), remat="block")
    assert_same(run, three_steps("qwen", "1x1x1"))
