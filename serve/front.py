"""Middleware for Ray Serve's HTTP proxies: limits what is read, and replies when a gateway is lost.

By default a proxy reads every body completely before it forwards the request. With this middleware it skips the body
of a request without a valid key or above the limits, and the gateway refuses the request by its headers. A request
whose gateway died gets 503 with `Retry-After`, since the proxy does not resend it.

Ray calls `middlewares` in each proxy if its node's environment has
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front:middlewares; LATENT_FRONT holds the settings (`FrontArgs`) as
JSON. `latent serve` sets both on one machine, deploy/base/serve on a cluster.
"""

import asyncio
import json
import os
import uuid
from collections.abc import Callable

import uvicorn.config
from pydantic import Field
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.guard import REQUEST_ID, accepts, error_body, read_keys
from serve.metrics import FrontMetrics
from serve.settings import Limits, Strict

VARIABLE = "LATENT_FRONT"
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
RETRY_AFTER_S = 3
"""`Retry-After` of a 503. A gateway restarts in five to ten seconds, but another may be available at once."""

Count = Callable[[int, str], None]
"""Called for each request that no gateway answered, with the status and the reason."""


class FrontArgs(Strict):
    """Settings of one proxy."""

    api_keys_sha256: tuple[str, ...] = ()
    api_keys_file: str | None = None
    """As in the application's settings. Without both, only the gateway checks keys, after the proxy read the body."""
    max_body_bytes: int = Field(Limits().max_body_bytes, ge=1024)
    """As in the application's limits."""
    max_requests: int = Field(1024, ge=1)
    """Maximum concurrent requests; further ones get 503."""
    max_total_bytes: int = Field(256 * 2**20, ge=1024)
    """Maximum bytes of all concurrent requests' bodies; a request that exceeds it gets 503."""


class Front:
    """ASGI middleware around a proxy."""

    def __init__(self, app: ASGIApp, args: FrontArgs, count: Count) -> None:
        self.app, self.args, self.count = app, args, count
        file = args.api_keys_file
        self.hashes = [*args.api_keys_sha256, *(read_keys(file) if file else [])]
        self.requests = self.bytes = 0
        """Requests in flight, and the bytes read of their bodies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "websocket":  # the service has none
            await send({"type": "websocket.close"})
        elif scope["type"] != "http" or scope["path"].startswith("/-/"):  # the proxy's own routes
            await self.app(scope, receive, send)
        else:
            await _Request(self, scope, receive, send).run()


class _Request:
    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        self._front, self._scope, self._receive, self._send = front, scope, receive, send
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        self._id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        scope["headers"] = [*kept, (b"x-request-id", self._id.encode())]
        self._readable = self._accepts_body(headers)
        self._full = self._gone = self._started = self._ended = False
        self._size = 0
        self._foreign: tuple[int, list[tuple[bytes, bytes]]] | None = None
        """Status and headers of an error reply from Ray, until its body arrives."""

    def _accepts_body(self, headers: dict[bytes, bytes]) -> bool:
        hashes, length = self._front.hashes, headers.get(b"content-length", b"0")
        if len(length) > 19 or int(length) > self._front.args.max_body_bytes:
            return False
        key = headers.get(b"authorization", b"").decode("latin-1")
        return not hashes or accepts(key, hashes)  # paths open without a key have no body

    async def run(self) -> None:
        """Forward the request through the proxy to a gateway, or refuse it."""
        front = self._front
        if front.requests >= front.args.max_requests:
            await self._refuse(503, "requests", "too many concurrent requests; try again later")
            return
        front.requests += 1
        try:
            await front.app(self._scope, self._read, self._write)
            if self._full:
                await self._refuse(503, "bytes", "too many bytes in concurrent requests; try again later")
            elif not self._started and not self._gone:
                await self._refuse(503, "lost", "the gateway handling the request died; send it again")
        finally:
            front.requests -= 1
            front.bytes -= self._size

    async def _read(self) -> Message:
        if not self._readable:  # the gateway refuses by the headers, or by what it received so far
            if self._ended or self._size:
                await asyncio.Event().wait()  # until the reply is sent and the proxy stops reading
            self._ended = True
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
            return message
        front, size = self._front, len(message.get("body", b""))
        self._size += size
        front.bytes += size
        if front.bytes > front.args.max_total_bytes:
            front.bytes -= self._size  # now, so that other requests are not refused too
            self._full, self._size = True, 0
            return {"type": "http.disconnect"}
        if self._size > front.args.max_body_bytes:  # by this part the gateway sees that it is too large
            self._readable = False
            return {**message, "more_body": True}
        return message

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", [])
            if message["status"] >= 400 and (b"x-content-type-options", b"nosniff") not in headers:
                self._foreign = message["status"], headers
                return
        elif self._foreign is not None:
            status, headers = self._foreign
            words = message.get("body", b"").decode("utf-8", "replace")
            after = dict(headers).get(b"retry-after")
            await self._refuse(status, "proxy", words, int(after) if after else None)
            return
        self._started = True
        await self._send(message)

    async def _refuse(self, status: int, reason: str, words: str, retry_after_s: int | None = None) -> None:
        if self._started:
            return
        self._started = True
        self._front.count(status, reason)
        body = json.dumps(error_body(status, words, self._id, self._scope["path"])).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", self._id.encode()),
        ]
        if status == 503 or retry_after_s is not None:
            headers.append((b"retry-after", str(retry_after_s or RETRY_AFTER_S).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send(
            {"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body}
        )


def middlewares() -> list[Middleware]:
    """Called by Ray Serve in each proxy before it listens. Raises ValueError on invalid settings."""
    args = FrontArgs.model_validate_json(os.environ.get(VARIABLE, "{}"))
    # uvicorn's default HTTP parser does not limit the size of headers; h11 limits it to 64 KB.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = uvicorn.config.HTTP_PROTOCOLS["h11"]
    return [Middleware(Front, args, FrontMetrics().count)]


def environment(args: FrontArgs) -> dict[str, str]:
    """The environment variables that Ray's nodes need."""
    return {CALLBACK: "serve.front:middlewares", VARIABLE: args.model_dump_json()}
