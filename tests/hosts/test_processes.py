"""Two and four processes, joined by gloo, do what one does: tokens, losses, parameters, files; and take up each other's
checkpoints on other meshes. Each group of processes is started once and makes several runs (``trial.py``)."""

import collections
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from kardia_jax.checkpoint import latest_step
from kardia_jax.config import HostsConfig
from kardia_jax.stopping import EXIT_CODE

TRIAL = pathlib.Path(__file__).with_name("trial.py")
PATIENCE = 900
"""Seconds; a group needs about 25 on two cores of its own."""
TOLERANCE = 1e-5
"""Of float32 sums in another order, through six updates of which each moves a parameter by up to 1e-3."""
LASTING = ("seconds/", "judge/", "tokens_per_second", "compilations")
"""Metrics that count time or calls."""


def together(processes: int, *jobs: dict) -> list[tuple[int, str]]:
    """Exit code and output of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # A process as a user starts it: its own single device, and none of this test run's settings for JAX.
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    running = [
        subprocess.Popen(
            [sys.executable, str(TRIAL), address, str(processes), str(n), json.dumps(jobs)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(processes)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def alone(name: str) -> str:
    """The run of one process that this one has to equal."""
    return name.split("-")[0].replace("on", "grpo") + "-1"


def lines(folder: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """Folders of all runs: alone, two and four processes, and what others made of the checkpoint of four."""
    root = tmp_path_factory.mktemp("runs")
    spec = importlib.util.spec_from_file_location("trial", TRIAL)
    assert spec is not None
    assert spec.loader is not None
    trial = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trial)

    def job(verb: str, name: str, mesh: list[int], **more) -> dict:
        return {"verb": verb, "folder": str(root / name), "mesh": mesh, **more}

    four = together(4, job("sft", "sft-4", [1, 2, 2]), job("grpo", "grpo-4", [1, 2, 2], stop=2))
    assert [code for code, _ in four] == [EXIT_CODE] * 4, four
    for name in ("on-1", "on-2"):
        shutil.copytree(root / "grpo-4", root / name)
    two = together(
        2,
        job("grpo", "grpo-2", [2, 1, 1], rows=8),
        job("grpo", "on-2", [1, 1, 2], resume=True),
        job("sft", "lora-2", [1, 2, 1], rank=2),
    )
    assert [code for code, _ in two] == [0, 0], two
    by_itself = [
        job("grpo", "grpo-1", [1, 1, 1]),
        job("sft", "sft-1", [1, 1, 1]),
        job("sft", "lora-1", [1, 1, 1], rank=2),
    ]
    for one in (*by_itself, job("grpo", "on-1", [1, 1, 1], resume=True)):
        trial.trial(one, HostsConfig())
    return root


def test_one_process_learns(runs):
    rewards = [row["reward"] for row in lines(runs / "grpo-1", "metrics.jsonl")]
    assert len(set(rewards)) == 3
    assert all(row["grad_norm"] > 0.01 for row in lines(runs / "grpo-1", "metrics.jsonl"))
    assert any(row["judge_failures"] > 0 for row in lines(runs / "grpo-1", "metrics.jsonl"))
    assert len(lines(runs / "sft-1", "metrics.jsonl")) >= 2


@pytest.mark.parametrize("name", ["grpo-2", "on-2", "on-1", "sft-4", "lora-2"])
def test_several_processes_end_with_the_parameters_of_one(runs, name):
    one, other = (np.load(runs / folder / "params.npz") for folder in (alone(name), name))
    assert one.files == other.files
    for leaf in one.files:
        np.testing.assert_allclose(other[leaf], one[leaf], rtol=0, atol=TOLERANCE, err_msg=leaf)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sft-4", "hf/model.safetensors"),
        ("lora-2", "hf/model.safetensors"),
        ("lora-2", "adapter/adapter_model.safetensors"),
    ],
)
def test_what_several_processes_export_is_what_one_does(runs, name, file):
    one, other = (load_file(runs / folder / file) for folder in (alone(name), name))
    assert one.keys() == other.keys()
    assert len(one) > 5
    for tensor, values in one.items():
        np.testing.assert_allclose(other[tensor], values, rtol=0, atol=TOLERANCE, err_msg=tensor)
    for config in (runs / name / file).parent.glob("*.json"):
        assert config.read_bytes() == (runs / alone(name) / file).with_name(config.name).read_bytes()


@pytest.mark.parametrize("name", ["grpo-2", "grpo-4", "on-2", "on-1"])
def test_every_completion_is_the_same_in_the_same_place(runs, name):
    one, other = lines(runs / "grpo-1", "rollouts.jsonl"), lines(runs / name, "rollouts.jsonl")
    assert len(one) == 3 * 8 * 2
    assert other == one[: len(other)]
    assert len(other) == (2 * 8 * 2 if name == "grpo-4" else len(one))


@pytest.mark.parametrize("name", ["grpo-2", "grpo-4", "on-2", "on-1", "sft-4", "lora-2"])
def test_the_metrics_are_those_of_the_whole_batch(runs, name):
    one = lines(runs / alone(name), "metrics.jsonl")
    other = lines(runs / name, "metrics.jsonl")
    for ours, theirs in zip(other, one, strict=False):
        assert of_the_batch(ours) == pytest.approx(of_the_batch(theirs), abs=TOLERANCE, rel=TOLERANCE, nan_ok=True)


def of_the_batch(row: dict) -> dict[str, float]:
    """The metrics that one process and several share; null, where a metric has no value, becomes NaN."""
    return {key: float("nan") if value is None else value for key, value in row.items() if not key.startswith(LASTING)}


@pytest.mark.parametrize(("name", "speakers"), [("grpo-2", [0, 1]), ("grpo-4", [0, 2])])
def test_each_process_asks_the_judge_about_its_own_completions_once(runs, name, speakers):
    asked = {n: json.loads((runs / name / f"asked-{n}.json").read_text("utf-8")) for n in range(int(name[-1]))}
    assert [n for n, replies in asked.items() if replies] == speakers
    sizes = {len(asked[n]) for n in speakers}
    assert max(sizes) - min(sizes) <= 2 * 8  # a rollout that was in hand when the run was stopped
    rows = lines(runs / name, "rollouts.jsonl")
    everything = collections.Counter(reply for n in speakers for reply in asked[n])
    judged = collections.Counter(row["spans"]["response"] for row in rows)
    assert judged <= everything


def test_sigterm_at_one_process_saves_in_all_of_them(runs):
    assert latest_step(runs / "grpo-4" / "checkpoints") == 2
    assert not (runs / "grpo-4" / "params.npz").exists()
    assert latest_step(runs / "on-1" / "checkpoints") == latest_step(runs / "on-2" / "checkpoints") == 3
