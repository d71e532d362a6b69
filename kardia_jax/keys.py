"""Random keys, derived and never threaded.

Every key is a pure function of (seed, purpose, step, prompt, sample), so a run that is killed and resumed draws the
same numbers as one that was not, and no key is ever saved. ``purpose`` keeps streams apart that share the integers.

>>> row_keys(seed=0, purpose=Purpose.ROLLOUT, step=3, prompt_ids=jnp.array([7, 9]), group=4).shape
(2, 4)
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


class Purpose(enum.IntEnum):
    """Streams of random numbers. Values are part of the reproducibility contract: append, never renumber."""

    INIT = 0
    ROLLOUT = 1
    EVALUATION = 2
    ADAPTER = 3
    DROPOUT = 4


def key_for(seed: int, purpose: Purpose, *path: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key at ``path`` (for instance step, prompt, sample) of the stream ``purpose``."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    for index in path:
        key = jax.random.fold_in(key, index)
    return key


def row_keys(
    seed: int, purpose: Purpose, step: int | Int[Array, ""], prompt_ids: Int[Array, " P"], group: int
) -> Key[Array, "P G"]:
    """One key per completion, from (seed, purpose, step, prompt, sample): row order and batch size do not matter.

    A prompt that stands in the batch twice goes on counting its samples, so that no two rows are alike.
    """
    same = prompt_ids[:, None] == prompt_ids
    repeats = jnp.tril(same, k=-1).sum(1)
    samples = repeats[:, None] * group + jnp.arange(group)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    per_prompt = fold(key_for(seed, purpose, step), prompt_ids)
    return jax.vmap(fold)(per_prompt, samples)
