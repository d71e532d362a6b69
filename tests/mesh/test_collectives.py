"""What a decode step sends, read from the compiled program: what the table implies and nothing else."""

import collections
import re

import jax.numpy as jnp
import pytest

from kardia_jax.keys import Purpose, row_keys
from kardia_jax.rollout.sampling import Controls

GROUPS, GROUP, VOCABULARY, WIDTH = 8, 2, 64, 16
LAYERS = {"qwen": 1, "gemma": 2}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")


def collectives(program: str) -> collections.Counter[tuple[str, str]]:
    """How often each kind of collective gives each shape: ("all-reduce", "f32[2,2,1,16]") -> 4."""
    found = collections.Counter()
    for shapes, kind in COLLECTIVE.findall(program):
        found.update((kind, shape) for shape in re.findall(r"\w+\[[\d,]*\]", shapes))
    return found


@pytest.fixture(scope="module")
def sent_by_decode(sampler_on):
    """(model, mesh) -> the collectives of its compiled decode."""

    def read(name: str, shape: str) -> collections.Counter[tuple[str, str]]:
        programs, params = sampler_on(name, shape)
        keys = row_keys(0, Purpose.ROLLOUT, 0, jnp.arange(GROUPS), GROUP)
        rows = programs.empty(keys[:1], 0, prompts=GROUPS, size=16, columns=8, budget=8)
        controls = Controls(jnp.float32(0.9), jnp.int32(0), jnp.float32(1), jnp.float32(0))
        weights = programs.weights(params)
        stops = jnp.asarray((3,), jnp.int32)
        return collectives(programs.decode.lower(weights, rows, controls, stops, 0, 8, 0).compile().as_text())

    return read


@pytest.mark.parametrize("shape", ["8x1x1", "1x8x1"])
def test_rows_alone_share_one_number_the_count_of_unfinished_rows(shape, sent_by_decode):
    assert sent_by_decode("qwen", shape) == {("all-reduce", "s32[]"): 1}


@pytest.mark.parametrize(("name", "shape"), [("qwen", "2x2x2"), ("qwen", "1x1x8"), ("gemma", "1x2x4")])
def test_a_layer_on_tensor_is_summed_twice_and_a_draw_gathers_one_number_for_each_block(name, shape, sent_by_decode):
    data, fsdp, tensor = map(int, shape.split("x"))
    groups = GROUPS // (data * fsdp)
    rows, hidden = groups * GROUP, f"f32[{groups},{GROUP},1,{WIDTH}]"
    wanted = {
        # After attention, after the mlp; and the input table's row, which one device has.
        ("all-reduce", hidden): 2 * LAYERS[name] + 1,
        # The draw: a sum for each block of 128 (here one a device), and the block itself.
        ("all-gather", f"f32[{rows},{tensor}]"): 1,
        ("all-reduce", f"f32[{rows},128]"): 1,
        # The largest (and again as greedy's), the sums of what is kept and of all, the chosen logit.
        ("all-reduce", f"f32[{rows}]"): 5,
        ("all-reduce", f"s32[{rows}]"): 1,
        # Only where top-k, top-p or min-p is on: whole rows to sort.
        ("all-gather", f"f32[{VOCABULARY},{rows}]"): 1,
    }
    if data * fsdp > 1:
        wanted["all-reduce", "s32[]"] = 1
    assert sent_by_decode(name, shape) == wanted


def test_the_pattern_finds_what_a_program_says():
    text = """
  %all-reduce.1 = f32[4,16]{1,0} all-reduce(%dot), channel_id=1
  %ag = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}
  ROOT %add = f32[] add(%a, %all-reduce.1)
"""
    assert collectives(text) == {
        ("all-reduce", "f32[4,16]"): 1,
        ("all-gather", "f32[2]"): 1,
        ("all-gather", "f32[16]"): 1,
    }
