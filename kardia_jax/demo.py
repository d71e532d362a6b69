"""The main job on one machine: warm start, GRPO, evaluation of base / SFT / GRPO, export.

In: a config (``configs/demo.py``) and a number of seeds. Out, in ``run.dir``: ``summary.json`` with every metric as
{mean, low, high} under base, sft and grpo and seconds per phase, the answers of each policy, and the trained policy of
the first seed as a Hugging Face directory ``hf``.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping

from kardia_jax.config import Config, ConfigError
from kardia_jax.evaluate import Evaluation, evaluate, held_out_prompts, summarise, write_rows
from kardia_jax.export import export_policy
from kardia_jax.model.sharding import make_mesh
from kardia_jax.observe.files import write_whole
from kardia_jax.observe.intervals import Interval
from kardia_jax.observe.phases import PhaseTimer
from kardia_jax.observe.results import results_table, wide_console
from kardia_jax.policies import Policy, load_policy, with_new_adapter
from kardia_jax.scoring import Grader, make_grader, with_auditor
from kardia_jax.sft import train_sft
from kardia_jax.train import train_grpo

STAGES = ("base", "sft", "grpo")


def run_demo(config: Config, seeds: int) -> dict[str, dict[str, Interval]]:
    """Runs the whole path once per seed and writes the summary; returns the intervals it printed."""
    if seeds < 1:
        raise ConfigError("seeds", "at least 1", seeds)
    if config.run.resume:
        raise ConfigError("run.resume", "False: a demo starts anew", True, "Resume `kardia sft` or `kardia grpo`.")
    folder, console, timer = config.run.dir, wide_console(), PhaseTimer()
    # A mistake in the config must show before the results of an earlier demo are gone.
    held_out_prompts(config, load_policy(config.model, config.run.seed))
    _clear(folder)
    grader = with_auditor(make_grader(config.judge, config.rewards), config.judge)
    evaluations: dict[str, list[Evaluation]] = {stage: [] for stage in STAGES}
    first: Policy | None = None
    for seed in range(config.run.seed, config.run.seed + seeds):
        console.rule(f"seed {seed}")
        trained, by_stage = _one_seed(_with_run(config, seed, folder / f"seed-{seed}"), grader, timer)
        first = first or trained
        for stage, evaluation in by_stage.items():
            evaluations[stage].append(evaluation)
    results = {stage: summarise(evaluations[stage], config.run.seed) for stage in STAGES}
    assert first is not None
    with timer.phase("export"):
        export_policy(config, first, "grpo", folder / "hf", results)
    seconds = timer.take()
    write_summary(folder / "summary.json", results, seconds, seeds)
    over = "test dialogues" if seeds == 1 else f"{seeds} seeds"
    console.print(results_table(results, f"Held-out personas, mean [95 % interval over {over}]"))
    console.print("  ".join(f"{name} {spent:.0f}s" for name, spent in seconds.items()), highlight=False)
    console.print(f"Wrote {folder / 'summary.json'} and the policy {folder / 'hf'}.", highlight=False)
    return results


def _one_seed(config: Config, grader: Grader, timer: PhaseTimer) -> tuple[Policy, dict[str, Evaluation]]:
    """Base, warm start, GRPO; each is evaluated as soon as it is there."""
    root = config.run.dir
    evaluations: dict[str, Evaluation] = {}

    def keep(stage: str, policy: Policy) -> None:
        with timer.phase(f"evaluate {stage}"):
            evaluations[stage] = evaluate(config, policy, grader)
            write_rows(evaluations[stage], root / f"answers-{stage}.jsonl")

    with timer.phase("load"):
        policy = load_policy(config.model, config.run.seed, make_mesh(config.mesh))
    keep("base", policy)
    with timer.phase("sft"):
        policy = train_sft(_with_run(config, config.run.seed, root / "sft"), policy)
    keep("sft", policy)
    with timer.phase("grpo"):
        # With LoRA each stage trains an adapter of its own, and the reference of GRPO is the warm start.
        policy = with_new_adapter(policy, config.model.lora, config.run.seed)
        policy = train_grpo(_with_run(config, config.run.seed, root / "grpo"), policy, grader)
    keep("grpo", policy)
    return policy, evaluations


def _with_run(config: Config, seed: int, folder: pathlib.Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed, dir=folder))


def _clear(folder: pathlib.Path) -> None:
    """Removes what an earlier demo left, and nothing else: a folder that is none of ours is refused."""
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in left if name not in ("hf", "summary.json") and not name.startswith("seed-")]
    if strange or (left and not any(name.startswith("seed-") for name in left)):
        fix = "Choose another --run.dir."
        raise ConfigError(
            "run.dir", "a new folder or one of an earlier demo", f"{folder} with {(strange or left)[0]}", fix
        )
    for name in left:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_summary(
    path: pathlib.Path, results: Mapping[str, Mapping[str, Interval]], seconds: Mapping[str, float], seeds: int
) -> None:
    """The table as JSON; an unknown number is null."""
    document = {
        **{stage: {name: _numbers(interval) for name, interval in rows.items()} for stage, rows in results.items()},
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "seeds": seeds,
    }
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def _numbers(interval: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in interval._asdict().items()}
