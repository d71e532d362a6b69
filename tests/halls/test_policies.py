import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kardia_jax.config import ConfigError, ModelConfig
from kardia_jax.dialogue.spans import END_TAG, TAGS
from kardia_jax.hf.write import save_directory
from kardia_jax.model.policy import init
from kardia_jax.model.shapes import TINY
from kardia_jax.model.spec import ModelSpec, SpecError
from kardia_jax.policies import Policy, add_tags, load_policy, load_tokenizer, token_id

WORDS = 12


def words_tokenizer(eos: str | None = "w3", pad: str | None = None, extra: tuple[str, ...] = ()):
    """Words w0 to w11, then ``extra`` as special tokens; w3 ends a turn."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(extra))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)


def spec_with(rows: int, tied: bool = True) -> ModelSpec:
    return dataclasses.replace(
        TINY,
        family="qwen3",
        vocab_size=rows,
        width=8,
        mlp_width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=4,
        tied=tied,
    )


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def params_of():
    """Random parameters by number of rows and head; one compilation each."""
    return {tied: init(spec_with(WORDS, tied), jax.random.key(0)) for tied in (True, False)}


def padded(params, rows: int):
    """The same parameters with a table of this many rows, the new ones 7 everywhere."""
    missing = rows - WORDS
    tables = {name: params[name]["embedding"] for name in ("embed", "head") if name in params}
    return params | {
        name: {"embedding": jnp.pad(table, ((0, missing), (0, 0)), constant_values=7.0)}
        for name, table in tables.items()
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "grown"), [(WORDS, 20), (24, 24), (14, 20)])
def test_tags_take_spare_rows_and_then_new_ones(params_of, rows, grown, tied):
    tokenizer, params = words_tokenizer(), padded(params_of[tied], rows)
    spec, after, tokenizer = add_tags(spec_with(rows, tied), params, tokenizer)
    assert spec == spec_with(grown, tied)
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == list(range(12, 20))
    assert tokenizer("w1 <|emotion_begin|> w2", add_special_tokens=False).input_ids == [1, 16, 2]
    for name in ("embed", "head")[: 1 if tied else 2]:
        before, table = params[name]["embedding"], after[name]["embedding"]
        assert table.shape == (grown, 8)
        assert bits(table[:WORDS]) == bits(before[:WORDS])
        np.testing.assert_allclose(table[12:20], np.tile(before[:WORDS].mean(0), (8, 1)), rtol=1e-6)
        # Rows that no token has stay what they were.
        assert bits(table[20:]) == bits(before[20:])
    assert bits(after["blocks"]) == bits(params["blocks"])


def test_only_the_missing_tags_are_added(params_of):
    tokenizer = words_tokenizer(extra=TAGS[:3])
    spec, after, tokenizer = add_tags(spec_with(15), padded(params_of[True], 15), tokenizer)
    assert spec.vocab_size == 20
    assert tokenizer.convert_tokens_to_ids(list(TAGS)) == list(range(12, 20))
    assert bits(after["embed"]["embedding"][12:15]) == bits(jnp.full((3, 8), 7.0))


def test_other_special_tokens_are_kept(params_of):
    tokenizer = words_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    _, _, tokenizer = add_tags(spec_with(30), padded(params_of[True], 30), tokenizer)
    assert "<|im_start|>" in tokenizer.all_special_tokens
    assert set(TAGS) <= set(tokenizer.all_special_tokens)


def test_with_all_tags_nothing_changes(params_of):
    tokenizer, params = words_tokenizer(extra=TAGS), padded(params_of[True], 20)
    spec, after, same = add_tags(spec_with(20), params, tokenizer)
    assert (spec, same) == (spec_with(20), tokenizer)
    assert after is params


def written(folder, params, tokenizer, spec, stop_ids=(3,)) -> ModelConfig:
    save_directory(folder, params, spec, tokenizer, stop_ids, "card")
    return ModelConfig(source=str(folder))


def test_a_directory_comes_back_bit_for_bit(params_of, tmp_path):
    tokenizer, params = words_tokenizer(extra=TAGS), padded(params_of[False], 24)
    policy = load_policy(written(tmp_path / "hf", params, tokenizer, spec_with(24, tied=False)), seed=1)
    assert bits(policy.params) == bits(params)
    assert policy.spec.to_hf() == spec_with(24, tied=False).to_hf()
    assert policy.spec.sampled_tokens == 20
    assert policy.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert policy.end_ids == (3,)
    assert policy.stop_ids == (3, 19)


@pytest.mark.parametrize(
    ("eos_token_id", "ends"),
    [([5, 7], (3, 5, 7)), (5, (3, 5)), ([3], (3,)), (None, (3,)), ([5, 19], (3, 5))],
)
def test_ends_are_those_of_the_tokenizer_and_of_the_generation_config(params_of, tmp_path, eos_token_id, ends):
    config = written(tmp_path / "hf", padded(params_of[True], 20), words_tokenizer(extra=TAGS), spec_with(20))
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}), "utf-8")
    policy = load_policy(config, seed=0)
    assert policy.end_ids == ends
    # The end tag stops a completion but belongs to its text.
    assert policy.stop_ids == (*ends, 19)
    assert policy.silent_ids == set(ends)


def test_padding_is_the_tokenizers_own_or_the_first_end(params_of):
    params, spec = params_of[True], spec_with(WORDS)
    assert Policy(spec, params, words_tokenizer(pad="w1"), (3, 5)).pad_id == 1
    assert Policy(spec, params, words_tokenizer(), (3, 5)).pad_id == 3
    assert Policy(spec, params, words_tokenizer(pad="w1"), (3, 5)).silent_ids == {1, 3, 5}


def test_a_tokenizer_longer_than_the_table_is_refused(params_of, tmp_path):
    config = written(tmp_path / "hf", padded(params_of[True], 20), words_tokenizer(extra=TAGS), spec_with(20))
    words_tokenizer(extra=(*TAGS, "<|more|>")).save_pretrained(str(tmp_path / "hf"))
    with pytest.raises(
        SpecError, match=r"tokenizer: wanted at most 20 ids \(the table\), got 21\. Use the model's own"
    ):
        load_policy(config, seed=0)


def test_a_tokenizer_without_an_end_is_refused(params_of, tmp_path):
    config = written(tmp_path / "hf", padded(params_of[True], 20), words_tokenizer(extra=TAGS), spec_with(20))
    words_tokenizer(eos=None, extra=TAGS).save_pretrained(str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"model\.tokenizer: wanted a tokenizer with an eos_token"):
        load_policy(config, seed=0)


def test_a_directory_without_tokenizer_takes_the_configured_one(params_of, tmp_path):
    tokenizer = words_tokenizer(extra=TAGS)
    config = written(tmp_path / "hf", padded(params_of[True], 20), tokenizer, spec_with(20))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.move(tmp_path / "hf" / name, tmp_path / name)
    policy = load_policy(dataclasses.replace(config, tokenizer=str(tmp_path)), seed=0)
    assert policy.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_half_a_tokenizer_is_not_replaced_by_the_configured_one(params_of, tmp_path):
    config = written(tmp_path / "hf", padded(params_of[True], 20), words_tokenizer(extra=TAGS), spec_with(20))
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    # Its 20 words and an end token that transformers adds; the configured one has thousands.
    with pytest.raises(SpecError, match=r"tokenizer: wanted at most 20 ids \(the table\), got 21"):
        load_policy(config, seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(source="tiny-qwen9"), r"model\.source: wanted a local directory or one of .*tiny-qwen3"),
        (ModelConfig(source="out/none"), r"model\.source: wanted a local Hugging Face directory.*kardia doctor"),
        (ModelConfig(source="nano", tokenizer="nowhere"), r"model\.tokenizer: wanted mini or a directory with tok"),
    ],
)
def test_what_is_not_there_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        load_policy(config, seed=0)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.source: wanted a directory with config\.json.*kardia export"):
        load_policy(ModelConfig(source=str(tmp_path)), seed=0)


def test_the_shipped_tokenizer_has_every_tag_as_one_token():
    tokenizer = load_tokenizer("mini")
    ids = [token_id(tokenizer, tag) for tag in TAGS]
    assert len(set(ids)) == 8
    assert [tokenizer(tag, add_special_tokens=False).input_ids for tag in TAGS] == [[one] for one in ids]


def test_a_built_in_shape_is_the_same_for_the_same_seed(nano_policy):
    first, other = load_policy(ModelConfig(source="nano"), 0), load_policy(ModelConfig(source="nano"), 1)
    assert bits(first.params) == bits(nano_policy.params)
    assert bits(first.params) != bits(other.params)
    assert first.spec.sampled_tokens == len(first.tokenizer)
    assert first.stop_ids[-1] == token_id(first.tokenizer, END_TAG)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first.params))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [WORDS, 32])
def test_tags_survive_export_with_their_ids_their_rows_and_the_chat_template(params_of, tmp_path, rows, tied):
    """Padding rows are 7 everywhere: were they in the mean, every new row would show it."""
    tokenizer, params = words_tokenizer(pad="w1"), padded(params_of[tied], rows)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} w3 {% endfor %}"
    policy = load_policy(written(tmp_path / "in", params, tokenizer, spec_with(rows, tied)), seed=0)
    assert policy.spec.vocab_size == max(rows, 20)
    first = tmp_path / "out"
    save_directory(first, policy.params, policy.spec, policy.tokenizer, policy.end_ids, "card")
    again = load_policy(ModelConfig(source=str(first)), seed=0)
    assert bits(again.params) == bits(policy.params)
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == tokenizer.chat_template
    assert set(TAGS) <= set(again.tokenizer.all_special_tokens)
    text = "w1 <|emotion_begin|> w2 <|emotion_end|>"
    chat = [{"role": "user", "content": text}]
    assert again.tokenizer(text).input_ids == policy.tokenizer(text).input_ids == [1, 16, 2, 17]
    assert again.tokenizer.apply_chat_template(chat) == policy.tokenizer.apply_chat_template(chat)
    for name in ("embed", "head")[: 1 if tied else 2]:
        table = again.params[name]["embedding"]
        mean = params_of[tied][name]["embedding"].mean(0)
        np.testing.assert_allclose(table[12:20], np.tile(mean, (8, 1)), rtol=1e-6)
        assert bits(table[20:]) == bits(jnp.full((max(rows, 20) - 20, 8), 7.0))
