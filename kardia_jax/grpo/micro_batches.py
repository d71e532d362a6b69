"""A batch cut into micro-batches by tokens instead of by number, on the host.

In: a batch whose groups differ in length, and a budget in tokens. Out: micro-batches of groups alike in length, each
padded to its own bucket and no longer. With 2 completions a group and a budget of 400 tokens:

    longest prompt      30    40    20    30           padded together: 4 x (48 + 2 x 128) = 1,216 tokens
    longest completion 100    20    90    16

    sorted by completion: 100 90 | 20 16               cut in two: 2 x (32 + 2 x 128), over the budget, so in three:
                          100 | 90 | 20 16             (32 + 2 x 128) + (24 + 2 x 96) + 2 x (48 + 2 x 24) = 696 tokens

Lengths are bucketed and so is the number of groups (a micro-batch holds 1, 2, 3, 4, 6, 8, 12, ... of them; none is
made up), so few shapes are compiled.
"""

from collections.abc import Sequence

import jax
import numpy as np

from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.model.shares import WHOLE, Share
from kardia_jax.placement import to_host
from kardia_jax.types import GroupBatch

WORTH_A_CUT = 8
"""One more micro-batch has to save a share of 1 / 8 of the budget in padding: it reads all weights once more."""


def micro_batches(batch: GroupBatch, budget: int, shortest: int = 1, share: Share = WHOLE) -> list[GroupBatch]:
    """Micro-batches of host arrays, longest first, each within ``budget`` tokens or a single group.

    Tokens of a micro-batch are groups x (padded prompt + completions x padded completion). Lengths are padded to
    ``shortest`` at least. Every group of the batch is in exactly one; positions that no loss row reaches are cut off.
    On a mesh that shares the rows out the budget is that of one device, and so is the single group. In a run of several
    processes ``batch`` holds the rows of this one, and each micro-batch takes as many from every process.
    """
    host = to_host(batch)
    prompts = np.asarray(host.prompt_lengths).max(1)
    completions = np.where(host.loss_rows, host.completion_lengths, 0).max(1)
    # Answers that none of these conversations has stand at the end; sampled groups have all of theirs.
    _, group, longest = host.completion_tokens.shape
    used = np.where(host.completion_lengths > 0, np.arange(group) + 1, 1).max(1)
    own = [
        (_padded(s, shortest, host.prompt_tokens.shape[1]), _padded(t, shortest, longest), _padded(g, 1, group))
        for s, t, g in zip(prompts.tolist(), completions.tolist(), used.tolist(), strict=True)
    ]
    sizes = [(s, t, g) for part in share.everybodys(own).tolist() for s, t, g in part]
    here = range(share.part * len(own), (share.part + 1) * len(own))
    parts = plan([(s, t) for s, t, _ in sizes], group, budget, len(share.owners), share.parts)
    return [
        _cut(host, [row - here.start for row in rows if row in here], np.max([sizes[row] for row in rows], 0))
        for rows in parts
    ]


def plan(sizes: Sequence[tuple[int, int]], group: int, budget: int, shards: int = 1, parts: int = 1) -> list[list[int]]:
    """Which groups share a micro-batch, given their padded (prompt, completion) lengths.

    Of all ways to cut the sorted groups the one with the fewest padded tokens, where a cut costs ``budget /
    WORTH_A_CUT``. A group that is larger than the budget stands alone. The number of groups is a multiple of
    ``shards``, and those of one device count. With several ``parts`` the rows are those of one process after the other:
    each is sorted for itself, and as many are taken from each.
    """
    own, each = len(sizes) // parts, shards // parts
    orders = [
        sorted(range(first, first + own), key=lambda row: (sizes[row][1], sizes[row][0]), reverse=True)
        for first in range(0, len(sizes), own)
    ]
    # One entry a place where a cut may be.
    taken = [[row for order in orders for row in order[at : at + each]] for at in range(0, own, each)]
    longest = [tuple(max(sizes[row][axis] for row in rows) for axis in (0, 1)) for rows in taken]
    costs, starts = [0], [0]
    for end in range(1, len(taken) + 1):
        cheapest, prompt, completion = (np.inf, 0), 0, 0
        for start in range(end - 1, -1, -1):
            rows, (s, t) = end - start, longest[start]
            prompt, completion = max(prompt, s), max(completion, t)
            tokens = rows * (prompt + group * completion)
            if rows > 1 and tokens > budget:
                break
            if length_buckets(rows) == rows:
                cheapest = min(cheapest, (costs[start] + tokens + budget // WORTH_A_CUT, start))
        costs.append(int(cheapest[0]))
        starts.append(int(cheapest[1]))
    found, end = [], len(taken)
    while end:
        found.append([row for rows in taken[starts[end] : end] for row in rows])
        end = starts[end]
    return found[::-1]


def _padded(length: int, shortest: int, whole: int) -> int:
    """The bucket of a length, but never more than the batch has."""
    return min(length_buckets(max(length, shortest)), whole)


def _cut(batch: GroupBatch, rows: Sequence[int], size: Sequence[int]) -> GroupBatch:
    """These rows, cut to (prompt, completion, completions of a group)."""
    prompt, completion, group = size

    def part(x: np.ndarray) -> np.ndarray:
        if x.ndim == 0:
            return x
        return x[rows][:, :group] if x.ndim == 2 else x[rows][:, :group, :completion]

    return jax.tree.map(part, batch)._replace(prompt_tokens=batch.prompt_tokens[rows][:, :prompt])
