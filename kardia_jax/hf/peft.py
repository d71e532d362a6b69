"""Adapters in and out of the directories that PEFT reads and writes.

    dir/adapter_config.json          {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], ...}
    dir/adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, D], ...

    lora, adapter = load_adapter(dir, spec)
    save_adapter(dir, lora, adapter, spec, base="Qwen/Qwen2.5-0.5B-Instruct")

Which tensor is which of our arrays follows from the table of the model's family. Whatever in a config would change the
result and is not done here - DoRA, ranks that differ by layer, modules that are saved whole - is refused by name.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kardia_jax.config import ConfigError, LoraConfig
from kardia_jax.config.lora import ALL, check_targets
from kardia_jax.hf.tables import HfError, Rule, Sizes, from_hf, hf_shape, leaf, nested, rules, shape, sizes, to_hf
from kardia_jax.hf.write import require_target, take_name
from kardia_jax.model.spec import ModelSpec
from kardia_jax.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
RANK = "r"
"""The letter of the rank's axis, beside those of ``kardia_jax.types``."""

READ = ("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora")
WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"),
    *("megatron_core", "qalora_group_size"),
)
"""Fields that change nothing about a saved adapter, whatever they hold; the last two serve others that are off."""
ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # These change how an adapter started. Others, such as pissa, changed the base as well.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
"""Fields that must hold one of these; any field that stands nowhere here must be null, false or empty."""
SHOWN = 8
"""Problems of one kind that an error lists by name."""


class Pair(NamedTuple):
    """The two tensors of one kind of linear layer."""

    a: Rule
    b: Rule


def pairs(spec: ModelSpec) -> dict[str, Pair]:
    """Both rules of every linear layer of a block, by the layer's name: made from the rule of its kernel.

    ``self_attn.q_proj.weight``, kernel ``(HE)D`` <-> ``DHE``, gives lora_A ``rD`` <-> ``Dr`` and lora_B ``(HE)r`` <->
    ``rHE``.
    """
    kernels = [rule for rule in rules(spec) if rule.stacked and rule.path.endswith(".kernel")]
    return {rule.name.split(".")[-2]: _pair(rule) for rule in kernels}


def _pair(kernel: Rule) -> Pair:
    given, taken = _out_and_in(kernel.hf_axes)
    name, path = PREFIX + kernel.name.removesuffix("weight"), kernel.path.removesuffix("kernel")
    return Pair(
        Rule(f"{name}lora_A.weight", f"{path}lora_a", RANK + taken, taken.strip("()") + RANK),
        Rule(f"{name}lora_B.weight", f"{path}lora_b", given + RANK, RANK + given.strip("()")),
    )


def _out_and_in(axes: str) -> tuple[str, str]:
    """The two axes of a torch weight: ``(HE)D`` is ("(HE)", "D")."""
    cut = axes.index(")") + 1 if axes.startswith("(") else 1
    return axes[:cut], axes[cut:]


def load_adapter(dir: pathlib.Path, spec: ModelSpec) -> tuple[LoraConfig, Params]:
    """The adapter's settings and its float32 parameters. Raises HfError for a directory that holds anything else."""
    if not all((dir / name).is_file() for name in (CONFIG, WEIGHTS)):
        fix = "Give a directory that PEFT's save_pretrained or a run with model.lora has written."
        raise HfError(f"model.adapter: wanted a directory with {CONFIG} and {WEIGHTS}, got {dir}. {fix}")
    try:
        lora = read_config(json.loads((dir / CONFIG).read_text("utf-8")))
        tensors = load_file(dir / WEIGHTS)
    except (ValueError, SafetensorError, OSError) as error:
        raise HfError(f"{dir}: {error}") from error
    rules_by_name = _rules_of(lora, spec)
    lengths = _lengths(lora, spec)
    _require_fit(dir, tensors, rules_by_name, lengths)
    leaves = {rule.path: np.empty(shape(rule, lengths), np.float32) for rule, _ in rules_by_name.values()}
    for name, (rule, layer) in rules_by_name.items():
        leaves[rule.path][layer] = from_hf(rule, tensors[name], lengths)
    return lora, jax.tree.map(jnp.asarray, nested(leaves))


def require_adapter_target(dir: pathlib.Path, overwrite: bool) -> None:
    """Raises HfError for a folder in use; ``overwrite`` lets an older adapter go, and no other folder."""
    require_target(dir, overwrite, "an adapter", lambda folder: (folder / CONFIG).is_file())


