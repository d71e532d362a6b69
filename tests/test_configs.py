"""Every shipped config builds, and each program of its steps has shapes that fit together."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kardia_jax.config import from_json, load_config, to_json
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective, init_state, sft_objective
from kardia_jax.model.decoding import Storage
from kardia_jax.plan.abstract import arguments, batch_of, seats, spec_of
from kardia_jax.plan.memory import memory, shape_of
from kardia_jax.programs import compute_for, make_compiled_update, sampler_programs
from kardia_jax.rollout.sampling import Controls

FILES = sorted(path for path in pathlib.Path("configs").glob("*.py"))
each_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def same_shapes(after: Any, before: Any) -> bool:
    return jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)


def ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_there_are_configs_to_check():
    assert {"demo.py", "kardia_qwen2_5_7b.py", "kardia_qwen2_5_7b_lora.py"} <= {path.name for path in FILES}


@each_config
def test_a_shipped_config_builds_for_a_model_of_its_size(path):
    config = load_config(path)
    assert from_json(to_json(config)) == config
    spec = spec_of(config.model)
    given = arguments(spec, config, compute_for(config.model))
    base = given.frozen if config.model.lora.rank else given.state.params
    assert sum(leaf.size for leaf in jax.tree.leaves(base)) == spec.parameter_count


@each_config
def test_its_prompts_are_seated_and_decoded_in_the_abstract(path):
    config = load_config(path)
    spec, compute, sampler = spec_of(config.model), compute_for(config.model), config.grpo.sampler
    given, shape = arguments(spec, config, compute), shape_of(config, 1)
    storage = Storage(sampler.kv_dtype, sampler.weights_dtype)
    programs = sampler_programs(spec, compute, storage)
    assert same_shapes(jax.eval_shape(programs.weights, given.full), given.weights)
    rows = seats(spec, compute, storage, shape, sampler.max_new_tokens)
    prompts, lengths, number = ids(shape.seated, shape.prompt), ids(shape.seated), ids()
    seated = jax.eval_shape(programs.admit, given.full, rows, prompts, lengths, rows.keys, lengths, number)
    controls = Controls.from_config(sampler)
    after = jax.eval_shape(programs.decode, given.weights, seated, controls, ids(3), number, number, number)
    assert same_shapes(after, rows)
    drawn = shape.seated, config.grpo.group, sampler.max_new_tokens
    assert after.drawn.tokens.shape == after.drawn.sampler_logprobs.shape == drawn


@each_config
def test_its_update_and_its_warm_start_keep_the_shapes_of_the_state(path):
    config = load_config(path)
    spec, compute, grpo, sft = spec_of(config.model), compute_for(config.model), config.grpo, config.sft
    given, prompt = arguments(spec, config, compute), config.data.max_prompt_tokens
    objective = grpo_objective(make_loss(grpo.loss, grpo.sampler.max_new_tokens))
    optimizer = make_optimizer(grpo.optimizer, 10)
    update = make_compiled_update(
        spec, compute, objective, optimizer, grpo.sampler.temperature, grpo.micro_batches, config.model.lora
    )
    several = grpo.minibatches * grpo.passes > 1
    batch = batch_of(grpo, prompt, grpo.prompts // grpo.minibatches, compute, several)
    state, metrics = jax.eval_shape(update, given.state, batch, given.frozen)
    assert same_shapes(state, given.state)
    assert metrics["loss"].sum.shape == ()

    optimizer = make_optimizer(sft.optimizer, 10)
    start = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), given.state.params)
    update = make_compiled_update(spec, compute, sft_objective, optimizer, 1.0, sft.micro_batches, config.model.lora)
    batch = batch_of(grpo, prompt, sft.batch, compute, several=False)
    state, _ = jax.eval_shape(update, start, batch, given.frozen)
    assert same_shapes(state, start)


@each_config
def test_the_commands_of_its_docstring_name_files_that_are_there(path):
    words = path.read_text("utf-8").split('"""')[1].split()
    named = [word for word in words if word.startswith("configs/") and word.endswith(".py")]
    assert f"configs/{path.name}" in named
    assert all(pathlib.Path(word).is_file() for word in named)


@pytest.mark.parametrize(
    ("name", "sizes", "gib"),
    [
        ("kardia_qwen2_5_7b", (1, 4, 4), 15.04),
        ("kardia_qwen2_5_7b", (1, 4, 2), 75.2),
        ("kardia_qwen2_5_7b_lora", (1, 1, 1), 75.2),
    ],
)
def test_the_recipes_fit_the_chips_that_their_docstrings_name(name, sizes, gib):
    """16 x v5e, 8 GPUs of 80 GB, one GPU of 80 GB: by arithmetic."""
    config = load_config(pathlib.Path("configs") / f"{name}.py")
    held = memory(spec_of(config.model), config, compute_for(config.model), sizes, True)
    assert held.peak < gib * 2**30
