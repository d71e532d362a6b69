"""The judge behind HTTP in the training loop, and alarms on its console."""

import threading

import jax
import numpy as np
import pytest

from kardia_jax.config import RewardConfig, ServeConfig
from kardia_jax.config.judge import JudgeConfig, RemoteConfig
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.scoring import make_grader
from kardia_jax.serve.app import Service
from kardia_jax.serve.server import address, bound, make_server
from kardia_jax.serve.worker import JudgeWorker
from kardia_jax.train import train_grpo


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def served():
    """The rule judge on a free port: its address."""
    settings = ServeConfig(port=0)
    with bound(settings) as listener, JudgeWorker(RuleJudge()) as worker:
        server = make_server(Service(worker, KARDIA_FIVE, settings), None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield address(listener)
        server.should_exit = True
        thread.join(timeout=20)


@pytest.mark.usefixtures("every_text_counts")
def test_a_run_judged_over_http_ends_with_the_bits_of_one_that_asks_the_judge_itself(
    served, config_of, fresh_policy, read_lines
):
    rows, ends = [], []
    for kind in ("rules", "remote"):
        judge = JudgeConfig(kind=kind, remote=RemoteConfig(urls=(served,)))
        config = config_of({"grpo.steps": 2, "run.dir": config_of().run.dir / kind})
        policy = train_grpo(config, fresh_policy(), make_grader(judge, RewardConfig()))
        ends.append(bits(policy.params))
        rows.append(read_lines(config.run.dir / "rollouts.jsonl"))
    assert ends[0] == ends[1]
    assert rows[0] == rows[1]
    assert any(row["marks"] for row in rows[1])


@pytest.mark.usefixtures("every_text_counts")
def test_a_server_with_another_rubric_stops_the_run_before_its_first_update(served, config_of, fresh_policy):
    judge = JudgeConfig(kind="remote", rubric="kardia_five_strict", remote=RemoteConfig(urls=(served,)))
    config = config_of()
    with pytest.raises((JudgeUnusableError, RuntimeError), match=r"kardia_five_strict|fingerprint"):
        train_grpo(config, fresh_policy(), make_grader(judge, RewardConfig()))
    assert (config.run.dir / "metrics.jsonl").read_text() == ""


@pytest.mark.usefixtures("every_text_counts")
def test_a_sign_of_hacking_is_said_once(config_of, fresh_policy, grader_of, capsys):
    config = config_of({"judge.alarms.window": 1, "judge.alarms.shared_opener": 0.0})
    train_grpo(config, fresh_policy(), grader_of())
    said = capsys.readouterr().out
    assert said.count("hacking/shared_opener_share") == 1
    assert "step 1: hacking/shared_opener_share" in said
