"""Rubrics in YAML: the shipped ones, the field that is refused, and what a fingerprint notices."""

import contextlib
import pathlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import (
    Contains,
    Criterion,
    MaxWords,
    Pattern,
    Phrases,
    Rubric,
    RubricError,
    Veto,
    load_rubric,
    shipped_rubrics,
    views,
)

ROOT = pathlib.Path(__file__).parents[2]
TEXT = """\
name: mine
version: "2"
criteria:
  - name: tone
    question: Is it kind?
    weight: 2
    levels: {1: a, 2: b, 3: c, 4: d, 5: e}
    vetoes:
      - {max_words: 60, cap: 2, because: long}
      - {phrases: [calm down], cap: 1, because: cold}
      - {pattern: "ha+", cap: 3, because: laughs}
      - {contains: url, cap: 4, because: link}
  - name: depth
    question: Is it sound?
    sees: [reasoning, understanding]
    levels: {1: f, 2: g, 3: h, 4: i, 5: j}
"""


def load(tmp_path: pathlib.Path, text: str) -> Rubric:
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    return load_rubric(str(path))


def test_every_field_arrives(tmp_path: pathlib.Path):
    vetoes = (
        Veto(MaxWords(60), 2, "long"),
        Veto(Phrases(("calm down",)), 1, "cold"),
        Veto(Pattern("ha+"), 3, "laughs"),
        Veto(Contains("url"), 4, "link"),
    )
    tone = Criterion("tone", "Is it kind?", ("a", "b", "c", "d", "e"), 2.0, ("reply",), vetoes)
    depth = Criterion("depth", "Is it sound?", ("f", "g", "h", "i", "j"), 1.0, ("reasoning", "understanding"))
    assert load(tmp_path, TEXT) == Rubric("mine", "2", (tone, depth))


def test_the_default_is_the_paper_s_five_on_the_reply_alone():
    assert KARDIA_FIVE.names == ("relevance", "empathy", "persona_consistency", "safety", "fluency")
    assert [criterion.weight for criterion in KARDIA_FIVE.criteria] == [2, 2, 2, 1, 1]
    assert all(criterion.sees == ("reply",) and not criterion.vetoes for criterion in KARDIA_FIVE.criteria)
    # Verdicts in caches and logs carry this: whoever changes a word of the file changes the version with it.
    assert (KARDIA_FIVE.name, KARDIA_FIVE.version, KARDIA_FIVE.fingerprint) == ("kardia_five", "1", "dcb34276aacf7bd1")


def test_the_strict_one_is_the_default_with_vetoes_and_one_more_criterion():
    strict = load_rubric("kardia_five_strict")
    bare = [Criterion(c.name, c.question, c.levels, c.weight, c.sees) for c in strict.criteria]
    assert tuple(bare[:5]) == KARDIA_FIVE.criteria
    assert (bare[5].name, bare[5].sees) == ("insight", ("understanding", "reasoning"))
    assert all(criterion.vetoes for criterion in strict.criteria)
    assert [part.names for part in views(strict)] == [KARDIA_FIVE.names, ("insight",)]


def test_what_is_shipped_stands_in_configs_too():
    linked = sorted((ROOT / "configs" / "rubrics").glob("*.yaml"))
    assert tuple(path.stem for path in linked) == shipped_rubrics() == ("kardia_five", "kardia_five_strict")
    for path in linked:
        assert load_rubric(str(path)) == load_rubric(path.stem)
        assert len({level for c in load_rubric(path.stem).criteria for level in c.levels}) >= 25


