"""From a dialogue to token ids: the system prompt, the chat messages, and one function for ids and loss mask.

In: dialogues, a Hugging Face tokenizer with a chat template, ``DataConfig``. Out: one ``Prompt`` per
assistant turn (to sample from) or one ``Example`` (prompt and the answer to learn), with everything left out
named.

For the second answer of a dialogue, in ChatML, with history "reply":

    tokens   <|im_start|> system .. <|im_end|>  user .. first reply .. user ..  <|im_start|> assistant \\n
             <|understanding_begin|> .. <|response_end|> <|im_end|>
    mask     False on the first line, True on the second

- The prompt is the chat template with its generation prompt; the completion is the four spans and the
  tokenizer's ``eos_token``, which has to be the token that ends a turn (``<|im_end|>`` in ChatML). What a
  template writes after that token (ChatML: a newline) is never sampled, so it is not learnt either.
- A template may have begun the answer already (``<|understanding_begin|>``). That text is the ``prefill``: it
  is part of the prompt, a completion must not repeat it, and a reward parses prefill + completion. Anything
  else in the generation prompt, such as the empty thinking block of Qwen3, is header: it belongs to no span.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kardia_jax.config import ConfigError, DataConfig
from kardia_jax.dialogue.dataset import DataError, Dialogue
from kardia_jax.dialogue.emotions import EMOTIONS
from kardia_jax.dialogue.spans import TAGS, Malformed, parse

if TYPE_CHECKING:  # transformers takes a second to import and is only named here
    from transformers import PreTrainedTokenizerBase as Tokenizer

Message = dict[str, str]
"""``{"role": ..., "content": ...}``, as chat templates want it."""

_SLOTS = ("profile", "situation", "emotions")
_SLOT = re.compile(r"\{(\w+)\}")
_MARK = "where-the-user-stops"
_CHUNK = 1024
"""Conversations in one tokenizer call: enough to keep every core busy, few enough for its offsets to fit."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and, if there is one, of its completion."""

    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    """Empty where there is no completion to learn."""
    prefill: str
    """The part of the answer that the prompt already ends with; often empty."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and completion, joined."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """For each of ``tokens`` whether it is learnt: False on the prompt, True on the completion."""
        return (False,) * len(self.prompt_tokens) + (True,) * len(self.completion_tokens)


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked at one assistant turn, and what a judge needs in order to mark the answer."""

    tokens: tuple[int, ...]
    prefill: str
    """See ``Encoded.prefill``."""
    dialogue: Dialogue
    turn: int
    """Which assistant turn of the dialogue, from 0 on."""
    messages: tuple[Message, ...]
    """System, user, ... up to the user's message that is to be answered."""


@dataclass(frozen=True)
class Example:
    """A prompt with the dialogue's own answer, as token ids that end with the end-of-turn token."""

    prompt: Prompt
    completion_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """All prompts within the budget, in dialogue order, and what was left out."""

    prompts: tuple[Prompt, ...]
    problems: tuple[str, ...]

    @property
    def skipped(self) -> int:
        """Prompts left out for their length."""
        return len(self.problems)


@dataclass(frozen=True)
class Examples:
    """All examples whose prompt is within the budget, in dialogue order, and what was left out."""

    examples: tuple[Example, ...]
    problems: tuple[str, ...]

    @property
    def skipped(self) -> int:
        """Examples left out for the length of their prompt."""
        return len(self.problems)


def load_system_prompt(path: Path | None) -> str:
    """The built-in system prompt, or the text file that replaces it; slots are still unfilled.

    Raises ConfigError for a file that cannot be read, is empty, or has a slot other than {profile},
    {situation} and {emotions}.
    """
    if path is None:
        return resources.files("kardia_jax.dialogue").joinpath("system_prompt.txt").read_text("utf-8").strip()
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("data.system_prompt", "a UTF-8 text file", str(path), f"{error}.") from error
    if not text:
        raise ConfigError("data.system_prompt", "a text that is not empty", str(path))
    for slot in _SLOT.findall(text):
        if slot not in _SLOTS:
            known = ", ".join(f"{{{name}}}" for name in _SLOTS)
            raise ConfigError("data.system_prompt", f"no slots but {known}", f"{{{slot}}}", f"Correct {path}.")
    return text


