"""Continuous batching from the host: who sits where, when to look, when to make the batch longer or smaller.

``roll_out`` samples G completions of each of P prompts. It seats as many groups as may sit at once, lets the device
decode a stretch of steps, and looks: rows that are done are handed on while the others go on, waiting prompts take
the seats of groups that have left, rings that are full are doubled, and when no more than half of the rows are left
they move together. All shapes are powers of two (times what came in), so few programs are compiled.

On a mesh the seats of a device stand together, a group sits on one device from its prompt to its last token, and each
device has as many seats as the others; those that nobody takes are rows that are done from the start. In a run of
several processes each of them makes all these decisions alike, from what all know, and holds the rows of its own
devices.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.model.shares import WHOLE, Share
from kardia_jax.placement import own_rows, to_host
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
    share: Share = WHOLE
    """Of the rows, which devices (or groups of devices) share out, and these among the processes of the run."""
    shared_out: Callable[[Any], Any] = lambda rows: rows
    """Rows of this process to the devices."""
    look: Callable[[Any], Any] = to_host
    """What all processes have to know, on the host of each."""


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
    own, group = keys.shape
    prompts, shards = own * programs.share.parts, len(programs.share.owners)
    places = _multiple(min(prompts, max(1, rows // group)) if rows else prompts, shards)
    weights, stops = programs.weights(params), jnp.asarray(stop_ids, jnp.int32)
    columns = min(COLUMNS, length_buckets(max_new_tokens))
    room = {"prompts": places, "size": prompt_tokens.shape[1], "columns": columns, "budget": max_new_tokens}
    state = programs.empty(keys[:1], pad_id, **room)
    seats = Seats(np.full(places, -1), np.full((places, group), -1))
    # Prompts are counted over all processes, part by part; every process knows who sits where, and holds its own rows.
    waiting = [deque(range(first, first + own)) for first in range(0, prompts, own)]
    out, ended = _blank(keys.shape, max_new_tokens, pad_id), []
    while True:
        if any(waiting):
            state, seats = _admitted(programs, asked, state, seats, waiting)
        else:
            state, seats = _compacted(programs, state, seats)
        live = int((seats.samples >= 0).sum())
        if not live:
            break
        state, until = _with_room(programs, state, seats)
        # At least one more row has to end before the next look, or nothing would move.
        least = 0 if any(waiting) else min(seats.samples.size // 2, live - 1)
        state = programs.decode(weights, state, controls, stops, pad_id, until, least)
        # The device is at work: time for the host's own.
        _hand_on(ended, out, finished)
        seats, ended = _collected(programs, state.drawn, seats, out)
    _hand_on(ended, out, finished)
    return out


def _blank(shape: tuple[int, ...], budget: int, pad_id: int) -> Rollouts:
    """Room for all completions on the host."""
    nothing = np.zeros((*shape, budget), np.float32)
    tokens = np.full((*shape, budget), pad_id, np.int32)
    return Rollouts(tokens, np.zeros(shape, np.int32), nothing, nothing.copy(), np.zeros(shape, bool))


def _admitted(
    programs: Programs, asked: Request, state: Rows, seats: Seats, waiting: Sequence[deque[int]]
) -> tuple[Rows, Seats]:
    """Waiting prompts take the seats of groups that have left, each on a device of its process; ``waiting`` gets
    shorter."""
    share = programs.share
    shards = len(share.owners)
    free = _free(seats, np.array(share.owners), [len(queue) for queue in waiting])
    if not any(part.size for part in free):
        return state, seats
    prompts, samples = seats.prompts.copy(), seats.samples.copy()
    for part, queue in zip(free, waiting, strict=True):
        prompts[part], samples[part] = [queue.popleft() for _ in part], np.arange(samples.shape[1])
    places = _places(np.sort(np.concatenate(free)), seats.prompts.size, shards)
    # Where there is no seat any prompt will do.
    here = places.reshape(shards, -1)[share.own_shards()].reshape(-1)
    first = share.part * len(asked.prompt_tokens)
    ids = np.where(here < prompts.size, prompts[np.minimum(here, prompts.size - 1)] - first, 0)
    coming = programs.shared_out((asked.prompt_tokens[ids], asked.prompt_lengths[ids], asked.keys[ids]))
    return programs.admit(asked.params, state, *coming, places, asked.pad_id), Seats(prompts, samples)


def _free(seats: Seats, owners: Int[np.ndarray, " D"], wanted: Sequence[int]) -> list[Int[np.ndarray, " n"]]:
    """For each part at most so many seats that nobody has, the first of every device before the second of any; in
    order."""
    empty = (seats.prompts < 0).reshape(len(owners), -1)

    def of_part(part: int, most: int) -> Int[np.ndarray, " n"]:
        shards = np.flatnonzero(owners == part)
        free = empty[shards]
        rank = np.where(free, free.cumsum(1), seats.prompts.size + 1).T
        turns = np.argsort(rank, axis=None, kind="stable")[: min(most, int(free.sum()))]
        return np.sort(shards[turns % len(shards)] * free.shape[1] + turns // len(shards))

    return [of_part(part, most) for part, most in enumerate(wanted)]


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
    left, shards = seats.samples >= 0, len(programs.share.owners)
    most = int(left.sum(1).max())
    if not most:
        return state, seats
    groups = left.any(1).reshape(shards, -1)
    prompts, group = (
        min(_power_of_two(int(groups.sum(1).max())), groups.shape[1]),
        min(_power_of_two(most), left.shape[1]),
    )
    if 2 * shards * prompts * group > left.size:
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
    step, start = programs.look((state.step, state.start))
    columns = state.caches[0].v.values.shape[2]
    longest = int((step - start[seats.prompts >= 0]).max())
    if longest == columns:
        state, step, columns = programs.grow(state, columns=2 * columns), columns, 2 * columns
    return state, int(step) + min(STRETCH, columns - longest)


def _collected(programs: Programs, drawn: Drawn, seats: Seats, out: Rollouts) -> tuple[Seats, list[tuple[int, int]]]:
    """Rows that have ended leave their seat, and go to ``out`` where they are this process's own; a group leaves when
    its last row has. Gives the own ones as places in ``out``."""
    share, done = programs.share, programs.look(drawn.done)
    at_home = np.arange(seats.prompts.size).reshape(len(share.owners), -1)[share.own_shards()].reshape(-1)
    here, first = own_rows(drawn), share.part * len(out.lengths)
    ended = []
    for row, g in np.argwhere((done & (seats.samples >= 0))[at_home]):
        seat = at_home[row]
        at = int(seats.prompts[seat]) - first, int(seats.samples[seat, g])
        length = out.lengths[at] = here.lengths[row, g]
        out.stopped[at] = here.stopped[row, g]
        for kept, new in (
            (out.tokens, here.tokens),
            (out.sampler_logprobs, here.sampler_logprobs),
            (out.tempered_logprobs, here.tempered_logprobs),
        ):
            kept[at][:length] = new[row, g, :length]
        ended.append(at)
    samples = np.where(done, -1, seats.samples)
    return Seats(np.where((samples >= 0).any(1), seats.prompts, -1), samples), ended


def _hand_on(ended: list[tuple[int, int]], out: Rollouts, finished: Finished | None) -> None:
    if finished is not None:
        for at in ended:
            finished(*at, out.tokens[at][: out.lengths[at]])


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
