"""What travels to a sampler of its own devices, and what stays there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.config import MeshConfig, SamplerMeshConfig
from kardia_jax.model.sharding import make_sampler_mesh, shardings
from kardia_jax.rollout.sending import Sender


@pytest.fixture
def mesh():
    return make_sampler_mesh(MeshConfig(1, 4, 1, SamplerMeshConfig(2, 1, 2)))


def narrow(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def test_the_whole_model_is_cast_and_laid_out_by_the_table(mesh, start_of):
    params = jax.tree.map(jnp.asarray, start_of("qwen"))
    here = Sender(mesh, narrow)(params)
    jax.tree.map(np.testing.assert_array_equal, here, narrow(params))
    assert jax.tree.map(lambda leaf: leaf.sharding, here) == shardings(params, mesh)


def test_under_an_adapter_the_base_is_sent_once_and_nothing_is_cast(mesh, start_of):
    base = jax.tree.map(jnp.asarray, start_of("qwen"))

    def joined(number: float):
        q = base["blocks"]["attention"]["q"] | {"lora_a": jnp.full((1, 16, 2), number)}
        return base | {"blocks": base["blocks"] | {"attention": base["blocks"]["attention"] | {"q": q}}}

    send = Sender(mesh, narrow)
    first, second = send(joined(1.0)), send(joined(2.0))
    jax.tree.map(np.testing.assert_array_equal, second, joined(2.0))
    fresh = [one is not two for one, two in zip(*map(jax.tree.leaves, (first, second)), strict=True)]
    assert sum(fresh) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(second)} == {jnp.dtype("float32")}
