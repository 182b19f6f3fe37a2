"""The way in on one machine: clients talk to the launcher, which hands each request to a gateway over a Unix socket.

Ray Serve's own proxy in Python costs 6 to 8 ms a request on two cores and loses the requests that a dying gateway held.
Here a request is read whole (it is bounded), sent to a gateway, and sent again to the next one where the first died
before its answer began: every operation of the service is a function of its input. On a cluster, Ray Serve's proxies
stand here.
"""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
import uvicorn

from serve.guard import App, Message, Receive, Scope, Send, error_body
from serve.settings import Limits

IDLE_S = 75.0
"""Seconds a client may be silent between requests, or within one."""
RETRY_S = 30.0
"""Seconds a request is held while no gateway is there; a new one takes five to ten."""
HOP_HEADERS = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"expect", b"upgrade"}
)
"""Of one connection, not of the request (RFC 9110, 7.6.1)."""

Count = Callable[[int, str], None]
"""Told of each request that no gateway saw: the status of its answer, and why."""


class Listener:
    """A gateway's end: its ASGI application on a socket in `folder`, while the block of `serving` lasts."""

    def __init__(self, app: App, folder: str) -> None:
        self._app = app
        # By age: whoever lists the folder sees the newest gateway last.
        self._path = Path(folder) / f"{time.time_ns()}-{os.getpid()}.sock"
        self._pending = 0

    @contextlib.asynccontextmanager
    async def serving(self, drain_s: float) -> Any:
        """Listens; at the end takes no more requests and gives those under way `drain_s` seconds."""
        listening = socket.socket(socket.AF_UNIX)
        unready = self._path.with_suffix(".tmp")
        listening.bind(str(unready))
        listening.listen(1024)
        unready.rename(self._path)  # whoever finds it may connect
        config = uvicorn.Config(
            self, lifespan="off", log_config=None, access_log=False, ws="none", timeout_keep_alive=3600
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listening]))
        try:
            yield
        finally:
            self._path.unlink(missing_ok=True)
            until = time.monotonic() + drain_s
            while self._pending and time.monotonic() < until:
                await asyncio.sleep(0.05)
            server.should_exit = server.force_exit = True
            await asyncio.wait([task], timeout=2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: the id goes into the reply's headers, and the work ends when the client has gone."""
        whole = asyncio.Event()

        async def reading() -> Message:
            message = await receive()
            if not message.get("more_body"):
                whole.set()
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = (b"x-request-id", str(scope["state"].get("request_id", "")).encode())
                message = {**message, "headers": [*message.get("headers", []), named]}
            await send(message)

        async def watch() -> None:
            await whole.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        self._pending += 1
        work = asyncio.ensure_future(self._app(scope, reading, sending))
        gone = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._pending -= 1
            gone.cancel()
            if not work.done():
                work.cancel()


@dataclass(frozen=True)
class _Refusal:
    """What the door itself answers."""

    status: int
    reason: str
    """One word, for the metrics."""
    message: str


class _Requests:
    """A connection's bytes to whole requests."""

    def __init__(self, limits: Limits) -> None:
        self.ready: deque[_Request] = deque()
        self.expects = False
        """True where a client waits for leave to send its body."""
        self.refusal = _Refusal(400, "http", "the request is no HTTP/1.1 this service can read")
        """What to answer where `feed` raised."""
        self._limits = limits
        self._open: _Request | None = None
        self._header_bytes = 0
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        """Raises httptools.HttpParserError on what is no HTTP."""
        if self._open is None or not self._open.head_done:
            self._header_bytes += len(data)
        self._parser.feed_data(data)
        if self._open is not None and not self._open.head_done:
            most = self._limits.max_header_bytes
            if self._header_bytes > most:
                message = (
                    f"the headers are too large, limit max_header_bytes is {most}; send fewer or shorter ones"
                )
                self.refusal = _Refusal(431, "headers", message)
                raise httptools.HttpParserError

    def on_message_begin(self) -> None:
        self._open = _Request()

    def on_url(self, url: bytes) -> None:
        assert self._open is not None
        self._open.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._open is not None
        if name.lower() == b"expect":
            self.expects = True
        if name.lower() == b"content-length" and value.isdigit() and len(value) < 20:
            self._open.announced = int(value)
        if name.lower() not in HOP_HEADERS:
            self._open.headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._open is not None
        self._open.head_done, self._header_bytes = True, 0
        self._open.method = self._parser.get_method()
        self._require_small(self._open.announced)  # before a byte of the body is read

    def on_body(self, body: bytes) -> None:
        assert self._open is not None
        self._open.body.append(body)
        self._open.size += len(body)
        self._require_small(self._open.size)

    def on_message_complete(self) -> None:
        assert self._open is not None
        self._open.keep_alive = self._parser.should_keep_alive()
        self.ready.append(self._open)
        self._open, self.expects = None, False

    def _require_small(self, size: int) -> None:
        most = self._limits.max_body_bytes
        if size > most:
            message = f"the body is too large, limit max_body_bytes is {most}; send less at once"
            self.refusal = _Refusal(413, "body", message)
            raise ValueError


class _Request:
    def __init__(self) -> None:
        self.method, self.url, self.size = b"", b"", 0
        self.announced = 0
        """Bytes of the body by its Content-Length."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []
        self.head_done = self.keep_alive = False

    def to_bytes(self) -> bytes:
        head = [self.method + b" " + self.url + b" HTTP/1.1"]
        head += [name + b": " + value for name, value in self.headers]
        head.append(b"Content-Length: %d" % self.size)
        return b"\r\n".join([*head, b"", b""]) + b"".join(self.body)


class _Reply:
    """Sees where an answer ends."""

    def __init__(self, method: bytes) -> None:
        self.ended, self._head_only = False, method == b"HEAD"
        self.parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self.ended = self.ended or self._head_only

    def on_message_complete(self) -> None:
        self.ended = True


class _LostError(Exception):
    """The gateway went away; `begun` says whether some of its answer was passed on."""

    def __init__(self, begun: bool) -> None:
        self.begun = begun


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Door:
    """The launcher's end: listens on host and port in a thread of its own."""

    def __init__(self, folder: str, host: str, port: int, limits: Limits) -> None:
        """folder: where gateways put their sockets; only this user may enter it. Binds at once: OSError where the
        address is taken."""
        self._folder, self._limits = Path(folder), limits
        self._count: Count = lambda status, reason: None
        self._socket = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
        self.port = int(self._socket.getsockname()[1])
        self._idle: dict[str, list[_Streams]] = {}
        self._under_way: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    def open(self, count: Count) -> None:
        """Let clients in. count: called in the door's thread."""
        self._count = count
        self._thread.start()

    def close(self) -> None:
        """Take no more clients; those inside lose their connection."""
        self._socket.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._client, sock=self._socket))
        self._loop.run_forever()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; its requests one after another."""
        # asyncio sets it only where the socket was made with its protocol's number; without, each answer waits 40 ms.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        requests = _Requests(self._limits)
        ahead = asyncio.ensure_future(reader.read(2**16))
        try:
            while True:
                while not requests.ready:
                    async with asyncio.timeout(IDLE_S):
                        data = await ahead
                    if not data:
                        return
                    requests.feed(data)
                    if requests.expects:
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                        requests.expects = False
                    ahead = asyncio.ensure_future(reader.read(2**16))
                request = requests.ready.popleft()
                answer = asyncio.ensure_future(self._answer(request, writer))
                try:
                    await asyncio.wait({answer, ahead}, return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done() and ahead.result() == b"":
                        return  # the client has gone, and with it whoever waits for the work
                    await answer
                finally:
                    answer.cancel()
                if not request.keep_alive:
                    return
        except (httptools.HttpParserError, ValueError):
            writer.write(self._refuse(requests.refusal))
            await self._linger(reader, writer, ahead)
        except (TimeoutError, OSError, _LostError):
            pass  # silent too long, gone, or its answer broke off: closing says so
        finally:
            ahead.cancel()
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()

    @staticmethod
    async def _linger(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ahead: "asyncio.Future[bytes]"
    ) -> None:
        """Read on for a moment: closing on a client that still sends would take the answer from it."""
        with contextlib.suppress(TimeoutError, OSError):
            writer.write_eof()
            async with asyncio.timeout(2):
                if ahead.done() or await ahead:
                    while await reader.read(2**16):
                        pass

    async def _answer(self, request: _Request, client: asyncio.StreamWriter) -> None:
        """Pass a request on and its answer back; to another gateway where one died before answering."""
        raw = request.to_bytes()
        until = time.monotonic() + RETRY_S
        while True:
            for path in self._gateways():
                try:
                    await self._exchange(path, raw, request.method, client)
                    return
                except _LostError as err:
                    if err.begun:
                        raise
            if time.monotonic() > until:
                refusal = _Refusal(503, "no gateway", "no gateway answers; try again in a few seconds")
                client.write(self._refuse(refusal, "Retry-After: 5\r\n"))
                request.keep_alive = False
                return
            await asyncio.sleep(0.1)

    def _refuse(self, refusal: _Refusal, header: str = "") -> bytes:
        """The answer of the door itself, counted."""
        self._count(refusal.status, refusal.reason)
        body = json.dumps(error_body(refusal.status, refusal.message, uuid.uuid4().hex)).encode()
        head = [f"HTTP/1.1 {refusal.status} {_WORDS[refusal.status]}", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "Connection: close"]
        return ("\r\n".join(head) + f"\r\n{header}\r\n").encode() + body

    def _gateways(self) -> list[str]:
        """Sockets, the least busy first and of equals the newest."""
        names = [name for name in os.listdir(self._folder) if name.endswith(".sock")]
        found = [f"{self._folder}/{name}" for name in sorted(names, reverse=True)]
        return sorted(found, key=lambda path: self._under_way.get(path, 0))

    async def _exchange(self, path: str, raw: bytes, method: bytes, client: asyncio.StreamWriter) -> None:
        """One request over one connection to a gateway. Raises _LostError where the gateway is gone."""
        idle = self._idle.setdefault(path, [])
        while True:
            pooled = bool(idle)
            try:
                reader, writer = idle.pop() if pooled else await asyncio.open_unix_connection(path)
            except OSError as err:
                if isinstance(err, ConnectionRefusedError):
                    Path(path).unlink(missing_ok=True)  # nobody listens there any more
                self._idle.pop(path, None)
                raise _LostError(False) from err
            self._under_way[path] = self._under_way.get(path, 0) + 1
            reply, begun, whole = _Reply(method), False, False
            try:
                writer.write(raw)
                while not reply.ended:
                    data = await reader.read(2**16)
                    if not data:
                        raise ConnectionResetError
                    begun = True
                    reply.parser.feed_data(data)
                    client.write(data)
                    await client.drain()
                whole = reply.parser.should_keep_alive()
                return
            except OSError as err:
                if begun or client.is_closing():
                    raise _LostError(True) from err
                if not pooled:
                    raise _LostError(False) from err
                # An idle connection may have been closed meanwhile; a new one tells whether the gateway lives.
            finally:
                self._under_way[path] -= 1
                if whole:
                    idle.append((reader, writer))
                else:
                    writer.close()


_WORDS = {
    400: "Bad Request",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
