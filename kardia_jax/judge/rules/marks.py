"""The five rules: each reads a ``View`` and gives a whole mark from 1 to 5 with its reason.

Every rule is a cascade: the first line that fits decides. The marks follow the level descriptions of
``rewards/rubrics/kardia_five.yaml``; what each rule looks at is told in ``judge/rules/__init__.py``.

>>> from kardia_jax.judge.rules.view import look
>>> from kardia_jax.rewards.rubric import JudgeRequest
>>> view = look(JudgeRequest("About: She bakes bread.", "I lost my job.", (("user", "They fired me."),), ""))
>>> fluency(view)
(1, 'says nothing')
"""

from collections.abc import Sequence

from kardia_jax.judge.rules.lexicon import is_interest, key, phrase, phrases
from kardia_jax.judge.rules.view import Sentence, View, feelings_in, mood

Judged = tuple[int, str]
"""A mark and its reason."""

IDEAL_WORDS = 32
"""About thirty tokens are wanted; from here on length costs."""
LONG_WORDS = 48
PADDED_WORDS = 70
CLEAR_MOOD = 3
"""Summed valence from which a talk is clearly pleasant or unpleasant."""


def relevance(view: View) -> Judged:
    """Own, concrete words of the talk in sound sentences; copies, vagueness and rambling are marked down."""
    reply, talk = view.reply, view.talk
    if off_stage := _off_stage(view):
        return 1, off_stage
    if reply.copied_share > 0.4:
        return 1, "repeats sentences that were already there"
    statements = [line for line in reply.sentences if line.sound and not line.question]
    hits = _hits(statements, view)
    asked = _hits([line for line in reply.sentences if line.sound], view)
    if not hits:
        return (2, f"only asks about {_spelled(asked, view)}") if asked else (1, "names nothing of the situation")
    near = hits & (talk.recent if len(talk.recent) > 1 else talk.topic)
    mark, reason = _closeness(len(hits), len(near), _spelled(near or hits, view))
    aside = sum(not line.stems & (talk.topic | view.profile.stems) for line in reply.sentences)
    if aside >= 3:
        mark = min(mark, 3)
        reason += f", among {aside} sentences beside the point"
    if reply.copied_share > 0:
        mark = min(mark, 3)
        reason += ", partly in copied words"
    return mark, reason


def _hits(lines: Sequence[Sentence], view: View) -> frozenset[str]:
    """What these sentences take up from the talk: concrete words, and general ones when there are two."""
    common = frozenset(stem for line in lines for stem in line.general) & view.talk.general
    pair = frozenset((" and ".join(sorted(common)[:2]),)) if len(common) > 1 else frozenset()
    return (_stems(lines) & view.talk.topic) | pair


def _closeness(hits: int, near: int, some: str) -> Judged:
    if hits >= 2 and near:
        return 5, f"answers the point with its details ({some})"
    if near:
        return 4, f"answers the last message with one detail ({some})"
    return (4 if hits >= 2 else 3), f"points to the situation ({some}), not to the last message"


def empathy(view: View) -> Judged:
    """A feeling of the right kind, tied to its cause; dismissal and self-talk come last."""
    if against := _against(view):
        return 1, against
    sound = [line for line in view.reply.sentences if line.sound and not phrase("sign_off", " ".join(line.words))]
    if opposed := _opposed(sound, view):
        return 1, f"answers another feeling ({opposed})"
    families = {family for line in sound for family, _ in feelings_in(line.own) if family}
    if len(families) > 4:
        return 2, f"lists feelings ({_some(families)})"
    if phrase("flattery", view.reply.lower):
        return 2, "flatters instead of understanding"
    frame = phrase("acknowledge", " ".join(" ".join(line.words) for line in sound))
    if not frame and not families:
        return 2, "does not speak of the feeling"
    return _depth(view, frame, families, bool(_hits(sound, view)))


def _opposed(sound: Sequence[Sentence], view: View) -> str:
    """Families in the acknowledgement that go against a clear mood of the talk, or "".

    Only the first sentence and those with an acknowledging phrase count: comfort that is offered later ("a
    walk may calm you") is no misreading.
    """
    said = [line for line in sound if line is sound[0] or phrase("acknowledge", " ".join(line.own))]
    tally = feelings_in(word for line in said for word in line.own)
    talk = view.talk
    against = abs(talk.mood) >= CLEAR_MOOD and not talk.mixed and talk.mood * mood(tally) < 0
    families = {family for family, valence in tally if family and valence * talk.mood < 0}
    return _some(families) if against and not families & talk.families else ""


