"""A Poisson stream of decode requests: rounds that late requests join, against two simpler ways.

Three ways to serve the same arrivals on the same networks, in one process one after the other:

- `one-at-a-time`: a queue, each request decoded by itself.
- `fixed batches`: a queue, up to `max_rows` waiting requests decoded together; nobody joins or leaves before all of
  them are done.
- `rounds`: `lvm.codec.inverter.Rounds`, the engine's own loop.

What limits the numbers: below saturation latency is one request's own time and what it waits for; a request for
no corrector step should not wait for a neighbour's three. Requests ask for 0, 1 or 3 steps, a third each. Arrival
times are drawn once a rate, so all three ways see the same stream; time is real time.

    python -m tests.bench.decode_stream            # about three minutes
    python -m tests.bench.decode_stream --seconds 5

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvm.codec.gtr import load_gtr
from lvm.codec.inverter import Inverter, InverterSettings, Request, Rounds
from lvm.codec.runner import best_precision
from tests.bench.decode_batch import SIZES, sample_texts
from tests.checkpoints import make_checkpoints

STEPS = (0, 1, 3)
WAYS = ("one-at-a-time", "fixed batches", "rounds")


def serve(
    inverter: Inverter, way: str, vectors: np.ndarray, steps: np.ndarray, arrivals: np.ndarray
) -> np.ndarray:
    """Latency in seconds of each request, from its arrival to its text."""
    latency = np.zeros(len(arrivals))
    rounds = Rounds(inverter)
    tickets: dict[int, int] = {}
    waiting: deque[int] = deque()
    come = done = 0
    begun = time.perf_counter()
    while done < len(arrivals):
        now = time.perf_counter() - begun
        while come < len(arrivals) and arrivals[come] <= now:
            if way == "rounds":
                tickets[rounds.add(Request(vectors[come], int(steps[come])))] = come
            else:
                waiting.append(come)
            come += 1
        if not waiting and not len(rounds):
            time.sleep(max(0.0, arrivals[come] - (time.perf_counter() - begun)))
            continue
        if way == "rounds":
            left = [tickets[ticket] for ticket in rounds.run()]
        else:
            size = 1 if way == "one-at-a-time" else inverter.settings.max_rows
            left = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            inverter.invert(vectors[left], steps[left].tolist())
        latency[left] = time.perf_counter() - begun - arrivals[left]
        done += len(left)
    return latency


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each stream")
    parser.add_argument("--output", type=Path, help="write the table as Markdown to this file")
    args = parser.parse_args()
    precision = best_precision(torch.device("cpu"))
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_checkpoints(root, sample_texts(), SIZES["small"])
        inverter = load_gtr("gtr-jxe", root, precision=precision).inverter
    # Random weights gain nothing by a step, so none may be left out.
    inverter.settings = InverterSettings(stop_early=False, max_rows=64)
    pool = rng.standard_normal((4096, 768)).astype(np.float32) * 0.5
    inverter.invert(pool[:8], 1)
    begun = time.perf_counter()
    for row in range(6):
        inverter.invert(pool[row : row + 1], STEPS[row % 3])
    alone = 6 / (time.perf_counter() - begun)
    lines = [
        "| arrivals/s | of one-at-a-time's most | way | done/s | p50 ms | p95 ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    points: list[dict[str, Any]] = []
    for load in (0.5, 0.9, 2.0, 4.0, 8.0):
        rate = load * alone
        number = max(8, int(rate * args.seconds))
        arrivals = np.cumsum(rng.exponential(1 / rate, number))
        steps = rng.choice(STEPS, number)
        vectors = pool[rng.integers(0, len(pool), number)]
        for way in WAYS:
            if way == "one-at-a-time" and load > 2:
                continue  # its queue only grows
            latency = serve(inverter, way, vectors, steps, arrivals)
            p50, p95 = (1000 * float(np.percentile(latency, q)) for q in (50, 95))
            # Until the last text, which under overload comes well after the last arrival.
            throughput = number / float((arrivals + latency).max())
            points.append(
                {
                    "rate": rate,
                    "load": load,
                    "way": way,
                    "done_per_s": throughput,
                    "p50_ms": p50,
                    "p95_ms": p95,
                }
            )
            lines.append(f"| {rate:.1f} | {load:.1f} | {way} | {throughput:.1f} | {p50:.0f} | {p95:.0f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    print(
        json.dumps(
            {
                "one_at_a_time_per_s": alone,
                "points": points,
                "precision": precision,
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in ("torch", "numpy")},
            }
        )
    )


if __name__ == "__main__":
    main()
