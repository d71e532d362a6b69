"""Checkpoints of a run: a directory that is complete or is not there.

In: the step, the ``TrainState`` and ``extra``, a JSON dict (counters, position in the data, resolved config).
Out: one directory per step, the newest n kept:

    checkpoints/100/state/...            arrays, by Orbax
    checkpoints/100/extra/metadata       {"leaves": {"params.embed.embedding": ...}, "extra": {...}, "crc32":
    ...}

    with Checkpoints(run_dir / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(100, state, {"prompts_seen": 400})
    restored = restore_latest(run_dir / "checkpoints", like=state)     # or None
    restored.step, restored.state, restored.extra == 100, state, {"prompts_seen": 400}

Orbax writes into a temporary directory, in the background, and renames it at the end, so a killed run leaves
the older checkpoints as they were. What Orbax does not do is done here: it restores flipped bits without a
word and casts or pads what does not fit, so every array is saved beside its shape, its dtype and a
fingerprint, and all three are compared. Arrays are stored by path (``params.embed.embedding``), and come back
with the sharding of ``like``, which may be on another mesh than the one that saved them.
"""

import errno
import json
import logging
import math
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt

from kardia_jax.hosts import anyone, is_first
from kardia_jax.placement import HOST, on_device
from kardia_jax.types import TrainState

FREE_SPACE_MARGIN = 1.2
"""Free bytes wanted per byte of state: metadata, and file systems that round up."""
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
TEMPORARY = ".orbax-checkpoint-tmp"

Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used: names the folder, what is wrong and what to do."""


class Restored(NamedTuple):
    """What came back."""

    step: int
    state: TrainState
    extra: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of one run; a context manager, since the last one may still be under way."""

    def __init__(self, dir: pathlib.Path, keep: int = 2):
        self.dir = _absolute(dir)
        dir.mkdir(parents=True, exist_ok=True)
        for path in interrupted(dir) if is_first() else ():
            print(f"Removing {path}: it was interrupted and is not complete.", file=sys.stderr)
            shutil.rmtree(path)
        anyone(False)  # None of several processes goes on before that.
        self._needed = 0
        self._manager = _manager(self.dir, max_to_keep=keep)

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any]) -> None:
        """Start writing; returns when the state has been copied and may be donated. A saved step is left as
        it is.

        Waits for the checkpoint before. Raises CheckpointError when that one failed, when the disk has no
        room (found out before anything is written), or when the write fails; older checkpoints are untouched.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        leaves = {path: _own_copy(leaf) for path, leaf in _by_path(state).items()}
        self._needed = sum(_bytes(leaf) for leaf in leaves.values())
        _require_space(self.dir, self._needed)
        items = ocp.args.Composite(state=ocp.args.StandardSave(leaves), extra=ocp.args.JsonSave(_sealed(leaves, extra)))
        try:
            accepted = self._manager.save(step, args=items)
        except Exception as error:  # Orbax has OSError, ValueError and RuntimeError for a full disk.
            raise self._failure(error) from error
        if not accepted:
            fix = "Move the later checkpoints away."
            raise CheckpointError(f"{self.dir}: step {step} is not later than the newest checkpoint. {fix}")

    def wait(self) -> None:
        """Block until the checkpoint under way is complete; raises CheckpointError when it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # See save.
            raise self._failure(error) from error

    def close(self) -> None:
        """``wait``, then stop Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failure(self, error: Exception) -> CheckpointError:
        for path in interrupted(self.dir) if is_first() else ():
            shutil.rmtree(path, ignore_errors=True)
        if _disk_is_full(error):
            return CheckpointError(_full_disk_message(self.dir, self._needed))
        return CheckpointError(f"{self.dir}: the checkpoint could not be written: {_first_line(error)}")


def restore_latest(dir: pathlib.Path, like: TrainState) -> Restored | None:
    """The newest complete checkpoint, or None; interrupted ones are named on stderr and passed over.

    ``like`` holds arrays or ShapeDtypeStructs; each array comes back with the sharding of its namesake, a
    NumPy array as a NumPy array. Raises CheckpointError as ``restore`` does.
    """
    for path in interrupted(dir):
        print(f"Ignoring {path}: it was interrupted and is not complete.", file=sys.stderr)
    step = latest_step(dir)
    return None if step is None else restore(dir, step, like)


def restore(dir: pathlib.Path, step: int, like: TrainState) -> Restored:
    """The checkpoint of one step.

    Raises CheckpointError for a file that is damaged, and for a tree, shape or dtype that is not that of
    ``like``.
    """
    wanted = _by_path(like)
    place = _absolute(dir) / str(step)
    with _manager(place.parent, read_only=True) as manager:
        document = _read(manager, step, place, "extra", ocp.args.JsonRestore())
        if document.get("crc32") != _crc32(document):
            raise _damaged(place, "extra/metadata has another checksum than when it was written")
        _require_same_tree(place, document["leaves"], wanted)
        targets = {path: _target(leaf) for path, leaf in wanted.items()}
        leaves = _read(manager, step, place, "state", ocp.args.StandardRestore(targets))
    for path, fingerprint in _fingerprints(leaves).items():
        if fingerprint != document["leaves"][path]["fingerprint"]:
            raise _damaged(place, f"{path} has other bits than when it was written")
    state = jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in wanted])
    return Restored(step, state, document["extra"])


def latest_step(dir: pathlib.Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    steps = [int(path.name) for path in _step_folders(dir) if _is_complete(path)]
    return max(steps, default=None)


def interrupted(dir: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that were begun and not finished: temporary folders, and copies that lack a part."""
    if not dir.is_dir():
        return []
    temporary = [path for path in dir.iterdir() if path.is_dir() and TEMPORARY in path.name]
    return sorted(temporary + [path for path in _step_folders(dir) if not _is_complete(path)])


