"""The vocabulary over devices: the draw and the log-probs of a sharded table against those of a whole one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kardia_jax.config import SamplerConfig
from kardia_jax.model.head import Slices, token_logprobs
from kardia_jax.model.sharding import everywhere, on_mesh
from kardia_jax.rollout.sampling import Controls, draw

ROWS, VOCABULARY, KNOWN, WIDTH = 16, 2400, 2390, 8
"""300 tokens of the table on each of eight devices, so that blocks of 128 end elsewhere than on one."""
ROUNDING = 1e-5
"""Nats; float32 log-probs of size 10, summed in another order."""
HEAD = (KNOWN, Slices(3, 128), 4.0)
"""Rows that count, tokens per slice, cap of the logits."""


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def on_all(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for the mesh; its arguments lie whole on every device."""
    places = None if mesh is None else everywhere(mesh)
    return jax.jit(on_mesh(mesh, function), in_shardings=places)


@pytest.mark.parametrize(
    "settings",
    [
        SamplerConfig(temperature=1.0),
        SamplerConfig(temperature=0.0),
        SamplerConfig(temperature=0.7, top_k=300),
        SamplerConfig(temperature=1.0, top_p=0.9, min_p=0.01),
    ],
    ids=["plain", "greedy", "top-k", "top-p and min-p"],
)
@pytest.mark.parametrize("shape", ["1x1x8", "2x1x4"])
def test_a_draw_takes_the_token_that_one_device_takes(mesh_named, compiled_draw, settings, shape):
    z = 2 * numbers(ROWS, VOCABULARY)
    z[:, KNOWN:] = -np.inf
    # Ties among the most likely, on two devices: greedy takes the first.
    z[0, [2100, 40, 900]] = 30.0
    keys, controls = jax.random.split(jax.random.key(1), ROWS), Controls.from_config(settings)
    one, many = (compiled_draw(name)(z.T, keys, controls) for name in ("1x1x1", shape))
    np.testing.assert_array_equal(many.token, one.token)
    np.testing.assert_allclose(many.sampler_logprob, one.sampler_logprob, atol=ROUNDING)
    np.testing.assert_allclose(many.tempered_logprob, one.tempered_logprob, atol=ROUNDING)
    assert len(set(np.asarray(one.token).tolist())) > ROWS // 2
    assert settings.temperature > 0 or one.token[0] == 40


@pytest.fixture(scope="module")
def compiled_draw(mesh_named):
    return functools.cache(lambda shape: on_all(mesh_named(shape), draw))


@pytest.mark.parametrize("shape", ["1x1x8", "2x2x2"])
def test_log_probs_entropy_and_gradients_are_those_of_a_whole_table(mesh_named, shape):
    hidden, table = 2 * numbers(ROWS, WIDTH), numbers(VOCABULARY, WIDTH)
    tokens = jnp.array([0, 299, 300, 2389, 1200, *range(100, 111)])
    keep = jnp.arange(ROWS) % 5 > 0
    weights = jnp.asarray(numbers(2, ROWS))

    def value(hidden, table):
        out = token_logprobs(hidden, table, tokens, keep, jnp.float32(0.8), *HEAD)
        return (jnp.stack(out) * weights).sum(), out

    gradient = jax.grad(value, (0, 1), has_aux=True)
    one, many = (on_all(mesh, gradient)(hidden, table) for mesh in (None, mesh_named(shape)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=ROUNDING, rtol=ROUNDING), many, one)
    assert (np.asarray(one[1][0])[keep] < -1).all()
