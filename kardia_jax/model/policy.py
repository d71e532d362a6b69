"""The policy as functions of (spec, params): one set of layers for sampler and learner.

A group of G completions shares one prompt, which is run once:

- ``group_logprobs`` scores whole completions, with gradient through the shared prompt; each completion may continue
  the prompt after a length of its own, so the answers of one conversation share it as samples of one question do,
- ``logits`` is the plain forward pass of ordinary rows, for conversion checks and as the reference in tests.

Compute happens in ``Compute.dtype``; parameters are float32 masters.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from kardia_jax.model.attention import ATTENDED, Scoring, Window
from kardia_jax.model.backends import Machine, Wanted, completion_attention, prompt_attention
from kardia_jax.model.embedding import looked_up
from kardia_jax.model.head import Slices, model_logits, token_logprobs
from kardia_jax.model.layers import Block, Kind, norm, rotations, stacked_kinds, turn_of
from kardia_jax.model.sharding import Column
from kardia_jax.model.spec import ModelSpec
from kardia_jax.types import Params


@dataclass(frozen=True)
class Compute:
    """How and where the arithmetic is done; never what is computed."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "block", "dots"] = "block"
    """Recomputed in the backward pass: nothing, every block, or everything but products with weights and attention."""
    head_chunk: int = 1024
    """Completion tokens per slice of the LM head."""
    vocab_chunk: int = 0
    """Rows of its table per slice; 0: all."""
    unroll: int = 1
    """Blocks per trip of the scan over layers."""
    attention: Wanted = "auto"
    """Who computes attention of prompts and whole completions; see ``backends.py``."""
    mesh: Mesh | None = None
    """Where programs run; None: on one device. See ``sharding.py``."""
    apart: bool = False
    """The mesh is the sampler's own: parameters lie elsewhere and are sent there."""
    machine: Machine | None = None
    """What the program is compiled for; None: the machine that compiles it."""

    @property
    def attending(self) -> dict[str, Any]:
        """How the attention of every layer is chosen."""
        return {"attention": self.attention, "where": self.machine}


PRODUCTS = ("q", "k", "v", "o", "gate", "up", ATTENDED)
"""Outputs of a block's products that its backward pass reads; that of ``down`` is only added."""


def init(spec: ModelSpec, key: Key[Array, ""]) -> Params:
    """Random float32 parameters.

    Kernels have variance 1 / fan-in; those that write to the residual stream are scaled by (2 L)^-1/2, as in GPT-2.
    Embeddings have standard deviation D^-1/2: a tied head then starts with logits of size 1, and a token is not drowned
    by what the first blocks add to it.
    """
    block_key, embed_key, head_key = jax.random.split(key, 3)
    x, turn = jnp.zeros((1, 1, spec.width)), rotations(spec, jnp.zeros((1, 1), int)).full
    attend = functools.partial(_attend_prompt, attention="xla", scoring=scoring_of(spec), window=None)
    residual = (2 * spec.layers) ** -0.5

    def init_block(layer_key: Key[Array, ""]) -> Params:
        block: Params = dict(Block(spec).init(layer_key, x, turn, attend)["params"])
        for part, name in (("attention", "o"), ("mlp", "down")):
            block[part] = block[part] | {name: {"kernel": block[part][name]["kernel"] * residual}}
        return block

    def table(table_key: Key[Array, ""]) -> Params:
        return {"embedding": jax.random.normal(table_key, (spec.vocab_size, spec.width)) * spec.width**-0.5}

    params: Params = {
        "embed": table(embed_key),
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, spec.layers)),
        "final_norm": dict(norm(spec).init(key, x)["params"]),
    }
    if not spec.tied:
        params["head"] = table(head_key)
    return params


def head_table(params: Params) -> Float[Array, "V D"]:
    """The output table: the head's own, or the embedding when tied."""
    return params.get("head", params["embed"])["embedding"]


def logits(
    spec: ModelSpec, compute: Compute, params: Params, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]
) -> Float[Array, "B S V"]:
    """Logits of plain right-padded rows, float32, padding rows of the table included; positions from ``lengths`` on
    mean nothing (causality keeps them from the others)."""
    del lengths
    x, _ = run_prompt(spec, compute, params, tokens)
    return model_logits(final_norm(spec, params, x), head_table(params), spec.final_softcap)


