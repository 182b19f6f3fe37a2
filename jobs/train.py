"""Train predictors: reads the vectors of `latent encode`, writes a model record for each architecture.

    python -m jobs.train --vectors out/vectors --output out/models --model all --ensemble 3
    ray job submit --working-dir . -- python -m jobs.train --vectors /shared/vectors --output /shared/models

One Ray Train run per architecture, as many in parallel as the cluster has room for, each with its share of the CPUs or
GPUs; the others queue. Workers memory-map the vectors from disk; only settings are sent to them. After each epoch a
checkpoint is saved (the best three and the latest are kept) and a line is printed. A killed job, run again, resumes
every run; if these vectors were already trained with these settings, it does nothing. If a run's loss becomes NaN, that
run ends with a message, the others continue, and the job's exit code is 1.

    models/runs/<architecture>-<settings>/   Ray Train's storage: checkpoints, tensorboard/ with the curves
    models/<architecture>-<time>-<hash>/     the record; models/aliases.json points to it

The bundled sample with the four original architectures takes about a minute on two cores. Recipes are in
`lvm/predict/training.py`.
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
    NonSequential,
    PathOrUrl,
    connect,
    echo,
    finish,
    guarded,
    load_codec_at,
    nodes_with,
    path_option,
    refusal_in,
    run,
    timing,
    unseen_gpu,
)
from jobs._training import Trained, for_ray, plan_resources, publish_run, runs_at_once
from lvm.codec.identity import require_same_codec
from lvm.corpus.tmd import Prototypes
from lvm.errors import LvmError, TrainingError
from lvm.evaluate.leaderboard import spread_text
from lvm.evaluate.metrics import Spread
from lvm.evaluate.table import Table, as_text
from lvm.models import ENSEMBLE, MODELS, ORIGINAL, Predictor, gpt2, require_known
from lvm.predict.ensemble import make_ensemble
from lvm.predict.fitting import (
    TrainingData,
    context_mean_cosine,
    require_codec_of_models,
    require_models_folder,
    vectors_entry,
)
from lvm.predict.predictor import SHIPPED
from lvm.predict.record import find_record, import_checkpoint, load_record, read_aliases, set_alias
from lvm.predict.runs import Outcome, TrainRun, require_whole, train_run
from lvm.predict.team import Team
from lvm.predict.tracking import prepare_mlflow
from lvm.predict.training import (
    FAST,
    OWN_RECIPES,
    RECIPES,
    SMALL_SET,
    Recipe,
    evaluate,
    recipe_named,
    spread_batches,
)
from lvm.storage import Location, local_folder, local_input, move_tree
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import MAX_CONTEXT, MAX_SEED, WindowSettings, make_windows
from lvm.vectors.shards import Manifest

CHECKPOINTS_KEPT = 3
"""Best checkpoints kept, by val cosine; Ray Train also keeps the latest."""

RESTARTS = 2
"""How often a run is resumed from its last checkpoint after its worker died (out of memory, lost node)."""

STARTS = 10
"""How many times, a minute each, Ray Train waits for a run's CPUs and GPUs before the run fails."""

MONITOR_WAIT_S = 5.0
"""Timeout of a call to the monitor."""

POLL_S = 0.25
"""Polling interval of Ray Train's controllers and of this process, seconds; Ray's default of 2 s is longer than an
epoch on the sample."""


@dataclass
class TrainResult:
    """Result of `train_models`."""

    windows: dict[str, int]
    """Number of windows in train, val and test."""
    trained: dict[str, Trained] = field(default_factory=dict)
    """The record under each architecture's alias, in the order requested."""
    failed: dict[str, str] = field(default_factory=dict)
    """Error of each failed run, by the run's label."""
    seeds: dict[str, list[Trained]] = field(default_factory=dict)
    """Records of all seeds of this call, by architecture, in order of seed."""


# ------------------------------------------------------------------------------------------------ on a worker


