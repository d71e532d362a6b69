"""Tiny random transformers models of every family, and our reading of them.

Each case has what its family is about: windows much shorter than the rows, caps that bite, head widths that are not
width / heads, one key head or several, every rope scaling.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kardia_jax.hf.read import load_params
from kardia_jax.model.spec import ModelSpec

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SCALED = {"rope_theta": 10_000.0, "factor": 4.0}
YARN = SCALED | {"rope_type": "yarn", "original_max_position_embeddings": 32}
LLAMA3 = SCALED | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
WINDOW = 5
GEMMA2 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
GEMMA3 = {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
PATTERN = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def gemma3(full: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ropes = {"full_attention": full, "sliding_attention": LOCAL}
    return {"model_type": "gemma3_text", "layer_types": PATTERN, "rope_parameters": ropes, **GEMMA3, **changes}


CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "llama": {"model_type": "llama"},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 12},
    "llama-linear": {"model_type": "llama", "rope_parameters": SCALED | {"rope_type": "linear"}},
    "llama-dynamic": {"model_type": "llama", "rope_parameters": SCALED | {"rope_type": "dynamic"}},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16},
    "gemma-mha": {"model_type": "gemma", "num_key_value_heads": 4, "head_dim": 12},
    "gemma2": {"model_type": "gemma2", **GEMMA2},
    "gemma2-uncapped": {"model_type": "gemma2"} | GEMMA2 | dict.fromkeys(list(GEMMA2)[-2:]),
    "gemma3": gemma3({"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0}),
    "gemma3-yarn": gemma3(YARN, num_key_value_heads=1),
    "gemma3-capped": gemma3({"rope_type": "default", "rope_theta": 1e6}, final_logit_softcapping=2.0),
}
FAMILIES = ("qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3")
"""One case of each."""


STRONG = 0.8
"""Spread of what writes to the residual stream: the next token then hangs on all that came before, not on the last."""


class Pair(NamedTuple):
    """The same model twice."""

    theirs: torch.nn.Module
    dir: pathlib.Path
    spec: ModelSpec
    params: Any


def random_model(case: str, tied: bool) -> torch.nn.Module:
    """Random weights everywhere, biases and norms included (they start as zeros and ones)."""
    torch.manual_seed(len(case) + tied)
    config = AutoConfig.for_model(**{**SHAPE, **CASES[case], "tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = STRONG if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.2
            parameter.add_(spread * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Models this small lose more to torch's threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(case, tied): made once."""

    @functools.cache
    def made(case: str, tied: bool = True) -> Pair:
        model, dir = random_model(case, tied), tmp_path_factory.mktemp(case)
        model.save_pretrained(dir)
        spec = ModelSpec.from_hf(json.loads((dir / "config.json").read_text()))
        return Pair(model, dir, spec, jax.tree.map(jax.numpy.asarray, load_params(dir, spec)))

    return made


def pytest_generate_tests(metafunc):
    """``case`` runs over every model, ``family`` over one of each."""
    for name, values in (("case", CASES), ("family", FAMILIES)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(values))
