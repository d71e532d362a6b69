"""The one linear layer: y = x W (+ b), with a low-rank adapter where the layer's parameters hold one.

    kernel [in..., out...]    bias [out...]    lora_a [in..., r]    lora_b [r, out...]
    dropout/{key [], keep []}                          in the learner's gradient pass only
    kernel_scale [out...]                              of an int8 kernel, in the sampler only

With x = [1, 2], W the identity, lora_a = [[1], [0]] and lora_b = [[10, 0]] the output is [1, 2] + [10, 0] = [11, 2].
Nothing else in the model knows of adapters; ``kardia_jax/model/lora.py`` makes them and folds their scale into lora_b.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kardia_jax.model.sharding import LINEARS, constrain, constrain_rows
from kardia_jax.types import Params

UNNAMED = ("", "")
"""Axes of a layer that is none of a block's: it is not sharded."""


class Linear(nn.Module):
    """Contracts the last ``inputs`` axes of x with the kernel, in the type of x."""

    features: tuple[int, ...]
    """Lengths of the output axes."""
    inputs: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        taken = x.shape[x.ndim - self.inputs :]
        axes = LINEARS.get(self.name or "", UNNAMED)
        y = contract(x, self.param("kernel", kernel_init, taken, self.features), self.inputs, "".join(axes))
        if self.has_variable("params", "kernel_scale"):
            y = y * jnp.asarray(self.get_variable("params", "kernel_scale"), x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features).astype(x.dtype)
        if self.has_variable("params", "lora_a"):
            y = y + adapter_output(x, dict(self.variables["params"]), self.inputs, axes)
        return checkpoint_name(constrain_rows(y, axes[1]), self.name or "linear")


def kernel_init(key: Array, taken: tuple[int, ...], features: tuple[int, ...]) -> Float[Array, "..."]:
    """Truncated normal of variance 1 / fan-in, float32 [in..., out...]."""
    flat = (int(np.prod(taken)), int(np.prod(features)))
    return nn.initializers.lecun_normal()(key, flat, jnp.float32).reshape(*taken, *features)


def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int, axes: str = "") -> Float[Array, "..."]:
    """x [..., in...] times kernel [in..., out...], in the type of x; the kernel's gradient is summed in its type.

    ``axes`` are the kernel's letters: on a mesh it is gathered, in the type of x, for this product alone.
    """
    return _product(x, _read(kernel, x.dtype, axes), (_last(x, inputs), _first(inputs)))


def _read(kernel: Array, dtype: DTypeLike, axes: str) -> Array:
    low = kernel.astype(dtype)
    return constrain(low, axes, "used") if axes else low


def _contract_forward(x: Array, kernel: Array, inputs: int, axes: str = "") -> tuple[Array, tuple[Array, Array]]:
    return contract(x, kernel, inputs, axes), (x, kernel)


def _contract_backward(inputs: int, axes: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """dx = dy Wᵀ and dW = xᵀ dy, or (dyᵀ x)ᵀ where x is the wider: on CPU XLA copies the left operand transposed, and
    the copy of the MLPs' inner activations alone took a tenth of an update. bfloat16 inputs are summed into the float32
    of the masters."""
    x, kernel = saved
    outputs, rows = kernel.ndim - inputs, _first(x.ndim - inputs)
    dx = _product(dy, _read(kernel, x.dtype, axes), (_last(dy, outputs), _last(kernel, outputs)))
    if math.prod(kernel.shape[:inputs]) > math.prod(kernel.shape[inputs:]):
        dw = jnp.moveaxis(_product(dy, x, (rows, rows), kernel.dtype), range(outputs), range(-outputs, 0))
    else:
        dw = _product(x, dy, (rows, rows), kernel.dtype)
    return dx, constrain(dw, axes, "stored") if axes else dw


contract = jax.custom_vjp(contract, nondiff_argnums=(2, 3))
contract.defvjp(_contract_forward, _contract_backward)


def _product(
    a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]], dtype: DTypeLike | None = None
) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)


def _first(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _last(x: Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


def adapter_output(
    x: Float[Array, "..."], params: Params, inputs: int, axes: tuple[str, str] = UNNAMED
) -> Float[Array, "..."]:
    """(drop(x) A) B, two small products instead of one with A B."""
    x = dropped(x, **params["dropout"]) if "dropout" in params else x
    taken, given = (f"{axes[0]}.", f".{axes[1]}") if axes != UNNAMED else axes
    return contract(contract(x, params["lora_a"], inputs, taken), params["lora_b"], 1, given)


def dropped(x: Float[Array, "..."], key: Array, keep: Float[Array, ""]) -> Float[Array, "..."]:
    """Each element is kept with probability ``keep`` and divided by it, else 0."""
    # One layer meets the prompt and, with an axis more, the completions: their masks must not repeat each other.
    mask = jax.random.bernoulli(jax.random.fold_in(key, x.ndim), keep, x.shape)
    return jnp.where(mask, x / keep.astype(x.dtype), 0)
