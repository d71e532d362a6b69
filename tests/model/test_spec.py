"""Reading config.json: what transformers would take, or a refusal that names the field."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from kardia_jax.model.families import TRAITS
from kardia_jax.model.shapes import SHAPES
from kardia_jax.model.spec import ModelSpec, RopeSpec, SpecError

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
}
OLD_LAYOUTS = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "gemma": {"rope_theta": 2e4, "hidden_act": "gelu"},
    "gemma2": {"rope_theta": 2e4, "hidden_act": "silu"},
    "gemma3_text": {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    },
}


@pytest.mark.parametrize("family", TRAITS)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    heads = {} if family not in ("qwen2", "qwen3") else {"num_key_value_heads": 4}
    assert_read_alike({**SIZES, **heads}, family)


@pytest.mark.parametrize("family", OLD_LAYOUTS)
def test_layouts_before_transformers_5_are_read_as_transformers_reads_them(family):
    assert_read_alike(SIZES | OLD_LAYOUTS[family], family)


def assert_read_alike(raw, family):
    """Reading the bare config gives what reading the one that transformers completes gives."""
    full = json.loads(AutoConfig.for_model(family, **raw).to_json_string(use_diff=False))
    assert ModelSpec.from_hf(raw | {"model_type": family}) == ModelSpec.from_hf(full)


def test_windows_and_rotations_of_gemma():
    two = ModelSpec.from_hf(SIZES | {"model_type": "gemma2"})
    assert two.slides == (True, False, True, False, True, False, True)
    assert (two.window, two.attention_softcap, two.final_softcap) == (4096, 50.0, 30.0)
    assert (two.head_dim, two.query_scalar, two.score_scale, two.tied) == (256, None, 1 / 16, True)
    three = ModelSpec.from_hf(SIZES | {"model_type": "gemma3_text"})
    assert three.slides == (True,) * 5 + (False, True)
    assert (three.rope, three.local_rope) == (RopeSpec(theta=1e6), RopeSpec(theta=1e4))
    full = ModelSpec.from_hf(SIZES | {"model_type": "gemma2", "layer_types": ["full_attention"] * 7})
    assert (full.layer_types, full.window, full.slides) == ((), None, (False,) * 7)


def published(family, vocab, width, inner, layers, heads, kv_heads, **rest):
    """The fields of a config.json on the Hub that have a say."""
    sizes = dict(zip(SIZES, (vocab, width, inner, layers, heads), strict=True))
    return sizes | {"model_type": family, "num_key_value_heads": kv_heads} | rest


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
PUBLISHED = {
    "SmolLM2-135M": (published("llama", 49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True), 134_515_008),
    "Llama-2-7b": (published("llama", 32_000, 4096, 11_008, 32, 32, 32), 6_738_415_616),
    "Llama-3.2-1B": (
        published("llama", 128_256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True, rope_scaling=LLAMA3),
        1_235_814_400,
    ),
    "gemma-2b": (published("gemma", 256_000, 2048, 16_384, 18, 8, 1, hidden_act="gelu"), 2_506_172_416),
    "gemma-7b": (published("gemma", 256_000, 3072, 24_576, 28, 16, 16), 8_537_680_896),
    "gemma-2-2b": (published("gemma2", 256_000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-3-1b": (
        published("gemma3_text", 262_144, 1152, 6912, 26, 4, 1, sliding_window=512, sliding_window_pattern=6),
        999_885_952,
    ),
}
"""With the parameters that the model's page on the Hub counts."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    config, parameters = PUBLISHED[name]
    assert ModelSpec.from_hf(config).parameter_count == parameters


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-7b"])
def test_named_shapes_are_the_published_ones(name):
    assert ModelSpec.from_hf(PUBLISHED[name][0]) == SHAPES[name]


TINY = {"qwen2": "tiny-qwen2", "qwen3": "tiny-qwen3", "llama": "tiny-llama", "gemma": "tiny-gemma"}
TINY |= {"gemma2": "tiny-gemma2", "gemma3": "tiny-gemma3"}
LOCAL_YARN = {"rope_type": "yarn", "factor": 4.0, "truncate": False}


@pytest.mark.parametrize(
    ("shape", "change", "word"),
    [
        ("qwen2", {"model_type": "gpt2"}, "model_type"),
        ("llama", {"model_type": "mistral"}, "model_type: .*'mistral'"),
        ("gemma3", {"model_type": "gemma3"}, "model_type"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("gemma", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"sliding_window": 0}, "sliding_window"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ("gemma3", {"rope_parameters": {"full_attention": LOCAL_YARN}}, "truncate"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "longrope"}}}, "rope_type"),
        ("gemma2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ("qwen2", {"num_key_value_heads": 3}, "kv_heads"),
        ("llama", {"hidden_size": 64.5}, "hidden_size"),
        ("llama", {"vocab_size": None}, "vocab_size"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_we_would_compute_wrongly_is_refused_by_name(shape, change, word):
    with pytest.raises(SpecError, match=word):
        ModelSpec.from_hf(SHAPES[TINY[shape]].to_hf() | change)


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ("qwen3", {"final_softcap": 30.0}),
        ("llama", {"query_scalar": 16}),
        ("gemma3", {"attention_softcap": 50.0}),
        ("gemma2", {"local_rope": RopeSpec()}),
    ],
)
def test_a_choice_that_the_family_has_no_field_for_is_refused(shape, change):
    with pytest.raises(SpecError, match=next(iter(change))):
        dataclasses.replace(SHAPES[TINY[shape]], **change)
