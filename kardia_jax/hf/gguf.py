"""A model out of a GGUF file, without torch: its config.json, its tensors under Hugging Face names, its tokenizer.

In: a .gguf file, any file of a split set, or a directory with the GGUF of one model. Out: what a Hugging Face
directory would hold. Packed weights are dequantised to float32, one tensor at a time; norms and rotary rows are as
Hugging Face has them.

    path = pathlib.Path("SmolLM2-135M-Instruct.Q4_1.gguf")
    spec = ModelSpec.from_hf(config(path))
    for name, tensor in tensors(path, [found.name for found in inspect(path)]):
        ...                                        # "model.embed_tokens.weight", float32 [49152, 576]

Architectures: llama, qwen2, qwen3, gemma3. Types: ``gguf_file.TYPES``. Everything else is refused by name.
"""

import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from kardia_jax.hf.gguf_config import ORIGINAL, architecture_of, config_of, head_count, kv_head_count
from kardia_jax.hf.gguf_file import Contents, Stored, dequantised, is_gguf, listed, read, require_types
from kardia_jax.hf.gguf_names import ROPE_FACTORS, hf_name, hf_values
from kardia_jax.hf.tables import Found, HfError

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase

__all__ = ["companions", "config", "inspect", "is_gguf", "tensors", "tokenizer"]


def config(path: pathlib.Path) -> dict[str, Any]:
    """A Hugging Face config.json; HfError for metadata that is missing, or unknown and may change the result."""
    return config_of(read(path))


def inspect(path: pathlib.Path) -> list[Found]:
    """Every tensor under its Hugging Face name and shape, from the headers alone; F32, as ``tensors`` gives it.

    Raises HfError, in one message each, for tensors that the architecture does not have and for types not read.
    """
    stored = _by_hf_name(read(path))
    require_types(list(stored.values()))
    return [Found(name, tensor.file, "F32", tensor.shape) for name, tensor in stored.items()]


def tensors(path: pathlib.Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by Hugging Face name, float32, in Hugging Face layout; one is in memory at a time."""
    held = read(path)
    row, stored = architecture_of(held), _by_hf_name(held)
    heads, kv_heads = head_count(held, row), kv_head_count(held, row)
    for name in names:
        if name not in stored:
            raise HfError(f"{held.file}: wanted a tensor {name}, got none. Check that the file is whole.")
        tensor = stored[name]
        yield name, hf_values(row, tensor.name, dequantised(tensor), heads, kv_heads)


def tokenizer(path: pathlib.Path) -> "PreTrainedTokenizerBase":
    """The tokenizer and chat template of the file."""
    from kardia_jax.hf.gguf_tokenizer import tokenizer_of

    return tokenizer_of(read(path))


def companions(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """None: the file holds tokenizer and settings itself, and what lies beside it may belong to another model."""
    del path
    return {}


def _by_hf_name(held: Contents) -> dict[str, Stored]:
    row = architecture_of(held)
    # The factors of Llama 3.1's rotary scaling are read into the config.
    weights = {name: tensor for name, tensor in held.stored.items() if (row.name, name) != ("llama", ROPE_FACTORS)}
    unknown = [name for name in weights if hf_name(row, name) is None]
    if unknown:
        raise HfError(f"{held.file}: wanted the tensors of a {row.name} model, got also {listed(unknown)}. {ORIGINAL}")
    return {renamed: tensor for name, tensor in weights.items() if (renamed := hf_name(row, name)) is not None}
