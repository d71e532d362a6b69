"""Which memory an array lives in: the host's, the device's own, or pinned memory of its host, which costs the device
nothing.

An array's type says where it is, so a program needs no flag: ``on_device`` inside it fetches what is elsewhere, and
``where_it_was`` puts a result back to the place of what it replaces.

    state = state._replace(opt_state=offloaded(state.opt_state, "grpo.optimizer.offload"))
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
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


def put(value: Any, place: Sharding | None) -> Array:
    """The array at this place, which may be on devices of other processes: each of them has the whole value and sends
    nothing to the others."""
    if place is None or place.is_fully_addressable or _is_global(value):
        return jax.device_put(value, place)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def shared_out(tree: Tree, rows: Sharding, whole: Sharding) -> Tree:
    """The gate from the host to the mesh: arrays whose first axis is shared out, and scalars that every device has.

    Each process gives the rows of its own devices; what lies on the mesh already stays.
    """

    def one(leaf: Any) -> Array:
        if rows.is_fully_addressable:
            return jax.device_put(leaf, rows if np.ndim(leaf) else whole)
        if _is_global(leaf):
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)))
        return jax.make_array_from_process_local_data(rows, np.asarray(leaf)) if np.ndim(leaf) else put(leaf, whole)

    return jax.tree.map(one, tree)


def to_host(tree: Tree) -> Tree:
    """The gate from the mesh to the host: whole NumPy arrays."""
    return jax.device_get(tree)


def own_rows(tree: Tree) -> Tree:
    """The same, of arrays whose first axis is shared out among processes: the rows on this one's devices."""

    def one(leaf: Any) -> Any:
        if not _is_global(leaf) or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        # Devices that share a tensor hold the same rows.
        parts = {shard.index[0].start or 0: shard for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])

    return jax.tree.map(one, tree)


def beside(own: Any, other: Array) -> Array:
    """Rows of this process, shared out as the rows of ``other`` are."""
    return jax.make_array_from_process_local_data(other.sharding, np.asarray(own)) if _is_global(other) else own


def everybodys(value: Any) -> np.ndarray:
    """The whole array on the host of every process; all of them must call it."""
    return multihost_utils.process_allgather(value, tiled=True) if _is_global(value) else np.asarray(value)


def _is_global(leaf: Any) -> bool:
    """Whether some of the array lies on devices of other processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _space(leaf: Any) -> Any:
    return jax.typeof(leaf).memory_space


def _moved(leaf: Any, space: Any) -> Any:
    return leaf if _space(leaf) == space else jax.device_put(leaf, space)
