"""A checkpoint as a directory of safetensors, single or sharded: the five questions that reading asks.

    config(dir)              the fields of config.json
    inspect(dir)             every tensor, from the headers alone
    tensors(dir, names)      these tensors, in this order, one in memory at a time
    tokenizer(dir)           the tokenizer, or None where the directory has none
    companions(dir)          files beside the weights that a converted model keeps as they are

``kardia_jax.hf.read`` calls them; a source of another kind answers the same five.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from kardia_jax.hf.container import Stored, read, stored
from kardia_jax.hf.tables import HfError

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase as Tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
PAPERS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""The model card, and what a licence asks to pass on with the weights."""
GENERATION = "generation_config.json"
AGAIN = "Download or export it again."


def config(dir: pathlib.Path) -> dict[str, Any]:
    """config.json; HfError where there is none or it is no JSON object."""
    if not (dir / "config.json").is_file():
        fix = "Give a Hugging Face model directory, as save_pretrained and `kardia export` write it."
        raise HfError(f"{dir}: wanted a directory with config.json, got none. {fix}")
    return read_json(dir / "config.json")


def inspect(dir: pathlib.Path) -> list[Stored]:
    """Every tensor of the directory, from the headers alone; a name that two shards hold comes twice."""
    return [tensor for file in _files(dir) for tensor in stored(file)]


def tensors(dir: pathlib.Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These tensors in this order, as the file has them."""
    found = {tensor.name: tensor for tensor in inspect(dir)}
    return read(found[name] for name in names)


def tokenizer(dir: pathlib.Path) -> "Tokenizer | None":
    """The directory's tokenizer, None where it has none; HfError for one that does not load."""
    if not has_tokenizer(dir):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(dir), local_files_only=True)
    except Exception as error:  # the library underneath raises a bare Exception for a file that it cannot parse
        fix = "Save it again with tokenizer.save_pretrained, or remove its files."
        raise HfError(f"{dir}: wanted a tokenizer, got {f'{error}'[:200]!r}. {fix}") from error


def has_tokenizer(dir: pathlib.Path) -> bool:
    """Whether any of the files is there from which a tokenizer is made."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((dir / name).is_file() for name in names)


def companions(dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files beside the weights that a converted model keeps byte for byte, by name."""
    named = [dir / name for name in (*TOKENIZER_FILES, GENERATION)]
    found = [*named, *(file for pattern in PAPERS for file in sorted(dir.glob(pattern)))]
    return {file.name: file for file in found if file.is_file()}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object; HfError names the file otherwise."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise HfError(f"{file}: wanted a JSON object, got {error}. {AGAIN}") from error
    if not isinstance(content, dict):
        raise HfError(f"{file}: wanted a JSON object, got a {type(content).__name__}. {AGAIN}")
    return content


def _files(dir: pathlib.Path) -> list[pathlib.Path]:
    if (dir / SINGLE).is_file():
        return [dir / SINGLE]
    if not (dir / INDEX).is_file():
        raise HfError(f"{dir}: wanted {SINGLE} or {INDEX}, got neither. {_pickles(dir)}")
    shards = read_json(dir / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise HfError(f"{dir / INDEX}: wanted a JSON object with a weight_map of file names, got none. {AGAIN}")
    foreign = sorted({name for name in shards.values() if pathlib.PurePath(name).name != name})
    if foreign:
        raise HfError(f"{dir / INDEX}: wanted files of this directory, got {foreign}. {AGAIN}")
    missing = sorted({name for name in shards.values() if not (dir / name).is_file()})
    if missing:
        raise HfError(f"{dir}: the index names files that are not there: {missing}. Download them again.")
    return [dir / name for name in sorted(set(shards.values()))]


def _pickles(dir: pathlib.Path) -> str:
    found = sorted(file.name for pattern in PICKLES for file in dir.glob(pattern))
    if not found:
        return "Save the model with safetensors (model.save_pretrained does)."
    fix = "With PyTorch: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors."
    return f"{', '.join(found[:8])}: pickles can run any code when they are opened, and are not read. {fix}"
