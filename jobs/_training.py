"""Shared by `latent train` and `latent sweep`: dividing the cluster among runs, and turning a run into a record."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lvm.models import build
from lvm.predict.fitting import TrainingData, save_trained
from lvm.predict.runs import WEIGHTS, Outcome, TrainRun
from lvm.storage import Location, RemotePath

RUNS_A_CPU, RUNS_A_GPU = 2, 8
"""Maximum runs that share a CPU core, and a GPU. More would compete for memory and finish no sooner; the rest queue."""


@dataclass(frozen=True)
class Trained:
    """A trained model's record."""

    folder: Location
    """Folder of the record."""
    metrics: dict[str, Any]
    """The record's metrics.json."""
    up_to_date: bool
    """True if it existed before."""


def runs_at_once(
    nodes: Sequence[Mapping[str, float]], num_runs: int, runs_a_cpu: int = RUNS_A_CPU, workers: int = 1
) -> int:
    """How many of `num_runs` runs to train at once, with `workers` workers each. nodes: Ray resources of live nodes."""
    with_gpu = [n for n in nodes if n.get("GPU")]
    room = runs_a_cpu * sum(int(n.get("CPU", 0.0)) for n in with_gpu or nodes)
    if with_gpu:
        room = min(room, RUNS_A_GPU * sum(int(n["GPU"]) for n in with_gpu))
    return max(1, min(num_runs, room // workers))


def plan_resources(
    nodes: Sequence[Mapping[str, float]], num_runs: int
) -> tuple[dict[str, float], int, int | None]:
    """Ray resources and threads of each of `num_runs` runs, so that all fit at once; and the cores they share.

    nodes: Ray resources of each live node. If there are fewer GPUs than runs, runs share them: the predictors are
    small, and one alone leaves most of a GPU idle. The shared cores are those of a single-node cluster; None on
    several nodes, where each run keeps to its own threads.
    """
    with_gpu = [n for n in nodes if n.get("GPU")]
    # With GPUs each run needs a share of one, so its CPUs must be on the same node.
    usable = with_gpu or nodes
    cpus = _fitting([n.get("CPU", 0.0) for n in usable], num_runs, most=math.inf)
    resources = {"CPU": cpus}
    if with_gpu:
        resources["GPU"] = _fitting([n["GPU"] for n in with_gpu], num_runs, most=1.0)
    cores = int(nodes[0].get("CPU", 1.0)) if len(nodes) == 1 else None
    return resources, max(1, int(cpus)), cores


def _fitting(free: Sequence[float], num_runs: int, most: float) -> float:
    """The largest share (n or 1/n) of which `num_runs` fit on nodes with these free amounts."""
    for whole in range(int(min(max(free), most)), 0, -1):
        if sum(int(f // whole) for f in free) >= num_runs:
            return float(whole)
    units = max(1, sum(int(f) for f in free))
    sharers = math.ceil(num_runs / units)
    return math.floor(10_000 / sharers) / 10_000  # Ray counts in ten-thousandths


def for_ray(folder: Location) -> dict[str, Any]:
    """Ray's `storage_path` and `storage_filesystem` arguments for a folder."""
    if isinstance(folder, RemotePath):
        return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder), "storage_filesystem": None}


def publish_run(
    this: TrainRun,
    done: Outcome,
    checkpoints: Sequence[tuple[Any, Mapping[str, Any]]],
    models: Location,
    data: TrainingData,
) -> Trained:
    """Make the record of a finished run from its best checkpoint; aliases are unchanged.

    checkpoints: Ray's best checkpoints with the metrics reported for each.
    """
    checkpoint, best = max(checkpoints, key=lambda c: (c[1]["val_cosine"], -c[1]["epoch"]))
    network = build(this.model, dict(this.sizes), tmd=this.prototypes is not None)
    with checkpoint.as_directory() as folder:
        network.load_state_dict(load_file(Path(folder, WEIGHTS)))
        curve = json.loads(Path(folder, "progress.json").read_text())["curve"]
    row = next(r for r in curve if r["epoch"] == best["epoch"])
    record, metrics = save_trained(models, this, network, data, done, row)
    return Trained(record, metrics, up_to_date=False)
