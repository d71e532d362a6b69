"""From rows to dialogues: the KardiaBench schema, where rows may come from, and what a bad row does.

In: ``DataConfig`` and a split. Out: ``Loaded``, the dialogues in file order beside a count and every problem.

A row is one dialogue (a line of JSON, a row of Parquet, a row of a Hub dataset):

    {"person": "MBTI: INFP\\nAbout: ...", "mbti": "INFP", "emotion": "sad", "situation": "My dog died.",
     "anon_username": "user_7",
     "messages": [{"role": "system", "content": "..."},
                  {"role": "user", "content": "He was fourteen."},
                  {"role": "assistant", "content": "<|understanding_begin|>...<|response_end|>"}]}

``"rubric_items": ["Does it name the dog?", {"question": "...", "weight": 2}]`` may stand beside them:
questions that the judge is asked about replies in this dialogue. Other fields are allowed. ``anon_username``
is not read and the row's own system message is not kept: the prompt is built anew from profile and situation
(see ``prompt.py``). The row's ``emotion`` is gold for the dialogue; an assistant turn may name another one. A
user turn at the end, which nobody answered, is allowed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from kardia_jax.config import DataConfig
from kardia_jax.dialogue import mini
from kardia_jax.dialogue.emotions import closest_emotion, is_emotion
from kardia_jax.dialogue.spans import Malformed, from_xml, parse, render

Split = Literal["train", "test"]

_Raw = tuple[str, object]
"""Where a row stands, and the row: a mapping, or the bytes of a line that nobody has decoded yet."""

_ROLES = ("user", "assistant")
# Inside a text a control token would end a turn or a span, and half a surrogate pair cannot be tokenised.
_FORBIDDEN = re.compile(r"<\|\w+\|>|[\ud800-\udfff]")
_SUFFIXES = (".jsonl", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LIKE_A_FILE = re.compile(r".*\.(jsonl?|parquet|csv|tsv|txt|gz|zip|arrow)", re.IGNORECASE)


class DataError(ValueError):
    """Data that cannot be used: says which source, what was wanted and what to do."""


class RowError(DataError):
    """A row that does not fit the schema: names where it stands, the field, what was wanted and what came."""

    def __init__(self, where: str, field: str, wanted: str, came: str, fix: str = ""):
        super().__init__(f"{where}: {field}: wanted {wanted}, got {came}." + (f" {fix}" if fix else ""))
        self.where, self.field, self.wanted, self.came, self.fix = where, field, wanted, came, fix


@dataclass(frozen=True)
class Turn:
    """One message: the user's words, or an assistant's four spans in the model's tags."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class RubricItem:
    """A question of one dialogue, like "Does the reply mention the bees?", and its weight beside the criteria's."""

    question: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.question.splitlines()) != 1 or not self.question.strip() or _FORBIDDEN.search(self.question):
            raise ValueError(f"question: wanted one line of text without control tokens, got {self.question!r:.80}.")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight: wanted a finite number, 0 or more, got {self.weight}.")


@dataclass(frozen=True)
class Dialogue:
    """One row that fits the schema."""

    id: str
    """Twelve hex digits of the content: the same wherever the row stands; equal rows share it."""
    person: str
    """The profile: MBTI, About, Signature, Recent Activities."""
    mbti: str
    emotion: str
    """The gold label."""
    situation: str
    turns: tuple[Turn, ...]
    """User and assistant in turn, the user first."""
    where: str
    """Where the row stands, like ``train.jsonl:17``."""
    rubric_items: tuple[RubricItem, ...] = ()
    """Questions that the judge is asked about replies in this dialogue, beside the rubric's own."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The assistant turns, in order."""
        return tuple(turn.content for turn in self.turns[1::2])


@dataclass(frozen=True)
class Loaded:
    """What came out of a source; ``read`` counts the dialogues and the problems together."""

    dialogues: tuple[Dialogue, ...]
    read: int
    problems: tuple[str, ...]

    def summary(self) -> str:
        """One line for people: rows read, kept and skipped."""
        kept, skipped = len(self.dialogues), len(self.problems)
        return f"{self.read:,} rows read, {kept:,} dialogues kept, {skipped:,} rows skipped"


def load_dialogues(config: DataConfig, split: Split) -> Loaded:
    """The dialogues of one split, in file order, up to the split's limit.

    A single file serves whichever split is asked for: to hold people out, give a folder with train.* and
    test.*. Raises DataError for a source that cannot be read or holds no good row, and RowError for the first
    bad row when ``config.bad_rows`` is fatal. Rows beyond the limit are not looked at.
    """
    limit = config.train_limit if split == "train" else config.test_limit
    loaded = _collect(_rows(config.source, split), config.bad_rows, limit)
    if loaded.read == 0:
        raise DataError(f"data.source: wanted at least one row in the {split} split, {config.source} is empty.")
    if not loaded.dialogues:
        first = loaded.problems[0]
        raise DataError(f"data.source: all {loaded.read:,} rows of {config.source} are bad. First: {first}")
    return loaded


