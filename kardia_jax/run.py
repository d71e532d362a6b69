"""The folder of a run: where it starts, what it writes after each step, and when it saves.

    runs/x/config.json       the resolved config
    runs/x/verb.json         which verb made it
    runs/x/checkpoints/120   state after update 120, complete or absent
    runs/x/metrics.jsonl     one line per step
    runs/x/rollouts.jsonl    sampled completions with every score (grpo)
    runs/x/hf                the trained policy as a Hugging Face directory; with LoRA also runs/x/adapter

A resumed run starts from the newest checkpoint, cuts both files back to its step and writes them again, the same. A run
that gets SIGTERM saves and ends with code 143.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from kardia_jax.checkpoint import CheckpointError, Checkpoints, latest_step, refuse_existing, restore_latest
from kardia_jax.config import Config, ConfigError, OptimizerConfig, RunConfig, flat, to_json
from kardia_jax.config.judge import NOT_THE_VERDICT
from kardia_jax.dialogue.dataset import Loaded
from kardia_jax.hands import Hand, packed
from kardia_jax.hosts import anyone, is_first, require_one_folder, require_same_step
from kardia_jax.judge.failures import JudgeStopError
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.model.shares import Rows
from kardia_jax.observe.compilations import CompilationCounter
from kardia_jax.observe.console import SILENT, TrainingConsole
from kardia_jax.observe.files import write_whole
from kardia_jax.observe.jsonl import JsonlWriter, truncate_after
from kardia_jax.observe.phases import PhaseTimer
from kardia_jax.observe.trackers import Tracker, open_trackers
from kardia_jax.placement import offloaded
from kardia_jax.sharded import make_start
from kardia_jax.stopping import EXIT_CODE, StopRequest
from kardia_jax.types import Params, TrainState

WARM_STEPS = 2
"""Steps of a run, or of its resumption, in which compiling is expected and not reported."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the newest checkpoint is intact."""


@dataclasses.dataclass
class Run:
    """Open files and the terminal of one run; made by ``open_run``."""

    config: RunConfig
    saved_config: dict[str, Any]
    steps: int
    first_step: int
    state: TrainState
    """Where the loop starts: fresh, or restored."""
    in_hand: list[Mapping[str, Any]]
    """Rollouts of the next steps that a checkpoint held (``hands.packed``)."""
    timer: PhaseTimer
    compilations: CompilationCounter
    console: TrainingConsole
    trackers: list[Tracker]
    rollouts: JsonlWriter
    checkpoints: Checkpoints
    stop: StopRequest
    rows: Rows | None
    """Which rows of a step are this process's, where a step has any."""

    def finish_step(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, float],
        rollouts: Sequence[Mapping[str, object]] = (),
        hands: Iterable[Hand] = (),
    ) -> None:
        """Reports step ``step`` (counted from 1) and saves when it is time, with the hands that are not learned from
        yet."""
        seconds, compiled = self.timer.take(), self.compilations.take()
        metrics = {
            **metrics,
            "compilations": float(compiled.count),
            "tokens_per_second": metrics.get("tokens", 0.0) / max(sum(seconds.values()), 1e-9),
        }
        self.rollouts.write(step, *rollouts)
        for tracker in self.trackers:
            tracker.log(step, {**metrics, **{f"seconds/{name}": value for name, value in seconds.items()}})
        self.console.update(step, metrics, seconds)
        if compiled.count and step > self.first_step + WARM_STEPS:
            self.console.message(f"step {step}: {compiled.count} programs compiled in {compiled.seconds:.1f}s")
        # After the files: whoever resumes from a checkpoint finds every line up to its step. Its seconds count for the
        # next step.
        if due(step, self.config.save_every, self.steps):
            with self.timer.phase("save"):
                self._save(step, state, hands)
            self.compilations.take()  # The checksums are no program of the next step.
        if step < self.steps:
            self.end_if_asked(step, state, hands)

    def end_if_asked(self, step: int, state: TrainState, hands: Iterable[Hand]) -> None:
        """Where a process of the run has got SIGTERM, all of them save the state after step ``step`` and leave:
        raises SystemExit."""
        if not anyone(self.stop.made):
            return
        self._save(step, state, hands)
        self.checkpoints.wait()
        self.console.message(f"SIGTERM: saved after step {step} in {self.config.dir}; go on with --run.resume")
        raise SystemExit(EXIT_CODE)

    @contextmanager
    def saved_before_stop(self, step: int, state: TrainState, hands: Iterable[Hand]) -> Iterator[None]:
        """A judge that gives up inside stops the run, with the state after step ``step``, the last good one, saved:
        raises JudgeStopError, which says so."""
        try:
            yield
        except (JudgeStopError, JudgeUnusableError) as error:
            try:
                self._save(step, state, hands)
                self.checkpoints.wait()
            except CheckpointError as second:
                raise JudgeStopError(f"{error} Its state could not be saved either: {second}") from error
            kept = f"The state after step {step} is saved in {self.config.dir}"
            raise JudgeStopError(f"{error} {kept}: repair the judge and go on with --run.resume.") from error

    def _save(self, step: int, state: TrainState, hands: Iterable[Hand]) -> None:
        in_hand = [packed(hand, self.rows) for hand in hands]
        self.checkpoints.save(step, state, {"config": self.saved_config, "in_hand": in_hand})


