"""The table, what follows from it, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kardia_jax.config import ConfigError, MeshConfig, SamplerMeshConfig
from kardia_jax.model.shapes import QWEN25_7B
from kardia_jax.model.sharding import (
    active,
    check_mesh,
    check_rows,
    gathered_bytes,
    make_mesh,
    make_sampler_mesh,
    on_mesh,
    parameter_axes,
    partition,
    shardings,
)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(-1, 1, 1), (8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 1, 8), (1, 1, 8)),
        (MeshConfig(-1, 1, 2, SamplerMeshConfig(2, 1, 2)), (2, 1, 2)),
    ],
)
def test_sizes_are_those_of_the_config_and_axes_are_auto(config, sizes):
    mesh = make_mesh(config)
    assert mesh is not None
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_a_config_that_says_nothing_is_one_device_however_many_there_are():
    assert jax.device_count() == 8
    assert make_mesh(MeshConfig()) is None
    assert make_sampler_mesh(MeshConfig()) is None


def test_the_samplers_own_devices_are_the_last():
    config = MeshConfig(1, 4, 1, SamplerMeshConfig(2, 1, 2))
    learner, sampler = make_mesh(config), make_sampler_mesh(config)
    assert learner is not None
    assert sampler is not None
    assert [device.id for device in learner.devices.flat] == [0, 1, 2, 3]
    assert [device.id for device in sampler.devices.flat] == [4, 5, 6, 7]
    assert dict(sampler.shape) == {"data": 2, "fsdp": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("config", "arithmetic"),
    [
        (MeshConfig(2, 2, 4), "8 devices; 2 x 2 x 4 = 16."),
        (MeshConfig(1, 2, 2), "8 devices; 1 x 2 x 2 = 4."),
        (MeshConfig(-1, 3, 1), r"8 devices; 8 / 3 = 2\.66667 for the -1\."),
        (MeshConfig(-1, 1, 1, SamplerMeshConfig(8)), "8 devices - 8 of the sampler's = 0; 0 / 1 = 0 for the -1"),
        (MeshConfig(2, 2, 2, SamplerMeshConfig(2)), "8 devices - 2 of the sampler's = 6; 2 x 2 x 2 = 8."),
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(config, arithmetic):
    with pytest.raises(ConfigError, match=f"^mesh: wanted data x fsdp x tensor = the number of devices.*{arithmetic}"):
        make_mesh(config)


@pytest.mark.parametrize(
    ("change", "shape", "field", "arithmetic"),
    [
        ({"heads": 12, "kv_heads": 4}, (1, 1, 8), "mesh.tensor", r"12 query heads.*12 / 8 = 1\.5 is no whole number"),
        ({"heads": 24, "kv_heads": 3}, (1, 1, 8), "mesh.tensor", r"3 kv heads.*3 / 8 = 0\.375.*8 / 3 = 2\.66667"),
        ({"heads": 24, "kv_heads": 12}, (1, 1, 8), "mesh.tensor", r"12 kv heads.*12 / 8 = 1\.5"),
        ({"vocab_size": 61}, (1, 1, 8), "mesh.tensor", r"61 rows of the table.*61 / 8 = 7\.625"),
        ({"mlp_width": 28}, (1, 1, 8), "mesh.tensor", r"28 mlp width.*28 / 8 = 3\.5"),
        ({"width": 20}, (1, 8, 1), "mesh.fsdp", r"20 width.*20 / 8 = 2\.5"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide_is_refused(spec_of, change, shape, field, arithmetic):
    spec = dataclasses.replace(spec_of("qwen"), **({"token_count": 60} | change))
    with pytest.raises(ConfigError, match=f"^{field}: wanted a divisor.*{arithmetic}"):
        check_mesh(spec, make_mesh(MeshConfig(*shape)))


def test_rows_that_the_mesh_does_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_rows(8, "grpo.prompts", mesh, 2)
    with pytest.raises(
        ConfigError,
        match=r"^grpo\.prompts: wanted a multiple of 8 \(data 2 x fsdp 2 x 2 micro-batches\), got 12\. 12 / 8 = 1\.5",
    ):
        check_rows(12, "grpo.prompts", mesh, 2)


def test_every_parameter_has_its_letters_wherever_it_stands(spec_of, start_of):
    params = start_of("qwen")
    letters = {
        jax.tree_util.keystr(path, simple=True, separator="/"): parameter_axes(path, leaf.ndim)
        for path, leaf in jax.tree_util.tree_leaves_with_path({"mu": params})
    }
    assert letters == {
        "mu/embed/embedding": "VD",
        "mu/head/embedding": "VD",
        "mu/final_norm/scale": ".",
        "mu/blocks/attention_norm/scale": "L.",
        "mu/blocks/mlp_norm/scale": "L.",
        "mu/blocks/attention/q/kernel": "LDHE",
        "mu/blocks/attention/k/kernel": "LDKE",
        "mu/blocks/attention/v/kernel": "LDKE",
        "mu/blocks/attention/q/bias": "LHE",
        "mu/blocks/attention/k/bias": "LKE",
        "mu/blocks/attention/v/bias": "LKE",
        "mu/blocks/attention/o/kernel": "LHED",
        "mu/blocks/mlp/gate/kernel": "LDF",
        "mu/blocks/mlp/up/kernel": "LDF",
        "mu/blocks/mlp/down/kernel": "LFD",
    }
    assert partition("LDHE", "stored") == PartitionSpec(None, "fsdp", "tensor", None)
    assert partition("LDHE", "used") == PartitionSpec(None, None, "tensor", None)
    assert partition("PGV", "moving") == PartitionSpec(("data", "fsdp"), None, "tensor")


def test_a_device_keeps_one_eighth(start_of):
    """Of everything but the norms, and of kv heads that are too few to share."""
    mesh = make_mesh(MeshConfig(1, 2, 4))
    assert mesh is not None
    params = start_of("gemma")
    placed = shardings(params, mesh)
    kept = sum(
        np.prod(place.shard_shape(leaf.shape))
        for place, leaf in zip(*map(jax.tree.leaves, (placed, params)), strict=True)
    )
    norms = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale")
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert kept == (whole - norms) / 8 + norms


def test_what_the_sampler_gathers_on_an_fsdp_mesh_is_said(start_of):
    """Qwen2.5-7B's arithmetic is that of any model: used less stored, in the compute type."""
    params = start_of("gemma")
    norms = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale")
    sharded = sum(leaf.size for leaf in jax.tree.leaves(params)) - norms

    def bytes_on(*sizes: int) -> int:
        mesh = make_mesh(MeshConfig(*sizes))
        assert mesh is not None
        return gathered_bytes(params, mesh, 2)

    assert bytes_on(1, 8, 1) == 2 * sharded * 7 / 8
    assert bytes_on(2, 2, 2) == 2 * sharded / 2 * 1 / 2
    assert bytes_on(8, 1, 1) == bytes_on(1, 1, 8) == 0


def test_the_mesh_is_known_while_a_program_is_traced_and_at_no_other_time():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    seen = []
    jax.jit(on_mesh(mesh, lambda x: (seen.append(active()), x)[1]))(1.0)
    assert dict(seen[0].shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert active() is None


def test_the_seven_billion_divide_on_the_meshes_of_the_recipes():
    for sizes in ((1, 8, 1), (2, 4, 1), (1, 2, 4), (2, 1, 4)):
        check_mesh(QWEN25_7B, make_mesh(MeshConfig(*sizes)))
    with pytest.raises(ConfigError, match=r"28 query heads.*28 / 8 = 3\.5"):
        check_mesh(QWEN25_7B, make_mesh(MeshConfig(1, 1, 8)))
