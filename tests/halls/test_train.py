import functools
import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import judging, scoring, train, warmup
from kardia_jax import run as run_module
from kardia_jax.checkpoint import CheckpointError, latest_step, restore_latest
from kardia_jax.config import ConfigError
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import init_state
from kardia_jax.observe.compilations import EVENT
from kardia_jax.run import TrainingError
from kardia_jax.scoring import JudgeStopError
from kardia_jax.train import train_grpo
from kardia_jax.types import GroupBatch
from kardia_jax.warmup import MemoryShortageError

# Nats; two float32 programs that sum in another order.
AGREEMENT = 1e-4


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def final_state(config, params):
    """The newest checkpoint of a run."""
    optimizer = make_optimizer(config.grpo.optimizer, 1)
    restored = restore_latest(config.run.dir / "checkpoints", jax.eval_shape(lambda: init_state(params, optimizer)))
    assert restored is not None
    return restored.state


def without_clocks(rows):
    """Less what a resumed process does anew: the time that it and its judge take, and what it compiles."""
    anew = ("tokens_per_second", "compilations")
    clocks = ("seconds/", "judge/")
    return [{k: v for k, v in one.items() if not k.startswith(clocks) and k not in anew} for one in rows]


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
    assert metrics["skipped"] == 1.0
    # Unknown, not 0: nothing was observed.
    assert (metrics["reward"], metrics["reward/rubric"], metrics["kl"]) == (None, None, None)
    assert metrics["judge_failures"] == 1.0


class TimedOut:
    name = "slow"

    async def score(self, requests):
        raise TimeoutError("60 s")


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize(("judge", "why"), [(None, "8 x too busy"), (TimedOut(), "8 x slow: TimeoutError: 60 s")])
def test_too_many_missing_verdicts_stop_the_run_before_the_update(
    config_of, fresh_policy, grader_of, nano_policy, judge, why
):
    config = config_of()
    message = rf"8 of 8 verdicts are missing \(100%\), allowed are 50%. Why: {why}.*step 0 is saved.*--run\.resume"
    with pytest.raises(JudgeStopError, match=message):
        train_grpo(config, fresh_policy(), grader_of(silent=range(8), judge=judge))
    assert bits(final_state(config, nano_policy.params).params) == bits(nano_policy.params)
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


@pytest.mark.usefixtures("every_text_counts")
def test_what_a_sampler_with_few_bits_and_seats_draws_is_measured_and_corrected(
    config_of, fresh_policy, grader_of, read_lines, captured
):
    narrow = {"kv_dtype": "int8", "weights_dtype": "int8", "rows": 4}
    fields = {f"grpo.sampler.{name}": value for name, value in narrow.items()} | SEVERAL | {"grpo.steps": 2}
    config = config_of(fields)
    train_grpo(config, fresh_policy(), grader_of())
    for row in read_lines(config.run.dir / "metrics.jsonl"):
        assert AGREEMENT < row["mismatch_abs"] < 0.1
        assert row["mismatch_exp_abs"] > 1
        assert row["grad_norm"] > 0
    assert all(np.abs(gaps(batch)).max() > AGREEMENT for batch in captured)


# ---- resume


@pytest.fixture(scope="module")
def whole_run(config_in, fresh_policy, grader_of, slow_judge, lenient_parse, read_lines, tmp_path_factory):
    """Final state and files of a run that nobody stopped, by its lag; with a lag the judge works beside the loop."""

    @functools.cache
    def run(lag: int):
        config = config_in(tmp_path_factory.mktemp("whole"), {"grpo.lag": lag})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "parse", lenient_parse)
            policy = train_grpo(config, fresh_policy(), grader_of(judge=slow_judge if lag else None))
        return {
            "state": bits(final_state(config, policy.params)),
            "metrics": without_clocks(read_lines(config.run.dir / "metrics.jsonl")),
            "rollouts": (config.run.dir / "rollouts.jsonl").read_bytes(),
        }

    return run


@pytest.fixture(scope="module")
def whole(whole_run):
    return whole_run(0)


