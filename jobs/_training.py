"""One training run, as `latent train` and `latent sweep` make it: from settings to checkpoints to a model record."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from jobs._ray import unseen_gpu
from lvm.codec.identity import require_same_codec
from lvm.corpus.coherence import Coherence, require_sequential
from lvm.errors import InputError, OutputError
from lvm.models import CONFIGS, Architecture, build
from lvm.predict.record import load_record, read_aliases, save_record, set_alias
from lvm.predict.training import Progress, Recipe, fit, pick_device, spread_batches
from lvm.storage import Location, RemotePath, local_folder, local_folder_for
from lvm.vectors.sequences import VectorArray, Windows, WindowSettings, make_windows, open_vectors
from lvm.vectors.shards import Manifest, file_sha256, fingerprint

TRAINING_VERSION = 1
"""Raised when the same settings give other weights than before, so that models are trained anew."""

CHECKSUMS = "sha256.json"
"""In each checkpoint, by file name: weights and an optimiser's state do not show that a bit of them turned."""

RUNS_A_CPU, RUNS_A_GPU = 2, 8
"""Most runs that share a processor core, and a GPU. More would take each other's memory and finish no sooner: the rest
waits for its turn."""


@dataclass(frozen=True)
class TrainingData:
    """What the driver knows of the vectors; for the records."""

    manifest: Manifest
    """Of the encode job."""
    windows: dict[str, int]
    """Windows of train, val and test."""
    coherence: Coherence
    """How sequential the text was found to be."""
    context_mean: float
    """Mean cosine of the context's mean and the truth, on the windows validated on."""


@dataclass(frozen=True)
class TrainRun:
    """One architecture on one set of windows: all a worker needs, pickled on the way there."""

    model: str
    """Key of MODELS."""
    vectors: Location
    """Folder of the encode job."""
    vectors_fingerprint: str
    """Of that folder's manifest."""
    windows: WindowSettings
    """Which windows are trained on."""
    recipe: Recipe
    """How."""
    seed: int
    """Of the split by article, the first weights, the order of batches and the dropout."""
    storage: Location
    """Ray's folder for the runs of all architectures."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture's config that differ from its default."""
    reach: int | None = None
    """Validation windows are those that have so many context vectors, of which the model reads the last ones: so runs
    of different context lengths are judged on the same targets. None: of as many as the model reads."""
    layers_from: Location | None = None
    """Folder of a GPT-2 checkpoint that `gpt2` starts from."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that decides the weights."""
        recipe = self.recipe.to_dict()
        # Another architecture's rate decides nothing here.
        recipe["learning_rates"] = {self.model: recipe["learning_rates"][self.model]}
        parts = {
            "version": TRAINING_VERSION,
            "model": self.model,
            "sizes": asdict(CONFIGS[self.model](**self.sizes)),
            "vectors": self.vectors_fingerprint,
            "windows": asdict(self.windows),
            "recipe": recipe,
            "seed": self.seed,
        }
        if self.reach is not None:
            parts["reach"] = self.reach
        if self.layers_from is not None:
            parts["layers_from"] = str(self.layers_from)
        return fingerprint(parts)

    @property
    def name(self) -> str:
        """Name of the Ray Train run: the same settings go on with the same run."""
        return f"{self.model}-{self.fingerprint}"

    @property
    def folder(self) -> Location:
        """Where Ray Train keeps this run."""
        return self.storage / self.name

    def build(self) -> Architecture:
        """The untrained model; its first weights are torch's random ones, or of `layers_from`."""
        model: Any = build(self.model, dict(self.sizes))
        if self.layers_from is not None:
            model.load_layers(local_folder(self.layers_from))
        return model  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Trained:
    """A model that is ready to use."""

    folder: Location
    """Its record."""
    metrics: dict[str, Any]
    """The record's metrics.json."""
    up_to_date: bool
    """True when it was there before."""


# ------------------------------------------------------------------------------------------------ on a worker


