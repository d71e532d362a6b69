"""Adapters on the whole model: they start as nothing, merge without loss, and sample as they score."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kardia_jax import programs
from kardia_jax.config import FULL, LoraConfig, SamplerConfig
from kardia_jax.config.lora import LINEARS
from kardia_jax.grpo.update import init_state, sft_objective
from kardia_jax.keys import Purpose, row_keys
from kardia_jax.model import policy
from kardia_jax.model.lora import SITES, init_adapter, joined, merged_model, union, with_dropout
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec
from kardia_jax.rollout.sampling import Controls
from kardia_jax.types import GroupBatch

SPEC = ModelSpec("qwen3", 61, 16, 24, 2, 4, 2, 8, max_positions=64)
COMPUTE = Compute(remat="none", head_chunk=8)
LORA = LoraConfig(rank=3, alpha=6)
TOLERANCE = 1e-5
"""The same products in another order, logits of size 1."""
SAMPLER_TOLERANCE = 1e-4
"""Nats, float32, sampler against learner."""
BFLOAT16_MISMATCH = 1.05
"""Mean of exp|difference| in bfloat16 (the reliability goal)."""
SGD = optax.sgd(1.0)

BASE = policy.init(SPEC, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 8)).astype(np.int32)
COMPLETIONS = np.random.default_rng(1).integers(0, 61, (2, 3, 5)).astype(np.int32)

logits = jax.jit(functools.partial(policy.logits, SPEC, COMPUTE))


def adapter(lora: LoraConfig = LORA, seed: int = 3):
    """An adapter in the middle of training: B is not zero."""
    fresh = init_adapter(lora, BASE, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.normal(0, 0.2, leaf.shape), jnp.float32), fresh)


def leaves(tree) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def batch() -> GroupBatch:
    return GroupBatch(
        prompt_tokens=jnp.asarray(TOKENS),
        prompt_lengths=jnp.array([[8, 5, 2], [6, 6, 6]]),
        completion_tokens=jnp.asarray(COMPLETIONS),
        completion_lengths=jnp.array([[5, 3, 4], [1, 5, 2]]),
        advantages=jnp.ones((2, 3)),
        loss_rows=jnp.ones((2, 3), bool),
    )


def group_logprobs(params):
    return programs.make_score(SPEC, COMPUTE)(params, batch(), jnp.float32(1))[0]


def test_the_names_are_the_same_in_config_and_model():
    assert tuple(SITES) == LINEARS
    assert LORA.names == LINEARS
    assert LoraConfig(rank=1, targets=("v_proj", "q_proj")).names == ("q_proj", "v_proj")


def test_an_adapter_has_the_shapes_of_its_layers():
    shapes = {path: leaf.shape for path, leaf in leaves(init_adapter(LORA, BASE, jax.random.key(1))).items()}
    assert len(shapes) == 14
    assert shapes["blocks.attention.q.lora_a"] == (2, 16, 3)
    assert shapes["blocks.attention.q.lora_b"] == (2, 3, 4, 8)
    assert shapes["blocks.attention.o.lora_a"] == (2, 4, 8, 3)
    assert shapes["blocks.attention.o.lora_b"] == (2, 3, 16)
    assert shapes["blocks.mlp.down.lora_a"] == (2, 24, 3)


def test_a_is_uniform_by_fan_in_and_a_layers_draw_does_not_depend_on_the_others():
    everywhere = leaves(init_adapter(LoraConfig(rank=64), BASE, jax.random.key(1)))
    alone = leaves(init_adapter(LoraConfig(rank=64, targets=("o_proj",)), BASE, jax.random.key(1)))
    assert set(alone) == {"blocks.attention.o.lora_a", "blocks.attention.o.lora_b"}
    a = np.asarray(alone["blocks.attention.o.lora_a"])
    np.testing.assert_array_equal(a, everywhere["blocks.attention.o.lora_a"])
    bound = 32**-0.5
    assert 0.99 * bound < np.abs(a).max() <= bound
    # A uniform number has standard deviation bound / sqrt(3); over 4,096 of them within 3 %.
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not np.array_equal(a[0], a[1])


def test_a_new_adapter_changes_nothing_at_all():
    params = joined(LORA, BASE, init_adapter(LORA, BASE, jax.random.key(1)))
    lengths = jnp.array([8, 8])
    np.testing.assert_array_equal(logits(params, TOKENS, lengths), logits(BASE, TOKENS, lengths))
    np.testing.assert_array_equal(group_logprobs(params), group_logprobs(BASE))
    jax.tree.map(np.testing.assert_array_equal, merged_model(params), BASE)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_merged_equals_the_adapter(targets):
    lora = LoraConfig(rank=3, alpha=6, targets=targets, scaling="rslora")
    params = joined(lora, BASE, adapter(lora))
    whole = merged_model(params)
    assert jax.tree.structure(whole) == jax.tree.structure(BASE)
    lengths = jnp.array([8, 8])
    with_it, without = logits(params, TOKENS, lengths), logits(BASE, TOKENS, lengths)
    assert np.abs(with_it - without).max() > 0.1
    np.testing.assert_allclose(logits(whole, TOKENS, lengths), with_it, atol=TOLERANCE)
    np.testing.assert_allclose(group_logprobs(whole), group_logprobs(params), atol=TOLERANCE)


def drawn_and_scored(dtype: str):
    """Log-probs of sampled tokens: the sampler's, the learner's, and what the learner would say without the adapter."""
    compute, params, lengths = Compute(dtype, "none", 8), joined(LORA, BASE, adapter()), np.array([8, 5])
    keys = row_keys(0, Purpose.ROLLOUT, 0, jnp.arange(2), 3)
    controls = Controls.from_config(SamplerConfig())
    generate, score = programs.make_generate(SPEC, compute), programs.make_score(SPEC, compute)
    rollouts = generate(params, TOKENS, lengths, keys, controls, (), 0, max_new_tokens=5)
    rows = jnp.broadcast_to(lengths[:, None], (2, 3))
    drawn = batch()._replace(
        completion_tokens=rollouts.tokens, completion_lengths=rollouts.lengths, prompt_lengths=rows
    )
    scored, base = (np.asarray(score(tree, drawn, jnp.float32(1))[0]) for tree in (params, BASE))
    return np.asarray(rollouts.tempered_logprobs), scored, base


def test_the_sampler_scores_what_it_draws_as_the_learner_does():
    sampler, learner, base = drawn_and_scored("float32")
    np.testing.assert_allclose(sampler, learner, atol=SAMPLER_TOLERANCE)
    assert np.abs(base - learner).max() > 0.01


def test_in_bfloat16_they_differ_by_rounding_alone():
    """The sampler rounds W + A B once, the learner both products."""
    sampler, learner, _ = drawn_and_scored("bfloat16")
    assert np.exp(np.abs(sampler - learner)).mean() <= BFLOAT16_MISMATCH


@functools.cache
def update(lora: LoraConfig = LORA, micro_batches: int = 1):
    return programs.make_compiled_update(SPEC, COMPUTE, sft_objective, SGD, 1.0, micro_batches, lora)


def learned(lora: LoraConfig = LORA, micro_batches: int = 1, base=BASE):
    """The adapter after one update, on the host."""
    state, metrics = update(lora, micro_batches)(init_state(adapter(lora), SGD), batch(), base)
    return jax.device_get(state.params), jax.device_get(metrics)


def test_only_the_adapter_learns_and_only_it_has_optimizer_state():
    before = {path: np.array(leaf) for path, leaf in leaves(BASE).items()}
    optimizer = optax.adamw(1e-2)
    state = init_state(adapter(), optimizer)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == shapes
    assert len([leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]) == 2 * 14
    params, metrics = learned()
    assert float(metrics["grad_norm"].sum) > 0
    assert leaves(params).keys() == leaves(adapter()).keys()
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(adapter()), strict=True))
    for path, leaf in leaves(BASE).items():
        assert before[path].tobytes() == np.asarray(leaf).tobytes()


def test_the_gradient_is_that_of_the_merged_kernels():
    """dL/dA = dL/dW (scale B)^T and dL/dB = scale A^T dL/dW, from a program that knows no adapter."""
    start, kernels = adapter(), merged_model(joined(LORA, BASE, adapter()))
    plain = programs.make_compiled_update(SPEC, COMPUTE, sft_objective, SGD, 1.0, 1)
    whole, _ = plain(init_state(jax.tree.map(jnp.copy, kernels), SGD), batch())
    change = np.asarray(
        kernels["blocks"]["attention"]["q"]["kernel"] - whole.params["blocks"]["attention"]["q"]["kernel"]
    )
    got = learned()[0]["blocks"]["attention"]["q"]
    a, b = (np.asarray(start["blocks"]["attention"]["q"][name]) for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(a - got["lora_a"], LORA.scale * np.einsum("LDHE,LrHE->LDr", change, b), atol=TOLERANCE)
    np.testing.assert_allclose(b - got["lora_b"], LORA.scale * np.einsum("LDHE,LDr->LrHE", change, a), atol=TOLERANCE)


def test_neither_micro_batches_nor_the_type_that_the_base_is_kept_in_change_the_update():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    got, wanted = learned(LORA, 2, base=half)[0], learned(base=rounded)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=TOLERANCE), got, wanted)
    merged = merged_model(joined(LORA, half, adapter()))["blocks"]["mlp"]
    assert merged["up"]["kernel"].dtype == jnp.float32


# ---- dropout


DROPOUT = LoraConfig(rank=3, alpha=6, dropout=0.5, targets=("q_proj", "down_proj"))


def mask_keys(seed: int, step: int, place: int) -> list[bytes]:
    """The key of every adapted layer."""
    params = programs.learner_params(DROPOUT, seed, BASE, adapter(DROPOUT), jnp.int32(step), jnp.int32(place))
    found = [leaf for path, leaf in leaves(params).items() if path.endswith("dropout.key")]
    return [one.tobytes() for keys in found for one in np.asarray(jax.random.key_data(keys))]


def test_every_layer_step_and_micro_batch_has_masks_of_its_own():
    places = [(0, 5, 0), (0, 5, 1), (0, 6, 0), (1, 5, 0)]
    keys = [key for place in places for key in mask_keys(*place)]
    assert len(set(keys)) == len(places) * SPEC.layers * 2
    assert mask_keys(0, 5, 0) == keys[: SPEC.layers * 2]


def test_the_mean_over_many_masks_is_the_loss_without():
    """Of first order in the adapter: with a small B the masks' second-order part is far below the noise."""
    small = jax.tree.map(lambda leaf: 0.2 * leaf, adapter(DROPOUT))

    @jax.jit
    def mean_logprob(step):
        params = programs.learner_params(DROPOUT, 0, BASE, small, step, jnp.int32(0))
        return programs.score(SPEC, COMPUTE, params, batch(), jnp.float32(1))[0]

    draws = np.stack([mean_logprob(jnp.int32(step)) for step in range(400)])
    without, base = group_logprobs(joined(LORA, BASE, small)), group_logprobs(BASE)
    noise = draws.std(0).max() / 400**0.5
    assert noise > 0
    np.testing.assert_allclose(draws.mean(0), without, atol=5 * noise)
    assert np.abs(draws.mean(0) - without).max() < 0.2 * np.abs(without - base).max()


def test_without_dropout_the_program_has_none():
    def text(lora: LoraConfig) -> str:
        state = init_state(adapter(lora), SGD)
        return (
            programs.make_compiled_update(SPEC, COMPUTE, sft_objective, SGD, 1.0, 1, lora)
            .step.lower(state, batch(), BASE)
            .as_text()
        )

    assert "threefry" in text(DROPOUT)
    assert "threefry" not in text(LORA)
    params = joined(LORA, BASE, adapter())
    assert "dropout" not in "".join(leaves(params))
    assert "dropout" in "".join(leaves(with_dropout(params, 0.5, jax.random.key(0))))


# ---- trees


def test_without_an_adapter_everything_is_what_is_trained():
    assert joined(FULL, {}, BASE) == BASE


def test_a_union_goes_down_into_both_trees_and_changes_neither():
    one, other = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"z": 4}, "c": {"d": 5}}
    assert union(one, other) == {"a": {"x": 1, "y": 2, "z": 4}, "b": 3, "c": {"d": 5}}
    assert one == {"a": {"x": 1, "y": 2}, "b": 3}
    assert other == {"a": {"z": 4}, "c": {"d": 5}}
