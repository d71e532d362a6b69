import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import run as run_module
from kardia_jax.checkpoint import CheckpointError, latest_step
from kardia_jax.config import Config, ConfigError, from_json
from kardia_jax.observe.trackers import TrackerError
from kardia_jax.run import TrainingError, check_progress, comparable, due, open_run
from kardia_jax.types import TrainState


def state_at(step: int, bad_steps: int = 0) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.full(3, float(step))}, (), jnp.int32(bad_steps))


def walk(config: Config, steps: int = 4, until: int | None = None) -> None:
    """A loop that changes nothing but the step."""
    with open_run(config, "sft", steps, state_at(0)) as run:
        for step in range(run.first_step, steps if until is None else until):
            run.finish_step(step + 1, state_at(step + 1), {"loss": 1 / (step + 1), "tokens": 10.0}, [{"sample": step}])


def test_it_is_time_every_so_many_steps_and_at_the_end():
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 4) if due(step, 50, 3)] == [3]


def test_a_run_writes_what_its_docstring_draws(config_of, read_lines):
    config = config_of({"run.save_every": 3})
    walk(config)
    folder = config.run.dir
    assert from_json((folder / "config.json").read_text("utf-8")) == config
    assert json.loads((folder / "verb.json").read_text("utf-8")) == {"verb": "sft"}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "4"]
    assert [row["sample"] for row in read_lines(folder / "rollouts.jsonl")] == [0, 1, 2, 3]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[1]["loss"] == 0.5
    assert metrics[1]["tokens_per_second"] > 0


def test_speed_is_tokens_over_the_seconds_of_the_step(config_of, read_lines, monkeypatch):
    config = config_of()
    with open_run(config, "sft", 4, state_at(0)) as run:
        monkeypatch.setattr(run.timer, "take", lambda: {"rollout": 1.5, "update": 0.5})
        run.finish_step(1, state_at(1), {"tokens": 10.0})
    (row,) = read_lines(config.run.dir / "metrics.jsonl")
    assert row["tokens_per_second"] == 5.0
    assert row["seconds/rollout"] == 1.5


def test_compilations_are_counted_and_said_once_the_run_is_warm(config_of, read_lines, capsys):
    config = config_of({"run.save_every": 1})
    with open_run(config, "sft", 4, state_at(0)) as run:
        for step in range(1, 5):
            jax.jit(lambda x: x + 1)(np.zeros(3, np.float32))
            run.finish_step(step, state_at(step), {})
    # Every trip makes a function of its own, so each compiles; saving, which compiles checksums, is not counted.
    assert [row["compilations"] for row in read_lines(config.run.dir / "metrics.jsonl")] == [1, 1, 1, 1]
    said = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert [line.split(" in ")[0] for line in said] == [f"step {step}: 1 programs compiled" for step in (3, 4)]


def test_an_unknown_metric_is_null_and_not_a_number(config_of, read_lines):
    config = config_of()
    with open_run(config, "sft", 4, state_at(0)) as run:
        run.finish_step(1, state_at(1), {"kl": math.nan})
    assert read_lines(config.run.dir / "metrics.jsonl")[0]["kl"] is None


def test_a_resumed_run_starts_behind_its_newest_checkpoint_and_cuts_the_files(config_of, read_lines):
    config = config_of()
    walk(config, until=3)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert len(read_lines(config.run.dir / name)) == 3
    with open_run(config_of({"run.resume": True}), "sft", 4, state_at(0)) as run:
        assert run.first_step == 2
        assert run.state.params["w"].tolist() == [2.0, 2.0, 2.0]
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            assert [row["step"] for row in read_lines(config.run.dir / name)] == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_checkpoint_promises_the_lines_up_to_its_step(config_of, read_lines, monkeypatch, name):
    config = config_of()

    def lines_then_save(self, step, state, extra):
        assert [row["step"] for row in read_lines(config.run.dir / name)] == list(range(1, step + 1))

    monkeypatch.setattr(run_module.Checkpoints, "save", lines_then_save)
    walk(config)


