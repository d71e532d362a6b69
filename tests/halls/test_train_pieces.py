import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax.config import ConfigError, GrpoConfig, LossConfig
from kardia_jax.dialogue.spans import Spans
from kardia_jax.policies import check_positions
from kardia_jax.rewards.combine import Combined, Scores
from kardia_jax.rollout.engine import Sampled
from kardia_jax.scoring import Graded
from kardia_jax.train import (
    advantages_of,
    enough_verdicts,
    minibatches,
    rollout_batch,
    rollout_metrics,
    with_logprobs,
)
from kardia_jax.types import GroupBatch, Rollouts

NAN = math.nan


def sampled_by_hand() -> Sampled:
    """Two prompts, two completions of at most three tokens; the last completion ran out of tokens."""
    rollouts = Rollouts(
        tokens=np.arange(12).reshape(2, 2, 3),
        lengths=np.array([[1, 2], [3, 3]]),
        sampler_logprobs=np.full((2, 2, 3), -1.0, np.float32),
        tempered_logprobs=np.full((2, 2, 3), -2.0, np.float32),
        stopped=np.array([[True, True], [True, False]]),
    )
    return Sampled(np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2]), rollouts, [["a", "b"], ["c", "d"]])


def graded_by_hand(rewards: list[list[float]]) -> Graded:
    """Rewards that are all format, NaN where a verdict is missing."""
    rewards_P_G = np.array(rewards)
    valid = ~np.isnan(rewards_P_G)
    terms = np.stack([rewards_P_G, np.zeros_like(rewards_P_G), np.zeros_like(rewards_P_G)], -1)
    names, weights = ("format", "emotion", "rubric"), np.array([1.0, 0.0, 0.0])
    spans = Spans("u", "r", "sad", "I hear you.")
    scores = [[Scores(1.0, 1.0, None, None, bool(one)) for one in row] for row in valid]
    return Graded(
        [[spans for _ in row] for row in rewards], scores, Combined(rewards_P_G, valid, terms, names, weights)
    )


def batch_of(prompts: int) -> GroupBatch:
    rows = jnp.arange(prompts)
    tokens = jnp.broadcast_to(rows[:, None, None], (prompts, 2, 3))
    return GroupBatch(
        prompt_tokens=jnp.broadcast_to(rows[:, None], (prompts, 4)),
        prompt_lengths=jnp.full((prompts, 2), 4),
        completion_tokens=tokens,
        completion_lengths=jnp.array([[1, 3]] * prompts),
        advantages=jnp.ones((prompts, 2)),
        loss_rows=jnp.ones((prompts, 2), bool),
    )


def test_a_batch_repeats_the_prompt_length_and_keeps_the_rest_as_drawn():
    batch = rollout_batch(sampled_by_hand(), GrpoConfig())
    assert batch.prompt_tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.prompt_lengths.tolist() == [[3, 3], [2, 2]]
    assert batch.completion_lengths.tolist() == [[1, 2], [3, 3]]
    assert batch.completion_tokens.tolist() == np.arange(12).reshape(2, 2, 3).tolist()
    assert batch.loss_rows.all()
    assert (batch.old_logprobs, batch.ref_logprobs, batch.entropy_floor) == (None, None, None)


def test_truncated_completions_leave_the_loss_when_asked_to():
    batch = rollout_batch(sampled_by_hand(), GrpoConfig(loss=LossConfig(mask_truncated=True)))
    assert batch.loss_rows.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig(), -2.0),
        (LossConfig(correction="token_tis"), -1.0),
        (LossConfig(off_policy_threshold=0.5), -1.0),
    ],
)
def test_a_correction_reads_the_distribution_that_was_drawn_from(loss, expected):
    batch = rollout_batch(sampled_by_hand(), GrpoConfig(loss=loss))
    assert batch.sampler_logprobs.tolist() == np.full((2, 2, 3), expected).tolist()


POLICY, REFERENCE = {"w": -1.0}, {"w": -3.0}


def fake_score(params, batch, temperature):
    """The one parameter becomes every log-prob; entropies count up from 0."""
    shape = batch.completion_tokens.shape
    return jnp.full(shape, params["w"] * temperature), jnp.arange(float(np.prod(shape))).reshape(shape)


def never(*args):
    raise AssertionError("this pass was not needed")


def test_on_policy_without_kl_nothing_is_scored():
    batch = batch_of(2)
    assert with_logprobs(batch, never, POLICY, None, GrpoConfig(prompts=2)) is batch


def test_the_reference_is_scored_with_its_own_parameters_at_the_sampling_temperature():
    batch = with_logprobs(batch_of(2), fake_score, POLICY, REFERENCE, GrpoConfig(prompts=2))
    np.testing.assert_allclose(batch.ref_logprobs, -3.0 * 0.9, rtol=1e-6)
    assert batch.old_logprobs is None


