"""Train predictors: reads the vectors of `latent encode`, writes a model record for each architecture.

    python -m jobs.train --vectors out/vectors --output out/models --model all
    ray job submit --working-dir . -- python -m jobs.train --vectors /shared/vectors --output /shared/models

One Ray Train run an architecture, all in flight at once, each with its part of the cluster's CPUs or GPUs. A
worker maps the vectors from disk; nothing but settings travels. After each epoch it saves a checkpoint (the
best three are kept, and the last one to go on from) and a line appears here. A job killed at any moment and
run again goes on where each run was; one that has trained these vectors with these settings before trains
nothing. A run whose loss is no longer a number ends with a message while the others go on, and the exit code
says so at the end.

    models/runs/<architecture>-<settings>/   Ray Train's storage: checkpoints, tensorboard/ with the curves
    models/<architecture>-<time>-<hash>/     the record; models/aliases.json points to it

Bundled sample, two cores: about a minute. See `lvm/predict/training.py` for the recipes.
"""

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import load_file, save_file

from jobs._ray import (
    GPUS_HELP,
    Address,
    PathOrUrl,
    connect,
    finish,
    nodes_with,
    path_option,
    run,
    say,
    unseen_gpu,
)
from lvm.errors import InputError, LvmError, TrainingError
from lvm.models import MODELS, Predictor, build, require_known
from lvm.predict.fitting import (
    TrainingData,
    context_mean_cosine,
    require_codec_of_models,
    require_models_folder,
    run_fingerprint,
    save_trained,
    vectors_entry,
)
from lvm.predict.record import (
    find_record,
    import_checkpoint,
    load_record,
    read_aliases,
    set_alias,
)
from lvm.predict.training import (
    FAST,
    RECIPES,
    Progress,
    Recipe,
    evaluate,
    fit,
    pick_device,
    recipe_named,
    spread_batches,
)
from lvm.storage import Location, RemotePath, local_folder_for, local_input, move_tree
from lvm.vectors.sequences import WindowSettings, make_windows, open_vectors
from lvm.vectors.shards import Manifest, file_sha256

CHECKSUMS = "sha256.json"
"""In each checkpoint, by file name: weights and an optimiser's state do not show that a bit of them turned."""

CHECKPOINTS_KEPT = 3
"""By val cosine; Ray Train keeps the latest one besides."""

RESTARTS = 2
"""Times a run goes on from its last checkpoint after its worker died (out of memory, lost node)."""

STARTS = 10
"""Times Ray Train tries for a minute to get a run's CPUs and GPUs; then they are not there, and the run fails."""

POLL_S = 0.25
"""How often Ray Train's controllers and this process look for news, in seconds; Ray's own 2 s are longer than
an epoch on the sample."""


@dataclass(frozen=True)
class TrainRun:
    """One architecture on one set of windows: all a worker needs, pickled on the way there."""

    model: str
    """Key of MODELS."""
    dim: int
    """Length of a vector, D."""
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
    """Ray Train's folder for the runs of all architectures."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that decides the weights."""
        return run_fingerprint(
            self.model, self.dim, self.vectors_fingerprint, self.windows, self.recipe, self.seed
        )

    @property
    def name(self) -> str:
        """Name of the Ray Train run: the same settings go on with the same run."""
        return f"{self.model}-{self.fingerprint}"

    @property
    def folder(self) -> Location:
        """Where Ray Train keeps this run."""
        return self.storage / self.name


@dataclass(frozen=True)
class Trained:
    """A model that is ready to use."""

    folder: Location
    """Its record."""
    metrics: dict[str, Any]
    """The record's metrics.json."""
    up_to_date: bool
    """True when it was there before."""


@dataclass
class TrainResult:
    """What `train_models` did."""

    windows: dict[str, int]
    """Windows of train, val and test."""
    trained: dict[str, Trained] = field(default_factory=dict)
    """By architecture, in the order asked for."""
    failed: dict[str, str] = field(default_factory=dict)
    """By architecture, why it has no new record."""


