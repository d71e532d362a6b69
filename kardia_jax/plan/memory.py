"""Bytes per device by arithmetic: what lies in a chip's memory while a step samples and while it updates.

Parameters, moments and gradients follow from the model and the table of ``model/sharding.py`` and are exact. For a 7B
model (7.6e9 parameters) on 4 x 4 devices (fsdp x tensor) each is 7.6e9 x 4 / 16 = 1.9 GB, and the sampler's copy, which
is bfloat16 and gathered over fsdp, 7.6e9 x 2 / 4 = 3.8 GB.

Activations are an estimate: of what the backward pass keeps all arrays are counted, of what lives for one layer or one
slice of the head the large ones, twice (value and gradient). A compiler may keep more (copies, layouts, padding) or
less.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kardia_jax.config import Config, GrpoConfig, LoraConfig
from kardia_jax.config.mesh import AXES, Sizes
from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.model.decoding import Storage, decoding_weights
from kardia_jax.model.lora import init_adapter, joined
from kardia_jax.model.policy import Compute, init
from kardia_jax.model.sharding import Column, shardings
from kardia_jax.model.spec import ModelSpec
from kardia_jax.rollout.engine import SHORTEST
from kardia_jax.types import NOTHING, Params

MASTER = 4
"""Bytes of a float32."""


class Memory(NamedTuple):
    """Bytes on one device; what is kept in its host's memory is not among them."""

    parameters: int
    """What is trained, float32."""
    moments: int
    frozen: int
    """The base under an adapter."""
    reference: int
    gradients: int
    """While an update runs: the sum over micro-batches, and that of the micro-batch that is added to it."""
    sampler_weights: int
    """While completions are sampled: the copy in the compute type, adapters merged, gathered over fsdp."""
    kv: int
    """Keys and values of prompts and completions, at their longest."""
    sampling: int
    """Logits of a decode step, what prefill holds, or the gathered stack of blocks of which the sampler's copy is made:
    whichever is most."""
    activations: int
    """Of one micro-batch, the head's slice included."""

    @property
    def resident(self) -> int:
        """There all the time."""
        return self.parameters + self.moments + self.frozen + self.reference

    @property
    def sample_peak(self) -> int:
        """While completions are sampled."""
        return self.resident + self.sampler_weights + self.kv + self.sampling

    @property
    def update_peak(self) -> int:
        """While the gradient is computed."""
        return self.resident + self.gradients + self.activations

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.sample_peak, self.update_peak)


class Shape(NamedTuple):
    """The longest batch of a run, and what of it one device holds at once."""

    prompts: int
    group: int
    prompt: int
    """Padded tokens of a prompt."""
    completion: int
    columns: int
    """Tokens of a completion that the sampler has room for: a power of two."""
    seated: int
    """Groups that are sampled at once."""
    micro: int
    """Groups of a micro-batch, over all devices."""

    @property
    def tokens(self) -> int:
        """Of one group: its prompt once, its completions."""
        return self.prompt + self.group * self.completion


