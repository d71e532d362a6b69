"""The judge beside the loop: who works when, what a lag of one step learns from, and how a run stops and goes on."""

import asyncio
import dataclasses
import functools
import threading
import time

import jax
import numpy as np
import pytest

from kardia_jax import judging, scoring, train
from kardia_jax.config import AuditConfig, LocalJudgeConfig
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.model.policy import Compute, logits
from kardia_jax.rewards.rubric import JudgeFailure, Mark, Verdict
from kardia_jax.scoring import JudgeStopError
from kardia_jax.train import train_grpo

# Nats; two float32 programs that sum in another order.
AGREEMENT = 1e-4
ROWS = 8
"""Completions of a step in the tiny world: 2 prompts x 4."""
pytestmark = pytest.mark.usefixtures("every_text_counts")


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def without_clocks(rows):
    anew = ("seconds/", "judge/", "tokens_per_second", "compilations")
    return [{name: value for name, value in row.items() if not name.startswith(anew)} for row in rows]


# ---- who works when


@dataclasses.dataclass
class Waits:
    """Gives the verdicts of a step when ``ahead`` steps more have been sampled; of all at the end of the run."""

    ahead: int
    verdict: object
    steps: int = 4
    sampled: int = 0
    asked: int = 0
    name: str = "waits"

    async def score(self, requests):
        step, self.asked = self.asked // ROWS, self.asked + 1
        while self.sampled < min(step + 1 + self.ahead, self.steps):
            await asyncio.sleep(0.001)
        return [self.verdict(request) for request in requests]


@pytest.fixture
def counted(monkeypatch):
    """``counted(judge)`` tells the judge how many steps have been sampled."""

    def count(judge):
        original = train.sample

        def sample(*args):
            sampled = original(*args)
            judge.sampled += 1
            return sampled

        monkeypatch.setattr(train, "sample", sample)
        return judge

    return count


def test_with_lag_a_step_is_judged_while_the_next_is_sampled(
    config_of, fresh_policy, grader_of, fake_verdict, counted, read_lines
):
    # Without lag this judge would wait for ever.
    judge = counted(Waits(1, fake_verdict))
    config = config_of({"grpo.lag": 1})
    train_grpo(config, fresh_policy(), grader_of(judge=judge))
    metrics = read_lines(config.run.dir / "metrics.jsonl")
    assert [row["judge_failures"] for row in metrics] == [0.0] * 4
    assert all(row["judge/busy_seconds"] > 0 for row in metrics)
    # All but the last step were judged behind a rollout.
    assert all(row["judge/hidden_share"] > 0.5 for row in metrics[:3])


def test_a_judge_that_waits_for_the_next_step_gets_it_with_lag_alone(
    config_of, fresh_policy, grader_of, fake_verdict, counted, monkeypatch
):
    monkeypatch.setattr(judging, "GRACE_SECONDS", 0.0)
    judge = counted(Waits(1, fake_verdict))
    config = config_of({"judge.traffic.deadline_seconds": 0.5})
    with pytest.raises(JudgeStopError, match=r"8 x waits: no answer within 0\.5 s"):
        train_grpo(config, fresh_policy(), grader_of(judge=judge))


def test_without_lag_a_completion_is_judged_while_others_are_to_come(
    config_of, fresh_policy, grader_of, slow_judge, monkeypatch
):
    begun = threading.Event()

    class Begins:
        name = "begins"

        async def score(self, requests):
            begun.set()
            return await slow_judge.score(requests)

    original, before_the_last = judging.Grading.finished, []

    def finished(self, prompt, sample, text):
        if len(self._rows) == ROWS - 1:
            before_the_last.append(begun.wait(10))
        original(self, prompt, sample, text)

    monkeypatch.setattr(judging.Grading, "finished", finished)
    train_grpo(config_of({"grpo.steps": 1}), fresh_policy(), grader_of(judge=Begins()))
    assert before_the_last == [True]


# ---- what a lag of one step learns from


@functools.cache
def plain_logits(spec):
    compute = Compute("float32", "none", attention="xla")
    return jax.jit(lambda params, rows: logits(spec, compute, params, rows, None)[..., : spec.sampled_tokens])


