"""The judge behind an address: a language model on any OpenAI-compatible server.

In: requests. Out: for each a verdict or a failure that says which server, what happened, after how many tries. A rubric
whose criteria see different spans is asked in several prompts, ``samples`` times each; a verdict needs all of them.

>>> judge = EndpointJudge(EndpointConfig(model="qwen3"), JudgeSamplingConfig(), TrafficConfig(), rubric)
>>> score_all(judge, [request])[0].by_name()["empathy"]
4
>>> score_all(judge, [request])[0]                                       # the server has gone
JudgeFailure(reason="http://127.0.0.1:8000/v1: ConnectionRefusedError: ... (after 5 tries)", retryable=True)
"""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Sequence

from kardia_jax.config.judge import EndpointConfig, JudgeSamplingConfig, TrafficConfig
from kardia_jax.judge.cache import VerdictCache
from kardia_jax.judge.chat import ChatServer, untried
from kardia_jax.judge.stats import JudgeStats
from kardia_jax.judge.traffic import Sent, Traffic, Trouble, together
from kardia_jax.rewards.rubric import (
    JudgeFailure,
    JudgeRequest,
    Question,
    Rubric,
    Verdict,
    average,
    join_verdicts,
    json_schema,
    questions,
    read_verdict,
    with_items,
)

CHARACTERS_PER_TOKEN = 4
"""For the estimate of a prompt's tokens before the server has counted them."""


class EndpointJudge:
    """A ``Judge`` on one or several servers; it serves one event loop at a time."""

    def __init__(
        self,
        endpoint: EndpointConfig,
        sampling: JudgeSamplingConfig,
        traffic: TrafficConfig,
        rubric: Rubric,
        key: str = "",
        cache: VerdictCache | None = None,
    ):
        """``key``: the server's key itself, which goes nowhere but into the header of requests."""
        self.name = f"endpoint {endpoint.model}"
        self.rubric = rubric
        self._endpoint, self._sampling, self._key, self._cache = endpoint, sampling, key, cache
        self._stats = JudgeStats(endpoint.price_prompt, endpoint.price_completion)
        self._traffic = Traffic(endpoint.base_urls, traffic, self._stats)
        self._learned = {url: untried(endpoint) for url in endpoint.base_urls}
        self._servers: tuple[asyncio.AbstractEventLoop, list[ChatServer]] | None = None
        self._identity = identity(endpoint, sampling, rubric)

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        """One answer per request, in order. Raises JudgeUnusableError where no request can ever succeed."""
        deadline = asyncio.get_running_loop().time() + self._traffic.config.deadline_seconds
        # Prompts are long: they are written when their turn is near, and not all at once.
        near = asyncio.Semaphore(2 * self._traffic.config.concurrency * len(self._traffic.lanes))

        async def answer(request: JudgeRequest) -> Verdict | JudgeFailure:
            async with near:
                return await self._answer(request, deadline)

        return await together([answer(request) for request in requests])

    def take_stats(self) -> dict[str, float]:
        """Counts since the last call; see ``JudgeStats``."""
        now_open = sum(lane.breaker.opened > 0 for lane in self._traffic.lanes)
        return self._stats.take() | {"judge/breakers_open": float(now_open)}

    async def close(self) -> None:
        """Gives back the connections; the next ``score`` makes new ones."""
        if self._servers is not None:
            (_, servers), self._servers = self._servers, None
            for server in servers:
                await server.close()

    async def _answer(self, request: JudgeRequest, deadline: float) -> Verdict | JudgeFailure:
        try:
            asked = questions(self.rubric, request)
        except ValueError as error:  # a dialogue's own items that clash with the rubric
            return JudgeFailure(f"{self.name}: {error}", retryable=False)
        key = cache_key(self._identity, asked) if self._cache else ""
        if self._cache:
            kept = self._cache.get(key)
            self._stats.count("cache_hits" if kept else "cache_misses")
            if kept:
                return kept
        try:
            said = await self._ask(request, asked, deadline)
        except Trouble as trouble:
            said = JudgeFailure(trouble.reason, trouble.retryable)
        self._stats.count("failures" if isinstance(said, JudgeFailure) else "verdicts")
        if self._cache and isinstance(said, Verdict):
            self._cache.put(key, said)
        return said

    async def _ask(self, request: JudgeRequest, asked: Sequence[Question], deadline: float) -> Verdict | JudgeFailure:
        """All samples of all parts at once; the first that fails ends the others."""
        samples = range(self._sampling.samples)
        jobs = [self._part(question, sample, deadline) for sample in samples for question in asked]
        parts = await together(jobs)
        whole = with_items(self.rubric, request.items)
        verdicts = []
        for sample in samples:
            said = join_verdicts(whole, parts[sample * len(asked) : (sample + 1) * len(asked)])
            if isinstance(said, JudgeFailure):
                return said
            verdicts.append(said)
        return average(verdicts)

    async def _part(self, question: Question, sample: int, deadline: float) -> Verdict:
        """One prompt's verdict. Raises Trouble."""
        schema = json_schema(question.rubric)

        async def send(server: int, before: int) -> Sent[Verdict]:
            first = self._sampling.seed
            seed = None if first is None else first + sample + before * self._sampling.samples
            reply = await self._here()[server].ask(question.prompt, schema, seed)
            said = read_verdict(question.rubric, reply.text)
            if isinstance(said, JudgeFailure):
                raise Trouble("unreadable", said.reason, said.retryable)
            counted = reply.prompt_tokens + reply.completion_tokens
            return Sent(said, counted or None)

        cost = len(question.prompt) // CHARACTERS_PER_TOKEN + self._sampling.max_tokens
        return await self._traffic.call(send, cost, deadline)

    def _here(self) -> list[ChatServer]:
        """The servers, with connections of the running loop."""
        loop = asyncio.get_running_loop()
        if self._servers is None or self._servers[0] is not loop:
            made = [
                ChatServer(url, learned, self._endpoint, self._sampling, self._key, self._stats)
                for url, learned in self._learned.items()
            ]
            self._servers = loop, made
        return self._servers[1]


def identity(endpoint: EndpointConfig, sampling: JudgeSamplingConfig, rubric: Rubric) -> str:
    """What a verdict depends on besides its prompt, as canonical JSON. Addresses and prices are not among it."""
    content = {
        "model": endpoint.model,
        "response_format": endpoint.response_format,
        "extra_body": endpoint.extra,
        "sampling": dataclasses.asdict(sampling),
        "rubric": rubric.fingerprint,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def cache_key(identity: str, asked: Sequence[Question]) -> str:
    """SHA-256 of judge, sampling, rubric and the exact prompts, each behind its length so that none runs into the
    next."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (identity, *(question.prompt for question in asked))]
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()
