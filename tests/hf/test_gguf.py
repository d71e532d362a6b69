"""Whole models: what we read of a file is what was written, and what transformers reads of it."""

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from transformers import AutoConfig, AutoModelForCausalLM

from kardia_jax.hf import gguf
from kardia_jax.hf.gguf_names import unpermuted

ROUNDING = 2e-6
"""Of logits near 1 in float32: batches of another layout are summed in another order."""
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_all(file):
    return dict(gguf.tensors(file, [found.name for found in gguf.inspect(file)]))


def logits(model):
    tokens = torch.arange(1, 25).reshape(1, -1)
    with torch.no_grad():
        return model(tokens).logits.numpy()


def rebuilt(file):
    """A transformers model out of our config and our tensors alone."""
    config = gguf.config(file)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in read_all(file).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_comes_back_as_it_was(write_gguf, family):
    written = write_gguf(family)
    wanted = written.state
    if family == "gemma3":  # 1 + w is rounded when the file is made; nothing can undo that
        norms = {name: (tensor + np.float32(1)) - np.float32(1) for name, tensor in wanted.items() if "norm" in name}
        wanted = wanted | norms
    assert_same(read_all(written.file), wanted)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_one_that_transformers_reads(write_gguf, family, kind):
    written = write_gguf(family, kind)
    theirs = AutoModelForCausalLM.from_pretrained(written.file.parent, gguf_file=written.file.name)
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    wanted = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items() if name not in tied}
    assert_same(read_all(written.file), wanted)
    assert written.state.keys() == wanted.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_the_one_that_transformers_reads(write_gguf, family):
    written = write_gguf(family)
    ours = gguf.config(written.file)
    theirs = AutoConfig.from_pretrained(written.file.parent, gguf_file=written.file.name).to_dict()
    assert np.float32(ours.pop("rms_norm_eps")) == np.float32(theirs["rms_norm_eps"])
    # transformers has no idea of these: of Gemma's scale it knows the default alone, and Qwen2 has no head_dim field.
    own = {"architectures", "rope_theta", "query_pre_attn_scalar", *(("head_dim",) if family == "qwen2" else ())}
    assert {name: value for name, value in ours.items() if name not in own and theirs[name] != value} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_tensors_make_the_model_that_was_written(write_gguf, family):
    written = write_gguf(family, attention_bias=True) if family == "llama" else write_gguf(family)
    np.testing.assert_allclose(logits(rebuilt(written.file)), logits(written.model), rtol=0, atol=ROUNDING)


def test_four_rows_by_hand():
    """Two heads of E = 4: pairs (0, 2) and (1, 3) of a head stood beside each other."""
    stored = np.array([0, 2, 1, 3, 10, 12, 11, 13])[:, None] * np.ones((1, 3), np.float32)
    assert unpermuted(stored, 2)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert unpermuted(np.array([0, 2, 1, 3]), 1).tolist() == [0, 1, 2, 3]


def test_keys_are_put_back_by_their_own_heads(write_gguf):
    written = write_gguf("llama", num_attention_heads=4, num_key_value_heads=1, attention_bias=True)
    found = read_all(written.file)
    for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight"):
        full = f"model.layers.1.self_attn.{name}"
        np.testing.assert_array_equal(found[full], written.state[full])
    assert gguf.config(written.file)["attention_bias"] is True


def test_shapes_and_names_come_from_the_headers(write_gguf):
    written = write_gguf("qwen3", "Q8_0", head_dim=32)
    found = {tensor.name: (tensor.file, tensor.dtype, tensor.shape) for tensor in gguf.inspect(written.file)}
    assert found == {name: (written.file, "F32", tensor.shape) for name, tensor in written.state.items()}


