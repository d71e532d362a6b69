"""Who may come in, before anything is read: a bearer token or a local name, and a bound on the body.

All are plain ASGI wrappers, so they hold for every route, present and future. Neither logs what it refuses.
"""

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/healthz", "/openapi.json"})
"""What anybody may read: probes carry no token, and the schema is in our repository."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
BODY_SECONDS = 60.0
"""A client that takes longer to send its body is let go, so that slow ones cannot hold every connection."""


class BearerToken:
    """Lets a request through that carries the token, and any request where there is none to carry."""

    def __init__(self, app: ASGIApp, token: str | None):
        self._app = app
        self._wanted = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._wanted is None or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
        else:
            why = "no valid token" if given else "no token"
            fix = "Send 'Authorization: Bearer TOKEN' with the token that the server was started with."
            await refuse(send, 401, "unauthorized", f"{why}. {fix}", {"www-authenticate": "Bearer"})


class LocalNames:
    """For a server without a token: answers only to names of this machine.

    A page in somebody's browser may point a name of its own at 127.0.0.1; it would come with that name in the Host
    header.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = re.sub(r":\d*$", "", host).lower()
            if name not in LOCAL_NAMES:
                fix = f"Ask for {' or '.join(LOCAL_NAMES)}, or start the server with a token."
                await refuse(send, 421, "wrong_host", f"host: this server has no token and answers locally. {fix}")
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body of more than so many bytes, by its header or while it comes in."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._limit:
            await self._refuse(send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive, self._limit)
        except TimeoutError:
            await refuse(send, 408, "too_slow", f"body: wanted all of it within {BODY_SECONDS:g} s.")
            return
        if body is None:  # gone before it was complete
            return
        if len(body) > self._limit:
            await self._refuse(send)
            return
        await self._app(scope, _then(receive, {"type": "http.request", "body": body, "more_body": False}), send)

    async def _refuse(self, send: Send) -> None:
        fix = "Send fewer completions at once, or start the server with a larger --max-body-mb."
        await refuse(send, 413, "too_large", f"body: wanted at most {self._limit / 1e6:g} MB. {fix}")


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or its beginning as soon as it is longer than ``limit``; None where the client went away."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _then(receive: Receive, first: Message) -> Callable[[], Awaitable[Message]]:
    """Receives ``first``, then whatever comes: the disconnect, at the end."""
    waiting = [first]

    async def given() -> Message:
        return waiting.pop() if waiting else await receive()

    return given


async def refuse(send: Send, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
    """An error as every route gives it: {"error": {"code": ..., "message": ...}}."""
    body = json.dumps({"error": {"code": code, "message": message}}).encode()
    named = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
