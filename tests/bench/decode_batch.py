"""Vectors to text: our engine against vec2text, on the same weights in the same run.

What limits the numbers. One text alone reads every decoder weight once a token, so memory traffic decides, and a
precision with fewer bytes wins. A large batch is bound by arithmetic: the corrector's encoder reads some 80
tokens a row, which costs more than writing 32. Weights are seeded and random: speed does not depend on their
values, and since nothing has been learnt hardly a text ends early, which is the longest case for both. The token
table is scaled down so that the texts are varied and as long, encoded again, as real ones.

Both sides write at most 32 tokens. vec2text runs as its API does, in float32. Each side and size runs in a process
of its own, one after the other, so that peak memory is its own.

    python -m tests.bench.decode_batch --quick       # GTR-base size, steps 1; batch 1, 64 and our best
    python -m tests.bench.decode_batch               # every size, batch and step count

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvm.codec.vec2text_package import load_vec2text, vec2text_ids
from tests.checkpoints import (
    CORRECTOR,
    GTR_BASE,
    Sizes,
    make_checkpoints,
)

SIZES = {
    "small": Sizes(256, 4, 8, 32, 1024, 8192, 4, 12, 64, 1024, 16, embedding_std=0.05),
    "gtr-base": GTR_BASE,
}
BATCHES = (1, 8, 32, 64, 128, 256)
STEPS = (0, 1, 5)
CHECKOUT = Path(__file__).parents[2]


def sample_texts() -> list[str]:
    """Sentences of the bundled sample, which the tokenizer is fitted on."""
    texts = []
    for file in sorted((CHECKOUT / "data" / "sample").glob("*.jsonl")):
        texts += [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    return [s for text in texts for s in text.split(". ")]


def timed(call: Callable[[], Any], budget_s: float) -> float:
    """Seconds of the fastest call: one to warm up unless it took the whole budget, then up to three."""
    begun = time.perf_counter()
    call()
    first = time.perf_counter() - begun
    if first > budget_s:
        return first
    runs = []
    while len(runs) < 3 and (not runs or sum(runs) + runs[-1] < budget_s):
        begun = time.perf_counter()
        call()
        runs.append(time.perf_counter() - begun)
    return min(runs)


def vec2text_side(root: Path) -> Callable[[np.ndarray, int], None]:
    """vec2text itself, float32."""
    corrector = load_vec2text(root)

    def run(vectors: np.ndarray, steps: int) -> None:
        vec2text_ids(corrector, torch.from_numpy(vectors), steps)

    return run


def our_side(root: Path, precision: str, max_rows: int) -> Callable[[np.ndarray, int], None]:
    """Our engine, as `--codec gtr-jxe --codec-path` loads it."""
    from dataclasses import replace

    from lvm.codec.gtr import load_gtr

    inverter = load_gtr("gtr-jxe", root, precision=precision).inverter
    # vec2text takes every step that is asked for, so ours may not leave early either.
    inverter.settings = replace(inverter.settings, stop_early=False, max_rows=max_rows)

    def run(vectors: np.ndarray, steps: int) -> None:
        rows = inverter.invert(vectors, steps)
        assert all(row.steps_used == steps for row in rows)

    return run


def child(root: Path, side: str, size: str, points: Sequence[tuple[int, int]], budget_s: float) -> None:
    """Measure one side in this process; a line of JSON for each (batch, steps)."""
    torch.set_num_threads(torch.get_num_threads())
    generator = np.random.default_rng(7)
    # Of the norm that mean-pooled states of the seeded embedder have: about sqrt(768) / 2.
    pool = generator.standard_normal((max(b for b, _ in points), 768)).astype(np.float32) * 0.5
    run = vec2text_side(root) if side == "vec2text" else our_side(root, side, max(b for b, _ in points))
    run(pool[:1], points[0][1])  # weights are read from disk with the first call
    for batch, steps in points:
        seconds = timed(lambda batch=batch, steps=steps: run(pool[:batch], steps), budget_s)  # type: ignore[misc]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps(
                {
                    "size": size,
                    "side": side,
                    "batch": batch,
                    "steps": steps,
                    "seconds": seconds,
                    "requests_per_second": batch / seconds,
                    "ms_per_request": 1000 * seconds / batch,
                    "peak_bytes": peak,
                }
            ),
            flush=True,
        )


def measure(
    root: Path, side: str, size: str, points: Sequence[tuple[int, int]], budget_s: float
) -> list[dict[str, Any]]:
    """One side's points from a child process; what failed is marked, not dropped."""
    listed = ",".join(f"{b}x{s}" for b, s in points)
    command = [sys.executable, "-m", "tests.bench.decode_batch", "--child", side, "--root", str(root)]
    process = subprocess.run(
        [*command, "--size", size, "--points", listed, "--budget-s", str(budget_s)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    for batch, steps in points[len(rows) :]:
        rows.append(
            {"size": size, "side": side, "batch": batch, "steps": steps, "failed": process.stderr[-300:]}
        )
    for row in rows:
        speed = f"{row['requests_per_second']:8.2f} requests/s" if "seconds" in row else "failed"
        print(f"{size:9} {side:9} batch {row['batch']:3} steps {row['steps']}: {speed}", file=sys.stderr)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line a point, ours beside vec2text's."""
    theirs = {(r["size"], r["batch"], r["steps"]): r for r in rows if r["side"] == "vec2text"}
    lines = [
        "| size | steps | batch | side | requests/s | ms a request | peak MB | to vec2text at this batch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(
        rows, key=lambda r: (r["size"], r["steps"], r["batch"], r["side"] != "vec2text", r["side"])
    ):
        head = f"| {r['size']} | {r['steps']} | {r['batch']} | {r['side']} "
        if "failed" in r:
            lines.append(f"{head}| failed | | | |")
            continue
        other = theirs.get((r["size"], r["batch"], r["steps"]), {}).get("seconds")
        ratio = f"{other / r['seconds']:.2f}x" if other else ""
        lines.append(
            f"{head}| {r['requests_per_second']:.2f} | {r['ms_per_request']:.1f} | {r['peak_bytes'] / 1e6:.0f} "
            f"| {ratio} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]], size: str, steps: int) -> dict[str, float]:
    """The three ratios for one size and step count, ours at its best precision of each point."""
    done = [r for r in rows if r["size"] == size and r["steps"] == steps and "seconds" in r]
    theirs = {r["batch"]: r for r in done if r["side"] == "vec2text"}
    ours = [r for r in done if r["side"] != "vec2text"]
    if 1 not in theirs or 64 not in theirs or not ours:
        return {}
    best = max(ours, key=lambda r: r["requests_per_second"])
    at = {
        b: max((r for r in ours if r["batch"] == b), key=lambda r: r["requests_per_second"]) for b in (1, 64)
    }
    return {
        "throughput_best_vs_single": best["requests_per_second"] / theirs[1]["requests_per_second"],
        "throughput_b64_vs_b64": at[64]["requests_per_second"] / theirs[64]["requests_per_second"],
        "latency_b1_ratio": at[1]["seconds"] / theirs[1]["seconds"],
        "best_batch": best["batch"],
        "best_requests_per_second": best["requests_per_second"],
        "vec2text_single_requests_per_second": theirs[1]["requests_per_second"],
    }


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(n) for n in listed.split(",") if n)


def _point(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["size"], row["side"], row["batch"], row["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="GTR-base size, steps 1, batch 1, 64 and 128")
    parser.add_argument(
        "--output",
        type=Path,
        help="write the table as Markdown to this file, over the rows of FILE.jsonl, kept beside it",
    )
    parser.add_argument("--steps", default="", help="step counts, by comma")
    parser.add_argument("--batches", default="", help="batch sizes, by comma")
    parser.add_argument("--precisions", default="", help="ours, by comma; the machine's best if left out")
    parser.add_argument("--size", choices=list(SIZES), help="one size alone")
    parser.add_argument("--root", type=Path, help="folder for the checkpoints; kept, and used again if there")
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds a point, after the first call")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--points", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        points = [tuple(int(n) for n in point.split("x")) for point in args.points.split(",")]
        child(args.root, args.child, args.size, points, args.budget_s)  # type: ignore[arg-type]
        return

    from lvm.codec.runner import best_precision

    precisions = args.precisions.split(",") if args.precisions else [best_precision(torch.device("cpu"))]
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    sizes = [args.size] if args.size else (["gtr-base"] if args.quick else list(SIZES))
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            root = (args.root or Path(scratch)) / size
            if not (root / CORRECTOR / "model.safetensors").is_file():
                make_checkpoints(root, sample_texts(), SIZES[size])
            steps = _numbers(args.steps) or ((1,) if args.quick else STEPS)
            batches = _numbers(args.batches) or ((1, 64, 128) if args.quick else BATCHES)
            ours = [(b, s) for s in steps for b in batches]
            theirs = [(b, s) for b, s in ours if not (args.quick and b > 64)]
            rows += measure(root, "vec2text", size, theirs, args.budget_s)
            for precision in precisions:
                rows += measure(root, precision, size, ours, args.budget_s)
    print(table(rows))
    if args.output:
        kept = args.output.with_suffix(".jsonl")
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        latest = {_point(row): row for row in map(json.loads, kept.read_text().splitlines())}
        args.output.write_text(table(list(latest.values())) + "\n")
    print(
        json.dumps(
            {
                **summary(rows, sizes[-1], 1),
                "size": sizes[-1],
                "precisions": precisions,
                "seconds": round(time.perf_counter() - begun, 1),
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in ("torch", "transformers", "vec2text", "numpy")},
            }
        )
    )


if __name__ == "__main__":
    main()