def plain_logprobs(spec, params, batch, temperature: float) -> np.ndarray:
    """Log-probs of the sampled tokens from plain logits of prompt and completion, row by row."""
    *places, longest = batch.completion_tokens.shape
    rows = np.zeros((*places, batch.prompt_tokens.shape[1] + longest), np.int32)
    ends = np.array(batch.prompt_lengths)
    for p, g in np.ndindex(*places):
        rows[p, g, : ends[p, g]] = batch.prompt_tokens[p, : ends[p, g]]
        rows[p, g, ends[p, g] : ends[p, g] + longest] = batch.completion_tokens[p, g]
    given = jax.nn.log_softmax(plain_logits(spec)(params, rows.reshape(-1, rows.shape[-1])) / temperature)
    # The logits at a token's place speak of the next one.
    before = (ends[..., None] + np.arange(longest) - 1).reshape(-1, longest, 1)
    chosen = np.take_along_axis(np.asarray(given), before, 1)
    return np.take_along_axis(chosen, batch.completion_tokens.reshape(-1, longest, 1), 2).reshape(*places, longest)


@pytest.fixture
def weights(monkeypatch):
    """``sampled``: the weights that sampled each step; ``after``: those after each step; as host copies."""
    seen: dict[str, list] = {"sampled": [], "after": []}
    with_logprobs, check_progress = train.with_logprobs, train.check_progress

    def sampled(batch, score, params, reference, grpo):
        seen["sampled"].append(jax.device_get(params))
        return with_logprobs(batch, score, params, reference, grpo)

    def after(state, *rest):
        seen["after"].append(jax.device_get(state.params))
        return check_progress(state, *rest)

    monkeypatch.setattr(train, "with_logprobs", sampled)
    monkeypatch.setattr(train, "check_progress", after)
    return seen


def test_rollouts_are_one_update_old_and_old_logprobs_are_those_of_the_weights_that_sampled(
    config_of, fresh_policy, grader_of, captured, weights, nano_policy
):
    config = config_of({"grpo.lag": 1})
    train_grpo(config, fresh_policy(), grader_of())
    start, after = nano_policy.params, weights["after"]
    assert [bits(params) for params in weights["sampled"]] == [bits(one) for one in (start, start, *after[:2])]
    for step, batch in enumerate(captured):
        kept = np.arange(batch.completion_tokens.shape[-1]) < batch.completion_lengths[..., None]
        old = plain_logprobs(nano_policy.spec, weights["sampled"][step], batch, config.grpo.sampler.temperature)
        np.testing.assert_allclose(batch.old_logprobs[kept], old[kept], atol=AGREEMENT)
        np.testing.assert_allclose(batch.sampler_logprobs[kept], old[kept], atol=AGREEMENT)
        now = plain_logprobs(nano_policy.spec, ([start, *after])[step], batch, config.grpo.sampler.temperature)
        # The first step is learned from by the weights that sampled it; the others are not.
        assert (np.abs(now - old)[kept].max() > 100 * AGREEMENT) == (step > 0)


def test_the_ratio_of_a_lagged_step_is_that_of_the_weights(
    config_of, fresh_policy, grader_of, captured, weights, nano_policy, read_lines
):
    # By hand, for the third step: the mean over tokens of exp(now - old), where nothing has been updated within it.
    config = config_of({"grpo.lag": 1})
    train_grpo(config, fresh_policy(), grader_of())
    batch, temperature = captured[2], config.grpo.sampler.temperature
    kept = np.arange(batch.completion_tokens.shape[-1]) < batch.completion_lengths[..., None]
    now, old = (plain_logprobs(nano_policy.spec, weights["after"][n], batch, temperature)[kept] for n in (1, 0))
    ratio = read_lines(config.run.dir / "metrics.jsonl")[2]["ratio"]
    assert ratio == pytest.approx(np.exp(now - old).mean(), rel=AGREEMENT)
    assert abs(ratio - 1) > 10 * AGREEMENT


def test_the_samplers_own_logprobs_serve_as_old_ones_without_a_pass(
    config_of, fresh_policy, grader_of, captured, monkeypatch
):
    passes = []
    original = train.make_score

    def make(*args):
        score = original(*args)
        return lambda *inputs: passes.append(1) or score(*inputs)

    monkeypatch.setattr(train, "make_score", make)
    fields = {"grpo.lag": 1, "grpo.old_logprobs": "sampler", "grpo.loss.beta": 0.0}
    train_grpo(config_of(fields), fresh_policy(), grader_of())
    for batch in captured:
        np.testing.assert_array_equal(batch.old_logprobs, batch.sampler_logprobs)
    # The warm-up scores once, so that its memory is known; the steps do not.
    assert len(passes) == 1


# ---- a judge that fails


