"""The compiled programs - those of sampling, score, update - made here and nowhere else.

Everything under them is a plain function; of the training path only this module, and ``sharded.py`` for what goes in
and out of them, say ``jax.jit``. Shapes that vary (prompt and completion length) are padded to few sizes by the
callers, temperatures and filters are arrays, so a run compiles each program once per pair of sizes; the same model
evaluated again compiles nothing.

On a mesh (``Compute.mesh``) the same functions are traced with the table of ``model/sharding.py`` in force. What a
program changes - the state, sums, rows - comes out as it went in (``sharded.py``), so the second step compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from jaxtyping import Array, Float, Int

from kardia_jax.config import FULL, LoraConfig, MeshConfig, ModelConfig
from kardia_jax.grpo.micro_batches import micro_batches as cut_by_tokens
from kardia_jax.grpo.update import (
    Forward,
    Objective,
    Sums,
    apply_sums,
    completion_mask,
    make_accumulate,
    make_update,
    no_sums,
)
from kardia_jax.judge.sharing import SharedRows
from kardia_jax.keys import Purpose, key_for
from kardia_jax.model.backends import Machine
from kardia_jax.model.decoding import AS_COMPUTED, Storage, decoding_weights
from kardia_jax.model.head import sampled_logits
from kardia_jax.model.lora import joined, with_dropout
from kardia_jax.model.policy import Compute, group_hidden, group_logprobs, head_table
from kardia_jax.model.sharding import check_mesh, make_sampler_mesh, on_mesh, rows_sharding
from kardia_jax.model.shares import share_of
from kardia_jax.model.spec import ModelSpec
from kardia_jax.placement import on_device, own_rows
from kardia_jax.rollout import batching, sampler
from kardia_jax.rollout.batching import Generate
from kardia_jax.rollout.engine import SHORTEST
from kardia_jax.rollout.sending import Sender
from kardia_jax.sharded import in_place, looking, placed, sums_on
from kardia_jax.types import NOTHING, GroupBatch, Mean, Params, TrainState

Programs = Iterator[tuple[str, Compiled]]
"""A name with its shape, like ``update of 4 groups x (1024 + 8 x 512) tokens``, and the program."""
Score = Callable[[Params, GroupBatch, Float[Array, ""]], tuple[Array, Array]]
NextLogprobs = Callable[[Params, SharedRows], Array]


class CompiledUpdate(Protocol):
    """One update, compiled; the state is donated, so the caller must not use the old one again."""

    def __call__(
        self, state: TrainState, batch: GroupBatch, frozen: Params = NOTHING
    ) -> tuple[TrainState, dict[str, Mean]]:
        """The next state and undivided metrics; without ``frozen`` the state holds the whole model."""
        ...

    def programs(self, state: TrainState, batch: GroupBatch, frozen: Params = NOTHING) -> Programs:
        """Compiles what a call with arrays of these shapes runs; the call then finds it compiled. Nothing is run, but
        what a program adds to is there while the program is looked at."""
        ...


@dataclass(frozen=True)
class WholeUpdate:
    """All micro-batches and the optimizer's step in one program."""

    step: Any
    """Compiled: (state, batch, frozen) -> (state, metrics)."""
    mesh: Mesh | None = None

    def __call__(
        self, state: TrainState, batch: GroupBatch, frozen: Params = NOTHING
    ) -> tuple[TrainState, dict[str, Mean]]:
        return self.step(state, placed(batch, self.mesh), frozen)

    def programs(self, state: TrainState, batch: GroupBatch, frozen: Params = NOTHING) -> Programs:
        yield f"update of {shape_of(batch)}", self.step.lower(state, placed(batch, self.mesh), frozen).compile()


