"""The judge's part of the config: who marks, how it is asked, and what silence means.

Fields of a kind that is not used are checked for sense and not for presence: `judge.endpoint.model` may be empty as
long as `judge.kind` is not `endpoint`.
"""

import dataclasses
import json
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from kardia_jax.config.alarms import AlarmConfig
from kardia_jax.config.errors import ConfigError, require, require_variable
from kardia_jax.config.local_judge import LocalJudgeConfig

NOT_THE_VERDICT = (
    *("endpoint.base_urls", "endpoint.key_env", "endpoint.price_prompt", "endpoint.price_completion"),
    *("remote.urls", "remote.token_env", "remote.batch", "remote.gather_seconds", "local.max_tokens_per_batch"),
    *("traffic", "cache", "record", "max_failure_share", "failure_window", "audit", "alarms"),
)
"""Fields that decide how a verdict is reached, paid, kept and counted, and not what it says: a run may be resumed with
others."""


@dataclass(frozen=True)
class EndpointConfig:
    """Servers that speak OpenAI's chat completions: vLLM, SGLang, llama.cpp, Ollama, OpenAI, DeepSeek."""

    base_urls: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)
    """Addresses up to and with /v1. Several must serve the same model; a call goes to the one with the least load."""
    model: str = ""
    """The model's name as the server knows it (`GET /v1/models` lists it)."""
    key_env: str = ""
    """Name of the environment variable that holds the key; empty sends none. The key itself stands in no config."""
    response_format: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the answer is held to the rubric's JSON. auto: json_schema, and where the server refuses that with status 400
    json_object, then none. Whatever comes is read strictly."""
    extra_body: str = "{}"
    """More fields of every request as a JSON object, e.g. '{"chat_template_kwargs": {"enable_thinking": false}}'."""
    price_prompt: float = 0.0
    """Price of a million prompt tokens, in any currency, for the metric `judge/cost`."""
    price_completion: float = 0.0
    """Price of a million completion tokens."""

    def __post_init__(self) -> None:
        require(bool(self.base_urls), "judge.endpoint.base_urls", "at least one address", self.base_urls)
        for url in self.base_urls:
            _check_url("judge.endpoint.base_urls", url, "http(s)://host:port/v1", "judge.endpoint.key_env")
        if self.key_env:
            require_variable("judge.endpoint.key_env", self.key_env)
        require(self.price_prompt >= 0, "judge.endpoint.price_prompt", "0 or more", self.price_prompt)
        require(self.price_completion >= 0, "judge.endpoint.price_completion", "0 or more", self.price_completion)
        _ = self.extra

    @property
    def extra(self) -> dict[str, Any]:
        """``extra_body`` as the object that it is."""
        try:
            read = json.loads(self.extra_body)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise ConfigError("judge.endpoint.extra_body", "a JSON object", self.extra_body)
        ours = {"model", "messages", "stream", "n"} & set(read)
        require(not ours, "judge.endpoint.extra_body", "no field that the judge sets itself", sorted(ours))
        return read


@dataclass(frozen=True)
class JudgeSamplingConfig:
    """How the judging model draws its answers."""

    temperature: float | None = 0.0
    """0 takes the most likely token; none does not send it, for models that refuse the field."""
    max_tokens: int = 1024
    """Budget of one answer, thinking included."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the budget is called; OpenAI's reasoning models know max_completion_tokens alone."""
    seed: int | None = None
    """Sent with every request, plus the number of the sample and of the try; none sends no seed."""
    samples: int = 1
    """Answers per verdict; marks are averaged and their spread is recorded. Costs as many requests."""

    def __post_init__(self) -> None:
        name, t = "judge.sampling", self.temperature
        require(t is None or 0 <= t <= 2, f"{name}.temperature", "none or a number in [0, 2]", t)
        require(self.max_tokens >= 16, f"{name}.max_tokens", "at least 16", self.max_tokens)
        require(self.samples >= 1, f"{name}.samples", "at least 1", self.samples)
        fix = "At temperature 0 all samples are the same; raise judge.sampling.temperature."
        require(self.samples == 1 or t != 0, f"{name}.samples", "1 at temperature 0", self.samples, fix)


