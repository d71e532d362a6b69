import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
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

import kardia_jax
from kardia_jax.config import ConfigError
from kardia_jax.hf.read import abstract_params, load_params
from kardia_jax.hf.tables import HfError
from kardia_jax.model.spec import ModelSpec

# float32 on both sides; what is left is the order of sums.
LOGIT_TOLERANCE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
MAKERS = {
    "qwen2": lambda tied: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied)),
    "qwen3": lambda tied: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=tied)),
}


def tokenizer_of(ids: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(ids)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3", pad_token="w1")


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory):
    """``directory_of(family, dtype, tied)``: a tiny model as transformers saves it, with a tokenizer of 40 ids."""
    made = {}

    def make(family="qwen3", dtype="float32", tied=True):
        if (family, dtype, tied) not in made:
            torch.manual_seed(7)
            model = MAKERS[family](tied).to(DTYPES[dtype])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            dir = tmp_path_factory.mktemp(f"{family}-{dtype}-{tied}")
            model.save_pretrained(dir)
            tokenizer_of(40).save_pretrained(str(dir))
            made[family, dtype, tied] = dir
        return made[family, dtype, tied]

    return make


def contents(dir):
    return {file.name: file.read_bytes() for file in dir.iterdir()}


def split_over_two(spec: ModelSpec):
    """Every array split over two devices along its last axis of even length."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def rule(leaf):
        axis = max(index for index, size in enumerate(leaf.shape) if size % 2 == 0)
        return NamedSharding(mesh, P(*[None] * axis, "x"))

    return jax.tree.map(rule, abstract_params(spec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_load_and_save_change_no_byte(directory_of, tmp_path, family, dtype, tied):
    source = directory_of(family, dtype, tied)
    spec = ModelSpec.from_hf(json.loads((source / "config.json").read_text()))
    policy = kardia_jax.load(source, dtype, split_over_two(spec))
    leaves = jax.tree.leaves(policy.params)
    assert all(leaf.dtype == dtype and len(leaf.sharding.device_set) == 2 for leaf in leaves)
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves)
    kardia_jax.save(policy, tmp_path / "out")
    before, after = contents(source), contents(tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads(after.pop(name)) == json.loads(before.pop(name))
    assert after == before


@pytest.mark.parametrize("family", MAKERS)
def test_shards_in_give_the_same_arrays_as_one_file_on_one_device(directory_of, tmp_path, family):
    source = directory_of(family)
    one = kardia_jax.load(source)
    kardia_jax.save(one, tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    many = kardia_jax.load(str(tmp_path / "many"), shardings=split_over_two(one.spec))
    host = load_params(tmp_path / "many", one.spec)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    jax.tree.map(np.testing.assert_array_equal, one.params, host)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MAKERS)
def test_logits_of_padded_rows_are_those_of_transformers(directory_of, tmp_path, family, tied):
    source = directory_of(family, "float32", tied)
    policy = kardia_jax.load(source)
    lengths, tokens = np.array([11, 4], np.int32), np.random.default_rng(0).integers(0, 48, (2, 11)).astype(np.int32)
    tokens[1, 4:] = 1
    ours = np.asarray(kardia_jax.logits(policy, tokens, lengths))
    kardia_jax.save(policy, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert ours.shape == (2, 11, 48)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            theirs = model(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
        np.testing.assert_allclose(ours[row, :length], theirs, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("family", MAKERS)
def test_greedy_text_is_that_of_transformers(directory_of, family):
    source = directory_of(family)
    policy, model = kardia_jax.load(source), AutoModelForCausalLM.from_pretrained(source)
    prompts = [[5, 9, 12, 30], [7], list(range(4, 33))]
    ours = kardia_jax.generate(policy, prompts, max_new_tokens=64, temperature=0.0)
    for prompt, [completion] in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=1,
            suppress_tokens=list(range(policy.spec.sampled_tokens, 48)),
        )[0, len(prompt) :].tolist()
        assert completion.ids == theirs
        assert completion.text == policy.tokenizer.decode([one for one in theirs if one != 3])


def test_samples_are_many_repeatable_and_scored(directory_of):
    policy = kardia_jax.load(directory_of())
    first = kardia_jax.generate(policy, ["w5 w9", "w7"], n=3, max_new_tokens=8, temperature=0.8, seed=4)
    assert [len(group) for group in first] == [3, 3]
    assert first == kardia_jax.generate(policy, [[5, 9], [7]], n=3, max_new_tokens=8, temperature=0.8, seed=4)
    assert first != kardia_jax.generate(policy, [[5, 9], [7]], n=3, max_new_tokens=8, temperature=0.8, seed=5)
    assert len({tuple(one.ids) for one in first[0]}) > 1
    one = first[0][0]
    row = np.array([[5, 9, *one.ids]], np.int32)
    z = np.asarray(kardia_jax.logits(policy, row, np.array([row.shape[1]])))[0, 1:-1, :40] / 0.8
    expected = jax.nn.log_softmax(z)[np.arange(len(one.ids)), np.array(one.ids)]
    np.testing.assert_allclose(one.logprobs, expected, atol=LOGIT_TOLERANCE)


def test_a_generation_ends_at_any_end_of_the_generation_config(directory_of, tmp_path):
    policy = kardia_jax.load(directory_of())
    [[free]] = kardia_jax.generate(policy, [[5, 9]], max_new_tokens=16, temperature=0.0)
    end = free.ids[2]
    kardia_jax.save(policy, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 47]}))
    stopping = kardia_jax.load(tmp_path / "out")
    assert stopping.end_ids == tuple(sorted({3, end, 47}))
    [[stopped]] = kardia_jax.generate(stopping, [[5, 9]], max_new_tokens=16, temperature=0.0)
    assert stopped.ids == free.ids[: free.ids.index(end) + 1]
    assert stopped.text == " ".join(f"w{one}" for one in stopped.ids[:-1])
    assert len(stopped.logprobs) == len(stopped.ids)


def test_without_tokenizer_ids_go_in_and_out(directory_of, tmp_path):
    policy = kardia_jax.load(directory_of())._replace(tokenizer=None)
    kardia_jax.save(policy, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).unlink()
    bare = kardia_jax.load(tmp_path / "out")
    assert bare.tokenizer is None
    [[one]] = kardia_jax.generate(bare, [[5]], max_new_tokens=4)
    assert one.text is None
    assert one.ids
    with pytest.raises(ConfigError, match="prompts: wanted lists of token ids, got 'a text'"):
        kardia_jax.generate(bare, ["w5"])
    kardia_jax.save(bare, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_nothing_is_added_to_the_vocabulary(directory_of):
    policy = kardia_jax.load(directory_of())
    assert policy.spec.vocab_size == 48
    assert policy.spec.sampled_tokens == len(policy.tokenizer) == 40


def test_a_tokenizer_that_grew_is_saved_as_it_is_now(directory_of, tmp_path):
    policy = kardia_jax.load(directory_of())
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    policy.tokenizer.chat_template = "{{ messages[0].content }}!"
    kardia_jax.save(policy, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.convert_tokens_to_ids("<|new|>") == 40
    assert again.chat_template == "{{ messages[0].content }}!"
    policy.tokenizer.add_tokens([f"x{index}" for index in range(8)])
    with pytest.raises(HfError, match=r"at most 48 ids .*got 49"):
        kardia_jax.save(policy, tmp_path / "more")


def test_saving_in_another_dtype_and_over_an_older_model(directory_of, tmp_path):
    policy = kardia_jax.load(directory_of())
    kardia_jax.save(policy, tmp_path / "out")
    with pytest.raises(HfError, match="got one in use"):
        kardia_jax.save(policy, tmp_path / "out", "bfloat16")
    kardia_jax.save(policy, tmp_path / "out", "bfloat16", overwrite=True)
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    spoilt = policy._replace(params=policy.params | {"final_norm": {"scale": jnp.full(32, jnp.nan)}})
    with pytest.raises(HfError, match=r"model\.norm\.weight: wanted finite float32 weights"):
        kardia_jax.save(spoilt, tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], [2], r"tokens: wanted int32 \[B, S\]"),
        ([[1, 2]], [2, 1], "lengths: wanted one length for each of 1 rows"),
        ([[1, 2]], [3], "lengths: wanted 1 to 2"),
        ([[1, 2]], [0], "lengths: wanted 1 to 2"),
        ([[1, 48]], [2], r"tokens: wanted ids from 0 to 47 .*got \[48\]"),
        ([[1] * 129], [129], "at most the model's 128 positions, got 129"),
    ],
)
def test_rows_that_mean_nothing_are_refused(directory_of, tokens, lengths, message):
    with pytest.raises(ConfigError, match=message):
        kardia_jax.logits(kardia_jax.load(directory_of()), np.array(tokens), np.array(lengths))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompts: wanted at least one token each"),
        ([[-1]], {}, "prompts: wanted ids from 0"),
        ([[5] * 100], {"max_new_tokens": 29}, "at most the model's 128 positions, got 129"),
        ([[5]], {"n": 0}, "n: wanted at least 1"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens: wanted at least 1"),
        ([[5]], {"temperature": -1.0}, "temperature: wanted"),
    ],
)
def test_a_generation_that_cannot_work_is_refused(directory_of, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        kardia_jax.generate(kardia_jax.load(directory_of()), prompts, **options)


def test_no_prompts_no_completions(directory_of):
    assert kardia_jax.generate(kardia_jax.load(directory_of()), []) == []


def test_importing_the_package_imports_no_jax():
    script = (
        "import sys, kardia_jax; print(sorted({'jax', 'transformers', 'numpy'} & set(sys.modules)), dir(kardia_jax))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("[]")
    assert all(f"'{name}'" in said for name in ("load", "logits", "generate", "save", "__version__"))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        vars(kardia_jax)["__getattr__"]("lode")
