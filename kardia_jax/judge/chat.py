"""One server that speaks OpenAI's chat completions: what is sent, what comes back, and what goes wrong.

In: a prompt and the schema of its answer. Out: ``Reply`` with the text and the tokens used, or ``Trouble`` that says
whether asking again could help, or ``JudgeUnusableError`` where nothing but a person can.

    {"model": "qwen3", "messages": [{"role": "user", "content": "You mark one answer ..."}], "temperature": 0.0,
     "max_tokens": 1024, "response_format": {"type": "json_schema", ...}}
    {"choices": [{"message": {"content": "{\\"empathy\\": ..."}, "finish_reason": "stop"}], "usage": {...}}

The client library does HTTP and gives errors their types. Its own retries are off, since ``traffic.py`` counts them,
and its typed ``create`` is passed over for plain ``post``, which costs a third less time per call.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import openai

from kardia_jax.config.judge import EndpointConfig, JudgeSamplingConfig
from kardia_jax.judge.limits import retry_after
from kardia_jax.judge.protocol import JudgeUnusableError
from kardia_jax.judge.stats import JudgeStats
from kardia_jax.judge.traffic import Trouble

FORMATS = ("json_schema", "json_object", "none")
"""Ways to hold an answer to JSON, the strictest first."""
HIDDEN = "[key]"
LONGEST = 200
"""Characters of a server's own words in a message."""

_NO_MODEL = re.compile(r"model.{0,80}(not exist|not found|does not|unknown|no such)|model_not_found", re.I | re.S)
_NO_CONTENT = re.compile(r"content_filter|content_policy|content management policy|moderation", re.I)
_NO_MONEY = re.compile(r"insufficient_quota|insufficient balance|billing", re.I)


