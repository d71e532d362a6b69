"""Train the shipped tokenizer: ``python -m kardia_jax.dialogue.mini.train_tokenizer OUT``.

In: the train rows of the mini set, rendered with the default system prompt. Out: a Hugging Face tokenizer
directory, byte-level BPE with ``VOCABULARY`` entries:

    id 0 <|endoftext|> (padding)   1 <|im_start|>   2 <|im_end|> (end of turn)   3..10 the eight span tags
    then 256 bytes, then merges

Byte level means that any text comes back unchanged from its ids, and no id stands for "unknown". The ChatML
template writes ``<|im_start|>role\\n...<|im_end|>\\n`` per message. Training again gives the same bytes.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kardia_jax.dialogue.dataset import Dialogue, read_row
from kardia_jax.dialogue.mini import rows
from kardia_jax.dialogue.prompt import load_system_prompt, messages_for
from kardia_jax.dialogue.spans import TAGS

VOCABULARY = 3072
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, START, END, *TAGS)
MAX_TOKENS = 32768
"""What the tokenizer claims to take; the mini set needs about six hundred."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)

_SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL))


def train() -> Tokenizer:
    """The tokenizer, learnt from the text between special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def corpus() -> Iterator[str]:
    """Every train dialogue as the policy sees it, cut at the special tokens."""
    system_prompt = load_system_prompt(None)
    for number, row in enumerate(rows("train"), start=1):
        dialogue = read_row(row, f"mini/train:{number}")
        yield from (part for part in _SPECIAL.split(_rendered(dialogue, system_prompt)) if part)


def _rendered(dialogue: Dialogue, system_prompt: str) -> str:
    last = len(dialogue.answers) - 1
    messages = messages_for(dialogue, last, system_prompt, "spans")
    turns = [f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages]
    return "".join(turns) + f"{START}assistant\n{dialogue.answers[last]}{END}"


def save(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Write the directory that ``transformers.AutoTokenizer.from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "additional_special_tokens": [START, *TAGS],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
        "padding_side": "right",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of the mini set.")
    parser.add_argument("folder", type=pathlib.Path, help="where the tokenizer directory goes")
    folder = parser.parse_args().folder
    tokenizer = train()
    save(tokenizer, folder)
    print(f"{folder}: {tokenizer.get_vocab_size():,} entries")


if __name__ == "__main__":
    main()
