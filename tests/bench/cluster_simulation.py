"""On a cluster of 24 nodes, which stage of a backfill waits for which?

A real Ray cluster on this machine: a head without CPUs and 24 nodes of one logical CPU, each with a raylet and agents
of its own. On it runs the real driver of `jobs.encode` with the real actors, which read and write real shards; only the
arithmetic is simulated, by a codec that sleeps for as long as a core of the measured machine took for as many chunks
(docs/scaling.md). So placement, scheduling, back-pressure and the driver's load are real. Each worker writes down when
it read, encoded, wrote and checked a shard; what lies between two shards is waiting for the driver.

    python -m tests.bench.cluster_simulation
    python -m tests.bench.cluster_simulation --nodes 4 --shards 40       # a small one

These are shares and placement, not speeds. A few cores read, write and schedule here for all nodes, so these parts take
longer than on 24 machines: "machine busy" in the output says how near the limit that was, and --slower 4 lengthens the
sleeps alone, for a machine that is at it. A node of eight CPUs has eight such workers. About 10 GB of memory and 3.5 KB
of disk a chunk. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from lvm.corpus.chunker import chunk_id
from lvm.vectors.shards import CHUNK_SCHEMA, Manifest, write_table
from tests.doubles import Encoded, FakeCodec, FakeTokenizer, chunk_table, fake_articles

CHECKOUT = Path(__file__).parents[2]
SHARD_ROWS = 2048
"""Default of `latent chunk` --rows-per-shard."""

STAGES = {
    "file_sha256": "read",
    "read_table": "read",
    "encode_chunks": "encode",
    "vectors_to_table": "write",
    "write_table": "write",
    "require_same_ids": "check",
}
"""Functions of `jobs.encode` (and the codec's) to the stage they belong to."""


class SleepingCodec(FakeCodec):
    """Vectors of norm 1 that have nothing to do with the text, after the time that real ones take."""

    seconds_a_chunk = 0.0

    @functools.cached_property
    def _vectors(self) -> np.ndarray:
        vectors = np.random.default_rng(0).standard_normal((SHARD_ROWS, self.identity.dim), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_chunks(self, texts: Any) -> Encoded:
        time.sleep(self.seconds_a_chunk * len(texts))
        counts = np.array(self.tokenizer.count(texts), np.int32)
        return Encoded(
            self._vectors[: len(texts)],
            np.ones(len(texts), np.float32),
            counts,
            counts > self.identity.max_tokens,
        )


class Clock:
    """Writes down when functions ran, one line of JSON each; of functions inside others only the outer ones."""

    def __init__(self, log: Path) -> None:
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._file = (log / f"{self._node}-{os.getpid()}.jsonl").open("a", buffering=1)
        self._inside = threading.local()

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as part of a stage."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "stage", None) not in (None, "shard"):
                return function(*args, **kwargs)
            outer, self._inside.stage = getattr(self._inside, "stage", None), stage
            begun, cpu = time.monotonic(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.stage = outer
                row = {"node": self._node, "worker": os.getpid(), "stage": stage}
                row |= {"from": begun, "to": time.monotonic(), "cpu": time.thread_time() - cpu}
                self._file.write(json.dumps(row) + "\n")

        return timed


def sleeping_codec(log: Path, seconds_a_chunk: float, driver: int) -> SleepingCodec:
    """A codec loader for the job. In a worker, which calls it once, it also puts a clock around the job's functions."""
    import jobs.encode as job

    codec = SleepingCodec()
    codec.seconds_a_chunk = seconds_a_chunk
    if os.getpid() != driver:
        clock = Clock(log)
        for name, stage in STAGES.items():
            owner = codec if name == "encode_chunks" else job
            setattr(owner, name, clock.around(stage, getattr(owner, name)))
        job.ShardEncoder.encode = clock.around("shard", job.ShardEncoder.encode)  # type: ignore[method-assign]
    return codec


def write_corpus(folder: Path, num_shards: int) -> int:
    """A finished chunk job's folder: one shard's texts again and again, under new ids. Returns the chunks."""
    first = chunk_table(fake_articles(SHARD_ROWS // 16, 16))
    docs, positions = (first.column(name).to_numpy() for name in ("doc_id", "position"))
    shards = []
    for number in range(num_shards):
        numbers = docs + number * (SHARD_ROWS // 16)
        ids = [chunk_id("simulated", str(d), int(p)) for d, p in zip(numbers, positions, strict=True)]
        columns = {name: first.column(name) for name in CHUNK_SCHEMA.names}
        columns |= {"chunk_id": pa.array(ids), "doc_id": pa.array(numbers, pa.int32())}
        shards.append(
            write_table(folder / f"part-{number:05d}.parquet", pa.table(columns, schema=CHUNK_SCHEMA))
        )
    tokenizer = FakeTokenizer()
    Manifest(
        kind="chunks",
        settings={"tokenizer_sha256": tokenizer.sha256, "max_tokens": tokenizer.max_tokens},
        inputs={"shards": num_shards},
        shards=tuple(shards),
        rows=num_shards * SHARD_ROWS,
        source="made up by tests/bench/cluster_simulation.py",
        licence="CC0-1.0",
    ).save(folder)
    return num_shards * SHARD_ROWS


@contextlib.contextmanager
def cluster_of(num_nodes: int) -> Iterator[Any]:
    """A head without CPUs and so many nodes of one, joined by this process."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=100 << 20)
        for number in range(num_nodes):
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
            print(f"{number + 1} of {num_nodes} nodes", flush=True)
        environment = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        ray.init(
            cluster.address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": environment},
        )
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def cpu_seconds() -> dict[str, float]:
    """Processor time so far: of the driver, of Ray's head and daemons, of workers."""
    me = psutil.Process()
    spent = {"driver": sum(me.cpu_times()[:2]), "ray": 0.0, "workers": 0.0}
    for process in me.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            who = "workers" if process.name().startswith("ray::") else "ray"
            spent[who] += sum(process.cpu_times()[:2])
    return spent


def held_bytes() -> int:
    """Memory of the driver and all of Ray's processes, shared pages split among their sharers."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def of_workers(log: Path, begun: float) -> dict[str, Any]:
    """What the workers wrote down: shares of their time, from their first shard to the last of all."""
    by_worker: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for file in log.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            by_worker[row["node"], row["worker"]].append(row)
    shards = {
        who: sorted((r["from"], r["to"]) for r in rows if r["stage"] == "shard")
        for who, rows in by_worker.items()
    }
    shards = {who: spans for who, spans in shards.items() if spans}
    steady, end = max(s[0][0] for s in shards.values()), max(s[-1][1] for s in shards.values())
    seconds, cpu = Counter[str](), Counter[str]()
    for who, spans in shards.items():
        seconds["waits for the driver"] += sum(b[0] - a[1] for a, b in itertools.pairwise(spans))
        seconds["has no shard left"] += end - spans[-1][1]
        for row in by_worker[who]:
            seconds[row["stage"]] += row["to"] - row["from"]
            cpu[row["stage"]] += row["cpu"]
    seconds["rest"] = seconds["shard"] - sum(seconds[s] for s in set(STAGES.values()))
    total = sum(end - spans[0][0] for spans in shards.values())
    count = sum(map(len, shards.values()))
    del seconds["shard"]
    return {
        "workers": len(shards),
        "workers_a_node": dict(Counter(Counter(node for node, _ in shards).values())),
        "shards_a_worker": [min(map(len, shards.values())), max(map(len, shards.values()))],
        "first_shard_after_s": round(min(s[0][0] for s in shards.values()) - begun, 1),
        "last_worker_after_s": round(steady - begun, 1),
        "all_shards_after_s": round(end - begun, 1),
        "shares": {name: round(value / total, 4) for name, value in seconds.items()},
        "cpu_ms_a_shard": {name: round(1000 * cpu[name] / count, 1) for name in set(STAGES.values())},
    }


def main() -> None:
    """As the module's docstring has it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=24)
    parser.add_argument(
        "--shards", type=int, default=480, help=f"of {SHARD_ROWS:,} chunks; 20 a node by default"
    )
    parser.add_argument("--slower", type=float, default=1.0, help="how many times longer a codec sleeps")
    args = parser.parse_args()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import jobs.encode as job
    from tests.bench.scaling_model import RATES  # with FAISS, which workers have no use for

    rate = RATES["encode"].per_core

    array: dict[str, float] = {}

    def clocked_array(*arguments: Any) -> bool:
        begun, cpu = time.monotonic(), time.process_time()
        made = write_array(*arguments)
        array.update(seconds=time.monotonic() - begun, cpu=time.process_time() - cpu)
        return made

    write_array, job.write_array = job.write_array, clocked_array  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch, cluster_of(args.nodes):
        folder = Path(scratch)
        (folder / "log").mkdir()
        rows = write_corpus(folder / "chunks", args.shards)
        load = functools.partial(sleeping_codec, folder / "log", args.slower / rate, os.getpid())
        peak = [0]
        over = threading.Event()

        def look() -> None:
            while not over.wait(5):
                peak[0] = max(peak[0], held_bytes())

        watcher = threading.Thread(target=look)
        watcher.start()
        psutil.cpu_percent()
        before, begun = cpu_seconds(), time.monotonic()
        result = job.encode_chunks(folder / "chunks", folder / "vectors", load)
        ended = time.monotonic()
        after = cpu_seconds()
        over.set()
        watcher.join()
        assert result.manifest.rows == rows
        workers = of_workers(folder / "log", begun)
    machine = sum(after[who] - before[who] for who in after) / (ended - begun) / (os.cpu_count() or 1)
    encoding = ended - begun - array["seconds"]
    print("| a worker's time, from its first shard on | share |\n| --- | ---: |")
    for name, share in sorted(workers["shares"].items(), key=lambda item: -item[1]):
        print(f"| {name} | {share:.1%} |")
    driver = (after["driver"] - before["driver"] - array["cpu"]) / encoding
    print("\n| the driver | |\n| --- | ---: |")
    print(f"| busy while shards are encoded, of one core | {driver:.1%} |")
    print(f"| array, all {workers['workers']} workers waiting | {array['seconds']:.1f} s |")
    print(f"| shards until then | {encoding:.1f} s |")
    print(f"| machine busy | {machine:.0%} of {os.cpu_count()} cores |")
    print(
        json.dumps(
            {
                "nodes": args.nodes,
                "rows": rows,
                "slower": args.slower,
                "chunks_per_second_a_core": round(rate),
                **workers,
                "encode_s": round(encoding, 1),
                "array_s": round(array["seconds"], 1),
                "driver_busy_of_a_core": round(driver, 4),
                "driver_ms_a_shard": round(1000 * driver * encoding / args.shards, 2),
                "ray_busy_of_a_core": round((after["ray"] - before["ray"]) / (ended - begun), 3),
                "machine_busy": round(machine, 3),
                "peak_gb": round(peak[0] / 1e9, 1),
                "versions": {"ray": version("ray")},
            }
        )
    )


if __name__ == "__main__":
    from tests.bench.cluster_simulation import main as bench

    bench()
