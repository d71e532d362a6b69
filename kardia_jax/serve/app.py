"""The routes, and what each error says; nothing in here logs what people wrote.

Every error has one shape, {"error": {"code": ..., "message": ...}}, and the message says what to do.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kardia_jax.config import ServeConfig
from kardia_jax.judge.protocol import JudgeUnusableError, take_stats
from kardia_jax.judge.wire import (
    ErrorResponse,
    ScoreRequest,
    ScoreResponse,
    WireRubric,
    answer_to_wire,
    complete,
    from_wire,
    rubric_to_wire,
)
from kardia_jax.rewards.rubric import JudgeFailure, Rubric, Verdict
from kardia_jax.serve.guard import BearerToken, BodyLimit, LocalNames
from kardia_jax.serve.metrics import METRICS_TYPE, CountRequests, ServeMetrics
from kardia_jax.serve.worker import JudgeWorker

RETRY_AFTER_SECONDS = 1
"""What a client is told when the server has taken on all that it may."""
TRY_AGAIN_SECONDS = 15.0
"""A backend whose last batch failed as a whole counts as not ready for so long."""


class Refusal(Exception):
    """A request that is not judged, and what its client is told."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclasses.dataclass
class Service:
    """One judge at work: what it is, what it has taken on, and how its last answers were."""

    worker: JudgeWorker
    rubric: Rubric
    settings: ServeConfig
    metrics: ServeMetrics = dataclasses.field(default_factory=ServeMetrics)
    waiting: int = 0
    """Completions taken on and not answered."""
    verdicts: int = 0
    failures: int = 0
    trouble: str | None = None
    """Why the last batch had no verdict at all; None while verdicts come."""
    trouble_at: float = 0.0
    """When that was, on the monotonic clock."""

    @property
    def described(self) -> WireRubric:
        """The rubric as it travels."""
        return rubric_to_wire(self.rubric)

    @property
    def ready(self) -> bool:
        """Whether verdicts come; after a while without, somebody has to be let in to find out."""
        return self.trouble is None or time.monotonic() - self.trouble_at > TRY_AGAIN_SECONDS

    def check(self, batch: ScoreRequest) -> None:
        """Raises Refusal for a batch of another rubric, one that is too long, or one too many."""
        ours, size, most = self.rubric.fingerprint, len(batch.requests), self.settings.max_batch
        if batch.rubric not in (None, ours):
            message = (
                f"rubric: this server marks by {self.rubric.name} version {self.rubric.version}, fingerprint {ours}; "
                f"the request wants {batch.rubric}. Give client and server the same rubric file."
            )
            raise Refusal(409, "rubric_mismatch", message)
        if size > most:
            fix = "Send fewer at once, or start the server with a larger --max-batch."
            raise Refusal(413, "too_many", f"requests: wanted at most {most}, got {size}. {fix}")
        if self.waiting + size > self.settings.max_waiting:
            message = f"{self.waiting} completions are waiting already, at most {self.settings.max_waiting} may."
            raise Refusal(503, "busy", message, {"retry-after": str(RETRY_AFTER_SECONDS)})

    async def score(self, batch: ScoreRequest) -> ScoreResponse:
        """Judges a batch that was checked. Raises Refusal where the judge can never answer."""
        requests = [from_wire(sent) for sent in batch.requests]
        self._take_on(len(requests))
        try:
            with self.metrics.seconds.time():
                given = await self.worker.score(requests, self.settings.score_seconds)
        except JudgeUnusableError as error:
            self._note([JudgeFailure(str(error), retryable=False)] * len(requests))
            raise Refusal(502, "judge_unusable", str(error)) from error
        finally:
            self._take_on(-len(requests))
        whole = [complete(self.rubric, request, answer) for request, answer in zip(requests, given, strict=True)]
        self._note(whole)
        sent = [answer_to_wire(answer) for answer in whole]
        return ScoreResponse(judge=self.worker.judge.name, rubric=self.described, answers=sent)

    def _take_on(self, more: int) -> None:
        self.waiting += more
        self.metrics.waiting.set(self.waiting)

    def _note(self, given: Sequence[Verdict | JudgeFailure]) -> None:
        self.metrics.answered(given)
        failures = [answer.reason for answer in given if isinstance(answer, JudgeFailure)]
        self.verdicts += len(given) - len(failures)
        self.failures += len(failures)
        self.trouble = failures[0] if len(failures) == len(given) else None
        self.trouble_at = time.monotonic()
        self.metrics.ready.set(self.trouble is None)