# ------------------------------------------------------------------------------------------------ on a worker


class Board:
    """What the runs have to say, and how many are still training. A Ray actor; it uses no CPU."""

    def __init__(self, names: Sequence[str]) -> None:
        self.training = set(names)
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def post(self, model: str, row: dict[str, Any]) -> int:
        """Keep a line for the driver; the number of runs still training comes back."""
        self.lines.append((model, row))
        return len(self.training)

    def in_flight(self) -> int:
        """The number of runs still training."""
        return len(self.training)

    def leave(self, model: str) -> None:
        """This run trains no longer."""
        self.training.discard(model)

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train one architecture; what comes back is the run's `progress`, or its `refusal` in words.

    A refusal comes back as text, not as an exception: Ray would start the run again, and it would fail again.
    """
    import ray

    this: TrainRun = config["run"]
    try:
        return {"progress": _train(this, config["board"], config["threads"], config["cores"])}
    except LvmError as err:
        return {"refusal": str(err)}
    finally:
        ray.get(config["board"].leave.remote(this.model))


def _train(this: TrainRun, board: Any, threads: int, cores: int | None) -> dict[str, Any]:
    import ray
    import torch
    from torch.utils.tensorboard import SummaryWriter

    def share_cores(num_training: int) -> None:
        """On one machine, threads of runs that have ended go to those still training."""
        torch.set_num_threads(threads if cores is None else max(threads, cores // max(1, num_training)))

    array = open_vectors(this.vectors)
    if array.fingerprint != this.vectors_fingerprint:
        raise InputError(f"{this.vectors} changed while this job ran; run `latent train` again")
    parts = make_windows(array, this.windows).split(this.seed)
    torch.manual_seed(this.seed)
    model = build(this.model, {"dim": this.dim})
    progress: Progress | None = None
    optimiser_state: dict[str, Any] | None = None
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            model.load_state_dict(load_file(Path(folder, "model.safetensors")))
            # Absent where the run had its record already: then no step is left to take.
            if (moments := Path(folder, "optimiser.pt")).exists():
                optimiser_state = torch.load(moments, map_location="cpu", weights_only=True)
            progress = Progress(**json.loads(Path(folder, "progress.json").read_text()))
    start = progress.epoch if progress is not None else 0
    if checkpoint is not None:
        ray.get(board.post.remote(this.model, {"resumed": start}))
    share_cores(ray.get(board.in_flight.remote()))
    device = pick_device()
    model.to(device)
    if note := unseen_gpu():
        ray.get(board.post.remote(this.model, {"note": note}))
    events = ExitStack()
    curves = events.enter_context(local_folder_for(this.folder / "tensorboard"))
    writer = SummaryWriter(curves, purge_step=start + 1)

    def log(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "epoch":
                writer.add_scalar(key, value, row["epoch"])
        writer.flush()
        share_cores(ray.get(board.post.remote(this.model, {**row, "device": str(device)})))

    def save(model: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            save_file(state, Path(folder, "model.safetensors"))
            torch.save(optimiser.state_dict(), Path(folder, "optimiser.pt"))
            Path(folder, "progress.json").write_text(json.dumps(progress.to_dict()))
            sums = {name: file_sha256(Path(folder, name)) for name in os.listdir(folder)}
            Path(folder, CHECKSUMS).write_text(json.dumps(sums))
            row = progress.curve[-1]
            ray.train.report(
                {"epoch": row["epoch"], "val_cosine": row["val_cosine"]},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
            )

    try:
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
    finally:
        writer.close()
        events.close()
    return {**progress.to_dict(), "device": str(device)}


# ------------------------------------------------------------------------------------------- on the driver


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


def set_aside_if_broken(this: TrainRun) -> None:
    """Move a run's folder away when Ray Train could not go on from it.

    Ray Train writes its list of checkpoints in place, so a kill in that very moment leaves half a file; and a
    checkpoint itself may have been damaged. The run then starts anew; what it had is kept beside it.
    """
    import ray.train
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    if not (this.folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).exists():
        return
    try:
        found = ray.train.Result.from_path(*_for_ray(this.folder).values())
        # The latest is as a rule among the best: each folder is read once.
        kept = (found.checkpoint, *(c for c, _ in found.best_checkpoints))
        for checkpoint in {c.path: c for c in kept}.values():
            require_whole(checkpoint)
    except Exception as err:
        # Whatever it is, Ray Train would fail with the same on the way in, and say less about what to do.
        aside = this.folder.with_name(f"{this.folder.name}.broken-{time.time_ns()}")
        move_tree(this.folder, aside)
        say(
            f"train: {this.model}: its checkpoints cannot be read ({str(err).splitlines()[0]}); it starts "
            f"anew, what there was is in {aside}"
        )


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


def _for_ray(folder: Location) -> dict[str, Any]:
    """Where Ray Train is to keep runs, in its own words."""
    if isinstance(folder, RemotePath):
        return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder), "storage_filesystem": None}


def train_with_ray(runs: Sequence[TrainRun], gpus: int | None = None) -> Iterator[tuple[TrainRun, Any]]:
    """Train all at once; each comes back as soon as it ends, with its `ray.train.Result` or its exception.
    Raises InputError when `gpus` GPUs do not come.

    Each `TrainTrainer.fit` blocks, so each has a thread of its own in this process; the work is done by the
    workers Ray starts for it.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    nodes = nodes_with(gpus)
    resources, threads, cores = plan_resources(nodes, len(runs))
    # Read by Ray Train's controllers, which inherit them from this process.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    if len(nodes) == 1:
        # It watches for nodes that are about to be taken away; one process for each run less.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    board: Any = ray.remote(num_cpus=0)(Board).remote([r.model for r in runs])
    ended: list[tuple[TrainRun, Any]] = []

    def fit(this: TrainRun) -> None:
        try:
            trainer = TorchTrainer(
                train_loop_per_worker,
                # A run is one worker, which has nobody to talk to; NCCL would not start where torch sees no GPU.
                torch_config=TorchConfig(backend="gloo"),
                train_loop_config={"run": this, "board": board, "threads": threads, "cores": cores},
                scaling_config=ScalingConfig(
                    num_workers=1, use_gpu="GPU" in resources, resources_per_worker=resources
                ),
                run_config=RunConfig(
                    name=this.name,
                    **_for_ray(this.storage),
                    checkpoint_config=CheckpointConfig(
                        num_to_keep=CHECKPOINTS_KEPT, checkpoint_score_attribute="val_cosine"
                    ),
                    failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=STARTS),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            )
            ended.append((this, trainer.fit()))
        except Exception as err:
            # What a worker or Ray itself dies of ends this run alone; the caller says so.
            ended.append((this, err))
            ray.get(board.leave.remote(this.model))

    # Daemon threads: Ctrl-C ends this process, and with it the workers, without waiting for them.
    for this in runs:
        threading.Thread(target=fit, args=(this,), name=this.name, daemon=True).start()
    waiting = len(runs)
    while waiting:
        time.sleep(POLL_S)
        # Taken before the lines are: a run posts its last line before it ends.
        done, ended[:] = ended[:], []
        for model, row in ray.get(board.take.remote()):
            _say_row(model, row)
        for this, outcome in done:
            waiting -= 1
            yield this, outcome


