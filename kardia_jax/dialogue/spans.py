"""The four-span grammar: what a completion must look like, and every way in which it can fail to.

In: text. Out: ``Spans``, or ``Malformed`` with the reason. ``render`` goes back.

    text      := [space] understanding [space] reasoning [space] emotion [space] response [space]
    x         := "<|x_begin|>" body "<|x_end|>"        for each of the four names x
    body      := text without any tag that is not empty once stripped; for the emotion one of the 32 labels

>>> parse("<|understanding_begin|>Lost a pet.<|understanding_end|> "
...       "<|reasoning_begin|>Grief needs room.<|reasoning_end|>"
...       "<|emotion_begin|>sad<|emotion_end|><|response_begin|> I am sorry. <|response_end|>")
Spans(understanding='Lost a pet.', reasoning='Grief needs room.', emotion='sad', response='I am sorry.')
>>> parse("<|understanding_begin|>Lost a pet.")
Malformed(reason=<Reason.UNCLOSED: 'unclosed'>, detail='<|understanding_begin|> is never closed')

A text that is wrong in several ways gets one reason: the first faulty tag from the left (unclosed, nested,
repeated, missing begin tag); if the tags pair up, then missing, out of order, text outside, empty, unknown
label, in that order of precedence.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kardia_jax.dialogue.emotions import closest_emotion, is_emotion

SPAN_NAMES = ("understanding", "reasoning", "emotion", "response")


def _begin(name: str) -> str:
    return f"<|{name}_begin|>"


def _end(name: str) -> str:
    return f"<|{name}_end|>"


TAGS: tuple[str, ...] = tuple(tag for name in SPAN_NAMES for tag in (_begin(name), _end(name)))
"""The eight special tokens, in the order in which a completion holds them."""

END_TAG = _end("response")
"""The tag that ends a completion."""

_NAMES = "|".join(SPAN_NAMES)
_TAG = re.compile(rf"<\|({_NAMES})_(begin|end)\|>")
_XML_TAG = re.compile(rf"<(/?)({_NAMES})>")


class Reason(StrEnum):
    """Every way to be wrong."""

    MISSING = "missing"
    """A span, or the begin tag of one, is not there."""
    REPEATED = "repeated"
    """A tag comes twice."""
    OUT_OF_ORDER = "out_of_order"
    """All four spans are there in another order."""
    NESTED = "nested"
    """A tag of one span stands inside another span."""
    EMPTY = "empty"
    """A span holds nothing but white space."""
    TEXT_OUTSIDE = "text_outside"
    """Text stands before, between or after the spans."""
    UNKNOWN_LABEL = "unknown_label"
    """The emotion is not one of the 32 labels."""
    UNCLOSED = "unclosed"
    """A span begins and its end tag never comes."""


@dataclass(frozen=True)
class Spans:
    """A well-formed completion: the bodies, stripped."""

    understanding: str
    reasoning: str
    emotion: str
    response: str


@dataclass(frozen=True)
class Malformed:
    """Why a text is not four spans; ``detail`` is for people."""

    reason: Reason
    detail: str


def render(spans: Spans) -> str:
    """The spans between their tags, with nothing in between: the inverse of ``parse``.

    Raises ValueError where the text would not parse back to the same spans (empty, padded or tagged text,
    or an unknown label), because such a text taught to a policy would cost it the format reward.
    """
    bodies = (spans.understanding, spans.reasoning, spans.emotion, spans.response)
    text = "".join(f"{_begin(name)}{body}{_end(name)}" for name, body in zip(SPAN_NAMES, bodies, strict=True))
    parsed = parse(text)
    if isinstance(parsed, Malformed):
        raise ValueError(f"spans: wanted text that parses back, got {parsed.reason}: {parsed.detail}.")
    if parsed != spans:
        raise ValueError(f"spans: wanted text without white space around it, got {spans!r}. Strip each span.")
    return text


def parse(text: str) -> Spans | Malformed:
    """Read four spans from ``text``, strictly: only white space between spans and around bodies is forgiven.

    Never raises, whatever the string.
    """
    tags = list(_TAG.finditer(text))
    fault = _faulty_tag(tags)
    if fault is not None:
        return fault
    bodies = {begin[1]: text[begin.end() : end.start()].strip() for begin, end in _pairs(tags)}
    return _faulty_text(bodies, _outside(text, tags)) or Spans(**bodies)


def from_xml(text: str) -> str:
    """Turn the dataset card's tags (``<emotion>sad</emotion>``) into the model's.

    For reading data, never for rewards. A text that holds any of the model's own tags comes back as it is.
    """
    if _TAG.search(text):
        return text
    return _XML_TAG.sub(lambda tag: _end(tag[2]) if tag[1] else _begin(tag[2]), text)


def _faulty_tag(tags: list[re.Match[str]]) -> Malformed | None:
    """The first tag from the left that breaks the alternation of begin and end, if one does."""
    open_name: str | None = None
    seen: set[str] = set()
    for index, tag in enumerate(tags):
        name, side = tag.groups()
        if tag[0] in seen:
            return Malformed(Reason.REPEATED, f"{tag[0]} comes twice")
        if open_name is not None and (name, side) != (open_name, "end"):
            return _intruder(tag[0], open_name, tags[index:])
        if open_name is None and side == "end":
            return Malformed(Reason.MISSING, f"{_begin(name)} is missing")
        seen.add(tag[0])
        open_name = name if side == "begin" else None
    return None if open_name is None else _unclosed(open_name)


def _intruder(tag: str, open_name: str, rest: list[re.Match[str]]) -> Malformed:
    """A tag inside an open span: nested where that span does close later, else the open span is the fault."""
    if any(later[0] == _end(open_name) for later in rest):
        return Malformed(Reason.NESTED, f"{tag} stands inside the {open_name} span")
    return _unclosed(open_name)


def _unclosed(name: str) -> Malformed:
    return Malformed(Reason.UNCLOSED, f"{_begin(name)} is never closed")


def _pairs(tags: list[re.Match[str]]) -> list[tuple[re.Match[str], re.Match[str]]]:
    return list(zip(tags[::2], tags[1::2], strict=True))


def _outside(text: str, tags: list[re.Match[str]]) -> str:
    """What stands before, between and after the spans."""
    ends = [0, *(end.end() for _, end in _pairs(tags))]
    begins = [*(begin.start() for begin, _ in _pairs(tags)), len(text)]
    return "".join(text[end:begin] for end, begin in zip(ends, begins, strict=True)).strip()


def _faulty_text(bodies: Mapping[str, str], outside: str) -> Malformed | None:
    """What is wrong with spans whose tags pair up, in the order of the module docstring."""
    missing = [name for name in SPAN_NAMES if name not in bodies]
    if missing:
        return Malformed(Reason.MISSING, f"the {missing[0]} span is missing")
    if tuple(bodies) != SPAN_NAMES:
        return Malformed(Reason.OUT_OF_ORDER, f"the spans come as {', '.join(bodies)}")
    if outside:
        return Malformed(Reason.TEXT_OUTSIDE, f"text outside the spans: {outside[:60]!r}")
    empty = [name for name in SPAN_NAMES if not bodies[name]]
    if empty:
        return Malformed(Reason.EMPTY, f"the {empty[0]} span is empty")
    emotion = bodies["emotion"]
    if not is_emotion(emotion):
        near = closest_emotion(emotion)
        hint = f"; the closest label is {near!r}" if near else ""
        return Malformed(Reason.UNKNOWN_LABEL, f"{emotion[:60]!r} is not one of the 32 labels{hint}")
    return None