@dataclass(frozen=True)
class TrafficConfig:
    """What a server may be asked to bear, and how long it is waited for. All limits are per server."""

    concurrency: int = 64
    """Requests under way at once."""
    requests_per_minute: int | None = None
    """Most requests in any 60 seconds; none is unlimited."""
    tokens_per_minute: int | None = None
    """Most tokens in any 60 seconds: estimated before a request is sent, corrected by the usage it reports."""
    call_seconds: float = 60.0
    """One request, from sending to the last byte."""
    deadline_seconds: float = 300.0
    """All that is asked for at once, waiting and retries included; what is missing then is a failure."""
    max_tries: int = 5
    """Requests for one answer, the first included."""
    retry_share: float = 0.2
    """Retries may be at most this share of calls in the long run, whatever breaks: no retry storm."""
    retry_reserve: int = 64
    """Retries beyond the share that a burst of failures may use; calls that go well fill it up again."""
    backoff_seconds: float = 0.5
    """A retry waits a random time up to this, doubled with every further try."""
    backoff_max_seconds: float = 30.0
    """Longest such wait."""
    breaker_failures: int = 8
    """Failures in a row (no connection, timeout, status 5xx) after which a server is left alone for a while; then one
    call probes it."""
    breaker_seconds: float = 2.0
    """First pause of the breaker; every failed probe doubles it, up to a minute."""

    def __post_init__(self) -> None:
        name = "judge.traffic"
        require(1 <= self.concurrency <= 1000, f"{name}.concurrency", "1 to 1000", self.concurrency)
        for limit in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, limit)
            require(value is None or value >= 1, f"{name}.{limit}", "none or at least 1", value)
        for positive in ("call_seconds", "deadline_seconds", "breaker_seconds"):
            require(getattr(self, positive) > 0, f"{name}.{positive}", "more than 0", getattr(self, positive))
        for natural in ("retry_share", "retry_reserve", "backoff_seconds", "backoff_max_seconds"):
            require(getattr(self, natural) >= 0, f"{name}.{natural}", "0 or more", getattr(self, natural))
        require(self.max_tries >= 1, f"{name}.max_tries", "at least 1", self.max_tries)
        require(self.breaker_failures >= 1, f"{name}.breaker_failures", "at least 1", self.breaker_failures)


@dataclass(frozen=True)
class CacheConfig:
    """Verdicts that are kept on disk and not asked for again; processes may share one file."""

    path: str = "auto"
    """An SQLite file. auto: `kardia_jax/verdicts.sqlite` in the user's cache folder; off: none. Verdicts of an endpoint
    are kept; the rules need no cache, and a replay is one."""
    max_mb: int = 1024
    """Size of the file, beyond which the verdicts that were unused for longest go."""

    def __post_init__(self) -> None:
        require(bool(self.path), "judge.cache.path", "auto, a file or off", self.path)
        require(self.max_mb >= 1, "judge.cache.max_mb", "at least 1", self.max_mb)


@dataclass(frozen=True)
class ReplayConfig:
    """A file of past verdicts in the place of a judge."""

    path: pathlib.Path | None = None
    """JSON Lines as `judge.record` writes them."""
    missing: Literal["fail", "rules", "endpoint", "local", "remote"] = "fail"
    """A reply that is not in the file: no verdict, or this other judge is asked."""


@dataclass(frozen=True)
class RemoteConfig:
    """`kardia judge serve`, on this machine or another."""

    urls: tuple[str, ...] = ("http://127.0.0.1:8600",)
    """Addresses without a path. Several must serve the same judge and rubric; each batch goes to the one with the least
    load."""
    token_env: str = "KARDIA_JUDGE_TOKEN"
    """Name of the environment variable that holds the bearer token; where it is not set, none is sent."""
    batch: int = 32
    """Most completions in one request; the server allows `--max-batch`."""
    gather_seconds: float = 0.01
    """A completion waits so long for others to travel with."""

    def __post_init__(self) -> None:
        name = "judge.remote"
        require(bool(self.urls), f"{name}.urls", "at least one address", self.urls)
        for url in self.urls:
            _check_url(f"{name}.urls", url, "http(s)://host:port", "judge.remote.token_env")
            require(not url.endswith("/"), f"{name}.urls", "an address without a slash at its end", url)
        require_variable(f"{name}.token_env", self.token_env)
        require(self.batch >= 1, f"{name}.batch", "at least 1", self.batch)
        require(0 <= self.gather_seconds <= 1, f"{name}.gather_seconds", "0 to 1", self.gather_seconds)


Kind = Literal["rules", "endpoint", "local", "replay", "remote"]


