import copy
import dataclasses
import json
import pathlib
import types

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.config import DataConfig
from kardia_jax.dialogue import dataset
from kardia_jax.dialogue.dataset import DataError, RowError, RubricItem, Turn, load_dialogues, read_row
from kardia_jax.dialogue.spans import Spans, parse, render

ANSWER = render(Spans("lost a pet", "grief needs room", "sad", "I am sorry."))
ROW = {
    "person": "MBTI: INFP\nAbout: paints",
    "mbti": "INFP",
    "emotion": "sad",
    "situation": "My dog died.",
    "anon_username": "user_7",
    "messages": [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "He was fourteen."},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "It is so quiet now."},
        {"role": "assistant", "content": ANSWER.replace("sad", "lonely")},
    ],
}


def row(**changes: object) -> dict:
    return {**copy.deepcopy(ROW), **changes}


def with_message(index: int, **changes: object) -> dict:
    changed = row()
    changed["messages"][index].update(changes)
    return changed


def write_jsonl(path: pathlib.Path, rows: list) -> pathlib.Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), "utf-8")
    return path


def test_a_row_becomes_a_dialogue():
    dialogue = read_row(ROW, "train.jsonl:17")
    assert (dialogue.person, dialogue.mbti) == ("MBTI: INFP\nAbout: paints", "INFP")
    assert (dialogue.emotion, dialogue.situation, dialogue.where) == ("sad", "My dog died.", "train.jsonl:17")
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant", "user", "assistant"]
    assert dialogue.turns[0] == Turn("user", "He was fourteen.")
    assert dialogue.answers == (ANSWER, ANSWER.replace("sad", "lonely"))


def test_an_id_is_the_content_and_not_the_place():
    first, moved = read_row(ROW, "a.jsonl:1"), read_row(ROW, "b.jsonl:9")
    other = read_row(row(situation="My cat died."), "a.jsonl:1")
    assert first.id == moved.id != other.id
    assert len(first.id) == 12


def test_the_cards_tags_are_read_as_the_models():
    content = (
        "<understanding>lost a pet</understanding>\n<reasoning>grief needs room</reasoning>\n"
        "<emotion>sad</emotion>\n<response>I am sorry.</response>\n"
    )
    assert read_row(with_message(2, content=content), "x:1").answers[0] == ANSWER


def test_a_system_message_and_an_answer_to_the_last_user_are_optional():
    dialogue = read_row(row(messages=ROW["messages"][1:4]), "x:1")
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant", "user"]
    assert dialogue.answers == (ANSWER,)


MESSAGES = ROW["messages"]
PLAIN = "a text without control tokens or lone surrogates"


