"""Train predictors: reads the vectors of `latent encode`, writes a model record for each architecture.

    python -m jobs.train --vectors out/vectors --output out/models --model all --ensemble 3
    ray job submit --working-dir . -- python -m jobs.train --vectors /shared/vectors --output /shared/models

One Ray Train run an architecture, as many in flight at once as the cluster has room for, each with its part of the
CPUs or GPUs; the others in their turn. A worker maps the vectors from disk; nothing but settings travels. After each
epoch it saves a checkpoint (the best three are kept, and the last one to go on from) and a line appears here. A job
killed at any moment and run again goes on where each run was; one that has trained these vectors with these settings
before trains nothing. A run whose loss is no longer a number ends with a message while the others go on, and the exit
code says so at the end.

    models/runs/<architecture>-<settings>/   Ray Train's storage: checkpoints, tensorboard/ with the curves
    models/<architecture>-<time>-<hash>/     the record; models/aliases.json points to it

Bundled sample, the four original architectures, two cores: about a minute. See `lvm/predict/training.py` for the
recipes.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs._ray import (
    GPUS_HELP,
    Address,
    PathOrUrl,
    connect,
    echo,
    finish,
    guarded,
    nodes_with,
    path_option,
    refusal_in,
    run,
    unseen_gpu,
)
from jobs._training import Trained, for_ray, plan_resources, publish_run, runs_at_once
from lvm.errors import LvmError, TrainingError
from lvm.models import ENSEMBLE, MODELS, ORIGINAL, Predictor, gpt2, require_known
from lvm.predict.ensemble import make_ensemble
from lvm.predict.fitting import (
    TrainingData,
    context_mean_cosine,
    require_codec_of_models,
    require_models_folder,
    vectors_entry,
)
from lvm.predict.record import find_record, import_checkpoint, load_record, read_aliases, set_alias
from lvm.predict.runs import Outcome, TrainRun, require_whole, train_run
from lvm.predict.training import FAST, RECIPES, Recipe, evaluate, recipe_named, spread_batches
from lvm.storage import Location, local_folder, local_input, move_tree
from lvm.vectors.sequences import WindowSettings, make_windows, open_vectors
from lvm.vectors.shards import Manifest

CHECKPOINTS_KEPT = 3
"""By val cosine; Ray Train keeps the latest one besides."""

RESTARTS = 2
"""Times a run goes on from its last checkpoint after its worker died (out of memory, lost node)."""

STARTS = 10
"""Times Ray Train tries for a minute to get a run's CPUs and GPUs; then they are not there, and the run fails."""

MAX_CONTEXT = 64
"""Longest context of the command: articles of more chunks are rare."""

POLL_S = 0.25
"""How often Ray Train's controllers and this process look for news, in seconds; Ray's own 2 s are longer than
an epoch on the sample."""


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