def train_run(
    this: TrainRun,
    checkpoint: Path | None,
    keep: Callable[[Path, dict[str, Any]], None],
    tell: Callable[[dict[str, Any]], None],
    events: Location,
) -> dict[str, Any]:
    """Train to the end, from a checkpoint where there is one; `Progress.to_dict()` with the `device` comes back.

    keep: is given the folder of a checkpoint and the curve's new entry after each epoch; the folder goes when it
    returns. tell: takes what a person may want to know: the curve's entries, `resumed`, `note`. events: folder of
    TensorBoard's curves. Raises InputError when the vectors changed or do not suffice, TrainingError when the loss is
    no longer a number.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    parts = windows_of(this)
    torch.manual_seed(this.seed)
    model = this.build()
    progress: Progress | None = None
    optimiser_state: dict[str, Any] | None = None
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        # Absent where the run had its record already: then no step is left to take.
        if (moments := checkpoint / "optimiser.pt").exists():
            optimiser_state = torch.load(moments, map_location="cpu", weights_only=True)
        progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    start = progress.epoch if progress is not None else 0
    if checkpoint is not None:
        tell({"resumed": start})
    device = pick_device()
    model.to(device)
    if note := unseen_gpu():
        tell({"note": note})

    def save(model: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            save_file(state, folder / "model.safetensors")
            torch.save(optimiser.state_dict(), folder / "optimiser.pt")
            (folder / "progress.json").write_text(json.dumps(progress.to_dict()))
            sums = {name: file_sha256(folder / name) for name in os.listdir(folder)}
            (folder / CHECKSUMS).write_text(json.dumps(sums))
            keep(folder, progress.curve[-1])

    with ExitStack() as opened:
        writer = SummaryWriter(opened.enter_context(local_folder_for(events)), purge_step=start + 1)
        opened.callback(writer.close)

        def log(row: dict[str, Any]) -> None:
            for key, value in row.items():
                if key != "epoch":
                    writer.add_scalar(key, value, row["epoch"])
            writer.flush()
            tell({**row, "device": str(device)})

        progress = fit(
            model,
            this.model,
            parts["train"],
            parts["val"],
            this.recipe,
            this.seed,
            progress=progress,
            optimiser_state=optimiser_state,
            save=save,
            log=log,
        )
    return {**progress.to_dict(), "device": str(device)}


def windows_of(this: TrainRun) -> dict[str, Windows]:
    """Windows of train, val and test. Raises InputError when the vectors are others than the run was planned with."""
    array = open_vectors(this.vectors)
    if array.fingerprint != this.vectors_fingerprint:
        raise InputError(f"{this.vectors} changed while this job ran; run it again")
    parts = make_windows(array, this.windows).split(this.seed)
    if this.reach is not None:
        longer = make_windows(array, replace(this.windows, context=this.reach)).split(this.seed)
        parts["val"] = longer["val"].last(this.windows.context)
    return parts


# ------------------------------------------------------------------------------------------- on the driver


def runs_at_once(nodes: Sequence[Mapping[str, float]], num_runs: int, runs_a_cpu: int = RUNS_A_CPU) -> int:
    """How many of `num_runs` runs are in flight together. nodes: Ray resources of each live node."""
    with_gpu = [n for n in nodes if n.get("GPU")]
    room = runs_a_cpu * sum(int(n.get("CPU", 0.0)) for n in with_gpu or nodes)
    if with_gpu:
        room = min(room, RUNS_A_GPU * sum(int(n["GPU"]) for n in with_gpu))
    return max(1, min(num_runs, room))


def plan_resources(
    nodes: Sequence[Mapping[str, float]], num_runs: int
) -> tuple[dict[str, float], int, int | None]:
    """What each of `num_runs` runs gets, so that all fit at once: Ray resources, threads, cores to share.

    nodes: Ray resources of each live node. GPUs are shared where there are fewer than runs: the predictors
    are small, and one alone leaves most of a GPU idle. The cores to share are those of a cluster of one
    machine, None on more: there a run keeps to its own threads.
    """
    with_gpu = [n for n in nodes if n.get("GPU")]
    # With GPUs each run needs a part of one, so its CPUs have to be found on the same node.
    usable = with_gpu or nodes
    cpus = _fitting([n.get("CPU", 0.0) for n in usable], num_runs, most=math.inf)
    resources = {"CPU": cpus}
    if with_gpu:
        resources["GPU"] = _fitting([n["GPU"] for n in with_gpu], num_runs, most=1.0)
    cores = int(nodes[0].get("CPU", 1.0)) if len(nodes) == 1 else None
    return resources, max(1, int(cpus)), cores


def _fitting(free: Sequence[float], num_runs: int, most: float) -> float:
    """The largest part, whole or one over a whole number, of which `num_runs` fit on nodes with this much."""
    for whole in range(int(min(max(free), most)), 0, -1):
        if sum(int(f // whole) for f in free) >= num_runs:
            return float(whole)
    units = max(1, sum(int(f) for f in free))
    sharers = math.ceil(num_runs / units)
    return math.floor(10_000 / sharers) / 10_000  # Ray counts in ten-thousandths


def for_ray(folder: Location) -> dict[str, Any]:
    """Where Ray is to keep runs, in its own words."""
    if isinstance(folder, RemotePath):
        return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder), "storage_filesystem": None}


def require_whole(checkpoint: Any) -> None:
    """Return when every file of a checkpoint is as it was written, else raise InputError naming one.

    Those on object storage are taken as they are: it has checksums of its own, and they would travel for this alone.
    """
    folder = Path(checkpoint.path)
    if not folder.is_dir() or not (folder / CHECKSUMS).exists():
        return
    for name, sha256 in json.loads((folder / CHECKSUMS).read_text()).items():
        if name == "optimiser.pt" and not (folder / name).exists():
            continue  # it goes when the run has its record
        if (got := file_sha256(folder / name)) != sha256:
            raise InputError(f"{folder / name} has SHA-256 {got[:16]}…, expected {sha256[:16]}…")


def publish_run(
    this: TrainRun,
    progress: dict[str, Any],
    checkpoints: list[tuple[Any, dict[str, Any]]],
    models: Location,
    data: TrainingData,
    alias: str,
) -> Trained:
    """Make the record of a finished run from its best checkpoint, and move the alias to it.

    progress: what `train_run` gave; checkpoints: Ray's best ones with what was reported with each.
    """
    progress = dict(progress)
    device = progress.pop("device")
    checkpoint, best = max(checkpoints, key=lambda c: (c[1]["val_cosine"], -c[1]["epoch"]))
    model = build(this.model, dict(this.sizes))
    with checkpoint.as_directory() as folder:
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        rows = json.loads(Path(folder, "progress.json").read_text())["curve"]
    best_row = next(r for r in rows if r["epoch"] == best["epoch"])
    recipe, manifest, sizes = this.recipe, data.manifest, data.windows
    metrics = {
        "val_cosine": best_row["val_cosine"],
        "val_loss": best_row["val_loss"],
        "context_mean_val_cosine": data.context_mean,
        "start_val_cosine": progress["curve"][0]["val_cosine"],
        "best_epoch": best_row["epoch"],
        "epochs": progress["epoch"],
        "seconds": round(progress["seconds"], 1),
        "stopped": progress["stopped"],
        "train_windows": sizes["train"],
        "val_windows": min(sizes["val"], recipe.max_val_windows),
        "test_windows": sizes["test"],
        "curve": progress["curve"],
    }
    share = recipe.loss.info_nce_share
    if hasattr(model, "loss"):
        loss = f"the architecture's own, see lvm/models/{this.model.replace('-', '_')}.py"
    else:
        loss = "squared distance of unit vectors (MSE)" + (
            f", with InfoNCE at {share:g} of its gradient norm" if share else ""
        )
    start = ["random"]
    if this.layers_from is not None:
        start = [f"layers of {this.layers_from}"]
    if recipe.solved_start:
        start = [*start[this.layers_from is None :], "inputs along the principal directions"]
        if getattr(model, "solves_output", True):
            start.append("output layer by ridge regression")
    batch = recipe.batch_size(sizes["train"])
    peak = recipe.peak_rate(this.model, sizes["train"])
    config = {
        "run": this.fingerprint,
        "seed": this.seed,
        "windows": asdict(this.windows),
        "vectors": vectors_entry(this.vectors, manifest),
        "coherence": data.coherence.to_dict(),
        "recipe": recipe.to_dict(),
        "device": device,
        **({} if this.reach is None else {"reach": this.reach}),
    }
    provenance = {
        "Data source": f"{manifest.source or 'not stated'} (licence: {manifest.licence or 'not stated'})",
        "Vectors": f"{manifest.rows:,}, fingerprint {this.vectors_fingerprint}",
        "Sequences": f"{sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test windows of "
        f"{this.windows.context} vectors and the next, split by article",
        "Loss": loss,
        "Start": ", ".join(start),
        "Optimiser": f"{recipe.optimiser}, peak learning rate {peak:.2g}, batch {batch}, "
        f"recipe {recipe.name}",
        "Epochs": f"{progress['epoch']} trained ({progress['stopped']}); these are the weights of epoch "
        f"{best_row['epoch']}",
        "Seed": str(this.seed),
        "Device": device,
    }
    issues = []
    if best_row["val_cosine"] <= data.context_mean:
        issues.append(
            "On validation articles it does not beat the mean of its context (cosine "
            f"{best_row['val_cosine']:.4f} against {data.context_mean:.4f})."
        )
    if data.coherence.fault is not None:
        issues.append(f"Trained on text the coherence test refuses: {data.coherence.fault}.")
    folder = save_record(
        models, this.model, model, manifest.identity, config, metrics, provenance, tuple(issues)
    )
    set_alias(models, alias, folder)
    return Trained(folder, metrics, up_to_date=False)


def vectors_entry(vectors: Location, manifest: Manifest) -> dict[str, Any]:
    """What config.json says of the vectors a model was trained or scored on."""
    return {
        "directory": str(vectors),
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "source": manifest.source,
        "licence": manifest.licence,
    }


def require_models_folder(models: Location) -> None:
    """Return when `models` is or can become a folder of records, else raise OutputError."""
    if models.exists() and not models.is_dir():
        raise OutputError(f"--output {models} is a file, expected a folder; choose another --output")
    if (models / "manifest.json").exists():
        kind = Manifest.load(models).kind
        raise OutputError(
            f"{models} holds {kind}, expected models or an empty folder; choose another --output"
        )


def require_codec_of_models(models: Location, array: VectorArray) -> None:
    """Return when every alias in `models` is a model of the vectors' codec, else raise IdentityError."""
    for alias, folder in read_aliases(models).items():
        if (models / folder).is_dir():
            identity = load_record(models, folder).identity
            require_same_codec(
                array.identity, identity, str(array.directory), f"model {alias!r} in {models} ({folder})"
            )


def check_sequential(array: VectorArray, source: str, allow_non_sequential: str | None) -> Coherence:
    """How sequential the text is; raises InputError where it is not and the user does not insist."""
    firsts = np.flatnonzero(np.diff(array.doc_ids, prepend=-1))
    names = sorted({source, *array.sources(firsts)})
    return require_sequential(array.vectors, array.doc_ids, array.positions, names, allow_non_sequential)


def context_mean_cosine(val: Windows, most: int) -> float:
    """Mean cosine between the context's mean and the truth, on the windows training validates on."""
    total, count = 0.0, 0
    for contexts, targets in spread_batches(val, most):
        mean = contexts.mean(axis=1)
        norms = np.linalg.norm(mean, axis=1) * np.linalg.norm(targets, axis=1)
        total += float((np.einsum("bd,bd->b", mean, targets) / np.maximum(norms, 1e-12)).sum())
        count += len(targets)
    return total / count
