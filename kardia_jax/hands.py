"""A step's rollouts between sampling and learning, and how they outlive the process.

In: what was sampled, the batch made of it, and the grading that is under way. Out of ``packed``: JSON for a
checkpoint, with everything that came from weights that are gone. Out of ``taken_up``: the same rollouts with the same
log-probs, bit for bit. Texts, prompts and the reference's log-probs are made again from what the run knows. Verdicts
are asked for again: a deterministic judge answers alike, and a cache of verdicts makes any judge do so.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kardia_jax.dialogue.prompt import Prompt
from kardia_jax.judging import Grading
from kardia_jax.model.shares import Rows
from kardia_jax.placement import own_rows
from kardia_jax.rollout.engine import SHORTEST, Sampled, Sampler, pad_rows, text_of
from kardia_jax.types import GroupBatch, Rollouts

AT_SAMPLING = ("old_logprobs", "entropy_floor")
"""Fields of a batch that are computed with the weights that sampled."""


class Hand(NamedTuple):
    """One step's rollouts; the device may still be computing the batch, and the judge the verdicts."""

    asked: Sequence[Prompt]
    """Of all processes."""
    sampled: Sampled
    """Of this process."""
    batch: GroupBatch
    """With old and reference log-probs where the loss reads them; without advantages."""
    grading: Grading


def packed(hand: Hand, rows: Rows | None = None) -> dict[str, Any]:
    """The hand as JSON, the rows of all processes in the order of the batch; waits for the device."""
    fields = hand.batch._asdict()
    at_sampling = {name: fields[name] for name in AT_SAMPLING if fields[name] is not None}
    arrays = own_rows(hand.sampled.rollouts._asdict() | at_sampling)
    if rows is not None:
        arrays = {name: rows.whole(array) if np.ndim(array) else array for name, array in arrays.items()}
    return {name: _written(np.asarray(array)) for name, array in arrays.items()}


def taken_up(
    document: Mapping[str, Any], sampler: Sampler, asked: Sequence[Prompt], grading: Grading, rows: Rows | None = None
) -> tuple[Sampled, dict[str, Array]]:
    """What was packed, for the same prompts, and those fields of ``AT_SAMPLING`` that the batch had; every text goes to
    the judge again. In a run of several processes each takes up its own rows, however many saved them."""
    arrays = {name: _read(written) for name, written in document.items()}
    room = max(len(prompt.tokens) for prompt in asked)
    if rows is not None:
        asked = [asked[place] for place in rows.own]
        arrays = {name: array[rows.own] if array.ndim else array for name, array in arrays.items()}
    rollouts = Rollouts(**{name: arrays[name] for name in Rollouts._fields})
    texts_P_G = [
        [text_of(sampler, row[:length]) for row, length in zip(rows, lengths, strict=True)]
        for rows, lengths in zip(rollouts.tokens, rollouts.lengths, strict=True)
    ]
    for p, texts in enumerate(texts_P_G):
        for g, text in enumerate(texts):
            grading.finished(p, g, text)
    prompts = pad_rows([prompt.tokens for prompt in asked], sampler.pad_id, max(SHORTEST, room))
    sampled = Sampled(*prompts, rollouts, texts_P_G)
    return sampled, {name: jnp.asarray(arrays[name]) for name in AT_SAMPLING if name in arrays}


def _written(array: np.ndarray) -> dict[str, Any]:
    """An array's bytes, with what they mean: {"dtype": "int32", "shape": [2, 4], "data": base64}."""
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _read(written: Mapping[str, Any]) -> np.ndarray:
    """A copy of its own: what comes from bytes cannot be written to."""
    return np.frombuffer(base64.b64decode(written["data"]), written["dtype"]).reshape(written["shape"]).copy()
