"""The word lists behind the rules, read once from ``words/``.

Word classes are letters (``word_classes.tsv``); a word has a string of them, for instance "light" is "ANV".
Families of feelings carry a valence: +1 pleasant, -1 unpleasant, 0 either.

>>> classes("light"), classes("gardens"), classes("flurble")
('ANV', 'NZ', '')
>>> feeling("worried")
(Feeling(family='fear', valence=-1),)
"""

import functools
import re
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

from kardia_jax.judge.rules.text import stem


class Feeling(NamedTuple):
    """What one word says about a feeling."""

    family: str
    valence: int


def _lines(name: str) -> Iterator[str]:
    text = resources.files("kardia_jax.judge.rules").joinpath("words", name).read_text("utf-8")
    return (line for line in text.splitlines() if line and not line.startswith("#"))


def _rows(name: str) -> Iterator[list[str]]:
    return (line.split("\t") for line in _lines(name))


def _words(name: str) -> Iterator[str]:
    return (word for line in _lines(name) for word in line.split())


# --- word classes -------------------------------------------------------------------------------------------


def classes(word: str) -> str:
    """The classes of a lower-case word, or "" when no list knows it."""
    return _class_table().get(word, "")


@functools.cache
def _class_table() -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for word, letters in (pair for name in ("nouns", "verbs", "adjectives") for pair in _inflected(name)):
        found.setdefault(word, set()).update(letters)
    for word, letters, *_ in _rows("irregular.tsv"):
        found.setdefault(word, set()).update(letters)
    # A function word's own line is the whole truth: "can" is no noun here, though nouns.txt may list it.
    found.update({word: set(letters) for word, letters in _rows("function_words.tsv")})
    return {word: "".join(sorted(letters)) for word, letters in found.items()}


def _inflected(name: str) -> Iterator[tuple[str, str]]:
    forms = {"nouns": _noun_forms, "verbs": _verb_forms, "adjectives": _adjective_forms}[name]
    return (pair for word in _words(f"{name}.txt") for pair in forms(word))


def _noun_forms(word: str) -> list[tuple[str, str]]:
    return [(word, "N"), (_with_s(word), "N")]


def _verb_forms(word: str) -> list[tuple[str, str]]:
    ings = [_joined(word, "ing"), *([word + word[-1] + "ing"] if _doubles(word) else [])]
    eds = [_joined(word, "ed"), *([word + word[-1] + "ed"] if _doubles(word) else [])]
    return [
        (word, "V"),
        (_with_s(word), "Z"),
        *((form, "G") for form in ings),
        *((form, "PEA") for form in eds),
    ]


def _adjective_forms(word: str) -> list[tuple[str, str]]:
    stems = [word, *([word + word[-1]] if _doubles(word) else [])]
    grades = [(_joined(part, ending), "A") for part in stems for ending in ("er", "est")]
    return [(word, "A"), *grades, (_adverb(word), "R")]


def _adverb(word: str) -> str:
    if word.endswith("le") and len(word) > 4:
        return word[:-1] + "y"
    if word.endswith("ic"):
        return word + "ally"
    return word[:-1] + "ily" if word.endswith("y") and len(word) > 3 else word + "ly"


def _with_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    consonant_y = word.endswith("y") and word[-2:-1] not in "aeiou"
    return word[:-1] + "ies" if consonant_y else word + "s"


def _joined(word: str, ending: str) -> str:
    if word.endswith("ie") and ending == "ing":
        return word[:-2] + "ying"
    if word.endswith("e") and not (ending == "ing" and word.endswith(("ee", "oe", "ye"))):
        return word[:-1] + ending
    if word.endswith("y") and word[-2:-1] not in "aeiou" and ending != "ing":
        return word[:-1] + "i" + ending
    return word + ending


def _doubles(word: str) -> bool:
    return bool(re.fullmatch(r"\w*[^aeiou][aeiou][bdgklmnprt]", word))


