"""The linear layer against Flax's own, its adapter against sums by hand, and what dropout does to it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.config import LoraConfig
from kardia_jax.model.linear import Linear, dropped
from kardia_jax.model.lora import joined, merged

CASES = [((5,), 1, False), ((4, 3), 1, True), ((5,), 2, False), ((5,), 2, True)]


def flax_layer(features: tuple[int, ...], inputs: int, use_bias: bool) -> nn.DenseGeneral:
    return nn.DenseGeneral(features, axis=tuple(range(-inputs, 0)), use_bias=use_bias)


@pytest.mark.parametrize(("features", "inputs", "use_bias"), CASES)
def test_it_starts_and_computes_as_flax_does(features, inputs, use_bias):
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 4))
    ours, theirs = Linear(features, inputs, use_bias), flax_layer(features, inputs, use_bias)
    params = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), params)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    np.testing.assert_array_equal(ours.apply(params, x), theirs.apply(params, x))


def test_it_computes_in_the_type_of_its_input():
    x = jnp.ones((2, 3), jnp.bfloat16)
    params = Linear((4,), use_bias=True).init(jax.random.key(0), x)
    assert params["params"]["kernel"].dtype == jnp.float32
    assert Linear((4,), use_bias=True).apply(params, x).dtype == jnp.bfloat16


# In 2, out 3, rank 4. x = [1, 2]: x W = [9, 12, 15]; x A = [1, 2, 3, 4]; (x A) B = [1 + 4, 2 + 4, 3].
X = jnp.array([[1.0, 2.0]])
KERNEL = jnp.array([[1.0, 2, 3], [4, 5, 6]])
A = jnp.array([[1.0, 0, 1, 0], [0, 1, 1, 2]])
B = jnp.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("scaling", "expected"),
    # alpha / r = 8 / 4 = 2; alpha / sqrt(r) = 8 / 2 = 4.
    [("standard", [9 + 2 * 5, 12 + 2 * 6, 15 + 2 * 3]), ("rslora", [9 + 4 * 5, 12 + 4 * 6, 15 + 4 * 3])],
)
def test_an_adapter_by_hand(scaling, expected):
    lora = LoraConfig(rank=4, alpha=8, scaling=scaling)
    params = joined(lora, {"kernel": KERNEL}, {"lora_a": A, "lora_b": B})
    np.testing.assert_array_equal(Linear((3,)).apply({"params": params}, X), [expected])
    np.testing.assert_array_equal(Linear((3,)).apply({"params": merged(params)}, X), [expected])
    assert set(merged(params)) == {"kernel"}


def with_dropout(key: jax.Array, keep: float):
    return {"kernel": KERNEL, "lora_a": A, "lora_b": B, "dropout": {"key": key, "keep": jnp.float32(keep)}}


def test_dropout_is_right_on_average_and_fixed_by_its_key():
    layer, keys = jax.jit(lambda key: Linear((3,)).apply({"params": with_dropout(key, 0.75)}, X)), 4000
    outputs = np.stack([layer(key) for key in jax.random.split(jax.random.key(0), keys)])
    # x A B is linear in x, whose elements have standard deviation x sqrt(1/3): 2 sqrt(1/3) * 3 for the widest output.
    np.testing.assert_allclose(outputs.mean(0), [[9 + 5, 12 + 6, 15 + 3]], atol=4 * 3.5 / keys**0.5)
    assert len(np.unique(outputs.round(4), axis=0)) == 4
    np.testing.assert_array_equal(layer(jax.random.key(7)), layer(jax.random.key(7)))


def test_a_mask_keeps_its_share_and_scales_it():
    x = jnp.ones((50, 200))
    out = np.asarray(dropped(x, jax.random.key(0), jnp.float32(0.8)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.8)}
    # Four standard deviations of a share of 0.8 over 10,000.
    assert (out > 0).mean() == pytest.approx(0.8, abs=4 * 0.004)


def test_prompt_and_completions_have_masks_of_their_own():
    key, keep = jax.random.key(0), jnp.float32(0.5)
    prompt, completions = dropped(jnp.ones((4, 64)), key, keep), dropped(jnp.ones((4, 1, 64)), key, keep)
    assert (np.asarray(prompt) != np.asarray(completions)[:, 0]).mean() > 0.3
