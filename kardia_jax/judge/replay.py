"""Past verdicts in the place of a judge, and the recorder that writes them down.

A recording is JSON Lines, one verdict a line. A line is found by what was asked (rubric and request), so the verdicts
of one judge can be replayed whoever is configured now; where a reply was marked more than once, the last line counts.

    {"key": "9b0c...", "judge": "endpoint qwen3", "rubric": "kardia_five 1", "reply": "That is hard.",
     "verdict": [["relevance", 4, "Names the oven.", null], ...]}

>>> recorded = Recorder(judge, rubric, path)
>>> said = score_all(recorded, requests)
>>> score_all(ReplayJudge(path, rubric), requests) == said
True
"""

import json
import os
import pathlib
import sys
import threading
from typing import Any

from kardia_jax.config import ConfigError
from kardia_jax.judge.protocol import Judge, answers, close, is_in_process, take_stats
from kardia_jax.judge.records import request_key, verdict_from_json, verdict_to_json
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Rubric, Verdict


class ReplayJudge:
    """A ``Judge`` that reads its verdicts from a file; what is not there is a failure, or another judge's to say."""

    def __init__(self, path: pathlib.Path, rubric: Rubric, otherwise: Judge | None = None):
        """Reads the file. Raises ConfigError where it is none."""
        self.name = f"replay of {path.name}"
        self._path, self._rubric, self._otherwise = path, rubric, otherwise
        self._verdicts = load_recording(path)
        self._lock = threading.Lock()
        self._found = self._missing = 0

    @property
    def in_process(self) -> bool:
        """As the other judge."""
        return self._otherwise is not None and is_in_process(self._otherwise)

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        """One answer per request, in order."""
        found = [self._verdicts.get(request_key(self._rubric, request)) for request in requests]
        missing = [place for place, verdict in enumerate(found) if verdict is None]
        with self._lock:
            self._found += len(found) - len(missing)
            self._missing += len(missing)
        said: dict[int, Verdict | JudgeFailure] = dict.fromkeys(
            missing, JudgeFailure(f"{self.name}: this reply was never recorded with rubric {self._rubric.name}", False)
        )
        if missing and self._otherwise:
            said = dict(
                zip(missing, await answers(self._otherwise, [requests[place] for place in missing]), strict=True)
            )
        return [said[place] if verdict is None else verdict for place, verdict in enumerate(found)]

    def take_stats(self) -> dict[str, float]:
        """How many requests the file knew, and what the other judge counts."""
        with self._lock:
            found, missing, self._found, self._missing = self._found, self._missing, 0, 0
        counted = {"judge/replayed": float(found), "judge/not_recorded": float(missing)}
        return counted | (take_stats(self._otherwise) if self._otherwise else {})

    async def close(self) -> None:
        """Closes the other judge."""
        if self._otherwise:
            await close(self._otherwise)


class Recorder:
    """A ``Judge`` around another one, whose verdicts it appends to a file; failures are not verdicts."""

    def __init__(self, judge: Judge, rubric: Rubric, path: pathlib.Path):
        """Raises ConfigError where the file cannot be written."""
        self.name = judge.name
        self._judge, self._rubric, self._path = judge, rubric, path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(path)
        except OSError as error:
            raise ConfigError("judge.record", "a file that can be written", str(path), str(error)) from error

    @property
    def in_process(self) -> bool:
        """As the other judge."""
        return is_in_process(self._judge)

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        """What the other judge says."""
        said = await answers(self._judge, requests)
        lines = [
            _line(self._judge.name, self._rubric, request, verdict)
            for request, verdict in zip(requests, said, strict=True)
            if isinstance(verdict, Verdict)
        ]
        if lines:
            _append(self._path, "".join(lines))
        return said

    def take_stats(self) -> dict[str, float]:
        """What the other judge counts."""
        return take_stats(self._judge)

    async def close(self) -> None:
        """Closes the other judge."""
        await close(self._judge)


def load_recording(path: pathlib.Path) -> dict[str, Verdict]:
    """Key to verdict. A last line that a killed process left unfinished is passed over with a line on stderr.

    Raises ConfigError for a file that cannot be read, and for any other line that is no recorded verdict.
    """
    name = "judge.replay.path"
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(name, "a file that judge.record has written", str(path), str(error)) from error
    verdicts: dict[str, Verdict] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            key, verdict = _read(line)
        except ValueError as error:
            if number == len(lines):
                print(f"{name}: {path}:{number} was never finished; passed over", file=sys.stderr)
                continue
            raise ConfigError(name, "recorded verdicts, one a line", f"{path}:{number}", f"{error}.") from error
        verdicts[key] = verdict
    return verdicts


def _read(line: str) -> tuple[str, Verdict]:
    row: Any = json.loads(line)
    match row:
        case {"key": str(key), "verdict": list(marks)}:
            return key, verdict_from_json(json.dumps(marks))
    raise ValueError("no key and verdict in it")


def _line(judge: str, rubric: Rubric, request: JudgeRequest, verdict: Verdict) -> str:
    row = {
        "key": request_key(rubric, request),
        "judge": judge,
        "rubric": f"{rubric.name} {rubric.version}",
        "reply": request.reply,
        "verdict": json.loads(verdict_to_json(verdict)),
    }
    return json.dumps(row) + "\n"


def _append(path: pathlib.Path, text: str) -> None:
    """One write at the end of the file, so that processes can share it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _end_last_line(path: pathlib.Path) -> None:
    """Cuts off what a killed process left of its last line, so that the next line does not continue it."""
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
