"""Training: ours against a plain PyTorch loop, and what Ray Train adds, on the same windows, seeds and epochs.

The plain loop is what people write: an NPZ loaded whole, `TensorDataset` and `DataLoader`, float32, batches of 32, Adam
at 5e-4, squared error. Ours is recipe `fast` without its rank head, its early stop and its cap of windows an epoch.
Each side and architecture is alone on the machine, in a process of its own; seconds count from before the data is
opened.

- `time_ratio`: ours until it has the plain loop's final validation cosine, over the plain loop's whole time; the
  largest of the architectures, null when one never gets there;
- `memory_ratio`: resident memory that a process gains from opening the data and going through it once, ours over the
  plain loop's;
- `concurrent_ratio`: wall time of `jobs.train` with all architectures at once, over the sum of each alone;
- `ray_overhead`: time in the training loop of those alone, with log and checkpoints, over the bare loop's, minus 1;
- milliseconds a query at batch 1, and the speed-up a vector at batch 128.

Vectors come from `--vectors`, a folder that `latent encode` wrote and of which the first --windows windows are taken,
else of the bundled sample, which has fewer. What limits the numbers: matrix products, and in the plain loop Adam's
passes over all weights for each 32 windows.

    python -m tests.bench.train_step --vectors out/wiki/vectors           # the four, 80,000 windows
    python -m tests.bench.train_step --vectors out/wiki/vectors --quick   # lstm and amn, 20,000; under six minutes

The last line of stdout is one JSON object. Figures count only from a machine that does nothing else.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
import torch._dynamo  # an optimiser imports it at its first step: seconds that are no part of training
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from jobs._ray import connect, versions
from jobs.train import train_models
from lvm.devices import pick_device
from lvm.evaluate.metrics import measure_latency
from lvm.evaluate.scoring import model_predictor
from lvm.evaluate.table import Table, as_text
from lvm.models import ORIGINAL, build
from lvm.predict.training import FAST, Recipe, fit, shuffled_windows
from lvm.vectors.array import open_vectors, write_array
from lvm.vectors.npz import export_npz
from lvm.vectors.sequences import make_windows
from lvm.vectors.shards import Manifest, write_table

QUICK_MODELS = ("lstm", "amn")
PLAIN_RATE, PLAIN_BATCH = 5e-4, 32

Curve = list[tuple[float, float]]
"""Seconds since the start and validation cosine, after each epoch."""


def recipe_of(epochs: int) -> Recipe:
    """Recipe `fast` for exactly so many epochs over all windows."""
    return replace(
        FAST, epochs=epochs, patience=None, max_minutes=None, max_windows_per_epoch=None, rank=None
    )


# ------------------------------------------------------------------------------------------------------- data


def sample_vectors(folder: Path) -> Path:
    """Vectors of the bundled sample, by the jobs themselves."""
    for stage, *arguments in (
        ("chunk", "--input", "sample", "--output", str(folder / "chunks")),
        ("encode", "--input", str(folder / "chunks"), "--output", str(folder / "vectors")),
    ):
        subprocess.run(
            [sys.executable, "-m", f"jobs.{stage}", *arguments], check=True, stdout=subprocess.DEVNULL
        )
    return folder / "vectors"


def first_windows(vectors: Path, number: int, folder: Path) -> Path:
    """A vector folder of the chunks that the first `number` windows need; the folder itself where it has no more."""
    windows = make_windows(open_vectors(vectors))
    if len(windows) <= number:
        return vectors
    manifest = Manifest.load(vectors, "vectors")
    left = int(windows.rows_of_target[number - 1]) + 1
    shards = []
    for shard in manifest.shards:
        table = pq.read_table(vectors / shard.file).slice(0, left)
        shards.append(write_table(folder / shard.file, table))
        left -= len(table)
        if not left:
            break
    manifest = replace(manifest, shards=tuple(shards), rows=sum(s.rows for s in shards))
    write_array(folder, manifest)  # as `latent encode` does, before the manifest
    manifest.save(folder)
    return folder


# ------------------------------------------------------------------------------- the two loops, each in a process


def plain(name: str, npz: Path, epochs: int, seed: int) -> Curve:
    """The loop that people write."""
    torch.set_num_threads(os.cpu_count() or 1)
    device = pick_device()
    begun = time.perf_counter()
    torch.manual_seed(seed)
    train, val = plain_data(npz)
    model = build(name, {"dim": train.tensors[1].shape[1]}).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=PLAIN_RATE)
    curve = []
    for _ in range(epochs):
        model.train()
        for contexts, targets in DataLoader(train, PLAIN_BATCH, shuffle=True):
            optimiser.zero_grad()
            F.mse_loss(model(contexts.to(device)), targets.to(device)).backward()
            optimiser.step()
        model.eval()
        cosines = []
        with torch.no_grad():
            for contexts, targets in DataLoader(val, PLAIN_BATCH):
                cosines.append(F.cosine_similarity(model(contexts.to(device)), targets.to(device)))
        curve.append((time.perf_counter() - begun, torch.cat(cosines).mean().item()))
    return curve


def plain_data(npz: Path) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation windows, whole in memory."""
    arrays = dict(np.load(npz, allow_pickle=False))
    train, val = (
        TensorDataset(
            torch.from_numpy(arrays[f"{part}_contexts"]), torch.from_numpy(arrays[f"{part}_targets"])
        )
        for part in ("train", "val")
    )
    return train, val