def report_data(console: TrainingConsole, loaded: Loaded, too_long: Sequence[str], used: str) -> None:
    """Says what was read, kept and left out; every row left out by its file and line."""
    console.message(f"data: {loaded.summary()}; {used}; {len(too_long)} prompts too long")
    for problem in (*loaded.problems, *too_long):
        console.message(f"  left out: {problem}")


def due(step: int, every: int, last: int) -> bool:
    """Is it time: every so many steps, and at the end."""
    return step % every == 0 or step == last


def start_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    where: str,
    mesh: Mesh | None = None,
) -> TrainState:
    """Step 0, the moments where config and mesh want them; ``where`` is the part of the config, like
    ``sft.optimizer``."""
    state = make_start(optimizer, mesh)(params)
    if not config.offload:
        return state
    return state._replace(opt_state=offloaded(state.opt_state, f"{where}.offload"))


@contextmanager
def open_run(config: Config, verb: str, steps: int, fresh: TrainState, rows: Rows | None = None) -> Iterator[Run]:
    """Starts a run at its first step, or where its newest checkpoint stands with ``run.resume``.

    Of several processes the first writes and reports; all of them save checkpoints together.
    """
    folder, writes = config.run.dir, is_first()
    require_one_folder(folder)
    saved_config = comparable(config)
    state, first_step, in_hand = _start(config, saved_config, fresh)
    folder.mkdir(parents=True, exist_ok=True)
    if writes:
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            truncate_after(folder / name, first_step)
        write_whole(folder / "config.json", to_json(config))
        write_whole(folder / "verb.json", json.dumps({"verb": verb}) + "\n")
    console = TrainingConsole(verb, steps, first_step, config.run.console and writes, None if writes else SILENT)
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
    with (
        JsonlWriter(folder / "rollouts.jsonl" if writes else pathlib.Path(os.devnull)) as rollouts,
        checkpoints,
        console,
        CompilationCounter() as compilations,
        StopRequest() as stop,
    ):
        name = f"{verb}-{folder.name}"
        trackers = open_trackers(config.run.trackers, folder, name, flat(config)) if writes else []
        try:
            yield Run(
                config.run,
                saved_config,
                steps,
                first_step,
                state,
                in_hand,
                PhaseTimer(),
                compilations,
                console,
                trackers,
                rollouts,
                checkpoints,
                stop,
                rows,
            )
        finally:
            for tracker in trackers:
                tracker.close()


def comparable(config: Config) -> dict[str, Any]:
    """What must not change between a run and its resumption: everything but bookkeeping, evaluation, mesh and hosts, on
    which no result depends, and how the judge is reached, since a run that stopped for its judge goes on with a
    repaired one."""
    tree = json.loads(to_json(config))
    for path in NOT_THE_VERDICT:
        *parents, last = path.split(".")
        functools.reduce(dict.__getitem__, parents, tree["judge"]).pop(last)
    return {name: part for name, part in tree.items() if name not in ("run", "eval", "mesh", "hosts")} | {
        "seed": config.run.seed
    }


def check_progress(state: TrainState, allowed: int, where: str) -> None:
    """Stops a run whose gradients are not finite any more; the parameters are those before the first bad one."""
    bad = int(state.bad_steps)
    if bad >= allowed:
        fix = f"Export the newest checkpoint and start a new run.dir from it with a lower {where}.learning_rate."
        raise TrainingError(f"{where}.max_bad_steps: {bad} updates in a row had a gradient that is not finite. {fix}")


def _start(
    config: Config, saved_config: dict[str, Any], fresh: TrainState
) -> tuple[TrainState, int, list[Mapping[str, Any]]]:
    """The state, the steps that it has behind it, and the rollouts of the next ones that were in hand."""
    folder = config.run.dir / "checkpoints"
    step = latest_step(folder)
    require_same_step(step)
    if not (config.run.resume or (config.run.auto_resume and step is not None)):
        refuse_existing(folder)
        return fresh, 0, []
    places = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), fresh)
    restored = restore_latest(folder, places)
    if restored is None:
        fix = "Start without --run.resume."
        raise CheckpointError(f"run.resume: wanted a complete checkpoint in {folder}, got none. {fix}")
    _require_same(restored.extra["config"], saved_config)
    return restored.state, restored.step, restored.extra.get("in_hand", [])


def _require_same(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> None:
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            _require_same(before, after, f"{prefix}{name}.")
        elif before != after:
            fix = "A resumed run must be the same run; start a new run.dir to change it."
            raise ConfigError(f"{prefix}{name}", f"{before!r} as in the checkpoint", after, fix)
