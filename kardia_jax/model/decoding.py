"""The policy one token at a time: what the sampler reads, keeps, and does in a step.

A group of G completions shares one prompt, whose keys and values are kept once. Each row keeps its own in a ring of T
columns: token number n goes to column n mod T for every row, whenever its group began, so that a write is one slice.
How far back a column lies from the newest is its age, and a row sees as many ages as it has tokens::

    T = 4, step 5 is being written, group A began at step 1, group B at step 4

    column      0    1    2    3
    holds step  4    5    2    3
    age         1    0    3    2
    A sees      yes  yes  yes  yes         (steps 2 to 5; its first has been overwritten: the ring must grow first)
    B sees      yes  yes  .    .           (steps 4 and 5)

Keys are stored with positions last, so that q·k needs no transposed copy. What is stored may be narrower than what is
computed with: bfloat16, or int8 with one scale for each position and head (keys, values) or output (kernels).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kardia_jax.model.attention import MASKED, Part, Scoring, Window, merge
from kardia_jax.model.layers import Block, Turns, kinds, rotations, turn_of
from kardia_jax.model.lora import SITES, merged, union
from kardia_jax.model.policy import Compute, apply, embed, final_norm, run_prompt, scoring_of
from kardia_jax.model.sharding import constrain_tree, key_heads
from kardia_jax.model.spec import ModelSpec
from kardia_jax.types import Params


class Storage(NamedTuple):
    """Types of what the sampler keeps."""

    kv: Literal["compute", "bfloat16", "int8"] = "compute"
    """Keys and values."""
    weights: Literal["compute", "int8"] = "compute"
    """The blocks' kernels; norms, biases and tables stay in the compute type."""


AS_COMPUTED = Storage()


class Stored(NamedTuple):
    """Keys or values as they are kept."""

    values: Array
    scale: Float[Array, "..."] | None
    """What one unit of an int8 is worth; 1 long where ``values`` has E."""


class LayerCache(NamedTuple):
    """Keys and values of one layer; N = P x G rows."""

    prompt_k: Stored
    """[P, K, E, S]"""
    prompt_v: Stored
    """[P, K, S, E]"""
    k: Stored
    """[N, K, E, T]"""
    v: Stored
    """[N, K, T, E]"""


class Sight(NamedTuple):
    """Which keys a step sees."""

    prompt: Bool[Array, "P S"]
    own: Bool[Array, "P T"]


def decoding_weights(spec: ModelSpec, params: Params, dtype: str, storage: Storage) -> Params:
    """The parameters as decoding reads them: a list of layers instead of a stack, adapters merged, cast once.

    On a mesh they are gathered here, once a call, over the axes that share them between uses: no step gathers any.
    """

    def layer(index: int) -> Params:
        one = merged(jax.tree.map(lambda leaf: leaf[index], params["blocks"]))
        one = quantized(one) if storage.weights == "int8" else one
        return jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.int8 else leaf.astype(dtype), one)

    rest = {name: node for name, node in params.items() if name != "blocks"}
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), rest) | {"layers": [layer(i) for i in range(spec.layers)]}
    return constrain_tree(weights, "used")


def quantized(layer: Params) -> Params:
    """One block with int8 kernels; each output has a scale of its own, ``kernel_scale`` [out...]."""
    for site in SITES.values():
        kernel = layer[site.part][site.name]["kernel"].astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(kernel).max(tuple(range(site.inputs))), 1e-20) / 127
        narrow = {"kernel": jnp.round(kernel / scale).astype(jnp.int8), "kernel_scale": scale}
        layer = union(layer, {site.part: {site.name: narrow}})
    return layer


def prefill(
    spec: ModelSpec, compute: Compute, storage: Storage, params: Params, tokens: Int[Array, "P S"]
) -> list[tuple[Stored, Stored]]:
    """Keys and values of each layer's prompt; what stands at padding means nothing."""
    _, (k, v) = run_prompt(spec, compute, params, tokens)
    return [(stored(jnp.swapaxes(k[i], 2, 3), 2, storage), stored(v[i], 3, storage)) for i in range(spec.layers)]


def empty_caches(
    spec: ModelSpec, compute: Compute, storage: Storage, prompts: int, group: int, size: int, columns: int
) -> list[LayerCache]:
    """Zeros, since a masked softmax over uninitialised memory leaks NaN."""
    heads, dim, rows = key_heads(spec.kv_heads), spec.head_dim, prompts * group

    def zeros(shape: tuple[int, ...], axis: int) -> Stored:
        return stored(jnp.zeros(shape, compute.dtype), axis, storage)

    def one() -> LayerCache:
        return LayerCache(
            zeros((prompts, heads, dim, size), 2),
            zeros((prompts, heads, size, dim), 3),
            zeros((rows, heads, dim, columns), 2),
            zeros((rows, heads, columns, dim), 3),
        )

    return [one() for _ in range(spec.layers)]


def stored(x: Float[Array, "..."], axis: int, storage: Storage) -> Stored:
    """x as it is kept; ``axis`` is where the head's width E lies."""
    if storage.kv == "compute":
        return Stored(x, None)
    if storage.kv == "bfloat16":
        return Stored(x.astype(jnp.bfloat16), None)
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis, keepdims=True), 1e-20) / 127
    return Stored(jnp.round(wide / scale).astype(jnp.int8), scale)


