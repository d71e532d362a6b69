"""Sampling on the device: rows that start, are decoded together, and leave, as pure functions of ``Rows``.

``roll_out`` in ``batching.py`` calls them from the host: ``admit`` runs prompts and seats their groups, ``decode``
draws tokens until it is time to look, ``grow`` makes room for longer rows, ``keep`` drops rows that are done. Shapes
are static in each; rows that are done go on being computed until they are dropped, but record nothing. Token ids leave
exactly as they were drawn; nothing is ever tokenised again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kardia_jax.model.decoding import LayerCache, Storage, Stored, decode_step, empty_caches, prefill, turns_at
from kardia_jax.model.head import sampled_logits
from kardia_jax.model.layers import Turns
from kardia_jax.model.policy import Compute, head_table
from kardia_jax.model.sharding import by_rows, constrain_rows, first_group
from kardia_jax.model.spec import ModelSpec
from kardia_jax.rollout.sampling import Controls, Draw, draw
from kardia_jax.types import Params


class Drawn(NamedTuple):
    """What the host looks at: everything that rows have drawn so far."""

    done: Bool[Array, "P G"]
    """A stop token or the budget has ended the row; also True where nobody sits."""
    stopped: Bool[Array, "P G"]
    """A stop token has."""
    lengths: Int[Array, "P G"]
    """Tokens drawn, the stop token included."""
    tokens: Int[Array, "P G M"]
    """M is the budget; padding behind the end."""
    sampler_logprobs: Float[Array, "P G M"]
    tempered_logprobs: Float[Array, "P G M"]


class Rows(NamedTuple):
    """State of the sampler: P groups of G rows."""

    step: Int[Array, ""]
    """Tokens fed so far, counted over the whole call."""
    start: Int[Array, " P"]
    """The step that fed a group its first token, the last one of its prompt."""
    prefix_lengths: Int[Array, " P"]
    """Prompt tokens before that one."""
    token: Int[Array, "P G"]
    """What is fed next."""
    keys: Key[Array, "P G"]
    drawn: Drawn
    caches: list[LayerCache]


ROWS = Rows._make(["", "P", "P", "P", "P", "P", "PK"])
"""Where each of them lies, as letters of ``sharding.py``: N = P x G rows lie as their groups do."""


def empty(
    spec: ModelSpec,
    compute: Compute,
    storage: Storage,
    keys: Key[Array, "N G"],
    pad_id: Int[Array, ""],
    prompts: int,
    size: int,
    columns: int,
    budget: int,
) -> Rows:
    """Nobody seated: room for prompts of ``size`` and ``columns`` tokens of each row. ``keys`` lends its group."""
    group = keys.shape[1]
    none = jnp.zeros((prompts, group), jnp.int32)
    nothing = jnp.zeros((*none.shape, budget))
    drawn = Drawn(none == 0, none == 1, none, jnp.full_like(nothing, pad_id, jnp.int32), nothing, nothing)
    caches = empty_caches(spec, compute, storage, prompts, group, size, columns)
    zeros = jnp.zeros(prompts, jnp.int32)
    # Keys of its own: rows are donated, and the caller's keys must outlive them.
    own = jnp.broadcast_to(keys[0, 0], none.shape)
    return Rows(jnp.int32(0), zeros, zeros, none, own, drawn, caches)


def admit(
    spec: ModelSpec,
    compute: Compute,
    storage: Storage,
    params: Params,
    rows: Rows,
    prompt_tokens: Int[Array, "F S"],
    prompt_lengths: Int[Array, " F"],
    keys: Key[Array, "F G"],
    seats: Int[Array, " F"],
    pad_id: Int[Array, ""],
) -> Rows:
    """Runs F prompts once and seats their groups; a seat outside [0, P) is no seat, so that F can be a round number.

    On a mesh the prompts that a device runs take seats of that device.
    """
    prompt_tokens = constrain_rows(prompt_tokens, "")
    prompts = prefill(spec, compute, storage, params, prompt_tokens)
    last = jnp.take_along_axis(prompt_tokens, prompt_lengths[:, None] - 1, 1)
    coming = Coming(seats, prompt_lengths - 1, jnp.broadcast_to(last, keys.shape), keys, prompts)
    return by_rows(_seated, (ROWS, COMING, ""), ROWS)(rows, coming, pad_id)


class Coming(NamedTuple):
    """F groups on their way to a seat."""

    seats: Int[Array, " F"]
    prefix_lengths: Int[Array, " F"]
    token: Int[Array, "F G"]
    keys: Key[Array, "F G"]
    prompts: list[tuple[Stored, Stored]]


COMING = Coming._make("PPPPP")
"""Where each of them lies, as letters of ``sharding.py``."""


def _seated(rows: Rows, coming: Coming, pad_id: Int[Array, ""]) -> Rows:
    places = coming.seats - first_group(rows.start.shape[0])

    def seated(buffer: Array, value: Array) -> Array:
        return buffer.at[places].set(value, mode="drop")

    caches = [
        cache._replace(
            prompt_k=jax.tree.map(seated, cache.prompt_k, k), prompt_v=jax.tree.map(seated, cache.prompt_v, v)
        )
        for cache, (k, v) in zip(rows.caches, coming.prompts, strict=True)
    ]
    fresh = Drawn(*map(jnp.asarray, (False, False, 0, pad_id, 0.0, 0.0)))
    return rows._replace(
        start=seated(rows.start, rows.step),
        prefix_lengths=seated(rows.prefix_lengths, coming.prefix_lengths),
        token=seated(rows.token, coming.token),
        keys=seated(rows.keys, coming.keys),
        drawn=jax.tree.map(seated, rows.drawn, fresh),
        caches=caches,
    )


def decode(
    spec: ModelSpec,
    compute: Compute,
    storage: Storage,
    weights: Params,
    rows: Rows,
    controls: Controls,
    stop_ids: Int[Array, " E"],
    pad_id: Int[Array, ""],
    until: Int[Array, ""],
    least: Int[Array, ""],
) -> Rows:
    """Draws tokens up to step ``until``, or until no more than ``least`` rows are left that are not done.

    A row's numbers depend on its own key and its place in the completion alone. ``until`` must leave no row longer
    than its ring (see ``decoding.py``).
    """
    table = head_table(weights)

    def unfinished(state: tuple[Rows, Turns]) -> Bool[Array, ""]:
        rows, _ = state
        return (rows.step < until) & ((~rows.drawn.done).sum() > least)

    def advance(state: tuple[Rows, Turns]) -> tuple[Rows, Turns]:
        rows, turns = state
        hidden, caches = decode_step(
            spec, compute, storage, weights, rows.caches, rows.prefix_lengths, rows.start, rows.step, turns, rows.token
        )
        hidden = hidden.reshape(-1, spec.width)
        logits = sampled_logits(hidden, table, spec.sampled_tokens, spec.final_softcap)
        return with_turns(_record(rows._replace(caches=caches), logits, controls, stop_ids, pad_id))

    def with_turns(rows: Rows) -> tuple[Rows, Turns]:
        return rows, turns_at(spec, rows.prefix_lengths, rows.start, rows.step)

    rows, _ = jax.lax.while_loop(unfinished, advance, with_turns(rows))
    return rows


def _record(
    rows: Rows, logits: Float[Array, "V N"], controls: Controls, stop_ids: Int[Array, " E"], pad_id: Int[Array, ""]
) -> Rows:
    """Draws the next token of every row and writes it down where the row is not done."""
    shape = rows.keys.shape
    place = jnp.broadcast_to((rows.step - rows.start)[:, None], shape)
    keys = jax.vmap(jax.random.fold_in)(rows.keys.reshape(-1), place.reshape(-1))
    drawn = jax.tree.map(lambda x: x.reshape(shape), draw(logits, keys, controls))
    token, after = by_rows(_written, ("P", "P", "P", "", ""), "P")(rows.drawn, place, drawn, stop_ids, pad_id)
    return rows._replace(step=rows.step + 1, token=token, drawn=after)


def _written(
    before: Drawn, place: Int[Array, "P G"], drawn: Draw, stop_ids: Int[Array, " E"], pad_id: Int[Array, ""]
) -> tuple[Int[Array, "P G"], Drawn]:
    shape, budget = place.shape, before.tokens.shape[-1]
    token = jnp.where(before.done, pad_id, drawn.token)
    stops = jnp.isin(token, stop_ids) & ~before.done
    # Out of bounds where the row is done already: nothing is written.
    at = (*jnp.indices(shape, sparse=True), jnp.where(before.done, budget, place))

    def write(buffer: Array, value: Array) -> Array:
        return buffer.at[at].set(value.astype(buffer.dtype), mode="drop")

    after = Drawn(
        done=before.done | stops | (place + 1 >= budget),
        stopped=before.stopped | stops,
        lengths=jnp.where(before.done, before.lengths, place + 1),
        tokens=write(before.tokens, token),
        sampler_logprobs=write(before.sampler_logprobs, drawn.sampler_logprob),
        tempered_logprobs=write(before.tempered_logprobs, drawn.tempered_logprob),
    )
    return token, after


def grow(rows: Rows, columns: int) -> Rows:
    """The same rows in rings of ``columns``, counted anew so that the oldest stands in column 0."""
    old = rows.caches[0].v.values.shape[2]

    def wider(axis: int, buffer: Array) -> Array:
        padding = [(0, columns - old if i == axis else 0) for i in range(buffer.ndim)]
        return jnp.pad(jnp.roll(buffer, -(rows.step % old), axis), padding)

    caches = [
        cache._replace(k=jax.tree.map(lambda x: wider(3, x), cache.k), v=jax.tree.map(lambda x: wider(2, x), cache.v))
        for cache in rows.caches
    ]
    return rows._replace(step=jnp.int32(old), start=rows.start + old - rows.step, caches=caches)


def keep(rows: Rows, seats: Int[Array, " F"], members: Int[Array, "F M"], alive: Bool[Array, "F M"]) -> Rows:
    """Row (i, j) of the result is row ``members[i, j]`` of group ``seats[i]``; where not ``alive`` it is done.

    On a mesh the groups stay on their devices.
    """
    return by_rows(_kept, (ROWS, "P", "P", "P"), ROWS)(rows, seats, members, alive)


def _kept(rows: Rows, seats: Int[Array, " F"], members: Int[Array, "F M"], alive: Bool[Array, "F M"]) -> Rows:
    seats = seats - first_group(rows.start.shape[0])
    places = (seats[:, None] * rows.token.shape[1] + members).reshape(-1)
    drawn = jax.tree.map(lambda x: x[seats[:, None], members], rows.drawn)
    caches = [
        LayerCache(
            *jax.tree.map(lambda x: x[seats], (cache.prompt_k, cache.prompt_v)),
            *jax.tree.map(lambda x: x[places], (cache.k, cache.v)),
        )
        for cache in rows.caches
    ]
    return Rows(
        step=rows.step,
        start=rows.start[seats],
        prefix_lengths=rows.prefix_lengths[seats],
        token=rows.token[seats[:, None], members],
        keys=rows.keys[seats[:, None], members],
        drawn=drawn._replace(done=drawn.done | ~alive),
        caches=caches,
    )
