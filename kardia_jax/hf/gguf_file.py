"""The container of GGUF: metadata and raw tensors of one file, or of a set that was split.

In: a path. Out: ``Contents``, metadata as plain Python values and tensors that stay on disk, mapped, until read.

    held = read(pathlib.Path("model.Q4_K_M.gguf"))
    held.metadata["general.architecture"]                    # "llama"
    dequantised(held.stored["blk.0.attn_q.weight"])          # float32 [576, 576], as the file orders its rows

The dimensions of GGUF are listed fastest first; here they are the other way round, as Hugging Face has them.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kardia_jax.hf.tables import HfError

if TYPE_CHECKING:  # only whoever opens such a file needs the package
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
AGAIN = "Download it again, or convert the model again with llama.cpp's convert_hf_to_gguf.py."
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""Types that are read; each is compared with an independent dequantiser in the tests."""

CHUNK = 1 << 22
"""Numbers dequantised at once: the temporaries of the unpacking stay small beside one tensor."""


class Stored(NamedTuple):
    """A tensor as the file has it; ``data`` is mapped and, where the type is packed, bytes."""

    name: str
    file: pathlib.Path
    type: "GGMLQuantizationType"
    shape: tuple[int, ...]
    data: np.ndarray


class Contents(NamedTuple):
    """What a file, or all files of a split set, hold together."""

    file: pathlib.Path
    """The first file, for messages."""
    metadata: Mapping[str, Any]
    stored: Mapping[str, Stored]


def is_gguf(path: pathlib.Path) -> bool:
    """A .gguf file, or a directory with the GGUF of one model and no Hugging Face model beside it."""
    if path.suffix == ".gguf" and not path.is_dir():
        return True
    beside = (path / "config.json").exists() or any(path.glob("*.safetensors"))
    return not beside and len(_first_files(path)) == 1


def read(path: pathlib.Path) -> Contents:
    """Metadata and tensors of a .gguf file, of any file of a split set, or of a directory with one of these.

    Raises HfError for anything else, for a missing part, and for a file that is damaged or cut short.
    """
    files = _files(path)
    stats = [file.stat() for file in files]
    return _read(tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


def dequantised(tensor: Stored) -> np.ndarray:
    """The numbers of a tensor, float32, its rows as the file orders them.

    Raises HfError for a type that is not one of ``TYPES``.
    """
    from gguf.quants import dequantize

    require_types([tensor])
    out = np.empty(tensor.shape, np.float32)
    rows, flat = tensor.data.reshape(-1, tensor.data.shape[-1]), out.reshape(-1, out.shape[-1])
    step = max(1, CHUNK // out.shape[-1])
    for start in range(0, len(flat), step):
        flat[start : start + step] = dequantize(rows[start : start + step], tensor.type)
    return out


def require_types(tensors: list[Stored]) -> None:
    """Refuses, in one message, every tensor of a type that is not read."""
    wrong = [f"{tensor.name} ({tensor.type.name})" for tensor in tensors if tensor.type.name not in TYPES]
    if wrong:
        fix = "Take a file of another quantisation of this model."
        raise HfError(f"{tensors[0].file}: wanted tensors of types {', '.join(TYPES)}, got {listed(wrong)}. {fix}")


def listed(names: list[str], shown: int = 8) -> str:
    """The first names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


@functools.lru_cache(maxsize=2)
def _read(files: tuple[pathlib.Path, ...], stamps: tuple[tuple[int, int], ...]) -> Contents:
    """``stamps`` make a file that changed a new one; parsing a large vocabulary takes seconds, so it is kept."""
    parts = [_one(file) for file in files]
    _require_whole(parts)
    names = [name for part in parts for name in part.stored]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(parts) > 1 else []
    if twice:
        raise HfError(f"{files[0]}: wanted every tensor once in the set, got twice: {listed(twice)}. {AGAIN}")
    stored = {name: tensor for part in parts for name, tensor in part.stored.items()}
    return Contents(files[0], parts[0].metadata, stored)


def _one(file: pathlib.Path) -> Contents:
    from gguf import GGUFReader

    with file.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic != MAGIC:
        raise HfError(f"{file}: wanted a GGUF file, which begins with {MAGIC!r}, got {magic!r}. {AGAIN}")
    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise HfError(f"{file}: damaged or cut short ({error}). {AGAIN}") from error
    if reader.byte_order != "I":
        raise HfError(f"{file}: wanted the byte order of this machine, got the other one. {AGAIN}")
    stored = {
        tensor.name: Stored(
            tensor.name, file, tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)), tensor.data
        )
        for tensor in reader.tensors
    }
    return Contents(file, metadata, stored)


def _require_whole(parts: list[Contents]) -> None:
    """The set is as long as its first file says, in tensors and in files."""
    first = parts[0]
    count = int(first.metadata.get("split.count", 1) or 1)
    if count != len(parts):
        fix = "Put all files of the set into one directory, with the names ...-00001-of-0000N.gguf."
        raise HfError(f"{first.file}: wanted {count} files, as split.count says, got {len(parts)}. {fix}")
    wanted, found = first.metadata.get("split.tensors.count"), sum(len(part.stored) for part in parts)
    if wanted is not None and int(wanted) != found:
        raise HfError(f"{first.file}: wanted {wanted} tensors in the set, got {found}. {AGAIN}")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or all files of its set in order."""
    if not path.exists():
        raise HfError(f"{path}: wanted a .gguf file or a directory with one, got nothing there. Check the path.")
    firsts = _first_files(path) if path.is_dir() else [path]
    if len(firsts) != 1:
        names = [file.name for file in firsts]
        raise HfError(f"{path}: wanted the GGUF of one model, got {names}. Name the file.")
    match = SPLIT.fullmatch(firsts[0].name)
    if match is None:
        return firsts
    stem, count = match["stem"], match["count"]
    files = [firsts[0].with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise HfError(f"{path}: wanted {int(count)} files of a split set, missing: {listed(missing)}. Download them.")
    return files


def _first_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """One file per model: of a split set, the lowest number that is there."""
    firsts: dict[str, pathlib.Path] = {}
    for file in sorted(folder.glob("*.gguf")):
        match = SPLIT.fullmatch(file.name)
        firsts.setdefault(f"{match['stem']}-of-{match['count']}" if match else file.name, file)
    return list(firsts.values())
