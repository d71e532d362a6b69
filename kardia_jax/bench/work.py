"""FLOPs and bytes of sampling, scoring and an update, from the spec and the lengths.

FLOPs are those of matrix products (2 per multiply-add), whichever way a program arranges them: of attention the kept
query-key pairs alone count, and what is recomputed in a backward pass does not; norms, softmax and the optimizer are
left out. ``shared`` runs a prompt once per group. ``repeated`` runs it for every completion, which is what a system
does that knows rows only; both give the same result.

Bytes are the least that must move between memory and cores: parameters once per pass, the keys and values that are
read or written. Activations are left out, so the share of the bandwidth is a lower bound where they do not stay in
caches.

One prompt of 3 tokens with 2 completions of 2, no windows:

                    tokens through the blocks       query-key pairs of a layer
    shared          3 + 2 * 2 = 7                   (1 + 2 + 3) + 2 * (4 + 5) = 24
    repeated        2 * (3 + 2) = 10                2 * (1 + 2 + 3 + 4 + 5) = 30
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kardia_jax.model.spec import ModelSpec

MASTER_BYTES = 4
"""Bytes of a float32 parameter, gradient or moment."""


class Lengths(NamedTuple):
    """The workload: P prompts of S tokens, G completions of T tokens for each."""

    prompts: int
    group: int
    prompt_len: int
    new_tokens: int

    @property
    def rows(self) -> int:
        """Completions, P G."""
        return self.prompts * self.group


class Work(NamedTuple):
    """What a phase has to do."""

    shared_flops: float
    """With each prompt run once: what our programs compute."""
    repeated_flops: float
    """With each prompt run once per completion."""
    bytes: float
    """Memory traffic that the shared form cannot avoid."""

    def times(self, factor: float) -> "Work":
        """So many times the same."""
        return Work(*(factor * value for value in self))


def total(parts: Iterable[Work]) -> Work:
    """All parts together."""
    return Work(*(sum(values) for values in zip(*parts, strict=True)))


def block_parameters(spec: ModelSpec) -> int:
    """Weights of all blocks' matrices: each is used once per token."""
    attention = spec.width * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    return spec.layers * (attention + 3 * spec.width * spec.mlp_width)


def head_parameters(spec: ModelSpec) -> int:
    """Weights of the output table."""
    return spec.vocab_size * spec.width


def keys_seen(spec: ModelSpec, first: int, count: int) -> int:
    """Keys that ``count`` queries from position ``first`` on see, added up over queries and layers."""
    seen = np.arange(first, first + count) + 1
    window = spec.window or 0
    sliding = sum(spec.slides)
    return int((spec.layers - sliding) * seen.sum() + sliding * np.minimum(seen, window).sum())


def forward_flops(spec: ModelSpec, first: int, count: int) -> float:
    """Blocks and attention of one row's ``count`` tokens from position ``first`` on; no head."""
    return 2 * block_parameters(spec) * count + 4 * spec.heads * spec.head_dim * keys_seen(spec, first, count)


def cache_bytes(spec: ModelSpec, keys: int, element: int) -> float:
    """Keys and values at this many places, each place of one layer."""
    return 2 * spec.kv_heads * spec.head_dim * keys * element


def prefill(spec: ModelSpec, lengths: Lengths, element: int) -> Work:
    """The prompts, and the first token of every completion; ``element`` is the bytes of a number in compute type."""
    head = 2 * head_parameters(spec) * lengths.rows
    prompt = forward_flops(spec, 0, lengths.prompt_len)
    written = cache_bytes(spec, spec.layers * lengths.prompts * lengths.prompt_len, element)
    weights = (block_parameters(spec) + head_parameters(spec)) * element
    return Work(lengths.prompts * prompt + head, lengths.rows * prompt + head, weights + written)


def decode(spec: ModelSpec, lengths: Lengths, element: int) -> Work:
    """The other T - 1 tokens of every completion. Each step reads all weights, each group's prompt once, and what its
    completions have so far; the FLOPs of the two forms are the same."""
    steps, prompt_len = lengths.new_tokens - 1, lengths.prompt_len
    row = forward_flops(spec, prompt_len, steps) + 2 * head_parameters(spec) * steps
    weights = steps * (block_parameters(spec) + head_parameters(spec)) * element
    prompt_keys, own_keys = _decode_keys(spec, prompt_len, steps)
    read = cache_bytes(spec, lengths.prompts * prompt_keys + lengths.rows * own_keys, element)
    written = cache_bytes(spec, spec.layers * lengths.rows * steps, element)
    return Work(lengths.rows * row, lengths.rows * row, weights + read + written)


def score(spec: ModelSpec, lengths: Lengths) -> Work:
    """Log-probs of every completion token, from float32 masters."""
    prompt = forward_flops(spec, 0, lengths.prompt_len)
    completion = forward_flops(spec, lengths.prompt_len, lengths.new_tokens)
    completion += 2 * head_parameters(spec) * lengths.new_tokens
    return Work(
        lengths.prompts * prompt + lengths.rows * completion,
        lengths.rows * (prompt + completion),
        spec.parameter_count * MASTER_BYTES,
    )


def update(spec: ModelSpec, lengths: Lengths, micro_batches: int) -> Work:
    """Forward, backward (twice the forward's products) and AdamW.

    Every micro-batch reads the parameters twice and adds to the gradient (read and write); AdamW reads the gradient,
    and reads and writes parameters and two moments.
    """
    once = score(spec, lengths).times(3)
    passes = 4 * micro_batches + 7
    return once._replace(bytes=passes * spec.parameter_count * MASTER_BYTES)


def _decode_keys(spec: ModelSpec, prompt_len: int, steps: int) -> tuple[int, int]:
    """Keys of the prompt, and of the completion itself, that one row's decoding reads, over steps and layers."""
    own = np.arange(steps) + 1
    window, sliding = spec.window or 0, sum(spec.slides)
    near = np.clip(window - own, 0, prompt_len)
    prompt = (spec.layers - sliding) * prompt_len * steps + sliding * int(near.sum())
    return prompt, keys_seen(spec, prompt_len, steps) - prompt