def messages_for(
    dialogue: Dialogue, turn: int, system_prompt: str, history: Literal["reply", "spans"]
) -> list[Message]:
    """The chat before assistant turn ``turn`` (from 0 on): system, then turns up to the user's message.

    Raises IndexError for a turn that the dialogue does not have.
    """
    count = len(dialogue.answers)
    if not 0 <= turn < count:
        raise IndexError(f"turn: wanted 0 to {count - 1} at {dialogue.where}, got {turn}.")
    return _before(_conversation(dialogue, system_prompt, history), turn)


def encode(tokenizer: "Tokenizer", messages: Sequence[Message], completion: str | None) -> Encoded:
    """Token ids and loss mask of one chat; ``completion`` is the whole answer, without an end token.

    Raises ValueError for a tokenizer without eos_token and for a completion that does not begin with the
    prefill.
    """
    return encode_batch(tokenizer, [messages], None if completion is None else [completion])[0]


def encode_batch(
    tokenizer: "Tokenizer", conversations: Sequence[Sequence[Message]], completions: Sequence[str] | None
) -> list[Encoded]:
    """``encode`` for many chats at once, much faster than one by one."""
    prefill = template_prefill(tokenizer)
    # Ids are drawn from one table: a million tokens then take a million pointers instead of as many objects.
    table = list(range(len(tokenizer)))
    encoded: list[Encoded] = []
    for start in range(0, len(conversations), _CHUNK):
        part = slice(start, start + _CHUNK)
        prompts = _token_ids(tokenizer, _rendered(tokenizer, conversations[part]), table)
        answers = [()] * len(prompts)
        if completions is not None:
            answers = _completion_ids(tokenizer, completions[part], prefill, table)
        encoded += [Encoded(ids, answer, prefill) for ids, answer in zip(prompts, answers, strict=True)]
    return encoded


def template_prefill(tokenizer: "Tokenizer") -> str:
    """The part of an answer that the tokenizer's chat template writes by itself, or an empty text.

    It begins at the first span tag after the last user message.
    """
    probe = [{"role": "system", "content": "-"}, {"role": "user", "content": _MARK}]
    after_user = _rendered(tokenizer, [probe])[0].rpartition(_MARK)[2]
    at = after_user.find(TAGS[0])
    return "" if at < 0 else after_user[at:]


def prompts_of(
    dialogues: Sequence[Dialogue], tokenizer: "Tokenizer", config: DataConfig, system_prompt: str
) -> Prompts:
    """One prompt per assistant turn, with its history.

    Raises DataError for a prompt over ``config.max_prompt_tokens`` where long prompts are fatal, and where
    not one prompt is left.
    """
    asked = _asked(dialogues, config, system_prompt)
    encoded = encode_batch(tokenizer, [messages for _, _, messages in asked], None)
    prompts = [_prompt(*question, code) for question, code in zip(asked, encoded, strict=True)]
    problems = _too_long(prompts, config)
    kept = tuple(prompt for prompt in prompts if len(prompt.tokens) <= config.max_prompt_tokens)
    return Prompts(kept, problems)


def examples_of(
    dialogues: Sequence[Dialogue], tokenizer: "Tokenizer", config: DataConfig, system_prompt: str
) -> Examples:
    """One example per assistant turn, with its history; errors as in ``prompts_of``."""
    asked = _asked(dialogues, config, system_prompt)
    answers = [dialogue.answers[turn] for dialogue, turn, _ in asked]
    encoded = encode_batch(tokenizer, [messages for _, _, messages in asked], answers)
    prompts = [_prompt(*question, code) for question, code in zip(asked, encoded, strict=True)]
    problems = _too_long(prompts, config)
    kept = tuple(
        Example(prompt, code.completion_tokens)
        for prompt, code in zip(prompts, encoded, strict=True)
        if len(prompt.tokens) <= config.max_prompt_tokens
    )
    return Examples(kept, problems)


def decode_completion(tokenizer: "Tokenizer", ids: Sequence[int], drop: Set[int]) -> str:
    """The text of sampled ids: special tokens such as span tags stay, only ``drop`` (EOS, pad) goes."""
    kept = [int(token) for token in ids if int(token) not in drop]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _filled(system_prompt: str, dialogue: Dialogue) -> str:
    """The slots filled in one pass, so that braces in a profile stay what they are."""
    values: Mapping[str, str] = {
        "profile": dialogue.person,
        "situation": dialogue.situation,
        "emotions": ", ".join(EMOTIONS),
    }
    return _SLOT.sub(lambda slot: values.get(slot[1], slot[0]), system_prompt)