def _say_row(model: str, row: Mapping[str, Any]) -> None:
    if "note" in row:
        say(f"train: {model}: {row['note']}")
        return
    if "resumed" in row:
        say(f"train: {model:<11} goes on after epoch {row['resumed']}")
        return
    trained = f"train loss {row['train_loss']:.4f}" if "train_loss" in row else "start            "
    say(
        f"train: {model:<11} epoch {row['epoch']:>2}  {trained}  val loss {row['val_loss']:.4f}  "
        f"val cosine {row['val_cosine']:.4f}  {row['seconds']:.0f} s"
    )


def publish_run(
    this: TrainRun,
    result: Any,
    models: Location,
    data: TrainingData,
) -> Trained:
    """Make the record of a finished run from its best checkpoint, and move the alias to it.

    Raises TrainingError when the run refused.
    """
    if "refusal" in result.return_value:
        raise TrainingError(result.return_value["refusal"])
    progress = result.return_value["progress"]
    device = progress.pop("device")
    checkpoint, best = max(result.best_checkpoints, key=lambda c: (c[1]["val_cosine"], -c[1]["epoch"]))
    model = build(this.model, {"dim": this.dim})
    with checkpoint.as_directory() as folder:
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
    row = next(r for r in progress["curve"] if r["epoch"] == best["epoch"])
    folder, metrics = save_trained(
        models, this.model, model, data, this.recipe, Progress(**progress), row, device
    )
    set_alias(models, this.model, folder)
    # What only going on needs is two thirds of a checkpoint; the best three weights stay.
    for optimiser in this.folder.glob("*/optimiser.pt"):
        optimiser.unlink()
    return Trained(folder, metrics, up_to_date=False)


