"""The mini set: our own synthetic dialogues, and the tokenizer trained on them. For tests and demos only.

Out: rows in the KardiaBench schema (``rows``) and a Hugging Face tokenizer directory (``tokenizer_dir``).
Both come from the hand-written material beside this file; ``CARD.md`` says how.

>>> first = rows("train")[0]
>>> sorted(first)
['anon_username', 'emotion', 'mbti', 'messages', 'person', 'situation']
>>> [message["role"] for message in first["messages"][:3]]
['system', 'user', 'assistant']
"""

import pathlib

from kardia_jax.dialogue.mini.dialogues import Row, Split, rows

__all__ = ["Row", "Split", "rows", "tokenizer_dir"]


def tokenizer_dir() -> pathlib.Path:
    """The shipped tokenizer, a directory for ``transformers.AutoTokenizer.from_pretrained``."""
    return pathlib.Path(__file__).parent / "tokenizer"
