"""What the processes of ``test_processes.py`` do: short runs of a tiny model, on a mesh and in a folder they are told.

    python trial.py COORDINATOR PROCESSES PROCESS '[{"verb": "grpo", "folder": "/tmp/x", "mesh": [2, 1, 1]}, ...]'

``stop``: process 3 gets SIGTERM when it has made so many steps. Beside each run's own files there are then, in its
folder, ``params.npz`` and ``asked-PROCESS.json``: which replies this process asked the judge about.
"""

import asyncio
import dataclasses
import json
import os
import pathlib
import signal
import sys
import zlib
from typing import Any

import jax
import numpy as np

from kardia_jax import run, scoring
from kardia_jax.config import (
    Config,
    DataConfig,
    GrpoConfig,
    HostsConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
)
from kardia_jax.dialogue.spans import Spans
from kardia_jax.export import export_final
from kardia_jax.hosts import is_first, joined
from kardia_jax.model.shapes import SHAPES
from kardia_jax.model.sharding import make_mesh
from kardia_jax.placement import everybodys
from kardia_jax.policies import load_policy
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Verdict
from kardia_jax.scoring import Grader
from kardia_jax.sft import train_sft
from kardia_jax.train import train_grpo

# A large epsilon: Adam would otherwise make a whole step of a gradient that is nothing but rounding.
SHAPES["one-layer"] = dataclasses.replace(SHAPES["tiny-qwen3"], layers=1)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_share=0.0, epsilon=1e-3)


class Judge:
    """Marks by a checksum of the reply, in another order than it was asked, and writes down what it was asked."""

    name = "checksum"

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        await asyncio.sleep(zlib.crc32(requests[0].reply.encode()) % 8 / 1000)
        self.asked += [request.reply for request in requests]
        return [self.verdict(request.reply) for request in requests]

    def verdict(self, reply: str) -> Verdict | JudgeFailure:
        marks = {c.name: 1 + zlib.crc32(f"{c.name} {reply}".encode()) % 5 for c in KARDIA_FIVE.criteria}
        if zlib.crc32(reply.encode()) % 7 == 0:
            return JudgeFailure("too busy", retryable=True)
        return Verdict(tuple(Mark(name, mark, "checksum") for name, mark in marks.items()))


def config_of(
    folder: str, mesh: tuple[int, int, int], hosts: HostsConfig, resume: bool = False, rows: int = 0, rank: int = 0
) -> Config:
    """Two updates a step, a step of lag, a reference and, with ``rows``, more prompts than seats: what moves rows.

    ``rank``: an adapter is trained.
    """
    root = pathlib.Path(__file__).parents[2]
    return Config(
        run=RunConfig(pathlib.Path(folder), save_every=2, console=False, log_rollouts=-1, auto_resume=resume),
        data=DataConfig(system_prompt=root / "configs/demo_system_prompt.txt", train_limit=8),
        model=ModelConfig(source="one-layer", remat="none", lora=LoraConfig(rank=rank)),
        mesh=MeshConfig(*mesh),
        hosts=hosts,
        sft=SftConfig(epochs=1.0, batch=4, tokens_per_micro_batch=500, length_window=1, optimizer=OPTIMIZER),
        grpo=GrpoConfig(
            steps=3,
            prompts=8,
            group=2,
            minibatches=2,
            lag=1,
            sampler=SamplerConfig(max_new_tokens=6, rows=rows),
            loss=LossConfig(beta=0.1),
            optimizer=OPTIMIZER,
        ),
    )


def lenient_parse(text: str) -> Spans:
    """An untrained model never writes four spans."""
    return Spans("-", "-", ("sad", "lonely")[len(text) % 2], text or "-")


def trial(job: dict[str, Any], hosts: HostsConfig) -> None:
    """One run; must be called in all processes."""
    settings = {name: job[name] for name in ("resume", "rows", "rank") if name in job}
    config = config_of(job["folder"], tuple(job["mesh"]), hosts, **settings)
    policy = load_policy(config.model, config.run.seed, make_mesh(config.mesh))
    if job["verb"] == "sft":
        policy = train_sft(config, policy)
        export_final(config, policy, "sft")
    else:
        judge, kept = Judge(), scoring.parse
        try:
            scoring.parse = lenient_parse
            policy = train_grpo(config, policy, Grader(judge, KARDIA_FIVE, RewardConfig()))
        finally:
            scoring.parse = kept
            (config.run.dir / f"asked-{jax.process_index()}.json").write_text(json.dumps(judge.asked), "utf-8")
    leaves = {jax.tree_util.keystr(path): everybodys(leaf) for path, leaf in jax.tree.leaves_with_path(policy.params)}
    if is_first():
        np.savez(config.run.dir / "params.npz", **leaves)


def stop_after(steps: int) -> None:
    """SIGTERM for this process alone, in the middle of a step."""
    finish = run.Run.finish_step

    def finish_and_ask(self: run.Run, step: int, *rest: Any) -> None:
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        finish(self, step, *rest)

    run.Run.finish_step = finish_and_ask


def main() -> None:
    coordinator, processes, process, jobs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    hosts = HostsConfig("auto", coordinator, processes, process, join_seconds=600, heartbeat_seconds=600)
    with joined(config_of("-", (-1, 1, 1), hosts)):
        for job in jobs:
            if process == 3 and "stop" in job:
                stop_after(job["stop"])
            trial(job, hosts)
            print("done", job["folder"], flush=True)


if __name__ == "__main__":
    main()
