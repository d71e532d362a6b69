"""From material to rows: which persona meets which situation, what both say, and how good each reply is.

In: a split and a seed. Out: rows in the KardiaBench schema, always the same for the same seed. One row:

    situation   My sister sold my bike last night without asking me first.
    user        My sister sold my bike last night and never asked me. I am so angry right now.
    assistant   understanding  Their sister sold the bike without asking; someone wronged them.
                reasoning      The piano holds what they feel, so comfort first, then point there.
                emotion        angry
                response       Anger is a fair answer to that. Your sister had no right to sell that bike.
                               Let the piano carry this tonight.

Three levels of replies leave something to learn after the warm start. A tied reply (3 in 10) acknowledges
the feeling, takes up a word of what happened and ties in the profile; a close one (4 in 10) leaves the
profile out; a plain one (3 in 10) only acknowledges. Half of the rows name their label in the first
user turn.

Draws use ``random.Random(integer).random()`` alone: the one method whose numbers Python promises to keep.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from kardia_jax.dialogue.mini import material
from kardia_jax.dialogue.mini.filling import Voice, fill, fits, slot_values
from kardia_jax.dialogue.mini.material import Emotion, Material, More, Persona, Situation, Texts
from kardia_jax.dialogue.spans import Spans, render

Split = Literal["train", "test"]
Row = dict[str, Any]
"""person, mbti, emotion, situation, anon_username (text), messages (list of role and content)."""

Item = TypeVar("Item")

ROWS_PER_SHARE: dict[Split, int] = {"train": 6, "test": 1}
"""Rows of an emotion = its share in ``emotions.txt`` times this."""
MAX_USER_WORDS = 25
MAX_REPLY_WORDS = 28
_TIED, _CLOSE, _PLAIN = 3, 4, 3
_NAMED = 0.5
_THANKS = 0.5
_ROLE_TIE = 0.2
_SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Scene:
    """What stays the same through one dialogue; its lists are shuffled, and exchange i takes item i."""

    material: Material
    persona: Persona
    emotion: Emotion
    situation: Situation
    values: Mapping[str, str]
    acks: Sequence[str]
    takes: Sequence[str]
    mores: Sequence[More]
    softs: Sequence[str]
    plains: Sequence[str]
    activities: Sequence[str]

    def say(self, template: str, voice: Voice) -> str:
        """The template with this scene's values."""
        return fill(template, self.values, voice)

    def frame(self, name: str) -> Texts:
        """The shared sentences of that name for the mode of the emotion."""
        return self.material.frames[name][self.emotion.mode]


@dataclass(frozen=True)
class Beat:
    """One exchange before it is worded: what the user says, how the reply begins and what it takes up."""

    turn: int
    user: str
    ack: str
    take: str
    lead: str
    """Begins the understanding span; empty for the first exchange."""


def rows(split: Split, seed: int = 0) -> list[Row]:
    """All rows of a split in a seeded order; a new list at each call."""
    found = material.load()
    personas = [persona for persona in found.personas if persona.split == split]
    made: list[Row] = []
    for label, emotion in found.emotions.items():
        for ordinal in range(emotion.share * ROWS_PER_SHARE[split]):
            rng = random.Random(_row_seed(split, seed, len(made)))
            persona = personas[len(made) % len(personas)]
            situations = found.situations[label]
            made.append(_row(rng, found, persona, emotion, situations[ordinal % len(situations)]))
    return shuffled(random.Random(_row_seed(split, seed, -1)), made)


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """One of the items, each as likely."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[Item]) -> list[Item]:
    """The items in another order."""
    keys = [(rng.random(), index) for index in range(len(items))]
    return [items[index] for _, index in sorted(keys)]


def _row_seed(split: Split, seed: int, index: int) -> int:
    """An integer of its own for each row; -1 is the order of the split."""
    return (seed * len(_SPLITS) + _SPLITS.index(split)) * 1_000_003 + index + 1


def _row(rng: random.Random, found: Material, persona: Persona, emotion: Emotion, situation: Situation) -> Row:
    scene = _scene(rng, found, persona, emotion, situation)
    messages = [_message("system", found.frames["system"]["text"][0])]
    for beat in _beats(rng, scene):
        messages.append(_message("user", beat.user))
        messages.append(_message("assistant", render(_answer(rng, scene, beat))))
    return {
        "person": profile(found, persona),
        "mbti": persona.mbti,
        "emotion": emotion.label,
        "situation": scene.say(situation.situation, "user"),
        "anon_username": persona.username,
        "messages": messages,
    }


def _scene(rng: random.Random, found: Material, persona: Persona, emotion: Emotion, situation: Situation) -> Scene:
    return Scene(
        material=found,
        persona=persona,
        emotion=emotion,
        situation=situation,
        values=slot_values({slot: pick(rng, choices) for slot, choices in situation.slots.items()}),
        acks=shuffled(rng, emotion.acks),
        takes=shuffled(rng, situation.takes),
        mores=shuffled(rng, situation.mores),
        softs=shuffled(rng, found.frames["soft"][emotion.mode]),
        plains=shuffled(rng, found.frames["plain"][emotion.mode]),
        activities=shuffled(rng, persona.activities),
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def profile(found: Material, persona: Persona) -> str:
    """The profile text: MBTI, About, Signature, Recent Activities."""
    activities = ", ".join(found.activities[name].text for name in persona.activities)
    return (
        f"MBTI: {persona.mbti}\nAbout: {persona.about}.\n"
        f"Signature: {persona.signature}.\nRecent Activities: {activities}."
    )


def _beats(rng: random.Random, scene: Scene) -> list[Beat]:
    """Two to four exchanges: the opening, one or two details, and a thought or thanks at the end."""
    count = 2 + int(rng.random() * 3)
    beats = [Beat(0, _opening(rng, scene), scene.acks[0], scene.takes[0], "")]
    for turn in range(1, count):
        details = turn <= len(scene.mores) and (turn < count - 1 or count == 2)
        beats.append(_detail(rng, scene, turn) if details else _ending(rng, scene, turn))
    return beats


def _opening(rng: random.Random, scene: Scene) -> str:
    """The event in the user's words, then a sentence that names the label or one that does not."""
    event = scene.say(pick(rng, scene.situation.opens), "user")
    tails = scene.emotion.said if rng.random() < _NAMED else scene.emotion.tails
    said = [scene.say(tail, "user") for tail in tails if fits(tail, scene.values)]
    short = [tail for tail in said if len(f"{event} {tail}".split()) <= MAX_USER_WORDS]
    return f"{event} {pick(rng, short)}" if short else event


