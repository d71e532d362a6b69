"""Words, sentences and stems, as the rules see them.

>>> tokens("You're tired, aren't you?")
('you', "'re", 'tired', ',', 'are', "n't", 'you', '?')
>>> sentences("Oh no. That hurts!")
('Oh no.', 'That hurts!')
>>> stem("worries"), stem("worried"), stem("worrying")
('worri', 'worri', 'worri')
"""

import functools
import re

_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|[.,!?;:…—–]")
_CLITIC = re.compile(r"(.+?)(n['’]t|['’](?:s|re|m|ve|ll|d))\Z")
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+")
_VOWELS = frozenset("aeiouy")


def tokens(text: str) -> tuple[str, ...]:
    """Lower-case words and punctuation marks in order; contractions are cut ("it's" gives "it" and "'s")."""
    return tuple(part for match in _TOKEN.findall(text) for part in _cut(match.lower()))


def sentences(text: str) -> tuple[str, ...]:
    """The text cut behind each full stop, question mark or exclamation mark."""
    return tuple(part for part in _SENTENCE.split(text.strip()) if part)


def is_word(token: str) -> bool:
    """Whether a token is a word and no contraction, number or punctuation mark."""
    return token[0].isalpha() and token != "n't"


@functools.lru_cache(maxsize=65536)
def _cut(word: str) -> tuple[str, ...]:
    word = word.replace("’", "'")
    match = _CLITIC.match(word)
    if not match:
        return (word,)
    head, tail = match.groups()
    # "can't" and "won't" leave stumps that are no words of their own
    return ({"ca": "can", "wo": "will", "sha": "shall"}.get(head, head), tail)


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A crude English stem: the endings -s, -ed, -ing, -ly and -ness fall, then a final e or y."""
    for suffix in ("ness", "ingly", "edly", "ily", "ly", "ings", "ing", "ed", "s"):
        kept = word[: -len(suffix)]
        if word.endswith(suffix) and len(kept) >= 3 and _VOWELS & set(kept) and not word.endswith("ss"):
            inflected = suffix in ("ing", "ings", "ed", "ingly", "edly")
            return _trim((_undouble(kept) if inflected else kept) + ("i" if suffix == "ily" else ""), suffix)
    return _trim(word, "")


def _undouble(word: str) -> str:
    doubled = len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsaeiou"
    return word[:-1] if doubled else word


def _trim(word: str, suffix: str) -> str:
    """One spelling for happy and happily, and for hope, hopes and hoping."""
    if suffix == "s" and word.endswith(("sse", "che", "she", "xe", "ze", "oe")):
        word = word[:-1]
    if word.endswith("ie") or (word.endswith("y") and len(word) > 3):
        return word.removesuffix("ie").removesuffix("y") + "i"
    return word[:-1] if word.endswith("e") and len(word) > 3 else word
