"""A tiny Qwen and a tiny Gemma whose every axis eight devices divide, and three full steps of them on any mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from kardia_jax import programs
from kardia_jax.config import LossConfig, MeshConfig, OptimizerConfig
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import grpo_objective
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model import policy
from kardia_jax.model.policy import Compute
from kardia_jax.model.sharding import make_mesh, shardings
from kardia_jax.model.spec import ModelSpec
from kardia_jax.observe.compilations import CompilationCounter
from kardia_jax.observe.measures import to_host, values
from kardia_jax.rollout.batching import Programs
from kardia_jax.rollout.sampling import Controls
from kardia_jax.sharded import make_start
from kardia_jax.types import GroupBatch, TrainState

PROMPTS, GROUP, PROMPT, MOST, STEPS = 8, 2, 6, 8, 3
STOP, PAD = 3, 0

QWEN = ModelSpec("qwen2", 64, 16, 32, 1, 8, 2, 8, tied=False, max_positions=64, token_count=61)
"""Two kv heads: eight devices keep each of them four times."""
GEMMA = dataclasses.replace(
    QWEN,
    family="gemma2",
    layers=2,
    kv_heads=8,
    tied=True,
    query_scalar=20,
    attention_softcap=1.5,
    final_softcap=6.0,
    window=3,
    layer_types=("sliding_attention", "full_attention"),
)
SPECS = {"qwen": QWEN, "gemma": GEMMA}
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_share=0.0), 10)
OBJECTIVE = grpo_objective(make_loss(LossConfig(beta=0.1), MOST))


class Run(NamedTuple):
    """What three steps leave."""

    tokens: list[np.ndarray]
    metrics: list[dict[str, float]]
    """Of each update: loss, KL, entropy, norms, ..."""
    state: TrainState
    compiled: list[int]
    """Programs compiled in each step."""


def mesh_of(shape: str) -> Mesh | None:
    """The mesh ``2x2x2`` of eight devices; ``1x1x1`` is one device."""
    return make_mesh(MeshConfig(*map(int, shape.split("x"))))


def compute_on(mesh: Mesh | None, remat: Literal["none", "block"] = "none") -> Compute:
    return Compute(remat=remat, head_chunk=5, mesh=mesh)


@functools.cache
def start_params(name: str) -> Any:
    """Random numbers everywhere, peaked logits, padding rows that would win every draw; on the host."""
    spec, rng = SPECS[name], np.random.default_rng(4)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    policy.head_table(params)[spec.sampled_tokens :] *= 30
    return params


def on(mesh: Mesh | None, tree: Any) -> Any:
    """The tree on one device or where the mesh wants it."""
    return jax.tree.map(jnp.asarray, tree) if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def prompts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(4, 61, (PROMPTS, PROMPT)), np.array([6, 2, 1, 3, 5, 4, 6, 2])


def steps(
    name: str,
    shape: str,
    micro_batches: int = 1,
    tokens: int | None = None,
    order: Sequence[int] = range(PROMPTS),
    remat: Literal["none", "block"] = "none",
) -> Run:
    """Three steps of sampling, scoring and updating, as ``train_grpo`` does them; rewards are a sum of token ids."""
    spec, mesh = SPECS[name], mesh_of(shape)
    compute = compute_on(mesh, remat)
    generate, score = programs.make_generate(spec, compute, rows=PROMPTS * GROUP), programs.make_score(spec, compute)
    update = programs.make_compiled_update(
        spec, compute, OBJECTIVE, OPTIMIZER, 0.9, micro_batches, tokens_per_micro_batch=tokens
    )
    state = make_start(OPTIMIZER, mesh)(on(mesh, start_params(name)))
    reference = on(mesh, start_params(name))
    asked, lengths = (x[list(order)] for x in prompts())
    controls = Controls(jnp.float32(0.9), jnp.int32(0), jnp.float32(1), jnp.float32(0))
    drawn, measured, compiled = [], [], []
    with CompilationCounter() as compilations:
        for step in range(STEPS):
            keys = row_keys(0, Purpose.ROLLOUT, step, jnp.asarray(order), GROUP)
            out = generate(state.params, asked, lengths, keys, controls, (STOP,), PAD, max_new_tokens=MOST)
            batch = batch_of(asked, lengths, out)
            batch = batch._replace(ref_logprobs=score(reference, batch, jnp.float32(0.9))[0])
            state, metrics = update(state, batch)
            drawn.append(out.tokens[np.argsort(order)])
            measured.append(values(to_host(metrics)))
            compiled.append(compilations.take().count)
    return Run(drawn, measured, state, compiled)


def batch_of(asked: np.ndarray, lengths: np.ndarray, out: Any) -> GroupBatch:
    rewards = out.tokens.sum(-1) / 100
    return GroupBatch(
        prompt_tokens=asked,
        prompt_lengths=np.broadcast_to(lengths[:, None], out.lengths.shape),
        completion_tokens=out.tokens,
        completion_lengths=out.lengths,
        advantages=(rewards - rewards.mean(1, keepdims=True)).astype(np.float32),
        loss_rows=np.ones(out.lengths.shape, bool),
        sampler_logprobs=out.tempered_logprobs,
    )


@functools.cache
def remembered(name: str, shape: str) -> Run:
    """``steps`` of whole batches, once for all tests."""
    return steps(name, shape)


@pytest.fixture(scope="session")
def three_steps() -> Callable[..., Run]:
    """(model, mesh) -> three steps of whole batches."""
    return remembered


@pytest.fixture(scope="session")
def steps_of() -> Callable[..., Run]:
    """The same with other micro-batches, or another order of the prompts."""
    return steps


@pytest.fixture(scope="session")
def start_of() -> Callable[[str], Any]:
    """The parameters that they start from, on the host."""
    return start_params


@pytest.fixture(scope="session")
def spec_of() -> Callable[[str], ModelSpec]:
    """The model's spec."""
    return SPECS.__getitem__


@pytest.fixture(scope="session")
def sampler_on() -> Callable[[str, str], tuple[Programs, Any]]:
    """(model, mesh) -> the sampler's programs, as ``three_steps`` compiled them, and parameters in place."""

    def make(name: str, shape: str) -> tuple[Programs, Any]:
        mesh = mesh_of(shape)
        generate = programs.make_generate(SPECS[name], compute_on(mesh), rows=PROMPTS * GROUP)
        return generate.args[0], on(mesh, start_params(name))

    return make


@pytest.fixture(scope="session")
def state_on() -> Callable[[str, str], TrainState]:
    """(model, mesh) -> step 0."""
    return lambda name, shape: make_start(OPTIMIZER, mesh_of(shape))(on(mesh_of(shape), start_params(name)))


@pytest.fixture(scope="session")
def mesh_named() -> Callable[[str], Mesh | None]:
    """The mesh of a shape such as ``2x2x2``; none for one device."""
    return mesh_of