def _detail(rng: random.Random, scene: Scene, turn: int) -> Beat:
    more = scene.mores[turn - 1]
    lead = pick(rng, scene.material.frames["more-about"]["text"])
    return Beat(turn, scene.say(more.text, "user"), scene.acks[turn], more.take, lead)


def _ending(rng: random.Random, scene: Scene, turn: int) -> Beat:
    frames, take = scene.material.frames, scene.takes[1]
    if rng.random() < _THANKS:
        user, welcome = pick(rng, scene.frame("thanks")), pick(rng, scene.frame("welcome"))
        return Beat(turn, user, welcome, take, pick(rng, frames["thanks-about"]["text"]))
    user = scene.say(pick(rng, scene.emotion.nexts), "user")
    return Beat(turn, user, scene.acks[turn], take, pick(rng, frames["more-about"]["text"]))


def _answer(rng: random.Random, scene: Scene, beat: Beat) -> Spans:
    wording = pick(rng, [_tied] * _TIED + [_close] * _CLOSE + [_plain] * _PLAIN)
    understanding = f"{beat.lead} {scene.situation.event}; {pick(rng, scene.emotion.shades)}.".strip()
    reason, response = wording(rng, scene, beat)
    return Spans(scene.say(understanding, "report"), reason, scene.emotion.label, response)


def _tied(rng: random.Random, scene: Scene, beat: Beat) -> tuple[str, str]:
    """Reasoning and reply that tie in an activity or the occupation."""
    pastime = scene.material.activities[scene.activities[beat.turn % len(scene.activities)]]
    if rng.random() < _ROLE_TIE:
        pastime = scene.material.roles[scene.persona.role]
    reason = f"{pastime.why}, {pick(rng, scene.frame('tie-reason'))}."
    start = f"{beat.ack} {scene.say(beat.take, 'reply')}"
    return reason, f"{start} {_tie(rng, pastime.ties[scene.emotion.mode], len(start.split()))}"


def _tie(rng: random.Random, ties: Sequence[str], used_words: int) -> str:
    """One of the ties that keep the reply short, or the shortest."""
    short = [tie for tie in ties if used_words + len(tie.split()) <= MAX_REPLY_WORDS]
    return pick(rng, short) if short else min(ties, key=len)


def _close(rng: random.Random, scene: Scene, beat: Beat) -> tuple[str, str]:
    """Reasoning from temper and need, and a reply without the profile."""
    wants = pick(rng, scene.material.frames["wants"]["text"])
    reason = f"{_temper(scene)} {wants} {pick(rng, scene.emotion.needs)}."
    return reason, f"{beat.ack} {scene.say(beat.take, 'reply')} {scene.softs[beat.turn]}"


def _plain(rng: random.Random, scene: Scene, beat: Beat) -> tuple[str, str]:
    """A brief reason, and a reply that would fit many situations."""
    reason = f"{_temper(scene)}, {pick(rng, scene.frame('plain-reason'))}."
    return reason, f"{beat.ack} {scene.plains[beat.turn]}"


def _temper(scene: Scene) -> str:
    return scene.material.frames["temper"][scene.persona.temper][0]
