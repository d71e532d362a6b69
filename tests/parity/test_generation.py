"""Greedy answers of our sampler against ``generate`` of transformers, token for token; log-probs of sampled tokens."""

import jax
import numpy as np
import pytest
import torch

from kardia_jax.config import SamplerConfig
from kardia_jax.model.policy import Compute
from kardia_jax.programs import make_generate
from kardia_jax.rollout.sampling import Controls

BUDGET = 64
LOGPROB_TOLERANCE = 1e-4
"""float32 on both sides (the issue's bound)."""
LENGTHS = np.array([9, 3])
PROMPTS = np.random.default_rng(1).integers(1, 48, (2, 9))


def test_greedy_tokens(pair, family):
    theirs, _, spec, params = pair(family, tied=False)
    run = make_generate(spec, Compute())
    keys = jax.random.split(jax.random.key(0), (2, 1))
    greedy = Controls.from_config(SamplerConfig(temperature=0.0))
    ours = run(params, PROMPTS, LENGTHS, keys, greedy, (), 0, max_new_tokens=BUDGET).tokens[:, 0]
    for row, prompt, length in zip(ours, PROMPTS, LENGTHS, strict=True):
        ids = torch.from_numpy(prompt[None, :length])
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": BUDGET}
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, length:]
        np.testing.assert_array_equal(row, wanted.numpy())
        assert len(set(wanted.tolist())) > 5, "an answer that only repeats itself would prove little"


@pytest.mark.parametrize("model", ["gemma2", "gemma3-capped"])
def test_logprobs_of_sampled_tokens_are_those_of_capped_logits(pair, model):
    theirs, _, spec, params = pair(model)
    run = make_generate(spec, Compute())
    keys = jax.random.split(jax.random.key(0), (2, 1))
    controls = Controls.from_config(SamplerConfig(temperature=0.8))
    rollouts = run(params, PROMPTS, LENGTHS, keys, controls, (), 0, max_new_tokens=12)
    for p, length in enumerate(LENGTHS):
        row = torch.from_numpy(np.concatenate([PROMPTS[p, :length], rollouts.tokens[p, 0]]))[None].long()
        with torch.no_grad():
            logprobs = torch.log_softmax(theirs(row).logits[0, length - 1 : -1] / 0.8, -1)
        wanted = logprobs.gather(-1, row[0, length:, None])[:, 0].numpy()
        np.testing.assert_allclose(rollouts.sampler_logprobs[p, 0], wanted, atol=LOGPROB_TOLERANCE)
