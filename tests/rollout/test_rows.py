"""Rows on the device: seats that are taken, rings that grow, rows that move. Each number says whose it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.model.decoding import AS_COMPUTED, Storage, sight
from kardia_jax.model.policy import Compute
from kardia_jax.rollout import sampler

GROUPS, GROUP, SIZE, COLUMNS, BUDGET, PAD = 4, 3, 5, 4, 6, 89


def marked(spec, storage: Storage = AS_COMPUTED) -> sampler.Rows:
    """Rows whose numbers all differ within an array; everybody is done."""
    keys = jax.random.split(jax.random.key(0), (GROUPS, GROUP))
    rows = sampler.empty(spec, Compute(), storage, keys, jnp.int32(PAD), len(keys), SIZE, COLUMNS, BUDGET)
    counted = jax.tree.map(
        lambda x: x if x.ndim < 1 or x is rows.keys else (jnp.arange(x.size).reshape(x.shape) % 127).astype(x.dtype),
        rows,
    )
    drawn = counted.drawn._replace(done=rows.drawn.done, stopped=~rows.drawn.stopped)
    return counted._replace(step=jnp.int32(6), drawn=drawn)


@pytest.mark.parametrize("storage", [AS_COMPUTED, Storage(kv="int8")])
def test_a_ring_that_has_gone_round_keeps_what_each_row_sees(model, storage):
    rows, start = marked(model("qwen3").spec, storage), jnp.array([2, 4, 3, 5])
    # Column 0 holds step 4, column 1 step 5; 2 and 3 have not come round.
    held = jnp.array([4, 5, 2, 3])

    def fill(part, axis: int):
        shape = [COLUMNS if i == axis else 1 for i in range(4)]
        return jax.tree.map(lambda x: jnp.broadcast_to(held.reshape(shape), x.shape).astype(x.dtype), part)

    caches = [cache._replace(k=fill(cache.k, 3), v=fill(cache.v, 2)) for cache in rows.caches]
    wide = sampler.grow(rows._replace(start=start, caches=caches), 2 * COLUMNS)
    assert (wide.step - wide.start).tolist() == [4, 2, 3, 1]
    seen = sight(wide.prefix_lengths, wide.step - wide.start, wide.step, (SIZE, 2 * COLUMNS), None).own
    others = np.asarray(seen) & (np.arange(2 * COLUMNS) != wide.step % (2 * COLUMNS))
    for part, axis in ((wide.caches[1].k, 3), (wide.caches[1].v, 2)):
        for leaf in jax.tree.leaves(part):
            steps = np.moveaxis(np.asarray(leaf), axis, 1).reshape(GROUPS * GROUP, 2 * COLUMNS, -1)
            for row, p in zip(steps, np.repeat(range(GROUPS), GROUP), strict=True):
                assert sorted(set(row[others[p]].ravel().tolist())) == list(range(start[p], 6))
                assert (row == row[:, :1]).all()


def test_rows_move_with_all_that_is_theirs(model):
    rows = marked(model("qwen3").spec, Storage(kv="int8"))
    awake = rows._replace(drawn=rows.drawn._replace(done=jnp.zeros((GROUPS, GROUP), bool).at[0, 1].set(True)))
    seats, members = np.array([2, 0, 2]), np.array([[1, 2], [0, 1], [1, 2]])
    alive = np.array([[True, True], [True, True], [False, True]])
    kept = sampler.keep(awake, seats, members, alive)
    assert kept.drawn.done.tolist() == [[False, False], [False, True], [True, False]]
    assert kept.step == awake.step
    by_group = (rows.start, rows.prefix_lengths, *(x for c in rows.caches for x in (c.prompt_k, c.prompt_v)))
    kept_by_group = (kept.start, kept.prefix_lengths, *(x for c in kept.caches for x in (c.prompt_k, c.prompt_v)))
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old[seats]), kept_by_group, by_group)
    by_row, kept_by_row = (
        (one.token, jax.random.key_data(one.keys), one.drawn._replace(done=None)) for one in (rows, kept)
    )
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old[seats[:, None], members]), kept_by_row, by_row)
    for old, new in zip(rows.caches, kept.caches, strict=True):
        places = [2 * GROUP + 1, 2 * GROUP + 2, 0, 1, 2 * GROUP + 1, 2 * GROUP + 2]
        jax.tree.map(lambda n, o, at=places: np.testing.assert_array_equal(n, o[np.array(at)]), new.k, old.k)
        jax.tree.map(lambda n, o, at=places: np.testing.assert_array_equal(n, o[np.array(at)]), new.v, old.v)


def test_prompts_take_their_seats_and_one_too_many_takes_none(model):
    made = model("qwen3")
    tokens = np.random.default_rng(0).integers(0, 90, (4, SIZE)).astype(np.int32)
    lengths, seats = np.array([5, 2, 1, 3], np.int32), np.array([3, 1, 0, GROUPS])
    coming = jax.random.split(jax.random.key(5), (4, GROUP))

    def admitted(prompts: int) -> sampler.Rows:
        arguments = (tokens[:prompts], lengths[:prompts], coming[:prompts], seats[:prompts], PAD)
        return made.programs.admit(made.params, marked(made.spec), *arguments)

    def numbers(rows: sampler.Rows):
        return jax.tree.map(np.asarray, rows._replace(keys=jax.random.key_data(rows.keys)))

    rows, before = numbers(admitted(4)), numbers(marked(made.spec))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), rows, numbers(admitted(3)))
    assert rows.start.tolist() == [6, 6, before.start[2], 6]
    assert rows.prefix_lengths.tolist() == [0, 1, before.prefix_lengths[2], 4]
    for seat, prompt in ((3, 0), (1, 1), (0, 2)):
        assert rows.token[seat].tolist() == [tokens[prompt, lengths[prompt] - 1]] * GROUP
        np.testing.assert_array_equal(rows.keys[seat], jax.random.key_data(coming[prompt]))
        assert not (rows.drawn.done[seat] | rows.drawn.stopped[seat]).any()
        assert (rows.drawn.lengths[seat] == 0).all()
        assert (rows.drawn.tokens[seat] == PAD).all()
        assert (rows.drawn.sampler_logprobs[seat] == 0).all()
        assert (rows.drawn.tempered_logprobs[seat] == 0).all()
    # The group that keeps its seat keeps everything, and nobody's own ring is touched.
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), rows.drawn, before.drawn)
    for new, old in zip(rows.caches, before.caches, strict=True):
        np.testing.assert_array_equal(new.prompt_k.values[2], old.prompt_k.values[2])
        assert (new.prompt_k.values[[0, 1, 3]] != old.prompt_k.values[[0, 1, 3]]).all((1, 2, 3)).all()
        jax.tree.map(np.testing.assert_array_equal, (new.k, new.v), (old.k, old.v))