def train_models(
    vectors: Location,
    models: Location,
    names: Sequence[str],
    recipe: Recipe,
    seed: int = 0,
    windows: WindowSettings | None = None,
    allow_non_sequential: str | None = None,
    address: str | None = None,
    gpus: int | None = None,
) -> TrainResult:
    """Bring `models` to hold a record of each architecture, trained on `vectors` in this way.

    A run that fails is listed in `failed`; the others are trained and saved. gpus: how many to wait for; None for those
    there are. Raises InputError before any training when the vectors are not finished, not sequential, or too few to
    split, or when the cluster does not come to have what is asked for, and IdentityError when
    `models` holds models of another codec.
    """
    for name in names:
        require_known(name)
    vectors, models = vectors.resolve(), models.resolve()
    require_models_folder(models)
    array = open_vectors(vectors)
    require_codec_of_models(models, array)
    data = TrainingData.of(array, windows, seed, allow_non_sequential)
    result = TrainResult(data.num_windows)

    runs = [
        TrainRun(n, data.dim, vectors, array.fingerprint, data.settings, recipe, seed, models / "runs")
        for n in names
    ]
    pending = []
    for this in runs:
        found = find_record(models, this.model, run=this.fingerprint)
        if found is None:
            pending.append(this)
            continue
        if read_aliases(models).get(this.model) != found.name:
            set_alias(models, this.model, found)
        result.trained[this.model] = Trained(found, load_record(models, found.name).metrics, up_to_date=True)
        say(f"train: {this.model} is up to date ({found.name})")
    if pending:
        context_mean = context_mean_cosine(data.parts["val"], recipe.max_val_windows)
        say(
            f"train: {', '.join(r.model for r in pending)} on {result.windows['train']:,} windows of "
            f"{data.settings.context} vectors, recipe {recipe.name}; context mean's val cosine {context_mean:.4f}"
        )
        connect(address)
        for this in pending:
            set_aside_if_broken(this)
        for this, outcome in train_with_ray(pending, gpus):
            try:
                if isinstance(outcome, Exception):
                    raise TrainingError(f"{this.model}: the run failed: {_first_line(outcome)}") from outcome
                made = publish_run(this, outcome, models, data)
            except LvmError as err:
                result.failed[this.model] = str(err)
                say(f"train: {err}")
                continue
            result.trained[this.model] = made
            say(
                f"train: {this.model:<11} done: val cosine {made.metrics['val_cosine']:.4f} at epoch "
                f"{made.metrics['best_epoch']} ({made.metrics['stopped']}); {made.folder.name}"
            )
    result.trained = {n: result.trained[n] for n in names if n in result.trained}
    return result


