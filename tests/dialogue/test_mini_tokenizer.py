"""The shipped tokenizer: any text survives, a tag is one id, ChatML, and training gives the same bytes."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kardia_jax.dialogue.mini import rows, tokenizer_dir, train_tokenizer
from kardia_jax.dialogue.spans import TAGS

TOKENIZER = AutoTokenizer.from_pretrained(tokenizer_dir())


def test_size_and_special_ids():
    assert len(TOKENIZER) == 3072
    assert TOKENIZER.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 2)
    assert TOKENIZER.bos_token is None
    assert set(TOKENIZER.all_special_ids) == set(range(11))


@pytest.mark.parametrize(("index", "tag"), list(enumerate(TAGS, start=3)))
def test_each_tag_is_one_special_id(index: int, tag: str):
    assert TOKENIZER.encode(f"{tag}it is{tag}").count(index) == 2
    assert TOKENIZER.decode([index]) == tag
    assert TOKENIZER.decode([index], skip_special_tokens=True) == ""


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_comes_back(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", [" a , b . n't", "Zürich 東京 🙂\r\n\t\x00", f"x {TAGS[0]} y<|im_end|>\n", ""])
def test_awkward_text_comes_back(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_chat_template_is_chatml():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == chat
    asked = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == chat + "<|im_start|>assistant\n"


def test_held_out_rows_take_little_more_than_a_token_per_word():
    texts = [message["content"] for row in rows("test")[:100] for message in row["messages"]]
    pieces = sum(len(re.findall(r"<\|\w+\|>|\w+|[^\w\s]", text)) for text in texts)
    assert sum(len(TOKENIZER.encode(text)) for text in texts) < 1.1 * pieces


def test_training_again_gives_the_shipped_bytes(tmp_path):
    train_tokenizer.save(train_tokenizer.train(), tmp_path)
    again = "python -m kardia_jax.dialogue.mini.train_tokenizer kardia_jax/dialogue/mini/tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        same = (tmp_path / name).read_bytes() == (tokenizer_dir() / name).read_bytes()
        assert same, f"{name} is not the one that the material and the system prompt give; run {again}"
