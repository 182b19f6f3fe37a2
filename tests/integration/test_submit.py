"""`latent submit` against a real Ray head with token authentication: log, exit codes, stop, and going on."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.vectors.shards import Manifest, read_table
from tests.doubles import write_chunks
from tests.integration.conftest import CHECKOUT

COPIES = 2
"""How often the sample is encoded: long enough that a stop finds work left."""


@dataclass(frozen=True)
class Head:
    """A running head and its token."""

    url: str
    token: str

    def environment(self, **changes: str) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, **changes}

    def submit(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=CHECKOUT,
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "lvm.cli", "submit", "--address", self.url, *arguments]


def free_ports(count: int) -> list[int]:
    """Ports below those Ray gives its workers (10002 to 19999)."""
    ports = []
    for port in range(9100 + os.getpid() % 300, 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free port below 10000")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with a token of its own, in a process group that ends with the tests."""
    folder = tmp_path_factory.mktemp("head")
    dashboard, client = free_ports(2)
    made = Head(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32))
    ray = Path(sys.executable).with_name("ray")
    environment = made.environment(PATH=f"{ray.parent}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1")
    options = {
        "port": "0",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": str(dashboard),
        "ray-client-server-port": str(client),
        "dashboard-agent-listen-port": "0",
        "num-cpus": "2",
        "object-store-memory": "200000000",
        # Short: Ray's sockets lie in it, and a socket's path has at most 107 bytes.
        "temp-dir": tempfile.mkdtemp(prefix="latent-", dir="/tmp"),
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                ray,
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
                *(f"--{k}={v}" for k, v in options.items()),
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while made.submit("--cancel", "nothing").stderr.find("has no job") < 0:
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(1)
    yield made
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()  # the head ends its own processes; what is left after a moment is ended here
    for survivor in psutil.wait_procs(everything, timeout=3)[1]:
        with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            survivor.kill()
    shutil.rmtree(options["temp-dir"], ignore_errors=True)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample several times over, in many small shards, cut for `mini`."""
    tokenizer = load_tokenizer("mini")
    cut = Chunker(tokenizer).chunk(list(read_articles("sample")))
    articles = [[c.text for c in article] for article in cut]
    folder = tmp_path_factory.mktemp("submit") / "chunks"
    write_chunks(folder, articles * COPIES, articles_per_shard=8, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN": "00" * 16}, "asks for its token (Authentication failed: Forbidden"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, "couldn't find an authentication token"),
        (
            {"RAY_AUTH_MODE": "disabled"},
            "Missing authentication token). Put that token into ~/.ray/auth_token",
        ),
    ],
    ids=["wrong", "none", "mode-off"],
)
def test_without_the_token_nothing_is_sent(head: Head, changes: dict[str, str], message: str) -> None:
    done = head.submit("encode", "--input", "x", "--output", "y", **changes)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_kubernetes_probes_answers_without_the_token(head: Head) -> None:
    probed = yaml.safe_load((CHECKOUT / "deploy/base/backfill/rayjob.yaml").read_text())["spec"][
        "rayClusterSpec"
    ]
    (container,) = probed["headGroupSpec"]["template"]["spec"]["containers"]
    (path,) = re.findall(r"localhost:8265(/\S+)", container["readinessProbe"]["exec"]["command"][-1])
    with urllib.request.urlopen(head.url + path, timeout=10) as answer:
        assert b"success" in answer.read()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(head.url + "/api/version", timeout=10)


def test_no_cluster_is_one_line(head: Head) -> None:
    nobody = Head("http://127.0.0.1:9", head.token)
    done = nobody.submit("encode", "--input", "x")
    assert done.returncode == 1
    assert "no Ray cluster responds at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stopped_job_goes_on_where_it_was_and_its_exit_code_is_ours(
    head: Head, chunks: Path, tmp_path: Path
) -> None:
    target = tmp_path / "vectors"
    encode = ("encode", "--input", str(chunks), "--output", str(target))
    shards = len(list(chunks.glob("part-*.parquet")))

    # Ctrl-C as soon as something is finished.
    child = subprocess.Popen(
        head.command(*encode),
        cwd=CHECKOUT,
        env=head.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(target.glob("part-*.parquet"))) < 3 and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to `latent` and to its child
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stdout + stderr
    assert "run the same command to resume" in stderr
    finished = {p.name: p.stat().st_mtime_ns for p in target.glob("part-*.parquet")}
    assert 3 <= len(finished) < shards
    assert not (target / "manifest.json").exists()

    # The same again, without waiting; then its log, to the end.
    submitted = head.submit("--no-wait", *encode)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    done = head.submit("--follow", job)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["redone"] == shards - len(finished)
    assert f"python -m jobs.encode --input {chunks}" in done.stdout
    after = {p.name: p.stat().st_mtime_ns for p in target.glob("part-*.parquet")}
    assert {n: after[n] for n in finished} == finished
    Manifest.load(target, "vectors").verify(target, deep=True)
    for shard in Manifest.load(chunks).shards:
        ids = [read_table(f / shard.file, ["chunk_id"]).column(0).to_numpy(False) for f in (chunks, target)]
        np.testing.assert_array_equal(*ids)

    # Ended jobs are no longer there to stop; unknown ones never were.
    assert "has already ended (succeeded)" in head.submit("--cancel", job).stderr


def test_a_job_that_refuses_ends_with_its_line_and_code(head: Head, tmp_path: Path) -> None:
    done = head.submit("export", "--vectors", str(tmp_path / "none"), "--output", str(tmp_path / "x.npz"))
    assert done.returncode == 1
    assert "Run `latent encode`" in done.stdout
    done = head.submit("export", "--vectorz", "x")
    assert done.returncode == 2
    assert "--vectorz" in done.stdout
