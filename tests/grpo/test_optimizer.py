"""Learning rates by hand, what decays, what is clipped, and that it descends."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kardia_jax.config import OptimizerConfig
from kardia_jax.grpo.optimizer import decayed, learning_rate, make_optimizer, matrices
from kardia_jax.model import policy
from kardia_jax.model.spec import ModelSpec

FLOAT32 = 1e-6


def rates(config: OptimizerConfig, updates: int) -> list[float]:
    return [float(rate) for rate in jax.vmap(learning_rate(config, updates))(jnp.arange(updates + 1))]


@pytest.mark.parametrize(
    ("schedule", "final", "wanted"),
    [
        # Of 8 updates 2 warm up: 1/2 and 3/4 of the peak, then 6 updates from the peak down.
        ("constant", 0.0, [2, 3, 4, 4, 4, 4, 4, 4, 4]),
        ("linear", 0.0, [2, 3, 4, 20 / 6, 16 / 6, 2, 8 / 6, 4 / 6, 0]),
        ("linear", 0.5, [2, 3, 4, 22 / 6, 20 / 6, 3, 16 / 6, 14 / 6, 2]),
        ("cosine", 0.0, [2, 3, *(2 * (1 + np.cos(np.pi * n / 6)) for n in range(7))]),
        ("cosine", 0.25, [2, 3, *(1 + 1.5 * (1 + np.cos(np.pi * n / 6)) for n in range(7))]),
    ],
)
def test_schedules_by_hand(schedule, final, wanted):
    config = OptimizerConfig(learning_rate=4.0, schedule=schedule, warmup_share=0.25, final_share=final)
    np.testing.assert_allclose(rates(config, 8), wanted, atol=FLOAT32)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "updates"), [(0.0, 5), (0.05, 5), (0.5, 1), (1.0, 4), (0.3, 1)])
def test_every_update_of_a_run_learns_something(schedule, warmup, updates):
    config = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_share=warmup)
    assert all(0 < rate <= 1.001e-3 for rate in rates(config, updates)[:updates])


def test_the_warm_up_only_rises_and_the_rest_only_falls():
    run = rates(OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_share=0.4), 20)
    assert all(a < b for a, b in itertools.pairwise(run[:9]))
    assert all(a > b for a, b in itertools.pairwise(run[8:]))
    assert run[8] == 1.0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_kernels_and_embeddings_decay_and_norm_scales_and_biases_do_not(family):
    spec = ModelSpec(family, 11, 8, 8, 2, 2, 1, 4, tied=False)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    flat = {jax.tree_util.keystr(path): flag for path, flag in jax.tree.leaves_with_path(decayed(shapes))}
    names = {True: set(), False: set()}
    for path, flag in flat.items():
        names[flag].add(path.rsplit("['")[-1].rstrip("']"))
    assert names[True] == {"kernel", "embedding"}
    assert names[False] == ({"scale", "bias"} if family == "qwen2" else {"scale"})


def step(config: OptimizerConfig, params, gradient, updates: int = 4):
    """Parameters after one update."""
    optimizer = make_optimizer(config, updates)
    changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, changes)


def test_weight_decay_is_decoupled_and_takes_the_learning_rate():
    params = {"kernel": jnp.array([2.0, -3.0]), "scale": jnp.array([5.0]), "bias": jnp.array([7.0])}
    config = OptimizerConfig(learning_rate=0.1, warmup_share=0.0, weight_decay=0.5)
    after = step(config, params, jax.tree.map(jnp.zeros_like, params))
    # A gradient of 0 leaves Adam's part at 0: w - 0.1 * 0.5 w.
    np.testing.assert_allclose(after["kernel"], [1.9, -2.85], atol=FLOAT32)
    np.testing.assert_array_equal(after["scale"], params["scale"])
    np.testing.assert_array_equal(after["bias"], params["bias"])


def test_one_step_of_adam_by_hand():
    # After one update the moments, bias-corrected, are g and g^2: the step is g / (|g| + epsilon).
    params, gradient = {"scale": jnp.array([1.0, 1.0])}, {"scale": jnp.array([0.5, -0.25])}
    config = OptimizerConfig(learning_rate=0.1, warmup_share=0.0, epsilon=0.25, clip_norm=0.0)
    np.testing.assert_allclose(
        step(config, params, gradient)["scale"], [1 - 0.1 * 0.5 / 0.75, 1 + 0.1 * 0.25 / 0.5], atol=FLOAT32
    )


@pytest.mark.parametrize(
    ("clip_norm", "moment"),
    [(0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (2.5, [1.5, 2.0])],
)
def test_the_gradient_is_scaled_down_to_the_clip_norm_and_zero_never_clips(clip_norm, moment):
    config = OptimizerConfig(beta1=0.0, clip_norm=clip_norm)
    params = {"scale": jnp.zeros(1), "bias": jnp.zeros(1)}
    gradient = {"scale": jnp.array([3.0]), "bias": jnp.array([4.0])}
    optimizer = make_optimizer(config, 4)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    first = optax.tree.get(state, "mu")
    np.testing.assert_allclose([first["scale"][0], first["bias"][0]], moment, atol=FLOAT32)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_quadratic_goes_down(schedule):
    config = OptimizerConfig(learning_rate=0.1, schedule=schedule, weight_decay=0.0)
    optimizer, target = make_optimizer(config, 100), jnp.array([3.0, -1.0, 0.5])

    def value(params):
        return jnp.square(params["kernel"] - target).sum()

    def descend(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(value)(params)
        changes, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, changes), state), loss

    params = {"kernel": jnp.zeros(3)}
    (params, _), losses = jax.jit(lambda start: jax.lax.scan(descend, start, None, 100))(
        (params, optimizer.init(params))
    )
    assert value(params) < 0.01 * losses[0]
    assert (losses[1:30] < losses[:29]).all()


def test_muon_moves_each_layers_matrix_by_its_nearest_rotation_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    gradient = {
        "blocks": {
            "attention": {"q": {"kernel": rng.normal(size=(2, 6, 2, 3)), "bias": rng.normal(size=(2, 2, 3))}},
            "mlp": {"up": {"kernel": rng.normal(size=(2, 6, 6)) * [[[1.0]], [[1e3]]]}},
        },
        "embed": {"embedding": rng.normal(size=(5, 6))},
    }
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    params = jax.tree.map(jnp.zeros_like, gradient)
    config = OptimizerConfig(0.5, "constant", 0.0, weight_decay=0.0, clip_norm=0.0, muon_learning_rate=0.25)
    after = step(config, params, gradient)
    for layer in range(2):
        for part, name in (("attention", "q"), ("mlp", "up")):
            left, _, right = np.linalg.svd(gradient["blocks"][part][name]["kernel"][layer].reshape(6, 6))
            moved = after["blocks"][part][name]["kernel"][layer].reshape(6, 6)
            # Newton-Schulz stops when the singular values are near 1, so the step is a rotation only roughly.
            values = np.diag(left.T @ moved @ right.T) / -0.25
            assert (values > 0.6).all()
            assert (values < 1.3).all()
            np.testing.assert_allclose(moved, -0.25 * (left * values) @ right, atol=1e-3)
    for path in (("blocks", "attention", "q", "bias"), ("embed", "embedding")):
        moved, slope = (functools.reduce(dict.__getitem__, path, tree) for tree in (after, gradient))
        # Nesterov's first step: the look-ahead momentum 0.9 (1 - 0.9) g / (1 - 0.9^2) beside g itself.
        np.testing.assert_allclose(moved, -0.5 * (0.09 / 0.19 + 1) * jnp.sign(slope), rtol=1e-4)


@pytest.mark.parametrize("muon", [None, 0.1])
def test_a_bfloat16_first_moment_is_kept_as_such_and_still_descends(muon):
    params = {
        "mlp": {"up": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8)), jnp.float32)}},
        "scale": jnp.ones(8),
    }
    target = jax.tree.map(lambda x: 0.5 * x + 0.25, params)

    def value(params):
        return sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    def trained(dtype: str):
        config = OptimizerConfig(0.1, weight_decay=0.0, muon_learning_rate=muon, moment_dtype=dtype)
        optimizer = make_optimizer(config, 60)

        def descend(carry, _):
            params, state = carry
            changes, state = optimizer.update(jax.grad(value)(params), state, params)
            return (optax.apply_updates(params, changes), state), None

        return jax.jit(lambda start: jax.lax.scan(descend, start, None, 60)[0])((params, optimizer.init(params)))

    (whole, _), (half, state) = trained("float32"), trained("bfloat16")
    named = [(jax.tree_util.keystr(path), leaf.dtype) for path, leaf in jax.tree.leaves_with_path(state)]
    assert {dtype for name, dtype in named if ".mu" in name} == {jnp.dtype(jnp.bfloat16)}
    assert {dtype for name, dtype in named if ".nu" in name} == {jnp.dtype(jnp.float32)}
    # bfloat16 keeps 8 bits: the paths part by about a hundredth of what they cover.
    start, ours, theirs = float(value(params)), float(value(half)), float(value(whole))
    assert ours < 0.05 * start
    assert ours == pytest.approx(theirs, abs=0.01 * start)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True))


def test_every_kernel_of_a_model_is_a_matrix_for_muon_and_nothing_else():
    spec = ModelSpec("qwen2", 11, 8, 24, 2, 4, 2, 4, tied=False)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    axes = jax.tree.leaves_with_path(matrices(shapes), is_leaf=lambda x: x is None or isinstance(x, tuple))
    kernels = {path[-2].key: x for path, x in axes if path[-1].key == "kernel"}
    assert kernels["q"] == kernels["k"] == kernels["v"] == ((1,), (2, 3))
    assert kernels["o"] == ((1, 2), (3,))
    assert kernels["gate"] == kernels["up"] == kernels["down"] == ((1,), (2,))
    assert all(x is None for path, x in axes if path[-1].key != "kernel")
