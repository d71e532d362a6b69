"""A tiny world for the halls: a random model, a few short dialogues, and every program compiled once per session."""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import pytest

from kardia_jax import evaluate, scoring, sft, train
from kardia_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    SftConfig,
    to_json,
)
from kardia_jax.dialogue.spans import Spans, render
from kardia_jax.model.shapes import SHAPES, TINY
from kardia_jax.policies import Policy, load_policy
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Verdict
from kardia_jax.scoring import Grader
from kardia_jax.types import GroupBatch

NANO = dataclasses.replace(TINY, family="qwen3", width=16, mlp_width=32, layers=1, heads=2, kv_heads=1, head_dim=8)
# Long enough that every prompt, one turn or two, is padded to the same 96 positions: one shape, one compilation.
SYSTEM_PROMPT = "Stay with what they say, name the feeling, answer warmly. " * 2 + "{profile} {situation}"
MAKERS = ("make_generate", "make_score", "make_compiled_update", "make_optimizer", "make_loss", "grpo_objective")

remembered = functools.cache(functools.cache)


@pytest.fixture(autouse=True, scope="module")
def shared_programs():
    """The halls make their programs anew in each run; here the same arguments give the same compiled program."""
    with pytest.MonkeyPatch.context() as patch:
        for hall, name in itertools.product((sft, train, evaluate), MAKERS):
            if name in vars(hall):
                patch.setattr(hall, name, remembered(vars(hall)[name]))
        patch.setitem(SHAPES, "nano", NANO)
        yield


