"""The hand-written material of the mini set, read from the text files in ``material/``.

In: blocks of ``key: text`` lines under a ``[name]``; a key that comes again adds to its list; ``#`` begins a
comment line; personas and roles are one line each, with bars between the fields.

    [angry/sold]
    slots: person=sibling object=bike|record player
    situation: My {person} sold my {object} without asking me first.
    event: their {person} sold the {object} without asking        (third person, for the understanding span)
    open: My {person} sold my {object} and never asked me.        (the user's first turn)
    take: Your {person} had no right to sell that {object}.       (a reply takes up a word of it)
    more: I saved for it for two years. => Two years of saving is a lot to lose.     (a later turn, its reply)

Out: frozen dataclasses, one per kind. A slot lists its choices, or names a list of ``fillers.txt``; a person
carries the pronoun after a slash (``sister/she``).

>>> load().emotions["angry"].words
('angry', 'anger', 'angrily')
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from kardia_jax.dialogue.mini.filling import fill

Mode = Literal["ease", "lift"]
"""What a reply may do with a persona's activity: ease a hard feeling, or lift a good one further."""

Texts = tuple[str, ...]
Blocks = dict[str, dict[str, Texts]]

_SLOT = re.compile(r"(\w+)=")


@dataclass(frozen=True)
class Emotion:
    """One label, the cue that decides for it, and the sentences that go with it."""

    label: str
    cue: str
    words: Texts
    """The label and its inflections: a row names its label if the user says one of these."""
    share: int
    """Relative frequency."""
    mode: Mode
    shades: Texts
    needs: Texts
    acks: Texts
    said: Texts
    tails: Texts
    nexts: Texts


@dataclass(frozen=True)
class More:
    """A later user turn, and the sentence that takes it up."""

    text: str
    take: str


@dataclass(frozen=True)
class Situation:
    """Something that happened, with slots."""

    name: str
    emotion: str
    slots: Mapping[str, Texts]
    situation: str
    event: str
    opens: Texts
    takes: Texts
    mores: tuple[More, ...]


@dataclass(frozen=True)
class Pastime:
    """An activity or an occupation: its words in the profile, why it matters, and sentences that use it."""

    text: str
    why: str
    ties: Mapping[Mode, Texts]


@dataclass(frozen=True)
class Persona:
    """One profile; ``train`` and ``test`` share none."""

    split: str
    username: str
    mbti: str
    role: str
    about: str
    signature: str
    activities: Texts

    @property
    def temper(self) -> str:
        """First and third letter of the MBTI type, which pick how the reasoning span describes the person."""
        return self.mbti[0] + self.mbti[2]


@dataclass(frozen=True)
class Material:
    """Everything that was written by hand."""

    emotions: Mapping[str, Emotion]
    situations: Mapping[str, tuple[Situation, ...]]
    """By label."""
    activities: Mapping[str, Pastime]
    roles: Mapping[str, Pastime]
    personas: tuple[Persona, ...]
    frames: Mapping[str, Mapping[str, Texts]]


@functools.cache
def load() -> Material:
    """Read all files; raises ValueError for a line that fits no rule."""
    fillers = {name: lists[""] for name, lists in _lists("fillers.txt").items()}
    situations: dict[str, list[Situation]] = {}
    for name, block in sorted(_situation_blocks().items()):
        situation = _situation(name, block, fillers)
        situations.setdefault(situation.emotion, []).append(situation)
    return Material(
        emotions={name: _emotion(name, block) for name, block in _blocks("emotions.txt").items()},
        situations={label: tuple(found) for label, found in situations.items()},
        activities={name: _activity(block) for name, block in _blocks("activities.txt").items()},
        roles={fields[0]: _role(fields) for fields in _tables("roles.txt")},
        personas=tuple(_persona(fields) for fields in _tables("personas.txt")),
        frames=_blocks("frames.txt"),
    )


def _lines(file: str) -> list[str]:
    """The lines of a material file that are neither empty nor comments."""
    text = resources.files("kardia_jax.dialogue.mini").joinpath("material", file).read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _tables(file: str) -> list[Texts]:
    return [_split(line) for line in _lines(file)]


def _split(text: str) -> Texts:
    return tuple(part.strip() for part in text.split("|"))


def _pair(line: str, mark: str, file: str) -> tuple[str, str]:
    left, found, right = line.partition(mark)
    if not found:
        raise ValueError(f"{file}: wanted a line with {mark.strip()!r}, got {line!r}.")
    return left.strip(), right.strip()


def _lists(file: str) -> Blocks:
    """Lines ``name: choice | choice``."""
    pairs = [_pair(line, ":", file) for line in _lines(file)]
    return {name: {"": _split(choices)} for name, choices in pairs}


def _blocks(file: str) -> Blocks:
    """``[name]`` headings with ``key: text`` lines under them."""
    blocks: Blocks = {}
    block: dict[str, Texts] = {}
    for line in _lines(file):
        if line.startswith("["):
            block = blocks.setdefault(line.strip("[]"), {})
        else:
            key, text = _pair(line, ":", file)
            block[key] = (*block.get(key, ()), text)
    return blocks


def _situation_blocks() -> Blocks:
    names = [entry.name for entry in resources.files("kardia_jax.dialogue.mini").joinpath("material").iterdir()]
    blocks: Blocks = {}
    for file in sorted(name for name in names if name.startswith("situations_")):
        blocks |= _blocks(file)
    return blocks


def _mode(text: str) -> Mode:
    if text == "ease":
        return "ease"
    if text == "lift":
        return "lift"
    raise ValueError(f"emotions.txt: mode: wanted ease or lift, got {text!r}.")


def _emotion(label: str, block: Mapping[str, Texts]) -> Emotion:
    return Emotion(
        label=label,
        cue=block["cue"][0],
        words=tuple(block["words"][0].split()),
        share=int(block["share"][0]),
        mode=_mode(block["mode"][0]),
        shades=block["shade"],
        needs=block["need"],
        acks=block["ack"],
        said=block["said"],
        tails=block["tail"],
        nexts=block["next"],
    )


def _situation(name: str, block: Mapping[str, Texts], fillers: Mapping[str, Texts]) -> Situation:
    parts = _SLOT.split(block.get("slots", ("",))[0])[1:]
    choices = zip(parts[::2], parts[1::2], strict=True)
    return Situation(
        name=name,
        emotion=name.partition("/")[0],
        slots={slot: fillers.get(text.strip(), _split(text)) for slot, text in choices},
        situation=block["situation"][0],
        event=block["event"][0],
        opens=block["open"],
        takes=block["take"],
        mores=tuple(More(*_pair(text, "=>", name)) for text in block["more"]),
    )


def _activity(block: Mapping[str, Texts]) -> Pastime:
    return Pastime(block["text"][0], block["why"][0], {"ease": block["ease"], "lift": block["lift"]})


def _role(fields: Texts) -> Pastime:
    ease, lift = (_pair(field, ":", "roles.txt")[1] for field in fields[1:])
    why = fill(f"Their life as a {fields[0]} matters", {}, "report")
    return Pastime(fields[0], why, {"ease": (ease,), "lift": (lift,)})


def _persona(fields: Texts) -> Persona:
    *head, activities = fields
    return Persona(*head, activities=tuple(name.strip() for name in activities.split(",")))
