"""Bad files: each is refused by name, with what was wanted, what came and what to do."""

import gguf as package
import numpy as np
import pytest

from kardia_jax.hf import gguf
from kardia_jax.hf.tables import HfError


def test_nothing_there(tmp_path):
    with pytest.raises(HfError, match=r"none.gguf: wanted a .gguf file or a directory with one, got nothing there"):
        gguf.config(tmp_path / "none.gguf")


def test_a_directory_must_leave_no_choice(write_gguf, tmp_path):
    write_gguf("llama", file="a.gguf")
    write_gguf("llama", file="b.gguf")
    with pytest.raises(HfError, match=r"wanted the GGUF of one model, got \['a.gguf', 'b.gguf'\]. Name the file."):
        gguf.config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"version https://git-lfs", b"PK\x03\x04" * 100])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(HfError, match=r"x.gguf: wanted a GGUF file, which begins with b'GGUF', got b'.*'. Download"):
        gguf.inspect(tmp_path / "x.gguf")


def test_a_file_cut_short_anywhere(write_gguf, tmp_path):
    """In the header, the metadata, the table of tensors and the numbers."""
    whole = write_gguf("llama", "Q8_0").file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for share in (*np.linspace(5, len(whole) - 40, 40), len(whole) - 1):
        cut.write_bytes(whole[: int(share)])
        with pytest.raises(HfError, match=r"cut.gguf: damaged or cut short .*Download it again"):
            gguf.inspect(cut)


def test_damaged_lengths_are_not_followed(write_gguf, tmp_path):
    whole = bytearray(write_gguf("llama").file.read_bytes())
    whole[24:32] = b"\xff" * 8  # the length of the first key
    (tmp_path / "wild.gguf").write_bytes(whole)
    with pytest.raises(HfError, match=r"wild.gguf: damaged or cut short"):
        gguf.config(tmp_path / "wild.gguf")


def test_unknown_architecture(tmp_path):
    writer = package.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    message = r"x.gguf: wanted general.architecture one of \('llama', 'qwen2', 'qwen3', 'gemma3'\), got 'mamba'"
    for door in (gguf.config, gguf.inspect, lambda path: list(gguf.tensors(path, []))):
        with pytest.raises(HfError, match=message):
            door(tmp_path / "x.gguf")


def test_unknown_tensors_are_listed(write_gguf):
    def more(writer):
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 2), np.float32))
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    file = write_gguf("qwen2", extra=more).file
    with pytest.raises(HfError, match=r"qwen2 model, got also blk.0.ffn_gate_exps.weight, rope_freqs.weight. Convert"):
        gguf.inspect(file)


def test_a_tensor_that_is_not_there(write_gguf):
    file = write_gguf("qwen2").file
    with pytest.raises(HfError, match=r"model.gguf: wanted a tensor lm_head.weight, got none"):
        list(gguf.tensors(file, ["model.norm.weight", "lm_head.weight"]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 8, r"wanted a plain llama model, got llama.expert_count = 8"),
        ("attention.sliding_window", 4096, r"wanted a plain llama model, got llama.attention.sliding_window = 4096"),
        ("rope.dimension_count", 12, r"wanted llama.rope.dimension_count = 24, as the keys are, got 12"),
        ("attention.value_length", 16, r"wanted llama.attention.value_length = 24, as the keys are, got 16"),
        ("block_count", 0, r"wanted llama.block_count to be a positive whole number, got 0"),
        (
            "attention.head_count_kv",
            [2, 1],
            r"wanted llama.attention.head_count_kv to be .* whole number, got \[2, 1\]",
        ),
        ("rope.freq_base", float("nan"), r"wanted llama.rope.freq_base to be a positive number, got nan"),
        ("rope.scaling.type", "longrope", r"wanted llama.rope.scaling.type none, linear or yarn, got 'longrope'"),
        ("rope.scaling.type", "linear", r"wanted llama.rope.scaling.factor to be a positive number, got None"),
        ("rope.scaling.yarn_log_multiplier", 0.1, r"got llama.rope.scaling.yarn_log_multiplier = 0.1"),
    ],
)
def test_metadata_that_would_change_the_result(write_gguf, key, value, message):
    """Written over, or beside, what a sound file has."""

    def change(writer):
        full = f"llama.{key}"
        for keys in writer.kv_data:
            keys.pop(full, None)
        add = writer.add_array if isinstance(value, list) else writer.add_key_value
        kinds = {
            int: package.GGUFValueType.UINT32,
            float: package.GGUFValueType.FLOAT32,
            str: package.GGUFValueType.STRING,
        }
        add(full, value) if isinstance(value, list) else add(full, value, kinds[type(value)])

    file = write_gguf("llama", extra=change).file
    with pytest.raises(HfError, match=r"model.gguf: .*" + message):
        gguf.config(file)


@pytest.mark.parametrize(
    "key", ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"]
)
def test_missing_metadata_is_named(write_gguf, key):
    def without(writer):
        for keys in writer.kv_data:
            keys.pop(f"qwen3.{key}", None)

    file = write_gguf("qwen3", extra=without).file
    with pytest.raises(HfError, match=rf"model.gguf: wanted qwen3.{key} to be a positive whole number, got None"):
        gguf.config(file)


def test_a_count_of_nothing_is_fine(write_gguf):
    """Some writers say that a model has no experts and no window."""

    def none(writer):
        writer.add_expert_count(0)
        writer.add_sliding_window(0)

    assert gguf.config(write_gguf("qwen2", extra=none).file)["num_hidden_layers"] == 2


def test_no_table_of_embeddings(tmp_path):
    writer = package.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    for add in (writer.add_head_count, writer.add_block_count, writer.add_embedding_length):
        add(2)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(HfError, match=r"vocab.gguf: wanted a tensor token_embd.weight, got 0 tensors without it"):
        gguf.config(tmp_path / "vocab.gguf")


def test_factors_that_are_not_those_of_llama_3(write_gguf):
    odd = np.linspace(1, 3, 12).astype(np.float32)
    file = write_gguf("llama", extra=lambda writer: writer.add_tensor("rope_freqs.weight", odd)).file
    with pytest.raises(HfError, match=r"wanted rope_freqs.weight to be the 12 factors of Llama 3.1's scaling"):
        gguf.config(file)


def test_a_split_set_with_a_missing_part(write_gguf, tmp_path):
    write_gguf("llama", split=7)
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    for path in (tmp_path, tmp_path / "model-00003-of-00003.gguf"):
        with pytest.raises(HfError, match=r"wanted 3 files of a split set, missing: model-00002-of-00003.gguf"):
            gguf.config(path)


def test_a_renamed_part_of_a_split_set(write_gguf, tmp_path):
    write_gguf("llama", split=7)
    (tmp_path / "model-00001-of-00003.gguf").rename(tmp_path / "alone.gguf")
    with pytest.raises(HfError, match=r"alone.gguf: wanted 3 files, as split.count says, got 1. Put all files"):
        gguf.config(tmp_path / "alone.gguf")
