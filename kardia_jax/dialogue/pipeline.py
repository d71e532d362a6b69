"""The order of training: which items stand in the batch of a step, as a pure function of (seed, step).

In: a sequence of anything and a batch size. Out: ``Batches``, indexed by step. Every epoch visits every item
once, in an order of its own; a batch may straddle two epochs, so nothing is dropped or repeated when the
batch does not divide the items. A resumed run asks for step n and has no iterator state to restore.

Five items in batches of two, each epoch shuffled anew:

    step     0     1     2     3     4
    items   c a   e b   d|b   e a   d c       | is where the second epoch begins, in the middle of step 2

Padding costs as much as text, so items of like length can be put together: ``window`` batches are drawn at once,
sorted by ``length``, cut, and shuffled as whole batches. What is drawn in a window does not change.

Several processes each take their slice of the same global batch: joined by process index they are the batch
that one process would have taken.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:  # grain takes a second to import; whoever only pads to buckets needs none
    import grain

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batches(Generic[Item]):
    """Batches for every step from 0 on, without end; make it with ``batches``."""

    items: Sequence[Item]
    batch: int
    """Items in one step over all shards."""
    shard: int
    shards: int
    order: "grain.MapDataset[int]"
    """Index of the n-th item ever drawn."""
    seed: int
    length: Callable[[Item], Any] | None
    """Sort key inside a window; None leaves the items as they were drawn."""
    window: int
    """Batches that are drawn and sorted together."""

    def __getitem__(self, step: int) -> list[Item]:
        """This shard's items of one step, ``batch / shards`` of them; IndexError for a step below 0."""
        if step < 0:
            raise IndexError(f"step: wanted 0 or more, got {step}.")
        window, place = divmod(step, self.window)
        first = window * self.window * self.batch
        drawn = [self._drawn(n) for n in range(first, first + self.window * self.batch)]
        if self.length is not None:
            drawn.sort(key=self.length)
        size = self.batch // self.shards
        start = self._place(window, place) * self.batch + self.shard * size
        return drawn[start : start + size]

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every item comes once; a fraction where the batch does not divide the items."""
        return len(self.items) / self.batch

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0 on, in which the step's first item is drawn."""
        return step * self.batch // len(self.items)

    def steps_for(self, epochs: float) -> int:
        """Steps until every item has come ``epochs`` times, rounded up, at least 1."""
        return max(1, math.ceil(epochs * len(self.items) / self.batch))

    def _place(self, window: int, place: int) -> int:
        """Which batch of the sorted window comes at this place; without the shuffle lengths would rise and fall."""
        order = list(range(self.window))
        random.Random(f"{self.seed} {window}").shuffle(order)
        return order[place]

    def _drawn(self, n: int) -> Item:
        index = self.order[n]
        assert index is not None
        return self.items[index]


def batches(
    items: Sequence[Item],
    batch: int,
    seed: int,
    shard: int = 0,
    shards: int = 1,
    length: Callable[[Item], Any] | None = None,
    window: int = 1,
) -> Batches[Item]:
    """Endless shuffled batches of ``items``; with ``length``, items alike in it share a batch (see the module).

    ``batch`` counts over all shards. Raises ValueError without items, for a batch below 1 or one that the
    shards do not divide, and for a shard outside [0, shards),
    and for a window below 1.
    """
    if not items:
        raise ValueError("items: wanted at least one, got none.")
    if batch < 1 or shards < 1 or batch % shards:
        raise ValueError(f"batch: wanted a positive multiple of shards = {shards}, got {batch}.")
    if not 0 <= shard < shards:
        raise ValueError(f"shard: wanted 0 to {shards - 1}, got {shard}.")
    if window < 1:
        raise ValueError(f"window: wanted at least 1, got {window}.")
    import grain

    order = grain.MapDataset.range(len(items)).seed(seed).shuffle().repeat()
    return Batches(items, batch, shard, shards, order, seed, length, window)


def length_buckets(n: int) -> int:
    """``n`` rounded up to a number with two significant binary digits: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    Lengths that are padded to a bucket take few shapes, hence few compilations, and waste under a third of
    the tokens. Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n: wanted at least 1, got {n}.")
    power = 1 << (n - 1).bit_length()
    three_quarters = power * 3 // 4
    return three_quarters if n <= three_quarters else power
