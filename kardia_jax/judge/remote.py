"""The client of ``kardia judge serve``: a judge that stands on another machine, or serves several learners.

In: requests, many at once or one by one as completions end. Those that come within ``gather_seconds`` of each other
travel together, at most ``batch`` of them, under the same traffic control as an endpoint's. Out: what the judge there
said; what did not arrive is a failure and never a mark. The rubric's fingerprint travels both ways, so a server with
another rubric marks nothing.

>>> judge = RemoteJudge(RemoteConfig(urls=("http://judge:8600",)), TrafficConfig(), rubric, token)
>>> score_all(judge, [request])[0].by_name()["empathy"]
4

A server that marks by another rubric, knows another token or is no judge at all raises JudgeUnusableError: a run stops
with it at its first verdict, since waiting and asking again mend nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx2
from pydantic import ValidationError

from kardia_jax.config.judge import RemoteConfig, TrafficConfig
from kardia_jax.judge.limits import retry_after
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.judge.secret import hide
from kardia_jax.judge.stats import JudgeStats
from kardia_jax.judge.traffic import Sent, Traffic, Trouble
from kardia_jax.judge.wire import (
    ErrorResponse,
    ScoreRequest,
    ScoreResponse,
    WireRequest,
    answer_from_wire,
    complete,
    to_wire,
)
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Rubric, Verdict

Answer = Verdict | JudgeFailure
CHARACTERS_PER_TOKEN = 4
"""For the estimate that tokens_per_minute goes by."""


class _Waiting(NamedTuple):
    """A request that has not been sent yet, as it will be sent, and the place for its answer."""

    request: JudgeRequest
    sent: WireRequest
    answer: asyncio.Future[Answer]


@dataclass
class _Here:
    """What belongs to one event loop: connections, and requests that wait for company."""

    loop: asyncio.AbstractEventLoop
    client: httpx2.AsyncClient
    waiting: list[_Waiting] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    posts: set[asyncio.Task[None]] = field(default_factory=set)


class RemoteJudge:
    """A ``Judge`` behind HTTP; it serves one event loop at a time."""

    def __init__(self, config: RemoteConfig, traffic: TrafficConfig, rubric: Rubric, token: str = ""):
        """``token``: the bearer token itself, which goes nowhere but into the header of requests; empty sends none."""
        self.name = f"remote {config.urls[0]}"
        self._config, self._rubric, self._token = config, rubric, token
        self._stats = JudgeStats()
        self._traffic = Traffic(config.urls, traffic, self._stats)
        self._open: _Here | None = None

    async def score(self, requests: list[JudgeRequest]) -> list[Answer]:
        """One answer per request, in order. Raises JudgeUnusableError where no request can ever succeed."""
        here = self._here()
        places = [self._take(here, request) for request in requests]
        while len(here.waiting) >= self._config.batch:
            self._post(here)
        if here.waiting and here.timer is None:
            here.timer = here.loop.call_later(self._config.gather_seconds, self._post_all, here)
        return list(await asyncio.gather(*places))

    def take_stats(self) -> dict[str, float]:
        """Counts since the last call; calls and their faults are of batches. See ``JudgeStats``."""
        now_open = sum(lane.breaker.opened > 0 for lane in self._traffic.lanes)
        return self._stats.take() | {"judge/breakers_open": float(now_open)}

    async def close(self) -> None:
        """Gives back the connections; the next ``score`` makes new ones."""
        if self._open is None:
            return
        here, self._open = self._open, None
        if here.timer is not None:
            here.timer.cancel()
        for post in here.posts:
            post.cancel()
        await here.client.aclose()

    def _here(self) -> _Here:
        """What belongs to the running loop."""
        loop = asyncio.get_running_loop()
        if self._open is None or self._open.loop is not loop:
            headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._traffic.config.concurrency)
            # Traffic control has the clock: one bound for a whole call, however slowly its bytes drip.
            self._open = _Here(loop, httpx2.AsyncClient(headers=headers, limits=limits, timeout=None))
        return self._open

    # --- batches ------------------------------------------------------------------------------------------

    def _take(self, here: _Here, request: JudgeRequest) -> asyncio.Future[Answer]:
        """The place for an answer; the request waits for company, unless it cannot travel at all."""
        place: asyncio.Future[Answer] = here.loop.create_future()
        try:
            here.waiting.append(_Waiting(request, to_wire(request), place))
        except ValidationError as error:
            place.set_result(JudgeFailure(f"{self.name}: {_first_problem(error)}", retryable=False))
        return place

    def _post_all(self, here: _Here) -> None:
        here.timer = None
        while here.waiting:
            self._post(here)

    def _post(self, here: _Here) -> None:
        """Sends the first batch on its way; ends it when nobody waits for any of its answers any more."""
        size = self._config.batch
        batch, here.waiting[:] = here.waiting[:size], here.waiting[size:]
        post = here.loop.create_task(self._deliver(here, batch))
        here.posts.add(post)
        post.add_done_callback(here.posts.discard)

        def end_if_unwanted(_: asyncio.Future[Answer]) -> None:
            if all(one.answer.done() for one in batch):
                post.cancel()

        for one in batch:
            one.answer.add_done_callback(end_if_unwanted)

    async def _deliver(self, here: _Here, batch: Sequence[_Waiting]) -> None:
        """Puts an answer into every place of the batch, or what stops the run."""
        cost = _tokens([one.request for one in batch])
        try:
            given = await self._traffic.call(lambda server, _: self._ask(here, self._config.urls[server], batch), cost)
        except Trouble as trouble:
            given = [JudgeFailure(trouble.reason, trouble.retryable)] * len(batch)
        except JudgeUnusableError as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, answer in zip(batch, given, strict=True):
            self._stats.count("failures" if isinstance(answer, JudgeFailure) else "verdicts")
            if not one.answer.done():
                one.answer.set_result(answer)

    async def _ask(self, here: _Here, url: str, batch: Sequence[_Waiting]) -> Sent[list[Answer]]:
        """One POST. Raises Trouble or JudgeUnusableError for whatever is not an answer to each request."""
        score = ScoreRequest(rubric=self._rubric.fingerprint, requests=[one.sent for one in batch])
        body, kind = score.model_dump_json().encode(), {"content-type": "application/json"}
        try:
            response = await here.client.post(f"{url}/v1/score", content=body, headers=kind)
        except httpx2.TransportError as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Trouble("connection_errors", said, retryable=True) from None
        if response.status_code != 200:
            raise refusal(response, url, self._config.token_env, time.time(), self._token)
        return Sent(self._read(response, url, [one.request for one in batch]), None)

    def _read(self, response: httpx2.Response, url: str, requests: Sequence[JudgeRequest]) -> list[Answer]:
        try:
            scored = ScoreResponse.model_validate_json(response.content)
        except ValidationError as error:
            raise Trouble("unreadable", f"wanted verdicts, got {_first_problem(error)}", retryable=True) from None
        ours, theirs = self._rubric.fingerprint, scored.rubric
        if theirs.fingerprint != ours:
            said = f"it marked by {theirs.name} version {theirs.version} ({theirs.fingerprint}), wanted was {ours}"
            raise JudgeUnusableError(f"judge.remote: {url}: {said}. Give both the same --judge.rubric.")
        if len(scored.answers) != len(requests):
            why = f"wanted {len(requests)} answers, got {len(scored.answers)}"
            raise Trouble("unreadable", why, retryable=False)
        pairs = zip(requests, scored.answers, strict=True)
        return [complete(self._rubric, request, answer_from_wire(answer)) for request, answer in pairs]


def refusal(
    response: httpx2.Response, url: str, token_env: str, now: float, token: str = ""
) -> Trouble | JudgeUnusableError:
    """What a status other than 200 means: wait, give this batch up, or stop the run. ``now``: seconds since 1970;
    ``token`` stands in no message, whatever the server says."""
    status, (code, message) = response.status_code, _told(hide(response.text, token))
    words, later = f"status {status}: {message}", retry_after(response.headers.get("retry-after"), now)
    if code in ADVICE or status in (401, 403, 404, 405):
        fix = ADVICE.get(code, "Is it `kardia judge serve` that listens there?").format(token_env=token_env)
        return JudgeUnusableError(f"judge.remote: {url} answered with {words} {fix}".rstrip())
    if status == 429 or code == "busy":
        return Trouble("rate_limited", words, retryable=True, retry_after=later)
    if status == 408 or status >= 500:
        return Trouble("server_errors", words, retryable=True, retry_after=later)
    return Trouble("rejected", words, retryable=False)


ADVICE = {
    "rubric_mismatch": "",
    "unauthorized": "The client takes its token from the environment variable {token_env}.",
    "judge_unusable": "",
    "too_many": "On the client's side: a smaller judge.remote.batch.",
    "too_large": "On the client's side: a smaller judge.remote.batch.",
    "wrong_host": "",
}
"""Refusals of ``kardia judge serve`` that only a person can mend, and what else to say about them."""


def _told(body: str) -> tuple[str, str]:
    """Code and message where the words are ours; the beginning of a strange body otherwise."""
    try:
        error = ErrorResponse.model_validate_json(body).error
    except ValidationError:
        return "", repr(body[:120])
    return error.code, error.message


def _first_problem(error: ValidationError) -> str:
    """Which field, and what is wrong with it."""
    first = error.errors(include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"


def _tokens(requests: Sequence[JudgeRequest]) -> int:
    """Estimated: a server that judges by a model reads at least the material."""
    texts = (text for r in requests for text in (r.profile, r.situation, r.reply, *(said for _, said in r.history)))
    return sum(map(len, texts)) // CHARACTERS_PER_TOKEN
