"""Adapters against PEFT itself, both ways, and what is refused of what it can write."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kardia_jax.config import ConfigError, LoraConfig
from kardia_jax.config.lora import LINEARS
from kardia_jax.hf.peft import CONFIG, WEIGHTS, load_adapter, pairs, read_config, save_adapter, written_config
from kardia_jax.hf.read import load_params
from kardia_jax.hf.tables import HfError
from kardia_jax.model.lora import init_adapter, joined
from kardia_jax.model.policy import Compute, logits
from kardia_jax.model.spec import ModelSpec

# PEFT 0.21 asks transformers 5 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# float32 on both sides; what is left is the order of sums.
LOGIT_TOLERANCE = 1e-4
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 5}
CASES = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}
FAMILIES = tuple(CASES)
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 7))
ALL = LoraConfig(rank=3, alpha=6)
SOME = LoraConfig(rank=4, alpha=2.5, targets=("q_proj", "o_proj", "down_proj"), dropout=0.25, scaling="rslora")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """A tiny random transformers model of a family, saved: its folder."""

    def make(family: str):
        torch.manual_seed(1)
        config = AutoConfig.for_model(family, **{**SHAPE, **CASES[family]}, tie_word_embeddings=True)
        folder = tmp_path_factory.mktemp(family) / "base"
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
        return folder

    return functools.cache(make)


def spec_of(folder) -> ModelSpec:
    return ModelSpec.from_hf(json.loads((folder / "config.json").read_text()))


def our_logits(folder, lora: LoraConfig, adapter) -> np.ndarray:
    spec = spec_of(folder)
    params = joined(lora, jax.tree.map(jnp.asarray, load_params(folder, spec)), adapter)
    return np.asarray(logits(spec, Compute(), params, jnp.asarray(TOKENS), jnp.full(2, 7)))


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def ours(folder, lora: LoraConfig):
    """An adapter in the middle of training."""
    spec = spec_of(folder)
    fresh = init_adapter(lora, load_params(folder, spec), jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.normal(0, 0.2, leaf.shape), jnp.float32), fresh)


def theirs(folder, target, **settings):
    """An adapter of PEFT's with random A and B, saved; the model that holds it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(target)
    return model


# Every family once each way; the settings differ in nothing that a family could touch.
@pytest.mark.parametrize(("family", "lora"), [*((one, ALL) for one in FAMILIES), ("qwen3", SOME)])
def test_peft_loads_our_adapter_and_computes_the_same(family, lora, base_of, tmp_path):
    base = base_of(family)
    adapter = ours(base, lora)
    save_adapter(tmp_path / "adapter", lora, adapter, spec_of(base), str(base), "# card")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = torch_logits(plain)
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    got, wanted = torch_logits(model), our_logits(base, lora, adapter)
    np.testing.assert_allclose(got, wanted, atol=LOGIT_TOLERANCE)
    assert np.abs(got - before).max() > 0.01
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    np.testing.assert_allclose(torch_logits(model.merge_and_unload()), wanted, atol=LOGIT_TOLERANCE)


EVERYWHERE = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
TWO = {"r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "gate_proj"], "use_rslora": True, "lora_dropout": 0.1}


@pytest.mark.parametrize(("family", "settings"), [*((one, TWO) for one in FAMILIES), ("qwen3", EVERYWHERE)])
def test_an_adapter_of_pefts_computes_the_same_here(family, settings, base_of, tmp_path):
    base = base_of(family)
    model = theirs(base, tmp_path / "adapter", **settings)
    lora, adapter = load_adapter(tmp_path / "adapter", spec_of(base))
    assert (lora.rank, lora.alpha) == (settings["r"], settings["lora_alpha"])
    assert lora.dropout == settings.get("lora_dropout", 0.0)
    assert set(lora.names) == set(LINEARS if settings["target_modules"] == "all-linear" else settings["target_modules"])
    np.testing.assert_allclose(our_logits(base, lora, adapter), torch_logits(model), atol=LOGIT_TOLERANCE)


def test_a_half_precision_adapter_becomes_float32(base_of, tmp_path):
    base = base_of("qwen3")
    save_adapter(tmp_path / "adapter", ALL, ours(base, ALL), spec_of(base), "base", "# card")
    file = tmp_path / "adapter" / WEIGHTS
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(halves, file)
    _, loaded = load_adapter(tmp_path / "adapter", spec_of(base))
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), ours(base, ALL))
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("lora", [ALL, SOME], ids=["all", "some"])
def test_saved_loaded_and_saved_again_is_byte_equal(lora, base_of, tmp_path):
    base = base_of("qwen3")
    spec, adapter = spec_of(base), ours(base, lora)
    save_adapter(tmp_path / "one", lora, adapter, spec, "some/base", "# card")
    again, loaded = load_adapter(tmp_path / "one", spec)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert (again.names, again.scale, again.dropout) == (lora.names, lora.scale, lora.dropout)
    save_adapter(tmp_path / "two", again, loaded, spec, "some/base", "# card")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_names_and_shapes_are_pefts(base_of):
    a, b = pairs(spec_of(base_of("qwen2")))["q_proj"]
    assert a.name.format(layer=1) == "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert (a.path, a.hf_axes, a.axes) == ("blocks.attention.q.lora_a", "rD", "Dr")
    assert (b.path, b.hf_axes, b.axes) == ("blocks.attention.q.lora_b", "(HE)r", "rHE")
    a, b = pairs(spec_of(base_of("qwen2")))["o_proj"]
    assert (a.hf_axes, a.axes, b.hf_axes, b.axes) == ("r(HE)", "HEr", "Dr", "rD")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_can_be_written(family, base_of):
    assert set(pairs(spec_of(base_of(family)))) == set(LINEARS)


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["q_proj"]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["experts"]),
        ("something_new", 1),
        ("target_modules", ["q_proj", "embed_tokens"]),
        ("target_modules", ["qkv_proj"]),
    ],
)
def test_what_would_mean_something_else_is_refused_by_name(name, value):
    assert read_config(GOOD).rank == 4
    with pytest.raises(ConfigError, match=rf"^{name}: wanted "):
        read_config({**GOOD, name: value})


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match=r"adapter_config\.json: wanted a JSON object, got 'list'"):
        read_config([GOOD])