@dataclass(frozen=True)
class AuditConfig:
    """A second judge, which looks at a sample of what the first one marks, by the same rubric. What it says goes to the
    metrics (`audit/`) and never into a reward, and where it fails the run goes on."""

    every: int = 0
    """Steps from one look to the next; 0 is never."""
    share: float = 0.25
    """Share of the step's completions that it sees; which ones follows from seed and step."""
    kind: Kind = "rules"
    """As `judge.kind`, with settings of its own below; another judge than the first."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    local: LocalJudgeConfig = field(default_factory=LocalJudgeConfig)
    sampling: JudgeSamplingConfig = field(default_factory=JudgeSamplingConfig)
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self) -> None:
        require(self.every >= 0, "judge.audit.every", "0 (never) or more steps", self.every)
        require(0 < self.share <= 1, "judge.audit.share", "a share in (0, 1]", self.share)
        if self.every:
            _check_named(self, "judge.audit")


@dataclass(frozen=True)
class JudgeConfig:
    """Who marks the rubric, and what its silence means."""

    kind: Kind = "rules"
    """rules: the embedded, deterministic stand-in for an LLM judge; endpoint: an OpenAI-compatible server; local: a
    model in this process; replay: a file of past verdicts; remote: `kardia judge serve` elsewhere."""
    rubric: str = "kardia_five"
    """A rubric by its name, or a YAML file."""
    record: pathlib.Path | None = None
    """File to which every verdict is appended, with what was asked; `judge.replay.path` reads it."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    local: LocalJudgeConfig = field(default_factory=LocalJudgeConfig)
    sampling: JudgeSamplingConfig = field(default_factory=JudgeSamplingConfig)
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    max_failure_share: float = 0.5
    """The run saves its state and stops when more than this share of the verdicts in `failure_window` is missing, or
    all of a step that asked for more than this share of its completions."""
    failure_window: int = 10
    """Steps over which missing verdicts are counted; at the start of a run those that there are."""
    min_valid: int = 2
    """A group with fewer verdicts than this is left out of the update."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)

    def __post_init__(self) -> None:
        share = self.max_failure_share
        require(0 <= share <= 1, "judge.max_failure_share", "a share in [0, 1]", share)
        require(self.failure_window >= 1, "judge.failure_window", "at least 1 step", self.failure_window)
        require(self.min_valid >= 1, "judge.min_valid", "at least 1", self.min_valid)
        require(bool(self.rubric), "judge.rubric", "a name or a file", self.rubric)
        _check_named(self, "judge")
        other = not self.audit.every or who_marks(self) != who_marks(self.audit)
        fix = "A judge agrees with itself: give judge.audit another kind or model."
        require(other, "judge.audit.kind", "another judge than the first", self.audit.kind, fix)

    @property
    def auditor(self) -> "JudgeConfig":
        """The config of the second judge."""
        parts = {name: vars(self.audit)[name] for name in BACKENDS}
        return dataclasses.replace(self, kind=self.audit.kind, **parts, record=None, audit=AuditConfig())


BACKENDS = ("endpoint", "local", "sampling", "traffic", "replay", "remote")
"""Parts of a config that say how a judge is made; the second judge has its own."""


def who_marks(config: JudgeConfig | AuditConfig) -> tuple[object, ...]:
    """What tells two judges apart, by kind."""
    named = {
        "rules": None,
        "endpoint": config.endpoint.model,
        "local": config.local.source,
        "replay": config.replay.path,
        "remote": config.remote.urls,
    }
    return config.kind, named[config.kind]


def _check_named(config: JudgeConfig | AuditConfig, prefix: str) -> None:
    """Refuses a kind whose model or file is not named."""
    asked = {config.kind, config.replay.missing if config.kind == "replay" else config.kind}
    if "endpoint" in asked:
        model, fix = config.endpoint.model, f"Name the loaded model: --{prefix}.endpoint.model (GET /v1/models)."
        require(bool(model), f"{prefix}.endpoint.model", "a model's name", model, fix)
    if "local" in asked:
        source, fix = config.local.source, f"Name the model that judges: --{prefix}.local.source DIRECTORY."
        require(bool(source), f"{prefix}.local.source", "a directory or GGUF file", source, fix)
    if config.kind == "replay":
        fix = "Record one with --judge.record FILE and another judge.kind."
        require(config.replay.path is not None, f"{prefix}.replay.path", "a file of verdicts", None, fix)


def _check_url(name: str, url: str, wanted: str, secret: str) -> None:
    """An address of a server without credentials in it: addresses are shown in messages and saved with a run."""
    fine = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url) is not None
    shown = "an address with user, password or query (hidden)" if re.search(r"[@?#]", url) else url
    require(fine, name, wanted, shown, f"A secret belongs into the variable that {secret} names.")
