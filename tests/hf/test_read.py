import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kardia_jax.hf.read import load_params
from kardia_jax.hf.tables import HfError, entries, hf_shape, sizes
from kardia_jax.model.spec import ModelSpec

TIED = ModelSpec("qwen2", vocab_size=9, width=8, mlp_width=6, layers=2, heads=4, kv_heads=2, head_dim=2)


def weights(spec: ModelSpec = TIED) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = sizes(spec)
    return {
        name: generator.normal(size=hf_shape(entry.rule, lengths)).astype(np.float32)
        for name, entry in entries(spec).items()
    }


def write(dir, tensors):
    save_file(tensors, dir / "model.safetensors", metadata={"format": "pt"})


def test_layers_are_stacked_in_order(tmp_path):
    write(tmp_path, weights())
    params = load_params(tmp_path, TIED)
    up = weights()["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][1], up.T)
    assert params["blocks"]["attention"]["q"]["bias"].shape == (2, 4, 2)
    assert "head" not in params


def test_the_dtype_is_the_one_asked_for(tmp_path):
    write(tmp_path, {name: tensor.astype(np.float16) for name, tensor in weights().items()})
    assert load_params(tmp_path, TIED)["embed"]["embedding"].dtype == np.float32
    assert str(load_params(tmp_path, TIED, "bfloat16")["embed"]["embedding"].dtype) == "bfloat16"


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    tensors = weights()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(2, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((6, 7), np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(8, np.int8)
    write(tmp_path, tensors)
    with pytest.raises(HfError) as raised:
        load_params(tmp_path, TIED)
    assert str(raised.value).splitlines()[1:-1] == [
        "  unknown: model.layers.0.self_attn.q_norm.weight",
        "  missing: model.norm.weight",
        "  of another shape: model.layers.1.mlp.up_proj.weight (wanted [6, 8], got [6, 7])",
        "  not one of ('F64', 'F32', 'F16', 'BF16'): model.layers.0.input_layernorm.weight (I8)",
    ]


def test_a_long_list_is_cut_with_its_length(tmp_path):
    write(tmp_path, {"model.embed_tokens.weight": weights()["model.embed_tokens.weight"]})
    with pytest.raises(HfError, match=rf"missing: .* and {len(entries(TIED)) - 1 - 8} more"):
        load_params(tmp_path, TIED)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = weights()
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "b.safetensors")
    weight_map = {**dict.fromkeys(tensors, "a.safetensors"), "model.norm.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(HfError, match=r"there twice: model\.norm\.weight"):
        load_params(tmp_path, TIED)


def test_missing_shards_and_bad_indexes_are_named(tmp_path):
    with pytest.raises(HfError, match="got neither"):
        load_params(tmp_path, TIED)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(HfError, match=r"gone\.safetensors"):
        load_params(tmp_path, TIED)
    index.write_text("{")
    with pytest.raises(HfError, match=r"index\.json"):
        load_params(tmp_path, TIED)


def test_a_file_cut_short_is_named(tmp_path):
    write(tmp_path, weights())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(HfError, match=r"model\.safetensors: damaged or cut short"):
        load_params(tmp_path, TIED)


def test_a_tied_head_that_is_there_must_be_the_embedding(tmp_path):
    tensors = weights()
    write(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    assert "head" not in load_params(tmp_path, TIED)
    write(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(HfError, match="tie_word_embeddings"):
        load_params(tmp_path, TIED)


def test_reading_leaves_the_files_alone(tmp_path):
    write(tmp_path, weights())
    load_params(tmp_path, TIED)["embed"]["embedding"][:] = 0
    np.testing.assert_array_equal(
        load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"],
        weights()["model.embed_tokens.weight"],
    )
