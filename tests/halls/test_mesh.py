"""Whole runs on eight devices: what they write is what one device writes, and a run moves from mesh to mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from kardia_jax import run as run_module
from kardia_jax import scoring
from kardia_jax.config import MeshConfig, ModelConfig, SamplerMeshConfig
from kardia_jax.evaluate import evaluate
from kardia_jax.model.shapes import SHAPES, TINY
from kardia_jax.policies import load_policy
from kardia_jax.sft import train_sft
from kardia_jax.train import train_grpo

OCTO = dataclasses.replace(TINY, width=16, mlp_width=32, layers=1, heads=8, kv_heads=2, head_dim=8)
"""Eight devices divide it."""
CHANGE = 1e-3
"""Of a parameter after two updates with a learning rate of 1e-2: a tenth of what one of them moves it by."""
SMALL = {
    "grpo.steps": 2,
    "grpo.prompts": 8,
    "grpo.group": 2,
    "sft.batch": 8,
    "run.save_every": 1,
    "model.source": "octo",
}


@pytest.fixture(autouse=True, scope="module")
def octo():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "octo", OCTO)
        yield


@pytest.fixture(scope="module")
def start(octo):
    """Makes the start policy with parameters of its own, on one device."""
    policy = load_policy(ModelConfig(source="octo"), seed=0)
    return lambda: policy._replace(params=jax.tree.map(jax.numpy.copy, policy.params))


@pytest.fixture(autouse=True, scope="module")
def parsed(lenient_parse):
    """As ``every_text_counts``, for runs that a module shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "parse", lenient_parse)
        yield


@pytest.fixture(scope="module")
def alone(config_in, start, grader_of, tmp_path_factory):
    """Two steps on one device: the folder and the policy."""
    config = config_in(tmp_path_factory.mktemp("alone") / "run", SMALL)
    return config.run.dir, train_grpo(config, start(), grader_of())


def assert_near(policy, other) -> None:
    one, two = (jax.device_get(p.params) for p in (policy, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=CHANGE, rtol=0), one, two)


def said(folder, read_lines):
    return [(row["step"], row["completion"], row["reward"]) for row in read_lines(folder / "rollouts.jsonl")]


def test_a_run_begun_on_one_mesh_goes_on_on_another(alone, config_of, start, grader_of, killed_at, read_lines):
    fields = SMALL | {
        "mesh": MeshConfig(2, 2, 2),
        "grpo.optimizer.offload": True,
        "grpo.offload_reference": True,
    }
    with killed_at(run_module.Run, "finish_step", 2) as killed, pytest.raises(killed):
        train_grpo(config_of(fields), start(), grader_of())
    moved = config_of(fields | {"mesh": MeshConfig(1, -1, 1), "run.resume": True})
    policy = train_grpo(moved, start(), grader_of())
    assert said(moved.run.dir, read_lines) == said(alone[0], read_lines)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(policy.params)} == {8}
    assert_near(policy, alone[1])


def test_a_sampler_of_its_own_devices_says_the_same(alone, config_of, start, grader_of, read_lines):
    mesh = MeshConfig(1, 4, 1, SamplerMeshConfig(2, 1, 2))
    config = config_of(SMALL | {"mesh": mesh})
    policy = train_grpo(config, start(), grader_of())
    assert said(config.run.dir, read_lines) == said(alone[0], read_lines)
    assert {d.id for leaf in jax.tree.leaves(policy.params) for d in leaf.sharding.device_set} == {0, 1, 2, 3}
    assert_near(policy, alone[1])
    assert [row["compilations"] for row in read_lines(config.run.dir / "metrics.jsonl")][1:] == [0]


def test_supervised_training_on_a_mesh_learns_the_same(config_in, start, tmp_path):
    one = train_sft(config_in(tmp_path / "one", SMALL), start())
    many = train_sft(config_in(tmp_path / "many", SMALL | {"mesh": MeshConfig(4, 1, 2)}), start())
    assert_near(many, one)


def test_an_evaluation_on_a_mesh_gets_the_same_answers(config_in, start, grader_of, tmp_path):
    """Five prompts on eight devices: three seats are nobody's."""
    one = evaluate(config_in(tmp_path / "one", SMALL), start(), grader_of())
    many = evaluate(config_in(tmp_path / "many", SMALL | {"mesh": MeshConfig(8, 1, 1)}), start(), grader_of())
    assert [row["completion"] for row in many.rows] == [row["completion"] for row in one.rows]
