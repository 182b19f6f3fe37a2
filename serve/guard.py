"""ASGI middleware before the routes: API keys, body size, JSON depth, and a request id on each reply.

Requests refused here get an error reply in the same format as all others.
"""

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from lvm.errors import InputError
from serve.metrics import GatewayMetrics
from serve.settings import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json", "/style.css", "/page.js", "/favicon.ico"})
"""Paths open without a key: page and OpenAPI document hold no data, and load balancers must be able to check health."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

logger = logging.getLogger("ray.serve")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")


def hash_key(key: str) -> str:
    """SHA-256 of a key, 64 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | Path) -> list[str]:
    """Hashes of the keys in a file, one per line; empty lines and lines that begin with # are ignored."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"cannot read API keys from {path} ({err}); expected one key per line") from err
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"{path} holds no API key; expected one per line")
    return check_keys(keys, str(path))


def check_keys(keys: Iterable[str], source: str) -> list[str]:
    """Hashes of the keys. Raises InputError on a key that is too short or has invalid characters."""
    hashes = []
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"API key {number} of {source} must be 16 or more ASCII characters without a space; "
                'make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`'
            )
        hashes.append(hash_key(key))
    return hashes


def accepts(header: str, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header carries one of these keys, compared in constant time."""
    scheme, _, key = header.partition(" ")
    given = hash_key(key.strip())
    found = False
    for known in hashes:
        found |= hmac.compare_digest(given, known)
    return found and scheme.lower() == "bearer"


def depth_of(body: bytes) -> int:
    """Maximum nesting depth of a JSON text; meaningless for other bytes."""
    depth = deepest = 0
    # Remove strings, whose brackets are text, then everything but brackets: vectors are megabytes of digits.
    for byte in _STRING.sub(b"", body).translate(None, _NO_BRACKETS):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def error_body(
    status: int, message: str, request_id: str, path: str = "", param: str | None = None
) -> dict[str, Any]:
    """The body of every error reply, in OpenAI's format.

    path: of the request. On OpenAI's routes `code` is a string or null, since typed clients reject a number; on the
    others it is the status. param: the invalid field.
    """
    return {
        "error": {
            "message": message,
            "type": _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": param,
            "code": _CODES.get(status) if is_openai(path) else status,
            "request_id": request_id,
        }
    }


def is_openai(path: str) -> bool:
    """True for the routes that OpenAI's clients call."""
    return path in ("/v1/embeddings", "/v1/models") or path.startswith("/v1/models/")


_KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


class Guard:
    """ASGI middleware around the application."""

    def __init__(self, app: App, limits: Limits, key_hashes: Sequence[str], metrics: GatewayMetrics) -> None:
        self._app, self._limits, self._hashes, self._metrics = app, limits, tuple(key_hashes), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500
        # A HEAD is a GET whose answer has no body (RFC 9110, 9.3.2), on every route.
        head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if head else scope

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # X-Request-ID is added by Ray Serve, which also generates one if the client sent none.
                kept = [
                    *message.get("headers", []),
                    (b"x-content-type-options", b"nosniff"),
                    (b"cache-control", b"no-store"),
                ]
                message = {**message, "headers": kept}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            refusal, body = await self._check(scope, headers, receive)
            if refusal is not None:
                status_refused, reason, message = refusal
                self._metrics.refused.inc(1, {"reason": reason})
                await _reply(
                    send_named, status_refused, error_body(status_refused, message, request_id, scope["path"])
                )
            else:
                await self._app(inner, _again(body, receive), send_named)
        finally:
            took = time.perf_counter() - begun
            # The route's pattern, not the path: clients choose paths, which would flood the metrics.
            matched = inner.get("route")
            route = getattr(matched, "path", "none")
            self._metrics.requests.inc(1, {"route": route, "status": str(status)})
            self._metrics.duration.observe(took, {"route": route})
            if route not in ("/health", "/metrics"):
                logger.info(
                    "request",
                    extra={
                        "log_fields": {
                            "request_id": request_id,
                            "method": scope["method"],
                            "route": route,
                            "status": status,
                            "milliseconds": round(took * 1000, 2),
                            **scope["state"].get("log", {}),
                        }
                    },
                )

    async def _check(
        self, scope: Scope, headers: dict[str, str], receive: Receive
    ) -> tuple[tuple[int, str, str] | None, bytes]:
        """An error as (status, reason, message), or None; and the whole body."""
        if self._hashes and scope["path"] not in OPEN_PATHS:
            header = headers.get("authorization", "")
            if not accepts(header, self._hashes):
                got = "none" if not header else "an unknown key"
                return (401, "key", f"expected the header 'Authorization: Bearer <API key>', got {got}"), b""
        limit = self._limits.max_body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > limit:
            return (
                413,
                "body",
                f"the body has {length} bytes, limit max_body_bytes is {limit}; send less at once",
            ), b""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return (400, "http", "the body is incomplete; send it again"), b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                return (
                    413,
                    "body",
                    f"the body has more than {limit} bytes, limit max_body_bytes; send less at once",
                ), b""
            if not message.get("more_body"):
                break
        body = b"".join(parts)
        if body.count(b"[") + body.count(b"{") > self._limits.max_depth:
            found = depth_of(body)
            if found > self._limits.max_depth:
                return (
                    400,
                    "depth",
                    f"the JSON is {found} levels deep, limit max_depth is {self._limits.max_depth}; flatten it",
                ), b""
        if body:
            try:
                body.decode("utf-8")
            except UnicodeDecodeError as err:
                return (
                    400,
                    "utf-8",
                    f"the body is not UTF-8 ({err.reason} at byte {err.start}); send JSON in UTF-8",
                ), b""
        return None, body


def _again(body: bytes, receive: Receive) -> Receive:
    """A receive function that returns the body already read, then the server's further messages."""
    given = False

    async def read() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


async def _reply(send: Send, status: int, error: dict[str, Any]) -> None:
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
