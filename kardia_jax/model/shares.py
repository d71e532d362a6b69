"""Which rows are whose: what part of a batch lies on the devices of this process, and how parts become a whole.

The rows of a batch are cut over ``data`` and ``fsdp`` (``sharding.py``). A process holds the rows of its own devices
and no others: it reads their prompts, keeps what they sampled and asks the judge about them. With 4 prompts in 2
updates, 2 processes of 2 devices and a mesh of data 2 x tensor 2

    part 0, process 0      prompts 0 and 2        the first half of the first update, and of the second
    part 1, process 1      prompts 1 and 3        the second half of each

Where the devices of one tensor belong to several processes, these hold the same rows; the first of them speaks for all.
On one process there is one part, everything is its own, and nothing here moves a byte.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kardia_jax.config import ConfigError
from kardia_jax.config.errors import require
from kardia_jax.hosts import alone, gathered
from kardia_jax.model.sharding import row_shards


class Share(NamedTuple):
    """The part of every batch that this process holds."""

    part: int = 0
    """Which one, from 0 on."""
    speakers: tuple[int, ...] = (0,)
    """For each part the process that speaks for it."""
    owners: tuple[int, ...] = (0,)
    """The part that each shard of the rows belongs to, in the order of shards; each part has as many as the others."""

    @property
    def speaks(self) -> bool:
        """Whether this process speaks for its part: asks the judge, and counts in sums."""
        return self.speakers[self.part] == jax.process_index()

    @property
    def parts(self) -> int:
        """How many there are."""
        return len(self.speakers)

    def own_shards(self) -> np.ndarray:
        """Shards of the rows that lie on devices of this process, in order."""
        return np.flatnonzero(np.array(self.owners) == self.part)

    def everybodys(self, own: Any) -> np.ndarray:
        """An array of each part, along a new first axis; all processes must call it, with the same shape."""
        if alone():
            return np.asarray(own)[None]
        return np.asarray(multihost_utils.process_allgather(np.asarray(own)))[list(self.speakers)]

    def told(self, text: str) -> list[str]:
        """What each part says; all processes must call it."""
        return [said for place, said in enumerate(gathered(text)) if place in self.speakers]


WHOLE = Share()


def share_of(mesh: Mesh | None) -> Share:
    """This process's part of what lies on the mesh.

    Raises ConfigError for a mesh over which no such parts can be made: where processes share some rows and not others.
    """
    if mesh is None:
        fix = "Set mesh.data or mesh.fsdp to -1: the devices of all processes."
        require(alone(), "mesh", f"the devices of all {jax.process_count()} processes", "1x1x1", fix)
        return WHOLE
    if alone():
        return WHOLE._replace(owners=(0,) * row_shards(mesh))
    grid = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(row_shards(mesh), -1)
    held: dict[frozenset[int], list[int]] = {}
    for shard, processes in enumerate(grid):
        held.setdefault(frozenset(processes.tolist()), []).append(shard)
    # In the order of their first shard.
    groups, sizes = list(held), {len(shards) for shards in held.values()}
    if sum(map(len, groups)) != jax.process_count() or len(sizes) > 1:
        shown = ", ".join(f"{shards} on {sorted(group)}" for group, shards in held.items())
        fix = "Let tensor divide the devices of a process, or be a multiple of them."
        raise ConfigError("mesh", "processes that hold the same rows or none in common", f"rows {shown}", fix)
    owners = tuple(groups.index(frozenset(processes.tolist())) for processes in grid)
    here = next(part for part, group in enumerate(groups) if jax.process_index() in group)
    return Share(here, tuple(map(min, groups)), owners)


class Rows(NamedTuple):
    """Where the rows of a batch are, as places in the order of the whole batch."""

    share: Share
    places: np.ndarray
    """[parts, rows of a part]"""

    @property
    def own(self) -> np.ndarray:
        """Of this process's part."""
        return self.places[self.share.part]

    def whole(self, own: Any) -> np.ndarray:
        """An array [own rows, ...] of every part as one [rows, ...], in order; all processes must call it."""
        by_part = self.share.everybodys(own)
        out = np.empty((self.places.size, *by_part.shape[2:]), by_part.dtype)
        out[self.places.reshape(-1)] = by_part.reshape(-1, *by_part.shape[2:])
        return out


def rows_of(share: Share, rows: int, updates: int = 1) -> Rows:
    """Every part has as many rows of each update as the others.

    >>> rows_of(Share(1, (0, 1), (0, 1)), rows=4, updates=2).own
    array([1, 3])
    """
    by_update = np.arange(rows).reshape(updates, share.parts, -1)
    return Rows(share, by_update.swapaxes(0, 1).reshape(share.parts, -1))
