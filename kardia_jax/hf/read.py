"""Parameters out of a Hugging Face checkpoint: a directory of safetensors, single or sharded.

In: a path, the ``ModelSpec`` of its config, a dtype. Out: nested arrays, in host memory or sharded over devices.

    spec = ModelSpec.from_hf(config_of(dir))
    params = load_params(dir, spec)                              # NumPy, float32 whatever the file holds
    shardings = jax.tree.map(rule_of_your_own, abstract_params(spec))
    params = load_arrays(dir, spec, shardings, "bfloat16")       # JAX arrays, straight to their devices

Tensors are read one at a time, so beside the parameters there is the largest tensor and its conversion. Nothing is
guessed: every tensor that is unknown, missing, there twice, of another shape or quantised is listed in one error
before any weight is read. NaN and infinity are said on stderr with the tensor's name.
"""

import functools
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from kardia_jax.hf import folder, gguf
from kardia_jax.hf.container import CODES, Dtype, is_finite
from kardia_jax.hf.tables import (
    EMBED,
    HEAD,
    Entry,
    Found,
    HfError,
    Rule,
    entries,
    from_hf,
    hf_shape,
    leaf,
    nested,
    rules,
    shape,
    sizes,
)
from kardia_jax.model.spec import ModelSpec
from kardia_jax.placement import put
from kardia_jax.types import Params

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase as Tokenizer

DTYPES = tuple(CODES)
SHOWN = 8
"""Problems of one kind that an error lists by name."""
TILE = 128
"""Rows and columns of a transposed copy that are done together: cache lines are then used before they are lost."""
SCAN = 1 << 18
"""Numbers that are looked at together for NaN."""


class Source(Protocol):
    """Where a checkpoint comes from: five questions, answered by a module such as ``kardia_jax.hf.folder``."""

    def config(self, path: pathlib.Path, /) -> dict[str, Any]: ...
    def inspect(self, path: pathlib.Path, /) -> Sequence[Any]:
        """Every tensor, with the fields of ``Found``."""
        ...

    def tensors(self, path: pathlib.Path, names: Iterable[str], /) -> Iterable[tuple[str, np.ndarray]]: ...
    def tokenizer(self, path: pathlib.Path, /) -> "Tokenizer | None": ...
    def companions(self, path: pathlib.Path, /) -> dict[str, pathlib.Path]: ...


def source_of(path: pathlib.Path) -> Source:
    """What answers for this path; HfError where there is nothing."""
    if gguf.is_gguf(path):
        return gguf
    if not path.is_dir():
        raise HfError(f"{path}: wanted a directory of a Hugging Face model or a .gguf file, got none. Check the path.")
    return folder


def config_of(path: pathlib.Path) -> dict[str, Any]:
    """The config.json of a checkpoint."""
    return source_of(path).config(path)


def inspect(path: pathlib.Path) -> list[Found]:
    """Every tensor of a checkpoint, from the headers alone; a name that two shards hold comes twice."""
    return [Found(item.name, item.file, item.dtype, item.shape) for item in source_of(path).inspect(path)]


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def load_params(path: pathlib.Path, spec: ModelSpec, dtype: Dtype = "float32") -> Params:
    """All parameters of the model, as NumPy arrays of this dtype.

    Raises HfError for a checkpoint without safetensors, a damaged or missing file, and, in one message, for
    every tensor that does not fit the spec.
    """
    require_fit(path, spec, inspect(path))
    lengths = sizes(spec)
    leaves = {rule.path: np.empty(shape(rule, lengths), jnp.dtype(dtype)) for rule in rules(spec)}
    for rule, layer, tensor in _stream(path, spec):
        target = leaves[rule.path]
        copy(target[layer] if rule.stacked else target, tensor)
        del tensor
    require_tied_head(path, spec)
    return nested(leaves)


def load_arrays(
    path: pathlib.Path, spec: ModelSpec, shardings: Params | None = None, dtype: Dtype = "float32"
) -> Params:
    """All parameters as device arrays, each of its own sharding: layer by layer into a buffer that is donated.

    ``shardings`` has the structure of the parameters, see ``abstract_params``; without it they go to JAX's default
    device. The host holds one tensor at a time. Errors are those of ``load_params``.
    """
    require_fit(path, spec, inspect(path))
    lengths, leaves = sizes(spec), {}
    for rule, layer, view in _stream(path, spec):
        sharding: Sharding | None = None if shardings is None else leaf(shardings, rule.path)
        tensor = np.empty(view.shape, jnp.dtype(dtype))
        copy(tensor, view)
        del view
        if rule.stacked:
            buffer = leaves.pop(rule.path, None)
            if buffer is None:
                buffer = jnp.zeros(shape(rule, lengths), dtype, device=sharding)
            part = put(tensor, _layer_sharding(sharding))
            leaves[rule.path] = _placer(sharding)(buffer, part, layer)
            del buffer, part
        else:
            leaves[rule.path] = put(tensor, sharding)
        # Dispatch is asynchronous: without waiting, the host would hold tensors that are still to be copied.
        jax.block_until_ready(leaves[rule.path])
        del tensor
    require_tied_head(path, spec)
    return nested(leaves)


