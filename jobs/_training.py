"""Shared by the training jobs: dividing the cluster among runs, training on one worker, turning a run into a record."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from jobs._ray import echo
from lvm.errors import OutputError
from lvm.models import build
from lvm.predict.fitting import TrainingData, save_trained
from lvm.predict.runs import WEIGHTS, Outcome, TrainRun
from lvm.storage import Location, RemotePath

RUNS_PER_CPU, RUNS_PER_GPU = 2, 8
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
    nodes: Sequence[Mapping[str, float]], num_runs: int, runs_per_cpu: int = RUNS_PER_CPU, workers: int = 1
) -> int:
    """How many of `num_runs` runs to train at once, with `workers` workers each. nodes: Ray resources of live nodes."""
    with_gpu = [n for n in nodes if n.get("GPU")]
    room = runs_per_cpu * sum(int(n.get("CPU", 0.0)) for n in with_gpu or nodes)
    if with_gpu:
        room = min(room, RUNS_PER_GPU * sum(int(n["GPU"]) for n in with_gpu))
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


def output_on_disk(output: Location) -> Path:
    """The absolute folder, created if missing. Raises OutputError for object storage."""
    if isinstance(output, RemotePath):
        raise OutputError(
            f"--output {output} is on object storage, expected a folder on a disk: training updates its files "
            "continually. Choose a disk that the workers share, and copy the folder when it is done."
        )
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    return output


def train_on_one_worker(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    name: str,
    minutes: float,
    max_cpus: int | None = None,
) -> None:
    """Run a training loop on one Ray Train worker with a GPU, or else `max_cpus` CPUs (None: one).

    config: its arguments, among them `output`, the folder of the loop's own checkpoint.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    output, resources, where = config["output"], None, "CPUs"
    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if use_gpu:
        where = "a GPU"
    elif max_cpus is not None:
        cpus = max(1, int(min(max_cpus, ray.available_resources().get("CPU", 1))))
        resources, where = {"CPU": cpus}, f"{cpus} CPUs"
    echo(f"training for {minutes:g} minutes on {where}; curve in {output / 'curve.jsonl'}")
    # A restarted worker resumes from the checkpoint in `output`.
    failures = FailureConfig(max_failures=2)
    TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(name=name, storage_path=str(output / "ray"), failure_config=failures),
    ).fit()


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