def ours(name: str, vectors: Path, recipe: Recipe, seed: int) -> tuple[Curve, float]:
    """Our loop without Ray: its curve, and the seconds in the loop itself."""
    torch.set_num_threads(os.cpu_count() or 1)
    begun = time.perf_counter()
    parts = make_windows(open_vectors(vectors)).split(seed)
    torch.manual_seed(seed)
    model = build(name, {"dim": parts["train"].identity.dim}).to(pick_device())
    curve: Curve = []

    def log(row: dict[str, Any]) -> None:
        curve.append((time.perf_counter() - begun, row["val_cosine"]))

    progress = fit(model, name, parts["train"], parts["val"], recipe, seed, log=log)
    return curve, progress.seconds


def memory_of_plain(npz: Path) -> int:
    """Bytes that the process grows by when it loads the data and goes through the training windows."""
    before = psutil.Process().memory_info().rss
    train, val = plain_data(npz)
    for _ in DataLoader(train, PLAIN_BATCH, shuffle=True):
        pass
    assert len(val)
    return int(psutil.Process().memory_info().rss - before)


def memory_of_ours(vectors: Path, seed: int) -> int:
    """The same for ours."""
    before = psutil.Process().memory_info().rss
    train = make_windows(open_vectors(vectors)).split(seed)["train"]
    for indices in shuffled_windows(len(train), recipe_of(1), seed, 1):
        train.batch(indices)
    return int(psutil.Process().memory_info().rss - before)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of this module returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------------------- the whole


