"""The arguments of a run's programs, as shapes that know where they lie: nothing is allocated.

state_of(spec, config, compute).params["embed"]["embedding"]
# ShapeDtypeStruct(shape=(152064, 3584), dtype=float32, sharding=NamedSharding(mesh, P('tensor', 'fsdp')))
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from kardia_jax.config import Config, GrpoConfig, ModelConfig
from kardia_jax.hf import gguf
from kardia_jax.hf.read import config_of
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model.decoding import Storage
from kardia_jax.model.policy import Compute
from kardia_jax.model.shapes import SHAPES, named_shape
from kardia_jax.model.sharding import Column, everywhere, on_mesh, rows_sharding, shardings
from kardia_jax.model.spec import ModelSpec
from kardia_jax.placement import HOST
from kardia_jax.plan.memory import Shape, trees
from kardia_jax.rollout.sampler import ROWS, Rows, empty
from kardia_jax.types import GroupBatch, Params, TrainState
from kardia_jax.warmup import largest_rollouts


class Arguments(NamedTuple):
    """What the programs of a step are handed."""

    state: TrainState
    frozen: Params
    reference: Params | None
    full: Params
    """Trained and frozen parameters joined, as prefill reads them."""
    weights: Params
    """The sampler's copy, with which it decodes."""


def spec_of(config: ModelConfig) -> ModelSpec:
    """The model that will be trained: a built-in shape, a checkpoint's, or, where the checkpoint's folder is not there
    yet, the built-in shape that the folder is named after (models/qwen2.5-7b)."""
    path = pathlib.Path(config.source)
    if gguf.is_gguf(path) or path.is_dir():
        return ModelSpec.from_hf(config_of(path))
    return named_shape(path.name if path.name in SHAPES else config.source)


def arguments(spec: ModelSpec, config: Config, compute: Compute) -> Arguments:
    """State, frozen base and reference of this config, in host memory where it says so."""
    whole, lora, grpo = trees(spec, config, compute.dtype), config.model.lora, config.grpo
    zero = placed(jax.ShapeDtypeStruct((), jnp.int32), compute)
    moments = placed(whole.opt_state, compute, grpo.optimizer.offload)
    state = TrainState(zero, placed(whole.params, compute), moments, zero)
    frozen, reference = placed(whole.frozen, compute), None
    if grpo.loss.beta > 0:
        reference = frozen if lora.rank else placed(whole.params, compute, grpo.offload_reference)
    return Arguments(
        state, frozen, reference, placed(whole.full(lora), compute), placed(whole.weights, compute, column="used")
    )


def placed(tree: Any, compute: Compute, host: bool = False, column: Column = "stored") -> Any:
    """Parameters or moments where the table wants them, or in the memory of their hosts."""

    def one(leaf: Any, where: Sharding) -> jax.ShapeDtypeStruct:
        where = where.with_memory_kind(HOST) if host and leaf.ndim else where
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    if compute.mesh is None:
        return jax.tree.map(lambda leaf: one(leaf, SingleDeviceSharding(jax.devices()[0])), tree)
    return jax.tree.map(one, tree, shardings(tree, compute.mesh, column))


def batch_of(grpo: GrpoConfig, prompt_tokens: int, groups: int, compute: Compute, several: bool) -> GroupBatch:
    """The graded batch of so many groups, all as long as they may be, with what the loss reads of it."""
    batch = jax.eval_shape(lambda: largest_rollouts(grpo, grpo.prompts, prompt_tokens))
    logprobs = batch.sampler_logprobs
    batch = batch._replace(
        ref_logprobs=logprobs if grpo.loss.beta > 0 else None,
        old_logprobs=logprobs if several else None,
        entropy_floor=jax.ShapeDtypeStruct((), jnp.float32) if grpo.loss.top_entropy < 1 else None,
    )
    return on_rows(batch, compute, groups)


def on_rows(tree: Any, compute: Compute, groups: int) -> Any:
    """Arrays [P, ...] shared out over the mesh, cut to so many groups; scalars everywhere."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (groups, *leaf.shape[1:]) if leaf.ndim else ()
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_rows(compute) if leaf.ndim else _whole(compute))

    return jax.tree.map(one, tree)


def seats(spec: ModelSpec, compute: Compute, storage: Storage, shape: Shape, budget: int) -> Rows:
    """The sampler's state with room for every group that sits at once, its rings at their longest."""
    keys = jax.eval_shape(lambda: row_keys(0, Purpose.ROLLOUT, 0, jnp.arange(1), shape.group))
    sizes = {"prompts": shape.seated, "size": shape.prompt, "columns": shape.columns, "budget": budget}
    room = functools.partial(empty, spec, compute, storage, **sizes)
    rows = jax.eval_shape(on_mesh(compute.mesh, room), keys, jax.ShapeDtypeStruct((), jnp.int32))

    def part(axes: str, leaves: Any) -> Any:
        where = _whole(compute) if compute.mesh is None else rows_sharding(compute.mesh, axes)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), leaves)

    return jax.tree.map(part, ROWS, rows)


def _rows(compute: Compute) -> Sharding:
    return SingleDeviceSharding(jax.devices()[0]) if compute.mesh is None else rows_sharding(compute.mesh)


def _whole(compute: Compute) -> Sharding:
    return SingleDeviceSharding(jax.devices()[0]) if compute.mesh is None else everywhere(compute.mesh)
