"""The model and the data that are measured: real parameters or random ones, random ids of exactly the lengths asked.

What is measured does not depend on what the ids say, with one exception that is closed off: no draw ends a completion,
because the only stop id, -1, is no token.
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kardia_jax.bench.work import Lengths
from kardia_jax.config import (
    BenchConfig,
    ConfigError,
    GrpoConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
)
from kardia_jax.hf.container import Dtype
from kardia_jax.hf.read import config_of, load_arrays
from kardia_jax.keys import Purpose, key_for
from kardia_jax.model.policy import Compute, init
from kardia_jax.model.shapes import SHAPES
from kardia_jax.model.spec import ModelSpec
from kardia_jax.programs import compute_for
from kardia_jax.rollout.engine import Sampled, pad_rows
from kardia_jax.types import Params, Rollouts

PAD = 0
"""Behind a prompt; never read."""


class Model(NamedTuple):
    """What is measured."""

    spec: ModelSpec
    params: Params


def lengths_of(config: BenchConfig) -> Lengths:
    """The workload's four numbers."""
    return Lengths(config.prompts, config.group, config.prompt_len, config.new_tokens)


def compute_of(config: BenchConfig) -> Compute:
    """How the arithmetic is done, by the rule that training follows."""
    names = ("dtype", "remat", "head_chunk", "vocab_chunk", "unroll", "attention")
    return compute_for(ModelConfig(**{name: getattr(config, name) for name in names}))


def grpo_of(config: BenchConfig) -> GrpoConfig:
    """The training config of this workload. Its ``group`` stays the default: the group's size comes with the batch,
    and a group of one, where the curves begin, is refused in training."""
    return GrpoConfig(
        prompts=config.prompts,
        micro_batches=config.micro_batches,
        sampler=SamplerConfig(temperature=1.0, max_new_tokens=config.new_tokens),
        loss=LossConfig(beta=config.beta),
        optimizer=OptimizerConfig(),
    )


def load_model(config: BenchConfig, dtype: Dtype) -> Model:
    """The model that the config names, its parameters in this type; refused where the lengths outrun its positions."""
    spec = read_spec(config.model)
    fix, length = "Lower prompt_len or new_tokens.", config.prompt_len + config.new_tokens
    if length > spec.max_positions:
        raise ConfigError("prompt_len + new_tokens", f"at most {spec.max_positions} positions", length, fix)
    if config.model in SHAPES:
        return Model(spec, random_params(spec, dtype, config.seed))
    return Model(spec, load_arrays(pathlib.Path(config.model), spec, dtype=dtype))


def read_spec(model: str) -> ModelSpec:
    """The spec of a built-in shape or of a checkpoint; ConfigError where there is neither."""
    if model in SHAPES:
        return SHAPES[model]
    path = pathlib.Path(model)
    if not path.exists():
        raise ConfigError("model", f"a directory, a GGUF file or one of {', '.join(SHAPES)}", model)
    return ModelSpec.from_hf(config_of(path))


def random_params(spec: ModelSpec, dtype: Dtype, seed: int) -> Params:
    """Random parameters, made in one program so that no second copy in float32 need exist."""

    def cast(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), init(spec, key))

    return jax.jit(cast)(key_for(seed, Purpose.INIT))


def random_prompts(spec: ModelSpec, config: BenchConfig) -> list[list[int]]:
    """P rows of exactly ``prompt_len`` ids."""
    draw = np.random.default_rng(config.seed)
    return draw.integers(spec.sampled_tokens, size=(config.prompts, config.prompt_len)).tolist()


def random_completions(spec: ModelSpec, config: BenchConfig) -> Sampled:
    """What the sampler would hand over, without sampling: an update's input."""
    draw = np.random.default_rng(config.seed + 1)
    shape = (config.prompts, config.group, config.new_tokens)
    tokens = draw.integers(spec.sampled_tokens, size=shape, dtype=np.int32)
    lengths = np.full(shape[:2], config.new_tokens, np.int32)
    uniform = np.full(shape, -np.log(spec.sampled_tokens), np.float32)
    rollouts = Rollouts(tokens, lengths, uniform, uniform, np.zeros(shape[:2], bool))
    prompt_tokens, prompt_lengths = pad_rows(random_prompts(spec, config), PAD)
    return Sampled(prompt_tokens, prompt_lengths, rollouts, [])


def random_advantages(config: BenchConfig, repetition: int) -> Float[np.ndarray, "P G"]:
    """What a judge and ``group_advantages`` would give."""
    draw = np.random.default_rng((config.seed, repetition))
    return draw.standard_normal((config.prompts, config.group)).astype(np.float32)
