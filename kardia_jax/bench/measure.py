"""Step, sample and update: the programs of ``train.py`` on a fixed workload, timed by phase.

    records = measure_step(config, model)
    records["update"].seconds                # [first call, which compiles, then one number per measured step]

A step samples, scores the completions under the reference where ``beta`` is above 0, and updates once. Not in it: the
judge, decoding to text, reading data, and saving. Every phase waits for its results, as training does where it needs
them on the host; training lets the reference overlap with the judge, here it is timed alone.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Key

from kardia_jax.bench.workload import (
    PAD,
    Model,
    compute_of,
    grpo_of,
    random_advantages,
    random_completions,
    random_prompts,
)
from kardia_jax.config import BenchConfig, SamplerConfig
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective, init_state
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.decoding import Storage
from kardia_jax.observe.measures import to_host
from kardia_jax.observe.memory import peak_rss, reset_peak_rss
from kardia_jax.programs import CompiledUpdate, make_compiled_update, make_generate, make_score
from kardia_jax.rollout.batching import Generate
from kardia_jax.rollout.engine import Sampled, pad_rows
from kardia_jax.rollout.sampling import Controls
from kardia_jax.train import rollout_batch, with_logprobs
from kardia_jax.types import Params, TrainState

NO_TOKEN = -1
"""A stop id that no draw gives, so that every completion has all its tokens."""


class Record(NamedTuple):
    """One phase over all repetitions."""

    seconds: list[float]
    """The first call, which compiles, and the measured ones."""
    peaks: list[int]
    """Most resident memory of the process during each, bytes."""


class Records(dict[str, Record]):
    """Phases by name, in the order of their first run."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds one repetition; the block must wait for its own results."""
        record = self.setdefault(name, Record([], []))
        reset_peak_rss()
        start = time.perf_counter()
        yield
        record.seconds.append(time.perf_counter() - start)
        record.peaks.append(peak_rss())


def measure_step(config: BenchConfig, model: Model) -> Records:
    """Phases ``rollout``, ``reference`` (with ``beta``) and ``update`` of whole steps."""
    records, grpo = Records(), grpo_of(config)
    compute, prompts = compute_of(config), random_prompts(model.spec, config)
    generate, score = _generate(config, model), make_score(model.spec, compute)
    reference = jax.tree.map(jnp.copy, model.params) if config.beta > 0 else None
    update, state = _learner(config, model)
    for repetition in range(1 + config.steps):
        with records.phase("rollout"):
            keys = _keys(config, repetition)
            sampled = sample_groups(generate, state.params, prompts, keys, config.new_tokens)
        batch = rollout_batch(sampled, grpo)
        if reference is not None:
            with records.phase("reference"):
                batch = with_logprobs(batch, score, state.params, reference, grpo)
                jax.block_until_ready(batch)
        batch = batch._replace(advantages=jnp.asarray(random_advantages(config, repetition)))
        with records.phase("update"):
            state, means = update(state, batch)
            to_host(means)
    return records


def measure_sample(config: BenchConfig, model: Model) -> Records:
    """Phases ``prefill`` (completions of one token) and ``generate`` (all of it, prefill included)."""
    records, prompts = Records(), random_prompts(model.spec, config)
    generate = _generate(config, model)
    for repetition in range(1 + config.steps):
        keys = _keys(config, repetition)
        for name, new_tokens in (("prefill", 1), ("generate", config.new_tokens)):
            with records.phase(name):
                sample_groups(generate, model.params, prompts, keys, new_tokens)
    return records


def measure_update(config: BenchConfig, model: Model) -> Records:
    """Phase ``update`` alone, on random completions and, with ``beta``, reference log-probs of a uniform policy."""
    records, grpo = Records(), grpo_of(config)
    sampled = random_completions(model.spec, config)
    batch = rollout_batch(sampled, grpo)
    if config.beta > 0:
        batch = batch._replace(ref_logprobs=jnp.asarray(sampled.rollouts.tempered_logprobs))
    update, state = _learner(config, model)
    for repetition in range(1 + config.steps):
        batch = batch._replace(advantages=jnp.asarray(random_advantages(config, repetition)))
        with records.phase("update"):
            state, means = update(state, batch)
            to_host(means)
    return records


def sample_groups(
    generate: Generate, params: Params, prompts: list[list[int]], keys: Key[jax.Array, "P G"], new_tokens: int
) -> Sampled:
    """The compiled sampler as ``rollout.engine.sample`` calls it; ids come to the host and are not decoded."""
    prompt_tokens, prompt_lengths = pad_rows(prompts, PAD)
    rollouts = generate(
        params,
        prompt_tokens,
        prompt_lengths,
        keys,
        Controls.from_config(SamplerConfig()),
        (NO_TOKEN,),
        PAD,
        max_new_tokens=new_tokens,
    )
    assert (rollouts.lengths == new_tokens).all(), "a completion ended early"
    return Sampled(prompt_tokens, prompt_lengths, rollouts, [])


def _generate(config: BenchConfig, model: Model) -> Generate:
    storage = Storage(config.kv_dtype, config.weights_dtype)
    return make_generate(model.spec, compute_of(config), storage, config.rows)


def _keys(config: BenchConfig, repetition: int) -> Key[jax.Array, "P G"]:
    return row_keys(config.seed, Purpose.ROLLOUT, repetition, jnp.arange(config.prompts), config.group)


def _learner(config: BenchConfig, model: Model) -> tuple[CompiledUpdate, TrainState]:
    """The compiled update and step 0; the model's arrays go over into the state."""
    grpo, updates = grpo_of(config), 1 + config.steps
    optimizer = make_optimizer(grpo.optimizer, updates)
    objective = grpo_objective(make_loss(grpo.loss, config.new_tokens))
    temperature, micro_batches = grpo.sampler.temperature, config.micro_batches
    update = make_compiled_update(
        model.spec, compute_of(config), objective, optimizer, temperature, micro_batches, seed=config.seed
    )
    return update, init_state(model.params, optimizer)