@dataclasses.dataclass
class Breaks:
    """Answers so many completions, and then none."""

    good: int
    verdict: object
    error: Exception | None = None
    asked: int = 0
    name: str = "breaks"

    async def score(self, requests):
        self.asked += len(requests)
        if self.asked > self.good:
            if self.error:
                raise self.error
            return [JudgeFailure("503 from the server", retryable=True)] * len(requests)
        return [self.verdict(request) for request in requests]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("good_steps", [0, 2, 3])
def test_a_run_that_stopped_for_its_judge_goes_on_bit_for_bit(
    lag, good_steps, config_of, fresh_policy, grader_of, fake_verdict, read_lines, tmp_path
):
    whole = config_of({"grpo.lag": lag, "run.dir": tmp_path / "whole"})
    expected = train_grpo(whole, fresh_policy(), grader_of(judge=Breaks(1000, fake_verdict)))
    config = config_of({"grpo.lag": lag})
    message = (
        rf"8 of 8 verdicts are missing \(100%\).*8 x 503 from the server.*after step {good_steps} is saved in .*/run"
        r": repair the judge and go on with --run\.resume"
    )
    with pytest.raises(JudgeStopError, match=message):
        train_grpo(config, fresh_policy(), grader_of(judge=Breaks(good_steps * ROWS, fake_verdict)))
    assert len(read_lines(config.run.dir / "metrics.jsonl")) == good_steps
    again = config_of({"grpo.lag": lag, "run.resume": True})
    policy = train_grpo(again, fresh_policy(), grader_of(judge=Breaks(1000, fake_verdict)))
    assert bits(policy.params) == bits(expected.params)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = (without_clocks(read_lines(one.run.dir / name)) for one in (config, whole))
        assert ours == theirs


def test_a_judge_that_can_never_answer_stops_the_run_with_its_state_saved(
    config_of, fresh_policy, grader_of, fake_verdict
):
    judge = Breaks(ROWS, fake_verdict, JudgeUnusableError("endpoint m: 401: wrong key."))
    with pytest.raises(JudgeStopError, match=r"401: wrong key\. The state after step 1 is saved.*--run\.resume"):
        train_grpo(config_of(), fresh_policy(), grader_of(judge=judge))


def test_a_short_outage_within_the_window_is_borne(config_of, fresh_policy, grader_of, fake_verdict, read_lines):
    # 6 of the 8 verdicts of step 3 are missing: 6 of 24 over the window.
    class Stumbles(Breaks):
        async def score(self, requests):
            self.asked += len(requests)
            out = 2 * ROWS < self.asked <= 2 * ROWS + 6
            return [JudgeFailure("reset", True) if out else self.verdict(request) for request in requests]

    config = config_of()
    train_grpo(config, fresh_policy(), grader_of(judge=Stumbles(0, fake_verdict)))
    rows = read_lines(config.run.dir / "metrics.jsonl")
    assert [row["judge_failures"] for row in rows] == [0.0, 0.0, 0.75, 0.0]


