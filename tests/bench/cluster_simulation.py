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
sleeps alone, for a machine that is at it. The time that is slept is that of the whole stage, writing included, so a
worker's share of writing is somewhat too large. A node of eight CPUs would have eight such workers: shards would take
an eighth of the time shown; the array at the end, which has one part, as long as shown. Takes 10 GB of
memory and 3.5 KB of disk a chunk. The last line of stdout is one JSON object.
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
from tests.sampling import Sampler

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


class Load(Sampler):
    """Processor time of the driver, of Ray's head and daemons, of workers and of the whole machine, over time; and the
    most memory that driver, Ray and workers held, shared pages split among their sharers."""

    WHO = ("driver", "ray", "workers", "machine")

    interval_s = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._times: list[float] = []
        self._spent: dict[str, list[float]] = {who: [] for who in self.WHO}

    def cores(self, who: str, begun: float, ended: float) -> float:
        """How many cores were busy with it, of 1.0 each, on average between two times."""
        spent = np.interp([begun, ended], self._times, self._spent[who])
        return float(spent[1] - spent[0]) / (ended - begun)

    def sample(self) -> None:
        me, whole = psutil.Process(), psutil.cpu_times()
        spent = {"driver": sum(me.cpu_times()[:2]), "ray": 0.0, "workers": 0.0}
        spent["machine"] = sum(whole) - whole.idle - whole.iowait - whole.guest - whole.guest_nice
        children = me.children(recursive=True)
        for process in children:
            with contextlib.suppress(psutil.Error):
                who = "workers" if process.name().startswith("ray::") else "ray"
                spent[who] += sum(process.cpu_times()[:2])
        self._times.append(time.monotonic())
        for who, seconds in spent.items():
            self._spent[who].append(seconds)
        if len(self._times) % 5 == 1:
            held = 0
            for process in (me, *children):
                with contextlib.suppress(psutil.Error):
                    held += process.memory_full_info().pss
            self.peak_bytes = max(self.peak_bytes, held)


def of_workers(log: Path, begun: float) -> dict[str, Any]:
    """What the workers wrote down: shares of their time, from their first shard to the last of all; times in seconds
    after `begun`."""
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
    last_worker, end = max(s[0][0] for s in shards.values()), max(s[-1][1] for s in shards.values())
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
        "last_worker_after_s": round(last_worker - begun, 1),
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
        begun = time.monotonic()
        made = write_array(*arguments)
        array["seconds"] = time.monotonic() - begun
        return made

    write_array, job.write_array = job.write_array, clocked_array  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch, cluster_of(args.nodes):
        folder = Path(scratch)
        (folder / "log").mkdir()
        rows = write_corpus(folder / "chunks", args.shards)
        codec = functools.partial(sleeping_codec, folder / "log", args.slower / rate, os.getpid())
        with Load() as load:
            begun = time.monotonic()
            result = job.encode_chunks(folder / "chunks", folder / "vectors", codec)
        assert result.manifest.rows == rows
        workers = of_workers(folder / "log", begun)
    first, end = (begun + workers[name] for name in ("first_shard_after_s", "all_shards_after_s"))
    busy = {who: round(load.cores(who, first, end), 4) for who in Load.WHO}
    print("| a worker's time, from its first shard to the last of all | share |\n| --- | ---: |")
    for name, share in sorted(workers["shares"].items(), key=lambda item: -item[1]):
        print(f"| {name} | {share:.1%} |")
    print("\n| | |\n| --- | ---: |")
    print(f"| workers start | {workers['first_shard_after_s']:.1f} s |")
    print(f"| all shards | {end - first:.1f} s |")
    print(f"| array, all {workers['workers']} workers waiting for the driver | {array['seconds']:.1f} s |")
    print(f"| driver busy during the shards, of one core | {busy['driver']:.1%} |")
    print(f"| machine busy during the shards, of {os.cpu_count()} cores | {busy['machine']:.2f} |")
    print(
        json.dumps(
            {
                "nodes": args.nodes,
                "rows": rows,
                "slower": args.slower,
                "chunks_per_second_a_core": round(rate),
                **workers,
                "array_s": round(array["seconds"], 1),
                "array_rows_per_second": round(rows / array["seconds"]),
                "cores_busy_during_the_shards": busy,
                "driver_cpu_ms_a_shard": round(1000 * busy["driver"] * (end - first) / args.shards, 2),
                "peak_gb": round(load.peak_bytes / 1e9, 1),
                "cores": os.cpu_count(),
                "versions": {"ray": version("ray")},
            }
        )
    )


if __name__ == "__main__":
    from tests.bench.cluster_simulation import main as bench

    bench()