def turns_at(spec: ModelSpec, prefix_lengths: Int[Array, " P"], start: Int[Array, " P"], step: Int[Array, ""]) -> Turns:
    """Rotations [P, 1, 1, E] of the tokens that a step feeds; see ``decode_step``."""
    return rotations(spec, (prefix_lengths + step - start)[:, None, None])


def decode_step(
    spec: ModelSpec,
    compute: Compute,
    storage: Storage,
    weights: Params,
    caches: list[LayerCache],
    prefix_lengths: Int[Array, " P"],
    start: Int[Array, " P"],
    step: Int[Array, ""],
    turns: Turns,
    tokens: Int[Array, "P G"],
) -> tuple[Float[Array, "P G D"], list[LayerCache]]:
    """Feeds one token to every row, at column ``step`` mod T, and gives the hidden state after it.

    ``start`` is the step that fed a group's first token, which stands behind ``prefix_lengths`` prompt tokens.
    ``turns`` are those of ``turns_at``, and best come from the step before: what a loop carries is computed once, while
    XLA on CPU fuses sines made here into every layer that reads them.
    """
    x = embed(spec, weights, tokens[..., None], compute, "used")
    written = step - start
    sizes = caches[0].prompt_v.values.shape[2], caches[0].v.values.shape[2]
    sights = {kind.window: sight(prefix_lengths, written, step, sizes, kind.window) for kind in kinds(spec)}
    out = []
    for layer, cache, kind in zip(weights["layers"], caches, kinds(spec), strict=True):
        attend = functools.partial(
            _attend, cache=cache, step=step, sight=sights[kind.window], scoring=scoring_of(spec), storage=storage
        )
        x, cache = apply(Block(spec), layer, x, turn_of(turns, kind), attend)
        out.append(cache)
    return final_norm(spec, weights, x[:, :, 0]), out


def sight(
    prefix_lengths: Int[Array, " P"],
    written: Int[Array, " P"],
    step: Int[Array, ""],
    sizes: tuple[int, int],
    window: Window,
) -> Sight:
    """What a token sees that has ``written`` tokens of its own row before it."""
    places, columns = (jnp.arange(size) for size in sizes)
    age = (step - columns) % sizes[1]
    prompt, own = places < prefix_lengths[:, None], age <= written[:, None]
    if window is None:
        return Sight(prompt, own)
    back = (prefix_lengths + written)[:, None] - places
    return Sight(prompt & (back < window), own & (age < window))


def _attend(
    q: Float[Array, "P G H 1 E"],
    k: Float[Array, "P G K 1 E"],
    v: Float[Array, "P G K 1 E"],
    cache: LayerCache,
    step: Int[Array, ""],
    sight: Sight,
    scoring: Scoring,
    storage: Storage,
) -> tuple[Float[Array, "P G H 1 E"], LayerCache]:
    """Writes the token's key and value, then attends to prompt and row: the queries of a group are one matrix for the
    prompt, those that share a key head one for the row."""
    prompts, group, dim = q.shape[0], q.shape[1], q.shape[-1]
    kv_heads = k.shape[2]
    rows = prompts * group
    cache = cache._replace(
        k=_write(cache.k, stored(k.reshape(rows, kv_heads, dim, 1), 2, storage), step, 3),
        v=_write(cache.v, stored(v.reshape(rows, kv_heads, 1, dim), 3, storage), step, 2),
    )
    by_head = q.reshape(prompts, group, kv_heads, -1, dim)
    together = jnp.moveaxis(by_head, 1, 2).reshape(prompts, kv_heads, -1, dim)
    shared = _part(together, cache.prompt_k, cache.prompt_v, sight.prompt, scoring)
    own = _part(by_head.reshape(rows, kv_heads, -1, dim), cache.k, cache.v, jnp.repeat(sight.own, group, 0), scoring)

    def apart(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(prompts, kv_heads, group, -1, *x.shape[3:]), 2, 1)

    own = Part(*(x.reshape(prompts, group, *x.shape[1:]) for x in own))
    return merge([Part(apart(shared.out), apart(shared.lse)), own]).reshape(q.shape), cache


def _write(kept: Stored, new: Stored, step: Int[Array, ""], axis: int) -> Stored:
    """One column of the ring, in place."""
    column = step % kept.values.shape[axis]

    def write(buffer: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, value, column, axis)

    return jax.tree.map(write, kept, new)


def _part(q: Float[Array, "B K N E"], k: Stored, v: Stored, keep: Bool[Array, "B S"], scoring: Scoring) -> Part:
    """softmax(q·k scale) v over the kept keys [B, K, E, S] and values [B, K, S, E], scores in float32."""
    scores = jnp.einsum("BKNE,BKES->BKNS", q, k.values.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = scores * scoring.scale if k.scale is None else scores * (k.scale * scoring.scale)
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    scores = jnp.where(keep[:, None, None], scores, MASKED)
    peak = scores.max(-1, keepdims=True)
    chances = jnp.exp(scores - peak)
    total = chances.sum(-1)
    worth = chances if v.scale is None else chances * jnp.swapaxes(v.scale, 2, 3)
    out = jnp.einsum(
        "BKNS,BKSE->BKNE", worth.astype(q.dtype), v.values.astype(q.dtype), preferred_element_type=jnp.float32
    )
    return Part(out / total[..., None], jnp.log(total) + peak[..., 0])
