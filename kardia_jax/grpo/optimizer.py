"""AdamW with a schedule and clipping, from optax; and the gradient norm that everybody looks at."""

import jax
import optax

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
    matrices = ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree.map_with_path(lambda path, _: path[-1].key in matrices, params)


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, schedule."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, updates),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adamw)
