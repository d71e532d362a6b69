"""Which judge a config gives, and what is said where something that it needs is missing."""

import sys

import pytest

from kardia_jax.config import CacheConfig, ConfigError, EndpointConfig, LocalJudgeConfig, RemoteConfig
from kardia_jax.config.judge import JudgeConfig, ReplayConfig
from kardia_jax.judge.endpoint import EndpointJudge
from kardia_jax.judge.factory import key_of, make_judge, open_cache
from kardia_jax.judge.remote import RemoteJudge
from kardia_jax.judge.replay import Recorder, ReplayJudge
from kardia_jax.judge.rules.judge import RuleJudge
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import Rubric

OFF = CacheConfig(path="off")
QWEN = EndpointConfig(model="qwen")


def test_each_kind_gives_its_judge(tmp_path):
    recording = tmp_path / "verdicts.jsonl"
    recording.touch()
    made = {
        kind: make_judge(
            JudgeConfig(kind=kind, endpoint=QWEN, cache=OFF, replay=ReplayConfig(recording), remote=RemoteConfig()),
            KARDIA_FIVE,
        )
        for kind in ("rules", "endpoint", "remote", "replay")
    }
    assert {kind: type(judge) for kind, judge in made.items()} == {
        "rules": RuleJudge,
        "endpoint": EndpointJudge,
        "remote": RemoteJudge,
        "replay": ReplayJudge,
    }
    config = JudgeConfig(kind="replay", replay=ReplayConfig(recording, missing="rules"), record=tmp_path / "again")
    assert isinstance(make_judge(config, KARDIA_FIVE), Recorder)


def test_a_kind_that_needs_more_than_this_room_is_made_by_who_can():
    config, local = JudgeConfig(kind="local", local=LocalJudgeConfig(source="judges/a")), RuleJudge()
    assert make_judge(config, KARDIA_FIVE, {"local": lambda config, rubric: local}) is local
    with pytest.raises(ConfigError, match=r"judge\.kind: wanted one of rules, .*replay here, got 'local'"):
        make_judge(config, KARDIA_FIVE)


def test_the_rules_refuse_a_rubric_that_they_do_not_know():
    other = Rubric("other", "1", KARDIA_FIVE.criteria[:2])
    with pytest.raises(ConfigError, match=r"judge\.rubric: .*Choose another judge\.kind"):
        make_judge(JudgeConfig(kind="rules"), other)


@pytest.mark.parametrize(("kind", "package"), [("endpoint", "openai"), ("remote", "httpx2")])
def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(monkeypatch, kind, package):
    for module in [
        name for name in sys.modules if name in (package, f"kardia_jax.judge.{kind}", "kardia_jax.judge.chat")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"judge\.kind: .*{package}.*pip install 'kardia_jax\[judge\]'"):
        make_judge(JudgeConfig(kind=kind, endpoint=QWEN, cache=OFF), KARDIA_FIVE)


def test_the_key_is_read_from_the_variable_that_the_config_names():
    assert key_of(EndpointConfig(), {"OPENAI_API_KEY": "sk-1"}) == ""
    assert key_of(EndpointConfig(key_env="MINE"), {"MINE": " sk-2\n", "OPENAI_API_KEY": "sk-1"}) == "sk-2"
    for environment in ({}, {"MINE": " "}):
        with pytest.raises(ConfigError, match=r"judge\.endpoint\.key_env: .*'MINE'.*export MINE=\.\.\."):
            key_of(EndpointConfig(key_env="MINE"), environment)


def test_the_cache_is_where_the_config_says_and_as_large(tmp_path):
    assert open_cache(OFF) is None
    cache = open_cache(CacheConfig(path=str(tmp_path / "v.sqlite"), max_mb=3))
    assert cache is not None
    cache.close()
    assert (tmp_path / "v.sqlite").exists()
