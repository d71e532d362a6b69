"""Host memory and back: values, places, types, and the one error."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.config import ConfigError
from kardia_jax.placement import HOST, offloaded, on_device, where_it_was


def tree():
    return {"w": jnp.arange(6.0).reshape(2, 3), "count": jnp.int32(3)}


def kinds(tree):
    return {name: leaf.sharding.memory_kind for name, leaf in tree.items()}


def test_arrays_move_and_scalars_stay():
    moved = offloaded(tree(), "x")
    assert kinds(moved) == {"w": HOST, "count": "device"}
    assert kinds(on_device(moved)) == {"w": "device", "count": "device"}
    jax.tree.map(np.testing.assert_array_equal, moved, tree())


def test_a_mesh_is_kept():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    moved = offloaded(jax.device_put(tree()["w"], sharding), "x")
    assert moved.sharding == sharding.with_memory_kind(HOST)
    assert on_device(moved).sharding == sharding


def test_a_program_puts_results_back_where_their_namesakes_were():
    double = jax.jit(lambda x: where_it_was(jax.tree.map(lambda leaf: 2 * leaf, on_device(x)), x), donate_argnums=0)
    here, there = double(tree()), double(offloaded(tree(), "x"))
    assert kinds(here) == {"w": "device", "count": "device"}
    assert kinds(there) == {"w": HOST, "count": "device"}
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_a_device_without_pinned_memory_is_an_error_that_names_the_field():
    memory = types.SimpleNamespace(kind="device")
    device = types.SimpleNamespace(platform="toy", addressable_memories=lambda: [memory])
    leaf = types.SimpleNamespace(ndim=1, sharding=types.SimpleNamespace(device_set=[device]))
    with pytest.raises(
        ConfigError, match=r"^grpo\.optimizer\.offload: wanted False on toy.*no pinned_host.*have device"
    ):
        offloaded([leaf], "grpo.optimizer.offload")
