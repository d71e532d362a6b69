"""What Prometheus reads of a judge that is served: text at GET /metrics.

    kardia_judge_verdicts_total 1184.0
    kardia_judge_failures_total{reason="timeout"} 3.0
    kardia_judge_waiting 64.0
    kardia_judge_backend_total{what="cache_hits"} 310.0
    kardia_judge_request_seconds_bucket{le="0.25"} 9.0

What a backend counts by itself (calls, retries, faults by class, cache, tokens, latency) is taken at every reading.
Verdicts, failures and what is waiting are counted in completions; requests and seconds in HTTP requests to /v1/score.
"""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kardia_jax.judge.stats import Event, Fault
from kardia_jax.rewards.rubric import JudgeFailure, Verdict

COUNTED = frozenset((*get_args(Event), *get_args(Fault), "prompt_tokens", "completion_tokens", "cost"))
METRICS_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bucket ends: rules take milliseconds, a batch at a large model minutes."""


class ServeMetrics:
    """Counters of one server; each server has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "kardia_judge_requests", "Requests to /v1/score, by HTTP status.", ["status"], registry=self._registry
        )
        self.verdicts = Counter("kardia_judge_verdicts", "Completions with a verdict.", registry=self._registry)
        self.failures = Counter(
            "kardia_judge_failures", "Completions without a verdict, by class.", ["reason"], registry=self._registry
        )
        self.seconds = Histogram(
            "kardia_judge_request_seconds", "Time to judge one request.", buckets=SECONDS, registry=self._registry
        )
        self.waiting = Gauge("kardia_judge_waiting", "Completions taken on, not answered yet.", registry=self._registry)
        self.backend_counts = Counter(
            "kardia_judge_backend", "What the judge behind the server counts.", ["what"], registry=self._registry
        )
        self.backend_values = Gauge(
            "kardia_judge_backend_now", "What the judge behind the server measures.", ["what"], registry=self._registry
        )
        self.ready = Gauge("kardia_judge_ready", "1: the last answers held a verdict.", registry=self._registry)

    def count_backend(self, stats: Mapping[str, float]) -> None:
        """Takes over what a judge has counted since the last time: counts add up, the rest is as it is now."""
        for name, value in stats.items():
            what = name.removeprefix("judge/")
            if what in COUNTED:
                self.backend_counts.labels(what).inc(value)
            elif math.isfinite(value):
                self.backend_values.labels(what).set(value)

    def answered(self, given: Sequence[Verdict | JudgeFailure]) -> None:
        """Counts the answers to one request."""
        for answer in given:
            if isinstance(answer, Verdict):
                self.verdicts.inc()
            else:
                self.failures.labels("retryable" if answer.retryable else "permanent").inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class CountRequests:
    """Counts answers to /v1/score by HTTP status, refusals included."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        watched = scope["type"] == "http" and scope["path"] == "/v1/score"
        await self._app(scope, receive, counted if watched else send)
