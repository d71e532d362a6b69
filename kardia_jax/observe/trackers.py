"""The step metrics, sent elsewhere as well: a tracker is ``log(step, metrics)`` and ``close()``.

``jsonl`` is always on and needs nothing. The others are imported when they are asked for and come with the
extra ``kardia_jax[track]``. They get the finite numbers only: NaN means that nothing was observed, and a plot
shows a gap.

    trackers = open_trackers(["tensorboard"], run_dir, "grpo", config={"grpo.group": 8})
    for tracker in trackers:
        tracker.log(12, {"reward": 0.61, "kl": math.nan})     # the file says "kl": null
"""

import importlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Protocol

from kardia_jax.observe.jsonl import JsonlWriter

PROJECT = "kardia_jax"


class TrackerError(ValueError):
    """A tracker that cannot be opened: says what it lacks and what to do."""


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """``metrics.jsonl`` in the run's folder."""

    def __init__(self, dir: pathlib.Path):
        self._writer = JsonlWriter(dir / "metrics.jsonl")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._writer.write(step, metrics)

    def close(self) -> None:
        self._writer.close()


class TensorBoardTracker:
    """Event files under ``tensorboard/`` in the run's folder."""

    def __init__(self, dir: pathlib.Path, name: str, config: Mapping[str, object]):
        self._writer = _import("tensorboardX", "tensorboard").SummaryWriter(str(dir / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tag, value in _finite(metrics).items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; its own environment variables choose the account and the mode."""

    def __init__(self, dir: pathlib.Path, name: str, config: Mapping[str, object]):
        self._run = _import("wandb", "wandb").init(project=PROJECT, name=name, dir=str(dir), config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A trackio run, kept on this machine unless trackio is told otherwise."""

    def __init__(self, dir: pathlib.Path, name: str, config: Mapping[str, object]):
        self._trackio = _import("trackio", "trackio")
        self._trackio.init(project=PROJECT, name=name, config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(_finite(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class MlflowTracker:
    """An MLflow run at the server (or database) that MLFLOW_TRACKING_URI names; there is no default."""

    def __init__(self, dir: pathlib.Path, name: str, config: Mapping[str, object]):
        self._mlflow = _import("mlflow", "mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow's own default is a database file, which the small client of the extra cannot open.
            fix = "Set it to a server, for instance http://localhost:5000."
            raise TrackerError(f"trackers: mlflow wanted the environment variable MLFLOW_TRACKING_URI, got none. {fix}")
        self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params(dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(_finite(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


OPTIONAL: dict[str, Callable[[pathlib.Path, str, Mapping[str, object]], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


def open_trackers(
    names: Sequence[str], dir: pathlib.Path, run_name: str, config: Mapping[str, object]
) -> list[Tracker]:
    """The JSONL tracker, then the named ones; ``config`` is flat (dotted field to value).

    Raises TrackerError for a name that is none of ours, or whose library is not installed.
    """
    unknown = sorted(set(names) - set(OPTIONAL))
    if unknown:
        raise TrackerError(f"trackers: wanted names out of {sorted(OPTIONAL)}, got {unknown}.")
    optional = [OPTIONAL[name](dir, run_name, config) for name in names]
    return [JsonlTracker(dir), *optional]


def _import(module: str, tracker: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = "Run: pip install 'kardia_jax[track]', or leave the tracker out."
        raise TrackerError(f"trackers: {tracker} needs the package {module}, which is not installed. {fix}") from error


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
