"""What a proxy lets in and what it says where no gateway answers: over real HTTP, before a real guard."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request

from serve.front import CALLBACK, VARIABLE, Front, FrontArgs, environment, middlewares
from serve.guard import Guard, hash_key
from serve.metrics import GatewayMetrics
from serve.settings import Limits

KEY = "a-key-of-sixteen-or-more"
LIMIT = 200_000


class Proxy:
    """Reads each request whole as it comes, as Ray Serve's proxy does, and hands it to the guard of a gateway."""

    def __init__(self) -> None:
        app = FastAPI()

        async def say(request: Request) -> dict[str, Any]:
            body = await request.body()
            while request.url.path == "/slow" and not self.released.is_set():
                await asyncio.sleep(0.01)
            return {"bytes": len(body), "id": request.headers["x-request-id"]}

        app.add_api_route("/{path}", say, methods=["GET", "POST"])
        self._guarded = Guard(app, Limits(max_body_bytes=LIMIT), [hash_key(KEY)], GatewayMetrics())
        self.bytes = 0
        """Read of all bodies."""
        self.under_way = 0
        self.released = threading.Event()
        """Set, `/slow` answers."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/lost":
            await receive()
            return  # what Ray's proxy does where the replica died
        if scope["path"] == "/full":
            headers = [(b"content-type", b"text/plain"), (b"retry-after", b"7")]
            await send({"type": "http.response.start", "status": 429, "headers": headers})
            await send({"type": "http.response.body", "body": b"the queue is full"})
            return
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            while True:
                message = await receive()
                self.bytes += len(message.get("body", b""))
                queue.put_nowait(message)
                if message["type"] == "http.disconnect":
                    work.cancel()
                    return

        self.under_way += 1

        async def ask_gateway() -> None:
            await asyncio.sleep(0.05)  # the way to a replica; the proxy reads meanwhile
            await self._guarded(scope, queue.get, send)

        work = asyncio.ensure_future(ask_gateway())
        reading = asyncio.ensure_future(read())
        try:
            await asyncio.wait([work])
        finally:
            self.under_way -= 1
            reading.cancel()


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def counted() -> list[tuple[int, str]]:
    return []


@pytest.fixture
def front(proxy: Proxy, counted: list[tuple[int, str]]) -> Front:
    args = FrontArgs(
        api_keys_sha256=(hash_key(KEY),), max_body_bytes=LIMIT, max_requests=4, max_total_bytes=2 * LIMIT
    )
    return Front(proxy, args, lambda *refusal: counted.append(refusal))


@pytest.fixture
def port(front: Front) -> Iterator[int]:
    """A server with the HTTP reader that `middlewares` chooses."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(front, http="h11", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield int(listening.getsockname()[1])
    server.should_exit = True
    thread.join(10)


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        given = {"Authorization": f"Bearer {KEY}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, body, given)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


def settle(front: Front) -> None:
    """Waits until nothing is under way: a client has its answer a moment before."""
    until = time.monotonic() + 10
    while front.requests and time.monotonic() < until:
        time.sleep(0.01)
    assert (front.requests, front.bytes) == (0, 0)


def message(body: bytes) -> str:
    return str(json.loads(body)["error"]["message"])


def test_a_request_with_a_key_arrives_whole(port: int, counted: list[tuple[int, str]]) -> None:
    status, _, body = ask(port, "POST", "/any", b"x" * 150_000, X_Request_ID="an-id")
    assert (status, json.loads(body)) == (200, {"bytes": 150_000, "id": "an-id"})
    status, _, body = ask(port, "POST", "/any", iter([b"abc", b"de"]))  # in pieces, without a length
    assert (status, json.loads(body)["bytes"]) == (200, 5)
    assert len(json.loads(ask(port, "GET", "/any", X_Request_ID="no good id")[2])["id"]) == 32
    assert counted == []


def test_of_a_body_without_a_key_nothing_is_read(port: int, proxy: Proxy, front: Front) -> None:
    for header in ("Bearer wrong", "", f"Basic {KEY}"):
        status, _, body = ask(port, "POST", "/any", b"x" * 150_000, Authorization=header)
        assert (status, "Authorization: Bearer" in message(body)) == (401, True)
    assert ask(port, "GET", "/health", Authorization="")[0] == 200  # open to all
    assert proxy.bytes == 0
    settle(front)


def test_a_body_that_is_too_large_is_refused_by_its_length_or_as_soon_as_it_shows(
    port: int, proxy: Proxy
) -> None:
    status, _, body = ask(port, "POST", "/any", b"x" * 300_000)
    assert (status, proxy.bytes) == (413, 0)
    assert f"limit max_body_bytes is {LIMIT}" in message(body)
    with contextlib.suppress(OSError):  # the client may still be sending
        status, _, body = ask(port, "POST", "/any", (b"x" * 50_000 for _ in range(100)))
        assert status == 413
    assert LIMIT < proxy.bytes <= LIMIT + 2**18


def test_bodies_of_all_requests_together_are_bounded(
    port: int, proxy: Proxy, front: Front, counted: list[tuple[int, str]]
) -> None:
    replies: list[Any] = []
    threads = [
        threading.Thread(target=lambda: replies.append(ask(port, "POST", "/slow", b"x" * 150_000)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    while not replies and time.monotonic() < until:
        time.sleep(0.01)
    proxy.released.set()
    for thread in threads:
        thread.join(20)
    assert sorted(status for status, _, _ in replies) == [200, 200, 503]
    ((_, headers, body),) = [r for r in replies if r[0] == 503]
    assert ("too many bytes" in message(body), headers["retry-after"]) == (True, "3")
    assert counted == [(503, "bytes")]
    settle(front)


def test_requests_at_once_are_bounded(
    port: int, proxy: Proxy, front: Front, counted: list[tuple[int, str]]
) -> None:
    threads = [threading.Thread(target=ask, args=(port, "GET", "/slow")) for _ in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while proxy.under_way < 4 and time.monotonic() < until:
        time.sleep(0.01)
    status, headers, body = ask(port, "GET", "/any")
    assert (status, headers["retry-after"]) == (503, "3")
    assert "too many concurrent requests" in message(body)
    proxy.released.set()
    for thread in threads:
        thread.join(10)
    settle(front)
    assert ask(port, "GET", "/any")[0] == 200
    assert counted == [(503, "requests")]


def test_a_request_whose_gateway_died_is_told_when_to_come_back(
    port: int, counted: list[tuple[int, str]]
) -> None:
    status, headers, body = ask(port, "POST", "/lost", b"x", X_Request_ID="an-id")
    assert (status, headers["retry-after"], headers["x-request-id"]) == (503, "3", "an-id")
    error = json.loads(body)["error"]
    assert (error["request_id"], error["code"]) == ("an-id", 503)
    assert "send it again" in error["message"]
    assert counted == [(503, "lost")]


def test_a_refusal_of_the_proxy_itself_has_the_form_of_every_other(
    port: int, counted: list[tuple[int, str]]
) -> None:
    status, headers, body = ask(port, "GET", "/full")
    assert (status, headers["retry-after"], message(body)) == (429, "7", "the queue is full")
    assert headers["content-type"] == "application/json"
    assert ask(port, "HEAD", "/full")[2] == b""
    assert ask(port, "GET", "/no/route")[0] == 404  # by the gateway, which counts its own
    assert counted == [(429, "proxy")] * 2


def test_a_client_that_has_gone_is_no_lost_request(
    port: int, proxy: Proxy, front: Front, counted: list[tuple[int, str]]
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET /slow HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        until = time.monotonic() + 10
        while not front.requests and time.monotonic() < until:
            time.sleep(0.01)
        assert front.requests == 1
    settle(front)
    assert counted == []


def test_headers_have_an_end(port: int, proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /any HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        two_lengths = b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        client.sendall(b"POST /any HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n" + two_lengths)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")


def test_ray_builds_it_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.utils import call_function_from_import_path

    args = FrontArgs(api_keys_sha256=(hash_key(KEY),), max_requests=7)
    for name, value in environment(args).items():
        monkeypatch.setenv(name, value)
    auto = dict(uvicorn.config.HTTP_PROTOCOLS)
    try:
        (made,) = call_function_from_import_path(os.environ[CALLBACK])
        chosen = uvicorn.config.HTTP_PROTOCOLS["auto"]
    finally:
        uvicorn.config.HTTP_PROTOCOLS.update(auto)
    assert chosen == uvicorn.config.HTTP_PROTOCOLS["h11"]
    assert (made.cls, made.args[0]) == (Front, args)
    monkeypatch.setenv(VARIABLE, '{"max_request": 7}')
    with pytest.raises(ValueError, match="max_request"):
        middlewares()
