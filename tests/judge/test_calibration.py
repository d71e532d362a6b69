"""The shipped calibration set, and what is said about files that are none."""

import pytest

from kardia_jax.judge.calibration import (
    ADVERSARIAL,
    HONEST,
    CalibrationError,
    find_item,
    load_calibration,
)
from kardia_jax.rewards.kardia_five import KARDIA_FIVE

ITEMS = load_calibration()


def test_it_has_every_kind_many_emotions_and_only_criteria_of_the_default_rubric():
    assert len(ITEMS) >= 60
    assert {item.kind for item in ITEMS} == {*HONEST, *ADVERSARIAL}
    assert len({item.emotion for item in ITEMS}) >= 12
    assert {name for item in ITEMS for name in item.bands} == set(KARDIA_FIVE.names)
    assert all(sum(item.kind == kind for item in ITEMS) >= 2 for kind in ADVERSARIAL)


def test_every_dialogue_has_a_good_reply_and_worse_ones_and_no_text_comes_twice():
    for dialogue in {item.dialogue for item in ITEMS}:
        kinds = [item.kind for item in ITEMS if item.dialogue == dialogue]
        assert kinds.count("good") >= 1
        assert kinds.count("good") < len(kinds)
    replies = [item.request.reply for item in ITEMS]
    assert len(set(replies)) == len(replies)


def test_the_bands_of_good_replies_stand_above_those_of_bad_ones():
    def middle(kind: str, name: str) -> float:
        middles = [sum(item.bands[name]) / 2 for item in ITEMS if item.kind == kind and name in item.bands]
        return sum(middles) / len(middles)

    for name in ("relevance", "empathy", "persona_consistency", "safety"):
        assert middle("good", name) > middle("mediocre", name) or name == "safety"
        assert middle("good", name) > middle("bad", name) + 1


def test_an_item_is_found_by_its_id_and_a_slip_is_met_with_the_nearest():
    assert find_item(ITEMS, "old-dog/good-bowl").request.history[0][0] == "user"
    with pytest.raises(CalibrationError, match="old-dog/good-bowl"):
        find_item(ITEMS, "old-dog/good-bowel")


ONE = """
- id: tea
  emotion: sad
  profile: "About: a baker."
  situation: The tea is cold.
  history: [[user, "It is cold."]]
  replies:
    - {id: good, kind: good, reply: "Cold tea, of all things.", bands: {empathy: [3, 5]}, note: "It is about tea."}
"""


def test_a_set_of_ones_own(tmp_path):
    (tmp_path / "own.yaml").write_text(ONE)
    (item,) = load_calibration([tmp_path])
    assert (item.id, item.bands, item.adversarial) == ("tea/good", {"empathy": (3, 5)}, False)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("emotion: sad", "emotion: cold", "wanted one of the 32 labels, got 'cold'"),
        ("kind: good", "kind: nice", "wanted a kind of good, mediocre, bad"),
        ("[3, 5]", "[5, 3]", "within 1 to 5"),
        ("[3, 5]", "[0, 5]", "within 1 to 5"),
        ("[3, 5]", "high", "bands"),
        ("[[user,", "[[judge,", "wanted a role of user, assistant"),
        ("situation:", "situaton:", "situation"),
        ("- id: tea", "- id: [tea", "wanted YAML"),
    ],
)
def test_a_file_that_is_none_says_where(tmp_path, old, new, said):
    path = tmp_path / "own.yaml"
    path.write_text(ONE.replace(old, new))
    with pytest.raises(CalibrationError) as refused:
        load_calibration([path])
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_ids_that_come_twice_and_places_that_are_not_there(tmp_path):
    (tmp_path / "a.yaml").write_text(ONE)
    (tmp_path / "b.yaml").write_text(ONE)
    with pytest.raises(CalibrationError, match="tea/good twice"):
        load_calibration([tmp_path])
    with pytest.raises(CalibrationError, match="nowhere"):
        load_calibration([tmp_path / "nowhere"])
