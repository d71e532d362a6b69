"""Parameters out of a Hugging Face directory of safetensors, single or sharded, or out of a GGUF file.

In: a directory or a .gguf file, the ``ModelSpec`` of its config.json, a dtype. Out: nested NumPy arrays. Tensors
are read one at a time straight into the stacked arrays, so the peak is the model once plus one tensor.

    spec = ModelSpec.from_hf(json.loads((dir / "config.json").read_text()))
    params = load_params(dir, spec)          # float32 masters, whatever the file holds

Nothing is guessed: every tensor that is unknown, missing, there twice, of another shape or quantised is
listed in one error before any weight is read.
"""

import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from kardia_jax.hf import gguf
from kardia_jax.hf.tables import (
    EMBED,
    HEAD,
    Entry,
    Found,
    HfError,
    entries,
    from_hf,
    hf_shape,
    nested,
    rules,
    shape,
    sizes,
)
from kardia_jax.model.spec import ModelSpec
from kardia_jax.types import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
SHOWN = 8
"""Problems of one kind that an error lists by name."""

Dtype = Literal["float32", "bfloat16", "float16"]


def load_params(dir: pathlib.Path, spec: ModelSpec, dtype: Dtype = "float32") -> Params:
    """All parameters of the model, as NumPy arrays of this dtype.

    Raises HfError for a directory without safetensors, a damaged or missing file, and, in one message, for
    every tensor that does not fit the spec.
    """
    found = inspect(dir)
    _require_fit(dir, spec, found)
    lengths, expected = sizes(spec), entries(spec)
    leaves = {rule.path: np.empty(shape(rule, lengths), jnp.dtype(dtype)) for rule in rules(spec)}
    by_file: dict[pathlib.Path, list[str]] = defaultdict(list)
    for tensor in found:
        if tensor.name in expected:
            by_file[tensor.file].append(tensor.name)
    for file, names in by_file.items():
        for name, tensor in _tensors(file, names):
            rule, layer = expected[name]
            target = leaves[rule.path]
            (target[layer] if rule.stacked else target)[...] = from_hf(rule, tensor, lengths)
    _require_tied_head(spec, found, leaves[EMBED.path])
    return nested(leaves)


def inspect(dir: pathlib.Path) -> list[Found]:
    """Every tensor of the directory, from the headers alone; a name that two shards hold comes twice."""
    if gguf.is_gguf(dir):
        return gguf.inspect(dir)
    return [tensor for file in _files(dir) for tensor in _headers(file)]


def _files(dir: pathlib.Path) -> list[pathlib.Path]:
    if (dir / SINGLE).is_file():
        return [dir / SINGLE]
    if not (dir / INDEX).is_file():
        fix = "Save the model with safetensors (model.save_pretrained does)."
        raise HfError(f"{dir}: wanted {SINGLE} or {INDEX}, got neither. {fix}")
    try:
        shards = set(json.loads((dir / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise HfError(f"{dir / INDEX}: wanted a JSON object with a weight_map, got {error}.") from error
    missing = sorted(name for name in shards if not (dir / name).is_file())
    if missing:
        raise HfError(f"{dir}: the index names files that are not there: {missing}. Download them again.")
    return [dir / name for name in sorted(shards)]


def _headers(file: pathlib.Path) -> list[Found]:
    try:
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()
            return [_header(tensors.get_slice(name), name, file) for name in names]
    except (SafetensorError, OSError) as error:
        raise HfError(f"{file}: damaged or cut short ({error}). Download or export it again.") from error


def _header(part: Any, name: str, file: pathlib.Path) -> Found:
    """``part`` is the slice object of safetensors, which has no public type."""
    return Found(name, file, part.get_dtype(), tuple(part.get_shape()))


def _tensors(file: pathlib.Path, names: Iterable[str]) -> Iterable[tuple[str, np.ndarray]]:
    return gguf.tensors(file, names) if gguf.is_gguf(file) else _safetensors(file, names)


def _safetensors(file: pathlib.Path, names: Iterable[str]) -> Iterable[tuple[str, np.ndarray]]:
    with safe_open(file, framework="np") as tensors:
        for name in names:
            yield name, tensors.get_tensor(name)


def _require_fit(dir: pathlib.Path, spec: ModelSpec, found: list[Found]) -> None:
    """List everything that does not fit, kind by kind."""
    expected, lengths = entries(spec), sizes(spec)
    names = [tensor.name for tensor in found]
    optional = {HEAD.name} if spec.tied else set()
    known = {**expected, **{name: Entry(HEAD, 0) for name in optional}}
    problems = {
        "unknown": sorted(set(names) - set(known)),
        "missing": sorted(set(expected) - set(names)),
        "there twice": sorted(name for name, count in Counter(names).items() if count > 1),
        "of another shape": [
            f"{tensor.name} (wanted {list(wanted)}, got {list(tensor.shape)})"
            for tensor in found
            if tensor.name in known and tensor.shape != (wanted := hf_shape(known[tensor.name].rule, lengths))
        ],
        f"not one of {DTYPES}": [f"{t.name} ({t.dtype})" for t in found if t.dtype not in DTYPES],
    }
    lines = [f"  {kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if lines:
        head = f"{dir}: the tensors are not those of a {spec.family} model with this config.json:"
        raise HfError("\n".join([head, *lines, "Check that config.json and the weights belong together."]))


def _require_tied_head(spec: ModelSpec, found: list[Found], embedding: np.ndarray) -> None:
    """Some tools write the head of a tied model too: the same numbers are welcome, others are an error."""
    heads = [tensor for tensor in found if tensor.name == HEAD.name]
    if not spec.tied or not heads:
        return
    for _, head in _tensors(heads[0].file, [HEAD.name]):
        if not np.array_equal(head.astype(embedding.dtype), embedding):
            fix = "Set tie_word_embeddings to false in config.json if the head was trained."
            raise HfError(f"{heads[0].file}: {HEAD.name} is not {EMBED.name}, but the model is tied. {fix}")


def _listed(problems: list[str]) -> str:
    more = len(problems) - SHOWN
    return ", ".join(problems[:SHOWN]) + (f" and {more} more" if more > 0 else "")
