"""The programs of a GRPO step, compiled for a mesh with abstract arguments: memory by XLA's account, and collectives.

``programs`` gives them one by one, in the order of a step; only one is held at a time. XLA's account of a program holds
its arguments, its results and what it needs between them, on one device.
"""

import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kardia_jax.config import Config
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective, no_sums
from kardia_jax.model.decoding import Storage
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec
from kardia_jax.plan.abstract import Arguments, batch_of, placed, seats
from kardia_jax.plan.hlo import Collective, collectives
from kardia_jax.plan.memory import MASTER, Shape
from kardia_jax.programs import (
    UpdateByTokens,
    WholeUpdate,
    make_compiled_update,
    make_score,
    sampler_programs,
)
from kardia_jax.rollout.sampling import Controls

STOPS = 4
"""Ids that end a completion: what they are changes nothing here."""
USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")


class Program(NamedTuple):
    """One compiled program; bytes are those of one device."""

    name: str
    phase: str
    """Of ``estimate.py``: prefill, decode, score or update."""
    times: float
    """Calls in a step."""
    seconds: float
    """To lower and compile."""
    arguments: int
    results: int
    """Those that take no argument's place."""
    temporaries: int
    collectives: list[Collective]
    turns: float = 1.0
    """Of its own loop in a call: the tokens of a completion, where it decodes."""
    kernels: int = 0
    """Pallas kernels that are called."""
    refused: str = ""
    """What the compiler said where it does not fit; the bytes are then 0."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return self.times * sum(one.sent for one in self.collectives)

    @property
    def gathered(self) -> float:
        """Bytes of what all-gathers bring together on a device in one turn."""
        return sum(one.bytes * one.times for one in self.collectives if one.kind == "all-gather") / self.turns


def programs(spec: ModelSpec, config: Config, compute: Compute, given: Arguments, shape: Shape) -> Iterator[Program]:
    """Sampling (the copy of the weights, prompts, decoding), scoring, the update: lowered and compiled in turn."""
    yield from sampling(spec, config, compute, given, shape)
    yield from learning(spec, config, compute, given, shape)


def sampling(spec: ModelSpec, config: Config, compute: Compute, given: Arguments, shape: Shape) -> Iterator[Program]:
    """Everything between parameters and completions."""
    settings, calls = config.grpo.sampler, shape.prompts / shape.seated
    storage = Storage(settings.kv_dtype, settings.weights_dtype)
    made: Any = sampler_programs(spec, compute, storage)
    yield _compiled("weights", "prefill", 1, made.weights.lower(given.full))
    rows = seats(spec, compute, storage, shape, settings.max_new_tokens)
    keys, tokens, lengths = rows.keys, _ids(shape.seated, shape.prompt), _ids(shape.seated)
    admitted = made.admit.lower(given.full, rows, tokens, lengths, keys, lengths, jnp.int32(0))
    yield _compiled("admit", "prefill", calls, admitted)
    controls, zero = Controls.from_config(settings), jnp.int32(0)
    decoded = made.decode.lower(given.weights, rows, controls, jnp.zeros(STOPS, jnp.int32), zero, zero, zero)
    filters = settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0
    branch = max if filters else functools.partial(unfiltered, spec.vocab_size * MASTER)
    yield _compiled("decode", "decode", calls, decoded, settings.max_new_tokens, branch)


def unfiltered(row: int, branches: list[Any], **how: Any) -> Any:
    """``max`` of the branches without those that gather whole rows of logits (``row`` bytes each), to filter them."""
    return max((found for found in branches if all(one.bytes < row for _, one in found)), **how)


def learning(spec: ModelSpec, config: Config, compute: Compute, given: Arguments, shape: Shape) -> Iterator[Program]:
    """Log-probs of the reference and of the old policy, as far as the loss reads them, and the updates."""
    grpo, prompt = config.grpo, config.data.max_prompt_tokens
    updates = grpo.minibatches * grpo.passes
    several, floored = updates > 1, grpo.loss.top_entropy < 1
    scored = (grpo.loss.beta > 0) + (several or floored)
    if scored:
        batch = batch_of(grpo, prompt, shape.prompts, compute, False)
        batch = batch._replace(ref_logprobs=None, entropy_floor=None)
        params = given.full if given.reference is None else given.reference
        program: Any = make_score(spec, compute)
        lowered = program.lower(params, batch, jnp.float32(1))
        yield _compiled("score", "score", scored, lowered)
    optimizer = make_optimizer(grpo.optimizer, 1)
    objective = grpo_objective(make_loss(grpo.loss, grpo.sampler.max_new_tokens))
    update = make_compiled_update(
        spec,
        compute,
        objective,
        optimizer,
        grpo.sampler.temperature,
        grpo.micro_batches,
        config.model.lora,
        config.run.seed,
        grpo.tokens_per_micro_batch,
    )
    size = shape.prompts // grpo.minibatches
    if isinstance(update, WholeUpdate):
        batch = batch_of(grpo, prompt, size, compute, several)
        yield _compiled("update", "update", updates, update.step.lower(given.state, batch, given.frozen))
    if isinstance(update, UpdateByTokens):
        part = batch_of(grpo, prompt, shape.micro, compute, several)
        sums = placed(jax.eval_shape(no_sums, given.state.params), compute)
        lowered = update.accumulate.lower(sums, given.state.params, part, jnp.int32(0), given.state.step, given.frozen)
        yield _compiled("gradient", "update", updates * size / shape.micro, lowered)
        yield _compiled("optimizer", "update", updates, update.apply.lower(given.state, sums))


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _compiled(
    name: str, phase: str, times: float, lowered: Any, turns: float = 1.0, branch: Callable[..., Any] = max
) -> Program:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = next((line for line in str(error).splitlines() if USED.search(line)), str(error).splitlines()[0])
        return Program(name, phase, times, time.perf_counter() - start, 0, 0, 0, [], refused=first[:300])
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Program(
        name,
        phase,
        times,
        time.perf_counter() - start,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives(text, turns, branch),
        turns,
        text.count('custom_call_target="tpu_custom_call"'),
    )
