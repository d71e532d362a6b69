"""Logits and gradients of our policy against transformers, float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kardia_jax.hf.tables import entries
from kardia_jax.hf.write import tensors
from kardia_jax.model import policy
from kardia_jax.model.policy import Compute

LOGITS_TOLERANCE = 1e-4
"""float32 on both sides, over logits of size 1 to 10 (the issue's bound)."""
GRADIENT_TOLERANCE = 1e-4
"""Relative, of the norm of each tensor (the issue's bound)."""

LENGTHS = np.array([24, 11, 1])
"""The longest row is five windows long."""
TOKENS = np.random.default_rng(0).integers(1, 48, (3, 24))
COMPUTE = Compute(remat="none", head_chunk=7)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_right_padded_rows(pair, case, tied):
    theirs, _, spec, params = pair(case, tied)
    ours = jax.jit(functools.partial(policy.logits, spec, COMPUTE))(params, TOKENS, LENGTHS)
    mask = np.arange(24) < LENGTHS[:, None]
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(TOKENS), attention_mask=torch.from_numpy(mask).long()).logits.numpy()
    np.testing.assert_allclose(ours[mask], wanted[mask], atol=LOGITS_TOLERANCE)
    assert wanted.std() > 0.3, "logits that hardly differ would prove nothing"


@pytest.mark.parametrize("model", ["llama-llama3", "gemma2", "gemma3"])
def test_gradient_of_the_mean_logprob(pair, model):
    theirs, _, spec, params = pair(model, model == "gemma2")
    prompt, completion = TOKENS[:2, :9], TOKENS[:2, None, 9:]
    batch = [jnp.asarray(x) for x in (prompt, np.full((2, 1), 9), completion, np.ones(completion.shape, bool))]

    def mean(params):
        return policy.group_logprobs(spec, COMPUTE, params, *batch, jnp.float32(1))[0].mean()

    ours = dict(tensors(jax.jit(jax.grad(mean))(params), spec, entries(spec)))
    theirs.zero_grad()
    rows = torch.from_numpy(TOKENS[:2])
    logprobs = torch.log_softmax(theirs(rows).logits[:, 8:-1], -1)
    logprobs.gather(-1, rows[:, 9:, None]).mean().backward()
    for name, parameter in theirs.named_parameters():
        wanted = parameter.grad.numpy()
        off = np.linalg.norm(ours[name] - wanted) / np.linalg.norm(wanted)
        assert off < GRADIENT_TOLERANCE, (name, off)
