"""Parameters into a directory that ``transformers`` loads; complete, or not there.

In: parameters, spec, tokenizer, the ids that end an answer, the text of the model card. Out:

    dir/model.safetensors            or model-00001-of-00002.safetensors ... and model.safetensors.index.json
    dir/config.json  generation_config.json  tokenizer.json ...  README.md

    save_directory(run_dir / "hf", params, spec, tokenizer, stop_ids=[2, 11], card=model_card(...))

Everything is written into a hidden sibling folder, which takes its name at the end. Tensors go through one
shard at a time, so the peak is one shard beside the parameters.
"""

import json
import math
import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from kardia_jax.hf.read import INDEX, SINGLE, Dtype
from kardia_jax.hf.tables import EMBED, HfError, entries, hf_shape, leaf, sizes, to_hf
from kardia_jax.model.spec import ModelSpec
from kardia_jax.types import Params

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase as Tokenizer

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
FREE_SPACE_MARGIN = 1.1
"""Free bytes wanted per byte of weights: tokenizer, configs and what file systems round up."""

Shard = list[str]
"""Names of the tensors in one file."""


def save_directory(
    dir: pathlib.Path,
    params: Params,
    spec: ModelSpec,
    tokenizer: "Tokenizer",
    stop_ids: Sequence[int],
    card: str,
    dtype: Dtype = "float32",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the whole model; on any failure nothing is left and an older export stays as it was.

    ``overwrite`` replaces a folder that holds a model (a config.json), and no other. Raises HfError for a
    target in use, a full disk, a tokenizer or stop ids that do not fit the table, and a weight that is not
    finite.
    """
    _require_tokens(spec, tokenizer, stop_ids)
    _require_target(dir, overwrite)
    limit = shard_bytes(max_shard_size)
    shards = plan_shards(spec, jnp.dtype(dtype).itemsize, limit)
    _require_space(dir, spec, jnp.dtype(dtype).itemsize)
    partial = dir.with_name(f".{dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(partial, params, spec, shards, dtype)
        _write_configs(partial, spec, tokenizer, stop_ids, dtype)
        tokenizer.save_pretrained(str(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")
        _take_name(partial, dir)
    except (OSError, SafetensorError) as error:
        fix = "Free some space, or choose another folder."
        raise HfError(f"{dir}: could not be written: {error}. Nothing was left behind. {fix}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shard_bytes(text: str) -> int:
    """``5GB`` is 5 * 10^9 bytes; KB, MB and GB are known. Raises HfError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip().upper())
    if match is None or float(match.group(1)) <= 0:
        raise HfError(f"max_shard_size: wanted a size such as 5GB or 500MB, got {text!r}.")
    return int(float(match.group(1)) * UNITS[match.group(2)])


def plan_shards(spec: ModelSpec, item_bytes: int, limit: int) -> list[Shard]:
    """Fill files in the order of the model; a tensor above the limit has a file to itself."""
    shards: list[Shard] = [[]]
    filled, table, lengths = 0, entries(spec), sizes(spec)
    for name in _in_model_order(spec):
        size = math.prod(hf_shape(table[name].rule, lengths)) * item_bytes
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def tensors(params: Params, spec: ModelSpec, names: Iterable[str], dtype: Dtype) -> dict[str, np.ndarray]:
    """These tensors as Hugging Face has them. Raises HfError for a weight not finite in this dtype."""
    lengths, table = sizes(spec), entries(spec)
    out: dict[str, np.ndarray] = {}
    for name in names:
        rule, layer = table[name]
        array = leaf(params, rule.path)
        tensor = to_hf(rule, np.asarray(array[layer] if rule.stacked else array), lengths)
        with np.errstate(over="ignore"):  # An overflow is infinity, and found in the next line.
            out[name] = tensor.astype(jnp.dtype(dtype))
        if not np.isfinite(out[name]).all():
            fix = "Export an earlier checkpoint, or a wider dtype if these weights overflow it."
            raise HfError(f"{name}: wanted finite {dtype} weights, got NaN or infinity. {fix}")
    return out


def _in_model_order(spec: ModelSpec) -> list[str]:
    """Embedding, then layer by layer, then the rest, so that a shard holds neighbouring layers."""

    def place(name: str) -> int:
        rule, layer = table[name]
        return -1 if rule == EMBED else layer if rule.stacked else spec.layers

    table = entries(spec)
    return sorted(table, key=place)


def _write_weights(dir: pathlib.Path, params: Params, spec: ModelSpec, shards: list[Shard], dtype: Dtype) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = tensors(params, spec, names, dtype)
        # transformers refuses a file that does not say who wrote its layout.
        save_file(part, dir / file, metadata={"format": "pt"})
        # safetensors writes 0600; the folder is for others to read, like the files beside it.
        (dir / file).chmod(0o644)
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in part.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(dir / INDEX, index)


def _write_configs(
    dir: pathlib.Path, spec: ModelSpec, tokenizer: "Tokenizer", stop_ids: Sequence[int], dtype: Dtype
) -> None:
    stops = [int(token) for token in stop_ids]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    tokens = {"eos_token_id": stops, "pad_token_id": padding}
    _write_json(dir / "config.json", {**spec.to_hf(), **tokens, "dtype": dtype})
    _write_json(dir / "generation_config.json", tokens)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _take_name(partial: pathlib.Path, dir: pathlib.Path) -> None:
    """Rename; an older export steps aside first and comes back if the rename fails."""
    if not dir.exists():
        partial.rename(dir)
        return
    aside = dir.with_name(f".{dir.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    dir.rename(aside)
    try:
        partial.rename(dir)
    except OSError:
        aside.rename(dir)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _require_target(dir: pathlib.Path, overwrite: bool) -> None:
    if not dir.exists() or (dir.is_dir() and not any(dir.iterdir())):
        return
    if not overwrite:
        raise HfError(f"{dir}: wanted an empty or new folder, got one in use. Choose another, or pass overwrite.")
    if not (dir / "config.json").is_file():
        fix = "Choose another folder: this one would be deleted with all it holds."
        raise HfError(f"{dir}: wanted a folder that holds a model to overwrite, got none. {fix}")


def _require_tokens(spec: ModelSpec, tokenizer: "Tokenizer", stop_ids: Sequence[int]) -> None:
    if len(tokenizer) > spec.vocab_size:
        raise HfError(f"tokenizer: wanted at most {spec.vocab_size} ids (the table), got {len(tokenizer)}.")
    if not stop_ids or not all(0 <= token < spec.vocab_size for token in stop_ids):
        raise HfError(f"stop_ids: wanted at least one id below {spec.vocab_size}, got {list(stop_ids)}.")


def _require_space(dir: pathlib.Path, spec: ModelSpec, item_bytes: int) -> None:
    needed = int(spec.parameter_count * item_bytes * FREE_SPACE_MARGIN)
    parent = next(folder for folder in dir.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free <= needed:
        fix = "Free some space, choose another folder, or a smaller dtype."
        raise HfError(f"{dir}: no room for the model: wanted {needed:,} free bytes, got {free:,}. {fix}")
