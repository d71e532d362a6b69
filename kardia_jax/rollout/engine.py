"""From prompts to sampled texts: padding to few shapes, one call of the sampler, decoding of each text as it ends.

``Sampled`` holds ids and log-probs for the learner and texts for the rewards, exactly as drawn.
"""

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Key
from transformers import PreTrainedTokenizerBase

from kardia_jax.dialogue.pipeline import length_buckets
from kardia_jax.dialogue.prompt import decode_completion
from kardia_jax.hosts import most
from kardia_jax.rollout.batching import Generate
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import Params, Rollouts

SHORTEST = 16
"""Smallest padded length, tokens: below it a new shape saves nothing."""


class Sampler(NamedTuple):
    """What samples, and what belongs to the tokenizer it serves."""

    generate: Generate
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    silent_ids: Set[int]
    pad_id: int


class Sampled(NamedTuple):
    """G completions of each of P prompts."""

    prompt_tokens: Int[np.ndarray, "P S"]
    prompt_lengths: Int[np.ndarray, " P"]
    rollouts: Rollouts
    """NumPy arrays, cut to the bucket of the longest completion."""
    texts_P_G: list[list[str]]
    """Decoded with every special token, less an end-of-turn token that ends the row."""


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, least: int = SHORTEST
) -> tuple[Int[np.ndarray, "N S"], Int[np.ndarray, " N"]]:
    """Right-padded to the bucket of the longest row, or of ``least`` where all are shorter; with lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), length_buckets(max(least, int(lengths.max())))), pad_id, np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, lengths


def sample(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[Sequence[int]],
    keys: Key[jax.Array, "P G"],
    controls: Controls,
    max_new_tokens: int,
    finished: Callable[[int, int, str], None] | None = None,
    room: int = SHORTEST,
) -> Sampled:
    """Samples one completion per key. Each text is decoded, and handed to ``finished`` (prompt, sample, text), as soon
    as its completion has ended, while the device goes on with the others.

    In a run of several processes each gives its own prompts, and ``room``, the longest prompt of all.
    """
    prompt_tokens, prompt_lengths = pad_rows(prompts, sampler.pad_id, max(room, SHORTEST))
    texts_P_G = [[""] * keys.shape[1] for _ in prompts]

    def ended(prompt: int, sample: int, tokens: Int[np.ndarray, " n"]) -> None:
        text = texts_P_G[prompt][sample] = text_of(sampler, tokens)
        if finished is not None:
            finished(prompt, sample, text)

    rollouts = sampler.generate(
        params,
        prompt_tokens,
        prompt_lengths,
        keys,
        controls,
        sampler.stop_ids,
        sampler.pad_id,
        max_new_tokens=max_new_tokens,
        finished=ended,
    )
    used = min(length_buckets(max(SHORTEST, most(int(rollouts.lengths.max())))), max_new_tokens)
    return Sampled(prompt_tokens, prompt_lengths, _cut(rollouts, used), texts_P_G)


def text_of(sampler: Sampler, tokens: Int[np.ndarray, " n"]) -> str:
    """What a completion says: every special token, less an end-of-turn token that ends it."""
    return decode_completion(sampler.tokenizer, _without_end(tokens.tolist(), sampler.silent_ids), frozenset())


def _without_end(row: list[int], silent_ids: Set[int]) -> list[int]:
    """The row less its end-of-turn token. Anywhere else such a token is the policy's mistake and stays to be seen."""
    return row[:-1] if row and row[-1] in silent_ids else row


def _cut(rollouts: Rollouts, length: int) -> Rollouts:
    """The first ``length`` positions: what lies behind is padding in every row."""
    return rollouts._replace(
        tokens=rollouts.tokens[..., :length],
        sampler_logprobs=rollouts.sampler_logprobs[..., :length],
        tempered_logprobs=rollouts.tempered_logprobs[..., :length],
    )
