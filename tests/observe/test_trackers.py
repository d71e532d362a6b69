import math
import sys
import types

import pytest

from kardia_jax.observe.trackers import OPTIONAL, open_trackers


class Recorder(types.ModuleType):
    """Stands in for a tracking library: every attribute is a function that notes its call and gives the
    recorder."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def note(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return note

    def names(self):
        return [name for name, _, _ in self.calls]


@pytest.fixture
def library(monkeypatch):
    def install(name):
        recorder = Recorder(name)
        monkeypatch.setitem(sys.modules, name, recorder)
        return recorder

    return install


def log_one(tmp_path, tracker):
    trackers = open_trackers([tracker], tmp_path, "run", {"grpo.group": 8})
    for one in trackers:
        one.log(3, {"reward": 0.5, "kl": math.nan})
        one.close()


def test_jsonl_is_always_there(tmp_path):
    [tracker] = open_trackers([], tmp_path, "run", {})
    tracker.log(3, {"reward": 0.5, "kl": math.nan})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "reward": 0.5, "kl": null}\n'


def test_tensorboard_gets_scalars_at_their_step(tmp_path, library):
    board = library("tensorboardX")
    log_one(tmp_path, "tensorboard")
    assert board.names() == ["SummaryWriter", "add_text", "add_scalar", "close"]
    assert board.calls[2][1] == ("reward", 0.5, 3)


def test_wandb_gets_one_log_per_step(tmp_path, library):
    wandb = library("wandb")
    log_one(tmp_path, "wandb")
    assert wandb.names() == ["init", "log", "finish"]
    assert wandb.calls[0][2]["config"] == {"grpo.group": 8}
    assert wandb.calls[1][1:] == (({"reward": 0.5},), {"step": 3})


def test_trackio_gets_one_log_per_step(tmp_path, library):
    trackio = library("trackio")
    log_one(tmp_path, "trackio")
    assert trackio.names() == ["init", "log", "finish"]
    assert trackio.calls[1][1:] == (({"reward": 0.5},), {"step": 3})


def test_mlflow_gets_params_and_metrics(tmp_path, library, monkeypatch):
    mlflow = library("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    log_one(tmp_path, "mlflow")
    assert mlflow.names() == ["set_experiment", "start_run", "log_params", "log_metrics", "end_run"]
    assert mlflow.calls[3][1:] == (({"reward": 0.5},), {"step": 3})


def test_mlflow_without_a_server_says_which_variable_to_set(tmp_path, library, monkeypatch):
    library("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        log_one(tmp_path, "mlflow")


@pytest.mark.parametrize(
    ("tracker", "package"),
    [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio"), ("mlflow", "mlflow")],
)
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, tracker, package):
    # None in sys.modules makes an import fail, whether the package is installed or not.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*kardia_jax\[track\]"):
        open_trackers([tracker], tmp_path, "run", {})
    assert tracker in OPTIONAL


def test_an_unknown_tracker_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="comet"):
        open_trackers(["comet"], tmp_path, "run", {})
