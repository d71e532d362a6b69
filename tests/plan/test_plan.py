"""Plans as a user makes them: from a config, in a process of its own."""

import dataclasses
import json

import pytest

from kardia_jax import chips, cli
from kardia_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    GrpoConfig,
    MeshConfig,
    ModelConfig,
    SamplerConfig,
    SamplerMeshConfig,
)
from kardia_jax.plan import report, run
from kardia_jax.plan.hlo import KINDS
from kardia_jax.plan.run import PlanError, devices_of

SAMPLER = SamplerConfig(temperature=0.9, max_new_tokens=32)
TINY = Config(
    data=DataConfig(max_prompt_tokens=64),
    model=ModelConfig(source="tiny-qwen3", dtype="bfloat16"),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    grpo=GrpoConfig(prompts=4, group=2, sampler=SAMPLER),
)


@pytest.fixture(scope="module")
def found():
    """Of a tiny model on 8 simulated devices; this process has two."""
    return run.plan(TINY, None, None, None)


def test_the_plan_is_one_json_object_of_known_fields(found):
    assert json.loads(json.dumps(found)) == found
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert found["devices"] == 8
    assert found["compiled_for"] == "cpu"
    assert [one["name"] for one in found["programs"]] == ["weights", "admit", "decode", "score", "update"]
    assert [one["chip"] for one in found["chips"]] == [one.name for one in chips.CHIPS]
    for program in found["programs"]:
        assert program["argument_bytes"] > 0
        assert set(program["sent_bytes"]) <= set(KINDS)
        assert not program["refused"]
    for one in found["chips"]:
        assert one["fits"]
        assert one["decided_by"] == "arithmetic"
        assert set(one["seconds"]) == set(one["bound"]) == set(one["flops"]) == {"prefill", "decode", "score", "update"}
        assert one["step_seconds"] == pytest.approx(sum(one["seconds"].values()))


def test_arguments_that_xla_counts_are_those_of_the_arithmetic(found):
    """The update takes parameters and moments; ids, log-probs and lengths of its batch are a few thousand bytes."""
    update = found["programs"][-1]
    held = found["chips"][0]["bytes"]
    batch = update["argument_bytes"] - held["parameters"] - held["moments"]
    assert 0 < batch < 0.01 * update["argument_bytes"]
    # The state is donated: only metrics are new.
    assert update["result_bytes"] < 1000


def test_the_weights_are_gathered_over_fsdp_once_and_the_report_says_so(found):
    """Half of the copy comes from the other device of the pair, as float32 on a CPU; norms lie everywhere already."""
    weights = found["programs"][0]
    copy = found["chips"][0]["bytes"]["sampler_weights"]
    assert set(weights["sent_bytes"]) == {"all-gather"}
    assert weights["sent_bytes"]["all-gather"] == pytest.approx(2 * copy / 2, rel=0.01)
    said = report.text(found)
    assert "weights gathers the parameters over fsdp (2 devices)" in said
    assert "Decoding gathers none" in said
    # Prefill gathers each layer's kernels as it comes to it; tables are not gathered for a lookup.
    assert set(found["parameter_gathers"]) <= {"weights", "admit"}
    assert found["parameter_gathers"]["weights"]["times"] == 1


def test_decoding_that_gathers_parameters_is_said_aloud(found):
    from kardia_jax.plan.compiled import Program
    from kardia_jax.plan.hlo import Collective
    from kardia_jax.plan.make import parameter_gathers

    every_token = [Collective("all-gather", 600, 2, 32.0), Collective("all-reduce", 10**6, 2, 32.0)]
    decode = Program("decode", "decode", 2, 0.0, 0, 0, 0, every_token, turns=32)
    update = decode._replace(name="update", phase="update")
    assert parameter_gathers([decode, update], 1000) == {"decode": {"bytes": 600, "times": 64}}
    assert parameter_gathers([decode], 2000) == {}, "small arrays are not the parameters"
    said = report.text(found | {"parameter_gathers": parameter_gathers([decode], 1000)})
    assert "decode gathers the parameters over fsdp (2 devices): <0.01 GiB on each device, 64 times a step" in said
    assert "Decoding gathers none" not in said


