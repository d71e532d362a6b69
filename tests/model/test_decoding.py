"""Decoding against the plain forward pass and against the drawing: what a token sees, and what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kardia_jax.model import policy
from kardia_jax.model.decoding import (
    AS_COMPUTED,
    Storage,
    decode_step,
    decoding_weights,
    empty_caches,
    prefill,
    quantized,
    sight,
    stored,
    turns_at,
)
from kardia_jax.model.head import model_logits
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec, RopeSpec

TOLERANCE = 2e-5
"""The same sums in another order, logits of size 5."""
ROUNDED = {"bfloat16": 0.02, "int8": 0.03}
"""Logits of size 5 under keys and values with 8 bits, or kernels with 7."""

SMALL = ModelSpec("qwen3", 97, 32, 48, 3, 4, 2, 16, max_positions=256)
COMPUTE = Compute(remat="none")
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


@functools.cache
def params_of(family: str):
    """Nothing at the 0 or 1 that it starts from, so that every scale and bias matters."""
    leaves, tree = jax.tree.flatten(policy.init(SPECS[family], jax.random.key(3)))
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


# ---- against the plain forward pass ----

PROMPTS = np.random.default_rng(0).integers(0, 97, (2, 9))
COMPLETIONS = np.random.default_rng(1).integers(0, 97, (2, 3, 6))
LENGTHS, START, COLUMNS = np.array([9, 4]), np.array([6, 4]), 8
"""The second group begins two steps before the first, and both go round the end of the ring."""


def decoded(family: str, storage: Storage) -> np.ndarray:
    """[P, G, T, V]: logits before each completion token, fed one by one."""
    spec, params = SPECS[family], params_of(family)
    weights = decoding_weights(spec, params, "float32", storage)
    caches = [
        cache._replace(prompt_k=k, prompt_v=v)
        for cache, (k, v) in zip(
            empty_caches(spec, COMPUTE, storage, 2, 3, 9, COLUMNS),
            prefill(spec, COMPUTE, storage, params, jnp.asarray(PROMPTS)),
            strict=True,
        )
    ]
    last = np.broadcast_to(PROMPTS[np.arange(2), LENGTHS - 1][:, None, None], (2, 3, 1))
    fed = np.concatenate([last, COMPLETIONS[..., :-1]], 2)
    advance = jax.jit(functools.partial(decode_step, spec, COMPUTE, storage))
    out = np.zeros((2, 3, 6, 97), np.float32)
    for step in range(START.min(), START.max() + 6):
        # A group that has not begun, or has ended, is fed anything.
        place = step - START
        tokens = np.stack([fed[p, :, n] if 0 <= n < 6 else np.full(3, 7) for p, n in enumerate(place)])
        turns = turns_at(spec, LENGTHS - 1, START, step)
        hidden, caches = advance(weights, caches, LENGTHS - 1, START, jnp.int32(step), turns, jnp.asarray(tokens))
        z = np.asarray(model_logits(hidden, policy.head_table(params), spec.final_softcap))
        for p, n in enumerate(place):
            if 0 <= n < 6:
                out[p, :, n] = z[p]
    return out


@functools.cache
def plain(family: str) -> np.ndarray:
    """The same from whole rows, each with its own copy of the prompt."""
    rows = np.zeros((6, 15), int)
    for i, (p, g) in enumerate(np.ndindex(2, 3)):
        rows[i, : LENGTHS[p] + 6] = [*PROMPTS[p, : LENGTHS[p]], *COMPLETIONS[p, g]]
    logits = jax.jit(functools.partial(policy.logits, SPECS[family], COMPUTE))
    z = np.asarray(logits(params_of(family), jnp.asarray(rows), jnp.full(6, 15)))
    cut = [z[i, LENGTHS[p] - 1 : LENGTHS[p] + 5] for i, (p, _) in enumerate(np.ndindex(2, 3))]
    return np.stack(cut).reshape(2, 3, 6, 97)


@pytest.mark.parametrize("family", SPECS)
def test_decoding_walks_through_the_plain_logits(family):
    np.testing.assert_allclose(decoded(family, AS_COMPUTED), plain(family), atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("storage", [Storage("bfloat16"), Storage("int8"), Storage("compute", "int8")])
def test_with_fewer_bits_it_stays_close(family, storage):
    gap = np.abs(decoded(family, storage) - plain(family)).mean()
    assert TOLERANCE < gap < ROUNDED["int8" if "int8" in storage else "bfloat16"]


# ---- what a token sees ----


def test_the_drawing():
    """T = 4, step 5, A began at step 1 and B at step 4."""
    seen = sight(jnp.array([0, 2]), jnp.array([4, 1]), jnp.int32(5), (3, 4), None)
    assert seen.own.tolist() == [[True] * 4, [True, True, False, False]]
    assert seen.prompt.tolist() == [[False] * 3, [True, True, False]]


@given(
    columns=st.integers(1, 9),
    step=st.integers(0, 40),
    written=st.integers(0, 8),
    prefix=st.integers(0, 7),
    window=st.none() | st.integers(1, 12),
)
def test_a_token_sees_its_own_row_and_prompt_within_the_window(columns, step, written, prefix, window):
    written = min(written, columns - 1, step)
    seen = sight(jnp.array([prefix]), jnp.array([written]), jnp.int32(step), (7, columns), window)
    here, start = prefix + written, step - written
    near = range(here + 1) if window is None else range(max(0, here + 1 - window), here + 1)
    held = {s % columns: s for s in range(step + 1)}
    own = [c in held and held[c] >= start and prefix + held[c] - start in near for c in range(columns)]
    assert seen.own[0].tolist() == own
    assert seen.prompt[0].tolist() == [s < prefix and s in near for s in range(7)]


# ---- what is kept ----


def test_int8_has_a_scale_of_its_own_for_each_position_and_head():
    x = jnp.array([[[1.27, -0.635], [127.0, 64.0]], [[0.0, 0.0], [1e-3, -1e-3]]])
    kept = stored(x, 2, Storage("int8"))
    assert kept.values.tolist() == [[[127, -64], [127, 64]], [[0, 0], [127, -127]]]
    assert kept.values.dtype == jnp.int8
    np.testing.assert_allclose(kept.scale[..., 0], [[0.01, 1.0], [0.0, 1e-3 / 127]], atol=1e-9)
    np.testing.assert_allclose(kept.values * kept.scale, x, atol=0.5 * float(kept.scale.max()))


@pytest.mark.parametrize(("kv", "kind"), [("compute", jnp.float32), ("bfloat16", jnp.bfloat16), ("int8", jnp.int8)])
def test_caches_have_the_type_that_was_asked_for(kv, kind):
    cache = empty_caches(SMALL, COMPUTE, Storage(kv), 2, 3, 9, COLUMNS)[0]
    shapes = {name: (part.values.shape, part.values.dtype) for name, part in cache._asdict().items()}
    assert shapes == {
        "prompt_k": ((2, 2, 16, 9), kind),
        "prompt_v": ((2, 2, 9, 16), kind),
        "k": ((6, 2, 16, 8), kind),
        "v": ((6, 2, 8, 16), kind),
    }
    scales = [None if part.scale is None else part.scale.shape for part in cache]
    assert scales == ([(2, 2, 1, 9), (2, 2, 9, 1), (6, 2, 1, 8), (6, 2, 8, 1)] if kv == "int8" else [None] * 4)


def test_kernels_alone_become_int8_with_a_scale_for_each_output():
    block = jax.tree.map(lambda leaf: leaf[0], params_of("qwen2")["blocks"])
    narrow = quantized(block)
    for part, name, axes in (("attention", "q", (0,)), ("attention", "o", (0, 1)), ("mlp", "down", (0,))):
        kernel, kept = block[part][name]["kernel"], narrow[part][name]
        assert kept["kernel"].dtype == jnp.int8
        np.testing.assert_allclose(kept["kernel_scale"], np.abs(kernel).max(axes) / 127, rtol=1e-6)
        off = np.abs(kept["kernel"] * kept["kernel_scale"] - kernel)
        assert (off <= 0.5001 * kept["kernel_scale"]).all()
    np.testing.assert_array_equal(narrow["attention"]["q"]["bias"], block["attention"]["q"]["bias"])
    weights = decoding_weights(SPECS["qwen2"], params_of("qwen2"), "bfloat16", Storage(weights="int8"))
    assert len(weights["layers"]) == 3
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights)} == {"int8", "bfloat16"}
    assert weights["embed"]["embedding"].dtype == jnp.bfloat16
