"""Continuous batching from the host: who sits where, when to look, when to make the batch longer or smaller.

``roll_out`` samples G completions of each of P prompts. It seats as many groups as may sit at once, lets the device
decode a stretch of steps, and looks: rows that are done are handed on while the others go on, waiting prompts take
the seats of groups that have left, rings that are full are doubled, and when no more than half of the rows are left
they move together. All shapes are powers of two (times what came in), so few programs are compiled.

On a mesh the seats of a device stand together, a group sits on one device from its prompt to its last token, and each
device has as many seats as the others; those that nobody takes are rows that are done from the start.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.placement import to_host
from kardia_jax.rollout.sampler import Drawn, Rows
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import Params, Rollouts

COLUMNS = 64
"""Tokens of a row that there is room for at first."""
STRETCH = 32
"""Most steps between two looks."""

Finished = Callable[[int, int, Int[np.ndarray, " n"]], None]
"""(prompt, sample, its tokens), called once for each completion; those that end between two looks come together."""
Generate = Callable[..., Rollouts]
"""``roll_out`` after its first two arguments."""


def stay(params: Params) -> Params:
    """The parameters where they are."""
    return params


class Programs(NamedTuple):
    """The functions of ``sampler.py``, compiled for one model; made in ``programs.py``."""

    weights: Callable[[Params], Params]
    empty: Callable[..., Rows]
    admit: Callable[..., Rows]
    decode: Callable[..., Rows]
    grow: Callable[..., Rows]
    keep: Callable[..., Rows]
    sent: Callable[[Params], Params] = stay
    """The parameters where sampling happens: on the sampler's own devices if it has any."""
    shards: int = 1
    """Devices, or groups of devices, that share the rows out."""


class Seats(NamedTuple):
    """Who sits where."""

    prompts: Int[np.ndarray, " P"]
    """The prompt of each group of rows; -1 where nobody sits."""
    samples: Int[np.ndarray, "P G"]
    """Which of its completions each row is; -1 where nobody sits."""


class Request(NamedTuple):
    """What ``roll_out`` is asked for."""

    params: Params
    prompt_tokens: Int[np.ndarray, "P S"]
    prompt_lengths: Int[np.ndarray, " P"]
    keys: Key[Array, "P G"]
    pad_id: int


