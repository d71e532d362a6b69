"""A trained policy, or a model directory, as a Hugging Face directory with a card that says what it is."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax

from kardia_jax.checkpoint import CheckpointError, restore_latest
from kardia_jax.config import Config, ConfigError, OptimizerConfig, flat, from_json
from kardia_jax.grpo.optimizer import make_optimizer
from kardia_jax.grpo.update import init_state
from kardia_jax.hf import hub
from kardia_jax.hf.card import Card, model_card
from kardia_jax.hf.container import Dtype
from kardia_jax.hf.convert import KeptDtype, convert
from kardia_jax.hf.gguf import is_gguf
from kardia_jax.hf.peft import require_adapter_target, save_adapter
from kardia_jax.hf.write import require_apart, save_directory
from kardia_jax.hosts import is_first
from kardia_jax.model.lora import merged_model
from kardia_jax.observe.intervals import Interval
from kardia_jax.placement import everybodys
from kardia_jax.policies import Policy, load_policy

Verb = Literal["sft", "grpo"]
Results = Mapping[str, Mapping[str, Interval]]
ENDS = ("mean", "low", "high")

ADAPTER_CARD = """\
---
library_name: peft
tags:
- empathetic-dialogue
---
# LoRA adapter

Trained with kardia_jax over `{base}`, for `peft.PeftModel.from_pretrained`. The eight span tags must be tokens of the
base; where they were added for training, load the adapter over a base that has them, or use the merged model instead.
"""
DATA = {"mini": "The mini set of kardia_jax: synthetic dialogues made by a seeded generator, for tests and demos only."}


def export_policy(
    config: Config,
    policy: Policy,
    verb: Verb,
    target: pathlib.Path,
    results: Results | None = None,
    dtype: Dtype = "float32",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    licence: str = "apache-2.0",
) -> None:
    """Writes weights, an adapter merged into them, configs, tokenizer and card; complete or not at all."""
    base = config.model.source
    card = Card(
        name=target.name,
        base_model=base if pathlib.Path(base).exists() else f"random initialisation ({base})",
        data=DATA.get(config.data.source, config.data.source),
        recipe={"stage": verb, **flat(config.sft if verb == "sft" else config.grpo)},
        results=results or {},
        licence=licence,
    )
    save_directory(
        target,
        merged_model(policy.full()),
        policy.spec,
        policy.tokenizer,
        policy.end_ids,
        model_card(card),
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def export_final(config: Config, policy: Policy, verb: Verb) -> None:
    """What a finished run leaves in its folder: ``hf``, and ``adapter`` beside it where one was trained."""
    export_policy(config, policy, verb, config.run.dir / "hf", overwrite=True)
    if policy.lora.rank:
        export_adapter(config, policy, config.run.dir / "adapter", overwrite=True)


def export_adapter(config: Config, policy: Policy, target: pathlib.Path, overwrite: bool = False) -> None:
    """The adapter alone, as PEFT reads it. Raises ConfigError for a policy that was trained whole."""
    if not policy.lora.rank:
        raise ConfigError("adapter", "a run with model.lora.rank above 0", 0, "Export the model itself.")
    base = config.model.source
    card = ADAPTER_CARD.format(base=base)
    adapter = jax.tree.map(everybodys, policy.params)
    if is_first():
        save_adapter(target, policy.lora, adapter, policy.spec, base, card, overwrite)


def export(
    source: pathlib.Path,
    target: pathlib.Path,
    dtype: KeptDtype = "keep",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    results: pathlib.Path | None = None,
    licence: str = "apache-2.0",
    push: str | None = None,
    adapter: pathlib.Path | None = None,
) -> str:
    """Writes what a run trained, or a model directory, and uploads it if asked; returns its address on the Hub.

    Without a token for ``push`` nothing is begun. A run folder may hold the target, a model directory may not.
    Raises ConfigError for a source that is neither.
    """
    if push is not None:
        hub.require_token(push)
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError("target", "a folder that is not and does not hold the source", str(target))
    if (source / "verb.json").is_file():
        table = None if results is None else read_results(results)
        whole = "float32" if dtype == "keep" else dtype
        export_run(source, target, whole, overwrite, max_shard_size, table, licence, adapter)
    elif adapter is not None:
        raise ConfigError("adapter", "a run folder as SOURCE", str(source), "A model directory has no adapter apart.")
    elif (source / "config.json").is_file() or is_gguf(source):
        card = Card(target.name, str(source), "Not recorded: the model was converted, not trained.", licence=licence)
        convert(source, target, dtype, max_shard_size, overwrite, model_card(card))
    else:
        fix = "Give the run.dir of a `kardia sft` or `kardia grpo` run, or a directory with config.json and weights."
        wanted = "a run folder with verb.json and config.json, or a model directory"
        raise ConfigError("source", wanted, str(source), fix)
    return "" if push is None else hub.push(target, push)


def export_run(
    folder: pathlib.Path,
    target: pathlib.Path,
    dtype: Dtype,
    overwrite: bool,
    max_shard_size: str = "5GB",
    results: Results | None = None,
    licence: str = "apache-2.0",
    adapter: pathlib.Path | None = None,
) -> None:
    """Writes the policy of a run's newest checkpoint, and its adapter if asked; the run's own files say what it is."""
    files = (folder / "verb.json", folder / "config.json")
    if not all(file.is_file() for file in files):
        fix = "Give the run.dir of a `kardia sft` or `kardia grpo` run."
        raise ConfigError("run", "a run folder with verb.json and config.json", str(folder), fix)
    verb, config = json.loads(files[0].read_text("utf-8"))["verb"], from_json(files[1].read_text("utf-8"))
    policy = _restored(config, verb, folder)
    if adapter is not None:
        require_apart(adapter, target)
        require_adapter_target(adapter, overwrite)
    export_policy(config, policy, verb, target, results, dtype, overwrite, max_shard_size, licence)
    if adapter is not None:
        export_adapter(config, policy, adapter, overwrite)


def read_results(file: pathlib.Path) -> Results:
    """The table of an eval.json: by policy, by metric, mean and interval. Raises ConfigError for anything else."""
    try:
        content = json.loads(file.read_text("utf-8"))
        return {
            policy: {
                metric: Interval(*(math.nan if one[end] is None else float(one[end]) for end in ENDS))
                for metric, one in metrics.items()
                if isinstance(one, dict) and set(ENDS) <= set(one)
            }
            for policy, metrics in content.items()
            if isinstance(metrics, dict)
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError("results", "an eval.json of `kardia eval`", f"{file}: {error}") from error


def _restored(config: Config, verb: Verb, folder: pathlib.Path) -> Policy:
    """The start policy with the newest checkpoint's parameters."""
    policy = load_policy(config.model, config.run.seed)
    optimizer = make_optimizer(_optimizer(config, verb), updates=1)
    like = jax.eval_shape(lambda params: init_state(params, optimizer), policy.params)
    restored = restore_latest(folder / "checkpoints", like)
    if restored is None:
        raise CheckpointError(f"run: wanted a complete checkpoint in {folder / 'checkpoints'}, got none.")
    return policy._replace(params=restored.state.params)


def _optimizer(config: Config, verb: Verb) -> OptimizerConfig:
    return config.sft.optimizer if verb == "sft" else config.grpo.optimizer