class Monitor:
    """Ray actor that collects the runs' progress lines and counts the runs that are training. It uses no CPU.

    Runs do not depend on it: when its process or node dies, Ray restarts it, possibly elsewhere, and until then `ask`
    returns None.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the runs that start at once."""
        import ray

        # After a restart it does not know which of these have ended; those still running will post.
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.training = set() if restarted else set(names)
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def post(self, model: str, row: dict[str, Any]) -> int:
        """Store a line for the driver; returns the number of runs that are training, this one included."""
        self.training.add(model)
        self.lines.append((model, row))
        return len(self.training)

    def enter(self, model: str) -> int:
        """Count this run as training; returns the number of runs that are."""
        self.training.add(model)
        return len(self.training)

    def leave(self, model: str) -> None:
        """Count this run as ended."""
        self.training.discard(model)

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


def ask(monitor: Any, method: str, *arguments: Any) -> Any:
    """The monitor's answer, or None if there is none within MONITOR_WAIT_S, as when its node is lost."""
    import ray

    try:
        return ray.get(getattr(monitor, method).remote(*arguments), timeout=MONITOR_WAIT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train one architecture; returns a `guarded` row with the run's `Outcome` as `done`. An LvmError is returned, as
    Ray would restart the run on an exception, only to fail again."""
    this: TrainRun = config["run"]
    try:
        return guarded(lambda: {"done": _train(this, config)})
    finally:
        if Team.joined().rank == 0:
            ask(config["monitor"], "leave", this.label)


def _train(this: TrainRun, config: dict[str, Any]) -> Outcome:
    import ray
    import torch

    monitor, threads, cores = config["monitor"], config["threads"], config["cores"]
    team = Team.joined()

    def share_cores(num_training: int | None) -> None:
        """On a single node, give the threads of ended runs to those still training. None: the number is unknown."""
        alone = cores is None or num_training is None
        torch.set_num_threads(threads if alone else max(threads, cores // (max(1, num_training) * team.size)))

    def tell(row: dict[str, Any]) -> None:
        share_cores(ask(monitor, "post", this.label, row))

    def keep(folder: Path | None, row: dict[str, Any]) -> None:
        ray.train.report(
            {"epoch": row["epoch"], "val_cosine": row["val_cosine"]},
            checkpoint=None if folder is None else ray.train.Checkpoint.from_directory(folder),
        )

    share_cores(ask(monitor, "enter", this.label))
    if note := unseen_gpu():
        tell({"note": note})
    checkpoint = ray.train.get_checkpoint()
    with ExitStack() as opened:
        folder = None if checkpoint is None else Path(opened.enter_context(checkpoint.as_directory()))
        return train_run(
            this, folder, keep, tell, config["storage"] / this.name / "tensorboard", team, config["mlflow"]
        )


# ------------------------------------------------------------------------------------------- on the driver


def set_aside_if_broken(this: TrainRun, storage: Location) -> None:
    """Move a run's folder aside if Ray Train could not resume from it.

    Ray Train writes its list of checkpoints in place, so a kill at that moment leaves a partial file; and a checkpoint
    may be damaged. The run then starts over; the old folder is kept next to it.
    """
    import ray.train
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    folder = storage / this.name
    if not (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).exists():
        return
    try:
        found = ray.train.Result.from_path(*for_ray(folder).values())
        # The latest is usually among the best: read each folder once.
        kept = (found.checkpoint, *(c for c, _ in found.best_checkpoints))
        for checkpoint in {c.path: c for c in kept}.values():
            require_whole(checkpoint)
    except Exception as err:
        # Whatever the error, Ray Train would fail with it too, with a less helpful message.
        aside = folder.with_name(f"{folder.name}.broken-{time.time_ns()}")
        move_tree(folder, aside)
        echo(
            f"train: {this.label}: cannot read its checkpoints ({str(err).splitlines()[0]}); starting over, "
            f"the old folder is kept as {aside}"
        )


def train_with_ray(
    runs: Sequence[TrainRun],
    storage: Location,
    gpus: int | None = None,
    workers: int = 1,
    mlflow: str | None = None,
) -> Iterator[tuple[TrainRun, Any]]:
    """Train as many runs in parallel as there is room for and queue the rest; yields each as soon as it ends, with its
    `ray.train.Result` or its exception. storage: Ray Train's folder for the runs. workers: per run. mlflow: URI for
    curves. Raises InputError when `gpus` GPUs do not become available.

    Each `TorchTrainer.fit` blocks, so each runs in its own thread here; the work is done by Ray's workers.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    nodes = nodes_with(gpus)
    at_once = runs_at_once(nodes, len(runs), workers=workers)
    resources, threads, cores = plan_resources(nodes, at_once * workers)
    # NCCL needs a whole GPU per worker that torch can see; a single worker needs no communication.
    backend = "nccl" if workers > 1 and resources.get("GPU", 0.0) >= 1 else "gloo"
    if at_once < len(runs):
        echo(f"train: {at_once} runs at a time, the rest queue")
    turns = threading.Semaphore(at_once)
    # Read by Ray Train's controllers, which inherit them from this process.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    if len(nodes) == 1:
        # It watches for nodes about to be preempted; without it there is one process less per run.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    monitor: Any = ray.remote(num_cpus=0, max_restarts=-1)(Monitor).remote([r.label for r in runs[:at_once]])
    shared = {"monitor": monitor, "threads": threads, "cores": cores, "storage": storage, "mlflow": mlflow}
    ended: list[tuple[TrainRun, Any]] = []

    def fit(this: TrainRun) -> None:
        with turns:
            fit_now(this)

    def fit_now(this: TrainRun) -> None:
        try:
            trainer = TorchTrainer(
                train_loop_per_worker,
                torch_config=TorchConfig(backend=backend),
                train_loop_config={**shared, "run": this},
                scaling_config=ScalingConfig(
                    num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
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
            # Whatever kills a worker or Ray ends only this run; the caller reports it.
            ended.append((this, err))
            ask(monitor, "leave", this.label)

    # Daemon threads: Ctrl-C ends this process, and with it the workers, without waiting for them.
    for this in runs:
        threading.Thread(target=fit, args=(this,), name=this.name, daemon=True).start()
    waiting = len(runs)
    while waiting:
        time.sleep(POLL_S)
        # Before taking the lines: a run posts its last line before it ends.
        done, ended[:] = ended[:], []
        for label, row in ask(monitor, "take") or ():
            _echo_row(label, row)
        for this, outcome in done:
            waiting -= 1
            yield this, outcome


def _echo_row(label: str, row: Mapping[str, Any]) -> None:
    if "note" in row:
        echo(f"train: {label}: {row['note']}")
        return
    if "rank_loss" in row:
        if row["step"] == row["steps"] or row["step"] % 500 == 0:
            step = f"step {row['step']:,} of {row['steps']:,}"
            echo(f"train: {label:<13} rank head, {step}, loss {row['rank_loss']:.4f}")
        return
    if "resumed" in row:
        echo(f"train: {label:<13} resuming after epoch {row['resumed']}")
        return
    trained = f"train loss {row['train_loss']:.4f}" if "train_loss" in row else "start            "
    echo(
        f"train: {label:<13} epoch {row['epoch']:>2}  {trained}  val loss {row['val_loss']:.4f}  "
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
    seeds: int = 1,
    workers: int = 1,
    own_recipes: Mapping[str, Recipe] | None = None,
    mlflow: str | None = None,
    prototypes: Prototypes | None = None,
    fresh: bool = False,
) -> TrainResult:
    """Make `models` hold a record of each architecture, trained on `vectors` with these settings.

    A failed run is listed in `failed`; the others are trained and saved. seeds: runs of each architecture on the same
    split, with seeds from `seed` up; the alias points to the best by val cosine. workers: per model; the result is the
    same model as with one. own_recipes: by architecture, in place of `recipe`. gpus: how many to wait for; None for
    those available. gpt2_layers: folder of a checkpoint in GPT-2's layout to initialise `gpt2` from. mlflow: URI from
    `prepare_mlflow`, to log the curves there too. prototypes: TMD labels in the vectors' codec, for models that also
    read each vector's code; their aliases end in -tmd. fresh: do not start from bundled models.

    Raises InputError before any training when the vectors are unfinished, not sequential or too few to split, or when
    the cluster does not get the requested resources; IdentityError when `models` holds models of another codec.
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
        own = (own_recipes or {}).get(name, recipe)
        first = TrainRun.of(
            array,
            name,
            settings,
            own,
            seed,
            sizes,
            layers_from=layers,
            prototypes=prototypes,
            bundled=data.bundled_start(name, fresh, prototypes),
        )
        runs += [first, *(replace(first, training_seed=seed + n) for n in range(1, seeds))]
    ready: dict[str, Trained] = {}

    def take(this: TrainRun, made: Trained) -> None:
        """Add a run's record, and point its architecture's alias to the best record so far."""
        ready[this.label] = made
        alike = [ready[r.label] for r in runs if r.alias == this.alias and r.label in ready]
        best = max(alike, key=lambda t: float(t.metrics["val_cosine"]))
        result.seeds[this.alias], result.trained[this.alias] = alike, best
        if read_aliases(models).get(this.alias) != best.folder.name:
            set_alias(models, this.alias, best.folder)

    pending = []
    for this in runs:
        found = find_record(models, this.model, run=this.fingerprint)
        if found is None:
            pending.append(this)
            continue
        take(this, Trained(found, load_record(models, found.name).metrics, up_to_date=True))
        echo(f"train: {this.label} is up to date ({found.name})")
    if pending:
        recipes = " and ".join(dict.fromkeys(r.recipe.name for r in pending))
        context_mean = context_mean_cosine(data.parts["val"], recipe.max_val_windows)
        echo(
            f"train: {', '.join(r.label for r in pending)} on {result.windows['train']:,} windows of "
            f"{settings.context} vectors, recipe {recipes}; context mean's val cosine {context_mean:.4f}"
        )
        connect(address)
        storage = models / "runs"
        for this in pending:
            set_aside_if_broken(this, storage)
        for this, outcome in train_with_ray(pending, storage, gpus, workers, mlflow):
            try:
                if isinstance(outcome, Exception):
                    raise TrainingError(f"{this.label}: the run failed: {_first_line(outcome)}") from outcome
                returned = outcome.return_value
                if (refusal := refusal_in(returned)) is not None:
                    raise refusal
                made = publish_run(this, returned["done"], outcome.best_checkpoints, models, data)
                # The optimiser's state, two thirds of a checkpoint, is only needed to resume; the weights are kept.
                for optimiser in (storage / this.name).glob("*/optimiser.pt"):
                    optimiser.unlink()
            except LvmError as err:
                result.failed[this.label] = str(err)
                echo(f"train: {err}")
                continue
            take(this, made)
            learnt = "" if made.metrics["best_epoch"] else "; training did not improve on its start"
            echo(
                f"train: {this.label:<13} done: val cosine {made.metrics['val_cosine']:.4f} at epoch "
                f"{made.metrics['best_epoch']} ({made.metrics['stopped']}{learnt}); {made.folder.name}"
            )
    result.trained = {r.alias: result.trained[r.alias] for r in runs if r.alias in result.trained}
    result.seeds = {n: result.seeds[n] for n in result.trained}
    return result


def prototypes_of(vectors: Location, codec_path: Location | None) -> Prototypes:
    """TMD labels encoded by the codec of these vectors. Raises IdentityError when the loaded codec is another."""
    identity = Manifest.load(vectors, "vectors").identity
    codec = load_codec_at(identity.name, codec_path)
    require_same_codec(identity, codec.identity, str(vectors), f"codec {identity.name}")
    return Prototypes.of(codec.encode)


def over_seeds(made: Sequence[Trained]) -> dict[str, Any]:
    """The fields of `Spread` for the val cosine over seeds, and the records' folders."""
    spread = Spread.of([float(t.metrics["val_cosine"]) for t in made])
    return {"val_cosine": asdict(spread), "folders": [t.folder.name for t in made]}


def seeds_table(result: TrainResult) -> Table:
    """Table of each architecture's val cosine over its seeds."""
    rows = []
    for name, made in result.seeds.items():
        many = len(made) > 1
        best = result.trained[name]
        rows.append(
            (
                name,
                str(len(made)),
                spread_text(over_seeds(made)["val_cosine"]) if many else "-",
                f"{best.metrics['val_cosine']:.4f}",
                f"{best.metrics['context_mean_val_cosine']:.4f}",
                best.folder.name,
            )
        )
    headers = ("model", "seeds", "val cosine", "best", "context mean", "best record (alias)")
    return Table("Over seeds: mean and standard deviation", headers, tuple(rows))


def ensemble_of(vectors: Location, models: Location, members: Mapping[str, str], count: int) -> Trained:
    """Make a record of an ensemble of the best `count` members (name to folder), and its alias; an existing record of
    the same members is reused."""
    vectors, models = vectors.resolve(), models.resolve()
    folder, up_to_date = make_ensemble(models, open_vectors(vectors), members, count)
    if read_aliases(models).get(ENSEMBLE) != folder.name:
        set_alias(models, ENSEMBLE, folder)
    metrics = load_record(models, folder.name).metrics
    if up_to_date:
        echo(f"train: ensemble is up to date ({folder.name})")
    else:
        echo(
            f"train: ensemble of {', '.join(metrics['members'])}: val cosine {metrics['val_cosine']:.4f}, best "
            f"single model {metrics['best_member_val_cosine']:.4f}; {folder.name}"
        )
    return Trained(folder, metrics, up_to_date)


def _first_line(error: BaseException) -> str:
    """The cause of a failed run in one line: the worker's own exception if Ray passes it on."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


def import_model(checkpoint: Location, vectors: Location, models: Location, seed: int) -> tuple[str, Trained]:
    """Make a record of a checkpoint of the original system, scored on `vectors` and assigned their codec."""
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
    output: Annotated[PathOrUrl, path_option("Folder for the model records; existing ones are kept.")],
    model: Annotated[
        str,
        typer.Option(
            help=f"Architectures, comma-separated, of {', '.join(MODELS)}; or all, or original "
            f"({', '.join(ORIGINAL)})."
        ),
    ] = "original",
    context: Annotated[
        int, typer.Option(min=1, max=MAX_CONTEXT, help="Vectors a model reads before the one it predicts.")
    ] = WindowSettings.context,
    ensemble: Annotated[
        int | None,
        typer.Option(
            min=2, help="Make an ensemble of this many of the trained models, the best by val cosine."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help=f"One of {', '.join(RECIPES)}; {', '.join(OWN_RECIPES)} has its own, long.")
    ] = "fast",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs, instead of the recipe's.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Maximum training time in minutes, instead of the recipe's.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split by article and of training.")
    ] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Number of seeds to train each architecture with; the alias points to the best."
        ),
    ] = 1,
    allow_non_sequential: NonSequential = None,
    import_checkpoint: Annotated[
        PathOrUrl | None,
        path_option(
            'Instead of training, import this checkpoint of the original system, {"model_state_dict": …}.'
        ),
    ] = None,
    gpt2_layers: Annotated[
        PathOrUrl | None, path_option("Folder of a checkpoint in GPT-2's layout to initialise gpt2 from.")
    ] = None,
    workers_per_model: Annotated[
        int, typer.Option(min=1, help="Data-parallel workers per model; each takes its share of every batch.")
    ] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help=GPUS_HELP)] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(help="Also log curves to MLflow: its URI, or a folder; needs the extra mlflow."),
    ] = None,
    tmd: Annotated[
        bool,
        typer.Option(
            "--tmd", help="Models also read each vector's TMD code, 16 bits; their aliases end in -tmd."
        ),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help=f"Never start from a bundled model ({', '.join(read_aliases(SHIPPED))}). Below {SMALL_SET:,} windows "
            "of the bundled codec, training otherwise starts from one if that gives a better val cosine.",
        ),
    ] = False,
    codec_path: Annotated[
        PathOrUrl | None, path_option("Folder with the vectors' codec, for --tmd; default: the bundled one.")
    ] = None,
    address: Address = None,
) -> None:
    """Train predictors in parallel; a second run on the same vectors trains nothing."""
    started = time.perf_counter()
    if import_checkpoint is not None:
        name, made = import_model(import_checkpoint, vectors, output, seed)
        result = TrainResult({}, {name: made})
        echo(f"train: imported {name}: val cosine {made.metrics['val_cosine']:.4f}; {made.folder.name}")
    else:
        changes: dict[str, Any] = {"epochs": epochs, "max_minutes": max_minutes}
        changes = {name: value for name, value in changes.items() if value is not None}
        lists = {"all": list(MODELS), "original": list(ORIGINAL)}
        names = lists.get(model) or [n.strip() for n in model.split(",")]
        result = train_models(
            vectors,
            output,
            list(dict.fromkeys(names)),
            replace(recipe_named(recipe), **changes),
            seed,
            WindowSettings(context=context),
            allow_non_sequential=allow_non_sequential,
            address=address,
            gpus=gpus,
            gpt2_layers=None if gpt2_layers is None else gpt2_layers.resolve(),
            seeds=seeds,
            workers=workers_per_model,
            mlflow=None if mlflow is None else prepare_mlflow(mlflow),
            prototypes=prototypes_of(vectors, codec_path) if tmd else None,
            fresh=fresh,
            own_recipes={n: replace(own, **changes) for n, own in OWN_RECIPES.items()},
        )
        if ensemble is not None:
            members = {n: t.folder.name for n, t in result.trained.items()}
            result.trained[ENSEMBLE] = ensemble_of(vectors, output, members, ensemble)
    if seeds > 1 and result.seeds:
        print(as_text(seeds_table(result)))
    if result.failed:
        saved = ", ".join(result.trained) or "none"
        num_ready = sum(map(len, result.seeds.values()))
        raise TrainingError(
            f"{len(result.failed)} of {len(result.failed) + num_ready} models failed, see above: "
            f"{', '.join(result.failed)}. Saved and ready: {saved}."
        )
    new = [t for n, made in result.trained.items() for t in result.seeds.get(n, [made]) if not t.up_to_date]
    seen = sum(t.metrics.get("epochs", 0) * result.windows.get("train", 0) for t in new)
    finish(
        "train",
        rows=result.windows.get("train", 0),
        windows=result.windows,
        **timing(started, seen),
        paths=[str(t.folder) for t in result.trained.values()],
        up_to_date=not new,
        redone=len(new),
        models={
            n: {
                "folder": t.folder.name,
                "up_to_date": t.up_to_date,
                **{
                    k: t.metrics.get(k)
                    for k in ("val_cosine", "context_mean_val_cosine", "epochs", "seconds")
                },
                **({"seeds": over_seeds(result.seeds[n])} if len(result.seeds.get(n, ())) > 1 else {}),
            }
            for n, t in result.trained.items()
        },
    )


if __name__ == "__main__":
    run(main)
