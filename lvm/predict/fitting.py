"""Train one predictor in this process (`fit`), and the parts shared with `latent train`, which trains several: the
checks before training and the record of a finished run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lvm.corpus.coherence import Coherence, require_sequential
from lvm.corpus.tmd import Prototypes, coder_name
from lvm.devices import usable_device
from lvm.errors import InputError, OutputError
from lvm.models import Predictor, require_known
from lvm.predict import training
from lvm.predict.predictor import TrainedPredictor
from lvm.predict.record import find_record, load_record, read_aliases, save_record, set_alias
from lvm.predict.runs import Outcome, TrainRun, bundled_start, outcome_of, start_run
from lvm.predict.start import spread_batches
from lvm.predict.training import Recipe, recipe_for
from lvm.storage import Location, location
from lvm.vectors.array import VectorArray
from lvm.vectors.sequences import Windows, WindowSettings, make_windows
from lvm.vectors.shards import Manifest


@dataclass(frozen=True)
class TrainingData:
    """Windows to train on, and their origin."""

    array: VectorArray
    manifest: Manifest
    """Manifest of the encode job."""
    parts: dict[str, Windows]
    """Windows of train, val and test."""
    coherence: Coherence
    """Result of the test for sequential text."""

    @classmethod
    def of(
        cls,
        array: VectorArray,
        windows: WindowSettings,
        seed: int = 0,
        allow_non_sequential: str | None = None,
    ) -> "TrainingData":
        """The windows of an array, split. Raises InputError if there are too few, or if the text is not sequential and
        `allow_non_sequential` does not override that."""
        manifest = Manifest.load(array.directory, "vectors")
        coherence = check_sequential(array, manifest.source, allow_non_sequential)
        return cls(array, manifest, make_windows(array, windows).split(seed), coherence)

    @property
    def num_windows(self) -> dict[str, int]:
        """Number of windows of train, val and test."""
        return {name: len(part) for name, part in self.parts.items()}

    def bundled_start(self, model: str, fresh: bool, prototypes: Prototypes | None) -> str | None:
        """`lvm.predict.runs.bundled_start` for these windows; None if `fresh`, or for a model that also reads codes."""
        if fresh or prototypes is not None:
            return None
        return bundled_start(self.array, model, len(self.parts["train"]))


def fit(
    vectors: VectorArray,
    models: Location | str,
    model: str = "gru",
    recipe: Recipe | str = "fast",
    seed: int = 0,
    windows: WindowSettings | None = None,
    device: str = "auto",
    log: Callable[[dict[str, Any]], None] | None = None,
    allow_non_sequential: str | None = None,
    prototypes: Prototypes | None = None,
    fresh: bool = False,
) -> TrainedPredictor:
    """Train a predictor of these vectors, save its record in `models`, and point the alias `model` to it.

    The weights are those of the best epoch by val cosine. A second call with the same settings does not train, but
    returns the existing record.

    model: a name of lvm.models.MODELS; its sizes follow the vectors. recipe: `fast`, `classic`, `long` or your own;
    `transformer-optimized` has its own instead of a named one. seed: of the split by article and of training. windows:
    context length and filters. device: auto (CUDA, then MPS, then CPU) or a torch device. log: called after each epoch
    with its entry of the learning curve (epoch, val_loss, val_cosine, seconds and, from epoch 1, train_loss).
    allow_non_sequential: the sentence, quoted in the error, that allows training on text that is not sequential.
    prototypes: TMD labels of the vectors' codec, for a model that also reads each vector's code; its alias gets -tmd.
    fresh: do not start from a bundled model, which otherwise happens on small corpora of the bundled codec where it
    gives the better val cosine.

    Raises InputError on an unknown name, text that is not sequential, or too few articles; OutputError if `models` is
    not a folder of models; IdentityError if it has models of another codec; TrainingError if the loss becomes NaN.
    """
    if not isinstance(vectors, VectorArray):
        raise InputError(
            f"vectors are {type(vectors).__name__}, expected what lvm.open_vectors returns: "
            "lvm.open_vectors(folder) of a finished `latent encode`"
        )
    require_known(model)
    where = usable_device(device)
    recipe = recipe if isinstance(recipe, Recipe) else recipe_for(model, recipe)
    models = location(models).resolve()
    require_models_folder(models)
    require_codec_of_models(models, vectors)
    windows = windows or WindowSettings()
    data = TrainingData.of(vectors, windows, seed, allow_non_sequential)
    bundled = data.bundled_start(model, fresh, prototypes)
    run = TrainRun.of(vectors, model, windows, recipe, seed, prototypes=prototypes, bundled=bundled)
    folder = find_record(models, model, run=run.fingerprint)
    if folder is None:
        torch.manual_seed(seed)
        network = run.build().to(where)
        progress, _ = start_run(run, network, data.parts)
        progress = training.fit(
            network, model, data.parts["train"], data.parts["val"], recipe, seed, progress=progress, log=log
        )
        done = outcome_of(run, network, data.parts["train"], progress)
        folder, _ = save_trained(models, run, network, data, done, progress.best)
    if read_aliases(models).get(run.alias) != folder.name:
        set_alias(models, run.alias, folder)
    return TrainedPredictor(load_record(models, folder.name))


def save_trained(
    models: Location,
    run: TrainRun,
    network: Predictor,
    data: TrainingData,
    done: Outcome,
    best: Mapping[str, Any],
) -> tuple[Location, dict[str, Any]]:
    """Save the record of a finished run; returns its folder and metrics. The alias is not changed.

    network: with the weights of `best`, an entry of the learning curve. Raises OutputError if the disk is full.
    """
    manifest, sizes, recipe, progress = data.manifest, data.num_windows, run.recipe, done.progress
    context_mean = context_mean_cosine(data.parts["val"], recipe.max_val_windows)
    metrics = {
        "val_cosine": best["val_cosine"],
        "val_loss": best["val_loss"],
        "context_mean_val_cosine": context_mean,
        "start_val_cosine": progress.curve[0]["val_cosine"],
        "best_epoch": best["epoch"],
        "epochs": progress.epoch,
        "seconds": round(progress.seconds, 1),
        "stopped": progress.stopped,
        "train_windows": sizes["train"],
        "val_windows": min(sizes["val"], recipe.max_val_windows),
        "test_windows": sizes["test"],
        "curve": progress.curve,
    }
    loss = "squared distance of unit vectors (MSE)"
    if hasattr(network, "loss"):
        loss = f"the architecture's own, see lvm/models/{run.model.replace('-', '_')}.py"
    elif share := recipe.loss.info_nce_share:
        loss += f", with InfoNCE at {share:g} of its gradient norm"
    start = [f"layers of {run.layers_from}"] if run.layers_from is not None else []
    if progress.bundled is not None:
        start.append(f"the bundled {progress.bundled}")
    elif recipe.solved_start:
        start.append("inputs along the principal directions")
        if getattr(network, "solves_output", True):
            start.append("output layer by ridge regression")
    batch = recipe.batch_size(sizes["train"])
    peak = recipe.peak_rate(run.model, sizes["train"])
    config = {
        "run": run.fingerprint,
        "series": run.series,
        "seed": run.seed,
        **({} if run.training_seed is None else {"training_seed": run.training_seed}),
        "windows": asdict(run.windows),
        "vectors": vectors_entry(data.array.directory, manifest),
        "coherence": data.coherence.to_dict(),
        "recipe": recipe.to_dict(),
        "device": done.device,
        **({} if run.reach is None else {"reach": run.reach}),
        **({} if run.prototypes is None else {"tmd": coder_name()}),
        **({} if progress.bundled is None else {"bundled": progress.bundled}),
    }
    codes = {"Codes": f"16 bits of its TMD code beside each vector ({coder_name()})"}
    seeds = f"{run.seed} of the split, {run.training_seed} of training"
    provenance = {
        "Data source": f"{manifest.source or 'not stated'} (licence: {manifest.licence or 'not stated'})",
        "Vectors": f"{manifest.rows:,}, fingerprint {run.vectors_fingerprint}",
        "Sequences": f"{sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test windows of "
        f"{run.windows.context} vectors and the next, split by article",
        **({} if run.prototypes is None else codes),
        "Loss": loss,
        "Start": ", ".join(start) or "random",
        "Optimiser": f"{recipe.optimiser}, peak learning rate {peak:.2g}, batch {batch}, recipe {recipe.name}",
        "Epochs": f"{progress.epoch} trained ({progress.stopped}); these are the weights of epoch {best['epoch']}",
        "Seed": str(run.seed) if run.training_seed is None else seeds,
        "Device": done.device,
    }
    issues = []
    if best["val_cosine"] <= context_mean:
        issues.append(
            "On validation articles it does not beat the mean of its context (cosine "
            f"{best['val_cosine']:.4f} against {context_mean:.4f})."
        )
    if data.coherence.fault is not None:
        issues.append(f"Trained on text that the coherence test refuses: {data.coherence.fault}.")
    folder = save_record(
        models, run.model, network, manifest.identity, config, metrics, provenance, tuple(issues), done.ranker
    )
    return folder, metrics


def vectors_entry(vectors: Location, manifest: Manifest) -> dict[str, Any]:
    """The entry in config.json for the vectors that a model was trained or evaluated on."""
    entry = {"directory": str(vectors), "fingerprint": manifest.fingerprint, "rows": manifest.rows}
    return entry | {"source": manifest.source, "licence": manifest.licence}


def require_models_folder(models: Location) -> None:
    """Raise OutputError unless `models` is, or can become, a folder of records."""
    if models.exists() and not models.is_dir():
        raise OutputError(f"{models} is a file, expected a folder for models; choose another")
    if (models / "manifest.json").exists():
        kind = Manifest.load(models).kind
        raise OutputError(f"{models} holds {kind}, expected models or an empty folder; choose another")


def require_codec_of_models(models: Location, array: VectorArray) -> None:
    """Raise IdentityError unless every alias in `models` is a model of the vectors' codec."""
    for alias, folder in read_aliases(models).items():
        if (models / folder).is_dir():
            what = f"model {alias!r} in {models} ({folder})"
            array.require_codec(load_record(models, folder).identity, what)


def check_sequential(array: VectorArray, source: str, allow_non_sequential: str | None) -> Coherence:
    """Test whether the text is sequential. Raises InputError if not, unless `allow_non_sequential` overrides that."""
    firsts = np.flatnonzero(np.diff(array.doc_ids, prepend=-1))
    names = sorted({source, *array.sources(firsts)})
    return require_sequential(array.vectors, array.doc_ids, array.positions, names, allow_non_sequential)


def context_mean_cosine(val: Windows, limit: int) -> float:
    """Mean cosine of the context mean to the target, on the windows that training is validated on."""
    total, count = 0.0, 0
    for contexts, targets in spread_batches(val, limit):
        mean = contexts.mean(axis=1)
        norms = np.linalg.norm(mean, axis=1) * np.linalg.norm(targets, axis=1)
        total += float((np.einsum("bd,bd->b", mean, targets) / np.maximum(norms, 1e-12)).sum())
        count += len(targets)
    return total / count
