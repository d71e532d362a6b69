"""What this device can do at best: copy bandwidth and matmul FLOP/s, each the best of several sizes.

Measured in the same run and type as the work that is held against them, so that a shared or throttled machine is
compared with itself.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

SECONDS = 0.2
"""So long is each size measured, after a call that compiles it."""


class Ceilings(NamedTuple):
    """The best of each, and every size that was tried."""

    bytes_per_second: float
    """Read and written bytes of a copy, added up."""
    flops_per_second: float
    copies: dict[str, float]
    """Bytes/s by size of the array."""
    matmuls: dict[str, float]
    """FLOP/s by size of the square matrices."""


class Sizes(NamedTuple):
    """What is tried."""

    megabytes: tuple[int, ...]
    widths: tuple[int, ...]


SMALL = Sizes(megabytes=(64, 256), widths=(1024, 2048))
# Waiting for a call costs some 20 microseconds: sizes for accelerators are such that it does not show.
LARGE = Sizes(megabytes=(1024, 4096), widths=(4096, 8192, 16_384))


def measure_ceilings(dtype: str, sizes: Sizes | None = None) -> Ceilings:
    """Of the default device, in this type; sizes fit the kind of device unless given."""
    sizes = sizes or (SMALL if jax.default_backend() == "cpu" else LARGE)
    copies = {f"{size} MB": copy_rate(size * 1_000_000, dtype) for size in sizes.megabytes}
    matmuls = {f"{width}": matmul_rate(width, dtype) for width in sizes.widths}
    return Ceilings(max(copies.values()), max(matmuls.values()), copies, matmuls)


def copy_rate(size: int, dtype: str) -> float:
    """Bytes/s of reading an array of ``size`` bytes and writing it again, with one added, or it would be left out.

    In place: on CPU the pages of a new array cost more than the copy.
    """
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(size // jnp.dtype(dtype).itemsize, dtype)
    return 2 * size * _calls_per_second(lambda x: jax.block_until_ready(add(x)), x)


def matmul_rate(width: int, dtype: str) -> float:
    """FLOP/s of the product of two square matrices."""
    product = jax.jit(lambda x: x @ x)

    def call(x: jax.Array) -> jax.Array:
        jax.block_until_ready(product(x))
        return x

    x = jax.random.normal(jax.random.key(0), (width, width)).astype(dtype) * width**-0.5
    return 2.0 * width**3 * _calls_per_second(call, x)


def _calls_per_second(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Of the fastest call, each of which is waited for and gives the next one's argument."""
    x = call(x)
    best, end = math.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        x = call(x)
        best = min(best, time.perf_counter() - start)
    return 1 / best