def measure(vectors: Path, names: list[str], epochs: int, seed: int, work: Path) -> dict[str, Any]:
    """Every figure. vectors: a folder of exactly the windows that are trained on."""
    windows = make_windows(open_vectors(vectors))
    dim = windows.identity.dim
    parts = windows.split(seed)
    recipe = recipe_of(epochs)
    npz = work / "windows.npz"
    export_npz(parts, npz, "split")
    memory = {
        "plain": in_a_process(memory_of_plain, npz),
        "ours": in_a_process(memory_of_ours, vectors, seed),
    }
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        theirs = in_a_process(plain, name, npz, epochs, seed)
        curve, bare = in_a_process(ours, name, vectors, recipe, seed)
        whole, goal = theirs[-1]
        reached = next((seconds for seconds, cosine in curve if cosine >= goal), None)
        models[name] = {
            "plain_seconds": whole,
            "plain_cosine": goal,
            "seconds_to_it": reached,
            "cosine": max(cosine for _, cosine in curve),
            "seconds": curve[-1][0],
            "loop_seconds": bare,
            "time_ratio": None if reached is None else reached / whole,
        }
        say(f"{name}: plain {whole:.1f} s to {goal:.4f}, ours {reached and round(reached, 1)} s")

    connect(None)
    alone = {}
    for name in names:
        begun = time.perf_counter()
        made = train_models(vectors, work / "alone" / name, [name], recipe, seed, fresh=True).trained[name]
        alone[name] = time.perf_counter() - begun
        models[name]["ray_loop_seconds"] = made.metrics["curve"][-1]["seconds"]
        models[name]["ray_overhead"] = models[name]["ray_loop_seconds"] / models[name]["loop_seconds"] - 1
    begun = time.perf_counter()
    together = train_models(vectors, work / "together", names, recipe, seed, fresh=True)
    wall = time.perf_counter() - begun
    assert list(together.trained) == names, together.failed

    torch.set_num_threads(os.cpu_count() or 1)
    device = pick_device()
    for name in names:
        predict = model_predictor(build(name, {"dim": dim}), device)
        one, many = (measure_latency(predict, windows.context, dim, batch) for batch in (1, 128))
        models[name] |= {"ms_a_query": one.mean_ms, "speed_up_at_128": one.vector_ms / many.vector_ms}
    ratios = [m["time_ratio"] for m in models.values()]
    return {
        "windows": {part: len(found) for part, found in parts.items()},
        "epochs": epochs,
        "seed": seed,
        "vectors": f"{len(windows.array):,} of {Manifest.load(vectors, 'vectors').source or 'a source not stated'}",
        "models": models,
        "data_bytes": memory,
        "seconds_alone": alone,
        "seconds_together": wall,
        "time_ratio": None if None in ratios else max(ratios),
        "memory_ratio": memory["ours"] / memory["plain"],
        "concurrent_ratio": wall / sum(alone.values()),
        "ray_overhead": sum(m["ray_loop_seconds"] for m in models.values())
        / sum(m["loop_seconds"] for m in models.values())
        - 1,
    }


def say(line: str) -> None:
    """For the person watching."""
    print(f"train_step: {line}", file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> Table:
    """A row an architecture."""
    rows = [
        (
            name,
            f"{m['plain_seconds']:.1f}",
            f"{m['plain_cosine']:.4f}",
            "never" if m["seconds_to_it"] is None else f"{m['seconds_to_it']:.1f}",
            f"{m['cosine']:.4f}",
            "-" if m["time_ratio"] is None else f"{m['time_ratio']:.3f}",
            f"{100 * m['ray_overhead']:.1f}",
            f"{m['ms_a_query']:.2f}",
            f"{m['speed_up_at_128']:.1f}",
        )
        for name, m in found["models"].items()
    ]
    headers = ("model", "plain s", "its cosine", "ours to it, s", "ours in the end", "ratio", "Ray adds %")
    return Table(
        f"{found['windows']['train']:,} training windows, {found['epochs']} epochs",
        (*headers, "ms a query", "speed-up at 128"),
        tuple(rows),
        f"Data: {found['data_bytes']['ours'] / 1e6:.0f} MB, plain {found['data_bytes']['plain'] / 1e6:.0f} MB. All at "
        f"once {found['seconds_together']:.0f} s, one after the other {sum(found['seconds_alone'].values()):.0f} s.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, help="folder that `latent encode` wrote; none: of the sample")
    parser.add_argument("--quick", action="store_true", help="lstm and amn, 20,000 windows, fewer epochs")
    parser.add_argument("--windows", type=int, help="windows in all, before the split (80,000)")
    parser.add_argument("--models", help=f"by comma ({', '.join(ORIGINAL)})")
    parser.add_argument("--epochs", type=int, help="of both loops (6; 3 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.models.split(",") if options.models else QUICK_MODELS if options.quick else ORIGINAL
    number = options.windows or (20_000 if options.quick else 80_000)
    epochs = options.epochs or (3 if options.quick else 6)
    load = os.getloadavg()[0]
    if load > 0.5:
        say(
            f"load average {load:.1f}: something else works on this machine, and the figures are not to be shown"
        )
    begun = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="train-step-"))
    try:
        vectors = options.vectors or sample_vectors(work)
        vectors = first_windows(vectors.absolute(), number, work / "first")
        found = measure(vectors, list(names), epochs, options.seed, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(as_text(table(found)))
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": load}
    seconds = round(time.perf_counter() - begun, 1)
    print(
        json.dumps(
            {"bench": "train_step", **found, "seconds": seconds, "machine": machine, "versions": versions()}
        )
    )


if __name__ == "__main__":
    main()