class Reply(NamedTuple):
    """What the model wrote, and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Learned:
    """What an address has shown so far; it outlives its connections."""

    formats: tuple[str, ...]
    """Those that may still work, to be tried in this order; one as soon as it is known."""
    has_answered: bool = False


class ChatServer:
    """One address; its connections belong to the event loop in which it was made."""

    def __init__(
        self,
        url: str,
        learned: Learned,
        endpoint: EndpointConfig,
        sampling: JudgeSamplingConfig,
        key: str,
        stats: JudgeStats,
    ):
        """``key``: the key itself, or empty."""
        self.url, self._learned, self._endpoint, self._sampling = url, learned, endpoint, sampling
        self._key, self._stats = key, stats
        # Without a key of ours the library would send that of OPENAI_API_KEY to whatever server this is.
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=None)

    async def ask(self, prompt: str, schema: Mapping[str, Any], seed: int | None) -> Reply:
        """The model's answer. Raises Trouble or JudgeUnusableError."""
        body = self._body(prompt, seed)
        formats = self._learned.formats
        for place, form in enumerate(formats):
            try:
                data = await self._client.post(
                    "/chat/completions", body=body | response_format(form, schema), cast_to=object
                )
            except openai.APIStatusError as error:
                if error.status_code in (400, 422) and place + 1 < len(formats):
                    self._stats.count("calls")
                    continue
                raise self._status_trouble(error) from None
            except openai.APIConnectionError as error:
                raise Trouble("connection_errors", self._hide(_root(error)), retryable=True) from None
            except (openai.APIError, ValueError) as error:
                raise self._unreadable(f"no JSON ({error})") from None
            reply = self._read(data)
            # Only an answer shows that the format was what the server minded, and not the call.
            self._learned.formats, self._learned.has_answered = (form,), True
            return reply
        raise AssertionError("formats are never empty")

    async def close(self) -> None:
        """Gives back the connections."""
        await self._client.close()

    def _body(self, prompt: str, seed: int | None) -> dict[str, Any]:
        sampling = self._sampling
        return {
            "model": self._endpoint.model,
            "messages": [{"role": "user", "content": prompt}],
            sampling.max_tokens_field: sampling.max_tokens,
            **({} if sampling.temperature is None else {"temperature": sampling.temperature}),
            **({} if seed is None else {"seed": seed}),
            **self._endpoint.extra,
        }

    def _read(self, data: object) -> Reply:
        """The text of the first choice; its usage is counted whatever it is worth."""
        prompt_tokens, completion_tokens = usage(data)
        self._stats.tokens(prompt_tokens, completion_tokens)
        match data:
            case {"choices": [{"message": dict(message), **choice}, *_]}:
                pass
            case _:
                raise self._unreadable(f"no chat completion ({json.dumps(data, default=str)})")
        ended, text = choice.get("finish_reason"), message.get("content")
        if ended == "content_filter" or message.get("refusal"):
            said = message.get("refusal") or "finish_reason content_filter"
            raise Trouble("refusals", self._hide(f"the model refused: {said}"), retryable=False)
        if ended == "length":
            limit = f"judge.sampling.max_tokens = {self._sampling.max_tokens}"
            fix = (
                "raise it, turn thinking off with judge.endpoint.extra_body, or hold it to the schema (response_format)"
            )
            why = f"the answer was cut at {limit}; {fix}"
            # A greedy model writes the same long answer again.
            raise Trouble("unreadable", why, retryable=self._sampling.temperature != 0)
        if not isinstance(text, str) or not text.strip():
            thought = "; it only thought" if message.get("reasoning_content") or message.get("reasoning") else ""
            raise self._unreadable(f"an empty answer, finish_reason {ended}{thought}")
        return Reply(text, prompt_tokens, completion_tokens)

    def _unreadable(self, what: str) -> Trouble:
        return Trouble("unreadable", self._hide(f"wanted a verdict, got {what}"), retryable=True)

    def _status_trouble(self, error: openai.APIStatusError) -> Trouble | JudgeUnusableError:
        """What a status other than 200 means: wait, give this call up, or stop the run."""
        status, words = error.status_code, self._hide(_words(error))
        code = f"{error.code or ''} {error.type or ''} {words}"
        told, wait = f"status {status}: {words}", retry_after(error.response.headers.get("retry-after"), time.time())
        if status in (400, 403) and _NO_CONTENT.search(code):
            return Trouble("refusals", told, retryable=False)
        broke = status == 402 or (status == 429 and _NO_MONEY.search(code) is not None)
        if status == 429 and not broke:
            return Trouble("rate_limited", told, retryable=True, retry_after=wait)
        if status in (408, 409, 425) or status >= 500:
            return Trouble("server_errors", told, retryable=True, retry_after=wait)
        unusable = status in (401, 403, 404) or broke or (status == 400 and _NO_MODEL.search(code) is not None)
        if unusable and not self._learned.has_answered:
            return JudgeUnusableError(f"judge.endpoint: {self.url} answered with {told}. {self._advice(status)}")
        return Trouble("rejected", told, retryable=False)

    def _advice(self, status: int) -> str:
        model, variable = self._endpoint.model, self._endpoint.key_env
        if status in (401, 403) and not variable:
            return "It wants a key: name the environment variable that holds it in judge.endpoint.key_env."
        if status in (401, 403):
            return f"Check the key in the environment variable {variable} (judge.endpoint.key_env)."
        if status in (402, 429):
            return "The account has nothing left to spend."
        fix = "Check judge.endpoint.base_urls (they usually end with /v1) and judge.endpoint.model"
        return f"{fix} = {model!r} against {self.url}/models."

    def _hide(self, text: str) -> str:
        """One short line without the key, which some servers repeat to whoever sent a wrong one."""
        hidden = text.replace(self._key, HIDDEN) if self._key else text
        line = " ".join(hidden.split())
        return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def untried(endpoint: EndpointConfig) -> Learned:
    """What is known of an address before the first request."""
    return Learned(FORMATS if endpoint.response_format == "auto" else (endpoint.response_format,))


def response_format(form: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The field of the request that holds the answer to JSON; nothing for ``none``."""
    if form == "json_schema":
        named = {"name": "verdict", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    return {"response_format": {"type": "json_object"}} if form == "json_object" else {}


def usage(data: object) -> tuple[int, int]:
    """Prompt and completion tokens as the server counts them; 0 where it does not say."""
    counted = data.get("usage") if isinstance(data, dict) else None
    read = counted if isinstance(counted, dict) else {}
    prompt, completion = read.get("prompt_tokens"), read.get("completion_tokens")
    return (prompt if isinstance(prompt, int) else 0), (completion if isinstance(completion, int) else 0)


def _words(error: openai.APIStatusError) -> str:
    """What the server says for itself."""
    match error.body:
        case {"message": str(said)} | {"error": {"message": str(said)}} | {"error": str(said)} | {"detail": str(said)}:
            return said
        case str(said) if said.strip():
            return said
        case None:
            return "no explanation"
        case other:
            return json.dumps(other, default=str)


def _root(error: BaseException) -> str:
    """The error at the bottom of the chain: "[Errno 111] Connect call failed", and not "Connection error"."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