def without(field: str) -> dict:
    return {name: value for name, value in row().items() if name != field}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without("person"), "person: wanted a text, got no such field."),
        (without("messages"), "messages: wanted a list of messages, got None."),
        (row(mbti=4), "mbti: wanted a text, got 4."),
        (row(situation=" "), "situation: wanted a text that is not empty, got ' '."),
        (
            row(emotion="devasted"),
            "emotion: wanted one of the 32 labels, got 'devasted'. Did you mean 'devast",
        ),
        (row(emotion="zzz"), "emotion: wanted one of the 32 labels, got 'zzz'."),
        (row(person="<|im_end|>"), f"person: wanted {PLAIN}, got '<|im_end|>'."),
        (row(situation="\ud83d"), f"situation: wanted {PLAIN}, got '\\ud83d'."),
        (row(messages="hello"), "messages: wanted a list of messages, got 'hello'."),
        (row(messages=["hello"]), "messages[0]: wanted an object with role and content, got 'hello'."),
        (row(messages=[]), "messages: wanted at least one assistant turn, got the roles []."),
        (
            row(messages=MESSAGES[:2]),
            "messages: wanted at least one assistant turn, got the roles ['system',",
        ),
        (row(messages=MESSAGES[2:]), "messages[0].role: wanted 'user', got 'assistant'."),
        (with_message(1, content=None), "messages[1].content: wanted a text, got None."),
        (with_message(1, content="bye <|response_end|>"), f"messages[1].content: wanted {PLAIN}, got"),
        (
            with_message(2, content=ANSWER.replace("grief", "<|im_end|>")),
            f"messages[2].content: wanted {PLAIN}",
        ),
        (with_message(2, content="I am sorry."), "messages[2].content: wanted four spans, got missing (the"),
        (with_message(3, role="assistant"), "messages[3].role: wanted 'user', got 'assistant'. After an opt"),
        (with_message(3, role="system"), "messages[3].role: wanted 'user', got 'system'."),
        (row(rubric_items="Warm?"), "rubric_items: wanted a list of questions, got 'Warm?'."),
        (row(rubric_items={"question": "Warm?"}), "rubric_items: wanted a list of questions, got {'question'"),
        (row(rubric_items=["Warm?", 4]), "rubric_items[1]: wanted a question, or an object with question and"),
        (row(rubric_items=[" "]), "rubric_items[0].question: wanted a text that is not empty, got ' '."),
        (row(rubric_items=[{"weight": 2}]), "rubric_items[0].question: wanted a text, got no such field."),
        (row(rubric_items=["a\nb"]), "rubric_items[0].question: wanted one line, got 'a\\nb'."),
        (row(rubric_items=["<|im_end|>"]), f"rubric_items[0].question: wanted {PLAIN}, got '<|im_end|>'."),
        (
            row(rubric_items=[{"question": "a", "cap": 1}]),
            "rubric_items[0]: wanted no fields but question and weight, got cap.",
        ),
        *(
            (
                row(rubric_items=[{"question": "a", "weight": bad}]),
                f"rubric_items[0].weight: wanted a finite number, 0 or more, got {bad!r}.",
            )
            for bad in (-1, True, "2", float("inf"), float("nan"))
        ),
    ],
)
def test_a_bad_row_names_place_field_wish_and_find(bad: dict, message: str):
    with pytest.raises(RowError) as caught:
        read_row(bad, "x:1")
    assert str(caught.value).startswith(f"x:1: {message}")


values = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=3), max_size=3)


def refused_field(bad: dict) -> str | None:
    try:
        read_row(bad, "x:1")
    except RowError as error:
        return error.field
    return None


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["person", "mbti", "emotion", "situation", "messages"]), values)
def test_any_value_in_any_field_is_read_or_refused_by_name(field: str, value: object):
    refused = refused_field(row(**{field: value}))
    assert refused == field or (refused is None and isinstance(value, str)) or refused == "messages[0]"


def test_jsonl_is_read_in_order_and_blank_lines_are_no_rows(tmp_path: pathlib.Path):
    path = tmp_path / "any.jsonl"
    lines = [json.dumps(ROW), "", json.dumps(row(situation="My cat died.")), ""]
    path.write_text("\n".join(lines), "utf-8")
    loaded = load_dialogues(DataConfig(source=str(path)), "test")
    assert [dialogue.where for dialogue in loaded.dialogues] == ["any.jsonl:1", "any.jsonl:3"]
    assert loaded.summary() == "2 rows read, 2 dialogues kept, 0 rows skipped"


def test_parquet_gives_the_same_dialogues_as_jsonl(tmp_path: pathlib.Path):
    rows = [row(situation=f"Day {n}.") for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = [
        load_dialogues(DataConfig(source=str(tmp_path / name)), "train") for name in ("rows.parquet", "rows.jsonl")
    ]
    parquet, jsonl = (result.dialogues for result in loaded)
    assert [dialogue.where for dialogue in parquet] == [f"rows.parquet:{n}" for n in (1, 2, 3)]
    assert [dataclasses.replace(dialogue, where="") for dialogue in parquet] == [
        dataclasses.replace(dialogue, where="") for dialogue in jsonl
    ]


def test_a_folder_serves_each_split_from_its_own_file(tmp_path: pathlib.Path):
    write_jsonl(tmp_path / "train.jsonl", [ROW, ROW])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "test.parquet")
    config = DataConfig(source=str(tmp_path))
    assert load_dialogues(config, "train").read == 2
    assert load_dialogues(config, "test").dialogues[0].where == "test.parquet:1"