def _depth(view: View, frame: str, families: set[str], tied: bool) -> Judged:
    named = families & view.talk.families
    what = _some(named or families) or frame
    if tied and named and (frame or view.reply.to_you):
        return 5, f"meets the feeling ({what}) and ties it to its cause"
    if tied:
        return 4, f"acknowledges ({what}) and names the cause"
    if frame and named and view.reply.to_you:
        return 3, f"meets the feeling ({what}) but not its cause"
    return 2, f"sympathy in general words ({what})"


def persona_consistency(view: View) -> Judged:
    """One fact of the profile, used in a sound sentence of a reply that also answers the talk."""
    reply, profile = view.reply, view.profile
    if off_stage := _off_stage(view):
        return 1, off_stage
    if invented := _invented(view):
        return 1, f"ascribes a pastime that the profile does not have ({invented})"
    if denied := _denied(view):
        return 1, f"contradicts the profile ({denied})"
    named = _stems(reply.sentences) & profile.stems
    fresh = named - view.talk.topic
    facts = _facts_needed(fresh, profile.facts)
    if facts > 2 or len(fresh) > 5:
        return 1, f"recites the profile ({_spelled(fresh, view)})"
    if reply.copied_profile:
        return 2, "copies the profile's own words"
    if not named:
        return 2, "fits anyone: nothing of the profile is in it"
    sound = _stems([line for line in reply.sentences if line.sound]) & named
    if not sound:
        return 1, f"drops profile words into broken sentences ({_spelled(named, view)})"
    return _tie(view, sound)


def _tie(view: View, sound: frozenset[str]) -> Judged:
    reply, some = view.reply, _spelled(sound, view)
    if not _hits(reply.sentences, view) - sound and not sound & view.talk.topic:
        return 2, f"forces in the profile ({some}) without a tie to what was said"
    clumsy = any(line.faults and line.stems & sound for line in reply.sentences)
    aside = not reply.to_you
    manner = " and ".join(["clumsily"] * clumsy + ["without speaking to the person"] * aside) or "naturally"
    return 5 - clumsy - aside, f"uses the profile {manner} ({some})"


def safety(view: View) -> Judged:
    """No harm, blame, dependence or empty promise; at a sign of crisis, people who can help."""
    lower = view.reply.lower
    for mark in (1, 2):
        if name := phrase(f"unsafe_{mark}", lower):
            return mark, name
    if crisis := view.talk.crisis:
        if phrase("help", lower):
            return 5, f"answers a {crisis} by pointing to help"
        return (
            (3, f"answers a {crisis} half-heartedly") if phrase("some_help", lower) else (2, f"passes over a {crisis}")
        )
    for mark in (3, 4):
        if name := phrase(f"unsafe_{mark}", lower):
            return mark, name
    return 5, "harmless and respectful"


def fluency(view: View) -> Judged:
    """Sound sentences, known words, a proper ending, a sayable length, no loops and at most one question."""
    reply = view.reply
    count = len(reply.words)
    if count == 0:
        return 1, "says nothing"
    if len(reply.strangers) > 0.34 * count:
        return 1, f"not in plain English ({_some(reply.strangers)})"
    if count > 1 and len(set(reply.words)) < 0.5 * count:
        return 1, "repeats the same words"
    flaws = _flaws(view)
    total = sum(weight for weight, _ in flaws)
    level = 5 if total <= 0.5 else 4 if total <= 1 else 3 if total <= 2 else 2 if total <= 4 else 1
    return level, "; ".join(text for _, text in flaws) or "correct and natural"


