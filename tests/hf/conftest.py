"""Tiny checkpoints as somebody would bring them.

``checkpoint``: safetensors, config, generation settings, tokenizer, licence. ``write_gguf``: a transformers model of
each architecture of GGUF, written as llama.cpp's converter writes it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import gguf
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


class Written(NamedTuple):
    file: pathlib.Path
    model: object
    """The transformers model whose weights were written."""
    state: dict[str, np.ndarray]
    """Its weights, float32; the head of a tied model left out."""


def classes(architecture):
    import transformers as hf

    return {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
        "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM),
    }[architecture]


SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Rows of 64 and 96 are whole blocks of 32, which Q4_0 and its like need."""

# transformers takes the head width of a qwen2 file from D/H and that of a qwen3 file from its default, 128.
OWN = {
    "llama": {"head_dim": 24, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    "qwen2": {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "qwen3": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": 1},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
}


def tiny_model(architecture, changes):
    """A model with random weights everywhere: biases and norms are not left at their neutral values."""
    import torch

    config_class, model_class = classes(architecture)
    tied = {"tie_word_embeddings": architecture in ("qwen2", "gemma3")}
    config = config_class(**(SIZES | OWN[architecture] | tied | changes))
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def state_of(model):
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in tied}


def permuted(weight, heads):
    """llama.cpp's ``LlamaModel.permute``: what an interleaved rotary embedding wants."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def converted(architecture, name, tensor, config):
    """A tensor as the converter changes it before it is quantised."""
    if architecture == "llama" and "q_proj" in name:
        return permuted(tensor, config.num_attention_heads)
    if architecture == "llama" and "k_proj" in name:
        return permuted(tensor, config.num_key_value_heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor + np.float32(1)
    return tensor


def gguf_names(architecture, layers):
    """From Hugging Face to GGUF, by the table of the gguf package and not by ours."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, layers)

    def renamed(name):
        base, kind = name.rsplit(".", 1)
        return f"{table.get_name(base)}.{kind}"

    return renamed


def add_sizes(writer, architecture, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)


@pytest.fixture
def write_gguf(tmp_path):
    """``write_gguf("llama", "Q4_0", extra, **config)``: matrices of this type, vectors float32.

    ``extra(writer)`` adds metadata or tensors; ``split`` is the number of tensors in one file of a set.
    """

    def write(architecture, kind="F32", extra=None, split=0, vocab=True, file="model.gguf", **changes):
        model = tiny_model(architecture, changes)
        state, config = state_of(model), model.config
        path = tmp_path / file
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
        add_sizes(writer, architecture, config)
        if vocab:
            writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
        renamed = gguf_names(architecture, config.num_hidden_layers)
        for name, tensor in state.items():
            numbers = np.ascontiguousarray(converted(architecture, name, tensor, config))
            packed = gguf.GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
            writer.add_tensor(renamed(name), gguf.quants.quantize(numbers, packed), raw_dtype=packed)
        if extra is not None:
            extra(writer)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return Written(path, model, state)

    return write
