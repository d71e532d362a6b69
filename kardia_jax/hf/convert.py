"""From one checkpoint to another, tensor by tensor: import, and export of a directory.

In: a directory of safetensors (or another source of ``kardia_jax.hf.read``), a target, a dtype. Out: a normalised
Hugging Face directory, complete or not there, which ``--model.source`` and ``kardia_jax.load`` read.

    convert(pathlib.Path("Qwen2.5-0.5B-Instruct"), pathlib.Path("models/qwen"), "bfloat16")

The parameters are never in memory together: the peak is one tensor.
"""

import functools
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kardia_jax.hf.container import CODES, Dtype
from kardia_jax.hf.folder import GENERATION, TOKENIZER_FILES
from kardia_jax.hf.read import (
    Found,
    inspect,
    require_fit,
    require_tied_head,
    require_tokenizer_fits,
    source_of,
    warn,
)
from kardia_jax.hf.write import (
    generation_config,
    published,
    refuse,
    require_apart,
    saved_config,
    write_json,
    write_weights,
)
from kardia_jax.model.spec import ModelSpec

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase as Tokenizer

KeptDtype = Literal["keep", "float32", "bfloat16", "float16"]
"""``keep``: the type that the checkpoint has."""


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    dtype: KeptDtype = "keep",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    card: str | None = None,
) -> None:
    """Writes the model again; config, tokenizer and generation settings stay as they are.

    ``card`` becomes the README.md where the source has none. NaN and infinity are said on stderr and kept; a number
    that the new dtype cannot hold is an error. Raises HfError for a model that is not supported, a source that is
    damaged or does not fit its config, and a target that is in use, is full or overlaps the source. The source is
    only read.
    """
    require_apart(source, target)
    origin, found = source_of(source), inspect(source)
    config = origin.config(source)
    spec = ModelSpec.from_hf(config)
    require_fit(source, spec, found)
    require_tied_head(source, spec)
    tokenizer = origin.tokenizer(source)
    require_tokenizer_fits(tokenizer, spec)
    wanted = stored_dtype(found) if dtype == "keep" else dtype
    with published(target, spec, wanted, overwrite) as partial:
        tensors = functools.partial(origin.tensors, source)
        write_weights(partial, tensors, spec, wanted, max_shard_size, functools.partial(_tell, source, wanted))
        write_json(partial / "config.json", saved_config(config, spec, wanted))
        _write_companions(partial, origin.companions(source), config, tokenizer)
        if card is not None and not (partial / "README.md").exists():
            (partial / "README.md").write_text(card, encoding="utf-8")


def stored_dtype(found: Sequence[Found]) -> Dtype:
    """The one 16-bit type of all tensors, else float32."""
    kinds = {CODES[tensor.dtype] for tensor in found}
    if kinds == {"bfloat16"}:
        return "bfloat16"
    return "float16" if kinds == {"float16"} else "float32"


def _tell(source: pathlib.Path, dtype: Dtype, name: str, was_finite: bool) -> None:
    if was_finite:
        refuse(dtype, name, was_finite)
    warn(f"{source}: {name} holds NaN or infinity; the converted model has them too.")


def _write_companions(
    dir: pathlib.Path, kept: Mapping[str, pathlib.Path], config: Mapping[str, Any], tokenizer: "Tokenizer | None"
) -> None:
    """Tokenizer, generation settings and papers: copied where the source has them as files, else made."""
    for name, file in kept.items():
        shutil.copyfile(file, dir / name)
    if tokenizer is not None and not set(TOKENIZER_FILES) & set(kept):
        tokenizer.save_pretrained(str(dir))
    if GENERATION not in kept:
        write_json(dir / GENERATION, generation_config(config, tokenizer))