@dataclass(frozen=True)
class UpdateByTokens:
    """A program for every padded shape of micro-batch, each adding to the sums it is given, and one to end with."""

    budget: int
    """Tokens of a micro-batch; see ``grpo.micro_batches``."""
    shortest: int
    accumulate: Any
    """Compiled: (sums, params, micro-batch, place, update, frozen) -> (sums, metrics)."""
    apply: Any
    """Compiled: (state, sums) -> (state, metrics)."""
    start: Callable[[Params], Sums] = field(default_factory=lambda: jax.jit(no_sums))
    add: Callable[..., dict[str, Mean]] = field(
        default_factory=lambda: jax.jit(functools.partial(jax.tree.map, jnp.add))
    )
    mesh: Mesh | None = None

    def __call__(
        self, state: TrainState, batch: GroupBatch, frozen: Params = NOTHING
    ) -> tuple[TrainState, dict[str, Mean]]:
        sums, metrics = self.start(state.params), None
        for place, part in enumerate(self._parts(batch)):
            sums, means = self.accumulate(sums, state.params, part, np.int32(place), state.step, frozen)
            metrics = means if metrics is None else self.add(metrics, means)
        state, norms = self.apply(state, sums)
        return state, (metrics or {}) | norms

    def programs(self, state: TrainState, batch: GroupBatch, frozen: Params = NOTHING) -> Programs:
        sums, seen = self.start(state.params), set()
        for part in self._parts(batch):
            if shape_of(part) not in seen:
                lowered = self.accumulate.lower(sums, state.params, part, np.int32(0), state.step, frozen)
                yield f"gradient of {shape_of(part)}", lowered.compile()
            seen.add(shape_of(part))
        yield "optimizer", self.apply.lower(state, sums).compile()

    def _parts(self, batch: GroupBatch) -> Iterator[GroupBatch]:
        for part in cut_by_tokens(own_rows(batch), self.budget, self.shortest, share_of(self.mesh)):
            yield placed(part, self.mesh)


def shape_of(batch: GroupBatch) -> str:
    """Like ``4 groups x (1024 + 8 x 512) tokens``."""
    groups, group, completion = batch.completion_tokens.shape
    return f"{groups} groups x ({batch.prompt_tokens.shape[1]} + {group} x {completion}) tokens"


def compute_for(config: ModelConfig, mesh: Mesh | None = None, machine: Machine | None = None) -> Compute:
    """The compute settings for this machine or another: what the config leaves open is float32 and small slices of the
    vocabulary on CPU, bfloat16 and the whole of it elsewhere."""
    platform = machine.platform if machine else jax.default_backend()
    native, rows = ("float32", 1024) if platform == "cpu" else ("bfloat16", 0)
    dtype = native if config.dtype == "auto" else config.dtype
    chunks = config.head_chunk, config.vocab_chunk or rows
    return Compute(dtype, config.remat, *chunks, config.unroll, config.attention, mesh, machine=machine)


def sampling_compute(spec: ModelSpec, compute: Compute, config: MeshConfig) -> Compute:
    """The compute settings of the sampler: the learner's, unless it has devices of its own.

    Raises ConfigError for a model that its mesh does not divide.
    """
    mesh = make_sampler_mesh(config)
    check_mesh(spec, mesh, "mesh.sampler")
    return compute if mesh is None else dataclasses.replace(compute, mesh=mesh, apart=True)


@functools.cache
def make_generate(spec: ModelSpec, compute: Compute, storage: Storage = AS_COMPUTED, rows: int = 0) -> Generate:
    """``rollout.batching.roll_out`` with its compiled programs, for at most ``rows`` rows at once (0: no limit)."""
    return functools.partial(batching.roll_out, sampler_programs(spec, compute, storage), rows)


def sampler_programs(spec: ModelSpec, compute: Compute, storage: Storage) -> batching.Programs:
    """What ``roll_out`` calls."""

    def model(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, spec, compute, storage)

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if compute.mesh is None:
            return jax.jit(function, **options)
        out = jax.tree.map(functools.partial(rows_sharding, compute.mesh), sampler.ROWS)
        return jax.jit(on_mesh(compute.mesh, function), out_shardings=out, **options)

    return batching.Programs(
        weights=jax.jit(on_mesh(compute.mesh, lambda params: decoding_weights(spec, params, compute.dtype, storage))),
        empty=compiled(model(sampler.empty), static_argnames=("prompts", "size", "columns", "budget")),
        admit=compiled(model(sampler.admit), donate_argnames="rows"),
        decode=compiled(model(sampler.decode), donate_argnames="rows"),
        grow=compiled(sampler.grow, static_argnames="columns"),
        keep=compiled(sampler.keep),
        sent=sender(compute),
        share=share_of(compute.mesh),
        shared_out=functools.partial(placed, mesh=compute.mesh),
        look=looking(compute.mesh),
    )


def sender(compute: Compute) -> Callable[[Params], Params]:
    """What brings the parameters to where this sampler samples."""
    if compute.mesh is None or not compute.apart:
        return batching.stay
    return Sender(compute.mesh, jax.jit(lambda params: jax.tree.map(lambda leaf: leaf.astype(compute.dtype), params)))


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


@dataclass(frozen=True)
class ScoreOnMesh:
    """``score`` compiled for a mesh; the batch is shared out on its way in."""

    program: Any
    """Compiled: (params, batch, temperature) -> (logprobs, entropy)."""
    mesh: Mesh

    def __call__(self, params: Params, batch: GroupBatch, temperature: Float[Array, ""]) -> tuple[Array, Array]:
        return self.program(params, placed(batch, self.mesh), temperature)

    def lower(self, params: Params, batch: GroupBatch, temperature: Float[Array, ""]) -> Lowered:
        return self.program.lower(params, batch, temperature)


