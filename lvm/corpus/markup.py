"""Convert wiki markup to prose in a child process, so that a page can time out.

The parser is C code that cannot be interrupted, and a page of unclosed tags can take it minutes.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Collection

from lvm.corpus.records import BrokenRecordError

PAGE_LIMIT_S = 20.0
"""Timeout for one page; the slowest of English Wikipedia take under two seconds."""


class Parser:
    """A child process that parses one page after another; restarted after a page that timed out or crashed it."""

    def __init__(self, limit_s: float = PAGE_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def prose(self, markup: str, namespaces: Collection[str]) -> str:
        """`lvm.corpus.wikitext.prose_of` of the markup. Raises BrokenRecordError where it fails or times out."""
        request = json.dumps([markup, sorted(namespaces)]).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            try:
                reply = self._ask(self._process, request)
            except TimeoutError:
                self.close()
                raise BrokenRecordError(
                    f"its markup takes longer than {self._limit_s:.0f} s to parse"
                ) from None
            except OSError as err:
                self.close()
                raise BrokenRecordError(f"its markup crashes the parser: {err}") from err
        if "error" in reply:
            raise BrokenRecordError(f"its markup cannot be parsed: {reply['error']}")
        return str(reply["prose"])

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", "from lvm.corpus.markup import serve_pages; serve_pages()"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def _ask(self, process: subprocess.Popen[bytes], request: bytes) -> dict[str, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request)
        process.stdin.flush()
        end = time.monotonic() + self._limit_s
        reply = bytearray()
        while not reply.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 1 << 20)
            if not part:
                raise OSError(f"exit code {process.wait()}")
            reply += part
        answer: dict[str, str] = json.loads(reply)
        return answer

    def close(self) -> None:
        """Stop the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None


def serve_pages() -> None:
    """Main loop of the child process: one line of JSON in, one out, until stdin closes."""
    from lvm.corpus.wikitext import prose_of

    for line in sys.stdin.buffer:
        markup, namespaces = json.loads(line)
        try:
            reply = {"prose": prose_of(markup, namespaces)}
        except Exception as err:  # whatever it is, this page causes it
            reply = {"error": f"{type(err).__name__}: {err}"[:300]}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


_parsers: dict[int, Parser] = {}


def prose(markup: str, namespaces: Collection[str]) -> str:
    """`Parser.prose` by the one parser of this process."""
    pid = os.getpid()
    if pid not in _parsers:  # a forked process must not read its parent's replies
        _parsers.clear()
        _parsers[pid] = Parser()
        atexit.register(_parsers[pid].close)
    return _parsers[pid].prose(markup, namespaces)
