"""A corpus too large for memory, through encode, index, train and serve: the real jobs and the real service.

    LATENT_SCALE_CHUNKS=5000000 LATENT_SCALE_REPORT=scale.json python -m pytest -m slow tests/integration/test_scale.py

The corpus is made up: articles of 16 chunks, each of ten words of its article's forty, so that chunks of an article lie
near each other and no two texts are the same. Chunk shards are written one at a time with the library's own writer, as
`latent chunk` leaves them. Bounds on memory are the same for every size: what a stage may hold depends on its settings
(rows in a shard, vectors in a part, windows in an epoch) and on the number of cores. Memory is what processes hold:
anonymous and shared pages. Pages of mapped files are left out, as the kernel drops them when it needs the room.

LATENT_SCALE_CHUNKS   chunks; default 60,000, two minutes on two cores. Bounds mean something from some millions on
LATENT_SCALE_REPORT   file for seconds, rows a second, memory and disk of each stage; it is written after each
TMPDIR                where the corpus goes, 6 KB a chunk: 30 GB for 5,000,000
"""

import functools
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import chunk_id
from lvm.vectors.array import array_folder
from lvm.vectors.shards import CHUNK_SCHEMA, Manifest, Shard, read_table, write_table
from tests.integration.conftest import CHECKOUT
from tests.integration.serving import Service, descendants, running, vectors_of
from tests.sampling import Sampler

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ARTICLE_CHUNKS, SHARD_ROWS = 16, 2048
FEWEST = 15_000
"""Chunks of which a third is indexed in lists."""


