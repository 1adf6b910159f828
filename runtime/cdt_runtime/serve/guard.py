"""Who may ask, how much, and how long: before any path sees a request."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from cdt_runtime.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("cdt_serve")

OPEN = frozenset({"/", "/docs", "/openapi.json", "/health/live", "/health/ready"})
OPEN_BELOW = ("/static/", "/docs/")
"""What needs no token: it says nothing of patients, tiles or the model."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; frame-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = POLICY.replace("script-src 'self'", "script-src 'self' 'unsafe-inline'")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all at once.

    Attributes:
        bytes: of a request's body.
        seconds: until it is answered.
        at_once: requests that are being answered.
    """

    bytes: int = 64 << 20
    seconds: float = 30.0
    at_once: int = 64


class _TooLargeError(Exception):
    """The body is over the limit."""


class Guard:
    """Wraps an application.

    Args:
        app: that answers what passes.
        token: that a request has to bear.
        limits: of requests.
        paths: known ones, for the counters.
        metrics: to count in.
    """

    def __init__(
        self, app: App, token: str, limits: Limits, paths: frozenset[str], metrics: Metrics
    ) -> None:
        self._app, self._token, self._limits = app, token.encode(), limits
        self._paths, self._metrics = paths, metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        started = time.perf_counter()
        answer = _Answer(send, scope["path"])
        self._inside += 1
        self._metrics.in_flight.inc()
        try:
            await self._answer(scope, receive, answer)
        finally:
            self._inside -= 1
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(path, str(answer.status or "none")).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        refused = self._refused(scope)
        if refused:
            await answer.refuse(*refused)
            return
        body = _Body(receive, self._limits.bytes)

        async def send(message: Message) -> None:
            if not body.too_large:  # what the application makes of half a body is no answer
                await answer.send(message)

        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, body.receive, send)
        except _TooLargeError:
            pass
        except TimeoutError:
            status = 503 if body.complete else 408
            await answer.refuse(status, f"took over {self._limits.seconds:g} s: try again later")
        except Exception:  # a bug: the client learns no more than that
            LOG.exception("%s failed", scope["path"])
            await answer.refuse(500, "the service failed: its log says why")
        if body.too_large:
            await answer.refuse(413, self._too_large())

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, where a request is refused before its body is read."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if not _is_open(scope["path"]) and not self._is_known(headers.get(b"authorization", b"")):
            return 401, "give the token: Authorization: Bearer TOKEN"
        if self._inside > self._limits.at_once:
            return 503, f"{self._limits.at_once} requests are being answered: try again"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "Content-Length is no number"
        if int(length) > self._limits.bytes:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the upload is over {self._limits.bytes >> 20} MiB: send less at a time"

    def _is_known(self, given: bytes) -> bool:
        kind, _, token = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_BELOW)


class _Body:
    """A request's body, counted as it comes."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left = receive, most
        self.too_large = self.complete = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self._left < 0:
                self.too_large = True
                raise _TooLargeError
        return message


class _Answer:
    """What is sent back; a refusal is sent only where nothing was."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._policy = DOCS_POLICY if path.startswith("/docs") else POLICY
        self._held: list[Message] = []
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = {**HEADERS, "content-security-policy": self._policy}
            kept = [pair for pair in message["headers"] if pair[0].decode() not in added]
            named = [(name.encode(), value.encode()) for name, value in added.items()]
            self._held = [{**message, "headers": [*kept, *named]}]
            return
        for held in self._held:
            await self._send(held)
        self._held = []
        await self._send(message)

    async def refuse(self, status: int, reason: str) -> None:
        if self.status is not None:
            return
        content = json.dumps({"error": reason}).encode()
        headers = [(b"content-type", b"application/json")]
        headers += [(b"content-length", str(len(content)).encode())]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [(b"retry-after", b"1")] if status == 503 else []
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})
