"""Hugging Face -> ours -> Hugging Face: every byte of every tensor, and a config.json that transformers loads."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from kardia_jax.hf.read import load_params
from kardia_jax.hf.tables import entries, supported_families
from kardia_jax.hf.write import tensors
from kardia_jax.model.families import TRAITS
from kardia_jax.model.spec import ModelSpec

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 48, (2, 20)))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_byte_equal(pair, tmp_path, family, tied, dtype):
    theirs, _, spec, _ = pair(family, tied)
    copy.deepcopy(theirs).to(DTYPES[dtype]).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    after = dict(tensors(load_params(tmp_path, spec, dtype), spec, entries(spec)))
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape), name
        assert tensor.tobytes() == before[name].tobytes(), name


@pytest.fixture
def warnings_of_transformers():
    """Every message that transformers logs."""
    heard: list[str] = []
    logger, handler = transformers.logging.get_logger("transformers"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    yield heard
    logger.removeHandler(handler)


def test_transformers_loads_what_we_write_silently_and_computes_the_same(
    pair, tmp_path, case, warnings_of_transformers
):
    theirs, _, spec, params = pair(case)
    (tmp_path / "config.json").write_text(json.dumps(spec.to_hf() | {"pad_token_id": 0}))
    save_file(dict(tensors(params, spec, entries(spec))), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert warnings_of_transformers == []
    assert type(loaded).__name__ == TRAITS[spec.family].architecture
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(TOKENS).logits, theirs(TOKENS).logits)
    assert ModelSpec.from_hf(spec.to_hf()) == spec
    # What transformers itself writes after reading ours.
    assert ModelSpec.from_hf(json.loads(loaded.config.to_json_string())) == spec


def test_parameter_count_is_that_of_transformers(pair, case):
    for tied in (True, False):
        theirs, _, spec, _ = pair(case, tied)
        assert spec.parameter_count == sum(parameter.numel() for parameter in theirs.parameters())


def test_the_table_of_families_names_classes_that_load_them():
    rows = supported_families()
    assert [row.model_type for row in rows] == list(TRAITS)
    for row in rows:
        config = transformers.AutoConfig.for_model(row.model_type)
        assert transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__ == row.architecture
        assert row.features