@functools.cache
def make_score(spec: ModelSpec, compute: Compute) -> Score:
    """``score`` compiled: (params, batch, temperature) -> (logprobs, entropy); parameters may be in host memory."""

    def fetch_and_score(params: Params, batch: GroupBatch, temperature: Float[Array, ""]) -> tuple[Array, Array]:
        return score(spec, compute, on_device(params), batch, temperature)

    mesh = compute.mesh
    if mesh is None:
        return jax.jit(fetch_and_score)
    program = jax.jit(on_mesh(mesh, fetch_and_score), out_shardings=rows_sharding(mesh))
    return ScoreOnMesh(program, mesh)


def next_logprobs(
    spec: ModelSpec, compute: Compute, levels: tuple[int, ...], params: Params, batch: SharedRows
) -> Float[Array, "P G M"]:
    """Log-prob (nats) of each token of ``levels`` as the next one of every row, among all tokens of the model.

    Row (p, g) is the first ``prefix_lengths[p, g]`` tokens of prefix p and the first ``suffix_lengths[p, g]`` of its
    suffix; a prefix is run once for all its rows. T is larger than any length, so the place behind a row is there.
    """
    prefix, prefix_lengths, suffix, suffix_lengths = map(jnp.asarray, batch)
    hidden = group_hidden(spec, compute, params, prefix, prefix_lengths, suffix)
    last = jnp.take_along_axis(hidden, suffix_lengths[..., None, None], 2)[:, :, 0]
    rows = last.reshape(-1, last.shape[-1])
    z = sampled_logits(rows, head_table(params), spec.sampled_tokens, spec.final_softcap)
    logprobs = z[jnp.array(levels)] - jax.nn.logsumexp(z, axis=0)
    return logprobs.T.reshape(*last.shape[:2], len(levels))


@functools.cache
def make_next_logprobs(spec: ModelSpec, compute: Compute, levels: tuple[int, ...]) -> NextLogprobs:
    """``next_logprobs`` compiled: (params, rows) -> log-probs; a program for every shape of rows."""
    return jax.jit(functools.partial(next_logprobs, spec, compute, levels))


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
    tokens_per_micro_batch: int | None = None,
) -> CompiledUpdate:
    """The update of a run.

    ``frozen`` is an argument of the program and stays the caller's. Masks of dropout follow from (seed, update,
    micro-batch). With ``tokens_per_micro_batch`` each shape of micro-batch is a program that adds to donated sums, and
    the optimizer's step is another; without, all is one program over ``micro_batches`` equal parts.
    """

    def forward_of(frozen: Params, step: Int[Array, ""]) -> Forward:
        def forward(trained: Params, part: GroupBatch, place: Int[Array, ""]) -> tuple[Array, Array]:
            params = learner_params(lora, seed, frozen, trained, step, place)
            return score(spec, compute, params, part, jnp.float32(temperature))

        return forward

    mesh = compute.mesh
    if tokens_per_micro_batch is not None:
        return update_by_tokens(forward_of, objective, optimizer, tokens_per_micro_batch, mesh=mesh)

    def update(state: TrainState, batch: GroupBatch, frozen: Params = NOTHING) -> tuple[TrainState, dict[str, Mean]]:
        return make_update(forward_of(frozen, state.step), objective, optimizer, micro_batches)(state, batch)

    return WholeUpdate(in_place(update, mesh), mesh)


def update_by_tokens(
    forward_of: Callable[[Params, Int[Array, ""]], Forward],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    budget: int,
    shortest: int = SHORTEST,
    mesh: Mesh | None = None,
) -> UpdateByTokens:
    """``make_compiled_update`` over micro-batches within ``budget`` tokens, for any forward pass (frozen, update) ->
    ``Forward``; one program per padded shape, and lengths are padded to ``shortest`` at least."""

    def accumulate(
        sums: Sums, params: Params, part: GroupBatch, place: Int[Array, ""], step: Int[Array, ""], frozen: Params
    ) -> tuple[Sums, dict[str, Mean]]:
        return make_accumulate(forward_of(frozen, step), objective)(sums, params, part, place)

    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Mean]]:
        return apply_sums(state, sums, optimizer)

    start = sums_on(mesh)
    return UpdateByTokens(budget, shortest, in_place(accumulate, mesh), in_place(apply, mesh), start, mesh=mesh)
