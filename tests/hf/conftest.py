"""A tiny checkpoint as somebody would bring it: safetensors, config, generation settings, tokenizer, licence."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kardia_jax.hf.tables import entries, hf_shape, sizes
from kardia_jax.model.spec import ModelSpec

SPEC = ModelSpec("qwen3", vocab_size=16, width=8, mlp_width=6, layers=2, heads=4, kv_heads=2, head_dim=4)


def random_tensors(spec: ModelSpec, dtype: str) -> dict[str, np.ndarray]:
    numbers, lengths = np.random.default_rng(0), sizes(spec)
    shapes = {name: hf_shape(entry.rule, lengths) for name, entry in entries(spec).items()}
    return {name: numbers.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def words_tokenizer(ids: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(ids)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w3", pad_token="w1", chat_template="{{ messages[0].content }}"
    )


@pytest.fixture
def checkpoint(tmp_path) -> Callable[..., pathlib.Path]:
    """``checkpoint(dtype=..., tied=..., tokens=...)`` writes one to a folder and gives its path."""

    def write(
        name: str = "in", dtype: str = "float32", tied: bool = True, tokens: int = 10, family: str = "qwen3"
    ) -> pathlib.Path:
        folder = tmp_path / name
        folder.mkdir()
        spec = dataclasses.replace(SPEC, tied=tied, family=family)
        save_file(random_tensors(spec, dtype), folder / "model.safetensors", metadata={"format": "pt"})
        extra = {"torch_dtype": dtype, "initializer_range": 0.02, "bos_token_id": 2, "eos_token_id": 3}
        (folder / "config.json").write_text(json.dumps(spec.to_hf() | extra), "utf-8")
        stops = {"eos_token_id": [3, 5], "pad_token_id": 1, "repetition_penalty": 1.05}
        (folder / "generation_config.json").write_text(json.dumps(stops), "utf-8")
        (folder / "LICENSE").write_text("Do as you please.", "utf-8")
        if tokens:
            words_tokenizer(tokens).save_pretrained(str(folder))
        return folder

    return write
