"""The three compiled programs - generate, score, update - made here and nowhere else.

Everything under them is a plain function; this is the only place of the training path that says ``jax.jit``. Shapes
that vary (prompt and completion length) are padded to few sizes by the callers, temperatures and filters are arrays,
so a run compiles each program once per pair of sizes; the same model evaluated again compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kardia_jax.config import FULL, LoraConfig, ModelConfig
from kardia_jax.grpo.update import Objective, completion_mask, make_update
from kardia_jax.keys import Purpose, key_for
from kardia_jax.model.decoding import AS_COMPUTED, Storage, decoding_weights
from kardia_jax.model.lora import joined, with_dropout
from kardia_jax.model.policy import Compute, group_logprobs
from kardia_jax.model.spec import ModelSpec
from kardia_jax.rollout import sampler
from kardia_jax.rollout.batching import Generate, Programs, roll_out
from kardia_jax.types import NOTHING, GroupBatch, Mean, Params, TrainState

CompiledUpdate = Callable[..., tuple[TrainState, dict[str, Mean]]]
"""(state, batch, frozen) -> (state, undivided metrics); without ``frozen`` the state holds the whole model."""
Score = Callable[[Params, GroupBatch, Float[Array, ""]], tuple[Array, Array]]


def compute_for(config: ModelConfig) -> Compute:
    """The compute settings of this machine: ``auto`` is float32 on CPU and bfloat16 elsewhere."""
    native = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = native if config.dtype == "auto" else config.dtype
    return Compute(dtype, config.remat, config.head_chunk, config.unroll, config.attention)


@functools.cache
def make_generate(spec: ModelSpec, compute: Compute, storage: Storage = AS_COMPUTED, rows: int = 0) -> Generate:
    """``rollout.batching.roll_out`` with its compiled programs, for at most ``rows`` rows at once (0: no limit)."""

    def model(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, spec, compute, storage)

    programs = Programs(
        weights=jax.jit(lambda params: decoding_weights(spec, params, compute.dtype, storage)),
        empty=jax.jit(model(sampler.empty), static_argnames=("size", "columns", "budget")),
        admit=jax.jit(model(sampler.admit), donate_argnames="rows"),
        decode=jax.jit(model(sampler.decode), donate_argnames="rows"),
        grow=jax.jit(sampler.grow, static_argnames="columns"),
        keep=jax.jit(sampler.keep),
    )
    return functools.partial(roll_out, programs, rows)


def score(
    spec: ModelSpec, compute: Compute, params: Params, batch: GroupBatch, temperature: Float[Array, ""]
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """Log-prob and entropy (nats) of every completion token that may contribute to the loss; 0 elsewhere."""
    return group_logprobs(
        spec,
        compute,
        params,
        batch.prompt_tokens,
        batch.prompt_lengths,
        batch.completion_tokens,
        completion_mask(batch),
        temperature,
    )


@functools.cache
def make_score(spec: ModelSpec, compute: Compute) -> Score:
    """``score`` compiled: (params, batch, temperature) -> (logprobs, entropy)."""
    return jax.jit(functools.partial(score, spec, compute))


def learner_params(
    lora: LoraConfig, seed: int, frozen: Params, trained: Params, step: Int[Array, ""], place: Int[Array, ""]
) -> Params:
    """What the gradient pass reads: as everywhere else, with the adapter's dropout if it has one."""
    params = joined(lora, frozen, trained)
    return with_dropout(params, lora.dropout, key_for(seed, Purpose.DROPOUT, step, place)) if lora.dropout else params


def make_compiled_update(
    spec: ModelSpec,
    compute: Compute,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    temperature: float,
    micro_batches: int,
    lora: LoraConfig = FULL,
    seed: int = 0,
) -> CompiledUpdate:
    """One update, compiled; the state is donated, so the caller must not use the old one again.

    ``frozen`` is an argument of the program and stays the caller's. Masks of dropout follow from (seed, update,
    micro-batch).
    """

    def update(state: TrainState, batch: GroupBatch, frozen: Params = NOTHING) -> tuple[TrainState, dict[str, Mean]]:
        def forward(trained: Params, part: GroupBatch, place: Int[Array, ""]) -> tuple[Array, Array]:
            params = learner_params(lora, seed, frozen, trained, state.step, place)
            return score(spec, compute, params, part, jnp.float32(temperature))

        return make_update(forward, objective, optimizer, micro_batches)(state, batch)

    return jax.jit(update, donate_argnums=0)
