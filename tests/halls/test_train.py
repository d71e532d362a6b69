import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import run as run_module
from kardia_jax import scoring, train
from kardia_jax.checkpoint import CheckpointError, latest_step, restore_latest
from kardia_jax.config import ConfigError, GrpoConfig, LossConfig
from kardia_jax.dialogue.spans import Spans
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import init_state
from kardia_jax.rewards.combine import Combined, Scores
from kardia_jax.rollout.engine import Sampled
from kardia_jax.run import TrainingError
from kardia_jax.scoring import Graded, JudgeStopError
from kardia_jax.train import (
    advantages_of,
    check_budget,
    enough_verdicts,
    minibatches,
    rollout_batch,
    rollout_metrics,
    train_grpo,
    with_logprobs,
)
from kardia_jax.types import GroupBatch, Rollouts

NAN = math.nan
# Nats; two float32 programs that sum in another order.
AGREEMENT = 1e-4

# ---- the pieces, by hand


def sampled_by_hand() -> Sampled:
    """Two prompts, two completions of at most three tokens; the last completion ran out of tokens."""
    lengths = np.array([[1, 2], [3, 3]])
    rollouts = Rollouts(
        tokens=jnp.arange(12).reshape(2, 2, 3),
        lengths=jnp.asarray(lengths),
        sampler_logprobs=jnp.full((2, 2, 3), -1.0),
        tempered_logprobs=jnp.full((2, 2, 3), -2.0),
        stopped=jnp.array([[True, True], [True, False]]),
    )
    return Sampled(np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2]), rollouts, lengths, [["a", "b"], ["c", "d"]])


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
    # Group 1: 1 and 0, mean 0.5. Group 2: one verdict, which is its own mean.
    config = config_of({"grpo.advantage.scale": "none"})
    graded = graded_by_hand([[1.0, 0.0], [NAN, 1.0]])
    advantages, signal = advantages_of(graded, sampled_by_hand(), config)
    assert advantages.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    assert signal["dead_groups"] == 0.0
    assert signal["silent_groups"] == 0.5
    assert signal["spread/format"] == 0.5
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
    check_budget(config_of(), nano_policy)
    message = r"data\.max_prompt_tokens: wanted at most the model's 2048 positions.*got 2049\. Lower"
    with pytest.raises(ConfigError, match=message):
        check_budget(config_of({"data.max_prompt_tokens": 2041}), nano_policy)


# ---- the loop


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def final_state(config, params):
    """The newest checkpoint of a run."""
    optimizer = make_optimizer(config.grpo.optimizer, 1)
    restored = restore_latest(config.run.dir / "checkpoints", jax.eval_shape(lambda: init_state(params, optimizer)))
    assert restored is not None
    return restored.state


def without_clocks(rows):
    return [{k: v for k, v in one.items() if not k.startswith("seconds/") and k != "tokens_per_second"} for one in rows]


@pytest.fixture
def captured(monkeypatch):
    """Batches as they reach the first update of each step."""
    seen: list[GroupBatch] = []
    original = train.minibatches

    def keep(batch, grpo):
        seen.append(jax.device_get(batch))
        return original(batch, grpo)

    monkeypatch.setattr(train, "minibatches", keep)
    return seen


