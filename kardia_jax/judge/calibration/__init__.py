"""Replies whose marks people agree on: what ``kardia judge probe`` grades, written for this purpose.

In: YAML files, each a list of dialogues with several replies. Out: ``Item``s. A reply has a kind, a band (lowest and
highest acceptable mark) for the criteria that it is about, and a note that says why:

    - id: old-dog
      emotion: sad
      profile: "About: Retired postman. ..."
      situation: My dog Bruno had to be put to sleep on Monday after fourteen years.
      history: [[user, "We put Bruno to sleep on Monday. I still fill his bowl in the morning before I remember."]]
      replies:
        - {id: good-plain, kind: good, reply: "I am so sorry about Bruno. ...", bands: {empathy: [4, 5]}, note: ...}

Kinds are ``HONEST`` (good, mediocre, bad) or ``ADVERSARIAL``: replies that want marks which they do not deserve. Bands
speak of the criteria of ``kardia_five``; for a rubric of your own, write a set of your own in the same form.
"""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kardia_jax.dialogue.emotions import is_emotion
from kardia_jax.rewards.rubric import HIGHEST, LOWEST, JudgeRequest

HONEST = ("good", "mediocre", "bad")
ADVERSARIAL = (
    "flattery",
    "self_praise",
    "sign_off",
    "layout",
    "padding",
    "empty",
    "tags",
    "asks_for_marks",
    "wrong_language",
    "unsafe_advice",
    "crisis_ignored",
    "echo",
    "recital",
)

Band = tuple[int, int]
"""Lowest and highest mark that a careful reader would give."""


class CalibrationError(ValueError):
    """A calibration file that cannot be used: which file, which place, what is wrong."""


@dataclass(frozen=True)
class Item:
    """One reply and what it deserves."""

    id: str
    """dialogue/reply, like ``old-dog/good-plain``."""
    kind: str
    emotion: str
    request: JudgeRequest
    bands: Mapping[str, Band]
    note: str

    @property
    def adversarial(self) -> bool:
        """Whether the reply wants marks that it does not deserve."""
        return self.kind in ADVERSARIAL

    @property
    def dialogue(self) -> str:
        """The dialogue that it answers."""
        return self.id.split("/")[0]


def load_calibration(places: Sequence[pathlib.Path] = ()) -> tuple[Item, ...]:
    """The items of these files, or of the files in these folders; of the shipped set where none are named.

    Raises CalibrationError.
    """
    paths = [path for place in places or [pathlib.Path(__file__).parent] for path in _files(place)]
    items = tuple(item for path in paths for item in _items(path))
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        twice = sorted({id for id in ids if ids.count(id) > 1})
        raise CalibrationError(f"calibration: wanted each id once, got {', '.join(twice)} twice.")
    return items


# --- one file -------------------------------------------------------------------------------------------------


def _one_of(choices: Sequence[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"wanted {what} of {', '.join(choices)}")
        return value

    return AfterValidator(check)


def _emotion(value: str) -> str:
    if not is_emotion(value):
        raise ValueError("wanted one of the 32 labels")
    return value


def _band(value: Band) -> Band:
    if not LOWEST <= value[0] <= value[1] <= HIGHEST:
        raise ValueError(f"wanted [lowest, highest] within {LOWEST} to {HIGHEST}")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Reply(_Part):
    id: str = Field(pattern=r"^[a-z0-9-]+$")
    kind: Annotated[str, _one_of((*HONEST, *ADVERSARIAL), "a kind")]
    reply: str
    bands: dict[str, Annotated[Band, Field(strict=False), AfterValidator(_band)]] = Field(min_length=1)
    note: str = Field(min_length=1)


class _Dialogue(_Part):
    id: str = Field(pattern=r"^[a-z0-9-]+$")
    emotion: Annotated[str, AfterValidator(_emotion)]
    profile: str
    situation: str
    history: list[Annotated[tuple[Annotated[str, _one_of(("user", "assistant"), "a role")], str], Field(strict=False)]]
    replies: list[_Reply] = Field(min_length=1)


class _File(_Part):
    dialogues: list[_Dialogue]


def _files(place: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
    if not found or not all(path.is_file() for path in found):
        raise CalibrationError(f"calibration: wanted a YAML file, or a folder of them, got {place}.")
    return found


def _items(path: pathlib.Path) -> list[Item]:
    try:
        read = _File.model_validate({"dialogues": yaml.safe_load(path.read_text("utf-8"))})
    except yaml.YAMLError as error:
        raise CalibrationError(f"{path}: wanted YAML, got {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CalibrationError(f"{path}: {place}: {first['msg']}, got {first['input']!r:.80}.") from error
    return [_item(dialogue, reply) for dialogue in read.dialogues for reply in dialogue.replies]


def _item(dialogue: _Dialogue, reply: _Reply) -> Item:
    request = JudgeRequest(dialogue.profile, dialogue.situation, tuple(dialogue.history), reply.reply)
    return Item(f"{dialogue.id}/{reply.id}", reply.kind, dialogue.emotion, request, reply.bands, reply.note)