def test_the_report_names_every_chip_and_its_assumptions(found):
    said = report.text(found)
    for one in chips.CHIPS:
        assert f"| {one.name} " in said
    for words in (
        "parameters, float32",
        "40 % of flops",
        "stores attention scores",
        "A device sends in a step",
        "TFLOP of a device: prefill",
    ):
        assert words in said


def test_what_does_not_fit_says_which_knob_would_help(monkeypatch, found):
    small = dataclasses.replace(chips.chip("l40s"), memory=2**20)
    from kardia_jax.plan.abstract import spec_of
    from kardia_jax.plan.advice import advice, usable
    from kardia_jax.plan.make import compute_of
    from kardia_jax.plan.memory import memory

    spec, compute = spec_of(TINY.model), compute_of(TINY, None, None)
    said = advice(spec, TINY, compute, (1, 2, 1), usable(small), True)
    assert said[0].startswith("grpo.micro_batches 2: ")
    assert any(line.startswith("grpo.optimizer.offload True: ") for line in said)
    assert "of these together: " in said[-2]
    assert said[-2].endswith("still too much")
    assert said[-1] == "no mesh of up to 16 devices is enough by itself"
    # With room for all but the moments, offloading them is what makes it fit.
    held = memory(spec, TINY, compute, (1, 2, 1), True)
    enough = dataclasses.replace(small, memory=int((held.peak - held.moments // 2) / 0.94))
    assert held.peak > usable(enough)
    said = advice(spec, TINY, compute, (1, 2, 1), usable(enough), True)
    assert any("offload True" in line and "it fits" in line for line in said)
    assert not any("together" in line for line in said)
    # Twice the devices are enough.
    assert said[-1].startswith("mesh.data 1 mesh.fsdp 4 mesh.tensor 1 (4 devices): ")
    assert said[-1].endswith(", and it fits")


@pytest.mark.parametrize(
    ("fields", "asked", "said"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, {"devices": 8}, "data x fsdp x tensor = the number of devices"),
        ({"mesh": MeshConfig(fsdp=4, sampler=SamplerMeshConfig(data=4))}, {}, "Plan the two apart"),
        ({"mesh": MeshConfig(fsdp=-1)}, {}, "Add --devices N"),
        ({}, {"devices": 4, "topology": "v5e:2x4"}, "8, the chips of v5e:2x4"),
        ({}, {"chip": "h1000"}, "one of v5e, v5p, v6e, a100-40"),
        ({}, {"topology": "v5e:3x3"}, "v5e:2x2 2x4 4x4"),
        ({}, {"topology": "v5e:2x4", "chip": "h100"}, "v5e with topology v5e:2x4"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_starts(fields, asked, said):
    nothing = {"devices": None, "chip": None, "topology": None}
    with pytest.raises(ConfigError, match=said):
        run.plan(dataclasses.replace(TINY, **fields), **(nothing | asked))


def test_a_topology_without_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kardia_jax\[plan\]'"):
        run.plan(TINY, None, None, "v5e:2x4")


def test_what_the_model_does_not_divide_comes_back_from_the_planning_process(capsys):
    heads = ["--mesh.tensor", "8", "--model.source", "tiny-qwen3"]
    assert cli.main(["plan", *heads]) == 2
    assert "4 query heads" in capsys.readouterr().err
    rows = dataclasses.replace(TINY, mesh=MeshConfig(fsdp=8))
    with pytest.raises(PlanError, match="a multiple of 8"):
        run.plan(rows, None, None, None)


def test_devices_come_from_the_mesh_the_command_line_or_the_slice():
    assert devices_of(TINY, None, None) == 8
    open_ = dataclasses.replace(TINY, mesh=MeshConfig(fsdp=-1, tensor=2))
    assert devices_of(open_, 16, None) == 16
    assert devices_of(open_, None, "v5p:2x2x4") == 16


def test_every_slice_and_chip_is_one_of_the_table():
    for kind, sizes in chips.TOPOLOGIES.items():
        assert {chips.check_topology(f"{kind}:{size}").name for size in sizes} == {kind}
    assert chips.chip("h100").flops == 989.5e12