def row(number: int, emotion: str, turns: int) -> dict[str, Any]:
    """One KardiaBench row; numbers have two digits, so that all rows are about equally long."""
    answer = render(Spans("they miss it", "loss hurts", emotion, f"I hear you, {number}."))
    talk = [{"role": "user", "content": f"It is day {number}."}, {"role": "assistant", "content": answer}]
    return {
        "person": f"About: neighbour {number}.",
        "mbti": "INFP",
        "emotion": emotion,
        "situation": f"My dog number {number} ran away.",
        "messages": talk * turns,
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> pathlib.Path:
    """A folder with train.jsonl (6 dialogues, 9 answers), test.jsonl (5 dialogues) and system_prompt.txt."""
    folder = tmp_path_factory.mktemp("world")
    splits = {
        "train": [row(10 + n, ("sad", "lonely")[n % 2], 1 + n % 2) for n in range(6)],
        "test": [row(50 + n, ("sad", "lonely")[n % 2], 1) for n in range(5)],
    }
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    (folder / "system_prompt.txt").write_text(SYSTEM_PROMPT, "utf-8")
    return folder


def replaced(config: Any, path: str, value: object) -> Any:
    """The same config with the field at a dotted path replaced."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


@pytest.fixture(scope="session")
def config_in(world) -> Callable[..., Config]:
    """Makes the tiny config of a run in this folder; fields to replace are given by their dotted path."""
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0, max_bad_steps=2)
    base = Config(
        run=RunConfig(save_every=2, log_rollouts=-1, console=False),
        data=DataConfig(source=str(world), system_prompt=world / "system_prompt.txt", max_prompt_tokens=96),
        model=ModelConfig(source="nano", remat="none"),
        sft=SftConfig(epochs=2.0, batch=3, optimizer=optimizer),
        grpo=GrpoConfig(steps=4, prompts=2, group=4, sampler=SamplerConfig(max_new_tokens=8), optimizer=optimizer),
        eval=EvalConfig(sampler=SamplerConfig(temperature=0.0, max_new_tokens=8), batch=2, samples=4),
    )

    def make(folder: pathlib.Path, fields: Mapping[str, object] | None = None) -> Config:
        chosen = {"run.dir": folder, **(fields or {})}
        return functools.reduce(lambda config, field: replaced(config, *field), chosen.items(), base)

    return make


@pytest.fixture
def config_of(config_in, tmp_path) -> Callable[..., Config]:
    """``config_in`` a folder of this test's own."""
    return functools.partial(config_in, tmp_path / "run")


@pytest.fixture
def config_file(tmp_path) -> Callable[[Config], str]:
    """Writes a config as the Python file that the command line takes."""

    def write(config: Config) -> str:
        (tmp_path / "config.json").write_text(to_json(config), "utf-8")
        path = tmp_path / "config.py"
        path.write_text(
            "import pathlib\n"
            "from kardia_jax.config import from_json\n"
            "def get_config():\n"
            "    return from_json(pathlib.Path(__file__).with_name('config.json').read_text('utf-8'))\n",
            "utf-8",
        )
        return str(path)

    return write


@pytest.fixture(scope="session")
def nano_policy(world) -> Policy:
    """The start policy; training donates its parameters, so take a ``fresh_policy`` to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "nano", NANO)
        return load_policy(ModelConfig(source="nano"), seed=0)


@pytest.fixture(scope="session")
def fresh_policy(nano_policy) -> Callable[[], Policy]:
    """Makes the start policy with parameters of its own."""
    return lambda: nano_policy._replace(params=jax.tree.map(jnp.copy, nano_policy.params))


class FakeJudge(NamedTuple):
    """Marks by a checksum of the reply; stays silent on the requests whose place in the call is in ``silent``.

    With ``in_process`` it is asked about a step in one call, so places count over the step.
    """

    silent: frozenset[int] = frozenset()
    name: str = "fake"
    in_process: bool = True

    def marks(self, reply: str) -> dict[str, int]:
        return {c.name: 1 + zlib.crc32(f"{c.name} {reply}".encode()) % 5 for c in KARDIA_FIVE.criteria}

    def verdict(self, request: JudgeRequest) -> Verdict:
        return Verdict(tuple(Mark(name, mark, "checksum") for name, mark in self.marks(request.reply).items()))

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        return [
            JudgeFailure("too busy", retryable=True) if place in self.silent else self.verdict(request)
            for place, request in enumerate(requests)
        ]


class SlowJudge(NamedTuple):
    """``FakeJudge`` on a network: asked about each completion as it ends, and answers in another order."""

    name: str = "slow"

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        # Milliseconds by the reply, so that answers overtake each other.
        await asyncio.sleep(zlib.crc32(requests[0].reply.encode()) % 8 / 1000)
        return [FakeJudge().verdict(request) for request in requests]


@pytest.fixture(scope="session")
def grader_of() -> Callable[..., Grader]:
    """Makes a grader around the fake judge, or around another one."""

    def make(silent=(), judge=None, weights: Mapping[str, float] | None = None) -> Grader:
        return Grader(judge or FakeJudge(frozenset(silent)), KARDIA_FIVE, RewardConfig(**(weights or {})))

    return make


@pytest.fixture
def captured(monkeypatch) -> list[GroupBatch]:
    """Batches as they reach the first update of each step."""
    seen: list[GroupBatch] = []
    original = train.minibatches

    def keep(batch, grpo):
        seen.append(jax.device_get(batch))
        return original(batch, grpo)

    monkeypatch.setattr(train, "minibatches", keep)
    return seen


@pytest.fixture(scope="session")
def fake_verdict() -> Callable[[JudgeRequest], Verdict]:
    """The verdict of the fake judge on one completion."""
    return FakeJudge().verdict


@pytest.fixture(scope="session")
def slow_judge() -> SlowJudge:
    return SlowJudge()


@pytest.fixture(scope="session")
def lenient_parse() -> Callable[[str], Spans]:
    """An untrained model never writes four spans: this makes any text well-formed, with the text as the reply."""
    return lambda text: Spans("-", "-", ("sad", "lonely")[len(text) % 2], text or "-")


@pytest.fixture
def every_text_counts(monkeypatch, lenient_parse):
    monkeypatch.setattr(scoring, "parse", lenient_parse)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="session")
def killed_at() -> Callable[..., contextlib.AbstractContextManager[type[Exception]]]:
    """Inside the block the n-th call of a function, before it has done anything, raises what the block yields."""

    @contextlib.contextmanager
    def block(owner: Any, name: str, call: int) -> Iterator[type[KilledError]]:
        original, calls = getattr(owner, name), itertools.count(1)

        def die_or_do(*args, **kwargs):
            if next(calls) == call:
                raise KilledError(name)
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, die_or_do)
            yield KilledError

    return block


@pytest.fixture(scope="session")
def read_lines() -> Callable[[pathlib.Path], list[dict[str, Any]]]:
    """Rows of a JSONL file, read as strictly as JSON is defined: NaN is an error."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    def read(path: pathlib.Path) -> list[dict[str, Any]]:
        return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]

    return read