def test_a_used_folder_is_refused_and_left_as_it_is(config_of):
    walk(config_of())
    before = {path: path.read_bytes() for path in config_of().run.dir.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"run\.dir: wanted a folder without checkpoints.*--run\.resume"):
        walk(config_of({"run.seed": 3}))
    assert {path: path.read_bytes() for path in before} == before


def test_there_must_be_something_to_resume(config_of):
    with pytest.raises(CheckpointError, match=r"run\.resume: wanted a complete checkpoint.*got none\. Start without"):
        walk(config_of({"run.resume": True}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run.seed", 5, r"seed: wanted 0 as in the checkpoint, got 5"),
        ("grpo.loss.beta", 0.5, r"grpo\.loss\.beta: wanted 0\.04 as in the checkpoint, got 0\.5"),
        ("data.train_limit", 3, r"data\.train_limit: wanted None as in the checkpoint, got 3"),
        ("sft.optimizer.learning_rate", 1.0, r"sft\.optimizer\.learning_rate: wanted 0\.01"),
    ],
)
def test_a_resumed_run_must_be_the_same_run(config_of, field, value, message):
    walk(config_of(), until=2)
    with pytest.raises(ConfigError, match=message + r".*start a new run\.dir"):
        walk(config_of({field: value, "run.resume": True}))
    assert from_json((config_of().run.dir / "config.json").read_text("utf-8")) == config_of()


def test_bookkeeping_and_evaluation_may_change_on_resume(config_of):
    walk(config_of(), until=2)
    walk(config_of({"run.resume": True, "run.save_every": 1, "run.keep_checkpoints": 9, "eval.batch": 7}))
    assert latest_step(config_of().run.dir / "checkpoints") == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("judge.endpoint.base_urls", ("http://10.0.0.1:8000/v1",)),
        ("judge.remote.urls", ("http://10.0.0.1:8600",)),
        ("judge.remote.batch", 8),
        ("judge.local.max_tokens_per_batch", 8192),
        ("judge.traffic.concurrency", 4),
        ("judge.cache.path", "off"),
        ("judge.audit.every", 5),
        ("judge.max_failure_share", 0.25),
    ],
)
def test_a_run_goes_on_with_a_judge_that_is_reached_in_another_way(config_of, field, value):
    kind = {"judge.kind": "remote"}
    walk(config_of(kind), until=2)
    walk(config_of({**kind, field: value, "run.resume": True}))
    assert latest_step(config_of().run.dir / "checkpoints") == 4


def test_what_is_compared_holds_the_seed_and_no_bookkeeping(config_of):
    compared = comparable(config_of({"run.seed": 7}))
    assert compared["seed"] == 7
    assert sorted(compared) == ["data", "grpo", "judge", "model", "rewards", "seed", "sft"]


def test_what_the_judge_says_is_compared_and_what_watches_it_is_not(config_of):
    here = comparable(config_of())
    assert comparable(config_of({"judge.alarms.window": 9})) == here
    for changed in ({"judge.min_valid": 1}, {"judge.rubric": "kardia_five_strict"}, {"judge.kind": "remote"}):
        assert comparable(config_of(changed)) != here


def test_bad_gradients_in_a_row_stop_the_run():
    check_progress(state_at(9, bad_steps=1), 2, "sft.optimizer")
    with pytest.raises(TrainingError, match=r"sft\.optimizer\.max_bad_steps: 2 updates in a row.*learning_rate"):
        check_progress(state_at(9, bad_steps=2), 2, "sft.optimizer")


def test_a_tracker_that_is_not_installed_is_named(config_of, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(TrackerError, match=r"tensorboard needs the package tensorboardX.*pip install"):
        walk(config_of({"run.trackers": ("tensorboard",)}))
