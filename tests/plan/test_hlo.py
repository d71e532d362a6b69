"""Collectives of programs whose answer is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kardia_jax.plan.hlo import Collective, collectives, group_size, sent_by_kind, shape_bytes

AXIS = "x"


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,))


def of(mesh, body, *shapes, trips=1.0, branch=max):
    """Collectives of a shard_map over two devices, compiled here."""
    specs = PartitionSpec(AXIS)
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))
    where = NamedSharding(mesh, specs)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    return collectives(run.lower(*arrays).compile().as_text(), trips, branch)


def once(x):
    return jax.lax.psum(x, AXIS)


# Of an array [8, 16] of float32 each of two devices holds [4, 16], 256 bytes.
@pytest.mark.parametrize(
    ("body", "kind", "whole", "sent"),
    [
        (once, "all-reduce", 256, 256),
        (lambda x: jax.lax.all_gather(x, AXIS, tiled=True)[:4] * 2, "all-gather", 512, 256),
        (lambda x: jnp.tile(jax.lax.psum_scatter(x, AXIS, tiled=True), (2, 1)), "reduce-scatter", 256, 128),
        (lambda x: jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True), "all-to-all", 256, 128),
        (lambda x: jax.lax.ppermute(x, AXIS, [(0, 1), (1, 0)]), "collective-permute", 256, 256),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute"],
)
def test_each_kind_is_counted_once_with_what_a_device_sends(mesh, body, kind, whole, sent):
    assert of(mesh, body, (8, 16)) == [Collective(kind, whole, 2, 1.0)]
    assert sent_by_kind(of(mesh, body, (8, 16))) == {kind: sent}


def test_the_body_of_a_scan_counts_as_often_as_it_runs_and_scans_multiply(mesh):
    def inner(x, _):
        return jnp.sin(once(x)), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, 5)[0] + jax.lax.all_gather(x, AXIS)[0], None

    found = of(mesh, lambda x: jax.lax.scan(outer, x, None, 3)[0], (8, 16))
    assert sent_by_kind(found) == {"all-reduce": 15 * 256, "all-gather": 3 * 256}


def test_a_loop_of_unknown_length_turns_as_often_as_the_caller_says(mesh):
    def body(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, once, x)

    assert [one.times for one in of(mesh, body, (8, 16), trips=7)] == [7]


def test_of_a_conditional_the_branch_counts_that_sends_most(mesh):
    def body(x):
        twice = [lambda x: once(jnp.sin(once(x))), lambda x: once(x), lambda x: x]
        return jax.lax.switch(jnp.int32(x[0, 0]), twice, x)

    assert sent_by_kind(of(mesh, body, (8, 16))) == {"all-reduce": 2 * 256}
    assert sent_by_kind(of(mesh, body, (8, 16), branch=min)) == {}


def test_a_program_without_a_mesh_sends_nothing():
    assert collectives(jax.jit(jnp.sin).lower(np.ones(3)).compile().as_text()) == []


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
        ("replica_groups=[2,4]<=[8], x", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", 4),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}, x", 8),
    ],
)
def test_groups_are_read_in_every_way_that_xla_writes_them(written, size):
    assert group_size(written) == size


def test_bytes_of_shapes_as_tpus_write_them():
    assert shape_bytes("bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)}") == 2 * 2**20
    assert shape_bytes("(f32[4]{0}, /*index=1*/pred[3]{0}, s4[5]{0}, f8e4m3fn[2]{0}, token[])") == 16 + 3 + 3 + 2


TPU = """
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[4,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %r = f32[8,16]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

%begins (p: bf16[4]) -> bf16[8] {
  ROOT %g = bf16[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
}

%async_collective_fusion.7 (p: bf16[4]) -> bf16[8] {
  ROOT %g = bf16[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
}

%ends (p: bf16[4]) -> bf16[8] {
  ROOT %g = bf16[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
}

%condition (t: (s32[], bf16[4], s32[])) -> pred[] {
  %t = (s32[]{:T(128)}, bf16[4]{0}, s32[]) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  %most = s32[] get-tuple-element(%t), index=2
  ROOT %lt = pred[]{:T(512)} compare(%n, %most), direction=LT
}

%body (t: (s32[], bf16[4], s32[])) -> (s32[], bf16[4], s32[]) {
  %t = (s32[]{:T(128)}, bf16[4]{0}, s32[]) parameter(0)
  %start = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), replica_groups=[1,2]<=[2], dimensions={0}
  %done = bf16[8]{0} all-gather-done(%start)
  %moved = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %fused = f32[4,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %async-collective-start = (bf16[4]{0}, bf16[8]{0}) fusion(%x), kind=kCustom, calls=%begins
  %beside = (f32[4,16]{1,0}, bf16[8]{0}) fusion(%x, %fused), kind=kOutput, calls=%async_collective_fusion.7
  %async-collective-done = bf16[8]{0} fusion(%x), kind=kCustom, calls=%ends
  ROOT %out = (s32[], bf16[4], s32[]) tuple(%n, %x, %most)
}

ENTRY %main (p: bf16[4]) -> bf16[4] {
  %p = bf16[4]{0} parameter(0)
  %first = s32[]{:T(128)} constant(2)
  %most = s32[]{:T(128)} constant(6)
  %t = (s32[]{:T(128)}, bf16[4]{0}, s32[]) tuple(%first, %p, %most)
  %w = (s32[]{:T(128)}, bf16[4]{0}, s32[]) while(%t), condition=%condition, body=%body
  "not an instruction = of ours"
  ROOT %out = bf16[4]{0} get-tuple-element(%w), index=1
}
"""


def test_a_tpus_loops_starts_and_fusions():
    """4 turns (2 to 6): the bounds entered with the loop. An all-reduce in a fusion of that name keeps one part; a
    gather that three fusions share, on one channel, is one."""
    assert collectives(TPU) == [
        Collective("all-gather", 16, 2, 4.0),
        Collective("collective-permute", 8, 2, 4.0),
        Collective("reduce-scatter", 512, 2, 4.0),
        Collective("all-gather", 16, 2, 4.0),
    ]