@pytest.mark.parametrize("several", [{"minibatches": 2}, {"passes": 2}])
def test_several_updates_score_the_old_policy(several):
    batch = with_logprobs(batch_of(2), fake_score, POLICY, None, GrpoConfig(prompts=2, **several))
    np.testing.assert_allclose(batch.old_logprobs, -0.9, rtol=1e-6)
    assert batch.ref_logprobs is None


def test_the_entropy_floor_is_a_quantile_of_kept_tokens_alone():
    # Kept tokens have entropies 0 | 3 4 5 | 6 | 9 10 11; the upper half starts at their median, 5.5.
    grpo = GrpoConfig(prompts=2, loss=LossConfig(top_entropy=0.5))
    batch = with_logprobs(batch_of(2), fake_score, POLICY, None, grpo)
    assert float(batch.entropy_floor) == 5.5
    assert batch.old_logprobs is None


def test_minibatches_cut_prompts_and_repeat_by_pass():
    batch = batch_of(4)._replace(old_logprobs=jnp.zeros((4, 2, 3)), entropy_floor=jnp.float32(0.5))
    parts = minibatches(batch, GrpoConfig(prompts=4, minibatches=2, passes=2))
    assert [part.prompt_tokens[:, 0].tolist() for part in parts] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert [part.old_logprobs is None for part in parts] == [True, False, False, False]
    assert [float(part.entropy_floor) for part in parts] == [0.5] * 4


def test_one_minibatch_is_the_batch():
    batch = batch_of(2)
    (part,) = minibatches(batch, GrpoConfig(prompts=2))
    assert jax.tree.map(np.array_equal, part, batch) == jax.tree.map(lambda leaf: True, batch)


def test_advantages_by_hand(config_of):
    # Group 1: 1 and 0, mean 0.5. Group 2: one verdict, too few to compare, and in no number.
    config = config_of({"grpo.advantage.scale": "none"})
    graded = graded_by_hand([[1.0, 0.0], [NAN, 1.0]])
    advantages, signal = advantages_of(graded, sampled_by_hand(), config)
    assert advantages.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    assert signal["dead_groups"] == 0.0
    assert signal["silent_groups"] == 0.5
    assert signal["spread/format"] == 1.0
    assert set(signal) == {
        *("dead_groups", "silent_groups", "group_spread", "group_std"),
        *("spread/format", "spread/emotion", "spread/rubric"),
    }


def test_long_completions_pay_inside_the_buffer(config_of):
    # Budget 3, buffer 2: lengths 1, 2 and 3 pay 0, 0.5 and 1.
    config = config_of(
        {"grpo.advantage.scale": "none", "grpo.sampler.max_new_tokens": 3, "grpo.loss.overlong_buffer": 2}
    )
    advantages, _ = advantages_of(graded_by_hand([[1.0, 1.0], [1.0, 0.0]]), sampled_by_hand(), config)
    assert advantages.tolist() == [[0.25, -0.25], [0.5, -0.5]]


@pytest.mark.parametrize("scale", ["batch", "reinforce_pp", "gdpo"])
def test_a_group_with_too_few_verdicts_is_left_out_of_what_the_others_are_held_against(scale, config_of):
    config, sampled = config_of({"grpo.advantage.scale": scale, "judge.min_valid": 2}), sampled_by_hand()
    lone, none = (advantages_of(graded_by_hand([[1.0, 0.0], [NAN, last]]), sampled, config)[0] for last in (0.9, NAN))
    assert lone.tolist() == none.tolist()
    assert lone[0, 0] > 0


def test_groups_with_too_few_verdicts_leave_the_update():
    graded = graded_by_hand([[1.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    assert enough_verdicts(graded, 2).tolist() == [[True], [False], [False]]
    assert enough_verdicts(graded, 1).tolist() == [[True], [True], [False]]


def test_rollout_metrics_by_hand():
    metrics = rollout_metrics(sampled_by_hand(), graded_by_hand([[1.0, 0.0], [NAN, 1.0]]))
    assert metrics["completion_tokens"] == 2.25
    assert metrics["completion_tokens_max"] == 3
    assert metrics["truncated"] == 0.25
    assert metrics["tokens"] == 9 + 5
    assert metrics["hacking/distinct_reply_share"] == 0.25


def test_prompts_and_completions_must_fit_the_model(config_of, nano_policy):
    check_positions(nano_policy.spec, 2040, 8, "eval.sampler")
    message = r"data\.max_prompt_tokens: wanted at most the model's 2048 positions.*got 2041\. Lower.*eval\.sampler"
    with pytest.raises(ConfigError, match=message):
        check_positions(nano_policy.spec, 2041, 8, "eval.sampler")