def refuse_existing(dir: pathlib.Path) -> None:
    """Raise CheckpointError when a run that starts from nothing would mix with the checkpoints of another."""
    step = latest_step(dir)
    if step is not None:
        fix = "Go on from it with --run.resume, or choose another --run.dir."
        wanted = "a folder without checkpoints"
        raise CheckpointError(f"run.dir: wanted {wanted}, got {dir} with step {step}. {fix}")


def fingerprint(array: Array) -> UInt[Array, ""]:
    """Sum of the array's words, each times an odd number that depends on its place, modulo 2^32.

    sum_i w_i (2 i + 1) mod 2^32. One flipped bit always shows, since an odd number times a power of two below
    2^32 is not 0. Integer sums do not depend on their order, so the mesh does not matter, and nothing leaves
    the device.
    """
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(np.cumprod((1, *words.shape[:0:-1]))[::-1][: words.ndim]):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(int(stride) % 2**32)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _words(array: Array) -> UInt[Array, "..."]:
    """The bits as uint32: small types widened one by one, 8-byte types as two words."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


_fingerprint_all = jax.jit(lambda leaves: {path: fingerprint(on_device(leaf)) for path, leaf in leaves.items()})


def _fingerprints(leaves: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """On the device for its arrays; host arrays by CRC-32, since a device would narrow their 64-bit types."""
    sums: dict[str, int] = {}
    # One compiled call takes arrays of one set of devices; a run has one, a resume onto a mesh may have two.
    groups: dict[frozenset[object], dict[str, jax.Array]] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, np.ndarray):
            sums[path] = zlib.crc32(leaf.tobytes())
        else:
            groups.setdefault(frozenset(leaf.sharding.device_set), {})[path] = leaf
    for group in groups.values():
        sums |= {path: int(value) for path, value in jax.device_get(_fingerprint_all(group)).items()}
    return sums


def _by_path(state: TrainState) -> dict[str, Any]:
    """Leaves by dotted path, in the order of the tree; NumPy scalars become arrays."""
    pairs = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        if isinstance(leaf, np.generic | int | float)
        else leaf
        for path, leaf in pairs
    }


def _own_copy(leaf: Any) -> Any:
    """Orbax copies what is on a device, but would write from an array in host memory itself, which the next update
    takes."""
    offloaded = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == HOST
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if offloaded else leaf


def _bytes(leaf: Leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _sealed(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the arrays, with its own checksum. Raises TypeError for an extra that is no JSON."""
    sums = _fingerprints(leaves)
    described = {path: {**_described(leaf), "fingerprint": sums[path]} for path, leaf in leaves.items()}
    # Through JSON and back, so that the checksum is taken of what will be read (keys become strings, tuples
    # lists).
    document = json.loads(json.dumps({"leaves": described, "extra": dict(extra)}))
    return {**document, "crc32": _crc32(document)}


def _described(leaf: Leaf) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _crc32(document: Mapping[str, Any]) -> int:
    content = {name: document.get(name) for name in ("leaves", "extra")}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _target(leaf: Leaf) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same_tree(place: pathlib.Path, saved: Mapping[str, Any], wanted: Mapping[str, Leaf]) -> None:
    """Name the first path at which the checkpoint and the model differ."""
    for path in [*wanted, *saved]:
        want = _shown(_described(wanted[path])) if path in wanted else "nothing"
        got = _shown(saved[path]) if path in saved else "nothing"
        if want != got:
            fix = "Restore with the model and optimizer settings of the run that saved it."
            raise CheckpointError(f"{place}: {path}: wanted {want}, got {got}. {fix}")


def _shown(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}{description['shape']}"


def _read(manager: ocp.CheckpointManager, step: int, place: pathlib.Path, item: str, args: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:  # A damaged file gives ValueError, KeyError, OSError or a bare Exception.
        raise _damaged(place / item, _first_line(error)) from error


def _damaged(place: pathlib.Path, reason: str) -> CheckpointError:
    fix = "Delete or move this step's folder to go on from the one before."
    return CheckpointError(f"{place}: the checkpoint is damaged: {reason}. {fix}")


def _require_space(dir: pathlib.Path, needed: int) -> None:
    if shutil.disk_usage(dir).free <= needed * FREE_SPACE_MARGIN:
        raise CheckpointError(_full_disk_message(dir, needed))


def _full_disk_message(dir: pathlib.Path, needed: int) -> str:
    free = shutil.disk_usage(dir).free
    wanted = int(needed * FREE_SPACE_MARGIN)
    fix = "Free some space, lower run.keep_checkpoints, or choose another run.dir, and resume."
    return (
        f"{dir}: no room for a checkpoint: wanted {wanted:,} free bytes ({needed:,} bytes of state), "
        f"got {free:,}. Older checkpoints are untouched. {fix}"
    )


def _disk_is_full(error: BaseException) -> bool:
    """Also for a quota and for the largest file size; TensorStore puts the number into its message only."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return code is not None and int(code.group(1)) in DISK_FULL


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def _manager(dir: pathlib.Path, max_to_keep: int | None = None, read_only: bool = False) -> ocp.CheckpointManager:
    # Orbax logs the traceback of every error that it also raises; ours is one line that says what to do.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, read_only=read_only)
    return ocp.CheckpointManager(dir, options=options)


def _step_folders(dir: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in dir.iterdir() if path.is_dir() and path.name.isdigit()] if dir.is_dir() else []


def _is_complete(path: pathlib.Path) -> bool:
    return (path / "state").is_dir() and (path / "extra" / "metadata").is_file()


def _absolute(dir: pathlib.Path) -> pathlib.Path:
    # Orbax refuses relative paths.
    return dir.absolute()