class Health(BaseModel):
    """Is it alive, and do verdicts come?"""

    status: Literal["ok", "failing"]
    judge: str
    waiting: int
    trouble: str | None = None


def make_app(service: Service, token: str | None) -> ASGIApp:
    """The application behind its guards; without a token only names of this machine are answered to."""
    app: ASGIApp = BodyLimit(make_routes(service), int(service.settings.max_body_mb * 1e6))
    app = LocalNames(app) if token is None else BearerToken(app, token)
    return CountRequests(app, service.metrics)


def make_routes(service: Service) -> FastAPI:
    """The routes alone, with their schema at /openapi.json; no pages, since those load scripts from elsewhere."""
    app = FastAPI(title="kardia judge", version="1", docs_url=None, redoc_url=None)
    app.exception_handlers.update(ERRORS)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (401, 409, 413, 422, 502, 503)
    }

    @app.post("/v1/score", responses=refusals, response_model_exclude_none=True)
    async def score(batch: ScoreRequest) -> ScoreResponse:
        """Marks every reply of a batch by the server's rubric: a verdict or a failure for each, in order."""
        service.check(batch)
        return await service.score(batch)

    @app.get("/v1/rubric", responses={401: {"model": ErrorResponse}})
    async def rubric() -> WireRubric:
        """The rubric's name, version, fingerprint and criteria."""
        return service.described

    @app.get("/healthz", responses={503: {"model": Health}}, response_model_exclude_none=True)
    async def health(response: Response) -> Health:
        """200 while verdicts come; 503 for a while after a batch without any."""
        response.status_code = 200 if service.ready else 503
        return Health(
            status="ok" if service.ready else "failing",
            judge=service.worker.judge.name,
            waiting=service.waiting,
            trouble=None if service.ready else service.trouble,
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        service.metrics.count_backend(take_stats(service.worker.judge))
        return Response(service.metrics.text(), media_type=METRICS_TYPE)

    return app


# --- errors -------------------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return _error(error.status, error.code, str(error), error.headers)


async def _not_understood(request: Request, error: Exception) -> JSONResponse:
    """Which field, and what is wrong with it; never what stood in it."""
    assert isinstance(error, RequestValidationError)
    problems = [_problem(problem) for problem in error.errors()]
    more = f" (and {len(problems) - SHOWN_PROBLEMS} more)" if len(problems) > SHOWN_PROBLEMS else ""
    return _error(422, "bad_request", "; ".join(problems[:SHOWN_PROBLEMS]) + f"{more}. The schema is at /openapi.json.")


async def _no_such_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. POST /v1/score is what you may want."
    return _error(error.status_code, "no_such_route", message, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> JSONResponse:
    return _error(500, "internal", f"{type(error).__name__} in the server; its log has the trace.")


ERRORS = {
    Refusal: _refused,
    RequestValidationError: _not_understood,
    HTTPException: _no_such_route,
    Exception: _broken,
}
SHOWN_PROBLEMS = 5


def _problem(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"body: no JSON at character {problem['loc'][-1]}: {problem['ctx']['error']}"
    if problem["loc"] == ("body",):
        return "body: wanted a JSON object, sent with 'Content-Type: application/json'"
    return f"{_place(problem['loc'])}: {problem['msg']}"


def _place(loc: Sequence[int | str]) -> str:
    """("body", "requests", 3, "reply") -> "requests[3].reply"."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "body"]
    return "".join(parts).removeprefix(".") or "body"


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)
