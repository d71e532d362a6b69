"""The tokenizer and chat template that the metadata of a GGUF file describe, built by transformers, without torch.

In: ``Contents`` of a file. Out: the fast tokenizer that ``AutoTokenizer.from_pretrained(dir, gguf_file=...)`` gives.

    tokenizer = tokenizer_of(read(path))
    tokenizer.apply_chat_template([{"role": "user", "content": "I failed my exam."}], tokenize=False)

transformers' own way in needs torch, because its file reader does; the conversion alone does not.
"""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from kardia_jax.hf.gguf_file import AGAIN, Contents
from kardia_jax.hf.tables import HfError

MODELS = ("gpt2", "llama")
"""Kinds of ``tokenizer.ggml.model``: byte-level BPE and SentencePiece."""
PLAIN_SPLITS = ("gpt-2", "gpt2", "default", "smollm")
"""Kinds of ``tokenizer.ggml.pre`` that transformers splits as GPT-2 does."""

SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def tokenizer_of(held: Contents) -> PreTrainedTokenizerBase:
    """The tokenizer, with its special tokens and chat template.

    Raises HfError for a kind of tokenizer that would be built wrongly, and for missing or misshapen metadata.
    """
    architecture = held.metadata.get("general.architecture", "")
    parts = _renamed(held, "tokenizer")
    _require_supported(held, parts)
    try:
        backend, _ = convert_gguf_tokenizer(architecture, parts)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise HfError(f"{held.file}: wanted a tokenizer in tokenizer.ggml.*, got {error!r}. {AGAIN}") from error
    settings = _renamed(held, "tokenizer_config") | {name: _token(held, key) for name, key in SPECIAL.items()}
    if parts["tokenizer_type"] == "llama":
        # Files from before the flag: llama.cpp begins every SentencePiece text with BOS.
        settings.setdefault("add_bos_token", True)
    return PreTrainedTokenizerFast(tokenizer_object=_only_of_the_file(backend, len(parts["tokens"])), **settings)


def _only_of_the_file(backend: Tokenizer, count: int) -> Tokenizer:
    """Without tokens from id ``count`` on: the classes of transformers bring defaults of their own.

    GPT-2's ``<|endoftext|>`` would be one more token than Llama 3 has rows for.
    """
    if backend.get_vocab_size(with_added_tokens=True) <= count:
        return backend
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(described))


def _renamed(held: Contents, group: str) -> dict[str, Any]:
    """The metadata of one group under the names of transformers."""
    names: dict[str, str] = GGUF_TOKENIZER_MAPPING[group]
    return {
        name: held.metadata[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in held.metadata
    }


def _token(held: Contents, key: str) -> str | None:
    """The token of an id in the metadata; None where the file names none."""
    number, tokens = held.metadata.get(key), held.metadata["tokenizer.ggml.tokens"]
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise HfError(f"{held.file}: wanted {key} below {len(tokens)} tokens, got {number}. {AGAIN}")
    return tokens[number]


def _require_supported(held: Contents, parts: dict[str, Any]) -> None:
    kind, split = parts.get("tokenizer_type"), parts.get("pre_tokenizer_type", "default")
    fix = "Convert the original Hugging Face checkpoint instead, with its tokenizer."
    if kind not in MODELS:
        raise HfError(f"{held.file}: wanted tokenizer.ggml.model one of {MODELS}, got {kind!r}. {fix}")
    if not parts.get("tokens"):
        raise HfError(f"{held.file}: wanted tokenizer.ggml.tokens, got none. {AGAIN}")
    needed = "merges" if kind == "gpt2" else "scores"
    if needed not in parts and "merges" not in parts:
        raise HfError(f"{held.file}: wanted tokenizer.ggml.{needed}, got none. {AGAIN}")
    if kind == "gpt2" and split not in (*GGUF_PRE_TOKENIZER_SPLITS, *PLAIN_SPLITS):
        known = sorted({*GGUF_PRE_TOKENIZER_SPLITS, *PLAIN_SPLITS})
        raise HfError(f"{held.file}: wanted tokenizer.ggml.pre one of {known}, got {split!r}. {fix}")
