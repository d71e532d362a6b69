"""A GGUF file as the source of a policy: our own model on its numbers, its tokenizer and its ends."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from gguf import TokenType
from tokenizers import pre_tokenizers

import kardia_jax
from kardia_jax.config import ModelConfig
from kardia_jax.dialogue.spans import TAGS
from kardia_jax.hf import gguf
from kardia_jax.hf.convert import convert
from kardia_jax.hf.read import load_params
from kardia_jax.hf.tables import HfError
from kardia_jax.model.policy import Compute, logits
from kardia_jax.model.spec import ModelSpec
from kardia_jax.policies import load_policy

LOGIT_TOLERANCE = 1e-4
"""float32 on both sides; what is left is the order of sums."""
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
ROWS = 272


def add_tokens(writer):
    """The bytes, one pair, and four special tokens, of which two end a turn."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", *special]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 4)
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_eot_token_id(tokens.index("<|eot_id|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))


def written(write_gguf, family, kind="F32"):
    return write_gguf(family, kind, extra=add_tokens, vocab=False, vocab_size=ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_logits_are_those_of_the_model_that_was_written(write_gguf, family):
    made = written(write_gguf, family)
    spec = ModelSpec.from_hf(gguf.config(made.file))
    assert spec == ModelSpec.from_hf(made.model.config.to_dict())
    params = load_params(made.file, spec)
    tokens = np.arange(1, 25, dtype=np.int32).reshape(1, -1)
    ours = logits(spec, Compute(), params, tokens, np.array([24]))
    with torch.no_grad():
        theirs = made.model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)


def test_a_policy_of_a_file(write_gguf):
    made = written(write_gguf, "qwen2", "Q8_0")
    policy = load_policy(ModelConfig(source=str(made.file)), seed=0)
    assert policy.spec.vocab_size == ROWS, "the tags find room in the padding"
    assert policy.spec.token_count == 261 + len(TAGS)
    assert policy.end_ids == (259, 260)
    assert policy.pad_id == 257
    assert policy.tokenizer("he<|im_end|>").input_ids == [256, 259]
    ((_, table),) = gguf.tensors(made.file, ["model.embed_tokens.weight"])
    np.testing.assert_array_equal(policy.params["embed"]["embedding"][:261], table[:261])


def test_a_directory_with_one_file_is_that_file(write_gguf):
    made = written(write_gguf, "qwen3")
    policy = load_policy(ModelConfig(source=str(made.file.parent)), seed=0)
    assert dataclasses.replace(policy.spec, token_count=None) == ModelSpec.from_hf(gguf.config(made.file))


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(HfError, match=r"gone.gguf: wanted a .gguf file or a directory with one, got nothing there"):
        load_policy(ModelConfig(source=str(tmp_path / "gone.gguf")), seed=0)


def test_metadata_and_tensors_must_agree(write_gguf):
    made = write_gguf("qwen2", extra=lambda writer: writer.kv_data[0].pop("qwen2.block_count"))
    with pytest.raises(HfError, match=r"qwen2.block_count"):
        load_policy(ModelConfig(source=str(made.file)), seed=0)
    made = write_gguf("qwen2", extra=lambda writer: writer.add_block_count(3), file="three.gguf")
    with pytest.raises(HfError, match=r"missing: model.layers.2.input_layernorm.weight"):
        load_policy(ModelConfig(source=str(made.file)), seed=0)


def test_an_imported_file_brings_its_own_tokenizer_and_ends_whatever_lies_beside_it(write_gguf, tmp_path):
    made = written(write_gguf, "qwen2", "Q8_0")
    (tmp_path / "in").mkdir()
    shutil.copy(made.file, tmp_path / "in" / "model.gguf")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "in" / name).write_text('{"eos_token_id": 1}', "utf-8")
    convert(tmp_path / "in", tmp_path / "out")
    wanted = gguf.tokenizer(made.file)
    imported = kardia_jax.load(tmp_path / "out")
    assert imported.tokenizer is not None
    assert imported.tokenizer.get_vocab() == wanted.get_vocab()
    assert imported.tokenizer.chat_template == wanted.chat_template
    assert set(imported.end_ids) == {259, 260}
    tokens, lengths = np.arange(1, 25, dtype=np.int32).reshape(1, -1), np.array([24])
    packed = kardia_jax.logits(kardia_jax.load(made.file), tokens, lengths)
    np.testing.assert_array_equal(kardia_jax.logits(imported, tokens, lengths), packed)