class Monitor:
    """What the runs have to say, and how many are training. A Ray actor; it uses no CPU."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the runs that begin at once."""
        self.training = set(names)
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def post(self, model: str, row: dict[str, Any]) -> int:
        """Keep a line for the driver; the number of runs still training comes back."""
        self.lines.append((model, row))
        return len(self.training)

    def enter(self, model: str) -> int:
        """This run trains now; the number of runs that do comes back."""
        self.training.add(model)
        return len(self.training)

    def leave(self, model: str) -> None:
        """This run trains no longer."""
        self.training.discard(model)

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train one architecture; what `guarded` makes of the run's `done`, an `Outcome`: an exception would have Ray start
    the run again, and it would fail again."""
    import ray

    this: TrainRun = config["run"]
    try:
        return guarded(lambda: {"done": _train(this, config)})
    finally:
        ray.get(config["monitor"].leave.remote(this.model))


def _train(this: TrainRun, config: dict[str, Any]) -> Outcome:
    import ray
    import torch

    monitor, threads, cores = config["monitor"], config["threads"], config["cores"]

    def share_cores(num_training: int) -> None:
        """On one machine, threads of runs that have ended go to those still training."""
        torch.set_num_threads(threads if cores is None else max(threads, cores // max(1, num_training)))

    def tell(row: dict[str, Any]) -> None:
        share_cores(ray.get(monitor.post.remote(this.model, row)))

    def keep(folder: Path, row: dict[str, Any]) -> None:
        ray.train.report(
            {"epoch": row["epoch"], "val_cosine": row["val_cosine"]},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )

    share_cores(ray.get(monitor.enter.remote(this.model)))
    if note := unseen_gpu():
        tell({"note": note})
    checkpoint = ray.train.get_checkpoint()
    with ExitStack() as opened:
        folder = None if checkpoint is None else Path(opened.enter_context(checkpoint.as_directory()))
        return train_run(this, folder, keep, tell, config["storage"] / this.name / "tensorboard")


# ------------------------------------------------------------------------------------------- on the driver


def set_aside_if_broken(this: TrainRun, storage: Location) -> None:
    """Move a run's folder away when Ray Train could not go on from it.

    Ray Train writes its list of checkpoints in place, so a kill in that very moment leaves half a file; and a
    checkpoint itself may have been damaged. The run then starts anew; what it had is kept beside it.
    """
    import ray.train
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    folder = storage / this.name
    if not (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).exists():
        return
    try:
        found = ray.train.Result.from_path(*for_ray(folder).values())
        # The latest is as a rule among the best: each folder is read once.
        kept = (found.checkpoint, *(c for c, _ in found.best_checkpoints))
        for checkpoint in {c.path: c for c in kept}.values():
            require_whole(checkpoint)
    except Exception as err:
        # Whatever it is, Ray Train would fail with the same on the way in, and say less about what to do.
        aside = folder.with_name(f"{folder.name}.broken-{time.time_ns()}")
        move_tree(folder, aside)
        echo(
            f"train: {this.model}: its checkpoints cannot be read ({str(err).splitlines()[0]}); it starts "
            f"anew, what there was is in {aside}"
        )


def train_with_ray(
    runs: Sequence[TrainRun], storage: Location, gpus: int | None = None
) -> Iterator[tuple[TrainRun, Any]]:
    """Train as many at once as there is room for, the rest in turns; each comes back as soon as it ends, with its
    `ray.train.Result` or its exception. storage: Ray Train's folder for the runs. Raises InputError when `gpus` GPUs do
    not come.

    Each `TrainTrainer.fit` blocks, so each has a thread of its own in this process; the work is done by the
    workers Ray starts for it.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    nodes = nodes_with(gpus)
    at_once = runs_at_once(nodes, len(runs))
    resources, threads, cores = plan_resources(nodes, at_once)
    if at_once < len(runs):
        echo(f"train: {at_once} at a time, the rest as they end")
    turns = threading.Semaphore(at_once)
    # Read by Ray Train's controllers, which inherit them from this process.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    if len(nodes) == 1:
        # It watches for nodes that are about to be taken away; one process for each run less.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    monitor: Any = ray.remote(num_cpus=0)(Monitor).remote([r.model for r in runs[:at_once]])
    shared = {"monitor": monitor, "threads": threads, "cores": cores, "storage": storage}
    ended: list[tuple[TrainRun, Any]] = []

    def fit(this: TrainRun) -> None:
        with turns:
            fit_now(this)

    def fit_now(this: TrainRun) -> None:
        try:
            trainer = TorchTrainer(
                train_loop_per_worker,
                # A run is one worker, which has nobody to talk to; NCCL would not start where torch sees no GPU.
                torch_config=TorchConfig(backend="gloo"),
                train_loop_config={**shared, "run": this},
                scaling_config=ScalingConfig(
                    num_workers=1, use_gpu="GPU" in resources, resources_per_worker=resources
                ),
                run_config=RunConfig(
                    name=this.name,
                    **for_ray(storage),
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
            ray.get(monitor.leave.remote(this.model))

    # Daemon threads: Ctrl-C ends this process, and with it the workers, without waiting for them.
    for this in runs:
        threading.Thread(target=fit, args=(this,), name=this.name, daemon=True).start()
    waiting = len(runs)
    while waiting:
        time.sleep(POLL_S)
        # Taken before the lines are: a run posts its last line before it ends.
        done, ended[:] = ended[:], []
        for model, row in ray.get(monitor.take.remote()):
            _echo_row(model, row)
        for this, outcome in done:
            waiting -= 1
            yield this, outcome


def _echo_row(model: str, row: Mapping[str, Any]) -> None:
    if "note" in row:
        echo(f"train: {model}: {row['note']}")
        return
    if "rank_loss" in row:
        if row["step"] == row["steps"] or row["step"] % 500 == 0:
            step = f"step {row['step']:,} of {row['steps']:,}"
            echo(f"train: {model:<13} rank head, {step}, loss {row['rank_loss']:.4f}")
        return
    if "resumed" in row:
        echo(f"train: {model:<13} goes on after epoch {row['resumed']}")
        return
    trained = f"train loss {row['train_loss']:.4f}" if "train_loss" in row else "start            "
    echo(
        f"train: {model:<13} epoch {row['epoch']:>2}  {trained}  val loss {row['val_loss']:.4f}  "
        f"val cosine {row['val_cosine']:.4f}  {row['seconds']:.0f} s"
    )


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
    gpt2_layers: Location | None = None,
) -> TrainResult:
    """Bring `models` to hold a record of each architecture, trained on `vectors` in this way.

    A run that fails is listed in `failed`; the others are trained and saved. gpus: how many to wait for; None for those
    there are. gpt2_layers: folder of a checkpoint in GPT-2's layout, from which `gpt2` starts. Raises InputError before
    any training when the vectors are not finished, not sequential, or too few to split, or when the cluster does not
    come to have what is asked for, and IdentityError when `models` holds models of another codec.
    """
    for name in names:
        require_known(name)
    vectors, models = vectors.resolve(), models.resolve()
    require_models_folder(models)
    array = open_vectors(vectors)
    require_codec_of_models(models, array)
    settings = windows or WindowSettings()
    data = TrainingData.of(array, settings, seed, allow_non_sequential)
    result = TrainResult(data.num_windows)

    runs = []
    for name in names:
        layers = gpt2_layers if name == "gpt2" else None
        sizes = {} if layers is None else gpt2.sizes_of(local_folder(layers))
        runs.append(TrainRun.of(array, name, settings, recipe, seed, sizes, layers_from=layers))
    pending = []
    for this in runs:
        found = find_record(models, this.model, run=this.fingerprint)
        if found is None:
            pending.append(this)
            continue
        if read_aliases(models).get(this.model) != found.name:
            set_alias(models, this.model, found)
        result.trained[this.model] = Trained(found, load_record(models, found.name).metrics, up_to_date=True)
        echo(f"train: {this.model} is up to date ({found.name})")
    if pending:
        context_mean = context_mean_cosine(data.parts["val"], recipe.max_val_windows)
        echo(
            f"train: {', '.join(r.model for r in pending)} on {result.windows['train']:,} windows of "
            f"{settings.context} vectors, recipe {recipe.name}; context mean's val cosine {context_mean:.4f}"
        )
        connect(address)
        storage = models / "runs"
        for this in pending:
            set_aside_if_broken(this, storage)
        for this, outcome in train_with_ray(pending, storage, gpus):
            try:
                if isinstance(outcome, Exception):
                    raise TrainingError(f"{this.model}: the run failed: {_first_line(outcome)}") from outcome
                returned = outcome.return_value
                if (refusal := refusal_in(returned)) is not None:
                    raise refusal
                made = publish_run(this, returned["done"], outcome.best_checkpoints, models, data)
                # What only going on needs is two thirds of a checkpoint; the best three weights stay.
                for optimiser in (storage / this.name).glob("*/optimiser.pt"):
                    optimiser.unlink()
            except LvmError as err:
                result.failed[this.model] = str(err)
                echo(f"train: {err}")
                continue
            result.trained[this.model] = made
            echo(
                f"train: {this.model:<13} done: val cosine {made.metrics['val_cosine']:.4f} at epoch "
                f"{made.metrics['best_epoch']} ({made.metrics['stopped']}); {made.folder.name}"
            )
    result.trained = {n: result.trained[n] for n in names if n in result.trained}
    return result


def ensemble_of(vectors: Location, models: Location, members: Mapping[str, str], most: int) -> Trained:
    """The record of an ensemble of the best `most` of these members (name to folder), and its alias; the one there is
    when it is of the same members."""
    vectors, models = vectors.resolve(), models.resolve()
    folder, up_to_date = make_ensemble(models, open_vectors(vectors), members, most)
    if read_aliases(models).get(ENSEMBLE) != folder.name:
        set_alias(models, ENSEMBLE, folder)
    metrics = load_record(models, folder.name).metrics
    if up_to_date:
        echo(f"train: ensemble is up to date ({folder.name})")
    else:
        echo(
            f"train: ensemble of {', '.join(metrics['members'])}: val cosine {metrics['val_cosine']:.4f}, the best "
            f"of them alone {metrics['best_member_val_cosine']:.4f}; {folder.name}"
        )
    return Trained(folder, metrics, up_to_date)


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
        str,
        typer.Option(
            help=f"Of {', '.join(MODELS)}: one, several by comma, all, or original ({', '.join(ORIGINAL)})."
        ),
    ] = "original",
    context: Annotated[
        int, typer.Option(min=1, max=MAX_CONTEXT, help="Vectors a model reads before the one it predicts.")
    ] = WindowSettings.context,
    ensemble: Annotated[
        int | None,
        typer.Option(
            min=2, help="Make an ensemble of so many of the trained models, the best by val cosine."
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "fast",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs, instead of the recipe's.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Longest training, in minutes, instead of the recipe's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split by article and of training.")] = 0,
    allow_non_sequential: Annotated[
        str | None,
        typer.Option(help="The sentence that lets text without an order train; the refusal names it."),
    ] = None,
    import_checkpoint: Annotated[
        PathOrUrl | None,
        path_option('Train nothing; make a record of this original checkpoint {"model_state_dict": …}.'),
    ] = None,
    gpt2_layers: Annotated[
        PathOrUrl | None,
        path_option("Folder of a checkpoint in GPT-2's layout; gpt2 starts from its layers."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help=GPUS_HELP)] = None,
    address: Address = None,
) -> None:
    """Train predictors, all at once; a second run on the same vectors trains nothing."""
    started = time.perf_counter()
    if import_checkpoint is not None:
        name, made = import_model(import_checkpoint, vectors, output, seed)
        result = TrainResult({}, {name: made})
        echo(f"train: imported {name}: val cosine {made.metrics['val_cosine']:.4f}; {made.folder.name}")
    else:
        chosen = recipe_named(recipe)
        if epochs is not None:
            chosen = replace(chosen, epochs=epochs)
        if max_minutes is not None:
            chosen = replace(chosen, max_minutes=max_minutes)
        lists = {"all": list(MODELS), "original": list(ORIGINAL)}
        names = lists.get(model) or [n.strip() for n in model.split(",")]
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
            gpt2_layers=None if gpt2_layers is None else gpt2_layers.resolve(),
        )
        if ensemble is not None:
            members = {n: t.folder.name for n, t in result.trained.items()}
            result.trained[ENSEMBLE] = ensemble_of(vectors, output, members, ensemble)
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