def roll_out(
    programs: Programs,
    rows: int,
    params: Params,
    prompt_tokens: Int[np.ndarray, "P S"],
    prompt_lengths: Int[np.ndarray, " P"],
    keys: Key[Array, "P G"],
    controls: Controls,
    stop_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    finished: Finished | None = None,
) -> Rollouts:
    """Samples G completions of at most T = ``max_new_tokens`` tokens for each prompt; NumPy arrays [P, G, T].

    A row's numbers depend on its own key alone. ``stop_ids`` holds every id that ends a completion; the stop token is
    part of the completion. No more than ``rows`` rows are decoded at once, in whole groups and at least one; 0: all.
    """
    params = programs.sent(params)
    asked = Request(params, prompt_tokens, prompt_lengths, keys, pad_id)
    prompts, group = keys.shape
    places = _multiple(min(prompts, max(1, rows // group)) if rows else prompts, programs.shards)
    weights, stops = programs.weights(params), jnp.asarray(stop_ids, jnp.int32)
    columns = min(COLUMNS, length_buckets(max_new_tokens))
    room = {"prompts": places, "size": prompt_tokens.shape[1], "columns": columns, "budget": max_new_tokens}
    state = programs.empty(keys[:1], pad_id, **room)
    seats = Seats(np.full(places, -1), np.full((places, group), -1))
    waiting, out, ended = deque(range(prompts)), _blank(keys.shape, max_new_tokens, pad_id), []
    while True:
        if waiting:
            state, seats = _admitted(programs, asked, state, seats, waiting)
        else:
            state, seats = _compacted(programs, state, seats)
        live = int((seats.samples >= 0).sum())
        if not live:
            break
        state, until = _with_room(programs, state, seats)
        # At least one more row has to end before the next look, or nothing would move.
        least = 0 if waiting else min(seats.samples.size // 2, live - 1)
        state = programs.decode(weights, state, controls, stops, pad_id, until, least)
        # The device is at work: time for the host's own.
        _hand_on(ended, out, finished)
        seats, ended = _collected(to_host(state.drawn), seats, out)
    _hand_on(ended, out, finished)
    return out


def _blank(shape: tuple[int, ...], budget: int, pad_id: int) -> Rollouts:
    """Room for all completions on the host."""
    nothing = np.zeros((*shape, budget), np.float32)
    tokens = np.full((*shape, budget), pad_id, np.int32)
    return Rollouts(tokens, np.zeros(shape, np.int32), nothing, nothing.copy(), np.zeros(shape, bool))


def _admitted(programs: Programs, asked: Request, state: Rows, seats: Seats, waiting: deque[int]) -> tuple[Rows, Seats]:
    """Waiting prompts take the seats of groups that have left; ``waiting`` gets shorter."""
    free = _free(seats, programs.shards, len(waiting))
    if not free.size:
        return state, seats
    prompts, samples = seats.prompts.copy(), seats.samples.copy()
    prompts[free], samples[free] = [waiting.popleft() for _ in free], np.arange(samples.shape[1])
    places = _places(free, seats.prompts.size, programs.shards)
    # Where there is no seat any prompt will do.
    ids = np.where(places < prompts.size, prompts[np.minimum(places, prompts.size - 1)], prompts[free[0]])
    state = programs.admit(
        asked.params, state, asked.prompt_tokens[ids], asked.prompt_lengths[ids], asked.keys[ids], places, asked.pad_id
    )
    return state, Seats(prompts, samples)


def _free(seats: Seats, shards: int, wanted: int) -> Int[np.ndarray, " n"]:
    """At most so many seats that nobody has, the first of every device before the second of any; in order."""
    free = (seats.prompts < 0).reshape(shards, -1)
    rank = np.where(free, free.cumsum(1), seats.prompts.size + 1).T
    turns = np.argsort(rank, axis=None, kind="stable")[: min(wanted, int(free.sum()))]
    return np.sort(turns % shards * free.shape[1] + turns // shards)


def _places(free: Int[np.ndarray, " n"], seats: int, shards: int) -> Int[np.ndarray, " F"]:
    """A round number of seats for each device: these, and behind them ``seats``, which is out of the room."""
    each = seats // shards
    by_device = [free[free // each == device] for device in range(shards)]
    size = min(_power_of_two(max(map(len, by_device))), each)
    return np.concatenate([np.append(own, np.full(size - len(own), seats)) for own in by_device])


def _compacted(programs: Programs, state: Rows, seats: Seats) -> tuple[Rows, Seats]:
    """The rows that are left, closer together, where that halves the batch at least.

    With rows left (x) as on the left, two groups of two are enough::

        x . . x        x x
        . . . .   ->   x .
        . . x .
    """
    left = seats.samples >= 0
    most = int(left.sum(1).max())
    if not most:
        return state, seats
    groups = left.any(1).reshape(programs.shards, -1)
    prompts, group = (
        min(_power_of_two(int(groups.sum(1).max())), groups.shape[1]),
        min(_power_of_two(most), left.shape[1]),
    )
    if 2 * programs.shards * prompts * group > left.size:
        return state, seats
    # Groups that are left come first on each device, rows that are left first in each group, in their order.
    own = np.argsort(~groups, axis=1, kind="stable")[:, :prompts]
    chosen = (own + np.arange(len(groups))[:, None] * groups.shape[1]).reshape(-1)
    members = np.argsort(~left[chosen], axis=1, kind="stable")[:, :group]
    alive = left[chosen[:, None], members]
    state = programs.keep(state, chosen, members, alive)
    samples = np.where(alive, seats.samples[chosen[:, None], members], -1)
    return state, Seats(np.where(alive.any(1), seats.prompts[chosen], -1), samples)


def _with_room(programs: Programs, state: Rows, seats: Seats) -> tuple[Rows, int]:
    """Rows with room for a token at least, and the step up to which they have it or the next look is due."""
    step, start = to_host((state.step, state.start))
    columns = state.caches[0].v.values.shape[2]
    longest = int((step - start[seats.prompts >= 0]).max())
    if longest == columns:
        state, step, columns = programs.grow(state, columns=2 * columns), columns, 2 * columns
    return state, int(step) + min(STRETCH, columns - longest)


def _collected(drawn: Drawn, seats: Seats, out: Rollouts) -> tuple[Seats, list[tuple[int, int]]]:
    """Rows that have ended go to ``out`` and leave their seat; a group leaves when its last row has."""
    rows = np.argwhere(drawn.done & (seats.samples >= 0))
    ended = [(int(seats.prompts[p]), int(seats.samples[p, g])) for p, g in rows]
    for (p, g), at in zip(rows, ended, strict=True):
        length = out.lengths[at] = drawn.lengths[p, g]
        out.stopped[at] = drawn.stopped[p, g]
        for kept, new in (
            (out.tokens, drawn.tokens),
            (out.sampler_logprobs, drawn.sampler_logprobs),
            (out.tempered_logprobs, drawn.tempered_logprobs),
        ):
            kept[at][:length] = new[p, g, :length]
    samples = np.where(drawn.done, -1, seats.samples)
    return Seats(np.where((samples >= 0).any(1), seats.prompts, -1), samples), ended


def _hand_on(ended: list[tuple[int, int]], out: Rollouts, finished: Finished | None) -> None:
    if finished is not None:
        for at in ended:
            finished(*at, out.tokens[at][: out.lengths[at]])


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