def test_the_head_width_of_qwen3_is_read_and_not_assumed(write_gguf):
    written = write_gguf("qwen3", head_dim=32)
    assert gguf.config(written.file)["head_dim"] == 32
    np.testing.assert_allclose(logits(rebuilt(written.file)), logits(written.model), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_where_the_file_has_none(write_gguf, tied):
    written = write_gguf("llama", tie_word_embeddings=tied)
    assert gguf.config(written.file)["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in read_all(written.file)) is not tied


def test_padding_rows_of_the_table_count(write_gguf):
    """The metadata may tell the number of tokens; the table decides."""
    written = write_gguf("qwen2", extra=lambda writer: writer.add_vocab_size(37))
    assert gguf.config(written.file)["vocab_size"] == 40


def llama3_factors(head_dim, rope):
    """llama.cpp's converter: by how much each frequency is divided. Source: generate_extra_tensors of LlamaModel."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for pair in range(head_dim // 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        smooth = (rope["original_max_position_embeddings"] / wave - 1) / 3
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if wave < high else rope["factor"] if wave > low else between)
    return np.array(factors, np.float32)


def test_the_scaling_of_llama_3_is_told_from_its_factors(write_gguf):
    factors = llama3_factors(64, LLAMA3)
    assert len(set(factors.tolist())) > 3, "wanted waves that are kept, divided and in between"
    sizes = {"head_dim": 64, "rope_parameters": LLAMA3, "max_position_embeddings": 16384}
    written = write_gguf("llama", extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors), **sizes)
    assert gguf.config(written.file)["rope_parameters"] == LLAMA3
    assert read_all(written.file).keys() == written.state.keys()
    np.testing.assert_allclose(logits(rebuilt(written.file)), logits(written.model), rtol=0, atol=ROUNDING)


def test_factors_of_one_are_no_scaling(write_gguf):
    ones = np.ones(12, np.float32)
    written = write_gguf("llama", extra=lambda writer: writer.add_tensor("rope_freqs.weight", ones))
    assert gguf.config(written.file)["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}


def test_linear_scaling_is_for_the_full_layers_of_gemma(write_gguf):
    def scaled(writer):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    written = write_gguf("gemma3", extra=scaled, rope_parameters=rope)
    config = gguf.config(written.file)
    assert config["rope_parameters"] == rope
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    np.testing.assert_allclose(logits(rebuilt(written.file)), logits(written.model), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("pattern", "full"), [(3, [2, 5]), ([True, False, True, True, True, False, True], [1, 5]), (1, range(7))]
)
def test_a_file_may_say_which_layers_slide(write_gguf, pattern, full):
    types = gguf.config(write_gguf("gemma3", extra=lambda writer: writer.add_sliding_window_pattern(pattern)).file)[
        "layer_types"
    ]
    assert types == ["full_attention" if layer in full else "sliding_attention" for layer in range(7)]


def test_yarn_is_read(write_gguf):
    def scaled(writer):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    written = write_gguf("qwen2", extra=scaled, rope_parameters=rope)
    assert gguf.config(written.file)["rope_parameters"] == rope | {"beta_fast": 32.0, "beta_slow": 1.0}
    np.testing.assert_allclose(logits(rebuilt(written.file)), logits(written.model), rtol=0, atol=ROUNDING)


def test_the_largest_gemma_scales_queries_otherwise(write_gguf):
    """27B, the one with 62 layers: D/H and not E. Source: llama.cpp, src/models/gemma3.cpp."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert gguf.config(write_gguf("gemma3", **small).file)["query_pre_attn_scalar"] == 32
    large = write_gguf("gemma3", file="large.gguf", num_hidden_layers=62, **small)
    assert gguf.config(large.file)["query_pre_attn_scalar"] == 16


def test_a_chat_model_stops_at_its_end_of_turn_too(write_gguf):
    def ids(writer):
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)

    config = gguf.config(write_gguf("gemma3", extra=ids).file)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 5])


def test_a_split_set_is_one_model(write_gguf, tmp_path):
    whole = read_all(write_gguf("llama", "Q8_0").file)
    (tmp_path / "model.gguf").unlink()
    write_gguf("llama", "Q8_0", split=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in (tmp_path, parts[0], parts[-1]):
        assert gguf.is_gguf(path)
        assert_same(read_all(path), whole)
        assert gguf.config(path)["num_hidden_layers"] == 2
    assert {found.file for found in gguf.inspect(tmp_path)} == set(parts)


def test_what_counts_as_gguf(write_gguf, tmp_path):
    file = write_gguf("llama").file
    assert gguf.is_gguf(file)
    assert gguf.is_gguf(tmp_path)
    assert not gguf.is_gguf(tmp_path / "config.json")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert not gguf.is_gguf(tmp_path), "which of two models is meant is not guessed"
    (tmp_path / "other.gguf").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert not gguf.is_gguf(tmp_path)


def test_a_file_that_is_written_anew_is_read_anew(write_gguf):
    first = read_all(write_gguf("llama", "Q8_0").file)
    second = read_all(write_gguf("llama", "F32").file)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(first[name], second[name])