@functools.cache
def follow_costs() -> dict[str, dict[str, float]]:
    """What it costs a class to follow another: 0 when it may, 0.5 with doubt; a pair not listed costs 1."""
    costs: dict[str, dict[str, float]] = {}
    for letter, _, sure, doubtful in _rows("word_classes.tsv"):
        costs[letter] = dict.fromkeys(doubtful, 0.5) | dict.fromkeys(sure, 0.0)
    return costs


@functools.cache
def bad_pairs() -> frozenset[tuple[str, str]]:
    """Neighbouring words that no English sentence holds."""
    pairs = (line.split() for line in _lines("bad_pairs.txt"))
    return frozenset((first, second) for first, second, *rest in pairs if not rest)


# --- meaning ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=65536)
def key(word: str) -> str:
    """The stem under which all forms of a word meet: "wrote", "writing" and "writes" give "writ"."""
    return stem(_bases().get(word, word))


@functools.cache
def _bases() -> dict[str, str]:
    return {form: base for form, _, base in _rows("irregular.tsv")}


@functools.lru_cache(maxsize=65536)
def feeling(word: str) -> tuple[Feeling, ...]:
    """The families of feelings that a word names, most words none."""
    return _by_key("feelings.tsv").get(key(word), ())


@functools.lru_cache(maxsize=65536)
def event(word: str) -> tuple[Feeling, ...]:
    """The feelings that an event's word suggests ("funeral": sadness)."""
    return _by_key("events.tsv").get(key(word), ())


@functools.cache
def _by_key(name: str) -> dict[str, tuple[Feeling, ...]]:
    valences = {"+": 1, "-": -1, "0": 0}
    found: dict[str, tuple[Feeling, ...]] = {}
    for family, sign, words in _rows(name):
        for stemmed in {key(word) for word in words.split()}:
            found[stemmed] = (*found.get(stemmed, ()), Feeling(family, valences[sign]))
    return found


@functools.cache
def _keys(name: str) -> frozenset[str]:
    return frozenset(key(word) for word in _words(name))


def is_interest(word: str) -> bool:
    """Whether a word names a pastime that a reply may wrongly ascribe to a person."""
    return key(word) in _keys("interests.txt")


@functools.lru_cache(maxsize=65536)
def specific(word: str) -> str:
    """The stem of a content word that tells something of a situation or a person, "" for other tokens."""
    return _content(word) if key(word) not in _keys("general_stems.txt") else ""


@functools.lru_cache(maxsize=65536)
def general(word: str) -> str:
    """The stem of a content word that says little alone ("friend", "night"), "" for every other token."""
    return _content(word) if key(word) in _keys("general_stems.txt") else ""


def _content(word: str) -> str:
    wordlike = len(word) > 2 and word[0].isalpha() and word not in _function_words()
    stop = key(word) in _keys("stop_stems.txt") or key(word) in _by_key("feelings.tsv")
    return key(word) if wordlike and not stop else ""


@functools.cache
def _function_words() -> frozenset[str]:
    return frozenset(row[0] for row in _rows("function_words.tsv"))


# --- phrases ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8192)
def phrase(group: str, lower: str) -> str:
    """What the first phrase of ``group`` in a lower-cased text is called, or "" when there is none."""
    pattern, names = _phrases()[group]
    match = pattern.search(lower)
    return names[match.lastgroup] if match and match.lastgroup else ""


def phrases(group: str, lower: str) -> int:
    """How many phrases of ``group`` the lower-cased text holds."""
    return sum(1 for _ in _phrases()[group][0].finditer(lower))


@functools.cache
def _phrases() -> dict[str, tuple[re.Pattern[str], dict[str, str]]]:
    """Per group one pattern, with a named group per line of ``phrases.tsv``, and the lines' names."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for group, name, pattern in _rows("phrases.tsv"):
        lines.setdefault(group, []).append((name, pattern))
    return {group: _one_pattern(found) for group, found in lines.items()}


def _one_pattern(lines: list[tuple[str, str]]) -> tuple[re.Pattern[str], dict[str, str]]:
    options = "|".join(f"(?P<line{number}>{pattern})" for number, (_, pattern) in enumerate(lines))
    names = {f"line{number}": name for number, (name, _) in enumerate(lines)}
    return re.compile(rf"(?<!\w)(?:{options})(?!\w)"), names
