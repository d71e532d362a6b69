"""A judge behind a real server on loopback, and judges that misbehave."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from kardia_jax.config import ServeConfig
from kardia_jax.judge.protocol import Judge
from kardia_jax.rewards.kardia_five import KARDIA_FIVE
from kardia_jax.rewards.rubric import JudgeFailure, JudgeRequest, Mark, Verdict
from kardia_jax.serve.app import Service
from kardia_jax.serve.server import address, bound, make_server
from kardia_jax.serve.worker import JudgeWorker

REQUEST = JudgeRequest(
    profile="MBTI: INFP\nAbout: Shy librarian.\nRecent Activities: playing the piano.",
    situation="My sister sold my bike last night without asking me first.",
    history=(("user", "My sister sold my bike last night and never asked me. I am so angry."),),
    reply="Anger is a fair answer to that. Your sister had no right to sell that bike.",
)


@pytest.fixture
def asked() -> JudgeRequest:
    """A request as any other."""
    return REQUEST


@pytest.fixture
def numbered():
    """``numbered(3)``: requests whose replies tell them apart."""

    def make(count: int) -> list[JudgeRequest]:
        return [dataclasses.replace(REQUEST, reply=f"{REQUEST.reply} {number}") for number in range(count)]

    return make


@dataclass
class Scripted:
    """Answers what ``answer`` says about each request, after ``seconds``."""

    answer: Callable[[JudgeRequest], Verdict | JudgeFailure]
    seconds: float = 0.0
    name: str = "scripted"
    seen: list[JudgeRequest] = field(default_factory=list)

    async def score(self, requests: list[JudgeRequest]) -> list[Verdict | JudgeFailure]:
        self.seen += requests
        await asyncio.sleep(self.seconds)
        return [self.answer(request) for request in requests]


@pytest.fixture
def scripted() -> type[Scripted]:
    """The class above, for tests to script."""
    return Scripted


@pytest.fixture
def all_marks():
    """``all_marks(4)``: the same mark for every criterion of KARDIA_FIVE."""
    return lambda mark: Verdict(tuple(Mark(name, mark, "because") for name in KARDIA_FIVE.names))


@dataclass(frozen=True)
class Served:
    """A server at work."""

    url: str
    service: Service
    stop: Callable[[], None]


@pytest.fixture
def serving():
    """``with serving(judge) as served:`` a server on a free port of loopback, stopped with the block."""

    @contextlib.contextmanager
    def run(judge: Judge, token: str | None = None, **settings: float) -> Iterator[Served]:
        wanted = dataclasses.replace(ServeConfig(port=0), **settings)
        with bound(wanted) as listener, JudgeWorker(judge) as worker:
            service = Service(worker, KARDIA_FIVE, wanted)
            server = make_server(service, token)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})

            def stop() -> None:
                server.should_exit = True

            thread.start()
            try:
                yield Served(address(listener), service, stop)
            finally:
                stop()
                thread.join(timeout=20)
                assert not thread.is_alive()

    return run
