"""No backend rots unseen: the programs compile for a real TPU slice and lower for CUDA, on any machine."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kardia_jax.config import Config, DataConfig, GrpoConfig, MeshConfig, ModelConfig, SamplerConfig
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective
from kardia_jax.model.backends import Machine
from kardia_jax.model.decoding import AS_COMPUTED
from kardia_jax.model.sharding import on_mesh
from kardia_jax.plan import run
from kardia_jax.plan.abstract import arguments, batch_of, seats, spec_of
from kardia_jax.plan.make import mesh_of
from kardia_jax.plan.memory import shape_of
from kardia_jax.programs import compute_for, make_compiled_update, make_score, sampler_programs
from kardia_jax.rollout.sampling import Controls

MESHES = {"tiny-qwen3": MeshConfig(data=2, fsdp=2, tensor=2), "tiny-gemma": MeshConfig(data=2, fsdp=4)}
"""One kv head (Gemma) is not shared out."""


def config_of(name: str) -> Config:
    grpo = GrpoConfig(prompts=8, group=2, sampler=SamplerConfig(temperature=1.0, max_new_tokens=32))
    model = ModelConfig(source=name, dtype="bfloat16", remat="none")
    return Config(data=DataConfig(max_prompt_tokens=64), model=model, mesh=MESHES[name], grpo=grpo)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, which the extra `test` brings: it compiles for TPUs",
)
@pytest.mark.parametrize("name", list(MESHES))
def test_the_three_programs_compile_for_a_real_tpu_slice_with_its_attention(name):
    found = run.plan(config_of(name), None, None, "v5e:2x4")
    programs = {one["name"]: one for one in found["programs"]}
    assert list(programs) == ["weights", "admit", "decode", "score", "update"]
    for program in ("admit", "score", "update"):
        assert programs[program]["kernels"] > 0, "splash is not in it"
    [chip] = found["chips"]
    assert (chip["chip"], chip["attention"], chip["decided_by"], chip["fits"]) == ("v5e", "splash", "compiler", True)
    update = programs["update"]
    # A TPU pads small arrays to tiles, so its count is larger than the arithmetic's, never smaller.
    assert update["argument_bytes"] >= chip["bytes"]["parameters"] + chip["bytes"]["moments"]
    assert chip["peak_bytes"]["compiled"] > update["argument_bytes"]


@pytest.mark.parametrize(("name", "meshed"), [("tiny-qwen3", False), ("tiny-gemma", False), ("tiny-qwen3", True)])
def test_the_three_programs_lower_for_cuda_with_its_attention(name, meshed):
    config = config_of(name) if meshed else dataclasses.replace(config_of(name), mesh=MeshConfig())
    spec, grpo, sizes = spec_of(config.model), config.grpo, config.mesh.sizes(8 if meshed else 1)
    compute = compute_for(config.model, mesh_of(sizes, None), Machine("gpu", (9, 0)))
    given, shape = arguments(spec, config, compute), shape_of(config, sizes[0] * sizes[1])
    made = sampler_programs(spec, compute, AS_COMPUTED)
    rows = seats(spec, compute, AS_COMPUTED, shape, 32)
    zero, lengths = jnp.int32(0), jax.ShapeDtypeStruct((8,), jnp.int32)
    tokens, stops = jax.ShapeDtypeStruct((8, shape.prompt), jnp.int32), jnp.zeros(1, jnp.int32)
    batch = batch_of(grpo, 64, 8, compute, several=False)
    objective, optimizer = grpo_objective(make_loss(grpo.loss, 32)), make_optimizer(grpo.optimizer, 1)
    score: Any = make_score(spec, compute)
    update: Any = make_compiled_update(spec, compute, objective, optimizer, 1.0, 1)
    step = jax.jit(on_mesh(compute.mesh, update.step.function)) if meshed else update.step
    controls = Controls.from_config(grpo.sampler)
    unscored = batch._replace(ref_logprobs=None)
    traced = {
        "admit": made.admit.trace(given.full, rows, tokens, lengths, rows.keys, lengths, zero),
        "decode": made.decode.trace(given.weights, rows, controls, stops, zero, zero, zero),
        "score": (score.program if meshed else score).trace(given.full, unscored, jnp.float32(1)),
        "update": step.trace(given.state, batch, {}),
    }
    text = {key: one.lower(lowering_platforms=("cuda",)).as_text() for key, one in traced.items()}
    for program in ("admit", "score", "update"):
        assert "__cudnn$fmha" in text[program], program
    assert "__cudnn$fmhaSoftmaxBackward" in text["update"]
    assert "__cudnn" not in text["decode"]
