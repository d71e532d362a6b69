"""The emotion term: 1 when the predicted label is the dialogue's gold label, else 0.

>>> emotion_score(Spans("She waits.", "Waiting wears her out.", "anxious", "Waiting is hard."), "anxious")
1.0
"""

from kardia_jax.dialogue.emotions import EMOTIONS
from kardia_jax.dialogue.spans import Malformed, Spans


def emotion_score(parsed: Spans | Malformed, gold: str) -> float:
    """1.0 on an exact match with ``gold``; 0.0 on another label, and for a completion without a readable one.

    Raises ValueError when ``gold`` is none of the 32 labels: every completion would silently score 0.
    """
    if gold not in EMOTIONS:
        raise ValueError(f"emotion: wanted one of the {len(EMOTIONS)} labels, got {gold!r}. Check the data row.")
    return float(isinstance(parsed, Spans) and parsed.emotion == gold)
