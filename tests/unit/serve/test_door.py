"""The way in of one machine, with real sockets: bytes of clients in, an ASGI application behind."""

import asyncio
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.door import Door, Listener
from serve.settings import Limits

LIMIT = 200_000


class Application:
    """Answers with what it was asked; `/slow` after a second, `/stream` bit by bit, `/pieces` in quick succession."""

    def __init__(self, name: str) -> None:
        self.name, self.asked, self.cancelled = name, 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["request_id"] = f"id-of-{self.name}"
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.asked += 1
        try:
            if scope["path"] == "/slow":
                await asyncio.sleep(1)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        said = {"by": self.name, "method": scope["method"], "path": scope["path"], "bytes": len(body)}
        said["headers"] = {k.decode(): v.decode() for k, v in scope["headers"]}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-is", b"test")]})
        for part in [b"a", b"b"] if scope["path"] in ("/stream", "/pieces") else []:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0.2 if scope["path"] == "/stream" else 0.002)
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


class Gateway:
    """An application behind a Listener, in a thread as a replica's process would be."""

    def __init__(self, folder: Path, name: str) -> None:
        self.app = Application(name)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(folder),), daemon=True
        )
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self, folder: Path) -> None:
        async with Listener(self.app, str(folder)).serving(drain_s=5):
            self._ready.set()
            await self._stop.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")  # short: a Unix socket's path has at most 107 bytes


@pytest.fixture
def gateway(folder: Path) -> Iterator[Gateway]:
    made = Gateway(folder, "first")
    yield made
    made.stop()


@pytest.fixture
def counted() -> list[tuple[int, str]]:
    """Refusals the door told of."""
    return []


@pytest.fixture
def door(folder: Path, counted: list[tuple[int, str]]) -> Iterator[Door]:
    made = Door(str(folder), "127.0.0.1", 0, Limits(max_body_bytes=LIMIT))
    made.open(lambda *refusal: counted.append(refusal))
    yield made
    made.close()


def ask(door: Door, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", door.port, timeout=20)) as connection:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


def raw(door: Door, sent: bytes, until: Callable[[bytes], bool] = lambda _: False) -> bytes:
    """All that comes back for these bytes, till the end of the connection or `until` holds."""
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as s:
        s.sendall(sent)
        got = b""
        while not until(got) and (part := s.recv(2**16)):
            got += part
        return got


def test_a_request_arrives_whole_and_its_answer_comes_back(gateway: Gateway, door: Door) -> None:
    status, headers, body = ask(door, "POST", "/v1/x?a=1", b"x" * 150_000, Authorization="Bearer k")
    said = json.loads(body)
    assert (status, said["method"], said["path"], said["bytes"]) == (200, "POST", "/v1/x", 150_000)
    assert said["headers"]["authorization"] == "Bearer k"
    assert headers["x-is"] == "test"
    assert headers["x-request-id"] == "id-of-first"


def test_a_body_in_pieces_and_requests_on_one_connection(gateway: Gateway, door: Door) -> None:
    chunked = (
        b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    plain = b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /c HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    got = raw(door, chunked + plain + last)
    bodies = [json.loads(said) for said in re.findall(rb'{"by".*?}}', got)]
    assert [body["path"] for body in bodies] == ["/a", "/b", "/c"], got
    assert bodies[0]["bytes"] == 5


def test_leave_to_send_is_given(gateway: Gateway, door: Door) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert raw(door, head, lambda got: b"\r\n\r\n" in got) == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_a_stream_is_passed_on_as_it_comes(gateway: Gateway, door: Door) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", door.port, timeout=20)) as connection:
        connection.request("GET", "/stream")
        begun = time.perf_counter()
        reply = connection.getresponse()
        assert reply.read(1) == b"a"
        assert time.perf_counter() - begun < 0.15
        assert reply.read().startswith(b"b")
        assert time.perf_counter() - begun > 0.3


def test_no_piece_of_an_answer_waits_for_the_one_before_to_be_acknowledged(
    gateway: Gateway, door: Door
) -> None:
    taken = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", door.port, timeout=5)) as connection:
        for _ in range(12):
            begun = time.perf_counter()
            connection.request("GET", "/pieces")
            connection.getresponse().read()
            taken.append(time.perf_counter() - begun)
    assert min(taken[2:]) < 0.03  # a client acknowledges after 40 ms


def test_after_an_answer_without_a_body_the_connection_goes_on(gateway: Gateway, door: Door) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", door.port, timeout=5)) as connection:
        connection.request("HEAD", "/a")
        assert connection.getresponse().read() == b""
        connection.request("GET", "/b")
        assert json.loads(connection.getresponse().read())["path"] == "/b"


@pytest.mark.parametrize(
    ("sent", "status", "reason", "message"),
    [
        (b"nonsense\r\n\r\n", 400, "http", "no HTTP/1.1"),
        (
            b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000,
            431,
            "headers",
            "limit max_header_bytes is 65536",
        ),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 300000\r\n\r\n",  # refused before a byte of it came
            413,
            "body",
            "limit max_body_bytes is 200000",
        ),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + b"a" * 300_000,
            413,
            "body",
            "limit max_body_bytes is 200000",
        ),
        (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n493e0\r\n" + b"a" * 300_000,
            413,
            "body",
            "limit max_body_bytes is 200000",
        ),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "http",
            "no HTTP/1.1",
        ),  # two lengths: the way requests are smuggled
    ],
)
def test_what_is_refused_at_the_door(
    gateway: Gateway,
    door: Door,
    counted: list[tuple[int, str]],
    sent: bytes,
    status: int,
    reason: str,
    message: str,
) -> None:
    got = raw(door, sent)
    assert got.startswith(b"HTTP/1.1 %d " % status), got[:200]
    assert message in json.loads(got.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert gateway.app.asked == 0
    assert counted == [(status, reason)]


def test_a_client_that_still_sends_when_it_is_refused_reads_why(gateway: Gateway, door: Door) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=5) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 900000\r\n\r\n")
        for _ in range(9):  # the refusal is there after the first
            time.sleep(0.05)
            client.sendall(b"a" * 100_000)
        assert b"limit max_body_bytes is 200000" in client.recv(2**16)


