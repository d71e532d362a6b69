"""Tokenizers out of metadata: the ids of the tokenizer that was written, and of transformers' own way in."""

import json

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from kardia_jax.hf import gguf
from kardia_jax.hf.tables import HfError

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL, USER = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>")
TEXTS = (
    "I failed my exam and I don't know what to do.",
    "<|im_start|>user\nI'll be 42 in 2024, or 12345.<|im_end|>\n",
    "<think>well</think> then",
    "émoji 😀👩‍👩‍👧 你好, καλημέρα",
    "  two spaces\t\ttabs\n\n1. a list",
    "<|endoftext|>x<|endoftext|>",
    "",
    " ",
)


def byte_level():
    """A tokenizer of the Qwen2 kind, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS if "|" not in text] * 3, trainer)
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.add_tokens(list(USER))
    return tokenizer


def add_byte_level(writer, pre="qwen2", **left_out):
    tokenizer = byte_level()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [
        TokenType.CONTROL if token in CONTROL else TokenType.USER_DEFINED if token in USER else TokenType.NORMAL
        for token in tokens
    ]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|endoftext|>"])
    writer.add_chat_template(TEMPLATE)
    writer.add_add_bos_token(False)


def add_sentencepiece(writer):
    """Control tokens, bytes and pieces with scores, as files of Llama 2 and Gemma have them."""
    words = ["▁I", "▁don", "'", "t", "▁know", "▁what", "▁to", "▁do", "."]
    parts = ["▁", *sorted(set(TEXTS[0].replace(" ", ""))), "▁k", "no", "▁wh", "at", "▁t", "▁d"]
    pieces = list(dict.fromkeys([*parts, *words]))
    control, blanks = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<mask>"], ["  ", "   "]
    tokens = [*control, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *blanks, *pieces]
    kinds = [TokenType.CONTROL] * 6 + [TokenType.UNKNOWN] + [TokenType.BYTE] * 256
    kinds += [TokenType.USER_DEFINED] * 2 + [TokenType.NORMAL] * len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(6)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)


def same_as_transformers(file):
    ours, theirs = gguf.tokenizer(file), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.get_vocab() == {token: number for token, number in theirs.get_vocab().items() if number < len(ours)}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert ours.special_tokens_map.get(role) == theirs.special_tokens_map.get(role)
    assert ours.chat_template == theirs.chat_template
    return ours


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_byte_level(write_gguf, family):
    file = write_gguf(family, extra=add_byte_level, vocab=False, vocab_size=400).file
    ours, original = same_as_transformers(file), byte_level()
    for text in TEXTS:
        ids = ours(text).input_ids
        assert ids == original.encode(text).ids, text
        assert ours.decode(ids) == text
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert ours.unk_token is None


def test_the_chat_template_comes_along(write_gguf):
    ours = gguf.tokenizer(write_gguf("qwen2", extra=add_byte_level, vocab=False, vocab_size=400).file)
    chat = [{"role": "user", "content": "I am sad 😀"}]
    text = ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nI am sad 😀<|im_end|>\n<|im_start|>assistant\n"
    ids = ours.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == ours(text, add_special_tokens=False).input_ids


def test_saved_and_loaded_it_gives_the_same_ids(write_gguf, tmp_path):
    ours = gguf.tokenizer(write_gguf("qwen2", extra=add_byte_level, vocab=False, vocab_size=400).file)
    ours.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(text).input_ids for text in TEXTS] == [ours(text).input_ids for text in TEXTS]
    assert again.chat_template == ours.chat_template


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sentencepiece(write_gguf, family):
    file = write_gguf(family, extra=add_sentencepiece, vocab=False, vocab_size=320).file
    ours = same_as_transformers(file)
    ids = ours(TEXTS[0]).input_ids
    assert ids[0] == ours.bos_token_id == 2, "SentencePiece files without the flag begin with BOS"
    assert ours.decode(ids, skip_special_tokens=True).strip() == TEXTS[0]


def test_a_control_token_is_one_id(write_gguf):
    ours = gguf.tokenizer(write_gguf("gemma3", extra=add_sentencepiece, vocab=False, vocab_size=320).file)
    assert ours("<start_of_turn>", add_special_tokens=False).input_ids == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_tokenizer_model("bert"), r"wanted tokenizer.ggml.model one of .*, got 'bert'"),
        (
            lambda writer: add_byte_level(writer, pre="poro-chat"),
            r"wanted tokenizer.ggml.pre one of .*, got 'poro-chat'",
        ),
        (lambda writer: writer.add_tokenizer_model("gpt2"), r"wanted tokenizer.ggml.tokens, got none"),
        (lambda writer: None, r"wanted tokenizer.ggml.model one of .*, got None"),
    ],
)
def test_a_tokenizer_that_would_be_wrong_is_refused(write_gguf, change, message):
    file = write_gguf("qwen2", extra=change, vocab=False, vocab_size=400).file
    with pytest.raises(HfError, match="model.gguf: " + message):
        gguf.tokenizer(file)


def test_no_token_comes_in_that_the_file_has_not(write_gguf):
    """transformers adds GPT-2's <|endoftext|> to a vocabulary without it: one more than Llama 3 has rows."""

    def bare(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(["a", "b", "ab", "<|eot_id|>"])
        writer.add_token_types([TokenType.NORMAL] * 3 + [TokenType.CONTROL])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)

    ours = gguf.tokenizer(write_gguf("llama", extra=bare, vocab=False, vocab_size=4).file)
    assert (len(ours), max(ours.get_vocab().values())) == (4, 3)
    assert ours("aab<|eot_id|>").input_ids == [0, 2, 3]
    assert ours.eos_token_id == 3


def test_missing_merges_and_wild_ids_are_named(write_gguf):
    def without_merges(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b"])

    def wild(writer):
        add_byte_level(writer)
        writer.add_unk_token_id(4000)

    with pytest.raises(HfError, match=r"wanted tokenizer.ggml.merges, got none"):
        gguf.tokenizer(write_gguf("qwen2", extra=without_merges, vocab=False).file)
    with pytest.raises(HfError, match=r"wanted tokenizer.ggml.unknown_token_id below \d+ tokens, got 4000"):
        gguf.tokenizer(write_gguf("qwen2", extra=wild, vocab=False, vocab_size=400, file="wild.gguf").file)
