from kardia_jax.dialogue.emotions import EMOTIONS, closest_emotion, is_emotion


def test_there_are_32_labels_in_alphabetical_order():
    assert len(EMOTIONS) == 32
    assert list(EMOTIONS) == sorted(set(EMOTIONS))
    assert all(label.isalpha() and label.islower() for label in EMOTIONS)


def test_a_label_is_itself_and_nothing_else():
    assert all(is_emotion(label) for label in EMOTIONS)
    assert not any(is_emotion(text) for text in ("Sad", " sad", "sad.", "", "happy", "sad, lonely"))


def test_the_closest_label_is_near_or_none():
    assert closest_emotion("Terrifed ") == "terrified"
    assert closest_emotion("hopefull") == "hopeful"
    assert closest_emotion("qwxzk") is None
    assert closest_emotion("") is None
