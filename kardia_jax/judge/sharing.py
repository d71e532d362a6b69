"""Rows that begin alike, run together: which of them share a prefix, and the padded arrays of a forward pass.

In: the token ids of full prompts, and which prompts belong to which reply of which dialogue. Out: ``Part``s, each a
common prefix with its rows, and ``SharedRows``, right-padded arrays that hold as many parts as the budget allows.

Two replies a and b to one dialogue, two criteria 1 and 2, so four rows. Two ways to share, and none:

    each reply its own part     dialogue a {1 | 2}      dialogue b {1 | 2}      the dialogue is run twice
    all replies in one part     dialogue {a 1 | a 2 | b 1 | b 2}                the replies are run twice
    each row alone              dialogue a 1    dialogue a 2    dialogue b 1    dialogue b 2

In general k replies share a part. ``divide`` counts the padded tokens of every k and takes the fewest; a tie goes to
fewer parts. What is shared is the longest common prefix of token ids of whole prompts, so that no token is ever cut:
the rows are, token for token, what the tokenizer makes of each whole text.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from kardia_jax.dialogue.pipeline import length_buckets

Tokens = tuple[int, ...]
Replies = Sequence[Sequence[int]]
"""Of one dialogue: for each reply the indices of its rows, for every reply as many."""

SHORTEST = 16
"""Prefixes and suffixes are padded to at least this many tokens: shorter ones would only make more programs."""


class Shape(NamedTuple):
    """Padded sizes of a part."""

    prefix: int
    rows: int
    suffix: int

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return self.prefix + self.rows * self.suffix


class Part(NamedTuple):
    """Rows with one prefix."""

    rows: tuple[int, ...]
    prefix: int
    """Tokens that the rows have in common."""
    shape: Shape


class SharedRows(NamedTuple):
    """P parts of G rows each; a row is the beginning of its prefix and the beginning of its suffix."""

    prefix_tokens: Int[np.ndarray, "P S"]
    prefix_lengths: Int[np.ndarray, "P G"]
    suffix_tokens: Int[np.ndarray, "P G T"]
    suffix_lengths: Int[np.ndarray, "P G"]
    """Less than T, so that the place behind each row is there."""

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return self.prefix_tokens.size + self.suffix_tokens.size


def common_prefix(rows: Sequence[Tokens]) -> int:
    """How many tokens all rows begin with: those that the first and the last row in order have in common."""
    first, last = min(rows), max(rows)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return sum(1 for _ in alike)


def divide(rows: Sequence[Tokens], replies: Replies, budget: int) -> list[Part]:
    """The parts of one dialogue with the fewest padded tokens, none of more than ``budget``.

    Every row has to fit alone (``alone``).
    """
    ways = [_by_replies(rows, replies, size) for size in _sizes(len(replies))]
    ways.append([alone(rows, row) for reply in replies for row in reply])
    fitting = [way for way in ways if all(part.shape.tokens <= budget for part in way)]
    return min(fitting, key=lambda way: (sum(part.shape.tokens for part in way), len(way)))


def alone(rows: Sequence[Tokens], row: int) -> Part:
    """A row that shares nothing."""
    return _part(rows, (row,), slots=1)


def _sizes(replies: int) -> list[int]:
    """Replies in a part: all, half of them, a quarter, ..., one."""
    return [-(-replies // 2**halvings) for halvings in range((replies - 1).bit_length() + 1)]


def _by_replies(rows: Sequence[Tokens], replies: Replies, size: int) -> list[Part]:
    starts = range(0, len(replies), size)
    slots = length_buckets(size) * len(replies[0])
    return [_part(rows, tuple(itertools.chain(*replies[start : start + size])), slots) for start in starts]


def _part(rows: Sequence[Tokens], members: tuple[int, ...], slots: int) -> Part:
    prefix = common_prefix([rows[row] for row in members])
    longest = max(len(rows[row]) for row in members) - prefix + 1
    return Part(members, prefix, Shape(_padded(prefix), slots, _padded(longest)))


def _padded(length: int) -> int:
    return length_buckets(max(length, SHORTEST))


def gathered(parts: Sequence[Part], budget: int) -> Iterator[list[Part]]:
    """Parts of one shape, as many together as the budget holds; shapes in order of size, so the order of parts does
    not change which programs run."""
    by_shape: dict[Shape, list[Part]] = {}
    for part in parts:
        by_shape.setdefault(part.shape, []).append(part)
    for shape in sorted(by_shape):
        size, alike = _whole_bucket(max(1, budget // shape.tokens)), by_shape[shape]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _whole_bucket(most: int) -> int:
    """The largest bucket up to ``most``."""
    return next(size for size in range(most, 0, -1) if length_buckets(size) == size)


def padded_arrays(rows: Sequence[Tokens], parts: Sequence[Part], pad: int) -> SharedRows:
    """The parts, which have one shape, as arrays; parts and rows that fill up are one token of padding long."""
    prefix, slots, suffix = parts[0].shape
    count = length_buckets(len(parts))
    out = SharedRows(
        np.full((count, prefix), pad, np.int32),
        np.ones((count, slots), np.int32),
        np.full((count, slots, suffix), pad, np.int32),
        np.zeros((count, slots), np.int32),
    )
    for p, part in enumerate(parts):
        out.prefix_tokens[p, : part.prefix] = rows[part.rows[0]][: part.prefix]
        for g, row in enumerate(part.rows):
            rest = rows[row][part.prefix :]
            out.prefix_lengths[p, g] = part.prefix
            out.suffix_tokens[p, g, : len(rest)] = rest
            out.suffix_lengths[p, g] = len(rest)
    return out