def read_row(row: Mapping[str, object], where: str) -> Dialogue:
    """The dialogue in one row; texts are stripped and assistant turns rewritten in the model's tags.

    Raises RowError for a missing or empty field, a wrong type, an unknown emotion, roles that do not
    alternate, no assistant turn, assistant spans that do not parse, a control token such as ``<|im_end|>``
    in a text, or a rubric item that is no question.
    """
    person, mbti, emotion, situation = (
        _plain(_text(row, field, field, where), field, where) for field in ("person", "mbti", "emotion", "situation")
    )
    if not is_emotion(emotion):
        near = closest_emotion(emotion)
        fix = f"Did you mean {near!r}?" if near else ""
        raise RowError(where, "emotion", "one of the 32 labels", repr(emotion), fix)
    turns = _turns(row, where)
    items = _items(row.get("rubric_items"), where)
    asked = [[item.question, item.weight] for item in items]
    identity = json.dumps([person, mbti, emotion, situation, *(turn.content for turn in turns), *asked])
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Dialogue(name, person, mbti, emotion, situation, turns, where, items)


def _collect(rows: Iterator[_Raw], bad_rows: Literal["skip", "fatal"], limit: int | None) -> Loaded:
    dialogues: list[Dialogue] = []
    problems: list[str] = []
    for where, raw in rows:
        if len(dialogues) == limit:
            break
        try:
            dialogues.append(read_row(_row(raw, where), where))
        except RowError as error:
            if bad_rows == "fatal":
                raise _fatal(error, len(dialogues)) from error
            problems.append(str(error))
    return Loaded(tuple(dialogues), len(dialogues) + len(problems), tuple(problems))


def _fatal(error: RowError, good: int) -> RowError:
    fix = f"{error.fix} {good:,} rows before it were good. Correct it, or set data.bad_rows to skip."
    return RowError(error.where, error.field, error.wanted, error.came, fix.strip())


def _row(raw: object, where: str) -> Mapping[str, object]:
    """A row as a mapping; a line of a file is JSON that nobody has looked at yet."""
    if isinstance(raw, bytes):
        raw = _json(raw, where)
    if not isinstance(raw, Mapping):
        raise RowError(where, "row", "an object with fields", _shown(raw))
    return raw


