"""Tiny models for the sampler: one of each family whose logits are peaked, and one that counts."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import programs
from kardia_jax.model import policy
from kardia_jax.model.decoding import AS_COMPUTED, Storage
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec, RopeSpec
from kardia_jax.rollout.batching import Generate, Programs

TOKENS = 90
"""Ids that may be drawn; the tables have 97 rows."""
SHAPE = {"tied": False, "max_positions": 64, "token_count": TOKENS}
SLIDING = {"window": 3, "layer_types": ("sliding_attention", "full_attention")}
CAPPED = {"attention_softcap": 1.5, "final_softcap": 6.0, "query_scalar": 20}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"tied": True},
    "llama": {},
    "gemma": {},
    "gemma2": SLIDING | CAPPED,
    "gemma3_text": SLIDING | {"local_rope": RopeSpec(theta=100.0)},
}


class Model(NamedTuple):
    """A policy with its sampler and its learner."""

    spec: ModelSpec
    params: Any
    generate: Generate
    logprobs: Callable[..., Any]
    logits: Callable[..., Any]

    @property
    def programs(self) -> Programs:
        """What ``generate`` runs on the device."""
        return self.generate.args[0]


@functools.cache
def model_of(family: str, dtype: str = "float32", storage: Storage = AS_COMPUTED, rows: int = 0) -> Model:
    spec = ModelSpec(family, 97, 16, 24, 2, 4, 2, 8, **(SHAPE | CHANGES[family]))
    return _model(spec, _peaked(spec), Compute(dtype, remat="none", head_chunk=16), storage, rows)


def _peaked(spec: ModelSpec) -> Any:
    """Peaked logits, biases that matter, a head that does not just repeat the last token, and padding rows that would
    win every draw if they took part."""
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    params["final_norm"]["scale"] *= 6
    policy.head_table(params)[TOKENS:] *= 30
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def counter() -> Model:
    """Says n + 1 after n, whatever stood before: a row's length follows from its last prompt token."""
    spec = ModelSpec("qwen3", 64, 64, 4, 1, 1, 1, 4, tied=False, max_positions=256)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["final_norm"]["scale"] += 1
    params["embed"]["embedding"] = jnp.eye(64)
    params["head"]["embedding"] = jnp.roll(jnp.eye(64), 1, 0)
    return _model(spec, params, Compute(remat="none"), AS_COMPUTED, 0)


def _model(spec: ModelSpec, params: Any, compute: Compute, storage: Storage, rows: int) -> Model:
    logprobs = jax.jit(functools.partial(policy.group_logprobs, spec, compute))
    logits = jax.jit(functools.partial(policy.logits, spec, compute))
    return Model(spec, params, programs.make_generate(spec, compute, storage, rows), logprobs, logits)


@pytest.fixture(scope="session")
def model() -> Callable[..., Model]:
    """(family, dtype, storage, rows) -> ``Model``."""
    return model_of


@pytest.fixture(scope="session")
def counting() -> Model:
    return counter()
