import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kardia_jax.hf.tables import (
    BACKBONE,
    HEAD,
    POST_NORMS,
    QK_NORM,
    QKV_BIAS,
    Rule,
    entries,
    from_hf,
    hf_shape,
    nested,
    to_hf,
)
from kardia_jax.model.spec import ModelSpec

SIZES = {"V": 7, "D": 6, "F": 5, "L": 2, "H": 4, "K": 2, "E": 3}
RULES = (*BACKBONE, *QKV_BIAS, *QK_NORM, *POST_NORMS, HEAD)


def test_query_projection_by_hand():
    # H = 2 heads of E = 1, D = 3: row h of the tensor is head h; ours has the width first.
    rule = Rule("q", "q", "(HE)D", "DHE")
    sizes = {"H": 2, "E": 1, "D": 3}
    tensor = np.array([[1, 2, 3], [4, 5, 6]])
    assert from_hf(rule, tensor, sizes).tolist() == [[[1], [4]], [[2], [5]], [[3], [6]]]


def test_output_projection_by_hand():
    rule = Rule("o", "o", "D(HE)", "HED")
    sizes = {"H": 1, "E": 2, "D": 2}
    assert from_hf(rule, np.array([[1, 2], [3, 4]]), sizes).tolist() == [[[1, 3], [2, 4]]]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RULES), st.integers(0, 99))
def test_both_directions_are_inverse_for_every_rule(rule, seed):
    tensor = np.random.default_rng(seed).normal(size=hf_shape(rule, SIZES))
    back = to_hf(rule, from_hf(rule, tensor, SIZES), SIZES)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, tensor)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_both_layouts_of_a_rule_have_the_same_axes(rule):
    assert sorted(rule.hf_axes.replace("(", "").replace(")", "")) == sorted(rule.axes)


def test_a_tied_model_has_no_head_and_paths_nest():
    spec = ModelSpec("qwen3", 7, 6, 5, 2, 4, 2, 4, tied=True)
    assert "lm_head.weight" not in entries(spec)
    assert entries(spec)["model.layers.1.self_attn.k_norm.weight"].layer == 1
    one = np.zeros(1)
    assert nested({"a.b": one, "a.c": one, "d.e": one}) == {"a": {"b": one, "c": one}, "d": {"e": one}}


def test_the_norm_before_the_mlp_has_another_name_where_norms_stand_on_both_sides():
    names = {}
    for family in ("gemma", "gemma2"):
        spec = ModelSpec(family, 7, 6, 5, 2, 4, 2, 4)
        names[family] = {entry.rule.path: name for name, entry in entries(spec).items() if "layers.1." in name}
    mlp_norm = "blocks.mlp_norm.scale"
    assert names["gemma"][mlp_norm] == "model.layers.1.post_attention_layernorm.weight"
    assert names["gemma2"][mlp_norm] == "model.layers.1.pre_feedforward_layernorm.weight"
    after = names["gemma2"]["blocks.attention_post_norm.scale"]
    assert after == "model.layers.1.post_attention_layernorm.weight"
