"""ASGI middleware around the routes: checks API key, body size, encoding and JSON depth; logs and counts requests.

Its error replies have the same format as all others.
"""

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvm.errors import InputError
from serve.metrics import GatewayMetrics
from serve.settings import Limits

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json", "/style.css", "/page.js", "/favicon.ico"})
"""Paths open without a key: the page and the OpenAPI document hold no data, and load balancers check health."""

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
    """Maximum nesting depth of a JSON text; arbitrary for other bytes."""
    depth = deepest = 0
    # Remove strings, which may contain brackets, then everything but brackets: vectors are megabytes of digits.
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

    path: the request's. On OpenAI's routes `code` is a string or null, since typed clients reject a number; on others
    it is the status. param: the invalid field.
    """
    openai = path in ("/v1/embeddings", "/v1/models") or path.startswith("/v1/models/")
    return {
        "error": {
            "message": message,
            "type": _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": param,
            "code": _CODES.get(status) if openai else status,
            "request_id": request_id,
        }
    }


_KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


class _Refused(Exception):
    """Arguments: status, reason for the metrics, message."""


class Guard:
    """ASGI middleware around the application."""

    def __init__(
        self, app: ASGIApp, limits: Limits, key_hashes: Sequence[str], metrics: GatewayMetrics
    ) -> None:
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
        # On every route, HEAD is GET without the reply's body (RFC 9110, 9.3.2).
        head = scope["method"] == "HEAD"
        inner = {**scope, "method": "GET"} if head else scope

        async def send_reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Ray Serve adds X-Request-ID, and generates one if the client sent none.
                added = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            try:
                body = await self._read(scope, headers, receive)
            except _Refused as refusal:
                code, reason, message = refusal.args
                self._metrics.refused.inc(1, {"reason": reason})
                await _reply(send_reply, code, error_body(code, message, request_id, scope["path"]))
            else:
                await self._app(inner, _replay(body, receive), send_reply)
        finally:
            took = time.perf_counter() - begun
            # The route's pattern, not the path: clients could create any number of labels.
            route = getattr(inner.get("route"), "path", "none")
            self._metrics.requests.inc(1, {"route": route, "status": str(status)})
            self._metrics.duration.observe(took, {"route": route})
            if route not in ("/health", "/metrics"):
                fields = {
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "milliseconds": round(took * 1000, 2),
                    **scope["state"].get("log", {}),
                }
                logger.info("request", extra={"log_fields": fields})

    async def _read(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises _Refused when a check fails."""
        if self._hashes and scope["path"] not in OPEN_PATHS:
            header = headers.get("authorization", "")
            if not accepts(header, self._hashes):
                got = "none" if not header else "an unknown key"
                raise _Refused(
                    401, "key", f"expected the header 'Authorization: Bearer <API key>', got {got}"
                )
        limit, max_depth = self._limits.max_body_bytes, self._limits.max_depth
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > limit:
            message = f"the body has {length} bytes, limit max_body_bytes is {limit}; send less at once"
            raise _Refused(413, "body", message)
        parts: list[bytes] = []
        size = 0
        while True:
            received = await receive()
            if received["type"] == "http.disconnect":
                raise _Refused(400, "http", "the body is incomplete; send it again")
            parts.append(received.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                message = f"the body has more than {limit} bytes, limit max_body_bytes; send less at once"
                raise _Refused(413, "body", message)
            if not received.get("more_body"):
                break
        body = b"".join(parts)
        if body.count(b"[") + body.count(b"{") > max_depth and (depth := depth_of(body)) > max_depth:
            message = f"the JSON is {depth} levels deep, limit max_depth is {max_depth}; flatten it"
            raise _Refused(400, "depth", message)
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as err:
            message = f"the body is not UTF-8 ({err.reason} at byte {err.start}); send JSON in UTF-8"
            raise _Refused(400, "utf-8", message) from err
        return body


def _replay(body: bytes, receive: Receive) -> Receive:
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
