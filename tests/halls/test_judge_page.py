"""What docs/judge.md says can be typed: commands parse, fields exist, its rubric and its row can be read."""

import json
import pathlib
import re
import shlex
import string

import pytest
import tyro

from kardia_jax.cli import main
from kardia_jax.config import Config, flat
from kardia_jax.dialogue.dataset import read_row
from kardia_jax.dialogue.spans import Spans, render
from kardia_jax.rewards.rubric import load_rubric
from kardia_jax.rewards.rubric.files import _Criterion, _Rubric, _Veto

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "judge.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
VARIABLES = dict(re.findall(r'^(\w+)="(.*)"$', PAGE, re.MULTILINE))
FIELDS = set(flat(Config()))


def block(kind: str) -> str:
    (text,) = [text for name, text in BLOCKS if name == kind]
    return text


def commands() -> list[str]:
    """Commands of ours, in blocks and in sentences; continued lines are joined, comments are cut."""
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in [*lines, *SPANS] if re.match(r"kardia (?:grpo|eval|judge) ", line)]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_of_the_page_is_understood(command, monkeypatch, tmp_path, capsys):
    parse = tyro.cli

    def parse_alone(*args, **kwargs):
        parse(*args, **kwargs)
        raise SystemExit(0)

    monkeypatch.setattr(tyro, "cli", parse_alone)
    monkeypatch.chdir(tmp_path)
    own = "from kardia_jax.config import Config\n\n\ndef get_config():\n    return Config()\n"
    (tmp_path / "configs").mkdir()
    for file in ("own.py", "configs/demo.py"):
        (tmp_path / file).write_text(own, "utf-8")
    typed = shlex.split(string.Template(command).substitute(VARIABLES), comments=True)[1:]
    assert main(["3" if word == "N" else word for word in typed]) == 0, capsys.readouterr().err


def test_there_are_commands_to_be_understood():
    verbs = {" ".join(command.split()[:3]) for command in commands()}
    assert {"kardia judge serve", "kardia judge probe", "kardia judge show", "kardia judge gap"} <= verbs


def test_every_field_that_the_page_names_exists():
    named = {
        word.removeprefix("--").replace("-", "_")
        for span in SPANS
        for word in re.findall(r"(?:--|(?<![\w/]))judge\.[a-z_.-]+|--(?:grpo|run|eval)\.[a-z_.-]+", span)
    }
    assert "judge.max_failure_share" in named
    parts = {field.rsplit(".", count)[0] for field in FIELDS for count in (1, 2)}
    assert named - FIELDS - parts == set()


def test_the_rubric_of_the_page_can_be_used_and_its_table_lists_every_field(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml"), "utf-8")
    (criterion,) = load_rubric(str(path)).criteria
    assert criterion.vetoes[0].because == "nobody says that much in one turn"
    models = {"": _Rubric, "criteria[].": _Criterion, "vetoes[].": _Veto}
    fields = {prefix + name for prefix, model in models.items() for name in model.model_fields}
    told = set(re.findall(r"^\| `([a-z_.\[\]]+)` \|", PAGE, re.MULTILINE))
    assert fields - told == {"criteria"}
    assert {name for name in told if name.startswith(("criteria[", "vetoes["))} <= fields


def test_the_questions_of_the_pages_row_reach_the_dialogue():
    answer = render(Spans("They miss it.", "Loss hurts.", "sad", "I hear you."))
    talk = [{"role": "user", "content": "It ran away."}, {"role": "assistant", "content": answer}]
    whole = {"mbti": "INFP", "emotion": "sad", "situation": "My dog."}
    dialogue = read_row({**json.loads(block("json")), **whole, "messages": talk}, "page:1")
    assert [(item.question, item.weight) for item in dialogue.rubric_items] == [
        ("Does it name the dog?", 1.0),
        ("Does it wait?", 2.0),
    ]
