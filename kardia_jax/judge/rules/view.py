"""What the rules look at: the talk and the profile read once per prompt, the reply read once per completion.

In: a ``JudgeRequest``. Out: a ``View``. Words that the reply copies from the talk or the profile (seven or
more in a row, also with "my" turned into "your") are set aside: they count as nobody's own words.

>>> said = (("user", "They fired me."),)
>>> view = look(JudgeRequest("About: She bakes bread.", "I lost my job.", said, "Bake bread."))
>>> view.talk.mood, sorted(view.profile.stems), view.reply.sentences[0].words
(-3, ['bak', 'bread'], ('bake', 'bread', '.'))
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kardia_jax.judge.rules.grammar import faults
from kardia_jax.judge.rules.lexicon import classes, event, feeling, general, key, phrase, specific
from kardia_jax.judge.rules.text import is_word, sentences, tokens
from kardia_jax.rewards.rubric import JudgeRequest

COPY_RUN = 7
"""Words in a row that make a copy; shorter runs are the common stock of the language."""
Runs = frozenset[tuple[str, ...]]
"""Runs of words that would be copies."""
_FLIPPED = {
    "i": "you",
    "me": "you",
    "my": "your",
    "mine": "yours",
    "myself": "yourself",
    "am": "are",
    "'m": "'re",
}
_HEADERS = re.compile(r"^\s*(?:mbti|about|signature|recent activit(?:y|ies)|activities)\s*:\s*", re.I | re.M)
_FACT = re.compile(r"[.,;!?\n•|]+|\band\b|\s-\s")
_NEGATIONS = frozenset(("not", "n't", "never", "no", "without", "hardly"))


@dataclass(frozen=True)
class Profile:
    """The profile's specific stems, and the same sorted into facts (about one clause or list item each)."""

    stems: frozenset[str]
    facts: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Talk:
    """Situation and user turns."""

    recent: frozenset[str]
    """Specific stems of the user's last turn."""
    topic: frozenset[str]
    """Specific stems of the situation and all user turns."""
    general: frozenset[str]
    """General stems of the same: two of them together are worth one specific stem."""
    families: frozenset[str]
    """Families of the feelings that the user names or that the events suggest."""
    mood: int
    """Summed valence: above 0 pleasant, below unpleasant; a named feeling weighs more than an event."""
    mixed: bool
    """Whether pleasant and unpleasant words stand against each other, so that the mood may be misread."""
    crisis: str
    """The name of a sign of crisis, or ""."""
    known: frozenset[str]
    """Every word that was said and its stem: names and rare words in it are no strangers in a reply."""


@dataclass(frozen=True)
class Sentence:
    """One sentence of the reply."""

    words: tuple[str, ...]
    own: tuple[str, ...]
    """The words without those that are copied from talk or profile."""
    stems: frozenset[str]
    """Specific stems of the own words."""
    general: frozenset[str]
    """General stems of the own words."""
    faults: float
    question: bool

    @property
    def sound(self) -> bool:
        """Whether the sentence can be trusted to mean what its words mean."""
        return self.faults < 1


@dataclass(frozen=True)
class Reply:
    """The reply, taken apart."""

    lower: str
    sentences: tuple[Sentence, ...]
    words: tuple[str, ...]
    """Words alone, no punctuation."""
    own_words: tuple[str, ...]
    copied_share: float
    """Share of the words that are copied from talk or profile."""
    copied_profile: bool
    small_starts: int
    """Sentences that begin with a small letter."""
    strangers: tuple[str, ...]
    """Words that no list and nothing in the request knows."""

    @property
    def to_you(self) -> bool:
        """Whether the reply speaks to the person."""
        return any(word in ("you", "your", "yourself", "yours") for word in self.own_words)


@dataclass(frozen=True)
class View:
    """Everything that the five rules read."""

    profile: Profile
    talk: Talk
    reply: Reply


def look(request: JudgeRequest) -> View:
    """Read one request."""
    said = tuple(text for role, text in request.history if role == "user")
    profile, talk = read_profile(request.profile), read_talk(request.situation, said)
    heard = copies_of((request.situation, *said))
    return View(profile, talk, _read_reply(request.reply, talk, profile, heard, copies_of((request.profile,))))


@functools.lru_cache(maxsize=4096)
def read_profile(text: str) -> Profile:
    """The profile's facts, each as the set of its specific stems."""
    body = _HEADERS.sub("", text)
    parts = (_specific_stems(tokens(part)) for part in _FACT.split(body))
    facts = tuple(part for part in parts if part)
    stems = frozenset().union(*facts)
    return Profile(stems, facts)


