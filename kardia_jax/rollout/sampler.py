"""Group rollouts in one compiled program: each prompt is run once, then P x G rows are decoded together.

The loop ends when every row has met a stop token. Rows that are done go on being computed (shapes are static) but
write padding. Token ids leave exactly as they were drawn; nothing is ever tokenised again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kardia_jax.model.head import sampled_logits
from kardia_jax.model.policy import Compute, LayerCache, decode_step, head_table, layer_slices, prefill
from kardia_jax.model.spec import ModelSpec
from kardia_jax.rollout.sampling import Controls, draw
from kardia_jax.types import Params, Rollouts


class Decoding(NamedTuple):
    """State of the decode loop."""

    position: Int[Array, ""]
    """Completion index of ``token``: the last one drawn."""
    token: Int[Array, "P G"]
    done: Bool[Array, "P G"]
    """Rows that have drawn a stop token."""
    tokens: Int[Array, "P G T"]
    sampler_logprobs: Float[Array, "P G T"]
    tempered_logprobs: Float[Array, "P G T"]
    caches: list[LayerCache]


def generate(
    spec: ModelSpec,
    compute: Compute,
    params: Params,
    prompt_tokens: Int[Array, "P S"],
    prompt_lengths: Int[Array, " P"],
    keys: Key[Array, "P G"],
    controls: Controls,
    stop_ids: Int[Array, " E"],
    pad_id: Int[Array, ""],
    max_new_tokens: int,
) -> Rollouts:
    """Samples G completions of at most T = ``max_new_tokens`` tokens for each prompt; a row's numbers depend on its
    own key alone. ``stop_ids`` holds every id that ends a completion; the stop token is part of the completion."""
    table = head_table(params).astype(compute.dtype)
    layers = layer_slices(spec, params, compute.dtype)
    hidden, prompt_k, prompt_v = prefill(spec, compute, params, prompt_tokens, prompt_lengths)
    hidden = jnp.broadcast_to(hidden[:, None], (*keys.shape, spec.width))
    row_lengths = jnp.broadcast_to(prompt_lengths[:, None], keys.shape)

    def record(state: Decoding, hidden: Float[Array, "P G D"], position: Int[Array, ""]) -> Decoding:
        logits = sampled_logits(hidden, table, spec.sampled_tokens, spec.final_softcap).reshape(-1, spec.vocab_size)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys.reshape(-1), position)
        drawn = draw(logits, step_keys, controls)

        def place(buffer: Array, values: Array, filler: Array | float) -> Array:
            values = jnp.where(state.done, filler, values.reshape(keys.shape))
            return jax.lax.dynamic_update_index_in_dim(buffer, values.astype(buffer.dtype), position, 2)

        token = jnp.where(state.done, pad_id, drawn.token.reshape(keys.shape))
        return state._replace(
            position=position,
            token=token,
            done=state.done | jnp.isin(token, stop_ids),
            tokens=place(state.tokens, token, pad_id),
            sampler_logprobs=place(state.sampler_logprobs, drawn.sampler_logprob, 0.0),
            tempered_logprobs=place(state.tempered_logprobs, drawn.tempered_logprob, 0.0),
        )

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.position + 1 < max_new_tokens) & ~state.done.all()

    def advance(state: Decoding) -> Decoding:
        hidden, caches = decode_step(
            spec, compute, params, layers, state.caches, row_lengths, state.token, state.position
        )
        return record(state._replace(caches=caches), hidden, state.position + 1)

    start = _start(spec, compute, prompt_k, prompt_v, keys.shape, pad_id, max_new_tokens)
    final = jax.lax.while_loop(unfinished, advance, record(start, hidden, jnp.int32(0)))
    lengths = _lengths(final.tokens, stop_ids)
    return Rollouts(final.tokens, lengths, final.sampler_logprobs, final.tempered_logprobs, final.done)


def _start(
    spec: ModelSpec,
    compute: Compute,
    prompt_k: Float[Array, "L P K S E"],
    prompt_v: Float[Array, "L P K S E"],
    rows: tuple[int, ...],
    pad_id: Int[Array, ""],
    max_new_tokens: int,
) -> Decoding:
    """Nothing drawn yet; buffers are zeros, since a masked softmax over uninitialised memory leaks NaN."""
    shape = (*rows, max_new_tokens)
    own = jnp.zeros((*rows, spec.kv_heads, max_new_tokens, spec.head_dim), compute.dtype)
    return Decoding(
        position=jnp.int32(-1),
        token=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        tokens=jnp.full(shape, pad_id, jnp.int32),
        sampler_logprobs=jnp.zeros(shape),
        tempered_logprobs=jnp.zeros(shape),
        caches=[LayerCache(prompt_k[i], prompt_v[i], own, own) for i in range(spec.layers)],
    )


def _lengths(tokens: Int[Array, "P G T"], stop_ids: Int[Array, " E"]) -> Int[Array, "P G"]:
    """Tokens up to and with the first stop token; all of them where there is none."""
    stops = jnp.isin(tokens, stop_ids)
    return jnp.where(stops.any(-1), jnp.argmax(stops, -1) + 1, tokens.shape[-1])