def _first_line(error: BaseException) -> str:
    """The cause of a failed run in one line: the worker's own exception where Ray hands it on."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


def import_model(checkpoint: Location, vectors: Location, models: Location, seed: int) -> tuple[str, Trained]:
    """Make a record of a checkpoint of the original system, scored on `vectors`, whose codec it gets."""
    vectors, models = vectors.resolve(), models.resolve()
    require_models_folder(models)
    manifest = Manifest.load(vectors, "vectors")
    array = open_vectors(vectors)
    require_codec_of_models(models, array)
    settings = WindowSettings()
    val = make_windows(array, settings).split(seed)["val"]

    def score(model: Predictor) -> dict[str, Any]:
        scored = evaluate(model, spread_batches(val, FAST.max_val_windows))
        return {
            "val_cosine": scored.cosine,
            "val_loss": scored.loss,
            "context_mean_val_cosine": context_mean_cosine(val, FAST.max_val_windows),
        }

    config = {"seed": seed, "windows": asdict(settings), "vectors": vectors_entry(vectors, manifest)}
    with local_input(checkpoint) as file:
        name, folder = import_checkpoint(file, models, array.identity, config, score)
    set_alias(models, name, folder)
    return name, Trained(folder, load_record(models, folder.name).metrics, up_to_date=False)


# --------------------------------------------------------------------------------------------------- command


def main(
    vectors: Annotated[PathOrUrl, path_option("Folder that `latent encode` wrote.")],
    output: Annotated[PathOrUrl, path_option("Folder for the model records; those in it stay.")],
    model: Annotated[
        str, typer.Option(help=f"Of {', '.join(MODELS)}: one, several by comma, or all.")
    ] = "all",
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "fast",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs, instead of the recipe's.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Longest training, in minutes, instead of the recipe's.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Vectors a predictor reads before the next.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the split by article and of training.")] = 0,
    allow_non_sequential: Annotated[
        str | None,
        typer.Option(help="The sentence that lets text without an order train; the refusal names it."),
    ] = None,
    import_checkpoint: Annotated[
        PathOrUrl | None,
        path_option('Train nothing; make a record of this original checkpoint {"model_state_dict": …}.'),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help=GPUS_HELP)] = None,
    address: Address = None,
) -> None:
    """Train predictors, all at once; a second run on the same vectors trains nothing."""
    started = time.perf_counter()
    if import_checkpoint is not None:
        name, made = import_model(import_checkpoint, vectors, output, seed)
        result = TrainResult({}, {name: made})
        say(f"train: imported {name}: val cosine {made.metrics['val_cosine']:.4f}; {made.folder.name}")
    else:
        chosen = recipe_named(recipe)
        if epochs is not None:
            chosen = replace(chosen, epochs=epochs)
        if max_minutes is not None:
            chosen = replace(chosen, max_minutes=max_minutes)
        names = list(MODELS) if model == "all" else [n.strip() for n in model.split(",")]
        result = train_models(
            vectors,
            output,
            list(dict.fromkeys(names)),
            chosen,
            seed,
            WindowSettings(context=context),
            allow_non_sequential=allow_non_sequential,
            address=address,
            gpus=gpus,
        )
    if result.failed:
        saved = ", ".join(result.trained) or "none"
        raise TrainingError(
            f"{len(result.failed)} of {len(result.failed) + len(result.trained)} models failed, see above: "
            f"{', '.join(result.failed)}. Saved and ready: {saved}."
        )
    seconds = time.perf_counter() - started
    new = {n: t for n, t in result.trained.items() if not t.up_to_date}
    seen = sum(t.metrics.get("epochs", 0) * result.windows.get("train", 0) for t in new.values())
    finish(
        {
            "stage": "train",
            "rows": result.windows.get("train", 0),
            "windows": result.windows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(seen / max(seconds, 1e-9), 1),
            "paths": [str(t.folder) for t in result.trained.values()],
            "up_to_date": not new,
            "redone": len(new),
            "models": {
                n: {
                    "folder": t.folder.name,
                    "up_to_date": t.up_to_date,
                    **{
                        k: t.metrics.get(k)
                        for k in ("val_cosine", "context_mean_val_cosine", "epochs", "seconds")
                    },
                }
                for n, t in result.trained.items()
            },
        }
    )


if __name__ == "__main__":
    run(main)
