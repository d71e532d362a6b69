import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kardia_jax.config import ConfigError, DataConfig
from kardia_jax.dialogue.dataset import DataError, Dialogue, Turn
from kardia_jax.dialogue.emotions import EMOTIONS
from kardia_jax.dialogue.prompt import (
    Encoded,
    decode_completion,
    encode,
    encode_batch,
    examples_of,
    load_system_prompt,
    messages_for,
    prompts_of,
    template_prefill,
)
from kardia_jax.dialogue.spans import TAGS, Spans, parse, render

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS]


def byte_tokenizer(generation_prompt: str = "", eos: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    """One token per byte, ChatML; ``generation_prompt`` is what the template writes after the header."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: n for n, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML.replace("assistant\\n", "assistant\\n" + generation_prompt)
    return tokenizer


TOKENIZER = byte_tokenizer()
IM_END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
FIRST = render(Spans("lost a pet", "grief needs room", "sad", "I am sorry."))
SECOND = render(Spans("misses him", "quiet hurts", "lonely", "Tell me about him."))
DIALOGUE = Dialogue(
    id="0123456789ab",
    person="MBTI: INFP\nAbout: paints {situation} in {braces}",
    mbti="INFP",
    emotion="sad",
    situation="My dog died.",
    turns=(
        Turn("user", "He was fourteen."),
        Turn("assistant", FIRST),
        Turn("user", "It is so quiet."),
        Turn("assistant", SECOND),
    ),
    where="train.jsonl:17",
)
SYSTEM = 'Profile: {profile}\nSituation: {situation}\nLabels: {emotions}\nWrite {"json": 1} or {}.'


def test_the_built_in_prompt_has_the_structure_of_the_model_card():
    text = load_system_prompt(None)
    assert 100 <= len(text.split()) <= 140
    assert re.findall(r"\{(\w+)\}", text) == ["profile", "situation", "emotions"]
    assert [tag for tag in TAGS if text.count(tag) != 1] == []
    places = [text.index(part) for part in ("Understanding:", "{profile}", "{situation}", *TAGS, "{emotions}")]
    assert places == sorted(places)


def test_slots_are_filled_once_and_braces_in_a_profile_stay():
    system = messages_for(DIALOGUE, 0, SYSTEM, "reply")[0]
    assert system == {
        "role": "system",
        "content": "Profile: MBTI: INFP\nAbout: paints {situation} in {braces}\nSituation: My dog died.\n"
        f'Labels: {", ".join(EMOTIONS)}\nWrite {{"json": 1}} or {{}}.',
    }


def test_a_replaced_prompt_is_read_and_checked(tmp_path: pathlib.Path):
    path = tmp_path / "system.txt"
    path.write_text("  Be kind to {profile}.\n", "utf-8")
    assert load_system_prompt(path) == "Be kind to {profile}."
    path.write_text("Be kind to {persona}.", "utf-8")
    with pytest.raises(ConfigError, match=r"no slots but \{profile\}, \{situation\}, \{emotions\}, got '\{persona\}'"):
        load_system_prompt(path)


@pytest.mark.parametrize("content", [None, b" \n", b"\xff\xfe\xfa"])
def test_a_prompt_file_that_is_absent_empty_or_no_text_is_refused(tmp_path: pathlib.Path, content: bytes | None):
    path = tmp_path / "system.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.system_prompt: wanted a"):
        load_system_prompt(path)


def test_messages_end_with_the_user_who_is_to_be_answered():
    roles = [message["role"] for message in messages_for(DIALOGUE, 1, SYSTEM, "reply")]
    assert roles == ["system", "user", "assistant", "user"]
    assert messages_for(DIALOGUE, 0, SYSTEM, "reply")[1:] == [{"role": "user", "content": "He was fourteen."}]


def test_history_is_the_reply_alone_or_all_spans():
    assert messages_for(DIALOGUE, 1, SYSTEM, "reply")[2]["content"] == "I am sorry."
    assert messages_for(DIALOGUE, 1, SYSTEM, "spans")[2]["content"] == FIRST


def test_a_turn_that_is_not_there_is_refused():
    for turn in (-1, 2):
        with pytest.raises(IndexError, match=r"wanted 0 to 1 at train\.jsonl:17"):
            messages_for(DIALOGUE, turn, SYSTEM, "reply")


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


def test_ids_and_mask_by_hand():
    encoded = encode(TOKENIZER, CHAT, "ok")
    prompt = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # One token per byte, and one for each of the five ChatML markers.
    assert len(encoded.prompt_tokens) == len("system\ns\nuser\nhi\nassistant\n") + 5
    assert TOKENIZER.decode(encoded.prompt_tokens) == prompt
    assert TOKENIZER.decode(encoded.completion_tokens) == "ok<|im_end|>"
    assert encoded.loss_mask == (False,) * len(encoded.prompt_tokens) + (True, True, True)
    assert encoded.tokens == encoded.prompt_tokens + encoded.completion_tokens


def test_tags_are_single_tokens_on_both_sides():
    encoded = encode(TOKENIZER, [*CHAT, {"role": "assistant", "content": FIRST}, CHAT[1]], FIRST)
    tags = TOKENIZER.convert_tokens_to_ids(list(TAGS))
    assert [token for token in encoded.prompt_tokens if token in tags] == tags
    assert [token for token in encoded.completion_tokens if token in tags] == tags
    assert encoded.completion_tokens[-1] == IM_END


def test_without_completion_nothing_is_learnt():
    encoded = encode(TOKENIZER, CHAT, None)
    assert encoded.completion_tokens == ()
    assert not any(encoded.loss_mask)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>{}"), min_size=1, max_size=30)


@settings(deadline=None, max_examples=30)
@given(words, words)
def test_prompt_and_completion_are_what_the_template_would_write(user: str, reply: str):
    chat = [CHAT[0], {"role": "user", "content": user}]
    encoded = encode(TOKENIZER, chat, reply)
    whole = [*chat, {"role": "assistant", "content": reply}]
    assert TOKENIZER.decode(encoded.tokens) + "\n" == TOKENIZER.apply_chat_template(whole, tokenize=False)
    assert decode_completion(TOKENIZER, encoded.completion_tokens, {IM_END}) == reply


def test_many_at_once_are_the_same_as_one_by_one():
    chats = [messages_for(DIALOGUE, turn, SYSTEM, "spans") for turn in (0, 1)]
    one_by_one = [encode(TOKENIZER, chat, answer) for chat, answer in zip(chats, (FIRST, SECOND), strict=True)]
    assert encode_batch(TOKENIZER, chats, [FIRST, SECOND]) == one_by_one
    assert encode_batch(TOKENIZER, [], None) == []


@pytest.mark.parametrize("ending", ["", "\\n"])
def test_a_prefilled_tag_is_in_the_prompt_and_not_in_the_completion(ending: str):
    tokenizer = byte_tokenizer("<|understanding_begin|>" + ending)
    encoded = encode(tokenizer, CHAT, FIRST)
    assert encoded.prefill == "<|understanding_begin|>" + ending.replace("\\n", "\n")
    assert tokenizer.decode(encoded.prompt_tokens).endswith("assistant\n" + encoded.prefill)
    sampled = decode_completion(tokenizer, encoded.completion_tokens, {IM_END})
    assert TAGS[0] not in sampled
    assert parse(encoded.prefill + sampled) == parse(FIRST)


def test_an_empty_thinking_block_is_header_and_the_answer_still_parses():
    tokenizer = byte_tokenizer("<think>\\n\\n</think>\\n\\n")
    encoded = encode(tokenizer, CHAT, FIRST)
    assert encoded.prefill == ""
    assert tokenizer.decode(encoded.prompt_tokens).endswith("assistant\n<think>\n\n</think>\n\n")
    assert decode_completion(tokenizer, encoded.completion_tokens, {IM_END}) == FIRST


def test_tags_in_the_system_prompt_are_no_prefill():
    assert template_prefill(TOKENIZER) == ""
    assert encode(TOKENIZER, [{"role": "system", "content": FIRST}, CHAT[1]], None).prefill == ""


def test_a_completion_that_contradicts_the_prefill_is_refused():
    with pytest.raises(ValueError, match=re.escape("begins with '<|understanding_begin|>', got 'I am")):
        encode(byte_tokenizer("<|understanding_begin|>"), CHAT, "I am sorry.")


def test_a_tokenizer_without_an_end_of_turn_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.eos_token"):
        encode(byte_tokenizer(eos=None), CHAT, FIRST)


def test_decoding_keeps_special_tokens_and_drops_the_ids_given():
    pad = TOKENIZER.convert_tokens_to_ids("<|endoftext|>")
    ids = [*encode(TOKENIZER, CHAT, FIRST + " <|im_start|>").completion_tokens, pad, pad]
    assert decode_completion(TOKENIZER, ids, {IM_END, pad}) == FIRST + " <|im_start|>"
    assert decode_completion(TOKENIZER, ids, set()) == FIRST + " <|im_start|><|im_end|><|endoftext|><|endoftext|>"


LONG = DataConfig(max_prompt_tokens=4096)


def test_every_assistant_turn_is_one_prompt_and_one_example():
    prompts = prompts_of([DIALOGUE, DIALOGUE], TOKENIZER, LONG, SYSTEM)
    examples = examples_of([DIALOGUE, DIALOGUE], TOKENIZER, LONG, SYSTEM)
    assert [prompt.turn for prompt in prompts.prompts] == [0, 1, 0, 1]
    assert tuple(example.prompt for example in examples.examples) == prompts.prompts
    assert prompts.skipped == examples.skipped == 0
    first = prompts.prompts[1]
    assert list(first.messages) == messages_for(DIALOGUE, 1, SYSTEM, "reply")
    assert first.dialogue is DIALOGUE
    learnt = [TOKENIZER.decode(example.completion_tokens) for example in examples.examples[:2]]
    assert learnt == [FIRST + "<|im_end|>", SECOND + "<|im_end|>"]
    assert encode(TOKENIZER, first.messages, SECOND) == Encoded(
        first.tokens, examples.examples[1].completion_tokens, ""
    )


def lengths() -> list[int]:
    return [len(prompt.tokens) for prompt in prompts_of([DIALOGUE], TOKENIZER, LONG, SYSTEM).prompts]


def test_a_prompt_of_exactly_the_budget_fits():
    budget = max(lengths())
    assert prompts_of([DIALOGUE], TOKENIZER, DataConfig(max_prompt_tokens=budget), SYSTEM).skipped == 0


@pytest.mark.parametrize("build", [prompts_of, examples_of])
def test_a_long_prompt_is_fatal_and_named(build):
    short, long = lengths()
    message = f"train.jsonl:17: the prompt of assistant turn 1 has {long} tokens, wanted at most .* = {short}"
    with pytest.raises(DataError, match=message):
        build([DIALOGUE], TOKENIZER, DataConfig(max_prompt_tokens=short), SYSTEM)


def test_long_prompts_can_be_counted_and_left_out():
    config = DataConfig(max_prompt_tokens=lengths()[0], long_prompts="skip")
    prompts = prompts_of([DIALOGUE], TOKENIZER, config, SYSTEM)
    examples = examples_of([DIALOGUE], TOKENIZER, config, SYSTEM)
    assert [prompt.turn for prompt in prompts.prompts] == [0]
    assert [example.prompt.turn for example in examples.examples] == [0]
    assert prompts.skipped == examples.skipped == 1
    assert prompts.problems[0].startswith("train.jsonl:17: the prompt of assistant turn 1 has")


def test_a_set_with_nothing_but_long_prompts_is_refused():
    config = DataConfig(max_prompt_tokens=8, long_prompts="skip")
    with pytest.raises(DataError, match="all 2 prompts are too long"):
        prompts_of([DIALOGUE], TOKENIZER, config, SYSTEM)


def test_a_dialogue_made_by_hand_with_a_broken_answer_is_refused():
    broken = Dialogue("", "p", "INFP", "sad", "s", (Turn("user", "u"), Turn("assistant", "hello")), "x:1")
    with pytest.raises(DataError, match="wanted four spans in an assistant turn, got missing"):
        prompts_of([broken], TOKENIZER, LONG, SYSTEM)