def group_hidden(
    spec: ModelSpec,
    compute: Compute,
    params: Params,
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, "P G"],
    completion_tokens: Int[Array, "P G T"],
) -> Float[Array, "P G T D"]:
    """Hidden state that predicts each completion token; the prompt is run once per group, forward and backward."""
    prompt_turns = rotations(spec, jnp.arange(prompt_tokens.shape[1])[None])
    turns = rotations(spec, prompt_lengths[..., None] + jnp.arange(completion_tokens.shape[2]))

    def block(carry: tuple[Array, Array], layer: tuple[Params, Kind]) -> tuple[tuple[Array, Array], None]:
        (prompt, completion), (weights, kind) = carry, layer
        how = {**compute.attending, "scoring": scoring_of(spec), "window": kind.window}
        attend_prompt = functools.partial(_attend_prompt, **how)
        prompt, (k, v) = apply(Block(spec), weights, prompt, turn_of(prompt_turns, kind), attend_prompt)
        attend_group = functools.partial(_attend_group, prompt_k=k, prompt_v=v, prompt_lengths=prompt_lengths, **how)
        completion, _ = apply(Block(spec), weights, completion, turn_of(turns, kind), attend_group)
        return (prompt, completion), None

    start = embed(spec, params, prompt_tokens, compute), embed(spec, params, completion_tokens, compute)
    stack = params["blocks"], stacked_kinds(spec)
    (prompt, completion), _ = jax.lax.scan(_remat(block, compute), start, stack, unroll=compute.unroll)
    first = _at(prompt, prompt_lengths - 1)
    return final_norm(spec, params, jnp.concatenate([first[:, :, None], completion[:, :, :-1]], 2))


def group_logprobs(
    spec: ModelSpec,
    compute: Compute,
    params: Params,
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, "P G"],
    completion_tokens: Int[Array, "P G T"],
    keep: Bool[Array, "P G T"],
    temperature: Float[Array, ""],
) -> tuple[Float[Array, "P G T"], Float[Array, "P G T"]]:
    """Log-prob of every kept completion token and entropy of its distribution (nats) at this temperature, else 0."""
    hidden = group_hidden(spec, compute, params, prompt_tokens, prompt_lengths, completion_tokens)
    shape = completion_tokens.shape
    logprobs, entropy = token_logprobs(
        hidden.reshape(-1, spec.width),
        head_table(params),
        completion_tokens.reshape(-1),
        keep.reshape(-1),
        jnp.asarray(temperature, jnp.float32),
        spec.sampled_tokens,
        Slices(compute.head_chunk, compute.vocab_chunk),
        spec.final_softcap,
    )
    return logprobs.reshape(shape), entropy.reshape(shape)


def run_prompt(
    spec: ModelSpec, compute: Compute, params: Params, tokens: Int[Array, "B S"]
) -> tuple[Float[Array, "B S D"], tuple[Array, Array]]:
    """Last layer's output for plain right-padded rows, and keys and values [L, B, K, S, E] of every layer."""
    turns = rotations(spec, jnp.arange(tokens.shape[1])[None])

    def block(x: Array, layer: tuple[Params, Kind]) -> tuple[Array, tuple[Array, Array]]:
        weights, kind = layer
        how = {**compute.attending, "scoring": scoring_of(spec), "window": kind.window}
        attend = functools.partial(_attend_prompt, **how)
        return apply(Block(spec), weights, x, turn_of(turns, kind), attend)

    stack = params["blocks"], stacked_kinds(spec)
    return jax.lax.scan(_remat(block, compute), embed(spec, params, tokens, compute), stack, unroll=compute.unroll)


def _attend_prompt(
    q: Array, k: Array, v: Array, attention: Wanted, scoring: Scoring, window: Window, where: Machine | None = None
) -> tuple[Array, tuple[Array, Array]]:
    return prompt_attention(attention, q, k, v, scoring, window, where), (k, v)


def _attend_group(
    q: Array,
    k: Array,
    v: Array,
    prompt_k: Array,
    prompt_v: Array,
    prompt_lengths: Array,
    attention: Wanted,
    scoring: Scoring,
    window: Window,
    where: Machine | None,
) -> tuple[Array, None]:
    prompt = (prompt_k, prompt_v, prompt_lengths)
    return completion_attention(attention, q, k, v, *prompt, scoring, window, where), None


def apply(module: nn.Module, params: Params, *inputs: Any) -> Any:
    """A Linen module on these parameters; modules here have no state, so the result is the output alone."""
    return module.apply({"params": params}, *inputs)


def scoring_of(spec: ModelSpec) -> Scoring:
    """How this model makes scores."""
    return Scoring(spec.score_scale, spec.attention_softcap)


def embed(
    spec: ModelSpec, params: Params, tokens: Int[Array, "..."], compute: Compute, column: Column = "stored"
) -> Float[Array, "... D"]:
    """Rows of the input table, scaled where the family scales them."""
    x = looked_up(params["embed"]["embedding"], tokens, compute.dtype, column)
    return x * jnp.asarray(spec.width**0.5, jnp.float32).astype(compute.dtype) if spec.traits.embed_scaled else x


def final_norm(spec: ModelSpec, params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What the head reads."""
    return apply(norm(spec), params["final_norm"], x)


def _at(x: Float[Array, "B S D"], index: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    return jnp.take_along_axis(x, index[..., None], 1)


def _remat(block: Callable[..., Any], compute: Compute) -> Callable[..., Any]:
    """The block as the backward pass should see it."""
    if compute.remat == "none":
        return block
    policy = jax.checkpoint_policies.save_only_these_names(*PRODUCTS) if compute.remat == "dots" else None
    return jax.checkpoint(block, policy=policy, prevent_cse=False)
