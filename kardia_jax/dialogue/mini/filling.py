"""Filling slots so that the sentence stays English: pronouns, whose "my" it is, "a" or "an", capitals.

In: a template and the values of its slots. Out: a sentence.

>>> values = slot_values({"person": "sister/she", "place": "empty park"})
>>> fill("my {person} lost {his} ring in a {place}. {he} wept.", values, "user")
'My sister lost her ring in an empty park. She wept.'

A value that holds "my" or "our" was written from the user's side; the reply says "your", the understanding
span "their".
"""

import re
from collections.abc import Mapping
from typing import Literal

Voice = Literal["user", "reply", "report"]
"""Who speaks: the user, the assistant to the user, or the assistant about the user."""

_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}
_OWNERS: dict[Voice, dict[str, str]] = {
    "user": {},
    "reply": {"my": "your", "our": "your", "me": "you", "us": "you"},
    "report": {"my": "their", "our": "their", "me": "them", "us": "them"},
}
_OWNER = re.compile(r"\b(my|our|me|us)\b")
_FIELD = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa])n? (?=(\w+))")
_VOWEL_SOUND = re.compile(r"(?!one|uni|us|eu)[aeiou]|hour|honest|honor", re.IGNORECASE)
_START = re.compile(r"(^|[.!?] )([a-z])")


def slot_values(choices: Mapping[str, str]) -> dict[str, str]:
    """The values of all slots; ``sister/she`` also sets he, him, his and himself."""
    values: dict[str, str] = {}
    for slot, choice in choices.items():
        text, _, pronoun = choice.partition("/")
        values[slot] = text
        if pronoun:
            values |= _PRONOUNS[pronoun]
    return values


def fits(template: str, values: Mapping[str, str]) -> bool:
    """Whether every slot of the template has a value."""
    return all(slot.lower() in values for slot in _FIELD.findall(template))


def fill(template: str, values: Mapping[str, str], voice: Voice) -> str:
    """The template as a sentence; a capitalised slot (``{He}``) capitalises its value."""
    text = _FIELD.sub(lambda slot: _value(slot[1], values, voice), template)
    text = _ARTICLE.sub(lambda article: article[1] + _article_end(article[2]), text)
    return _START.sub(lambda start: start[1] + start[2].upper(), text)


def _value(slot: str, values: Mapping[str, str], voice: Voice) -> str:
    owners = _OWNERS[voice]
    text = _OWNER.sub(lambda owner: owners.get(owner[1], owner[1]), values[slot.lower()])
    return text if slot[0].islower() else text[0].upper() + text[1:]


def _article_end(word: str) -> str:
    return "n " if _VOWEL_SOUND.match(word) else " "