@pytest.mark.parametrize("change", [{"r": None}, {"target_modules": None}, {"target_modules": "q_.*"}])
def test_a_config_without_rank_or_list_of_layers_is_refused(change):
    with pytest.raises(ConfigError, match="r, target_modules: wanted a rank and a list of layers"):
        read_config({**GOOD, **change})


def test_every_field_that_peft_writes_by_default_is_understood(tmp_path):
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    lora = read_config(json.loads((tmp_path / CONFIG).read_text()))
    assert lora == LoraConfig(rank=2, alpha=4.0, targets=("k_proj",))
    assert set(written_config(lora, "base")) <= set(json.loads((tmp_path / CONFIG).read_text()))


def test_tensors_that_do_not_fit_are_listed_together(base_of, tmp_path):
    base = base_of("qwen3")
    spec, lora = spec_of(base), LoraConfig(rank=2, targets=("q_proj", "v_proj"))
    save_adapter(tmp_path / "adapter", lora, ours(base, lora), spec, "base", "# card")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    config |= {"target_modules": ["q_proj", "k_proj"], "r": 3}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(HfError) as refused:
        load_adapter(tmp_path / "adapter", spec)
    said = str(refused.value)
    assert re.search(r"unknown: \S+layers\.0\.self_attn\.v_proj\.lora_A", said)
    assert re.search(r"missing: \S+layers\.0\.self_attn\.k_proj\.lora_A", said)
    assert re.search(r"of another shape: .*q_proj\.lora_A\.weight \(wanted \[3, 32\], got \[2, 32\]\)", said)


def test_a_directory_that_holds_no_adapter_is_refused(base_of, tmp_path):
    with pytest.raises(HfError, match=r"model\.adapter: wanted a directory with adapter_config\.json"):
        load_adapter(tmp_path, spec_of(base_of("qwen3")))
    for name, text in ((CONFIG, "{broken"), (WEIGHTS, "no tensors")):
        (tmp_path / name).write_text(text)
    with pytest.raises(HfError, match=re.escape(str(tmp_path))):
        load_adapter(tmp_path, spec_of(base_of("qwen3")))
    (tmp_path / CONFIG).write_text(json.dumps(GOOD))
    with pytest.raises(HfError, match=re.escape(str(tmp_path))):
        load_adapter(tmp_path, spec_of(base_of("qwen3")))


def test_only_an_older_adapter_is_replaced(base_of, tmp_path):
    base = base_of("qwen3")
    spec, adapter = spec_of(base), ours(base, ALL)
    save_adapter(tmp_path / "a", ALL, adapter, spec, "one", "# card")
    with pytest.raises(HfError, match=r"wanted an empty or new folder, got one in use.*overwrite"):
        save_adapter(tmp_path / "a", ALL, adapter, spec, "two", "# card")
    save_adapter(tmp_path / "a", ALL, adapter, spec, "two", "# card", overwrite=True)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == "two"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(HfError, match="wanted a folder that holds an adapter to overwrite"):
        save_adapter(tmp_path / "mine", ALL, adapter, spec, "one", "# card", overwrite=True)
    spoilt = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), adapter)
    with pytest.raises(HfError, match=r"q_proj\.lora_A\.weight: wanted finite weights"):
        save_adapter(tmp_path / "b", ALL, spoilt, spec, "one", "# card")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]