# All of them come after the first checkpoint, that of step 2, with or without lag.
BOUNDARIES = {
    "while sampling": (judging.Grading, "finished", 28),
    "after sampling": (train, "rollout_batch", 4),
    "while scoring": (train, "with_logprobs", 4),
    "before the judge": (judging.Grading, "graded", 3),
    "after the judge": (judging.Judging, "check", 3),
    "after the update": (train, "check_progress", 4),
    "before the rollouts are written": (run_module.JsonlWriter, "write", 7),
    "before the metrics are written": (run_module.JsonlWriter, "write", 8),
    "on the terminal, with a checkpoint due": (run_module.TrainingConsole, "update", 4),
    "before the checkpoint": (run_module.Checkpoints, "save", 2),
}


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(
    boundary, lag, whole_run, config_of, fresh_policy, grader_of, slow_judge, killed_at, read_lines
):
    grader = grader_of(judge=slow_judge if lag else None)
    with killed_at(*BOUNDARIES[boundary]) as killed, pytest.raises(killed):
        train_grpo(config_of({"grpo.lag": lag}), fresh_policy(), grader)
    config = config_of({"grpo.lag": lag, "run.resume": True})
    policy = train_grpo(config, fresh_policy(), grader)
    whole, state = whole_run(lag), final_state(config, policy.params)
    assert bits(state) == whole["state"]
    assert bits(policy.params) == bits(state.params)
    assert without_clocks(read_lines(config.run.dir / "metrics.jsonl")) == whole["metrics"]
    assert (config.run.dir / "rollouts.jsonl").read_bytes() == whole["rollouts"]


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize(
    ("boundary", "call", "lag", "saved"),
    [
        ("after sampling", 4, 0, 3),
        ("after the update", 3, 0, 3),
        ("after the update", 1, 1, 1),
        ("while sampling", 28, 1, 2),
    ],
)
def test_a_run_that_gets_sigterm_saves_and_a_restart_goes_on_bit_for_bit(
    boundary,
    call,
    lag,
    saved,
    whole_run,
    config_of,
    fresh_policy,
    grader_of,
    slow_judge,
    read_lines,
    monkeypatch,
    capsys,
):
    (owner, name, _), calls = BOUNDARIES[boundary], itertools.count(1)
    original, before = getattr(owner, name), signal.getsignal(signal.SIGTERM)

    def told_to_stop(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, told_to_stop)
    config = config_of({"grpo.lag": lag, "run.auto_resume": True})
    grader = grader_of(judge=slow_judge if lag else None)
    with pytest.raises(SystemExit) as ended:
        train_grpo(config, fresh_policy(), grader)
    assert ended.value.code == 143
    assert f"SIGTERM: saved after step {saved} in" in capsys.readouterr().out
    assert latest_step(config.run.dir / "checkpoints") == saved
    assert signal.getsignal(signal.SIGTERM) is before
    policy = train_grpo(config, fresh_policy(), grader)
    assert bits(final_state(config, policy.params)) == whole_run(lag)["state"]
    assert without_clocks(read_lines(config.run.dir / "metrics.jsonl")) == whole_run(lag)["metrics"]
    assert (config.run.dir / "rollouts.jsonl").read_bytes() == whole_run(lag)["rollouts"]


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


# ---- the learner's memory, and what is compiled when


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize("field", ["grpo.offload_reference", "grpo.optimizer.offload"])
def test_what_waits_in_host_memory_changes_nothing(field, whole, config_of, fresh_policy, grader_of, read_lines):
    config = config_of({field: True})
    policy = train_grpo(config, fresh_policy(), grader_of())
    assert bits(final_state(config, policy.params)) == whole["state"]
    assert without_clocks(read_lines(config.run.dir / "metrics.jsonl")) == whole["metrics"]


@pytest.mark.usefixtures("every_text_counts")
def test_micro_batches_by_tokens_learn_the_same(whole, config_of, fresh_policy, grader_of, read_lines):
    config = config_of({"grpo.tokens_per_micro_batch": 200, "grpo.steps": 1})
    train_grpo(config, fresh_policy(), grader_of())
    (ours,) = without_clocks(read_lines(config.run.dir / "metrics.jsonl"))
    for name in ("loss", "entropy", "grad_norm", "update_norm"):
        assert ours[name] == pytest.approx(whole["metrics"][0][name], rel=AGREEMENT, abs=AGREEMENT)


@pytest.fixture
def compiled_updates():
    """Names of the update programs that were compiled, one entry each."""
    names: list[str] = []

    def hear(event: str, seconds: float, fun_name: str = "", **_: object) -> None:
        if event == EVENT and fun_name in ("jit(update)", "jit(fetch_and_score)"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield names
    jax.monitoring.unregister_event_duration_listener(hear)


@pytest.mark.usefixtures("every_text_counts")
def test_the_warm_up_compiles_what_the_run_then_calls(
    config_of, fresh_policy, grader_of, killed_at, compiled_updates, monkeypatch
):
    # A bound that no other test has, so that its programs are not there yet.
    fields = {"grpo.loss.clip_high": 0.31, "grpo.passes": 2}
    warmed = []
    original = train.warm_grpo

    def warm(*args):
        original(*args)
        warmed.append(sorted(compiled_updates))

    monkeypatch.setattr(train, "warm_grpo", warm)
    with killed_at(train, "rollout_batch", 3) as killed, pytest.raises(killed):
        train_grpo(config_of(fields), fresh_policy(), grader_of())
    # On-policy and off-policy: the same update with and without old log-probs.
    assert warmed[0].count("jit(update)") == 2
    assert sorted(compiled_updates) == warmed[0]
    compiled_updates.clear()
    train_grpo(config_of(fields | {"run.resume": True}), fresh_policy(), grader_of())
    assert sorted(compiled_updates) == warmed[1]


def test_a_run_that_cannot_fit_stops_before_its_first_step(config_of, fresh_policy, grader_of, monkeypatch):
    monkeypatch.setattr(warmup, "free_bytes", lambda: 1000)
    with pytest.raises(
        MemoryShortageError, match=r"^update of 2 groups x \(96 \+ 4 x 8\) tokens: wanted .*got 0\.0 MiB"
    ):
        train_grpo(config_of(), fresh_policy(), grader_of())
    assert (config_of().run.dir / "metrics.jsonl").read_text("utf-8") == ""
