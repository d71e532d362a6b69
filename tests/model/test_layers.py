"""The order of rounding in bfloat16 is that of transformers: bit for bit where one operation is all there is."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kardia_jax.model import policy
from kardia_jax.model.layers import NO_LIMIT, OffsetRMSNorm, RMSNorm, gelu_tanh, kinds, stacked_kinds
from kardia_jax.model.policy import Compute
from kardia_jax.model.shapes import SHAPES

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 48)).astype(np.float32)
SCALE = RNG.normal(size=48).astype(np.float32)


def bfloat16(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).to(torch.bfloat16)


def as_float(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().numpy()


@pytest.mark.parametrize(("ours", "theirs"), [(RMSNorm, LlamaRMSNorm), (OffsetRMSNorm, GemmaRMSNorm)])
def test_norms_round_where_transformers_rounds(ours, theirs):
    module = theirs(48, eps=1e-6).to(torch.bfloat16)
    module.weight.data = bfloat16(SCALE)
    wanted = as_float(module(bfloat16(X)))
    got = ours(1e-6).apply({"params": {"scale": jnp.asarray(SCALE)}}, jnp.asarray(X, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    off = got.astype(jnp.float32) != wanted
    # rsqrt may differ in the last bit of float32, which a rounding boundary turns into one of bfloat16, rarely.
    assert off.mean() < 0.002
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-7)


def test_the_scale_of_embeddings_is_rounded_before_it_multiplies():
    spec = SHAPES["gemma-7b"]
    table = RNG.normal(size=(8, spec.width)).astype(np.float32)
    theirs = GemmaTextScaledWordEmbedding(8, spec.width, 0, embed_scale=spec.width**0.5).to(torch.bfloat16)
    theirs.weight.data = bfloat16(table)
    params = {"embed": {"embedding": jnp.asarray(table)}}
    got = policy.embed(spec, params, jnp.arange(8), Compute("bfloat16"))
    # sqrt(3072) = 55.4 is 55.5 in bfloat16.
    np.testing.assert_array_equal(got.astype(jnp.float32), as_float(theirs(torch.arange(8))))


def test_gelu_is_the_tanh_form_of_torch():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    wanted = ACT2FN["gelu_pytorch_tanh"](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(gelu_tanh(jnp.asarray(x)), wanted, atol=2e-6)


def test_kinds_of_layers_stacked_and_apart():
    spec = SHAPES["tiny-gemma3"]
    assert [tuple(kind) for kind in kinds(spec)] == [(32, True), (32, True), (None, False)]
    stacked = stacked_kinds(spec)
    assert stacked.window.tolist() == [32, 32, NO_LIMIT]
    assert stacked.local.tolist() == [True, True, False]
    assert tuple(stacked_kinds(SHAPES["tiny-qwen2"])) == (None, None)
