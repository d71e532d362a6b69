"""The mini set: what its card promises, checked over every row."""

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.dialogue.dataset import read_row
from kardia_jax.dialogue.emotions import EMOTIONS
from kardia_jax.dialogue.mini import Row, generate, material, rows
from kardia_jax.dialogue.mini.dialogues import pick, profile, shuffled
from kardia_jax.dialogue.mini.filling import fill, fits, slot_values
from kardia_jax.dialogue.spans import Spans, parse

MATERIAL = material.load()
TRAIN, TEST = rows("train"), rows("test")
BOTH = TRAIN + TEST

# Words too common to say that two texts speak of the same thing.
COMMON = set(
    re.findall(
        r"\w+",
        "the a an and or but with your you for that this it its is to of in on at by be as may can could "
        "will some one from their they them was were have has had not no so what when who let",
    )
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def content(text: str) -> set[str]:
    return {word for word in words(text) if len(word) >= 3} - COMMON


def said_by(row: Row, role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def spans_of(row: Row) -> list[Spans]:
    parsed = [parse(text) for text in said_by(row, "assistant")]
    return [spans for spans in parsed if isinstance(spans, Spans)]


def named_labels(row: Row) -> set[str]:
    """The labels of which the user says a form."""
    said = set(words(" ".join([row["situation"], *said_by(row, "user")])))
    return {label for label, emotion in MATERIAL.emotions.items() if not said.isdisjoint(emotion.words)}


def test_size_and_labels():
    assert len(TRAIN) >= 1600
    assert len(TEST) >= 320
    counts = Counter(row["emotion"] for row in TRAIN)
    assert set(counts) == set(EMOTIONS) == {row["emotion"] for row in TEST}
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= 2 * min(counts.values())


def test_personas_are_many_short_and_disjoint():
    train, test = ({row["person"] for row in split} for split in (TRAIN, TEST))
    assert (len(train), len(test)) == (56, 16)
    assert not train & test
    assert len({persona.username for persona in MATERIAL.personas}) == 72
    assert all(len(person.split()) <= 45 for person in train | test)


def test_held_out_personas_do_only_what_train_personas_do():
    done = {
        split: {name for persona in MATERIAL.personas if persona.split == split for name in persona.activities}
        for split in ("train", "test")
    }
    assert done["test"] <= done["train"] == set(MATERIAL.activities)


def test_every_row_fits_the_schema_and_every_span_the_gold_label():
    for number, row in enumerate(BOTH):
        dialogue = read_row(row, f"row {number}")
        assert 2 <= len(dialogue.answers) <= 4
        assert len(dialogue.turns) == 2 * len(dialogue.answers)
        assert {spans.emotion for spans in spans_of(row)} == {row["emotion"]}


def test_lengths_in_words():
    for row in BOTH:
        assert len(row["situation"].split()) <= 25
        assert all(8 <= len(text.split()) <= 25 for text in said_by(row, "user"))
        for spans in spans_of(row):
            assert len(spans.understanding.split()) <= 16
            assert len(spans.reasoning.split()) <= 16
            assert 12 <= len(spans.response.split()) <= 28
            assert spans.response.count("?") <= 1


def test_text_is_filled_and_written_as_english():
    for row in BOTH:
        for text in (row["situation"], *said_by(row, "user"), *(spans.response for spans in spans_of(row))):
            assert not re.search(r"[{}|=]|  |\.\.|\bmy my\b", text), text
            assert not re.search(r"\b[Aa] (?!one|uni)[aeiou]|\b[Aa]n (?!hour|honest|honor)[^aeiou]", text), text
            assert all(part[0].isupper() for part in re.split(r"(?<=[.!?]) ", text)), text


def test_replies_never_speak_as_the_user():
    takes = [
        fill(
            take,
            slot_values({slot: choices[index % len(choices)] for slot, choices in one.slots.items()}),
            "reply",
        )
        for situations in MATERIAL.situations.values()
        for one in situations
        for take in (*one.takes, *(more.take for more in one.mores))
        for index in range(4)
    ]
    assert not [take for take in takes if re.search(r"\b([Mm]y|[Oo]urs?|[Mm]ine)\b", take)]


@pytest.mark.parametrize("split", [TRAIN, TEST], ids=["train", "test"])
def test_about_half_of_the_rows_name_their_label(split: list[Row]):
    named = sum(bool(named_labels(row)) for row in split) / len(split)
    assert 0.42 <= named <= 0.58


def test_no_row_names_another_label():
    assert [row for row in BOTH if not named_labels(row) <= {row["emotion"]}] == []


def test_three_tenths_of_the_replies_tie_in_the_profile_and_three_tenths_are_plain():
    ties = {
        tie for pastime in (MATERIAL.activities | MATERIAL.roles).values() for tie in sum(pastime.ties.values(), ())
    }
    plains = set(sum(MATERIAL.frames["plain"].values(), ()))
    replies = [spans.response for row in TRAIN for spans in spans_of(row)]
    tied = sum(any(text.endswith(tie) for tie in ties) for text in replies) / len(replies)
    plain = sum(any(text.endswith(end) for end in plains) for text in replies) / len(replies)
    assert tied == pytest.approx(0.3, abs=0.03)
    assert plain == pytest.approx(0.3, abs=0.03)


def test_a_tie_uses_a_word_of_the_profile():
    for persona in MATERIAL.personas:
        pastimes = [MATERIAL.roles[persona.role], *(MATERIAL.activities[name] for name in persona.activities)]
        known = content(profile(MATERIAL, persona))
        ties = [tie for pastime in pastimes for texts in pastime.ties.values() for tie in texts]
        assert [tie for tie in ties if not content(tie) & known] == []


@pytest.mark.parametrize("label", EMOTIONS)
def test_material_of_a_label(label: str):
    emotion, situations = MATERIAL.emotions[label], MATERIAL.situations[label]
    assert len(situations) >= 5
    assert len(emotion.cue.split()) >= 6
    assert label in emotion.words
    assert all(set(words(text)) & set(emotion.words) for text in emotion.said)
    assert all(len(one.opens) * len(emotion.said + emotion.tails) >= 4 for one in situations)


@pytest.mark.parametrize("label", EMOTIONS)
def test_a_reply_takes_up_a_word_of_what_was_said(label: str):
    for situation in MATERIAL.situations[label]:
        values = slot_values({slot: choices[0] for slot, choices in situation.slots.items()})
        story = content(" ".join(fill(text, values, "user") for text in (situation.situation, *situation.opens)))
        assert all(content(fill(take, values, "reply")) & story for take in situation.takes), situation.name
        for more in situation.mores:
            heard = story | content(fill(more.text, values, "user"))
            assert content(fill(more.take, values, "reply")) & heard, more


def test_rows_depend_on_the_seed_alone():
    assert rows("test") == TEST
    assert rows("test", seed=1) != TEST
    assert Counter(row["emotion"] for row in rows("test", seed=1)) == Counter(row["emotion"] for row in TEST)


def test_draws_are_those_that_python_promises():
    # From Random(0).random() = 0.844, 0.758, 0.421, ...: a change here would change every row.
    rng = random.Random(0)
    assert [pick(rng, range(100)) for _ in range(5)] == [84, 75, 42, 25, 51]
    assert shuffled(random.Random(0), "abc") == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("template", "voice", "text"),
    [
        ("my {person} lost {his} {thing}. {he} wept.", "user", "My niece lost her old map. She wept."),
        ("a {thing} and a {thing}", "user", "An old map and an old map"),
        ("{place} is far", "user", "My hut is far"),
        ("{place} is far", "reply", "Your hut is far"),
        ("they miss {place}", "report", "They miss their hut"),
        ("a one year coin, a hour", "user", "A one year coin, an hour"),
        ("so {Place} is {himself}", "reply", "So Your hut is herself"),
    ],
)
def test_fill(template: str, voice, text: str):
    values = slot_values({"person": "niece/she", "thing": "old map", "place": "my hut"})
    assert fill(template, values, voice) == text


def test_fits_asks_for_every_slot():
    assert fits("I saw {him} and {He}", {"him": "her", "he": "she"})
    assert not fits("I saw {him}", {"thing": "map"})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers()), st.integers(0, 2**32))
def test_shuffling_keeps_every_item(items: list[int], seed: int):
    assert Counter(shuffled(random.Random(seed), items)) == Counter(items)


def test_generate_writes_the_rows(tmp_path):
    assert generate.write(tmp_path / "new") == {"train": len(TRAIN), "test": len(TEST)}
    lines = (tmp_path / "new" / "test.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == TEST
