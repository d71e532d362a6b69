import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kardia_jax.hf.read import load_params
from kardia_jax.hf.write import save_directory
from kardia_jax.model.policy import Compute, logits
from kardia_jax.model.spec import ModelSpec

# float32 on both sides; what is left is the order of sums.
LOGIT_TOLERANCE = 1e-4
STOPS = [3, 5]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CASES = [(family, tied) for family in ("qwen2", "qwen3") for tied in (True, False)]


def hf_model(family: str, tied: bool) -> torch.nn.Module:
    """A tiny model with random weights everywhere, biases and norms included (they start as zeros and
    ones)."""
    torch.manual_seed(len(family) + tied)
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))
    else:
        # A head width that is not width / heads, as in Qwen3's own small models.
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokenizer_of(ids: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(ids)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3", pad_token="w1")


def spec_of(dir) -> ModelSpec:
    return ModelSpec.from_hf(json.loads((dir / "config.json").read_text()))


def export(dir, params, spec, **options):
    save_directory(dir, params, spec, tokenizer_of(40), STOPS, card="# tiny\n", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_hf_to_ours_to_hf_is_byte_equal(tmp_path, family, tied, dtype):
    hf_model(family, tied).to(TORCH_DTYPES[dtype]).save_pretrained(tmp_path / "in")
    spec = spec_of(tmp_path / "in")
    # Through float32 masters: bfloat16 -> float32 -> bfloat16 loses nothing.
    export(tmp_path / "out", load_params(tmp_path / "in", spec), spec, dtype=dtype)
    before, after = ((tmp_path / end / "model.safetensors").read_bytes() for end in ("in", "out"))
    assert before == after


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_logits_agree_with_transformers_both_ways(tmp_path, family, tied):
    model = hf_model(family, tied)
    model.save_pretrained(tmp_path / "in")
    spec = spec_of(tmp_path / "in")
    params = load_params(tmp_path / "in", spec)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 11))
    ours = logits(spec, Compute(), params, jnp.asarray(tokens), jnp.asarray([11, 11]))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=LOGIT_TOLERANCE)

    export(tmp_path / "out", params, spec)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        again = loaded(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_array_equal(again, theirs)


def test_shards_hold_the_same_tensors_and_load_everywhere(tmp_path):
    model = hf_model("qwen3", tied=False)
    model.save_pretrained(tmp_path / "in")
    spec = spec_of(tmp_path / "in")
    params = load_params(tmp_path / "in", spec)
    export(tmp_path / "out", params, spec, max_shard_size="30KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * spec.parameter_count
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, ours), (_, theirs) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    again = load_params(tmp_path / "out", spec)
    np.testing.assert_array_equal(again["blocks"]["mlp"]["up"]["kernel"], params["blocks"]["mlp"]["up"]["kernel"])


def test_shards_that_transformers_wrote_are_read(tmp_path):
    model = hf_model("qwen2", tied=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    spec = spec_of(tmp_path / "one")
    one, many = load_params(tmp_path / "one", spec), load_params(tmp_path / "many", spec)
    np.testing.assert_array_equal(one["embed"]["embedding"], many["embed"]["embedding"])
    np.testing.assert_array_equal(one["blocks"]["attention"]["o"]["kernel"], many["blocks"]["attention"]["o"]["kernel"])


def test_the_export_stops_pads_and_tokenises_as_told(tmp_path):
    model = hf_model("qwen3", tied=True)
    model.save_pretrained(tmp_path / "in")
    spec = spec_of(tmp_path / "in")
    export(tmp_path / "out", load_params(tmp_path / "in", spec, "bfloat16"), spec, dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == STOPS
    assert loaded.generation_config.pad_token_id == 1
    assert loaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w7 w9")["input_ids"] == [7, 9]
    assert (tmp_path / "out" / "README.md").read_text() == "# tiny\n"
    # What came from our own config reads back as the same model.
    assert spec_of(tmp_path / "out") == spec
