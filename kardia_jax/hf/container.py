"""The safetensors format, one tensor at a time: 8 bytes of header length, a JSON header, raw little-endian numbers.

In: a file and names, or shapes and a stream of tensors. Out: arrays, or a file that the safetensors library reads.

    for name, tensor in read(file, stored(file)):          # one tensor in memory at a time
        ...
    write(file, "bfloat16", {"model.norm.weight": (896,)}, [("model.norm.weight", scale)], refuse)

The library itself maps whole files to read them and wants all tensors of a file in memory to write one; here neither
grows with the size of a shard. It still checks every header. Source: https://github.com/huggingface/safetensors,
section Format.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from kardia_jax.hf.tables import HfError

Dtype = Literal["float32", "bfloat16", "float16"]

CODES: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Type in a header -> NumPy's name."""
LENGTH_BYTES = 8
ALIGNMENT = 8
SLAB = 1 << 18
"""Numbers that are converted, checked and written at once."""

OnBadNumber = Callable[[str, bool], None]
"""(tensor, whether it was finite before the conversion): what to do about NaN or infinity."""


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


def stored(file: pathlib.Path) -> list[Stored]:
    """Every tensor of a file; HfError for a file that is damaged or cut short."""
    try:
        with safe_open(file, framework="np"), file.open("rb") as raw:  # the library checks sizes and offsets
            length = int.from_bytes(raw.read(LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise HfError(f"{file}: damaged or cut short ({error}). Download or export it again.") from error
    return [
        Stored(name, file, item["dtype"], tuple(item["shape"]), LENGTH_BYTES + length + item["data_offsets"][0])
        for name, item in header.items()
        if name != "__metadata__"
    ]


def read(tensors: Iterable[Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in this order; none is kept once the caller lets go of it."""
    for item in tensors:
        yield item.name, _numbers(item)


def _numbers(item: Stored) -> np.ndarray:
    if item.dtype not in CODES:
        raise HfError(f"{item.file}: {item.name} is {item.dtype}, wanted one of {tuple(CODES)}.")
    dtype = jnp.dtype(CODES[item.dtype])
    size = math.prod(item.shape) * dtype.itemsize
    try:
        raw = np.fromfile(item.file, np.uint8, size, offset=item.start)
    except OSError as error:
        raise HfError(f"{item.file}: {item.name} cannot be read ({error}).") from error
    if raw.size != size:
        raise HfError(f"{item.file}: cut short in {item.name}. Download or export it again.")
    return raw.view(dtype).reshape(item.shape)


def header(dtype: Dtype, shapes: Mapping[str, Sequence[int]]) -> tuple[list[str], bytes]:
    """Names in the order of the file, and everything before the first number."""
    code = next(code for code, name in CODES.items() if name == dtype)
    # transformers refuses a file that does not say who wrote its layout.
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = sorted(shapes), 0
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * jnp.dtype(dtype).itemsize
        table[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return names, len(text).to_bytes(LENGTH_BYTES, "little") + text


def write(
    file: pathlib.Path,
    dtype: Dtype,
    shapes: Mapping[str, Sequence[int]],
    stream: Callable[[list[str]], Iterable[tuple[str, np.ndarray]]],
    on_bad_number: OnBadNumber,
) -> None:
    """Writes the tensors that ``stream(names)`` gives, converted to ``dtype``, and waits for the disk."""
    names, head = header(dtype, shapes)
    with file.open("wb") as out:
        out.write(head)
        for expected, (name, tensor) in zip(names, stream(names), strict=True):
            assert (name, tensor.shape) == (expected, tuple(shapes[name])), (name, tensor.shape)
            out.writelines(_converted(name, tensor, dtype, on_bad_number))
            del tensor  # Before the next one is read: one tensor in memory, not two.
        out.flush()
        os.fsync(out.fileno())


def _converted(name: str, tensor: np.ndarray, dtype: Dtype, on_bad_number: OnBadNumber) -> Iterator[memoryview]:
    """The bytes of a tensor, slab by slab; a bad number is reported once per tensor."""
    flat, told = np.ascontiguousarray(tensor).reshape(-1), False
    for start in range(0, flat.size, SLAB):
        before = flat[start : start + SLAB]
        with np.errstate(over="ignore"):  # An overflow is infinity, and found in the next line.
            after = before.astype(jnp.dtype(dtype), copy=False)
        if not told and not is_finite(after):
            told = True
            on_bad_number(name, is_finite(before))
        yield after.view(np.uint8).data


def is_finite(numbers: np.ndarray) -> bool:
    """No NaN and no infinity; 16-bit types go through float32, which NumPy tests ten times as fast."""
    wide = numbers.astype(np.float32) if numbers.dtype.itemsize < np.dtype(np.float32).itemsize else numbers
    return bool(np.isfinite(wide).all())
