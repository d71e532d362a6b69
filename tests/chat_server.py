"""A real HTTP server on loopback that misbehaves on request, and what it takes to judge through it."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from kardia_jax.config import EndpointConfig, JudgeSamplingConfig, TrafficConfig
from kardia_jax.rewards.rubric import JudgeRequest, Rubric
from kardia_jax.rewards.rubric.files import load_rubric

if TYPE_CHECKING:
    from kardia_jax.judge.cache import VerdictCache
    from kardia_jax.judge.endpoint import EndpointJudge

QUICK = {"backoff_seconds": 0.01, "breaker_seconds": 0.05, "call_seconds": 20.0, "deadline_seconds": 40.0}
"""Traffic control for tests: everything waits, but briefly."""


def endpoint_judge(
    *urls: str, rubric: Rubric, cache: "VerdictCache | None" = None, key: str = "", **fields: Any
) -> "EndpointJudge":
    """An endpoint judge; fields go to the part of the config that has them."""
    # Every test run loads this module; the client library takes a while to import.
    from kardia_jax.judge.endpoint import EndpointJudge

    def of(kind: type) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name in kind.__dataclass_fields__}

    endpoint = EndpointConfig(**{"base_urls": urls, "model": "m", **of(EndpointConfig)})
    traffic = TrafficConfig(**{**QUICK, **of(TrafficConfig)})
    return EndpointJudge(endpoint, JudgeSamplingConfig(**of(JudgeSamplingConfig)), traffic, rubric, key, cache)


def marks_json(rubric: Rubric, mark: object = 4) -> str:
    """An answer that gives every criterion this mark."""
    return json.dumps({name: {"reason": "It names the oven.", "mark": mark} for name in rubric.names})


def completion(text: str | None, finish: str = "stop", **message: object) -> dict[str, Any]:
    """A chat completion with this text."""
    return {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }


@dataclass
class Plan:
    """What happens to one request."""

    status: int = 200
    body: object = None
    """Sent as JSON; a text is sent as it is."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    how: str = "answer"
    """answer; reset: the connection is torn; hang: nothing ever comes; drip: one byte every 20 ms."""


@dataclass
class Server:
    """Records every request and answers by ``plan(number, body)``, numbers counted from 0."""

    plan: Callable[[int, dict[str, Any]], Plan]
    port: int
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    open: int = 0
    """Requests that are being answered now."""
    most_open: int = 0
    _stop: Callable[[], None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    int(row.split(":")[1]) for row in head.split("\r\n") if row.lower().startswith("content-length:")
                )
                body = json.loads(await reader.readexactly(length))
                number = len(self.requests)
                self.requests.append(body)
                self.headers.append(head)
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    if not await self._answer(self.plan(number, body), reader, writer):
                        break
                finally:
                    self.open -= 1
        writer.close()

    async def _answer(self, plan: Plan, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if plan.how == "hang":
            await reader.read()  # until the client gives up
            return False
        await asyncio.sleep(plan.delay)
        if plan.how == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        body = plan.body if isinstance(plan.body, str) else json.dumps(plan.body)
        lines = {"content-type": "application/json", "content-length": str(len(body.encode())), **plan.headers}
        head = f"HTTP/1.1 {plan.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
        writer.write(head.encode())
        if plan.how == "drip":
            for byte in body.encode():
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
                if reader.at_eof():
                    return False
        else:
            writer.write(body.encode())
        await writer.drain()
        return True

    def start(self) -> None:
        """Listens in a thread of its own; a second start after ``stop`` is a restart on the same port."""
        ready, loop = threading.Event(), asyncio.new_event_loop()
        done: list[asyncio.Event] = []

        async def main() -> None:
            done.append(asyncio.Event())
            listening = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
            self.port = listening.sockets[0].getsockname()[1]
            ready.set()
            await done[0].wait()
            listening.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0.05)  # closed connections are taken down by the loop

        def run() -> None:
            loop.run_until_complete(main())
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(10)

        def stop() -> None:
            loop.call_soon_threadsafe(done[0].set)
            thread.join(10)
            assert not thread.is_alive()

        self._stop = stop

    def stop(self) -> None:
        """Tears every connection and frees the port."""
        if self._stop:
            self._stop()
            self._stop = None


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, dict[str, Any]], Plan]], Server]]:
    """``serve(plan)`` starts a server; all are stopped after the test."""
    servers: list[Server] = []

    def make(plan: Callable[[int, dict[str, Any]], Plan]) -> Server:
        server = Server(plan, 0)
        server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def kit():
    """The helpers of this file, for modules that cannot import it."""

    @dataclass
    class Kit:
        Plan = Plan
        marks_json = staticmethod(marks_json)
        completion = staticmethod(completion)
        rubric: Rubric = field(default_factory=lambda: load_rubric("kardia_five"))

        def judge(self, *urls: str, rubric: Rubric | None = None, **fields: Any) -> "EndpointJudge":
            return endpoint_judge(*urls, rubric=rubric or self.rubric, **fields)

        def good(self, delay: float = 0.0, mark: object = 4) -> Plan:
            return Plan(body=completion(marks_json(self.rubric, mark)), delay=delay)

        def requests(self, count: int) -> list[JudgeRequest]:
            said = (("user", "My oven broke."),)
            return [
                JudgeRequest("She bakes.", "The oven broke.", said, f"The oven, of all things. {n}")
                for n in range(count)
            ]

    return Kit()
