import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kardia_jax import sft
from kardia_jax.checkpoint import CheckpointError
from kardia_jax.config import ConfigError, ModelConfig
from kardia_jax.export import export, export_policy, export_run, read_results
from kardia_jax.hf.tables import HfError
from kardia_jax.observe.intervals import Interval
from kardia_jax.policies import load_policy
from kardia_jax.sft import train_sft


def arrays(params) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def trained(config_in, fresh_policy, tmp_path_factory):
    """A finished run and its policy."""
    config = config_in(tmp_path_factory.mktemp("trained") / "run")
    return config, train_sft(config, fresh_policy())


def test_a_run_is_exported_from_its_newest_checkpoint(trained, tmp_path):
    config, policy = trained
    export_run(config.run.dir, tmp_path / "hf", "float32", overwrite=False)
    again = load_policy(ModelConfig(source=str(tmp_path / "hf")), seed=9)
    assert all(map(np.array_equal, arrays(again.params), arrays(policy.params)))
    assert again.stop_ids == policy.stop_ids
    assert again.spec.to_hf() == policy.spec.to_hf()
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "random initialisation (nano)" in card
    assert "| stage | sft |" in card
    assert "| optimizer.learning_rate | 0.01 |" in card


def test_weights_may_be_written_in_half_the_size(trained, tmp_path):
    config, policy = trained
    export_run(config.run.dir, tmp_path / "hf", "bfloat16", overwrite=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
    again = load_policy(ModelConfig(source=str(tmp_path / "hf")), seed=0)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), policy.params)
    assert all(map(np.array_equal, arrays(again.params), arrays(rounded)))


def test_an_older_export_is_replaced_only_when_asked(trained, tmp_path):
    config, _ = trained
    export_run(config.run.dir, tmp_path / "hf", "bfloat16", overwrite=False)
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    with pytest.raises(HfError, match="wanted an empty or new folder, got one in use"):
        export_run(config.run.dir, tmp_path / "hf", "float32", overwrite=False)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    export_run(config.run.dir, tmp_path / "hf", "float32", overwrite=True)
    assert len((tmp_path / "hf" / "model.safetensors").read_bytes()) > len(before)


def test_a_half_finished_run_is_exported_as_far_as_it_got(config_of, fresh_policy, killed_at, tmp_path):
    with killed_at(sft, "check_progress", 4) as killed, pytest.raises(killed):
        train_sft(config_of(), fresh_policy())
    export_run(config_of().run.dir, tmp_path / "hf", "float32", overwrite=False)
    assert (tmp_path / "hf" / "config.json").is_file()


def test_results_stand_on_the_card(trained, tmp_path):
    config, policy = trained
    results = {"grpo": {"format_rate": Interval(0.5, 0.25, 0.75)}}
    export_policy(config, policy, "grpo", tmp_path / "hf", results)
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert "| format_rate | 0.500 [0.250, 0.750] |" in card
    assert "| loss.beta | 0.04 |" in card


def test_a_policy_that_is_not_finite_is_not_exported(trained, tmp_path):
    config, policy = trained
    spoilt = {**policy.params, "final_norm": {"scale": policy.params["final_norm"]["scale"].at[0].set(jnp.inf)}}
    with pytest.raises(HfError, match="wanted finite float32 weights"):
        export_policy(config, policy._replace(params=spoilt), "sft", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run: wanted a run folder with verb\.json and config\.json.*run\.dir of a"):
        export_run(tmp_path, tmp_path / "hf", "float32", overwrite=False)


def test_a_run_without_checkpoint_is_refused(config_of, fresh_policy, killed_at, tmp_path):
    with killed_at(sft, "check_progress", 1) as killed, pytest.raises(killed):
        train_sft(config_of(), fresh_policy())
    with pytest.raises(CheckpointError, match="run: wanted a complete checkpoint"):
        export_run(config_of().run.dir, tmp_path / "hf", "float32", overwrite=False)
    assert not (tmp_path / "hf").exists()


def test_a_run_is_exported_with_its_evaluation_in_shards_and_never_over_itself(trained, tmp_path):
    config, _ = trained
    table = {
        "policy": {
            "reward": {"mean": 0.5, "low": 0.25, "high": 0.75},
            "macro_f1": {"mean": 1, "low": None, "high": None},
        }
    }
    (tmp_path / "eval.json").write_text(json.dumps(table | {"seeds": 1, "seconds": {"load": 2.0}}), "utf-8")
    options = {"max_shard_size": "10KB", "results": tmp_path / "eval.json", "licence": "mit"}
    assert export(config.run.dir, tmp_path / "hf", "bfloat16", **options) == ""
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    for piece in ("| reward | 0.500 [0.250, 0.750] |", "| macro_f1 | 1.000 |", 'license: "mit"', "## Limits"):
        assert piece in card
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    # A run has a config.json of its own and is no model to be overwritten.
    with pytest.raises(HfError, match="holds a model to overwrite"):
        export(config.run.dir, config.run.dir, overwrite=True)
    assert (config.run.dir / "verb.json").is_file()


@pytest.mark.parametrize("content", ["", "[1]", '{"policy": {"reward": {"mean": "x", "low": 0, "high": 1}}}'])
def test_results_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "eval.json").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=r"results: wanted an eval\.json"):
        read_results(tmp_path / "eval.json")


def test_a_source_that_is_neither_run_nor_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"source: wanted a run folder .*or a model directory"):
        export(tmp_path, tmp_path / "out")
