"""The linear layer against Flax's own, its adapter against sums by hand, and what dropout does to it."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.config import LoraConfig
from kardia_jax.model.linear import Linear, contract, dropped
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


def plain(x, kernel, inputs: int):
    return jnp.tensordot(x, kernel.astype(x.dtype), inputs)


@pytest.mark.parametrize(("features", "inputs"), [((5,), 1), ((4, 3), 1), ((5,), 2)])
def test_the_gradient_is_that_of_the_plain_product(features, inputs):
    x, key = jax.random.normal(jax.random.key(1), (2, 7, 6, 4)), jax.random.key(2)
    kernel = jax.random.normal(key, (*x.shape[4 - inputs :], *features))

    def loss(product):
        return lambda x, kernel: jnp.sin(product(x, kernel, inputs)).sum()

    got, wanted = (jax.value_and_grad(loss(one), (0, 1))(x, kernel) for one in (contract, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)


def test_bfloat16_inputs_sum_the_kernels_gradient_in_float32():
    x = jax.random.normal(jax.random.key(1), (512, 6), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(2), (6, 3))
    dy = jax.random.normal(jax.random.key(3), (512, 3), jnp.bfloat16)
    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)

    def off(product) -> float:
        dx, dkernel = jax.vjp(lambda x, kernel: product(x, kernel, 1), x, kernel)[1](dy)
        assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
        return float(np.abs(dkernel - exact).max() / np.abs(exact).max())

    assert off(contract) < 1e-5
    assert off(plain) > 1e-4, "rounded to bfloat16 on its way"


def test_a_frozen_kernel_costs_no_gradient():
    """Two layers of 5 to 7 and 7 to 3 on 11 rows: a gradient of a kernel would be a product of that shape."""
    x = jnp.ones((11, 5))
    frozen = [{"kernel": jnp.ones((5, 7))}, {"kernel": jnp.ones((7, 3))}]
    trained = [{"lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 7))}, {"lora_a": jnp.ones((7, 2))}]
    trained[1]["lora_b"] = jnp.ones((2, 3))

    def loss(trained, frozen):
        h = x
        for one, other, width in zip(frozen, trained, (7, 3), strict=True):
            h = jnp.sin(Linear((width,)).apply({"params": one | other}, h))
        return h.sum()

    def products(which) -> str:
        text = jax.jit(jax.grad(loss, which)).lower(trained, frozen).compile().as_text()
        return "\n".join(line for line in text.splitlines() if " dot(" in line)

    assert not re.search(r"= f32\[(5,7|7,3)\]", products(0))
    assert all(re.search(rf"= f32\[{shape}\]", products((0, 1))) for shape in ("5,7", "7,3"))


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
