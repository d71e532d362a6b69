"""The judge that a config describes, with cache and recorder around it.

In: a ``JudgeConfig`` and its rubric. Out: a ``Judge``. Judges that need JAX cannot be made in this room: whoever is
above hands them in as ``makers``, one function per kind.

>>> make_judge(JudgeConfig(kind="rules"), KARDIA_FIVE).name
'rules-1'
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping

from kardia_jax.config import ConfigError
from kardia_jax.config.judge import CacheConfig, EndpointConfig, JudgeConfig
from kardia_jax.judge.cache import VerdictCache, cache_path
from kardia_jax.judge.protocol import Judge
from kardia_jax.judge.replay import Recorder, ReplayJudge
from kardia_jax.judge.rules.judge import RULES, RuleJudge
from kardia_jax.judge.secret import secret_of
from kardia_jax.rewards.rubric import Rubric

Maker = Callable[[JudgeConfig, Rubric], Judge]


def make_judge(config: JudgeConfig, rubric: Rubric, makers: Mapping[str, Maker] | None = None) -> Judge:
    """The judge of ``config.kind``; raises ConfigError where something that it needs is missing."""
    known = {"rules": rules, "endpoint": endpoint, "remote": remote, **(makers or {})}
    if config.kind == "replay":
        judge: Judge = replay(config, rubric, makers or {})
    elif config.kind in known:
        judge = known[config.kind](config, rubric)
    else:
        raise ConfigError("judge.kind", f"one of {', '.join([*known, 'replay'])} here", config.kind)
    return Recorder(judge, rubric, config.record) if config.record else judge


def rules(config: JudgeConfig, rubric: Rubric) -> Judge:
    """The embedded rules, which mark five criteria and know no others."""
    marked = [name for name, _ in RULES]
    asked = [criterion.name for criterion in rubric.criteria]
    if asked != marked:
        fix = "Choose another judge.kind for this rubric."
        raise ConfigError("judge.rubric", f"the criteria {', '.join(marked)} with judge.kind rules", asked, fix)
    return RuleJudge()


@contextlib.contextmanager
def needing(package: str, kind: str) -> Iterator[None]:
    """Around the import of a judge: raises ConfigError where the package that this kind speaks with is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        fix = "pip install 'kardia_jax[judge]'"
        raise ConfigError("judge.kind", f"the package {package} for {kind}", "none installed", fix) from error


def endpoint(config: JudgeConfig, rubric: Rubric) -> Judge:
    """A model behind an OpenAI-compatible address."""
    with needing("openai", "endpoint"):
        from kardia_jax.judge.endpoint import EndpointJudge
    key = key_of(config.endpoint, os.environ)
    cache = open_cache(config.cache)
    return EndpointJudge(config.endpoint, config.sampling, config.traffic, rubric, key, cache)


def remote(config: JudgeConfig, rubric: Rubric) -> Judge:
    """A judge that `kardia judge serve` has put behind HTTP."""
    with needing("httpx2", "remote"):
        from kardia_jax.judge.remote import RemoteJudge
    token = secret_of(config.remote.token_env, os.environ)
    return RemoteJudge(config.remote, config.traffic, rubric, token)


def replay(config: JudgeConfig, rubric: Rubric, makers: Mapping[str, Maker]) -> Judge:
    """A recording, with the judge behind it that answers what was never recorded."""
    assert config.replay.path is not None, "checked in the config"
    otherwise = None
    if config.replay.missing != "fail":
        plain = dataclasses.replace(config, kind=config.replay.missing, record=None)
        otherwise = make_judge(plain, rubric, makers)
    return ReplayJudge(config.replay.path, rubric, otherwise)


def open_cache(config: CacheConfig) -> VerdictCache | None:
    """The cache of verdicts, unless it is off."""
    path = cache_path(config.path, os.environ)
    return None if path is None else VerdictCache(path, config.max_mb * 2**20)


def key_of(config: EndpointConfig, environment: Mapping[str, str]) -> str:
    """The key from the variable that the config names; empty where it names none."""
    if not config.key_env:
        return ""
    key = secret_of(config.key_env, environment)
    if not key:
        fix = f"export {config.key_env}=..., or leave judge.endpoint.key_env empty for a server without a key."
        raise ConfigError("judge.endpoint.key_env", "a variable that holds the key", config.key_env, fix)
    return key
