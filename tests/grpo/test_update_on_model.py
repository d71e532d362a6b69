"""The compiled update of the real model: what donation, padding, tracing and memory do to it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kardia_jax import programs
from kardia_jax.config import LossConfig
from kardia_jax.grpo.losses import make_loss
from kardia_jax.grpo.update import completion_mask, grpo_objective, init_state, make_update, sft_objective
from kardia_jax.model import policy
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec
from kardia_jax.observe.measures import to_host, values
from kardia_jax.types import GroupBatch

MODEL_TOLERANCE = 2e-6
"""The same float32 sums in another order, through two layers and back; gradients of size 1."""

SPEC = ModelSpec("qwen3", 47, 16, 24, 2, 2, 1, 8, max_positions=64, token_count=43)
COMPUTE = Compute(head_chunk=5)
SGD = optax.sgd(0.1)
TEMPERATURE = 0.9
LENGTHS = np.array([[5, 2], [1, 3], [4, 4], [5, 5]])
PROMPT_LENGTHS = np.array([[6, 6], [2, 5], [1, 1], [3, 3]])
OBJECTIVE = grpo_objective(make_loss(LossConfig(name="grpo", beta=0.1), 5))


def numpy_params(spec: ModelSpec) -> Any:
    """Random numbers everywhere, made without compiling an initialiser."""
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def batch() -> GroupBatch:
    rng = np.random.default_rng(1)
    return GroupBatch(
        prompt_tokens=jnp.asarray(rng.integers(0, 43, (4, 6))),
        prompt_lengths=jnp.asarray(PROMPT_LENGTHS),
        completion_tokens=jnp.asarray(rng.integers(0, 43, (4, 2, 5))),
        completion_lengths=jnp.asarray(LENGTHS),
        advantages=jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
        loss_rows=jnp.asarray([[True, True], [True, True], [True, False], [True, True]]),
        ref_logprobs=jnp.asarray(rng.normal(-3.8, 0.3, (4, 2, 5)), jnp.float32),
        sampler_logprobs=jnp.asarray(rng.normal(-3.8, 0.3, (4, 2, 5)), jnp.float32),
    )


TRACES = []


def counted(batch: GroupBatch, logprobs: jax.Array, entropy: jax.Array):
    TRACES.append(batch.completion_tokens.shape)
    return OBJECTIVE(batch, logprobs, entropy)


@functools.cache
def update(micro_batches: int, tokens: int | None = None):
    return programs.make_compiled_update(
        SPEC, COMPUTE, counted, SGD, TEMPERATURE, micro_batches, tokens_per_micro_batch=tokens
    )


def fresh():
    """A state of its own for every call: the update takes the buffers."""
    return init_state(numpy_params(SPEC), SGD)


def learn(micro_batches: int, batch: GroupBatch, tokens: int | None = None):
    """New parameters and divided metrics, on the host."""
    state, metrics = update(micro_batches, tokens)(fresh(), batch)
    return jax.device_get(state.params), values(to_host(metrics))


def assert_same(one, other) -> None:
    close = functools.partial(np.testing.assert_allclose, atol=MODEL_TOLERANCE, rtol=MODEL_TOLERANCE)
    jax.tree.map(close, one, other)


def test_micro_batches_and_padding_change_nothing():
    plain = batch()
    tokens = jnp.where(jnp.arange(6) < plain.prompt_lengths.max(1)[:, None], plain.prompt_tokens, 11)
    behind = jnp.arange(7) >= plain.completion_lengths[..., None]

    def lengthened(x: jax.Array, filler: float) -> jax.Array:
        return jnp.where(behind, filler, jnp.pad(x, ((0, 0), (0, 0), (0, 2))))

    longer = plain._replace(
        prompt_tokens=jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=29),
        completion_tokens=lengthened(plain.completion_tokens, 17),
        ref_logprobs=lengthened(plain.ref_logprobs, jnp.nan),
        sampler_logprobs=lengthened(plain.sampler_logprobs, jnp.nan),
    )
    assert_same(learn(4, longer), learn(1, plain))


def test_micro_batches_by_tokens_change_nothing():
    assert_same(learn(1, batch(), tokens=40), learn(1, batch()))


def test_the_order_of_rows_changes_nothing():
    order = jnp.array([2, 0, 3, 1])
    moved = jax.tree.map(lambda x: x[order] if x.ndim < 2 or x.shape[1] != 2 else x[order][:, ::-1], batch())
    assert_same(learn(1, moved), learn(1, batch()))


def test_first_on_policy_minibatch_has_ratio_one_and_clips_nothing():
    _, metrics = update(1)(fresh(), batch())
    assert metrics["ratio"].sum == metrics["ratio"].weight == completion_mask(batch()).sum()
    assert [float(metrics[name].sum) for name in ("clip_low", "clip_high", "clip_region")] == [0, 0, 0]


def test_the_score_program_and_the_update_see_the_same_logprobs_until_a_step_is_taken():
    scored, _ = programs.make_score(SPEC, COMPUTE)(fresh().params, batch(), jnp.float32(TEMPERATURE))
    state, before = update(1)(fresh(), batch()._replace(sampler_logprobs=scored))
    _, after = update(1)(state, batch()._replace(sampler_logprobs=scored))
    gaps = [values(to_host(metrics))["mismatch_abs"] for metrics in (before, after)]
    assert gaps[0] < MODEL_TOLERANCE
    assert gaps[1] > 1e-3


def test_repeated_updates_are_traced_once_and_give_their_buffers_on():
    learn(1, batch())
    before, state = len(TRACES), fresh()
    for seed in range(3):
        old = state.params
        state, _ = update(1)(state, batch()._replace(advantages=jax.random.normal(jax.random.key(seed), (4, 2))))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert len(TRACES) == before
    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_sft_is_the_cross_entropy_of_the_plain_logits():
    data, mask = batch(), np.asarray(completion_mask(batch()))

    @jax.jit
    def ours(params):
        loss, _ = sft_objective(data, *programs.score(SPEC, COMPUTE, params, data, jnp.float32(1)))
        return loss.sum / loss.weight

    rows = np.zeros((8, 11), np.int32)
    for row, (p, g) in zip(rows, np.ndindex(4, 2), strict=True):
        start = PROMPT_LENGTHS[p, g]
        row[:start], row[start : start + 5] = data.prompt_tokens[p, :start], data.completion_tokens[p, g]
    z = jax.jit(functools.partial(policy.logits, SPEC, COMPUTE))(fresh().params, rows, jnp.full(8, 11))
    at = PROMPT_LENGTHS.reshape(8, 1) - 1 + np.arange(5)
    z = jnp.take_along_axis(z, at[..., None], 1)[..., : SPEC.token_count]
    losses = optax.softmax_cross_entropy_with_integer_labels(z, data.completion_tokens.reshape(8, 5))
    wanted = np.asarray(losses)[mask.reshape(8, 5)].mean()
    assert float(ours(fresh().params)) == pytest.approx(float(wanted), abs=1e-5)


def test_no_array_of_rows_by_tokens_by_vocabulary_in_the_compiled_update():
    prompts, group, prompt, length, vocabulary = 2, 4, 8, 128, 16_384
    spec = ModelSpec("qwen2", vocabulary, 8, 8, 1, 1, 1, 8)

    def forward(params, batch, place):
        return programs.score(spec, Compute(head_chunk=32), params, batch, jnp.float32(1))

    params = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    state = jax.eval_shape(functools.partial(init_state, optimizer=SGD), params)
    shapes = {
        "prompt_tokens": (prompts, prompt),
        "completion_tokens": (prompts, group, length),
    } | dict.fromkeys(("prompt_lengths", "completion_lengths", "advantages", "loss_rows"), (prompts, group))
    kinds = {"advantages": jnp.float32, "loss_rows": jnp.bool_}
    data = GroupBatch(
        **{name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32)) for name, shape in shapes.items()}
    )
    objective = grpo_objective(make_loss(LossConfig(name="dapo", beta=0.0), length))
    program = jax.jit(make_update(forward, objective, SGD)).lower(state, data).compile()
    memory = program.memory_analysis()
    assert memory is not None
    whole = prompts * group * length * vocabulary * 4
    assert memory.temp_size_in_bytes < whole / 5