def _json(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(where, "row", "one JSON object per line", _shown(line), f"{error}.") from error


def _text(fields: Mapping[str, object], key: str, name: str, where: str) -> str:
    """The stripped, non-empty text under ``key``; ``name`` is what the error calls it."""
    if key not in fields:
        raise RowError(where, name, "a text", "no such field")
    value = fields[key]
    if not isinstance(value, str):
        raise RowError(where, name, "a text", _shown(value))
    if not value.strip():
        raise RowError(where, name, "a text that is not empty", _shown(value))
    return value.strip()


def _plain(text: str, name: str, where: str) -> str:
    """``text``, once it is known to hold no control token."""
    found = _FORBIDDEN.search(text)
    if found:
        raise RowError(where, name, "a text without control tokens or lone surrogates", repr(found[0]))
    return text


def _turns(row: Mapping[str, object], where: str) -> tuple[Turn, ...]:
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError(where, "messages", "a list of messages", _shown(messages))
    roles = [_role(message, where, index) for index, message in enumerate(messages)]
    start = 1 if roles[:1] == ["system"] else 0
    if "assistant" not in roles:
        raise RowError(where, "messages", "at least one assistant turn", f"the roles {roles}")
    return tuple(
        _turn(messages[index], roles[index], index, _ROLES[(index - start) % 2], where)
        for index in range(start, len(messages))
    )


def _role(message: object, where: str, index: int) -> str:
    if not isinstance(message, Mapping):
        raise RowError(where, f"messages[{index}]", "an object with role and content", _shown(message))
    return _text(message, "role", f"messages[{index}].role", where)


def _turn(message: Mapping[str, object], role: str, index: int, wanted: str, where: str) -> Turn:
    if role != wanted:
        fix = "After an optional system message, user and assistant alternate, the user first."
        raise RowError(where, f"messages[{index}].role", repr(wanted), repr(role), fix)
    name = f"messages[{index}].content"
    content = _text(message, "content", name, where)
    if role == "user":
        return Turn("user", _plain(content, name, where))
    spans = parse(from_xml(content))
    if isinstance(spans, Malformed):
        raise RowError(where, name, "four spans", f"{spans.reason} ({spans.detail})")
    for body in (spans.understanding, spans.reasoning, spans.response):
        _plain(body, name, where)
    return Turn("assistant", render(spans))


def _items(given: object, where: str) -> tuple[RubricItem, ...]:
    """The row's own questions to the judge; tables hold None where a row has none."""
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise RowError(where, "rubric_items", "a list of questions", _shown(given))
    return tuple(_item(item, f"rubric_items[{index}]", where) for index, item in enumerate(given))


def _item(given: object, name: str, where: str) -> RubricItem:
    fields = {"question": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping):
        raise RowError(where, name, "a question, or an object with question and weight", _shown(given))
    unknown = sorted(map(str, fields.keys() - {"question", "weight"}))
    if unknown:
        raise RowError(where, name, "no fields but question and weight", ", ".join(unknown))
    question = _plain(_text(fields, "question", f"{name}.question", where), f"{name}.question", where)
    if len(question.splitlines()) > 1:
        raise RowError(where, f"{name}.question", "one line", _shown(question))
    weight = 1.0 if fields.get("weight") is None else fields["weight"]
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
        raise RowError(where, f"{name}.weight", "a finite number, 0 or more", _shown(weight))
    return RubricItem(question, float(weight))


def _rows(source: str, split: Split) -> Iterator[_Raw]:
    """Every row of the split, with where it stands; a file or folder of that name goes before a Hub id."""
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves an unknown ~name as it is
    if source == "mini":
        return _mini_rows(split)
    if path.is_dir():
        return _file_rows(_split_file(path, split))
    if path.is_file():
        return _file_rows(path)
    if _HUB_ID.fullmatch(source) and not _LIKE_A_FILE.fullmatch(source):
        return _hub_rows(source, split)
    raise DataError(
        f"data.source: wanted mini, a .jsonl or .parquet file, a folder with train.* and test.*, or a Hub id "
        f"like owner/name, got {source!r}: file not found. Check the path."
    )


def _mini_rows(split: Split) -> Iterator[_Raw]:
    for number, row in enumerate(mini.rows(split), start=1):
        yield f"mini/{split}:{number}", row


def _split_file(folder: Path, split: Split) -> Path:
    found = [folder / f"{split}{suffix}" for suffix in _SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    came = " and ".join(path.name for path in found) if found else "neither"
    raise DataError(f"data.source: wanted either {split}.jsonl or {split}.parquet in {folder}, got {came}.")


def _file_rows(path: Path) -> Iterator[_Raw]:
    if path.suffix not in _SUFFIXES:
        raise DataError(f"data.source: wanted a .jsonl or .parquet file, got {str(path)!r}. Convert it first.")
    try:
        yield from _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    except OSError as error:
        raise DataError(f"data.source: cannot read {path}: {error}.") from error


def _jsonl_rows(path: Path) -> Iterator[_Raw]:
    """Lines as bytes, so that a wrong encoding is a fault of its line; blank lines are not rows."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path.name}:{number}", line


def _parquet_rows(path: Path) -> Iterator[_Raw]:
    """Rows counted from 1, read a thousand at a time."""
    # Imported here because only this kind of file needs it.
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"data.source: cannot read {path}: {error}.") from error


def _hub_rows(source: str, split: Split) -> Iterator[_Raw]:
    """Rows of a Hub dataset, through the Hub's cache."""
    # Imported here because it takes a second and only this source needs it.
    import datasets

    # Every kind is caught: the HTTP client underneath raises its own, which change from release to release.
    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise DataError(f"data.source: {source} on the Hub: {_meaning(source, split, error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}/{split}:{number}", row


def _meaning(source: str, split: Split, error: Exception) -> str:
    """What a failed download means and what to do about it."""
    page = f"https://huggingface.co/datasets/{source}"
    answer = _hub_answer(error)
    if isinstance(answer, GatedRepoError) or _status(answer) == 403:
        return f"access refused. Accept the licence on {page} and log in with `hf auth login`."
    if isinstance(answer, RepositoryNotFoundError) or isinstance(error, FileNotFoundError):
        return (
            "no such dataset, or one that your account may not see, and no such file or folder here. "
            f"Check the name; for a private or gated one see {page} and log in with `hf auth login`."
        )
    if _status(answer) == 401:
        return "not logged in, or with a token that has expired. Log in with `hf auth login`."
    if isinstance(error, ConnectionError):
        return "the Hub cannot be reached. Check the network, or give a folder that holds the downloaded files."
    return f"the {split} split cannot be loaded ({type(error).__name__}: {error}). See {page}."


def _hub_answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's own answer, which ``datasets`` wraps in errors of its own."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error


def _status(answer: HfHubHTTPError | None) -> int | None:
    return None if answer is None else answer.response.status_code


def _shown(value: object) -> str:
    """A value as an error shows it: its repr, cut to one readable line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
