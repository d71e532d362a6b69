"""The 32 emotion labels of EmpatheticDialogues, which KardiaBench and the model share.

In: a word that claims to be a label. Out: whether it is, and which label stands closest to it.

>>> is_emotion("nostalgic"), is_emotion("Nostalgic"), is_emotion("happy")
(True, False, False)
>>> closest_emotion("greatful")
'grateful'

Source: Rashkin et al. 2019, "Towards Empathetic Open-domain Conversation Models", table 1.
"""

import difflib

EMOTIONS: tuple[str, ...] = (
    "afraid",
    "angry",
    "annoyed",
    "anticipating",
    "anxious",
    "apprehensive",
    "ashamed",
    "caring",
    "confident",
    "content",
    "devastated",
    "disappointed",
    "disgusted",
    "embarrassed",
    "excited",
    "faithful",
    "furious",
    "grateful",
    "guilty",
    "hopeful",
    "impressed",
    "jealous",
    "joyful",
    "lonely",
    "nostalgic",
    "prepared",
    "proud",
    "sad",
    "sentimental",
    "surprised",
    "terrified",
    "trusting",
)

_LABELS = frozenset(EMOTIONS)


def is_emotion(text: str) -> bool:
    """Whether ``text`` is one of the 32 labels, exactly as written here: lower case, nothing around it."""
    return text in _LABELS


def closest_emotion(text: str) -> str | None:
    """The label spelled most like ``text``, or none when no label is near; for error messages only."""
    near = difflib.get_close_matches(text.strip().lower(), EMOTIONS, n=1, cutoff=0.6)
    return near[0] if near else None
