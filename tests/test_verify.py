import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kardia_jax.config import ConfigError
from kardia_jax.hf.tables import HfError
from kardia_jax.verify import LOGIT_TOLERANCE, summary, verify

QUICK = {"prompts": 3, "new_tokens": 12}
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    dir = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(Qwen3Config(vocab_size=48, **sizes, **heads, tie_word_embeddings=True)).save_pretrained(dir)
    return dir


def altered(model, dir, change):
    held = load_file(model / "model.safetensors")
    change(held)
    dir.mkdir()
    save_file(held, dir / "model.safetensors", metadata={"format": "pt"})
    (dir / "config.json").write_bytes((model / "config.json").read_bytes())
    return dir


def test_a_model_is_itself(model, tmp_path):
    report = verify(model, altered(model, tmp_path / "copy", lambda held: None), **QUICK)
    assert report.agree
    assert (report.logits_max_abs, report.logprobs_max_abs) == (0.0, 0.0)
    assert report.tensors is not None
    assert report.tensors.equal == report.tensors.compared == len(load_file(model / "model.safetensors"))
    assert [one.tokens for one in report.prompts] == [5, 12, 17]
    assert all(one.greedy_equal == len(one.greedy_a) == 12 for one in report.prompts)
    assert report.vocabulary == [48, 48]


def test_a_small_change_is_a_number_and_a_large_one_another_text(model, tmp_path):
    def scaled(factor):
        return lambda held: held.update({NORM: held[NORM] * np.float32(factor)})

    near = verify(model, altered(model, tmp_path / "near", scaled(1.001)), **QUICK)
    assert not near.agree
    assert LOGIT_TOLERANCE < near.logits_max_abs < 0.1
    assert near.tensors.max_abs == pytest.approx(1e-3, rel=1e-2)
    assert near.greedy_agree
    assert verify(model, tmp_path / "near", **QUICK, tolerance=0.1, tensor_tolerance=0.01).agree
    far = verify(model, altered(model, tmp_path / "far", scaled(-1.0)), **QUICK)
    assert not far.greedy_agree
    assert any(one.greedy_equal < len(one.greedy_a) for one in far.prompts)
    assert not verify(model, tmp_path / "far", **QUICK, tolerance=1e9, tensor_tolerance=1e9).agree
    assert "NOT the same" in summary(far)


def test_nan_is_infinitely_far_and_still_json(model, tmp_path):
    report = verify(model, altered(model, tmp_path / "nan", lambda held: held[NORM].fill(np.nan)), **QUICK)
    assert not report.agree
    said = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert said["logits_max_abs"] == said["tensors"]["differences"][NORM] == "inf"


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_ours_against_transformers(model, tmp_path, with_tokenizer):
    dir = altered(model, tmp_path / "copy", lambda held: None)
    if with_tokenizer:
        words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(40)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3").save_pretrained(str(dir))
    report = verify(dir, against="transformers", **QUICK)
    assert report.agree
    assert report.tensors is None
    assert 0 < report.logits_max_abs <= LOGIT_TOLERANCE
    assert report.greedy_agree
    assert report.b == "transformers"


def test_an_architecture_that_is_computed_otherwise_is_found_out(model, tmp_path):
    """The same weights with another rotary base: what verify is for."""
    other = altered(model, tmp_path / "other", lambda held: None)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (other / "config.json").write_text(json.dumps(config))
    report = verify(model, other, **QUICK)
    assert report.tensors.agrees(0.0)
    assert report.logits_max_abs > LOGIT_TOLERANCE
    assert not report.agree


def test_continuations_stay_within_the_positions(model, tmp_path):
    report = verify(model, altered(model, tmp_path / "copy", lambda held: None), prompts=3, new_tokens=1000)
    assert max(len(one.greedy_a) for one in report.prompts) == 64 - 17


def test_without_torch_only_the_comparison_with_transformers_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(HfError, match="against: transformers needs PyTorch"):
        verify(model, against="transformers", **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "two directories"), ({"prompts": 0}, "prompts: wanted 1 to 10"), ({"new_tokens": 0}, "new_tokens: wanted")],
)
def test_arguments_that_mean_nothing_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        verify(model, model if options else None, **options)


def test_the_report_is_plain(model):
    report = verify(model, model, **QUICK)
    assert dataclasses.asdict(report) == report.as_json()