def _conversation(dialogue: Dialogue, system_prompt: str, history: Literal["reply", "spans"]) -> list[Message]:
    """System and every turn; the earlier answers as ``history`` says."""
    messages = [{"role": "system", "content": _filled(system_prompt, dialogue)}]
    for turn in dialogue.turns:
        answered = turn.role == "assistant" and history == "reply"
        messages.append({"role": turn.role, "content": _reply(turn.content) if answered else turn.content})
    return messages


def _before(conversation: list[Message], turn: int) -> list[Message]:
    """The system message, ``turn`` exchanges, and the user's next message."""
    return conversation[: 2 * turn + 2]


def _reply(content: str) -> str:
    spans = parse(content)
    if isinstance(spans, Malformed):
        raise DataError(f"turn: wanted four spans in an assistant turn, got {spans.reason}: {spans.detail}.")
    return spans.response


def _asked(
    dialogues: Sequence[Dialogue], config: DataConfig, system_prompt: str
) -> list[tuple[Dialogue, int, list[Message]]]:
    """Every assistant turn with the messages before it, which the turns of one dialogue share."""
    asked: list[tuple[Dialogue, int, list[Message]]] = []
    for dialogue in dialogues:
        conversation = _conversation(dialogue, system_prompt, config.history)
        asked += [(dialogue, turn, _before(conversation, turn)) for turn in range(len(dialogue.answers))]
    return asked


def _prompt(dialogue: Dialogue, turn: int, messages: list[Message], encoded: Encoded) -> Prompt:
    return Prompt(encoded.prompt_tokens, encoded.prefill, dialogue, turn, tuple(messages))


def _too_long(prompts: Sequence[Prompt], config: DataConfig) -> tuple[str, ...]:
    """A line for each prompt over the budget; DataError where that is fatal or nothing else is left."""
    budget = config.max_prompt_tokens
    problems = tuple(
        f"{prompt.dialogue.where}: the prompt of assistant turn {prompt.turn} has "
        f"{len(prompt.tokens):,} tokens, wanted at most data.max_prompt_tokens = {budget:,}."
        for prompt in prompts
        if len(prompt.tokens) > budget
    )
    if problems and config.long_prompts == "fatal":
        longest = max(len(prompt.tokens) for prompt in prompts)
        raise DataError(
            f"{problems[0]} {len(problems):,} of {len(prompts):,} prompts are too long, the longest has "
            f"{longest:,} tokens. Raise data.max_prompt_tokens, or set data.long_prompts to skip."
        )
    if problems and len(problems) == len(prompts):
        raise DataError(f"data.max_prompt_tokens: all {len(prompts):,} prompts are too long. First: {problems[0]}")
    return problems


def _rendered(tokenizer: "Tokenizer", conversations: Sequence[Sequence[Message]]) -> list[str]:
    """The chats as text, each ending with the template's generation prompt."""
    chats = [list(messages) for messages in conversations]
    rendered = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, list)
    return [str(text) for text in rendered]


def _token_ids(tokenizer: "Tokenizer", texts: list[str], table: Sequence[int]) -> list[tuple[int, ...]]:
    """Ids of texts that already hold their special tokens."""
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(table[token] for token in ids) for ids in batch["input_ids"]]


def _completion_ids(
    tokenizer: "Tokenizer", completions: Sequence[str], prefill: str, table: Sequence[int]
) -> list[tuple[int, ...]]:
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError("tokenizer.eos_token: wanted the token that ends a turn, got none. Set it.")
    texts = [_after_prefill(completion, prefill) for completion in completions]
    end = (tokenizer.eos_token_id,)
    return [ids + end for ids in _token_ids(tokenizer, texts, table)]


def _after_prefill(completion: str, prefill: str) -> str:
    """What is left to write of an answer; white space that ends the prefill need not stand in it."""
    begun = prefill.rstrip()
    if not completion.startswith(begun):
        raise DataError(f"completion: wanted a text that begins with {begun!r}, got {completion[:40]!r}.")
    return completion.removeprefix(begun)
