"""Search architectures and settings with Ray Tune: reads vectors; writes a table of trials, a report, the best models.

    python -m jobs.sweep --vectors out/vectors --output out/sweep --trials 100 --hours 4
    ray job submit --working-dir . -- python -m jobs.sweep --vectors /shared/vectors --output /shared/sweep

A trial is a training run as in `latent train`, with sizes, learning rate, objective and context length sampled with
the seed; architectures alternate. ASHA stops trials that fall behind (Li et al. 2018, arXiv 1810.05934). All trials
are scored on the same validation targets: those with enough vectors before them for the longest context. One trial
runs per CPU core, or eight per GPU. A sweep that was killed, or ran out of --hours, resumes every trial with Tune's
own restore when it is run again with the same settings.

    trials.parquet, trials.csv   one row per trial
    sweep.html                   leaderboard with intervals, parallel coordinates, quality by cost; self-contained
    sweep.json                   settings, leaderboard and intervals; written last
    models/                      a record for the best trial of each architecture, and an ensemble of the best of them
    tune/<settings>/             Tune's files: `tensorboard --logdir` shows curves and HParams
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
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
    nodes_with,
    path_option,
    refusal_in,
    run,
    shows_ray_logs,
    timing,
)
from jobs._training import for_ray, plan_resources, publish_run, runs_at_once
from lvm.corpus.coherence import Coherence
from lvm.devices import pick_device
from lvm.errors import InputError, OutputError, TrainingError
from lvm.evaluate.controls import as_written
from lvm.evaluate.metrics import Float32Array, Interval, clustered_interval, cosines, summarise_ranks
from lvm.evaluate.scoring import score_in_article
from lvm.evaluate.sweep import Trial, best_of_each, html_page, leaderboard, scored
from lvm.evaluate.table import as_text
from lvm.models import ENSEMBLE, MODELS, SPACES, require_known
from lvm.predict.ensemble import make_ensemble
from lvm.predict.fitting import TrainingData, check_sequential
from lvm.predict.losses import LossSettings
from lvm.predict.record import METRICS, find_record, load_record, read_aliases, read_json, set_alias
from lvm.predict.runs import Outcome, TrainRun, best_weights, train_run, windows_of
from lvm.predict.training import OWN_RECIPES, Progress, Recipe, recipe_named
from lvm.storage import Location, RemotePath
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.artefact import finished_result
from lvm.vectors.sequences import MAX_CONTEXT, MAX_SEED, Windows, WindowSettings
from lvm.vectors.shards import Manifest, fingerprint, write_bytes, write_json

SWEEP_VERSION = 1
"""Incremented when the same settings sample different trials than before."""

RATES = (1e-4, 2e-3)
"""Range of the peak learning rate, log-uniform: a third to six times that of the recipes."""

INFO_NCE_SHARES = (0.0, 0.1, 0.3)
"""Objectives: squared error only, or plus InfoNCE at this share of its gradient."""

SEARCHED = tuple(name for name in MODELS if name not in OWN_RECIPES)
"""Architectures to search; names that stand for a recipe are excluded."""

MAX_HOURS = 10_000
"""Longest that --hours may be: more than a year."""

REDUCTION = 3
"""ASHA's reduction factor: a third of each rung continues."""

ENSEMBLE_MEMBERS = 3
"""Number of models in the ensemble of the best trials."""

SCHEMA = pa.schema(
    [
        ("number", pa.int32()),
        ("model", pa.string()),
        ("context", pa.int32()),
        ("learning_rate", pa.float64()),
        ("info_nce_share", pa.float64()),
        ("sizes", pa.string()),
        ("parameters", pa.int64()),
        ("val_cosine", pa.float64()),
        ("gain", pa.float64()),
        ("val_mrr", pa.float64()),
        ("epochs", pa.int32()),
        ("seconds", pa.float64()),
        ("state", pa.string()),
        ("note", pa.string()),
    ]
)
"""Schema of the table of trials."""


