"""From articles to a predictor on an S3 server of this machine: killed, run again, nothing left to do at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pytest

from lvm.codec.zoo import load_codec
from lvm.predict.record import load_record, read_aliases
from lvm.storage import RemotePath, files_below, location
from lvm.vectors.array import open_vectors
from lvm.vectors.shards import Manifest, read_table
from tests.integration.conftest import CHECKOUT

pytestmark = pytest.mark.slow

ARTICLES = 40


@pytest.fixture(autouse=True)
def own_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for Ray's files: in the usual one, a job without --address joins whatever cluster was there last."""
    folder = tempfile.mkdtemp(prefix="latent-", dir="/tmp")  # short, as Ray's sockets lie in it
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lvm.cli", *arguments]


def latent(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def summary_of(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def test_the_flow_on_object_storage(bucket: RemotePath) -> None:
    lines = [
        line
        for f in sorted((CHECKOUT / "data/sample").glob("*.jsonl"))
        for line in f.read_text().splitlines()
    ]
    (bucket / "corpus/articles.jsonl").write_bytes(("\n".join(lines[:ARTICLES]) + "\n").encode())
    chunks, vectors, index, models = (
        str(bucket / "run" / d) for d in ("chunks", "vectors", "index", "models")
    )
    stages = {
        "chunk": ["--input", str(bucket / "corpus"), "--output", chunks, "--rows-per-shard", "32"],
        "encode": ["--input", chunks, "--output", vectors],
        "index": ["--input", vectors, "--output", index],
        "train": ["--vectors", vectors, "--output", models, "--model", "amn", "--max-minutes", "0.05"],
    }
    cut = summary_of(latent("chunk", *stages["chunk"]))
    assert cut["rows"] > 600
    assert not [f for f in files_below(location(chunks)) if "_work" in str(f)]

    # Encoding, killed as soon as two shards are there, then run again.
    child = subprocess.Popen(
        command("encode", *stages["encode"]),
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(list(location(vectors).glob("part-*.parquet"))) < 2 and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done = {str(p): p.stat().st_mtime_ns for p in location(vectors).glob("part-*.parquet")}
    assert 2 <= len(done) < cut["shards"]
    assert not location(vectors + "/manifest.json").exists()
    again = summary_of(latent("encode", *stages["encode"]))
    # What the killed actors still had in hand may have appeared after the look.
    assert 0 < again["redone"] <= cut["shards"] - len(done)
    assert {p: location(p).stat().st_mtime_ns for p in done} == done
    array = open_vectors(vectors)
    wanted = [
        i
        for s in Manifest.load(location(chunks)).shards
        for i in read_table(location(chunks) / s.file, ["chunk_id"]).column(0).to_pylist()
    ]
    assert array.chunk_ids.tolist() == wanted
    rows = range(0, len(array), 50)
    expected = load_codec("mini").encode_chunks(array.texts(rows)).vectors
    assert np.einsum("nd,nd->n", array.vectors[rows].astype(np.float32), expected).min() > 0.999

    # The rest; then all of it again, which finds nothing to do.
    for stage in ("index", "train"):
        latent(stage, *stages[stage])
    assert load_record(location(models), "amn").folder.name == read_aliases(location(models))["amn"]
    names = {f.name for f in files_below(bucket / "run")}
    assert {
        "manifest.json",
        "CURRENT",
        "index.faiss",
        "aliases.json",
        "progress.json",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "optimiser.pt" not in names
    before = {str(f): f.stat().st_mtime_ns for f in files_below(bucket / "run")}
    for stage, options in stages.items():
        assert summary_of(latent(stage, *options))["up_to_date"], stage
    assert {str(f): f.stat().st_mtime_ns for f in files_below(bucket / "run")} == before

    # What reads them.
    said = latent(
        "predict", "--run", str(bucket / "run"), "--model", "amn", "A first text.", "And a second one."
    )
    assert said.stdout.strip()


def test_storage_that_is_not_there_is_one_line(bucket: RemotePath) -> None:
    done = subprocess.run(
        command("encode", "--input", "s3://no-such-bucket/chunks", "--output", str(bucket / "x")),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