BAD = [
    ('name: mine\nversion: "2"', "name: My Rubric\nversion: 2", "name: wanted lower-case letters, digits and _"),
    ('version: "2"', "version: 2", "version: wanted a text, got 2. Put it in quotes."),
    ('version: "2"\n', "", "version: wanted a value, got nothing. Add it."),
    ('version: "2"', "versoin: '2'", "version: wanted a value, got nothing"),
    ("criteria:", "author: me\ncriteria:", "author: wanted no such field, got one. Known are name, version, criteria."),
    ("    weight: 2", "    wieght: 2", "criteria[0].wieght: wanted no such field, got one. Known are name, question,"),
    ("    weight: 2", "    weight: -1", "criteria[0].weight: wanted a number from 0, got -1."),
    ("    weight: 2", "    weight: .inf", "criteria[0].weight: wanted a finite number, got inf."),
    ("    weight: 2", "    weight: '2'", "criteria[0].weight: wanted a number, got '2'. Write it without quotes."),
    ("    weight: 2", "    weight: true", "criteria[0].weight: wanted a number, got True."),
    ("question: Is it kind?", "question: yes", "criteria[0].question: wanted a text, got True. Put it in quotes."),
    ("question: Is it kind?", "question: ''", "criteria[0].question: wanted a text that is not empty, got ''."),
    ("question: Is it kind?", 'question: "a\\nb"', "criteria[0].question: wanted one line of text, got 'a\\nb'."),
    (", 5: e}", "}", "criteria[0].levels.5: wanted a value, got nothing. Add it."),
    (", 5: e}", ", 5: e, 6: f}", "criteria[0].levels.6: wanted no such field, got one. Known are 1, 2, 3, 4, 5."),
    (", 5: e}", ", 5: e, 5: f}", "file: wanted YAML, got the key 5 stands twice"),
    ("{1: a, 2: b, 3: c, 4: d, 5: e}", "[a, b, c, d, e]", "criteria[0].levels: wanted a mapping with named fields"),
    ("- name: depth", "- name: tone", "criteria[1].name: wanted each name once, got 'tone'. Rename one of them."),
    ("- name: depth", "- name: item_2", "criteria[1].name: wanted another name, got 'item_2'. Names like item_1"),
    ("- name: depth", "- name: Depth!", "criteria[1].name: wanted lower-case letters, digits and _, a letter first"),
    ("[reasoning, under", "[thoughts, under", "criteria[1].sees[0]: wanted one of 'understanding', 'reasoning' or"),
    ("[reasoning, understanding]", "[]", "criteria[1].sees: wanted at least one entry, got []."),
    ("[reasoning, understanding]", "reply", "criteria[1].sees: wanted a list, got 'reply'. Start each entry with"),
    (
        "[reasoning, understanding]",
        "[reply, reply]",
        "criteria[1]: wanted a criterion that can be asked, got depth.sees",
    ),
    ("cap: 2, b", "cap: 5, b", "criteria[0].vetoes[0].cap: wanted a number up to 4, got 5."),
    ("cap: 2, b", "cap: 2.5, b", "criteria[0].vetoes[0].cap: wanted a whole number, got 2.5."),
    (", because: long", "", "criteria[0].vetoes[0].because: wanted a value, got nothing. Add it."),
    (
        "max_words: 60, cap",
        "cap",
        "criteria[0].vetoes[0]: wanted exactly one of max_words, phrases, pattern, contains, got none",
    ),
    (
        "max_words: 60",
        "max_words: 60, pattern: a",
        "contains, got max_words and pattern. Write one veto for each rule.",
    ),
    ("max_words: 60", "max_word: 60", "criteria[0].vetoes[0].max_word: wanted no such field, got one. Known are max_w"),
    (
        '"ha+"',
        '"(ha"',
        "criteria[0].vetoes[2].pattern: wanted a rule that can be applied, got pattern: wanted a regular",
    ),
    ('"ha+"', '"h*"', "criteria[0].vetoes[2].pattern: wanted a rule that can be applied"),
    ("contains: url", "contains: emoji", "criteria[0].vetoes[3].contains: wanted one of 'judge_talk', 'url', 'tag' or"),
    ("name: mine", "name: mine: yours", "file: wanted YAML, got mapping values are not allowed here"),
    ("name: mine", "name: &a [*a]", "name: wanted a text"),
    ("name: mine", "name: !!python/object:os.system ls", "file: wanted YAML, got could not determine a constructor"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_a_bad_file_names_file_field_wish_find_and_fix(tmp_path: pathlib.Path, old: str, new: str, message: str):
    assert old in TEXT
    with pytest.raises(RubricError) as caught:
        load(tmp_path, TEXT.replace(old, new, 1))
    assert str(caught.value).startswith(str(tmp_path / "mine.yaml: "))
    assert message in str(caught.value)


def test_only_zeros_and_no_criteria_are_refused(tmp_path: pathlib.Path):
    with pytest.raises(RubricError, match="criteria: wanted at least one weight above 0, got only zeros"):
        load(
            tmp_path,
            TEXT.replace("weight: 2", "weight: 0").replace("question: Is it sound?", "question: x\n    weight: 0"),
        )
    with pytest.raises(RubricError, match="criteria: wanted at least one entry"):
        load(tmp_path, 'name: a\nversion: "1"\ncriteria: []')
    for text in ("", "just words", "- a\n- b"):
        with pytest.raises(RubricError, match="rubric: wanted a mapping with name, version and criteria"):
            load(tmp_path, text)


def test_names_and_paths_that_are_not_there_say_what_there_is(tmp_path: pathlib.Path):
    with pytest.raises(
        RubricError, match=r"one of kardia_five, kardia_five_strict, or a path .* Did you mean kardia_five\?"
    ):
        load_rubric("kardia_fiv")
    with pytest.raises(
        RubricError, match=r"gone\.yaml: file: wanted a readable YAML file in UTF-8, got .*Check the path"
    ):
        load_rubric(str(tmp_path / "gone.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(RubricError, match="UTF-8"):
        load_rubric(str(tmp_path / "latin.yaml"))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(1, 6), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.sampled_from(["name", "version", "criteria", "question", "levels", "weight", "sees", "vetoes", "cap"]), JUNK)
@settings(deadline=None, max_examples=100)
def test_any_value_in_any_field_is_read_or_refused_by_our_own_error(tmp_path_factory, field: str, value: object):
    content = yaml.safe_load(TEXT)
    places = {"question", "levels", "weight", "sees", "vetoes"}
    target = (
        content["criteria"][0]
        if field in places
        else content["criteria"][0]["vetoes"][0]
        if field == "cap"
        else content
    )
    target[field] = value
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    with contextlib.suppress(RubricError):
        assert isinstance(load_rubric(str(path)), Rubric)


def test_a_fingerprint_notices_every_change_and_nothing_else(tmp_path: pathlib.Path):
    changes = [("mine", "yours"), ('"2"', '"3"'), ("kind", "warm"), ("weight: 2", "weight: 3"), ("1: a", "1: z")]
    changes += [("[reasoning, understanding]", "[reply]"), ("max_words: 60", "max_words: 61"), ("cap: 2", "cap: 3")]
    changes += [
        ("because: long", "because: wide"),
        ("contains: url", "contains: tag"),
        ("phrases: [calm", "phrases: [cool"),
    ]
    prints = [load(tmp_path, TEXT.replace(old, new, 1)).fingerprint for old, new in [("", ""), *changes]]
    assert len(set(prints)) == len(prints)
    assert all(len(one) == 16 for one in prints)
    assert load(tmp_path, "# a remark\n" + TEXT.replace("weight: 2", "weight: 2.0")).fingerprint == prints[0]
