"""The format term: 1 when a completion parses into its four spans, else 0.

In: what ``dialogue.spans.parse`` made of the completion's text (special tokens kept, end and padding
removed).

>>> from kardia_jax.dialogue.spans import parse
>>> format_score(parse("I am so sorry."))
0.0
"""

from kardia_jax.dialogue.spans import Malformed, Spans


def format_score(parsed: Spans | Malformed) -> float:
    """1.0 for four spans in order, none empty, a known label and nothing outside them; 0.0 otherwise."""
    return float(isinstance(parsed, Spans))