def abstract_params(spec: ModelSpec, dtype: Dtype = "float32") -> Params:
    """Shape and dtype of every parameter, in the structure of the parameters."""
    lengths = sizes(spec)
    return nested({rule.path: jax.ShapeDtypeStruct(shape(rule, lengths), dtype) for rule in rules(spec)})


def copy(target: np.ndarray, view: np.ndarray) -> None:
    """``target[...] = view`` tile by tile: views are transposed, and NumPy copies those two to three times slower."""
    if target.ndim < 2:
        target[...] = view
        return
    for row in range(0, len(target), TILE):
        for column in range(0, target.shape[-1], TILE):
            part = (slice(row, row + TILE), ..., slice(column, column + TILE))
            target[part] = view[part]


def _stream(path: pathlib.Path, spec: ModelSpec) -> Iterator[tuple[Rule, int, np.ndarray]]:
    """(rule, layer, tensor in our layout), one in memory at a time, in the order of the files."""
    table, lengths = entries(spec), sizes(spec)
    names = [found.name for found in inspect(path) if found.name in table]
    for name, tensor in source_of(path).tensors(path, names):
        warn_of_bad_numbers(path, name, tensor)
        yield table[name].rule, table[name].layer, from_hf(table[name].rule, tensor, lengths)
        del tensor


def warn_of_bad_numbers(path: pathlib.Path, name: str, tensor: np.ndarray) -> None:
    """NaN is read as it is, but said: a model that answers nonsense should not be a riddle."""
    flat = tensor.reshape(-1)
    if not all(is_finite(flat[start : start + SCAN]) for start in range(0, flat.size, SCAN)):
        warn(f"{path}: {name} holds NaN or infinity.")


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
    """The sharding of one layer of a stacked array; None leaves the placing to the compiled copy."""
    if not isinstance(sharding, NamedSharding):
        return sharding if sharding is not None and len(sharding.device_set) == 1 else None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.cache
def _placer(sharding: Sharding | None) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(stacked, one layer, index) -> stacked, in place: the buffer is donated."""

    def place(stacked: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, tensor, layer, 0)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def require_fit(path: pathlib.Path, spec: ModelSpec, found: Sequence[Found]) -> None:
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
        head = f"{path}: the tensors are not those of a {spec.family} model with this config.json:"
        raise HfError("\n".join([head, *lines, "Check that config.json and the weights belong together."]))


def require_tied_head(path: pathlib.Path, spec: ModelSpec) -> None:
    """Some tools write the head of a tied model too: the same numbers are welcome, others are an error."""
    if not spec.tied or HEAD.name not in {tensor.name for tensor in inspect(path)}:
        return
    tables = dict(source_of(path).tensors(path, [EMBED.name, HEAD.name]))
    head, embedding = (tables[name].reshape(-1) for name in (HEAD.name, EMBED.name))
    parts = (slice(start, start + SCAN) for start in range(0, head.size, SCAN))
    if not all(np.array_equal(head[part], embedding[part], equal_nan=True) for part in parts):
        fix = "Set tie_word_embeddings to false in config.json if the head was trained."
        raise HfError(f"{path}: {HEAD.name} is not {EMBED.name}, but the model is tied. {fix}")


def require_tokenizer_fits(tokenizer: "Tokenizer | None", spec: ModelSpec) -> None:
    """Every id must have a row of the table."""
    if tokenizer is not None and len(tokenizer) > spec.vocab_size:
        fix = "Use the model's own tokenizer, or a model with a larger table."
        came = f"got {len(tokenizer)}. {fix}"
        raise HfError(f"tokenizer: wanted at most {spec.vocab_size} ids (the table), {came}")


def _listed(problems: list[str]) -> str:
    more = len(problems) - SHOWN
    return ", ".join(problems[:SHOWN]) + (f" and {more} more" if more > 0 else "")
