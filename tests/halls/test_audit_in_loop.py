"""The second judge in the training loop: what it sees, what it says in the metrics, and that it never pays."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest

from kardia_jax.config import ConfigError, JudgeConfig, RewardConfig
from kardia_jax.config.judge import AuditConfig, EndpointConfig
from kardia_jax.judge.audit import audit_sample
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.rewards.rubric import Mark, Verdict, load_rubric
from kardia_jax.scoring import make_grader, with_auditor
from kardia_jax.train import train_grpo

RUBRIC = load_rubric("kardia_five")
EVERY = {"judge.audit.kind": "remote", "judge.audit.share": 0.5, "judge.audit.every": 2}


@dataclasses.dataclass
class Threes:
    """Marks everything with 3, the middle of the scale, and remembers what it saw."""

    name: str = "threes"
    seen: list[str] = dataclasses.field(default_factory=list)

    async def score(self, requests):
        self.seen += [request.reply for request in requests]
        return [Verdict(tuple(Mark(name, 3, "so so") for name in RUBRIC.names)) for _ in requests]

    def take_stats(self):
        return {"judge/cost": 0.5}


@dataclasses.dataclass
class Broken:
    error: Exception
    name: str = "broken"

    async def score(self, requests):
        raise self.error


@pytest.fixture
def train(config_of, fresh_policy, grader_of, read_lines) -> Callable:
    """Trains with this auditor: (bits of the parameters, metrics, rollouts)."""

    def run(auditor, fields):
        config = config_of({"run.dir": config_of().run.dir / str(len(fields)), **fields})
        policy = train_grpo(config, fresh_policy(), grader_of()._replace(auditor=auditor))
        files = (read_lines(config.run.dir / f"{name}.jsonl") for name in ("metrics", "rollouts"))
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(policy.params)], *files

    return run


@pytest.mark.usefixtures("every_text_counts")
def test_a_sample_of_every_second_step_is_marked_again_and_changes_no_bit(train):
    auditor = Threes()
    bits, metrics, rollouts = train(auditor, EVERY)
    seen = []
    for row in metrics:
        if row["step"] % 2:
            assert "audit/gap" not in row
            continue
        of_step = [one for one in rollouts if one["step"] == row["step"]]
        sample = [of_step[place] for place in audit_sample(0, row["step"] - 1, 8, 4)]
        seen += [one["spans"]["response"] for one in sample]
        # The rubric's unit mark of 3 is 0.5.
        assert row["audit/gap"] == pytest.approx(np.mean([one["rubric"] - 0.5 for one in sample]))
        assert (row["audit/compared"], row["audit/missing"]) == (4, 0)
    assert sorted(seen) == sorted(auditor.seen)
    assert len(seen) == 8
    assert [row.get("audit/judge/cost") for row in metrics] == [None, 0.5, None, 0.5]
    assert bits == train(None, {})[0]


@pytest.mark.usefixtures("every_text_counts")
@pytest.mark.parametrize("error", [JudgeUnusableError("wrong key"), ValueError("odd")])
def test_an_audit_that_fails_stops_nothing(error, train):
    _, metrics, _ = train(Broken(error), {**EVERY, "grpo.steps": 2})
    assert [row["step"] for row in metrics] == [1, 2]
    assert (metrics[1]["audit/compared"], metrics[1]["audit/missing"], metrics[1]["audit/gap"]) == (0, 4, None)
    assert metrics[1]["judge_failures"] == 0


def test_the_config_names_the_second_judge(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    audit = AuditConfig(every=3, kind="endpoint", endpoint=EndpointConfig(model="m"))
    config = JudgeConfig(audit=audit)
    grader = make_grader(config, RewardConfig())
    assert (grader.judge.name, grader.auditor) == ("rules-1", None)
    assert with_auditor(grader, JudgeConfig()) == grader
    second = with_auditor(grader, config).auditor
    assert second is not None
    assert second.name == "endpoint m"
    keyed = dataclasses.replace(audit, endpoint=EndpointConfig(model="m", key_env="NOT_SET"))
    with pytest.raises(ConfigError, match=r"^judge\.audit: .* judge\.endpoint\.key_env: .*NOT_SET"):
        with_auditor(grader, dataclasses.replace(config, audit=keyed))