@functools.lru_cache(maxsize=4096)
def read_talk(situation: str, said: tuple[str, ...]) -> Talk:
    """What the person has told, with the last turn counted twice for the feeling."""
    last = tokens(said[-1]) if said else tokens(situation)
    everything = tokens(" . ".join((situation, *said)))
    tally = _feeling_tally(everything) + _feeling_tally(last)
    lower = " ".join((situation, *said)).lower()
    return Talk(
        recent=_specific_stems(last),
        topic=_specific_stems(everything),
        general=_general_stems(everything),
        families=frozenset(family for family, _ in tally),
        mood=mood(tally),
        mixed=sum(tally.values()) > 2 * abs(mood(tally)),
        crisis=phrase("crisis", lower),
        known=frozenset(everything) | {key(word) for word in everything},
    )


@functools.lru_cache(maxsize=4096)
def copies_of(texts: tuple[str, ...]) -> Runs:
    """Every run of ``COPY_RUN`` words in the texts, as said and with the speaker's words turned round."""
    runs: set[tuple[str, ...]] = set()
    for text in texts:
        words = tuple(word for word in tokens(text) if _spoken(word))
        turned = tuple(_FLIPPED.get(word, word) for word in words)
        for line in (words, turned):
            runs.update(line[start : start + COPY_RUN] for start in range(len(line) - COPY_RUN + 1))
    return frozenset(runs)


def feelings_in(words: Iterable[str]) -> Counter[tuple[str, int]]:
    """(family, valence) of the feelings that are named; a negation up to two words before turns it."""
    found: Counter[tuple[str, int]] = Counter()
    last_two: tuple[str, ...] = ()
    for word in words:
        turned = -1 if _NEGATIONS & set(last_two) else 1
        for family, valence in feeling(word):
            found[(family if turned == 1 else "", turned * valence)] += 1
        last_two = (*last_two, word)[-2:]
    return found


def mood(tally: Counter[tuple[str, int]]) -> int:
    """The summed valence."""
    return sum(valence * count for (_, valence), count in tally.items())


def _feeling_tally(words: tuple[str, ...]) -> Counter[tuple[str, int]]:
    events: Counter[tuple[str, int]] = Counter((family, valence) for word in words for family, valence in event(word))
    named = feelings_in(words)
    return named + named + events


def _specific_stems(words: Iterable[str]) -> frozenset[str]:
    return frozenset(filter(None, map(specific, words)))


def _general_stems(words: Iterable[str]) -> frozenset[str]:
    return frozenset(filter(None, map(general, words)))


def _read_reply(text: str, talk: Talk, profile: Profile, heard: Runs, profile_runs: Runs) -> Reply:
    parts = [tokens(part) for part in sentences(text)]
    flat = tuple(word for part in parts for word in part if _spoken(word))
    from_profile = _copied(flat, profile_runs)
    copied = [one or other for one, other in zip(_copied(flat, heard), from_profile, strict=True)]
    marks = iter(copied)
    owns = [tuple(word for word in part if not (_spoken(word) and next(marks))) for part in parts]
    words = tuple(word for word in flat if is_word(word))
    return Reply(
        lower=" ".join(text.lower().replace("’", "'").split()),
        sentences=tuple(_sentence(part, own) for part, own in zip(parts, owns, strict=True) if part),
        words=words,
        own_words=tuple(word for own in owns for word in own),
        copied_share=sum(copied) / len(flat) if flat else 0.0,
        copied_profile=any(from_profile),
        small_starts=sum(part[0].islower() for part in sentences(text)),
        strangers=tuple(word for word in words if not _familiar(word, talk, profile)),
    )


@functools.lru_cache(maxsize=16384)
def _sentence(words: tuple[str, ...], own: tuple[str, ...]) -> Sentence:
    return Sentence(words, own, _specific_stems(own), _general_stems(own), faults(words), "?" in words)


def _familiar(word: str, talk: Talk, profile: Profile) -> bool:
    return bool(classes(word)) or word in talk.known or key(word) in talk.known | profile.stems


def _spoken(token: str) -> bool:
    """Whether a token is no punctuation mark."""
    return token[0].isalnum() or token[0] == "'"


def _copied(words: tuple[str, ...], runs: Runs) -> list[bool]:
    """For each word whether it stands in a copied run."""
    marked = [False] * len(words)
    for start in range(len(words) - COPY_RUN + 1):
        if words[start : start + COPY_RUN] in runs:
            marked[start : start + COPY_RUN] = [True] * COPY_RUN
    return marked