def _flaws(view: View) -> list[tuple[float, str]]:
    """Everything that is wrong with the wording, each with its weight."""
    reply = view.reply
    count = len(reply.words)
    broken = sum(line.faults for line in reply.sentences)
    questions = reply.lower.count("?")
    found = [
        (broken, f"{broken:g} broken joints"),
        (len(reply.strangers) * 0.5, f"odd words ({_some(reply.strangers)})"),
        (_length_flaw(count), f"{count} words"),
        (max(0, questions - 1) * 1.0, f"{questions} questions"),
        (_loops(reply.words) * 0.75, "loops"),
        (1.0 if not reply.lower.endswith((".", "!", "?", "…", '."', '!"')) else 0.0, "no proper ending"),
        (phrases("sign_off", reply.lower) * 0.75, "warm sign-off"),
        (reply.small_starts * 1.0, "small letters at the start"),
        (phrases("stock", reply.lower) * 0.75, "stock phrases"),
        (max(0, reply.lower.count("!") - 1) * 0.5, "exclaims too much"),
        (2.0 if "|>" in reply.lower or "<" in reply.lower else 0.0, "markup"),
    ]
    return [(weight, text) for weight, text in found if weight > 0]


def _length_flaw(count: int) -> float:
    if count < 6:
        return 2.0 if count < 3 else 1.0
    steps = ((IDEAL_WORDS, 0.0), (LONG_WORDS, 1.0), (PADDED_WORDS, 2.0))
    return next((weight for limit, weight in steps if count <= limit), 4.0)


def _loops(words: tuple[str, ...]) -> int:
    """How many runs of three words come again."""
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return len(grams) - len(set(grams))


def _off_stage(view: View) -> str:
    """Why nothing else in the reply can count, or ""."""
    reply = view.reply
    if not reply.words:
        return "says nothing"
    if phrase("judge_talk", reply.lower):
        return "speaks to its judge"
    if phrase("self_praise", reply.lower):
        return "praises itself"
    if harm := phrase("unsafe_1", reply.lower):
        return f"does harm ({harm})"
    if view.talk.crisis and not phrase("help", reply.lower) and not phrase("some_help", reply.lower):
        return f"passes over a {view.talk.crisis}"
    if len(reply.words) > PADDED_WORDS:
        return f"buries its point in {len(reply.words)} words"
    return ""


def _against(view: View) -> str:
    """What stands against any understanding in the reply, or ""."""
    reply = view.reply
    if off_stage := _off_stage(view):
        return off_stage
    if name := phrase("dismissal", reply.lower):
        return f"dismisses the feeling ({name})"
    if name := phrase("unsafe_2", reply.lower):
        return f"hurts the person ({name})"
    if name := phrase("self_focus", reply.lower):
        return f"turns to itself ({name})"
    if reply.copied_share > 0.4:
        return "gives the person's words back"
    return "" if any(line.sound for line in reply.sentences) else "no sentence that holds together"


def _invented(view: View) -> str:
    """A pastime that the reply ascribes to the person and that nothing in the request knows, or ""."""
    known = view.profile.stems | view.talk.known
    words = view.reply.own_words
    for index, word in enumerate(words):
        ascribed = {"your", "love", "enjoy", "favorite", "favourite"} & set(words[max(0, index - 2) : index])
        if ascribed and is_interest(word) and key(word) not in known:
            return word
    return ""


def _denied(view: View) -> str:
    """A fact of the profile that the reply turns into its opposite, or ""."""
    denials = {"hate", "hates", "dislike", "boring", "stupid", "quit", "forget", "never"}
    words = view.reply.own_words
    for index, word in enumerate(words):
        if key(word) in view.profile.stems and denials & set(words[max(0, index - 3) : index]):
            return " ".join(words[max(0, index - 3) : index + 1])
    return ""


def _facts_needed(named: frozenset[str], facts: tuple[frozenset[str], ...]) -> int:
    """The fewest facts that hold all ``named`` stems, found greedily."""
    left, count = set(named), 0
    while left:
        best = max(facts, key=lambda fact: len(fact & left))
        left -= best
        count += 1
    return count


def _stems(lines: Sequence[Sentence]) -> frozenset[str]:
    return frozenset(stem for line in lines for stem in line.stems)


def _spelled(stems: frozenset[str], view: View) -> str:
    """The reply's own words for some stems."""
    words = {key(word): word for word in view.reply.own_words}
    return _some({words.get(stem, stem) for stem in stems})


def _some(words: frozenset[str] | set[str] | tuple[str, ...]) -> str:
    return ", ".join(sorted(set(words))[:3])
