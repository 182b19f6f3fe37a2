"""A run folder of real parts in seconds, and the service on it as a child process, over real HTTP."""

import contextlib
import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvm.codec.zoo import Codec, load_codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.models import CONFIGS, MODELS
from lvm.predict.record import save_record, set_alias
from lvm.vectors.array import open_vectors
from lvm.vectors.index import build_index
from tests.doubles import write_chunks, write_vectors

CHECKOUT = Path(__file__).resolve().parents[2]
START_S = 240
"""A loaded machine of two cores takes most of a minute to start Ray, Serve and five processes with torch."""


@functools.cache
def shipped_codec() -> Codec:
    """`mini`, loaded once for all tests of a run: choosing a precision tries each, which takes seconds."""
    return load_codec("mini")


def make_run(
    folder: Path,
    num_articles: int = 24,
    models: tuple[str, ...] = ("lstm", "amn"),
    codec: Codec | None = None,
    first: int = 0,
) -> Path:
    """What `latent run` leaves, of the bundled sample, in this process: the shipped codec (or another), a real index,
    and models of the default sizes that were never trained, since no test here asks how well they predict.

    first: number of the sample's article that it begins with."""
    import torch

    codec = codec or shipped_codec()
    articles = list(read_articles(CHECKOUT / "data" / "sample"))[first : first + num_articles]
    texts = [[c.text for c in chunks] for chunks in Chunker(codec.tokenizer).chunk(articles)]
    write_chunks(folder / "chunks", texts, tokenizer=codec.tokenizer)  # type: ignore[arg-type]
    write_vectors(folder / "vectors", texts, codec=codec)  # type: ignore[arg-type]
    build_index(open_vectors(folder / "vectors"), folder / "index")
    for name in models:
        torch.manual_seed(7 + first)  # runs made within the same second differ in the names of their records
        add_model(folder, name)
    return folder


def add_model(folder: Path, name: str) -> Path:
    """A new record of an untrained model, and its alias."""
    model = MODELS[name](CONFIGS[name]())
    identity = open_vectors(folder / "vectors").identity
    record = save_record(folder / "models", name, model, identity, {}, {"val_cosine": 0.0}, {"Data": "none"})
    set_alias(folder / "models", name, record)
    return record


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


@dataclass
class Service:
    """A running service; every call opens a connection of its own, so it may be used by threads."""

    port: int
    process: subprocess.Popen[str] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    launcher: int = 0
    """Process that runs the application; `process` is the command line, which started it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float = 60, **headers: str
    ) -> Reply:
        begun = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            given = {"Content-Type": "application/json", **self.headers}
            given |= {k.replace("_", "-"): v for k, v in headers.items()}
            connection.request(method, path, body, given)
            reply = connection.getresponse()
            content = reply.read()
            taken = time.perf_counter() - begun
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, content, taken)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, timeout_s: float = 60, **headers: str) -> Reply:
        return self.ask("POST", path, json.dumps(body).encode(), timeout_s, **headers)

    def replica_pids(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas, found among the descendants of the service."""
        assert self.process is not None
        name = f"ServeReplica:latent:{deployment}"
        return [pid for pid in descendants(self.process.pid) if name in command_of(pid)]


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            pid, rest = entry.read_text().split(" ", 1)
            parents.setdefault(int(rest.rpartition(")")[2].split()[1]), []).append(int(pid))
    found, open_ = [], [root]
    while open_:
        children = parents.get(open_.pop(), [])
        found += children
        open_ += children
    return found


@contextlib.contextmanager
def running(
    run: Path | None, *options: str, environment: dict[str, str] | None = None, key: str | None = None
) -> Iterator[Service]:
    """`latent serve` on a free port until the end of the block, with this run or with what ships.

    Its stderr is shown when it does not start.
    """
    port = free_port()
    given = [] if run is None else ["--run", str(run)]
    command = [sys.executable, "-m", "lvm.cli", "serve", *given, "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        service = Service(port, process, headers)
        try:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            limit = time.monotonic() + START_S
            line = ""
            while '"url"' not in line:
                if process.poll() is not None or time.monotonic() > limit:
                    errors.seek(0)
                    raise RuntimeError(f"the service did not start: {errors.read()[-3000:]}")
                line = process.stdout.readline() or ""
                time.sleep(0.1)
            service.launcher = int(json.loads(line)["pid"])
            yield service
        finally:
            left = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            for pid in left:  # Ray ends its own processes; one whose parent was killed by a test may stay
                with contextlib.suppress(OSError):
                    if "ray" in command_of(pid):
                        os.kill(pid, signal.SIGKILL)


def vectors_of(service: Service, texts: list[str]) -> np.ndarray:
    """(N, 768) as the service encodes them."""
    reply = service.post("/v1/encode", {"texts": texts})
    assert reply.status == 200, reply.body
    return np.array(reply.json["vectors"], np.float32)
