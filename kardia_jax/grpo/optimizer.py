"""AdamW, or Muon for the blocks' matrices beside it, with a schedule and clipping; all of it from optax."""

import dataclasses
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from kardia_jax.config import OptimizerConfig
from kardia_jax.types import Params


def learning_rate(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, cosine or linear over the rest of ``updates``."""
    warmup = round(config.warmup_share * updates)
    peak, last = config.learning_rate, config.learning_rate * config.final_share
    rest = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_share),
        "linear": optax.linear_schedule(peak, last, rest),
    }[config.schedule]
    # The first update has count 0; a warm-up from exactly 0 would waste it.
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), after], [warmup])


def decayed(params: Params) -> Params:
    """True where weight decay applies: kernels, embeddings and adapters, not norms and biases."""
    names = ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree.map_with_path(lambda path, _: path[-1].key in names, params)


def matrices(params: optax.Params) -> optax.Params:
    """Which axes of a leaf make a matrix for Muon (in, out); None where AdamW trains: embeddings, norms, biases.

    The leading axis of a block's kernel counts layers, so each layer's matrix is orthogonalised by itself.
    """

    def axes(path: tuple[Any, ...], _: jax.Array) -> MuonDimensionNumbers | None:
        *parents, last = (entry.key for entry in path)
        if last != "kernel":
            return None
        if parents[-1] == "o":
            return MuonDimensionNumbers((1, 2), (3,))
        return MuonDimensionNumbers((1,), (2, 3) if parents[-1] in ("q", "k", "v") else (2,))

    return jax.tree.map_with_path(axes, params)


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Clip by global norm; AdamW, or Muon for the blocks' matrices beside it; schedule.

    Source: arXiv 1711.05101 (AdamW), arXiv 2502.16982 (Muon with weight decay).
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, updates),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mu_dtype=config.moment_dtype,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.muon_learning_rate is None:
        return optax.chain(clip, adamw)
    rate = learning_rate(dataclasses.replace(config, learning_rate=config.muon_learning_rate), updates)
    # Embeddings, norms and biases are left to Adam (with Nesterov's momentum, as Muon) and do not decay.
    orthogonal = muon(
        rate,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mu_dtype=config.moment_dtype,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_learning_rate=learning_rate(config, updates),
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(clip, orthogonal)
