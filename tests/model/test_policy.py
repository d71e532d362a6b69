"""The policy against transformers, and its group form against its plain form: values, log-probs, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.model import policy
from kardia_jax.model.policy import Compute
from kardia_jax.model.shapes import SHAPES, named_shape
from kardia_jax.model.spec import ModelSpec, RopeSpec

LOGITS_TOLERANCE = 1e-4
"""float32 against torch's float32, over logits of size 1 (the issue's bound)."""
GROUP_TOLERANCE = 2e-5
"""The same sums in another order, log-probs of size 5."""

SMALL = ModelSpec("qwen3", 97, 32, 48, 3, 4, 2, 16, max_positions=256)
COMPUTE = Compute(remat="none", head_chunk=5)


SLIDING = {"window": 4, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}
SPECS = {
    "qwen2": dataclasses.replace(SMALL, family="qwen2"),
    "qwen3": SMALL,
    "llama": dataclasses.replace(SMALL, family="llama", tied=False),
    "gemma": dataclasses.replace(SMALL, family="gemma", kv_heads=1),
    "gemma2": dataclasses.replace(
        SMALL, family="gemma2", query_scalar=20, attention_softcap=1.5, final_softcap=2.0, **SLIDING
    ),
    "gemma3_text": dataclasses.replace(SMALL, family="gemma3_text", local_rope=RopeSpec(theta=100.0), **SLIDING),
}
"""One of each family; the window is shorter than a prompt and than a completion."""


@functools.cache
def params_of(spec: ModelSpec):
    """Nothing at the 0 or 1 that it starts from, so that every scale and bias matters."""
    leaves, tree = jax.tree.flatten(policy.init(spec, jax.random.key(3)))
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(spec, params, rows):
    return policy.logits(spec, COMPUTE, params, rows, jnp.full(rows.shape[0], rows.shape[1]))


def repeated_logprobs(spec, params, prompt_tokens, prompt_lengths, completion_tokens, temperature):
    """Every completion as a row of its own, behind its own copy of the prompt."""
    prompts, group, length = completion_tokens.shape
    places = [(p, g, int(prompt_lengths[p, g])) for p in range(prompts) for g in range(group)]
    rows = [jnp.concatenate([prompt_tokens[p, :n], completion_tokens[p, g]]) for p, g, n in places]
    size = int(prompt_lengths.max()) + length
    z = plain_logits(spec, params, jnp.stack([jnp.pad(row, (0, size - row.size)) for row in rows]))
    z = jnp.stack([z[i, n - 1 : n + length - 1] for i, (_, _, n) in enumerate(places)])
    logp = jax.nn.log_softmax(z / temperature, -1).reshape(*completion_tokens.shape, -1)
    return jnp.take_along_axis(logp, completion_tokens[..., None], -1)[..., 0]


def batch(spec, lengths=((9, 9, 9), (4, 2, 7)), size=9, length=5):
    """Two prompts of three completions; the second is a conversation whose answers continue different parts."""
    rng = np.random.default_rng(0)
    prompts, group = np.shape(lengths)
    prompt = jnp.asarray(rng.integers(0, spec.vocab_size, (prompts, size)))
    return prompt, np.array(lengths), jnp.asarray(rng.integers(0, spec.vocab_size, (prompts, group, length)))


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        ("qwen2", "block"),
        ("qwen3", "none"),
        ("qwen3", "dots"),
        ("llama", "block"),
        ("gemma", "none"),
        ("gemma2", "none"),
        ("gemma2", "block"),
        ("gemma3_text", "dots"),
    ],
)
def test_group_logprobs_and_gradient_equal_the_repeated_form(family, remat):
    spec = SPECS[family]
    params, data = params_of(spec), batch(spec)
    weights = jax.random.normal(jax.random.key(1), data[2].shape)

    def shared(params):
        compute = dataclasses.replace(COMPUTE, remat=remat)
        return (
            weights
            * policy.group_logprobs(spec, compute, params, *data, jnp.ones(data[2].shape, bool), jnp.float32(0.7))[0]
        ).sum()

    def repeated(params):
        return (weights * repeated_logprobs(spec, params, *data, 0.7)).sum()

    value, gradient = jax.jit(jax.value_and_grad(shared))(params)
    wanted_value, wanted = jax.jit(jax.value_and_grad(repeated))(params)
    # A sum of weighted log-probs of several nats that nearly cancel: rounding is relative to the terms, not to the sum.
    np.testing.assert_allclose(value, wanted_value, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * float(jnp.abs(theirs).max()) + 1e-6)


@settings(deadline=None, max_examples=8)
@given(extra=st.integers(0, 4), filler=st.integers(0, 96))
def test_padding_changes_nothing(extra, filler):
    params, (prompt, lengths, completion) = params_of(SMALL), batch(SMALL)
    run = jax.jit(functools.partial(policy.group_logprobs, SMALL, COMPUTE))
    short, _ = run(params, prompt, lengths, completion, jnp.ones(completion.shape, bool), jnp.float32(1))
    prompt = jnp.where(jnp.arange(prompt.shape[1]) < lengths.max(1)[:, None], prompt, filler)
    prompt = jnp.pad(prompt, ((0, 0), (0, extra)), constant_values=filler)
    completion = jnp.pad(completion, ((0, 0), (0, 0), (0, extra)), constant_values=filler)
    padded, _ = run(params, prompt, lengths, completion, jnp.ones(completion.shape, bool), jnp.float32(1))
    np.testing.assert_allclose(padded[..., : short.shape[2]], short, atol=GROUP_TOLERANCE)


def test_padded_vocabulary_rows_take_no_probability():
    spec = SMALL.with_tokens(90)
    prompt, lengths, completion = batch(SMALL)
    completion = completion % 90
    logprobs, entropy = policy.group_logprobs(
        spec, COMPUTE, params_of(SMALL), prompt, lengths, completion, jnp.ones(completion.shape, bool), jnp.float32(1)
    )
    all_rows = repeated_logprobs(SMALL, params_of(SMALL), prompt, lengths, completion, 1.0)
    assert (logprobs > all_rows).all()
    assert (entropy <= np.log(90) + 1e-6).all()


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_are_those_of_transformers(kind):
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    raw = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": ROPES[kind],
    }
    theirs = Qwen2RotaryEmbedding(Qwen2Config(**raw))
    ours = RopeSpec.from_hf(raw)
    np.testing.assert_allclose(ours.inverse_frequencies(32), theirs.inv_freq.numpy(), rtol=1e-6)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)
    assert RopeSpec.from_hf({"rope_parameters": ours.to_hf()}) == ours


def test_old_and_new_rope_layouts_read_the_same():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    old = RopeSpec.from_hf({"rope_theta": 1e6, "rope_scaling": scaling})
    new = RopeSpec.from_hf({"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 1e6}})
    assert old == new
    assert old.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_is_that_of_the_tree(name):
    spec = named_shape(name)
    shapes = jax.eval_shape(functools.partial(policy.init, spec), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == spec.parameter_count
    assert ModelSpec.from_hf(spec.to_hf()) == dataclasses.replace(spec, token_count=None)


def test_published_sizes():
    published = {
        "qwen2.5-0.5b": 0.49,
        "qwen2.5-1.5b": 1.54,
        "qwen2.5-3b": 3.09,
        "qwen2.5-7b": 7.62,
        "gemma-2b": 2.51,
        "gemma-7b": 8.54,
    }
    assert {name: round(SHAPES[name].parameter_count / 1e9, 2) for name in published} == published


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_bfloat16_compute_keeps_float32_outputs_close(family):
    spec = SPECS[family]
    params, data = params_of(spec), batch(spec)
    exact, _ = policy.group_logprobs(spec, COMPUTE, params, *data, jnp.ones(data[2].shape, bool), jnp.float32(1))
    low, _ = policy.group_logprobs(
        spec,
        dataclasses.replace(COMPUTE, dtype="bfloat16"),
        params,
        *data,
        jnp.ones(data[2].shape, bool),
        jnp.float32(1),
    )
    assert low.dtype == jnp.float32
    # bf16 has 8 bits: log-probs near 4.6 over a few layers stay within a few hundredths.
    np.testing.assert_allclose(low, exact, atol=0.1)
