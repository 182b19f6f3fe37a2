"""How long half a million chunks take from articles to a searchable index, and in how much memory.

Runs the real jobs, one after the other, in processes of their own: `latent chunk`, `latent encode`, `latent index`.
Once a second it adds up the proportional set size (PSS: shared pages are split among their sharers, so nothing is
counted twice) of every process the job started, and Ray's spilled bytes; new shards give chunks a second over time.
Afterwards: ids in = ids out, cosine to float32 on a sample, bytes written, recall of the index against exact search.

    python -m tests.bench.encode_backfill --input wiki.jsonl.gz --output OUT --limit 2300
    python -m tests.bench.encode_backfill --input sample --output OUT      # a small one

From 100,000 chunks on, `latent index` holds codes; the stage `ivf-flat` builds the index of whole vectors instead.

Stages that are finished in OUT are reported as up to date, with their few seconds. The last line of stdout is JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CHECKOUT = Path(__file__).parents[2]
SAMPLE_S = 1.0
"""Seconds between two looks at memory and shards."""


def pss_bytes(root: psutil.Process) -> int:
    """Proportional set size of a process and all it started, Ray's daemons too."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def shared_memory_bytes(folder: Path) -> int:
    """Bytes of files under a folder, 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def run_stage(arguments: Sequence[str], output: Path) -> dict[str, Any]:
    """One job to its end: its closing JSON, peak memory, spilled bytes, and a timeline of rows on disk."""
    with tempfile.TemporaryDirectory(prefix="ray") as spill:
        # Ray joins its own folder to this one; whatever the object store spills ends up below it.
        spilling = json.dumps({"type": "filesystem", "params": {"directory_path": spill}})
        environment = {**os.environ, "RAY_object_spilling_config": spilling}
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=CHECKOUT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        root = psutil.Process(process.pid)
        peak, spilled, timeline = 0, 0, []
        while process.poll() is None:
            time.sleep(SAMPLE_S)
            try:
                now = pss_bytes(root)
            except psutil.Error:
                continue
            peak, spilled = max(peak, now), max(spilled, shared_memory_bytes(Path(spill)))
            shards = len(list(output.glob("part-*.parquet")))
            timeline.append((round(time.perf_counter() - begun, 1), shards, round(now / 2**20)))
        stdout, stderr = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}: {stderr[-1000:]}")
    closing = json.loads(stdout.splitlines()[-1])
    return {
        **closing,
        "wall_s": round(time.perf_counter() - begun, 1),
        "peak_pss_bytes": peak,
        "spilled_bytes": spilled,
        "timeline": timeline,
    }


def rates(stage: dict[str, Any], every_s: float = 15.0) -> list[dict[str, float]]:
    """Chunks a second and MiB in use, over stretches of `every_s`."""
    per_shard = stage["rows"] / max(1, stage["shards"])
    rows: list[dict[str, float]] = []
    last_at, last_shards = 0.0, stage["timeline"][0][1] if stage["timeline"] else 0
    for at, shards, mib in stage["timeline"]:
        if at - last_at >= every_s:
            speed = (shards - last_shards) * per_shard / (at - last_at)
            rows.append({"at_s": at, "chunks_per_second": round(speed), "pss_mib": mib})
            last_at, last_shards = at, shards
    return rows


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check(output: Path, codec: str) -> dict[str, Any]:
    """Ids of chunks and vectors compared, all of them; cosine to float32 of a sample of stored vectors."""
    from lvm.codec.zoo import load_codec
    from lvm.vectors.shards import Manifest, read_table, table_to_vectors

    names = [s.file for s in Manifest.load(output / "chunks", "chunks").shards]
    same, seen, total = True, set(), 0
    for name in names:
        before = read_table(output / "chunks" / name, ["chunk_id"]).column("chunk_id").to_pylist()
        after = read_table(output / "vectors" / name, ["chunk_id"]).column("chunk_id").to_pylist()
        same &= before == after
        seen.update(after)
        total += len(after)
    exact = load_codec(codec, precision="float32")
    cosines = []
    for name in names[:: max(1, len(names) // 8)][:8]:
        table = read_table(output / "vectors" / name, ["text", "vector"]).slice(0, 256)
        stored = table_to_vectors(table).astype(np.float32)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        vectors = exact.encode_chunks(table.column("text").to_pylist()).vectors
        cosines.append(np.einsum("nd,nd->n", stored, vectors))
    every = np.concatenate(cosines)
    return {
        "ids_equal": same,
        "ids_unique": len(seen) == total,
        "cosine_to_float32_min": round(float(every.min()), 6),
        "cosine_to_float32_mean": round(float(every.mean()), 6),
        "cosines_of": len(every),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="articles, as `latent chunk` takes them, or sample")
    parser.add_argument("--output", type=Path, required=True, help="folder for chunks, vectors and index")
    parser.add_argument("--limit", type=int, help="articles")
    parser.add_argument("--codec", default="mini")
    parser.add_argument("--stages", default="chunk,encode,index", help="which of the four, by comma")
    args = parser.parse_args()
    out = args.output.resolve()
    source = args.input if args.input == "sample" else str(Path(args.input).resolve())
    limit = ["--limit", str(args.limit)] if args.limit else []
    commands = {
        "chunk": ("chunks", ["jobs.chunk", "--input", source, *limit, "--codec", args.codec]),
        "encode": ("vectors", ["jobs.encode", "--input", str(out / "chunks"), "--codec", args.codec]),
        "index": ("index", ["jobs.index", "--vectors", str(out / "vectors")]),
        "ivf-flat": ("index_ivf_flat", ["jobs.index", "--vectors", str(out / "vectors"), "--no-codes"]),
    }
    report: dict[str, Any] = {}
    for name in args.stages.split(","):
        folder, command = commands[name]
        stage = run_stage([*command, "--output", str(out / folder)], out / folder)
        stage["bytes_written"] = folder_bytes(out / folder)
        report[name] = stage
        print(
            f"{name:7} {stage['rows']:>9,} rows {stage['wall_s']:>7.1f} s "
            f"{stage['rows'] / stage['wall_s']:>9,.0f} rows/s "
            f"peak {stage['peak_pss_bytes'] / 2**30:.2f} GiB PSS, {stage['spilled_bytes']} bytes spilled, "
            f"{stage['bytes_written'] / 1e6:,.0f} MB in {folder}/",
            flush=True,
        )
        if "recall" in stage:
            print(f"        {stage['settings']['type']}, {stage['recall']}")
        if name == "encode":
            print("| s | chunks/s | PSS, MiB |\n| ---: | ---: | ---: |")
            for row in rates(stage):
                print(f"| {row['at_s']:.0f} | {row['chunks_per_second']:,.0f} | {row['pss_mib']:,.0f} |")
    if "encode" in report:
        report["check"] = check(out, args.codec)
        print(report["check"])
    for stage in report.values():
        for key in ("timeline", "codec", "paths", "versions"):
            stage.pop(key, None)
    names = ("ray", "torch", "numpy", "pyarrow", "faiss-cpu")
    print(
        json.dumps(
            {
                **report,
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
            }
        )
    )


if __name__ == "__main__":
    main()
