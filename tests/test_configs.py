"""Every shipped config builds, and one whole step of it has shapes that fit together."""

import pathlib

import jax
import pytest

from kardia_jax.cli import config_file
from kardia_jax.config import Config, from_json, to_json
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective
from kardia_jax.plan.abstract import arguments, batch_of, spec_of
from kardia_jax.plan.memory import memory, shape_of
from kardia_jax.programs import compute_for, make_compiled_update

FILES = sorted(path for path in pathlib.Path("configs").glob("*.py"))


def built(path: pathlib.Path) -> Config:
    return config_file([str(path)])


def test_there_are_configs_to_check():
    assert {"demo.py", "kardia_qwen2_5_7b.py", "kardia_qwen2_5_7b_lora.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_builds_and_its_step_has_a_shape(path):
    config = built(path)
    assert from_json(to_json(config)) == config
    spec, compute, grpo = spec_of(config.model), compute_for(config.model), config.grpo
    given, shape = arguments(spec, config, compute), shape_of(config, 1)
    update = make_compiled_update(
        spec,
        compute,
        grpo_objective(make_loss(grpo.loss, grpo.sampler.max_new_tokens)),
        make_optimizer(grpo.optimizer, 10),
        grpo.sampler.temperature,
        grpo.micro_batches,
        config.model.lora,
    )
    several = grpo.minibatches * grpo.passes > 1
    batch = batch_of(grpo, config.data.max_prompt_tokens, shape.prompts // grpo.minibatches, compute, several)
    state, metrics = jax.eval_shape(update.step, given.state, batch, given.frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), given.state)
    assert "loss" in metrics


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
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
    config = built(pathlib.Path("configs") / f"{name}.py")
    held = memory(spec_of(config.model), config, compute_for(config.model), sizes, True)
    assert held.peak < gib * 2**30
