"""A checkpoint belongs to no mesh: saved on one, read on another, on one device, and back."""

import jax
import numpy as np
import pytest

from kardia_jax.checkpoint import Checkpoints, restore_latest


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def moved(tmp_path):
    """(state, like) -> the state saved, and read as ``like`` lies."""

    def move(name, state, like):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(3, state, {})
        restored = restore_latest(tmp_path / name, like)
        assert restored is not None
        return restored.state

    return move


def test_a_state_goes_from_mesh_to_mesh_to_one_device_bit_for_bit(three_steps, state_on, moved):
    state = three_steps("qwen", "2x2x2").state
    wanted = bits(state)
    assert wanted != bits(state_on("qwen", "2x2x2"))
    for shape in ("1x8x1", "1x1x1", "2x2x2"):
        like = state_on("qwen", shape)
        state = moved(shape, state, like)
        assert bits(state) == wanted
        for came, place in zip(*map(jax.tree.leaves, (state, like)), strict=True):
            assert came.sharding.is_equivalent_to(place.sharding, came.ndim)


def test_every_moment_is_part_of_it(three_steps, start_of):
    """Otherwise the round trip would compare zeros with zeros."""
    moments = [np.asarray(leaf) for leaf in jax.tree.leaves(three_steps("qwen", "2x2x2").state.opt_state)]
    assert sum(leaf.size for leaf in moments) >= 2 * sum(leaf.size for leaf in jax.tree.leaves(start_of("qwen")))
    assert all(np.abs(leaf).max() > 0 for leaf in moments)