def test_work_of_a_client_that_has_gone_is_dropped(gateway: Gateway, door: Door) -> None:
    with socket.create_connection(("127.0.0.1", door.port)) as s:
        s.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
    time.sleep(0.3)
    assert (gateway.app.asked, gateway.app.cancelled) == (1, 1)


def test_a_request_a_dying_gateway_held_goes_to_the_next(folder: Path, door: Door) -> None:
    """A listener that takes the request and dies without a word, and a new one that comes later."""
    dying = socket.socket(socket.AF_UNIX)
    dying.bind(str(folder / "1-1.sock"))
    dying.listen()
    answers: list[Any] = []
    client = threading.Thread(target=lambda: answers.append(ask(door, "POST", "/v1/x", b"body")), daemon=True)
    client.start()
    taken, _ = dying.accept()
    assert b"body" in taken.recv(1000)
    taken.close()
    dying.close()
    time.sleep(0.3)
    assert not answers
    second = Gateway(folder, "second")
    client.join(10)
    second.stop()
    ((status, _, body),) = answers
    assert (status, json.loads(body)["by"]) == (200, "second")
    assert not (folder / "1-1.sock").exists()  # nobody tries it again


def test_of_two_idle_gateways_the_newest_is_asked_and_of_two_the_less_busy(folder: Path, door: Door) -> None:
    first, second = Gateway(folder, "first"), Gateway(folder, "second")
    assert [json.loads(ask(door, "GET", "/a")[2])["by"] for _ in range(3)] == ["second"] * 3
    client = threading.Thread(target=lambda: ask(door, "GET", "/slow"))
    client.start()
    time.sleep(0.3)
    assert json.loads(ask(door, "GET", "/a")[2])["by"] == "first"
    client.join(10)
    for gateway in (first, second):
        gateway.stop()


def test_a_gateway_that_stops_ends_its_requests_and_the_next_takes_over(folder: Path, door: Door) -> None:
    first = Gateway(folder, "first")
    answers: list[Any] = []
    client = threading.Thread(target=lambda: answers.append(ask(door, "GET", "/slow")))
    client.start()
    time.sleep(0.3)
    second = Gateway(folder, "second")
    first.stop()
    assert json.loads(ask(door, "GET", "/a")[2])["by"] == "second"
    client.join(10)
    second.stop()
    assert json.loads(answers[0][2])["by"] == "first"
    assert first.app.cancelled == 0


def test_without_a_gateway_there_is_an_answer_in_the_end(
    folder: Path, door: Door, counted: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.door.RETRY_S", 0.3)
    status, headers, body = ask(door, "GET", "/a")
    assert status == 503
    assert headers["retry-after"] == "5"
    assert "no gateway answers" in json.loads(body)["error"]["message"]
    assert counted == [(503, "no gateway")]
