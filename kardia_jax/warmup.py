"""The largest shapes of a run, compiled and checked before its first step.

A run that fits at its longest prompts and completions fits to the end. Nothing here costs a compilation of its own,
since the programs are those that the run then calls, and nothing changes a result: updates are compiled and not run,
scoring and sampling are run and their results thrown away.

    warm_update(update, state, batch, frozen, "grpo")    # MemoryShortageError: what is too large, and by how much
    with memory_errors("grpo"):
        ...                                               # RESOURCE_EXHAUSTED becomes a MemoryShortageError
"""

import math
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled
from jaxtyping import Key

from kardia_jax.config import Config, GrpoConfig
from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.hosts import alone
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.shares import share_of
from kardia_jax.placement import own_rows
from kardia_jax.policies import Policy
from kardia_jax.programs import CompiledUpdate, Score
from kardia_jax.rollout.engine import SHORTEST, Sampler, sample
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import GroupBatch, Params, TrainState

NEVER = -1
"""A stop id that no token has."""

KNOBS = {
    "grpo": (
        "Set grpo.tokens_per_micro_batch lower (or grpo.micro_batches higher), model.remat to block, model.head_chunk "
        "or grpo.sampler.max_new_tokens lower, grpo.optimizer.offload or grpo.offload_reference to True"
    ),
    "sft": (
        "Set sft.tokens_per_micro_batch lower (or sft.micro_batches higher), model.remat to block, model.head_chunk or "
        "data.max_prompt_tokens lower, sft.optimizer.offload to True"
    ),
}
"""What gives memory back, by the verb of the run; the first comes first."""


class MemoryShortageError(RuntimeError):
    """A program that does not fit: says what needs how much, what there is, and which fields change it."""


def warm_grpo(
    config: Config,
    policy: Policy,
    sampler: Sampler,
    score: Score,
    update: CompiledUpdate,
    state: TrainState,
    reference: Params | None,
    prompt: Sequence[int],
    mesh: Mesh | None = None,
) -> None:
    """Everything that a GRPO step runs, as if all its prompts were the longest, ``prompt``, and all completions full.

    Raises MemoryShortageError.
    """
    grpo, params = config.grpo, policy.full(state.params)
    # In a run of several processes each brings its own rows.
    own = grpo.prompts // share_of(mesh).parts
    keys = row_keys(config.run.seed, Purpose.ROLLOUT, 0, jnp.arange(own), grpo.group)
    with memory_errors("grpo"):
        warm_sampler(sampler, params, prompt, keys, Controls.from_config(grpo.sampler), grpo.sampler.max_new_tokens)
        batch = largest_rollouts(grpo, own, len(prompt))
        temperature, floored = jnp.float32(grpo.sampler.temperature), grpo.loss.top_entropy < 1
        if reference is not None:
            batch = batch._replace(ref_logprobs=score(reference, batch, temperature)[0])
        if grpo.off_policy or floored:
            old, entropy = score(params, batch, temperature)
            floor = entropy.min() if floored else None
            batch = batch._replace(old_logprobs=old if grpo.off_policy else None, entropy_floor=floor)
        batch = own_rows(batch) if not alone() else jax.block_until_ready(batch)
        size = own // grpo.minibatches
        part = jax.tree.map(lambda x: x if x.ndim == 0 else x[:size], batch)
    # Without lag the first update of a step is on-policy and has no old log-probs.
    first = [] if grpo.lag else [part._replace(old_logprobs=None)]
    for one in first + [part] * grpo.off_policy:
        warm_update(update, state, one, policy.frozen, "grpo")


def warm_sampler(
    sampler: Sampler,
    params: Params,
    prompt: Sequence[int],
    keys: Key[jax.Array, "P G"],
    controls: Controls,
    max_new_tokens: int,
) -> None:
    """Samples once, every prompt as long as the longest and every completion full, and forgets what came. Keys are
    derived: none is used up."""
    sampler = sampler._replace(stop_ids=(NEVER,) * len(sampler.stop_ids))
    sample(sampler, params, [prompt] * keys.shape[0], keys, controls, max_new_tokens)


def warm_update(update: CompiledUpdate, state: TrainState, batch: GroupBatch, frozen: Params, verb: str) -> None:
    """Compiles the update of this batch; raises MemoryShortageError where it cannot fit. Runs nothing."""
    held = {
        "parameters": bytes_of((state.params, frozen)),
        "optimizer state": bytes_of(state.opt_state),
        "gradient": bytes_of(state.params),
        "batch": bytes_of(batch),
    }
    with memory_errors(verb):
        for name, program in update.programs(state, batch, frozen):
            check_memory(name, program, held, free_bytes(), verb)


def largest_rollouts(grpo: GrpoConfig, prompts: int, prompt_tokens: int) -> GroupBatch:
    """The ungraded batch of a step with so many prompts of so many tokens, and completions that are all full."""
    most = grpo.sampler.max_new_tokens
    rows = (prompts, grpo.group)
    prompt, completion = length_buckets(max(SHORTEST, prompt_tokens)), min(length_buckets(max(SHORTEST, most)), most)
    return GroupBatch(
        prompt_tokens=jnp.zeros((prompts, prompt), jnp.int32),
        prompt_lengths=jnp.full(rows, prompt_tokens, jnp.int32),
        completion_tokens=jnp.zeros((*rows, completion), jnp.int32),
        completion_lengths=jnp.full(rows, completion, jnp.int32),
        advantages=jnp.zeros(rows),
        loss_rows=jnp.ones(rows, bool),
        sampler_logprobs=jnp.zeros((*rows, completion)),
    )


def check_memory(name: str, program: Compiled, held: dict[str, int], free: int | None, verb: str) -> None:
    """Raises MemoryShortageError when the program needs more bytes than are free; ``held`` is there already, by part.

    Of a program's memory its arguments are there, and results that take an argument's place cost nothing.
    """
    memory = program.memory_analysis()
    if memory is None or free is None:
        return
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if needed > free:
        there = ", ".join(f"{part} {_size(count)}" for part, count in held.items() if count)
        share = math.floor(100 * free / needed)
        raise MemoryShortageError(
            f"{name}: wanted {_size(needed)} for temporaries and results, got {_size(free)} that are free; that is "
            f"room for {share}% of it. Beside it: {there}. {KNOBS[verb]}."
        )


def free_bytes() -> int | None:
    """Of the device, or of the machine where devices are its own CPU; None where nobody says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    known = dict(line.split(":", 1) for line in lines)
    return int(known["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in known else None


def bytes_of(tree: Any) -> int:
    """Of all arrays in the tree, whichever memory they live in; on a mesh, of the part that one device keeps."""

    def kept(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(kept, jax.tree.leaves(tree)))


@contextmanager
def memory_errors(verb: str) -> Iterator[None]:
    """Inside, an allocation that fails raises MemoryShortageError with advice; other errors pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0][:300]
        raise MemoryShortageError(f"{first} {KNOBS[verb]}.") from error


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
