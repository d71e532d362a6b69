"""Which memory an array lives in: the host's, the device's own, or pinned memory of its host, which costs the device
nothing.

An array's type says where it is, so a program needs no flag: ``on_device`` inside it fetches what is elsewhere, and
``where_it_was`` puts a result back to the place of what it replaces.

    state = state._replace(opt_state=offloaded(state.opt_state, "grpo.optimizer.offload"))
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from kardia_jax.config.errors import require

Tree = TypeVar("Tree")
HOST = "pinned_host"


def offloaded(tree: Tree, field: str) -> Tree:
    """The arrays in host memory, on the same mesh; scalars stay. ``field`` is what asked for it.

    Raises ConfigError where a device reaches no pinned host memory.
    """

    def move(leaf: Array) -> Array:
        if leaf.ndim == 0:
            return leaf
        for device in leaf.sharding.device_set:
            kinds = [memory.kind for memory in device.addressable_memories()]
            wanted = f"False on {device.platform}, whose devices have no {HOST} memory"
            require(HOST in kinds, field, wanted, True, f"They have {', '.join(kinds)}.")
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST))

    return jax.tree.map(move, tree)


def on_device(tree: Tree) -> Tree:
    """The same values in device memory, inside a program or outside."""
    return jax.tree.map(lambda leaf: _moved(leaf, jax.memory.Space.Device), tree)


def where_it_was(new: Tree, old: Tree) -> Tree:
    """The values of ``new``, each in the memory of its namesake in ``old``."""
    return jax.tree.map(lambda fresh, before: _moved(fresh, _space(before)), new, old)


def shared_out(tree: Tree, rows: Sharding, whole: Sharding) -> Tree:
    """The gate from the host to the mesh: arrays whose first axis is shared out, and scalars that every device has."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, rows if np.ndim(leaf) else whole), tree)


def to_host(tree: Tree) -> Tree:
    """The gate from the mesh to the host: whole NumPy arrays."""
    return jax.device_get(tree)


def _space(leaf: Any) -> Any:
    return jax.typeof(leaf).memory_space


def _moved(leaf: Any, space: Any) -> Any:
    return leaf if _space(leaf) == space else jax.device_put(leaf, space)