def test_every_second_verdict_lost_changes_no_other_and_no_zero_enters(
    config_of, fresh_policy, grader_of, captured, read_lines, tmp_path
):
    fields = {"grpo.steps": 1, "run.dir": tmp_path / "all"}
    train_grpo(config_of(fields), fresh_policy(), grader_of())
    whole = read_lines(tmp_path / "all" / "rollouts.jsonl")
    config = config_of({"grpo.steps": 1})
    train_grpo(config, fresh_policy(), grader_of(silent=range(0, ROWS, 2)))
    half = read_lines(config.run.dir / "rollouts.jsonl")
    assert [row["completion"] for row in half] == [row["completion"] for row in whole]
    assert [row["reward"] for row in half[1::2]] == [row["reward"] for row in whole[1::2]]
    assert [row["reward"] for row in half[::2]] == [None] * (ROWS // 2)
    assert all(row["rubric"] is None and row["marks"] is None for row in half[::2])
    # The mean of the verdicts that there are, as if the others had never been sampled.
    known = [row["reward"] for row in whole[1::2]]
    assert read_lines(config.run.dir / "metrics.jsonl")[0]["reward"] == pytest.approx(np.mean(known))
    advantages = captured[1].advantages
    for group in range(2):
        pair = np.array(known[2 * group : 2 * group + 2])
        expected = (pair - pair.mean()) / (pair.std(ddof=1) + config.grpo.advantage.epsilon)
        np.testing.assert_allclose(advantages[group, 1::2], expected, rtol=1e-4)
        assert advantages[group, ::2].tolist() == [0.0, 0.0]


# ---- the second judge

AUDIT = AuditConfig(every=2, share=0.5, kind="local", local=LocalJudgeConfig(source="another"))


@dataclasses.dataclass
class Harsh:
    """A second judge: 1 for everything, or what it is told to raise."""

    error: Exception | None = None
    asked: int = 0
    name: str = "harsh"

    async def score(self, requests):
        self.asked += len(requests)
        if self.error:
            raise self.error
        names = [criterion.name for criterion in scoring.load_rubric("kardia_five").criteria]
        return [Verdict(tuple(Mark(name, 1, "no") for name in names)) for _ in requests]


def audited(config_of, fresh_policy, grader_of, judge, auditor, lag=0):
    config = config_of({"judge.audit": AUDIT, "grpo.lag": lag})
    policy = train_grpo(config, fresh_policy(), grader_of(judge=judge)._replace(auditor=auditor))
    return config, policy


@pytest.mark.parametrize("lag", [0, 1])
def test_the_second_judge_sees_its_share_and_pays_nothing(
    lag, config_of, fresh_policy, grader_of, slow_judge, read_lines, tmp_path
):
    auditor = Harsh()
    config, policy = audited(config_of, fresh_policy, grader_of, slow_judge, auditor, lag)
    alone = train_grpo(
        config_of({"run.dir": tmp_path / "alone", "grpo.lag": lag}), fresh_policy(), grader_of(judge=slow_judge)
    )
    assert bits(policy.params) == bits(alone.params)
    assert auditor.asked == 2 * ROWS // 2
    rows = read_lines(config.run.dir / "metrics.jsonl")
    assert ["audit/gap" in row for row in rows] == [False, True, False, True]
    graded = read_lines(config.run.dir / "rollouts.jsonl")
    for step in (2, 4):
        row = rows[step - 1]
        assert (row["audit/compared"], row["audit/missing"]) == (ROWS // 2, 0)
        # Its mark is always 1, so the gap is the mean mark less 1 over the places that follow from seed and step.
        marks = [one["marks"]["empathy"] for one in graded if one["step"] == step]
        places = sorted(judging.audit_sample(config.run.seed, step - 1, ROWS, ROWS // 2))
        assert row["audit/gap/empathy"] == pytest.approx(np.mean([marks[place] for place in places]) - 1)
        assert row["seconds/audit"] >= 0


@pytest.mark.parametrize(
    "error", [TimeoutError("60 s"), KeyError("choices"), JudgeUnusableError("another: 401"), asyncio.CancelledError()]
)
def test_a_second_judge_that_fails_stops_nothing(error, config_of, fresh_policy, grader_of, read_lines):
    config, _ = audited(config_of, fresh_policy, grader_of, None, Harsh(error))
    rows = read_lines(config.run.dir / "metrics.jsonl")
    assert len(rows) == 4
    assert (rows[1]["audit/compared"], rows[1]["audit/missing"]) == (0, ROWS // 2)
    assert rows[1]["audit/gap"] is None


def test_a_run_with_a_second_judge_that_was_killed_audits_the_same_completions(
    config_of, fresh_policy, grader_of, slow_judge, read_lines, killed_at, tmp_path
):
    whole, _ = audited(
        lambda fields: config_of(fields | {"run.dir": tmp_path / "whole"}),
        fresh_policy,
        grader_of,
        slow_judge,
        Harsh(),
        1,
    )
    with killed_at(judging.Grading, "audited", 2) as killed, pytest.raises(killed):
        audited(config_of, fresh_policy, grader_of, slow_judge, Harsh(), 1)
    again, _ = audited(
        lambda fields: config_of(fields | {"run.resume": True}), fresh_policy, grader_of, slow_judge, Harsh(), 1
    )
    ours, theirs = (without_clocks(read_lines(one.run.dir / "metrics.jsonl")) for one in (again, whole))
    assert ours == theirs


def test_nothing_is_left_running_after_a_run(config_of, fresh_policy, grader_of, slow_judge, killed_at):
    with killed_at(train, "with_logprobs", 1) as killed, pytest.raises(killed):
        train_grpo(config_of(), fresh_policy(), grader_of(judge=slow_judge))
    end = time.monotonic() + 10
    while any(thread.name.startswith("judge ") for thread in threading.enumerate()):
        assert time.monotonic() < end
