"""Address, token and signals: a judge as a process.

SIGTERM or Ctrl-C closes the door, lets requests in flight finish within ``drain_seconds``, and ends with exit code 0.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import prometheus_client
import uvicorn

from kardia_jax.config import ConfigError, ServeConfig
from kardia_jax.judge.protocol import Judge
from kardia_jax.judge.secret import secret_of
from kardia_jax.rewards.rubric import Rubric
from kardia_jax.serve.app import Service, make_app
from kardia_jax.serve.worker import JudgeWorker


def serve(judge: Judge, rubric: Rubric, settings: ServeConfig) -> None:
    """Serves until a signal comes; says at the start where, and at the end what it did."""
    token = read_token(settings)
    prometheus_client.disable_created_metrics()  # one more line per counter, for nobody
    with bound(settings) as listener, JudgeWorker(judge) as worker, _quiet_end():
        service = Service(worker, rubric, settings)
        server = make_server(service, token)
        print(greeting(service, token, address(listener)), flush=True)
        server.run(sockets=[listener])
    print(farewell(service), flush=True)


def make_server(service: Service, token: str | None) -> uvicorn.Server:
    """uvicorn with bounds, and without a log of who asked for what."""
    config = uvicorn.Config(
        make_app(service, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(service.settings.drain_seconds)),
    )
    return uvicorn.Server(config)


def read_token(settings: ServeConfig) -> str | None:
    """The token from the environment; None on loopback where none is set.

    Raises ConfigError for an address beyond loopback without a token, and for a token that no header can carry.
    """
    name = settings.token_env
    token = secret_of(name, os.environ)
    if not token:
        wanted = f"a token in the environment variable {name} to listen on {settings.host}"
        fix = f"Set one: export {name}=$(openssl rand -hex 32); or listen on 127.0.0.1."
        if not settings.loopback:
            raise ConfigError("host", wanted, "none", fix)
        return None
    return token


@contextmanager
def bound(settings: ServeConfig) -> Iterator[socket.socket]:
    """A listening socket. Raises ConfigError for an address that is taken or is not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        fix = "Choose another --port (0: any free one) or --host."
        raise ConfigError(
            "host, port", "an address of this machine that is free", f"{where} ({error.strerror})", fix
        ) from error
    with listener:
        yield listener


def address(listener: socket.socket) -> str:
    """http://127.0.0.1:8600"""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def greeting(service: Service, token: str | None, where: str) -> str:
    """What stands on the terminal while it runs."""
    rubric = service.rubric
    door = "no token needed" if token is None else f"bearer token of {service.settings.token_env} needed"
    return (
        f"judge {service.worker.judge.name} at {where} ({door})\n"
        f"rubric {rubric.name} version {rubric.version}, fingerprint {rubric.fingerprint}: {', '.join(rubric.names)}\n"
        "POST /v1/score   GET /v1/rubric /healthz /metrics /openapi.json   Ctrl-C stops"
    )


def farewell(service: Service) -> str:
    """What it did."""
    return f"stopped: {service.verdicts} verdicts, {service.failures} failures"


@contextmanager
def _quiet_end() -> Iterator[None]:
    """uvicorn raises the signal again that ended it; here that is the wanted end and no error."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
