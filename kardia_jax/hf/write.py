"""A model into a directory that ``transformers`` loads; complete, or not there.

In: tensors by Hugging Face name (out of parameters, or out of another checkpoint), spec, tokenizer, the text of the
model card. Out:

    dir/model.safetensors            or model-00001-of-00002.safetensors ... and model.safetensors.index.json
    dir/config.json  generation_config.json  tokenizer.json ...  README.md

    save_directory(run_dir / "hf", params, spec, tokenizer, stop_ids=[2, 11], card=model_card(...))

Everything is written into a hidden sibling folder, which takes its name at the end. Tensors go through one at a time,
so beside the parameters there is the largest tensor, whatever the size of a shard.
"""

import contextlib
import functools
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from kardia_jax.hf.container import Dtype, OnBadNumber, write
from kardia_jax.hf.folder import INDEX, SINGLE
from kardia_jax.hf.tables import EMBED, HfError, entries, hf_shape, leaf, sizes, to_hf
from kardia_jax.hosts import is_first
from kardia_jax.model.spec import ModelSpec
from kardia_jax.placement import everybodys
from kardia_jax.types import Params

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase as Tokenizer

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
FREE_SPACE_MARGIN = 1.1
"""Free bytes wanted per byte of weights: tokenizer, configs and what file systems round up."""

Shard = list[str]
"""Names of the tensors in one file."""

Tensors = Callable[[list[str]], Iterable[tuple[str, np.ndarray]]]
"""Names -> (name, tensor as Hugging Face has it), in the same order."""


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

    Where parameters lie on devices of several processes all of them call this, and the first one writes.
    """
    _require_tokens(spec, tokenizer, stop_ids)
    if not is_first():
        for names in plan_shards(spec, jnp.dtype(dtype).itemsize, shard_bytes(max_shard_size)):
            # In the order in which the first one writes them: what is gathered must be the same everywhere.
            for _ in tensors(params, spec, sorted(names)):
                pass
        return
    with published(dir, spec, dtype, overwrite) as partial:
        write_weights(partial, functools.partial(tensors, params, spec), spec, dtype, max_shard_size)
        _write_configs(partial, spec, tokenizer, stop_ids, dtype)
        tokenizer.save_pretrained(str(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")


@contextlib.contextmanager
def published(dir: pathlib.Path, spec: ModelSpec, dtype: Dtype, overwrite: bool) -> Iterator[pathlib.Path]:
    """A hidden folder to write a model into, which takes the name ``dir`` when the block ends without an error.

    Raises HfError for a target in use and a disk without room, both before the block, and for a disk that fills in it.
    """
    require_target(dir, overwrite, "a model", _holds_model)
    _require_space(dir, spec, jnp.dtype(dtype).itemsize)
    place = dir.absolute()
    partial = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        take_name(partial, place)
    except OSError as error:
        fix = "Free some space, or choose another folder."
        raise HfError(f"{dir}: could not be written: {error}. Nothing was left behind. {fix}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse(dtype: Dtype, name: str, was_finite: bool) -> None:
    """Raises HfError for a weight that is NaN or infinite, or becomes so in this dtype."""
    fix = "Choose a wider dtype." if was_finite else "Export an earlier checkpoint."
    raise HfError(f"{name}: wanted finite {dtype} weights, got NaN or infinity. {fix}")


def write_weights(
    dir: pathlib.Path,
    stream: Tensors,
    spec: ModelSpec,
    dtype: Dtype,
    max_shard_size: str = "5GB",
    on_bad_number: OnBadNumber | None = None,
) -> None:
    """One safetensors file, or shards up to this size with their index; bad numbers are refused unless told else."""
    table, lengths, size = entries(spec), sizes(spec), jnp.dtype(dtype).itemsize
    shards = plan_shards(spec, size, shard_bytes(max_shard_size))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: hf_shape(table[name].rule, lengths) for name in names}
        write(dir / file, dtype, shapes, stream, on_bad_number or functools.partial(refuse, dtype))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = size * sum(math.prod(hf_shape(entry.rule, lengths)) for entry in table.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(dir / INDEX, index)


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


def tensors(params: Params, spec: ModelSpec, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These tensors as Hugging Face has them, one in memory at a time."""
    lengths, table = sizes(spec), entries(spec)
    for name in names:
        rule, layer = table[name]
        array = leaf(params, rule.path)
        yield name, to_hf(rule, everybodys(array[layer] if rule.stacked else array), lengths)


def _in_model_order(spec: ModelSpec) -> list[str]:
    """Embedding, then layer by layer, then the rest, so that a shard holds neighbouring layers."""

    def place(name: str) -> int:
        rule, layer = table[name]
        return -1 if rule == EMBED else layer if rule.stacked else spec.layers

    table = entries(spec)
    return sorted(table, key=place)


def saved_config(config: Mapping[str, Any], spec: ModelSpec, dtype: Dtype) -> dict[str, Any]:
    """The config.json of a converted model: every field as it came, and what conversion may have changed."""
    kept = {name: value for name, value in config.items() if name != "torch_dtype"}  # dtype by its older name
    changed = {"vocab_size": spec.vocab_size, "tie_word_embeddings": spec.tied, "dtype": dtype}
    return {"architectures": spec.to_hf()["architectures"]} | kept | changed


def generation_config(config: Mapping[str, Any], tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """What stops a generation, for a checkpoint that has no generation_config.json."""
    found = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokenizer is not None:
        own = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        found = {name: one if found[name] is None else found[name] for name, one in zip(found, own, strict=True)}
    return {name: value for name, value in found.items() if value is not None}


def _write_configs(
    dir: pathlib.Path, spec: ModelSpec, tokenizer: "Tokenizer", stop_ids: Sequence[int], dtype: Dtype
) -> None:
    stops = [int(token) for token in stop_ids]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    tokens = {"eos_token_id": stops, "pad_token_id": padding}
    write_json(dir / "config.json", {**spec.to_hf(), **tokens, "dtype": dtype})
    write_json(dir / "generation_config.json", tokens)


def write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    """A JSON object, for people and programs."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def take_name(partial: pathlib.Path, dir: pathlib.Path) -> None:
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


def require_target(dir: pathlib.Path, overwrite: bool, what: str, holds: Callable[[pathlib.Path], bool]) -> None:
    """Raises HfError for a folder in use; ``overwrite`` lets one go that ``holds`` such a thing, and no other."""
    if not dir.exists() or (dir.is_dir() and not any(dir.iterdir())):
        return
    if not overwrite:
        raise HfError(f"{dir}: wanted an empty or new folder, got one in use. Choose another, or pass overwrite.")
    if not holds(dir):
        fix = "Choose another folder: this one would be deleted with all it holds."
        raise HfError(f"{dir}: wanted a folder that holds {what} to overwrite, got none. {fix}")


def _holds_model(dir: pathlib.Path) -> bool:
    """A config.json of a model; the folder of a run has one too, of another kind."""
    try:
        config = json.loads((dir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def require_apart(source: pathlib.Path, target: pathlib.Path) -> None:
    """The target must neither be nor hold nor stand in the source, which would be changed or deleted."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise HfError(f"{target}: wanted a folder apart from the source {source}. Choose another one.")


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
