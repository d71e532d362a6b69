"""Append-only files of one JSON object per line: ``metrics.jsonl`` and ``rollouts.jsonl``.

In: a step and its rows. Out: lines such as

    {"step": 12, "reward": 0.61, "kl": null}

Every line carries its step, steps never go down within a file, and a number that is not finite is written as
null, so that any JSON reader can read the file. The lines of a step are flushed together. A run that was
killed may have written steps after its last checkpoint, or half a line: ``truncate_after`` cuts both off, and
the resumed run writes them again.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np


class JsonlError(ValueError):
    """A line that is not a JSON object with a step: names the file, the line and what to do."""


class JsonlWriter:
    """Appends rows to one file."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, *rows: Mapping[str, object]) -> None:
        """Append the rows of one step and flush, so that they survive the process."""
        for row in rows:
            line = json.dumps(plain({"step": step, **row}), ensure_ascii=False, allow_nan=False)
            self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def truncate_after(path: pathlib.Path, step: int) -> int:
    """Cut the file before its first line of a later step; give the number of bytes that went.

    A last line without its newline was torn by the end of a process and goes too. A missing file is left
    missing. Raises JsonlError for a whole line that is not a JSON object with an integer step: nothing is cut
    then.
    """
    if not path.exists():
        return 0
    size, kept = path.stat().st_size, _kept_bytes(path, step)
    if kept < size:
        os.truncate(path, kept)
    return size - kept


def read_rows(path: pathlib.Path) -> list[dict[str, object]]:
    """All rows of a file, in order. Raises JsonlError as ``truncate_after`` does."""
    with path.open("rb") as lines:
        return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _kept_bytes(path: pathlib.Path, step: int) -> int:
    kept = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") or _step(path, number, line) > step:
                break
            kept += len(line)
    return kept


def _step(path: pathlib.Path, number: int, line: bytes) -> int:
    step = _parse(path, number, line)["step"]
    if not isinstance(step, int):
        raise JsonlError(f"{path}, line {number}: wanted an integer step, got {step!r}.")
    return step


def _parse(path: pathlib.Path, number: int, line: bytes) -> dict[str, object]:
    fix = "Repair or move the file; resuming appends to it."
    try:
        row = json.loads(line)
    except ValueError as error:
        raise JsonlError(f"{path}, line {number}: wanted a JSON object, got {line[:60]!r}. {fix}") from error
    if not isinstance(row, dict) or "step" not in row:
        raise JsonlError(f"{path}, line {number}: wanted a JSON object with a step, got {line[:60]!r}. {fix}")
    return row


def plain(value: object) -> object:
    """What ``json`` can write: numpy becomes Python, and a float that is not finite becomes None."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