def save_adapter(
    dir: pathlib.Path,
    lora: LoraConfig,
    adapter: Params,
    spec: ModelSpec,
    base: str,
    card: str,
    overwrite: bool = False,
) -> None:
    """Writes both files and a README.md; complete or not at all. Raises HfError as ``require_adapter_target``, for a
    disk that is full and for a weight that is not finite."""
    require_adapter_target(dir, overwrite)
    partial = dir.with_name(f".{dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(adapter_tensors(lora, adapter, spec), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(0o644)
        content = json.dumps(written_config(lora, base), indent=2, sort_keys=True)
        (partial / CONFIG).write_text(content + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        take_name(partial, dir)
    except (OSError, SafetensorError) as error:
        fix = "Free some space, or choose another folder."
        raise HfError(f"{dir}: could not be written: {error}. Nothing was left behind. {fix}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def adapter_tensors(lora: LoraConfig, adapter: Params, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Every tensor as PEFT has it, float32. Raises HfError for a weight that is not finite."""
    lengths, out = _lengths(lora, spec), {}
    arrays: dict[str, np.ndarray] = {}
    for name, (rule, layer) in _rules_of(lora, spec).items():
        if rule.path not in arrays:
            arrays[rule.path] = np.asarray(leaf(adapter, rule.path), np.float32)
        out[name] = to_hf(rule, arrays[rule.path][layer], lengths)
        if not np.isfinite(out[name]).all():
            raise HfError(f"{name}: wanted finite weights, got NaN or infinity. Export an earlier checkpoint.")
    return out


def read_config(found: Any) -> LoraConfig:
    """The settings that ``adapter_config.json`` names. Raises ConfigError for any that would mean something else."""
    if not isinstance(found, dict):
        raise ConfigError(CONFIG, "a JSON object", type(found).__name__)
    for name, value in found.items():
        if name in ONLY:
            wanted = " or ".join(json.dumps(one) for one in ONLY[name])
            if value not in ONLY[name]:
                raise ConfigError(name, wanted, value, "Other kinds of adapter are not supported.")
        elif name not in (*READ, *WITHOUT_EFFECT) and value:
            raise ConfigError(name, "null, false or empty", value, "It is not supported here; merge with PEFT instead.")
    targets = _targets(found.get("target_modules"))
    if not targets or not isinstance(found.get("r"), int):
        came = (found.get("r"), found.get("target_modules"))
        raise ConfigError("r, target_modules", "a rank and a list of layers", came)
    check_targets(targets, "target_modules")
    return LoraConfig(
        rank=found["r"],
        alpha=float(found.get("lora_alpha", 8)),
        targets=targets,
        dropout=float(found.get("lora_dropout", 0.0)),
        scaling="rslora" if found.get("use_rslora") else "standard",
    )


def _targets(found: Any) -> tuple[str, ...]:
    """Kinds of layers, sorted. PEFT may list each by its whole path, ``model.layers.0.mlp.up_proj``: a list that leaves
    out a layer shows in the tensors."""
    names = found if isinstance(found, list) else [found] if found == ALL else []
    return tuple(sorted({str(name).rsplit(".", 1)[-1] for name in names}))


def written_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """``adapter_config.json`` of this adapter over the model that ``base`` names."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted(lora.names),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.scaling == "rslora",
    }


def _rules_of(lora: LoraConfig, spec: ModelSpec) -> dict[str, tuple[Rule, int]]:
    """Every tensor of the adapter by its full name, with its rule and layer."""
    chosen = [rule for name, pair in pairs(spec).items() if name in lora.names for rule in pair]
    return {rule.name.format(layer=layer): (rule, layer) for rule in chosen for layer in range(spec.layers)}


def _lengths(lora: LoraConfig, spec: ModelSpec) -> Sizes:
    return sizes(spec) | {RANK: lora.rank}


def _require_fit(
    dir: pathlib.Path, found: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[Rule, int]], lengths: Sizes
) -> None:
    """List everything that does not fit, kind by kind."""
    problems = {
        "unknown": sorted(set(found) - set(wanted)),
        "missing": sorted(set(wanted) - set(found)),
        "of another shape": [
            f"{name} (wanted {list(hf_shape(wanted[name][0], lengths))}, got {list(tensor.shape)})"
            for name, tensor in found.items()
            if name in wanted and tensor.shape != hf_shape(wanted[name][0], lengths)
        ],
        "with values that are not finite": [n for n, t in found.items() if not np.isfinite(t.astype(np.float32)).all()],
    }
    lines = [f"  {kind}: {', '.join(names[:SHOWN])}" for kind, names in problems.items() if names]
    if lines:
        head = f"{dir / WEIGHTS}: the tensors are not those of this adapter over this model:"
        raise HfError("\n".join([head, *lines, "Check that the adapter was trained on the model in model.source."]))
