"""The nouns that sampler, learner and loops exchange, and the alphabet of axes.

P prompts in the batch · G completions per prompt · S prompt positions · T completion positions · V vocabulary ·
D model width · H query heads · K kv heads · Q = H/K · E head dim · F mlp width · L layers · R rubric criteria ·
N rows, whatever they are (in the pure maths N = P * G).

Masks are bool and say what is *kept*. Padding is always on the right, with lengths beside it. ``logprobs`` always has
an owner: ``policy_``, ``old_``, ``ref_`` or ``sampler_``; the unit is nats.

Nouns of text (dialogues, spans, verdicts) live with the rooms that make them and know no JAX.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
"""Nested dict of arrays; the layout is drawn in ``kardia_jax/model/layers.py``."""

NOTHING: Params = {}
"""The frozen parameters of a policy that is trained whole."""


class Mean(NamedTuple):
    """A mean that has not been divided yet: add sums and weights over micro-batches and devices, divide once.

    Example: tokens 3 and 5 of weight 1 are ``Mean(8.0, 2.0)``, whose value is 4.0.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]


class Rollouts(NamedTuple):
    """G sampled completions for each of P prompts, on the host."""

    tokens: Int[np.ndarray, "P G T"]
    lengths: Int[np.ndarray, "P G"]
    """Number of sampled tokens, the stop token included."""
    sampler_logprobs: Float[np.ndarray, "P G T"]
    """Log-prob of each token under the distribution that it was really drawn from (after top-k, top-p, min-p)."""
    tempered_logprobs: Float[np.ndarray, "P G T"]
    """Log-prob of each token under softmax(logits / temperature), nothing filtered."""
    stopped: Bool[np.ndarray, "P G"]
    """True where a stop token ended the row; False where the token budget did."""


class GroupBatch(NamedTuple):
    """What one update learns from. The prompt is stored once per group.

    Completion (p, g) continues the first ``prompt_lengths[p, g]`` tokens of prompt p. Samples of one question all
    continue the whole prompt; the answers of one conversation (supervised training) each continue their own part.

    ``None`` for ``old_logprobs`` means on-policy: the ratio is exactly 1. ``None`` for ``ref_logprobs`` means no KL
    term, for ``sampler_logprobs`` no correction, for ``entropy_floor`` no entropy mask.
    """

    prompt_tokens: Int[Array, "P S"]
    prompt_lengths: Int[Array, "P G"]
    completion_tokens: Int[Array, "P G T"]
    completion_lengths: Int[Array, "P G"]
    advantages: Float[Array, "P G"]
    loss_rows: Bool[Array, "P G"]
    """Rows that may contribute to the loss (False: truncated and masked out, or padding)."""
    old_logprobs: Float[Array, "P G T"] | None = None
    ref_logprobs: Float[Array, "P G T"] | None = None
    sampler_logprobs: Float[Array, "P G T"] | None = None
    entropy_floor: Float[Array, ""] | None = None
    """Tokens with less entropy than this (nats) leave the policy term."""


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Int[Array, ""]
    params: Params
    """What is trained: the whole model, or its adapter."""
    opt_state: Any
    bad_steps: Int[Array, ""]
    """Updates skipped in a row because a gradient was not finite."""