@dataclass(frozen=True)
class SweepSettings:
    """The search; equal settings mean the same sweep."""

    trials: int
    """Number of trials."""
    models: tuple[str, ...]
    """Architectures, keys of MODELS."""
    contexts: tuple[int, ...]
    """Context lengths."""
    recipe: str
    """Recipe for everything that is not searched."""
    epochs: int
    """Maximum epochs per trial."""
    windows_per_epoch: int
    """Training windows per epoch."""
    seed: int
    """Seed of the sampling, the split and the training."""

    @property
    def grace_epochs(self) -> int:
        """ASHA's grace period: half of the epochs. While the learning rate is high, val cosine falls below that of the
        closed-form start, most for the rates that end highest: `gru` goes from 0.318 to 0.311 and then to 0.337
        (tests/bench/results/LOG.md). Stopped after one epoch, the lowest rates would win."""
        return max(1, self.epochs // 2)


def draw_trials(settings: SweepSettings) -> list[dict[str, Any]]:
    """The settings of every trial, from the seed: number, model, sizes, context, learning_rate, info_nce_share.

    Architectures alternate, so that a sweep that is cut short has tried them all.
    """
    rng = np.random.default_rng(settings.seed)
    low, high = np.log(RATES)
    trials = []
    for number in range(settings.trials):
        model = settings.models[number % len(settings.models)]
        sizes = {field: _one_of(rng, values) for field, values in SPACES[model].items()}
        rate = float(np.exp(rng.uniform(low, high)))
        share = _one_of(rng, INFO_NCE_SHARES)
        trials.append(
            {
                "number": number,
                "model": model,
                "sizes": sizes,
                "context": _one_of(rng, settings.contexts),
                "learning_rate": float(f"{rate:.4g}"),
                "info_nce_share": 0.0 if hasattr(MODELS[model], "loss") else share,
            }
        )
    return trials


def _one_of(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def run_of(trial: Mapping[str, Any], settings: SweepSettings, array: VectorArray) -> TrainRun:
    """The training run of a trial."""
    base = recipe_named(settings.recipe)
    recipe: Recipe = replace(
        base,
        name=f"sweep of {base.name}",
        learning_rates={**base.learning_rates, trial["model"]: trial["learning_rate"]},
        epochs=settings.epochs,
        max_windows_per_epoch=settings.windows_per_epoch,
        patience=None,  # ASHA stops trials
        loss=LossSettings(info_nce_share=trial["info_nce_share"]),
        rank=None,  # trials are compared by cosine
    )
    return TrainRun.of(
        array,
        trial["model"],
        WindowSettings(context=trial["context"]),
        recipe,
        settings.seed,
        trial["sizes"],
        reach=max(settings.contexts),
    )


# ------------------------------------------------------------------------------------------------ on a worker


def run_trial(config: dict[str, Any], runs: Sequence[TrainRun], threads: int) -> None:
    """One trial, called by Tune: reports each epoch with a checkpoint, and an LvmError as text."""
    from ray import tune

    this = runs[config["trial"]["number"]]
    torch.set_num_threads(threads)
    best = start = -1.0
    mrr: float | None = None
    val = cache(
        partial(val_windows, this)
    )  # filtering and splitting take seconds, so once; an error is a trial's

    def keep(folder: Path | None, row: dict[str, Any]) -> None:
        nonlocal best, start, mrr
        assert folder is not None  # None in all but the first of several workers
        if row["epoch"] == 0:
            start = row["val_cosine"]
        if row["val_cosine"] > best:
            best, mrr = row["val_cosine"], mrr_of(this, folder, val())
        shown = {k: row[k] for k in ("epoch", "val_cosine", "val_loss", "seconds")}
        tune.report(
            {**shown, "best_val_cosine": best, "gain": best - start, "val_mrr": mrr},
            checkpoint=tune.Checkpoint.from_directory(str(folder)),
        )

    checkpoint = tune.get_checkpoint()

    def work() -> dict[str, Any]:
        nonlocal best, start, mrr
        with ExitStack() as opened:
            folder = None if checkpoint is None else Path(opened.enter_context(checkpoint.as_directory()))
            if folder is not None:
                progress = json.loads((folder / "progress.json").read_text())
                best = max(row["val_cosine"] for row in progress["curve"])
                start, mrr = progress["curve"][0]["val_cosine"], mrr_of(this, folder, val())
            curves = Path(tune.get_context().get_trial_dir()) / "curves"
            try:
                train_run(this, folder, keep, lambda _: None, curves)
            except torch.OutOfMemoryError as err:
                raise TrainingError(str(err)) from err
        return {}

    outcome = guarded(work, epoch=0, val_cosine=-1.0)
    if outcome["refusal"]:
        tune.report(outcome)


def mrr_of(this: TrainRun, checkpoint: Path, val: Windows) -> float | None:
    """Mean reciprocal rank in its article of a checkpoint's best epoch, on validation windows."""
    device, model = pick_device(), this.build()
    model.load_state_dict(best_weights(checkpoint))
    model.to(device).eval()

    def predict(contexts: Float32Array) -> Float32Array:
        with torch.inference_mode():
            return model(torch.from_numpy(contexts).to(device)).float().cpu().numpy()  # type: ignore[no-any-return]

    return summarise_ranks(score_in_article(predict, None, val.array, as_written(val)).in_article)["mrr"]


def val_windows(this: TrainRun) -> Windows:
    """The validation windows of a run's epochs."""
    val = windows_of(this)["val"]
    rows = np.linspace(0, len(val) - 1, min(this.recipe.max_val_windows, len(val))).astype(np.int64)
    return val.subset(rows)


# ------------------------------------------------------------------------------------------- on the driver


def tune_trials(
    trials: Sequence[dict[str, Any]],
    runs: Sequence[TrainRun],
    folder: Location,
    settings: SweepSettings,
    hours: float | None,
    gpus: int | None,
) -> Any:
    """Run all trials, or the missing ones; returns Tune's ResultGrid."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    nodes = nodes_with(gpus)
    at_once = runs_at_once(nodes, len(trials), runs_per_cpu=1)
    resources, threads, _ = plan_resources(nodes, at_once)
    resources = {k.lower(): v for k, v in resources.items()}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, runs=list(runs), threads=threads), resources
    )
    echo(f"sweep: {len(trials)} trials, {at_once} at a time")
    # A killed sweep loses at most this many seconds of state; Tune's default grows with the number of trials.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "10")
    # Trials keep only their best checkpoint, and Tune would warn that it saves its own state just as often.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    where = for_ray(folder.parent)
    path = where["storage_path"] + "/" + folder.name
    space = {"trial": tune.grid_search(list(trials))}
    if tune.Tuner.can_restore(path, storage_filesystem=where["storage_filesystem"]):
        echo("sweep: resuming")
        tuner = tune.Tuner.restore(
            path,
            trainable=trainable,
            param_space=space,
            resume_unfinished=True,
            storage_filesystem=where["storage_filesystem"],
        )
        return _fit(tuner, hours)
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="val_cosine",
            mode="max",
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=settings.epochs,
                grace_period=settings.grace_epochs,
                reduction_factor=REDUCTION,
                stop_last_trials=False,
            ),
            max_concurrent_trials=at_once,
            trial_dirname_creator=_name_of,
            trial_name_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=where["storage_path"],
            storage_filesystem=where["storage_filesystem"],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="val_cosine"),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_progress_lines(len(trials))],
            verbose=0,
        ),
    )
    return _fit(tuner, hours)


def _fit(tuner: Any, hours: float | None) -> Any:
    # Tune prints its settings and paths of temporary folders to stdout, and warns of slow steps while cores are busy.
    if shows_ray_logs():
        with redirect_stdout(sys.stderr), _stopped_after(hours):
            return tuner.fit()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # At the end it lists the trials that a stop left unfinished, as an error.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), _stopped_after(hours):
        return tuner.fit()


@contextmanager
def _stopped_after(hours: float | None) -> Iterator[None]:
    """Stop Tune after this time as SIGUSR1 does: it saves its state and leaves running trials to be resumed.

    Its own `time_budget_s` ends them for good, and a restored sweep would find its time used up.
    """
    if hours is None:
        yield
        return
    ended = threading.Event()

    def stop() -> None:
        due, heard = 3600.0 * hours, False
        while not heard and not ended.wait(due):
            heard = signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN  # Tune's handler is there
            os.kill(os.getpid(), signal.SIGUSR1)
            due = 1.0

    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    timer = threading.Thread(target=stop, daemon=True, name="hours")
    timer.start()
    try:
        yield
    finally:
        ended.set()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def _name_of(trial: Any) -> str:
    chosen = trial.config["trial"]
    return f"{chosen['number']:03d}-{chosen['model']}"


def _progress_lines(total: int) -> Any:
    """A Tune callback that prints a line to stderr for every finished trial."""
    from ray import tune

    class Lines(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._print(trials, trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._print(trials, trial)

        def _print(self, trials: list[Any], trial: Any) -> None:
            ended = len({t.trial_id for t in trials if t.is_finished()} | {trial.trial_id})
            last = trial.last_result
            result = refusal_in(last) or f"val cosine {last.get('best_val_cosine', float('nan')):.4f}"
            echo(f"sweep: {ended} of {total}: {trial} epoch {last.get('epoch', 0)}, {result}")

    return Lines()


def rows_of(
    results: Any, trials: Sequence[Mapping[str, Any]], runs: Sequence[TrainRun], epochs: int
) -> list[Trial]:
    """The table of trials, in order."""
    found = {r.config["trial"]["number"]: r for r in results if r.config}
    rows = []
    for trial, this in zip(trials, runs, strict=True):
        result = found.get(trial["number"])
        metrics = (result.metrics or {}) if result is not None else {}
        cosine, done = metrics.get("best_val_cosine"), int(metrics.get("epoch", 0))
        note = str(refusal_in(metrics) or "")
        if result is not None and result.error is not None:
            note = note or str(result.error).strip().splitlines()[-1]
        if note:
            state = "failed"
        elif done >= epochs:
            state = "finished"
        else:
            # Tune marks the last report as done if its scheduler ended the trial, not if the time ran out.
            state = "stopped early" if metrics.get("done") and cosine is not None else "out of time"
        with torch.device("meta"):
            parameters = None if note else sum(p.numel() for p in this.build().parameters())
        rows.append(
            Trial(
                **{**trial, "sizes": json.dumps(trial["sizes"])},
                parameters=parameters,
                val_cosine=None if note else cosine,
                gain=None if note else metrics.get("gain"),
                val_mrr=None if note else metrics.get("val_mrr"),
                epochs=done,
                seconds=float(metrics.get("seconds", 0.0)),
                state=state,
                note=note,
            )
        )
    return rows


def publish_best(
    rows: Sequence[Trial],
    runs: Sequence[TrainRun],
    results: Any,
    models: Location,
    array: VectorArray,
    coherence: Coherence,
) -> dict[int, Interval]:
    """Make a record for the best trial of each architecture, under the architecture's name as alias; returns the
    intervals of their val cosines, by trial number."""
    found = {r.config["trial"]["number"]: r for r in results if r.config}
    intervals = {}
    for best in best_of_each(rows).values():
        this, result = runs[best["number"]], found[best["number"]]
        folder = find_record(models, this.model, run=this.fingerprint)
        # A trial that ran out of time has a record of what it had learnt then.
        if folder is None or read_json(folder / METRICS).get("val_cosine") != best["val_cosine"]:
            with result.checkpoint.as_directory() as latest:
                progress = json.loads(Path(latest, "progress.json").read_text())
            progress["stopped"] = {"finished": f"all {this.recipe.epochs} epochs are done"}.get(
                best["state"], f"{best['state']} by the sweep"
            )
            data = TrainingData(array, Manifest.load(array.directory, "vectors"), windows_of(this), coherence)
            checkpoints = result.best_checkpoints
            done = Outcome(Progress(**progress), "as the cluster's", ranker=None)
            made = publish_run(this, done, checkpoints, models, data)
            folder = made.folder
        set_alias(models, this.model, folder)
        intervals[best["number"]] = interval_of(folder, this)
    return intervals


def interval_of(folder: Location, this: TrainRun) -> Interval:
    """Val cosine of a record on its run's validation windows, with an interval clustered by article."""
    val = val_windows(this)
    model = load_record(folder.parent, folder.name).model
    values = []
    with torch.inference_mode():
        for contexts, targets in val.batches(512):
            values.append(cosines(model(torch.from_numpy(contexts)).float().numpy(), targets))
    return clustered_interval(np.concatenate(values), val.doc_ids)


def ensemble_of_best(rows: Sequence[Trial], models: Location, array: VectorArray) -> dict[str, Any] | None:
    """Make an ensemble of the best records; its metrics, or None with fewer than two records."""
    aliases = read_aliases(models)
    members = {t["model"]: aliases[t["model"]] for t in best_of_each(rows).values()}
    if len(members) < 2:
        return None
    folder, _ = make_ensemble(models, array, members, ENSEMBLE_MEMBERS)
    set_alias(models, ENSEMBLE, folder)
    metrics = load_record(models, folder.name).metrics
    return {k: metrics[k] for k in ("val_cosine", "best_member_val_cosine", "members", "weights")}


def sweep(
    vectors: Location,
    output: Location,
    settings: SweepSettings,
    hours: float | None = None,
    allow_non_sequential: str | None = None,
    gpus: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
) -> tuple[list[Trial], dict[str, Any], bool]:
    """All trials, the contents of sweep.json, and whether the sweep was already complete.

    Raises InputError for settings that do not fit the vectors, OutputError when `output` holds another sweep.
    """
    for name in settings.models:
        require_known(name)
    vectors, output = vectors.resolve(), output.resolve()
    manifest, array = Manifest.load(vectors, "vectors"), open_vectors(vectors)
    identity = fingerprint({"version": SWEEP_VERSION, "vectors": array.fingerprint, **asdict(settings)})
    found = finished_result(output, "sweep.json", asdict(settings), overwrite)
    if found is not None and found["sweep"] != identity and not overwrite:
        raise OutputError(
            f"{output} holds a sweep of other vectors; choose another --output or pass --overwrite"
        )
    if found is not None and found["sweep"] == identity and found["complete"]:
        return read_trials(output), found, True
    coherence = check_sequential(array, manifest.source, allow_non_sequential)
    trials = draw_trials(settings)
    runs = [run_of(trial, settings, array) for trial in trials]
    windows_of(runs[0])  # raises if there are too few windows for the longest context, before Ray starts

    connect(address)
    folder = output / "tune" / identity
    results = tune_trials(trials, runs, folder, settings, hours, gpus)
    rows = rows_of(results, trials, runs, settings.epochs)
    if not scored(rows):
        raise InputError(
            f"none of {len(rows)} trials has a score; the first: "
            f"{rows[0]['note'] or 'unfinished; the same command resumes it, with more --hours'}"
        )
    models = output / "models"
    intervals = publish_best(rows, runs, results, models, array, coherence)
    ensemble = ensemble_of_best(rows, models, array)
    record = {
        "sweep": identity,
        "settings": asdict(settings),
        "improved": sum((r["gain"] or 0.0) > 0 for r in rows),
        "complete": not any(r["state"] == "out of time" for r in rows),
        "vectors": array.fingerprint,
        "best": {m: {**t, "sizes": json.loads(t["sizes"])} for m, t in best_of_each(rows).items()},
        "intervals": {str(n): asdict(i) for n, i in intervals.items()},
        "ensemble": ensemble,
    }
    write_results(output, rows, intervals, record, manifest)
    if record["complete"]:
        discard_checkpoints(folder)
    return rows, record, False


def write_results(
    output: Location,
    rows: Sequence[Trial],
    intervals: Mapping[int, Interval],
    record: Mapping[str, Any],
    manifest: Manifest,
) -> None:
    """Write the tables, the report, and sweep.json last."""
    table = pa.Table.from_pylist([dict(r) for r in rows], schema=SCHEMA)
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(table, buffer)
    write_bytes(output / "trials.parquet", buffer.getvalue().to_pybytes())
    buffer = pa.BufferOutputStream()
    pa.csv.write_csv(table, buffer)
    write_bytes(output / "trials.csv", buffer.getvalue().to_pybytes())
    lines = {
        **{k: str(v) for k, v in record["settings"].items()},
        "learning rate": f"log-uniform, {RATES[0]:g} to {RATES[1]:g}",
        "InfoNCE shares": ", ".join(map(str, INFO_NCE_SHARES)),
        "early stopping": f"ASHA, after half of the epochs, one in {REDUCTION} continues",
        "vectors": f"{manifest.rows:,} of {manifest.source or 'a source not stated'}, {manifest.identity}",
    }
    lines["trials that training improved"] = (
        f"{record['improved']} of {len(rows)}, over the model they started from"
    )
    if record["ensemble"]:
        made = record["ensemble"]
        lines["ensemble"] = (
            f"{', '.join(made['members'])}: val cosine {made['val_cosine']:.4f}, best single model "
            f"{made['best_member_val_cosine']:.4f}"
        )
    page = html_page(rows, intervals, "A sweep of next-vector models", lines)
    write_bytes(output / "sweep.html", page.encode())
    write_json(output / "sweep.json", dict(record))


def read_trials(output: Location) -> list[Trial]:
    """The rows of a sweep's table."""
    with (output / "trials.parquet").open("rb") as file:
        table = pa.parquet.read_table(pa.BufferReader(file.read()))
    # Older tables lack some columns.
    return [{name: row.get(name) for name in SCHEMA.names} for row in table.to_pylist()]  # type: ignore[misc]


def discard_checkpoints(folder: Location) -> None:
    """Delete the trials' checkpoints: the best are records now, and the others keep their row in the table."""
    for checkpoint in folder.glob("*/checkpoint_*"):
        if not isinstance(checkpoint, RemotePath):  # those are left to the bucket's expiry rules
            shutil.rmtree(checkpoint, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- command


def main(
    vectors: Annotated[PathOrUrl, path_option("Folder that `latent encode` wrote.")],
    output: Annotated[PathOrUrl, path_option("Folder for the tables, the report and the best models.")],
    trials: Annotated[int, typer.Option(min=1, help="Number of trials.")] = 100,
    hours: Annotated[
        float | None,
        typer.Option(help="Maximum hours; the same command resumes later. Default: no limit."),
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"Architectures, comma-separated, of {', '.join(SEARCHED)}; or all.")
    ] = "all",
    contexts: Annotated[str, typer.Option(help="Context lengths to try, comma-separated.")] = "5,10,20",
    recipe: Annotated[str, typer.Option(help="Recipe for everything that is not searched.")] = "fast",
    epochs: Annotated[int, typer.Option(min=1, help="Maximum epochs per trial.")] = 8,
    windows_per_epoch: Annotated[
        int,
        typer.Option(
            min=1, help="Training windows per epoch. With far fewer, few trials improve on their start."
        ),
    ] = 40_000,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling, the split and the training.")
    ] = 0,
    allow_non_sequential: NonSequential = None,
    gpus: Annotated[int | None, typer.Option(min=1, help=GPUS_HELP)] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a sweep of other settings or vectors.")] = False,
    address: Address = None,
) -> None:
    """Search architectures and settings; a second run with the same settings resumes."""
    started = time.perf_counter()
    if hours is not None and not 0 < hours <= MAX_HOURS:
        raise InputError(f"--hours must be above 0 and at most {MAX_HOURS:,}, got {hours}")
    recipe_named(recipe)
    names = SEARCHED if model == "all" else tuple(dict.fromkeys(n.strip() for n in model.split(",")))
    if unknown := [name for name in names if name not in SEARCHED]:
        raise InputError(f"--model {unknown[0]!r}: expected all, or some of {', '.join(SEARCHED)}")
    settings = SweepSettings(
        trials,
        names,
        parse_contexts(contexts),
        recipe,
        epochs,
        windows_per_epoch,
        seed,
    )
    rows, record, up_to_date = sweep(
        vectors, output, settings, hours, allow_non_sequential, gpus, address, overwrite
    )
    if up_to_date:
        echo(f"sweep: {output} is up to date")
    if not record["complete"]:
        missing = sum(r["state"] == "out of time" for r in rows)
        echo(f"sweep: unfinished trials: {missing} of {len(rows)}; the same command resumes them")
    intervals = {int(n): Interval(**i) for n, i in record["intervals"].items()}
    print(as_text(leaderboard(rows, intervals)))
    if not record["improved"]:
        echo(
            "sweep: no epoch of any trial was better than the closed-form start, so learning rates and objectives were "
            "not compared; give --windows-per-epoch or --epochs more"
        )
    best = scored(rows)[0]
    finish(
        "sweep",
        rows=len(rows),
        **timing(started, len(rows)),
        paths=[str(output / n) for n in ("trials.parquet", "trials.csv", "sweep.html", "sweep.json")],
        up_to_date=up_to_date,
        complete=record["complete"],
        improved=record["improved"],
        states={s: sum(r["state"] == s for r in rows) for s in sorted({r["state"] for r in rows})},
        best={"model": best["model"], "val_cosine": best["val_cosine"]},
        ensemble=record["ensemble"],
    )


def parse_contexts(given: str) -> tuple[int, ...]:
    """Context lengths, ascending, from a comma-separated text. Raises InputError for anything else."""
    try:
        values = tuple(sorted({int(part) for part in given.split(",")}))
    except ValueError as err:
        raise InputError(f"--contexts {given!r}: expected comma-separated integers, such as 5,10,20") from err
    if values[0] < 1 or values[-1] > MAX_CONTEXT:
        raise InputError(f"--contexts must be 1 to {MAX_CONTEXT}, got {given}")
    return values


if __name__ == "__main__":
    run(main)