def chunks_asked_for() -> int:
    """Whole articles' worth of LATENT_SCALE_CHUNKS."""
    given = os.environ.get("LATENT_SCALE_CHUNKS", "60000").replace("_", "")
    if not given.isdecimal() or int(given) < FEWEST:
        raise pytest.UsageError(f"LATENT_SCALE_CHUNKS is {given!r}; expected a number of {FEWEST:,} or more")
    return -(-int(given) // ARTICLE_CHUNKS) * ARTICLE_CHUNKS


CHUNKS = chunks_asked_for()
PART_VECTORS = min(500_000, -(-CHUNKS // 3))
"""Three parts of the index in the small run, ten for 5 million chunks. Building one takes 1.7 KB a vector."""

BYTES_A_CHUNK = 6_000
"""On disk: 1.6 KB in shards, 1.7 KB in the array and 1.6 KB in the index, and a reserve of a fifth."""

CORES = os.cpu_count() or 1
MOST_BYTES = {
    stage: (most + CORES) << 30 for stage, most in (("encode", 2), ("index", 2), ("train", 2), ("serve", 4))
}
"""What all processes of a stage may hold at once, Ray's included: a worker for each core is a part of them. The vectors
of 5 million chunks are 7.7 GB in float16."""

MOST_DRIVER_BYTES = 1 << 30
"""What a job's own process may hold."""


# ------------------------------------------------------------------------------------------------ the corpus


@functools.cache
def words() -> list[str]:
    """Words of the bundled sample that are one or two tokens, so that ten of them stay within the codec's limit."""
    found: set[str] = set()
    for file in (CHECKOUT / "data" / "sample").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            found |= {w for w in re.findall(r"[a-z]{3,}", json.loads(line)["text"].lower())}
    every = sorted(found)
    counts = load_tokenizer("mini").count(every)
    return [word for word, count in zip(every, counts, strict=True) if count <= 3]  # end of text included


def article(number: int) -> list[str]:
    """Its chunks' texts; the same in every run."""
    random = np.random.default_rng(number)
    own = random.choice(len(words()), 40, replace=False)
    picks = random.random((ARTICLE_CHUNKS, len(own))).argsort(axis=1)[:, :10]
    return [" ".join(words()[own[i]] for i in pick).capitalize() + "." for pick in picks]


def write_corpus(folder: Path) -> None:
    """A finished chunk job's folder; one shard at a time is in memory."""
    tokenizer = load_tokenizer("mini")
    shards: list[Shard] = []
    for low in range(0, CHUNKS, SHARD_ROWS):
        rows = np.arange(low, min(low + SHARD_ROWS, CHUNKS))
        docs, positions = np.divmod(rows, ARTICLE_CHUNKS)
        texts = [text for doc in range(docs[0], docs[-1] + 1) for text in article(doc)]
        columns = {
            "chunk_id": [chunk_id("scale", str(d), p) for d, p in zip(docs, positions.tolist(), strict=True)],
            "doc_id": docs.astype(np.int32),
            "position": positions.astype(np.int32),
            "title": [f"Article {d}" for d in docs],
            "text": texts,
            "source": ["scale"] * len(rows),
            "num_tokens": np.array(tokenizer.count(texts), np.int32),
        }
        table = pa.table(columns, schema=CHUNK_SCHEMA)
        shards.append(write_table(folder / f"part-{len(shards):05d}.parquet", table))
    Manifest(
        kind="chunks",
        settings={"tokenizer_sha256": tokenizer.sha256, "max_tokens": tokenizer.max_tokens},
        inputs={"articles": CHUNKS // ARTICLE_CHUNKS},
        shards=tuple(shards),
        rows=CHUNKS,
        source="made up by tests/integration/test_scale.py",
        licence="CC0-1.0",
        report={"articles": CHUNKS // ARTICLE_CHUNKS},
    ).save(folder)


# ------------------------------------------------------------------------------------------ what is measured


def held_bytes(pid: int) -> int:
    """Anonymous and shared memory of a process, shared pages split among their sharers; 0 when it has ended."""
    with suppress(OSError):
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        )
        return sum(int(fields[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_Shmem"))
    return 0


class Watch(Sampler):
    """Most memory that a process and all it started held at once, and the process alone."""

    interval_s = 0.5

    def __init__(self, root: int) -> None:
        super().__init__()
        self.root, self.peak, self.driver_peak, self.largest, self.processes = root, 0, 0, 0, 0

    def sample(self) -> None:
        own, *others = (held_bytes(pid) for pid in (self.root, *descendants(self.root)))
        self.peak = max(self.peak, own + sum(others))
        self.driver_peak = max(self.driver_peak, own)
        self.largest = max(self.largest, own, *others)
        self.processes = max(self.processes, 1 + len(others))


def disk_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def written_at(folder: Path, pattern: str) -> float:
    """When the last of these files was written, seconds since the epoch."""
    return max(p.stat().st_mtime for p in folder.rglob(pattern))


class Run:
    """The stages of one run on one folder, and the report that grows with each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.closing: dict[str, dict[str, Any]] = {}
        """The jobs' closing lines."""
        self.serving: Watch | None = None
        self.report: dict[str, Any] = {
            "chunks": CHUNKS,
            "part_vectors": PART_VECTORS,
            "processor": next(
                (
                    line.split(":")[1].strip()
                    for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")
                ),
                platform.machine(),
            ),
            "cores": CORES,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("ray", "torch", "numpy", "pyarrow", "faiss-cpu")},
            },
            "stages": {},
        }

    def note(
        self, stage: str, seconds: float, watch: Watch | None = None, output: Path | None = None
    ) -> None:
        """Add a stage to the report, and save it."""
        entry: dict[str, Any] = {"seconds": round(seconds, 1)}
        if output is not None:
            entry |= {
                "rows_per_second": round(CHUNKS / seconds),
                "disk_mb": round(disk_bytes(output) / 1e6),
            }
        if watch is not None:
            entry |= {
                "peak_mb": watch.peak >> 20,
                "driver_peak_mb": watch.driver_peak >> 20,
                "largest_process_mb": watch.largest >> 20,
                "processes": watch.processes,
            }
        self.report["stages"][stage] = entry
        if given := os.environ.get("LATENT_SCALE_REPORT"):
            Path(given).write_text(json.dumps(self.report, indent=2) + "\n")

    def job(self, stage: str, output: Path, *options: str) -> float:
        """One job to its end, measured; when it began, seconds since the epoch."""
        begun = time.time()
        with subprocess.Popen(
            [sys.executable, "-m", f"jobs.{stage}", "--output", str(output), *options],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                with Watch(process.pid) as watch:
                    out, err = process.communicate(timeout=900 + CHUNKS / 200)
            except BaseException:
                process.terminate()
                raise
        assert process.returncode == 0, f"{stage} ended with {process.returncode}: {err[-3000:]}"
        self.closing[stage] = json.loads(out.splitlines()[-1])
        self.note(stage, time.time() - begun, watch, output)
        return begun

    def split(self, stage: str, begun: float, pattern: str, first: str, rest: str) -> None:
        """Say what of a stage's seconds came before its last file of this pattern, and what after."""
        entry = self.report["stages"][stage]
        entry[first] = round(written_at(self.folder, pattern) - begun, 1)
        entry[rest] = round(entry["seconds"] - entry[first], 1)


@contextmanager
def with_room(parent: Path) -> Iterator[Path]:
    """A folder that is removed at the end."""
    free, wanted = shutil.disk_usage(parent).free, CHUNKS * BYTES_A_CHUNK
    if free < wanted:
        pytest.fail(
            f"{CHUNKS:,} chunks take up to {wanted / 1e9:.0f} GB, {parent} has {free / 1e9:.0f} GB free; set TMPDIR to "
            "a folder with room, or LATENT_SCALE_CHUNKS to fewer"
        )
    folder = parent / "run"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The corpus after encode, index and train."""
    with with_room(tmp_path_factory.mktemp("scale")) as folder:
        run, vectors = Run(folder), folder / "vectors"
        begun = time.perf_counter()
        write_corpus(folder / "chunks")
        run.note("corpus", time.perf_counter() - begun, output=folder / "chunks")

        started = run.job("encode", vectors, "--input", str(folder / "chunks"))
        run.split("encode", started, "vectors/part-*.parquet", "shards_s", "array_s")

        options = ("--input", str(vectors), "--codes", "--part-vectors", str(PART_VECTORS))
        started = run.job("index", folder / "index", *options)
        run.split("index", started, "part-*.faiss", "parts_s", "recall_s")
        run.report["recall"] = run.closing["index"]["recall"]

        options = ("--vectors", str(vectors), "--model", "amn", "--epochs", "1", "--max-minutes", "5")
        run.job("train", folder / "models", *options)
        run.report["train"] = {k: run.closing["train"][k] for k in ("windows", "models")}
        yield run


@pytest.fixture(scope="module")
def service(run: Run) -> Iterator[Service]:
    """The service on it; its seconds in the report are those until it answers."""
    begun = time.perf_counter()
    with running(run.folder) as service:
        assert service.process is not None
        ready = time.perf_counter() - begun
        with Watch(service.process.pid) as watch:
            run.serving = watch
            yield service
        run.note("serve", ready, watch)


# ------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_what_a_process_holds_is_what_it_allocated_and_not_what_it_mapped(tmp_path: Path, kind: int) -> None:
    np.save(tmp_path / "mapped.npy", np.ones(8 << 20))
    before = held_bytes(os.getpid())
    mapped = np.load(tmp_path / "mapped.npy", mmap_mode="r")
    assert mapped.sum() == 8 << 20  # every page was read
    assert held_bytes(os.getpid()) - before < 16 << 20
    # From the system, since numpy may give memory that this process has held for long.
    with mmap.mmap(-1, 64 << 20, flags=kind | mmap.MAP_ANONYMOUS) as held:
        held.write(bytes(64 << 20))
        assert held_bytes(os.getpid()) - before > 56 << 20


def test_every_chunk_is_encoded_indexed_and_cut_into_windows_once(run: Run) -> None:
    chunks, vectors = (Manifest.load(run.folder / name, name) for name in ("chunks", "vectors"))
    assert chunks.rows == vectors.rows == run.closing["index"]["rows"] == CHUNKS
    assert [s.rows for s in vectors.shards] == [s.rows for s in chunks.shards]
    assert vectors.report["truncated"] == 0
    array = array_folder(run.folder / "vectors", vectors)
    keys = np.load(array / "text_keys.npy")
    assert len(np.unique(keys)) == CHUNKS  # no two texts are the same
    last = read_table(run.folder / "vectors" / vectors.shards[-1].file, ["chunk_id"])
    assert np.load(array / "chunk_ids.npy", mmap_mode="r")[-1] == last.column("chunk_id")[-1].as_py()
    windows = run.closing["train"]["windows"]
    possible = CHUNKS // ARTICLE_CHUNKS * (ARTICLE_CHUNKS - 5)
    assert 0.9 * possible < sum(windows.values()) <= possible


def test_the_index_has_parts_and_says_what_it_finds(run: Run) -> None:
    closing = run.closing["index"]
    assert closing["settings"]["type"] == "IVF_PQ4_REFINED"
    assert closing["settings"]["parts"] == -(-CHUNKS // PART_VECTORS) >= 3
    assert closing["recall"]["recall_queries"] == 256
    assert 0.6 < closing["recall"]["recall_stored"] <= 1
    assert 0.6 < closing["recall"]["recall_blended"] <= 1


def test_the_model_is_better_than_the_mean_of_its_context(run: Run) -> None:
    (model,) = run.closing["train"]["models"].values()
    assert model["epochs"] == 1
    assert model["val_cosine"] > model["context_mean_val_cosine"] > 0


def test_the_service_predicts_and_finds_neighbours_in_every_part(run: Run, service: Service) -> None:
    assert service.get("/v1/models").json["corpus"]["chunks"] == CHUNKS
    places = [0, CHUNKS // ARTICLE_CHUNKS // 2, CHUNKS // ARTICLE_CHUNKS - 1]
    for number in places:  # in the first, a middle and the last part
        text = article(number)[3]
        reply = service.post("/v1/search", {"query": text, "k": 3}, timeout_s=300)
        assert reply.status == 200, reply.body
        best = reply.json["results"][0][0]
        assert (best["text"], best["title"], best["position"]) == (text, f"Article {number}", 3)
        assert best["cosine"] > 0.99
    context = vectors_of(service, article(places[1])[:5])
    reply = service.post("/v1/predict", {"vectors": context.tolist(), "model": "amn"})
    assert reply.status == 200, reply.body
    predicted = np.array(reply.json["vectors"][0])
    assert np.linalg.norm(predicted) == pytest.approx(1, abs=1e-3)
    reply = service.post("/v1/search", {"vectors": [predicted.tolist()], "k": 8}, timeout_s=300)
    found = [r["title"] for r in reply.json["results"][0]]
    assert len(found) == 8
    assert found.count(f"Article {places[1]}") >= 4
    request = {"chunks": article(places[2])[:5], "neighbours": 4}
    reply = service.post("/v1/generate", request, timeout_s=300)
    assert reply.status == 200, reply.body
    (generated,) = reply.json["results"][0]["generated"]
    assert generated["text"]
    assert len(generated["neighbours"]) == 4


def test_no_stage_holds_the_corpus(run: Run, service: Service) -> None:
    assert service.post("/v1/search", {"query": article(1)[0], "k": 3}, timeout_s=300).status == 200
    time.sleep(3 * Watch.interval_s)
    assert run.serving is not None
    stages = run.report["stages"]
    held = {name: stages[name]["peak_mb"] << 20 for name in ("encode", "index", "train")}
    held["serve"] = run.serving.peak
    for stage, most in MOST_BYTES.items():
        # Ray alone is some hundred megabytes: less would say that nobody was looked at.
        assert 200 << 20 < held[stage] <= most, (stage, held)
    for stage in ("encode", "index", "train"):
        assert 30 << 20 < stages[stage]["driver_peak_mb"] << 20 <= MOST_DRIVER_BYTES, (stage, stages[stage])