def shape_of(config: Config, shards: int) -> Shape:
    """The longest batch of the config, on a mesh that shares rows out over so many devices."""
    grpo, most = config.grpo, config.grpo.sampler.max_new_tokens
    prompt = length_buckets(max(SHORTEST, config.data.max_prompt_tokens))
    completion = min(length_buckets(max(SHORTEST, most)), most)
    first = min(64, length_buckets(most))
    columns = first * 2 ** max(0, math.ceil(math.log2(most / first)))
    rows = grpo.sampler.rows
    at_once = min(grpo.prompts, max(1, rows // grpo.group)) if rows else grpo.prompts
    seated = -(-at_once // shards) * shards
    return Shape(
        grpo.prompts, grpo.group, prompt, completion, columns, seated, micro_groups(grpo, prompt, completion, shards)
    )


def micro_groups(grpo: GrpoConfig, prompt: int, completion: int, shards: int) -> int:
    """Groups of the largest micro-batch; a budget of tokens is that of each device that shares rows."""
    update = grpo.prompts // grpo.minibatches
    if grpo.tokens_per_micro_batch is None:
        return update // grpo.micro_batches
    fitting = max(1, grpo.tokens_per_micro_batch // (prompt + grpo.group * completion))
    each = next(count for count in range(fitting, 0, -1) if length_buckets(count) == count)
    return min(update, each * shards)


class Trees(NamedTuple):
    """A run's state as shapes, nothing allocated."""

    params: Params
    frozen: Params
    opt_state: Any
    weights: Params
    """The sampler's copy."""

    def full(self, lora: LoraConfig) -> Params:
        """What the model reads."""
        return jax.eval_shape(functools.partial(joined, lora), self.frozen, self.params)


@functools.lru_cache(maxsize=8)
def trees(spec: ModelSpec, config: Config, dtype: str) -> Trees:
    """Parameters, optimizer state and the sampler's copy of this config."""
    lora, sampling = config.model.lora, config.grpo.sampler
    key = jax.random.key(0)
    params = whole = jax.eval_shape(functools.partial(init, spec), key)
    frozen = NOTHING
    if lora.rank:
        params = jax.eval_shape(functools.partial(init_adapter, lora, whole), key)
        frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(lora.base)), whole)
    copied = functools.partial(decoding_weights, spec, dtype=dtype, storage=Storage(weights=sampling.weights_dtype))
    read = jax.eval_shape(functools.partial(joined, lora), frozen, params)
    moments = jax.eval_shape(make_optimizer(config.grpo.optimizer, 1).init, params)
    return Trees(params, frozen, moments, jax.eval_shape(lambda params: copied(params=params), read))


def bytes_on_device(tree: Any, mesh: AbstractMesh, column: Column = "stored") -> int:
    """Of all arrays of a tree that the table shares out over this mesh."""
    placed = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh, column)), strict=True)
    return sum(math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in placed)


def abstract_mesh(sizes: Sizes) -> AbstractMesh:
    """The mesh of these sizes (data, fsdp, tensor) without devices."""
    return AbstractMesh(sizes, AXES)