@pytest.mark.usefixtures("every_text_counts")
def test_a_run_learns_and_its_files_tell_all(config_of, fresh_policy, grader_of, read_lines, nano_policy):
    config = config_of()
    policy = train_grpo(config, fresh_policy(), grader_of())
    assert bits(policy.params) == bits(final_state(config, nano_policy.params).params)
    assert bits(policy.params) != bits(nano_policy.params)
    metrics = read_lines(config.run.dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert {
        *("reward", "reward_std", "reward/format", "reward/emotion", "reward/rubric", "criterion/empathy"),
        *("loss", "kl", "entropy", "grad_norm", "update_norm", "skipped", "learning_rate", "tokens"),
        *("dead_groups", "silent_groups", "judge_failures", "malformed", "truncated", "completion_tokens"),
        *("hacking/length_reward_correlation", "tokens_per_second"),
        *("seconds/rollout", "seconds/judge", "seconds/reference", "seconds/update"),
    } <= set(metrics[0])
    # The first update is on-policy and starts at the reference.
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics[3]["kl"] > 0
    assert metrics[0]["grad_norm"] > 0
    assert metrics[0]["learning_rate"] == pytest.approx(1e-2)
    rollouts = read_lines(config.run.dir / "rollouts.jsonl")
    assert len(rollouts) == 4 * 2 * 4
    for step in range(1, 5):
        rewards = [row["reward"] for row in rollouts if row["step"] == step]
        assert metrics[step - 1]["reward"] == pytest.approx(np.mean(rewards))
    assert rollouts[0]["situation"].startswith("My dog number")
    assert len({(row["dialogue"], row["turn"]) for row in rollouts if row["step"] == 1}) == 2
    assert all(row["spans"]["response"] == (row["completion"] or "-") for row in rollouts)


@pytest.mark.usefixtures("every_text_counts")
def test_the_callers_parameters_are_the_reference_to_the_end(config_of, fresh_policy, grader_of, monkeypatch):
    seen = []
    original = train.with_logprobs

    def keep(batch, score, params, reference, grpo):
        seen.append(bits(reference))
        return original(batch, score, params, reference, grpo)

    monkeypatch.setattr(train, "with_logprobs", keep)
    policy = fresh_policy()
    start = bits(policy.params)
    train_grpo(config_of(), policy, grader_of())
    assert seen == [start] * 4


@pytest.mark.usefixtures("every_text_counts")
def test_half_a_group_without_verdicts(config_of, fresh_policy, grader_of, read_lines, captured):
    config = config_of({"grpo.steps": 4})
    # Requests are numbered over the step: 0 to 3 are the first prompt's.
    train_grpo(config, fresh_policy(), grader_of(silent=(1, 2)))
    rows = [row for row in read_lines(config.run.dir / "rollouts.jsonl") if row["step"] == 1]
    assert [row["valid"] for row in rows] == [True, False, False, True, True, True, True, True]
    assert [row["reward"] is None for row in rows] == [not row["valid"] for row in rows]
    assert rows[1]["reasons"] == {"rubric": "no verdict: too busy"}
    metrics = read_lines(config.run.dir / "metrics.jsonl")[0]
    known = [row["reward"] for row in rows if row["valid"]]
    assert metrics["reward"] == pytest.approx(np.mean(known))
    assert metrics["reward_std"] == pytest.approx(np.std(known))
    assert metrics["judge_failures"] == 0.25
    # By hand: (reward - mean) / (std + 1e-4) over the two rows that have a verdict; exactly 0 for the others.
    (first, second), pair = captured[0].advantages, np.array([rows[0]["reward"], rows[3]["reward"]])
    expected = (pair - pair.mean()) / (pair.std(ddof=1) + config.grpo.advantage.epsilon)
    np.testing.assert_allclose(first, [expected[0], 0.0, 0.0, expected[1]], rtol=1e-4)
    assert first[1] == first[2] == 0.0
    assert np.all(np.isfinite(second))
    assert captured[0].loss_rows.all()


@pytest.mark.usefixtures("every_text_counts")
def test_a_group_without_enough_verdicts_is_left_out_kl_included(config_of, fresh_policy, grader_of, captured):
    train_grpo(config_of(), fresh_policy(), grader_of(silent=(0, 1, 2)))
    assert captured[0].loss_rows.tolist() == [[False] * 4, [True] * 4]
    assert captured[0].advantages[0].tolist() == [0.0] * 4


@pytest.mark.usefixtures("every_text_counts")
def test_a_step_without_any_verdict_teaches_nothing_when_it_is_allowed(
    config_of, fresh_policy, grader_of, read_lines, captured
):
    config = config_of({"judge.max_failure_share": 1.0})
    train_grpo(config, fresh_policy(), grader_of(silent=range(8)))
    assert not any(batch.loss_rows.any() or batch.advantages.any() for batch in captured)
    metrics = read_lines(config.run.dir / "metrics.jsonl")[0]
    assert metrics["grad_norm"] == 0.0
    assert metrics["skipped"] == 0.0
    # Unknown, not 0: nothing was observed.
    assert (metrics["reward"], metrics["reward/rubric"], metrics["kl"]) == (None, None, None)
    assert metrics["judge_failures"] == 1.0


class TimedOut:
    name = "slow"

    async def score(self, requests):
        raise TimeoutError("60 s")


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize("judge", [None, TimedOut()])
def test_too_many_missing_verdicts_stop_the_run_before_the_update(config_of, fresh_policy, grader_of, judge):
    config = config_of()
    with pytest.raises(JudgeStopError, match="100% of this step's verdicts are missing"):
        train_grpo(config, fresh_policy(), grader_of(silent=range(8), judge=judge))
    assert latest_step(config.run.dir / "checkpoints") is None
    assert (config.run.dir / "metrics.jsonl").read_text("utf-8") == ""


@pytest.mark.usefixtures("every_text_counts")
def test_gradients_that_stay_bad_stop_the_run(config_of, fresh_policy, grader_of):
    policy = fresh_policy()
    policy.params["final_norm"]["scale"] = policy.params["final_norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(TrainingError, match=r"grpo\.optimizer\.max_bad_steps: 2 updates in a row"):
        train_grpo(config_of(), policy, grader_of())


SEVERAL = {
    "grpo.minibatches": 2,
    "grpo.passes": 2,
    "grpo.loss.correction": "token_tis",
    "grpo.loss.top_entropy": 0.5,
}


def gaps(batch: GroupBatch) -> np.ndarray:
    """Sampler's minus learner's log-prob of every sampled token (nats)."""
    assert batch.sampler_logprobs is not None
    assert batch.old_logprobs is not None
    kept = np.arange(batch.completion_tokens.shape[-1]) < batch.completion_lengths[..., None]
    return np.asarray(batch.sampler_logprobs - batch.old_logprobs)[kept]


@pytest.mark.usefixtures("every_text_counts")
def test_several_updates_a_correction_and_the_entropy_mask_run_together(
    config_of, fresh_policy, grader_of, read_lines, captured
):
    config = config_of({**SEVERAL, "grpo.sampler.top_k": 50})
    policy = train_grpo(config, fresh_policy(), grader_of())
    assert int(final_state(config, policy.params).step) == 4 * 2 * 2
    metrics = read_lines(config.run.dir / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in metrics)
    for batch in captured:
        assert float(batch.entropy_floor) > 0
        # Among 50 tokens of 3,200 the one that was drawn is far more likely than among all.
        assert gaps(batch).min() > 1


@pytest.mark.usefixtures("every_text_counts")
def test_sampler_and_learner_agree_on_every_token(config_of, fresh_policy, grader_of, captured):
    train_grpo(config_of(SEVERAL), fresh_policy(), grader_of())
    assert len(captured) == 4
    for batch in captured:
        np.testing.assert_allclose(gaps(batch), 0.0, atol=AGREEMENT)


# ---- resume


@pytest.fixture(scope="module")
def whole(config_in, fresh_policy, grader_of, lenient_parse, read_lines, tmp_path_factory):
    """The config, final state and files of a run that nobody stopped."""
    config = config_in(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "parse", lenient_parse)
        policy = train_grpo(config, fresh_policy(), grader_of())
    return {
        "state": bits(final_state(config, policy.params)),
        "metrics": without_clocks(read_lines(config.run.dir / "metrics.jsonl")),
        "rollouts": (config.run.dir / "rollouts.jsonl").read_bytes(),
    }


BOUNDARIES = {
    "after sampling": (train, "rollout_batch", 3),
    "while scoring": (train, "with_logprobs", 4),
    "after the judge": (train, "check_failures", 3),
    "after the update": (train, "check_progress", 4),
    "before the rollouts are written": (run_module.JsonlWriter, "write", 7),
    "before the metrics are written": (run_module.JsonlWriter, "write", 8),
    "on the terminal, with a checkpoint due": (run_module.TrainingConsole, "update", 4),
    "before the checkpoint": (run_module.Checkpoints, "save", 2),
    "after the run": (run_module.Checkpoints, "close", 1),
}


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(
    boundary, whole, config_of, fresh_policy, grader_of, killed_at, read_lines
):
    with killed_at(*BOUNDARIES[boundary]) as killed, pytest.raises(killed):
        train_grpo(config_of(), fresh_policy(), grader_of())
    config = config_of({"run.resume": True})
    policy = train_grpo(config, fresh_policy(), grader_of())
    state = final_state(config, policy.params)
    assert bits(state) == whole["state"]
    assert bits(policy.params) == bits(state.params)
    assert without_clocks(read_lines(config.run.dir / "metrics.jsonl")) == whole["metrics"]
    assert (config.run.dir / "rollouts.jsonl").read_bytes() == whole["rollouts"]


@pytest.mark.usefixtures("every_text_counts")
def test_a_resumed_run_refuses_another_config(config_of, fresh_policy, grader_of, killed_at):
    with killed_at(train, "rollout_batch", 3) as killed, pytest.raises(killed):
        train_grpo(config_of(), fresh_policy(), grader_of())
    changed = config_of({"run.resume": True, "grpo.optimizer.clip_norm": 0.5})
    with pytest.raises(ConfigError, match=r"grpo\.optimizer\.clip_norm: wanted 1\.0 as in the checkpoint, got 0\.5"):
        train_grpo(changed, fresh_policy(), grader_of())


def test_a_run_killed_before_its_first_checkpoint_has_to_start_again(config_of, fresh_policy, grader_of, killed_at):
    with killed_at(train, "rollout_batch", 2) as killed, pytest.raises(killed):
        train_grpo(config_of(), fresh_policy(), grader_of())
    with pytest.raises(CheckpointError, match=r"Start without --run\.resume"):
        train_grpo(config_of({"run.resume": True}), fresh_policy(), grader_of())
    train_grpo(config_of(), fresh_policy(), grader_of())
    assert latest_step(config_of().run.dir / "checkpoints") == 4