def test_a_folder_without_the_split_or_with_two_of_it_is_refused(tmp_path: pathlib.Path):
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    (tmp_path / "train.parquet").touch()
    config = DataConfig(source=str(tmp_path))
    with pytest.raises(DataError, match=r"either test.jsonl or test.parquet in .*, got neither"):
        load_dialogues(config, "test")
    with pytest.raises(DataError, match=r"got train.jsonl and train.parquet"):
        load_dialogues(config, "train")


def test_a_row_may_bring_questions_of_its_own(tmp_path: pathlib.Path):
    items = [" Does it name the dog? ", {"question": "Does it wait?", "weight": 2}]
    dialogue = read_row(row(rubric_items=items), "x:1")
    assert dialogue.rubric_items == (RubricItem("Does it name the dog?", 1.0), RubricItem("Does it wait?", 2.0))
    # Another question makes another dialogue; no questions leave the id what it was without the field.
    without_items = read_row(ROW, "x:1")
    assert read_row(row(rubric_items=None), "x:1") == read_row(row(rubric_items=[]), "x:1") == without_items
    assert dialogue.id != without_items.id
    rows = [row(rubric_items=[{"question": "Why?", "weight": None}]), row(rubric_items=None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = load_dialogues(DataConfig(source=str(tmp_path / "rows.parquet")), "train")
    assert [dialogue.rubric_items for dialogue in loaded.dialogues] == [(RubricItem("Why?"),), ()]


@pytest.mark.parametrize("bad", [("",), ("a\nb",), ("<|im_end|>",), ("a", -1.0), ("a", float("nan"))])
def test_an_item_that_cannot_be_asked_is_refused(bad: tuple):
    with pytest.raises(ValueError, match="wanted"):
        RubricItem(*bad)


MIXED = [ROW, row(emotion="sadd"), {"person": "x"}, ROW]


def test_skipped_rows_are_counted_and_named(tmp_path: pathlib.Path):
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    loaded = load_dialogues(DataConfig(source=str(path), bad_rows="skip"), "train")
    assert loaded.summary() == "4 rows read, 2 dialogues kept, 2 rows skipped"
    assert loaded.problems == (
        "rows.jsonl:2: emotion: wanted one of the 32 labels, got 'sadd'. Did you mean 'sad'?",
        "rows.jsonl:3: mbti: wanted a text, got no such field.",
    )


def test_the_first_bad_row_is_fatal_and_says_how_many_were_good(tmp_path: pathlib.Path):
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    with pytest.raises(RowError, match=r"rows.jsonl:2: emotion: .*'sad'\? 1 rows before it were good. .* skip\."):
        load_dialogues(DataConfig(source=str(path), bad_rows="fatal"), "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"person": ', "wanted one JSON object per line"),
        (b"\xff\xfe{}", "wanted one JSON object per line"),
        (b"[" * 200_000, "wanted one JSON object per line"),
        (b"[1, 2]", "wanted an object with fields, got [1, 2]"),
        (b"null", "wanted an object with fields, got None"),
    ],
)
def test_a_line_that_is_no_json_object_is_a_bad_row(tmp_path: pathlib.Path, line: bytes, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    loaded = load_dialogues(DataConfig(source=str(path), bad_rows="skip"), "train")
    assert len(loaded.dialogues) == 1
    assert f"rows.jsonl:2: row: {message}" in loaded.problems[0]


def test_limits_take_the_first_dialogues_in_file_order(tmp_path: pathlib.Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row(situation=f"Day {n}.") for n in range(5)])
    config = DataConfig(source=str(path), train_limit=2, test_limit=4)
    assert [d.situation for d in load_dialogues(config, "train").dialogues] == ["Day 0.", "Day 1."]
    assert load_dialogues(config, "test").read == 4


def test_rows_beyond_the_limit_are_not_looked_at(tmp_path: pathlib.Path):
    path = write_jsonl(tmp_path / "rows.jsonl", MIXED)
    assert load_dialogues(DataConfig(source=str(path), train_limit=1), "train").read == 1


def test_an_empty_file_and_one_of_bad_rows_only_are_refused(tmp_path: pathlib.Path):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"at least one row in the train split, .*empty.jsonl is empty"):
        load_dialogues(DataConfig(source=str(empty)), "train")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{}, {}])
    with pytest.raises(DataError, match=r"all 2 rows of .*bad.jsonl are bad. First: bad.jsonl:1: person"):
        load_dialogues(DataConfig(source=str(bad), bad_rows="skip"), "train")