def memory(spec: ModelSpec, config: Config, compute: Compute, sizes: Sizes, fused: bool) -> Memory:
    """Bytes per device of a GRPO run; ``fused`` where attention is a kernel that stores no scores."""
    data, fsdp, tensor = sizes
    mesh, grpo, lora = abstract_mesh(sizes), config.grpo, config.model.lora
    whole = trees(spec, config, compute.dtype)
    shape, element = shape_of(config, data * fsdp), jnp.dtype(compute.dtype).itemsize
    parameters = bytes_on_device(whole.params, mesh)
    copy = bytes_on_device(whole.weights, mesh, "used")
    needs_reference = grpo.loss.beta > 0 and not lora.rank and not grpo.offload_reference
    return Memory(
        parameters=parameters,
        moments=0 if grpo.optimizer.offload else bytes_on_device(whole.opt_state, mesh),
        frozen=bytes_on_device(whole.frozen, mesh),
        reference=parameters if needs_reference else 0,
        gradients=2 * parameters,
        sampler_weights=copy,
        kv=kv_bytes(spec, config, shape, element, sizes),
        sampling=max(
            copy if fsdp > 1 else 0,
            logits_bytes(spec, -(-shape.seated // (data * fsdp)) * shape.group, tensor),
            prefill_bytes(spec, compute, shape, element, sizes, fused),
        ),
        activations=activation_bytes(spec, compute, shape, element, sizes, fused),
    )


def kv_bytes(spec: ModelSpec, config: Config, shape: Shape, element: int, sizes: Sizes) -> int:
    """Prompts once per group, and each completion's ring. Of kv heads that are fewer than ``tensor`` each device keeps
    one."""
    data, fsdp, tensor = sizes
    kind = config.grpo.sampler.kv_dtype
    place = spec.head_dim * {"compute": element, "bfloat16": 2, "int8": 1}[kind] + (MASTER if kind == "int8" else 0)
    heads = max(spec.kv_heads, tensor) // tensor
    groups = -(-shape.seated // (data * fsdp))
    return 2 * spec.layers * heads * place * groups * (shape.prompt + shape.group * shape.columns)


def logits_bytes(spec: ModelSpec, rows: int, tensor: int) -> int:
    """Float32 logits, these over the temperature, and their exponentials."""
    return 3 * rows * spec.vocab_size * MASTER // tensor


def layer_bytes(spec: ModelSpec, tokens: int, element: int, tensor: int) -> tuple[int, int]:
    """What one block's linear layers and attention give for so many tokens, and all else that its backward pass
    reads."""
    heads = (2 * spec.heads + 2 * max(spec.kv_heads, tensor)) * spec.head_dim // tensor
    products = heads + spec.width + 2 * spec.mlp_width // tensor
    rest = 3 * spec.width + spec.mlp_width // tensor
    return tokens * products * element, tokens * rest * element


def scores_bytes(spec: ModelSpec, shape: Shape, groups: int, tensor: int) -> int:
    """Scores of one layer where attention is not fused: float32, of a group's queries with all keys they may see."""
    own = shape.group * shape.completion
    pairs = max(shape.prompt * shape.prompt, own * shape.prompt + own * shape.completion)
    return groups * spec.heads // tensor * pairs * MASTER


def gathered_bytes(spec: ModelSpec, element: int, tensor: int) -> int:
    """One block's weights as a layer reads them: whole but for ``tensor``."""
    attention = spec.width * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    return (attention + 3 * spec.width * spec.mlp_width) * element // tensor


def prefill_bytes(spec: ModelSpec, compute: Compute, shape: Shape, element: int, sizes: Sizes, fused: bool) -> int:
    """The prompts of one admission: keys and values of all layers before they are seated, and one layer at work."""
    data, fsdp, tensor = sizes
    groups = -(-shape.seated // (data * fsdp))
    tokens = groups * shape.prompt
    kept = 2 * spec.layers * max(spec.kv_heads, tensor) // tensor * spec.head_dim * tokens * element
    scores = 0 if fused else groups * spec.heads // tensor * shape.prompt**2 * MASTER
    return kept + sum(layer_bytes(spec, tokens, element, tensor)) + scores + gathered_bytes(spec, element, tensor)


def activation_bytes(spec: ModelSpec, compute: Compute, shape: Shape, element: int, sizes: Sizes, fused: bool) -> int:
    """What a micro-batch's gradient needs beside parameters and gradients, on one device."""
    data, fsdp, tensor = sizes
    groups = -(-shape.micro // (data * fsdp))
    tokens = groups * shape.tokens
    products, rest = layer_bytes(spec, tokens, element, tensor)
    stream = tokens * spec.width * element
    kept = stream + {"block": 0, "dots": products, "none": products + rest}[compute.remat]
    scores = 0 if fused else 2 * scores_bytes(spec, shape, groups, tensor)
    working = 2 * (products + rest) + scores + 2 * gathered_bytes(spec, element, tensor)
    return spec.layers * kept + max(working, head_bytes(spec, compute, groups * shape.group * shape.completion, tensor))


def head_bytes(spec: ModelSpec, compute: Compute, tokens: int, tensor: int) -> int:
    """Logits of a slice, their softmax and gradient; the table as it is read, and its float32 gradient."""
    rows = spec.vocab_size // tensor
    element = jnp.dtype(compute.dtype).itemsize
    logits = min(compute.head_chunk, tokens) * min(compute.vocab_chunk or rows, rows)
    return 3 * logits * MASTER + rows * spec.width * (element + MASTER) + 2 * tokens * spec.width * element