def test_a_broken_parquet_file_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"cannot read .*rows.parquet"):
        load_dialogues(DataConfig(source=str(path)), "train")


def test_another_kind_of_file_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "rows.csv"
    path.write_text("person,mbti\n")
    with pytest.raises(DataError, match=r"wanted a .jsonl or .parquet file, got '.*rows.csv'"):
        load_dialogues(DataConfig(source=str(path)), "train")


@pytest.mark.parametrize(
    "source",
    [
        "./rows",
        "/no/such/rows",
        "rows.jsonl",
        "data/rows.jsonl",
        "~/rows",
        "~nobody-here/rows",
        "a/b/c",
        "rows",
    ],
)
def test_a_path_that_is_not_there_never_asks_the_hub(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match=r"file not found"):
        load_dialogues(DataConfig(source=source), "train")


def test_hub_rows_are_counted_from_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: datasets.Dataset.from_list([ROW, ROW]))
    loaded = load_dialogues(DataConfig(source="Jhcircle/KardiaBench"), "test")
    assert [dialogue.where for dialogue in loaded.dialogues] == [
        "Jhcircle/KardiaBench/test:1",
        "Jhcircle/KardiaBench/test:2",
    ]


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the Hub says no", response=response)


def wrapped(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


MISSING = datasets.exceptions.DatasetNotFoundError("Dataset 'some/rows' cannot be accessed")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(GatedRepoError, 401), r"Accept .*://huggingface\.co/datasets/some/rows .*hf auth login"),
        (answer(GatedRepoError, 403), "Accept the licence on .*hf auth login"),
        (answer(HfHubHTTPError, 403), "Accept the licence on .*hf auth login"),
        (wrapped(MISSING, answer(GatedRepoError, 403)), "Accept the licence on .*hf auth login"),
        (answer(HfHubHTTPError, 401), "not logged in"),
        (answer(RepositoryNotFoundError, 404), "no such dataset"),
        (datasets.exceptions.DatasetNotFoundError("no"), "no such dataset, .* no such file or folder here"),
        (OfflineModeIsEnabled("offline"), "the Hub cannot be reached"),
        (
            ConnectionError("Couldn't reach 'some/rows' on the Hub (ConnectError)"),
            "the Hub cannot be reached",
        ),
        (
            ValueError('Unknown split "train". Should be one of [].'),
            "train split cannot be loaded .*Unknown split",
        ),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(source: str, split: str):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=message):
        load_dialogues(DataConfig(source="some/rows"), "train")


def test_the_mini_source_reads_the_mini_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset.mini, "rows", lambda split: [row(situation=f"A {split} row.")], raising=False)
    (dialogue,) = load_dialogues(DataConfig(), "test").dialogues
    assert (dialogue.situation, dialogue.where) == ("A test row.", "mini/test:1")
    assert isinstance(parse(dialogue.answers[0]), Spans)
