"""From an opened vector array to a model record, in this process. `latent train` does the same for several at once.

What both need is here: the checks before training, what a run is known by, and the record of a finished one.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lvm.codec.identity import require_same_codec
from lvm.corpus.coherence import Coherence, require_sequential
from lvm.corpus.tmd import Prototypes, coder_name
from lvm.devices import pick_device
from lvm.errors import InputError, OutputError
from lvm.models import Predictor, require_known
from lvm.predict import training
from lvm.predict.predictor import TrainedPredictor
from lvm.predict.record import (
    find_record,
    load_record,
    read_aliases,
    save_record,
    set_alias,
)
from lvm.predict.runs import Outcome, TrainRun, outcome_of
from lvm.predict.start import spread_batches
from lvm.predict.training import Recipe, recipe_for
from lvm.storage import Location, location
from lvm.vectors.array import VectorArray
from lvm.vectors.sequences import Windows, WindowSettings, make_windows
from lvm.vectors.shards import Manifest


@dataclass(frozen=True)
class TrainingData:
    """Windows to train on, and what is known of them; for the records."""

    array: VectorArray
    manifest: Manifest
    """Of the encode job."""
    parts: dict[str, Windows]
    """Windows of train, val and test."""
    coherence: Coherence
    """How sequential the text was found to be."""

    @classmethod
    def of(
        cls,
        array: VectorArray,
        windows: WindowSettings,
        seed: int = 0,
        allow_non_sequential: str | None = None,
    ) -> "TrainingData":
        """The windows of an array. Raises InputError where the text is not sequential and the user does not insist, and
        where there are too few windows to split."""
        manifest = Manifest.load(array.directory, "vectors")
        coherence = check_sequential(array, manifest.source, allow_non_sequential)
        return cls(array, manifest, make_windows(array, windows).split(seed), coherence)

    @property
    def num_windows(self) -> dict[str, int]:
        """Windows of train, val and test."""
        return {name: len(part) for name, part in self.parts.items()}


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
) -> TrainedPredictor:
    """A predictor of these vectors with the weights of its best epoch by val cosine, and its record in `models`.

    model: a name of lvm.models.MODELS; its sizes follow the vectors. recipe: `fast`, `classic`, `long` or your own;
    `transformer-optimized` has its own where a name is given. seed: of the split by article and of training. windows:
    context length and filters. device: auto (CUDA, then MPS, then CPU) or a torch device. log: called with the curve's
    row after each epoch (epoch, val_loss, val_cosine, seconds and, from epoch 1, train_loss). allow_non_sequential: the
    sentence that lets text without an order train; the refusal names
    it. prototypes: TMD labels of the vectors' codec, for a model that reads each vector's code beside it. The alias
    `model`, then with -tmd, moves to the new record; a second call with the same settings trains nothing and returns
    the record there is.

    Raises InputError on an unknown name, on text that is not sequential and on too few articles; OutputError where
    `models` is no folder of models; IdentityError where it holds models of another codec; TrainingError where the loss
    is no longer a number.
    """
    if not isinstance(vectors, VectorArray):
        raise InputError(
            f"vectors are {type(vectors).__name__}, expected what lvm.open_vectors returns: "
            "lvm.open_vectors(folder) of a finished `latent encode`"
        )
    require_known(model)
    recipe = recipe if isinstance(recipe, Recipe) else recipe_for(model, recipe)
    models = location(models).resolve()
    require_models_folder(models)
    require_codec_of_models(models, vectors)
    this = TrainRun.of(vectors, model, windows or WindowSettings(), recipe, seed, prototypes=prototypes)
    data = TrainingData.of(vectors, this.windows, seed, allow_non_sequential)
    folder = find_record(models, model, run=this.fingerprint)
    if folder is None:
        torch.manual_seed(seed)
        network = this.build().to(pick_device(device))
        progress = training.fit(network, model, data.parts["train"], data.parts["val"], recipe, seed, log=log)
        done = outcome_of(this, network, data.parts["train"], progress)
        folder, _ = save_trained(models, this, network, data, done, progress.best)
    if read_aliases(models).get(this.alias) != folder.name:
        set_alias(models, this.alias, folder)
    return TrainedPredictor(load_record(models, folder.name))


def save_trained(
    models: Location,
    this: TrainRun,
    network: Predictor,
    data: TrainingData,
    done: Outcome,
    best: Mapping[str, Any],
) -> tuple[Location, dict[str, Any]]:
    """The record of a finished run, and its metrics; the alias does not move.

    network: with the weights of `best`, a row of the progress' curve. Raises OutputError when the disk is full.
    """
    manifest, sizes, recipe, progress = data.manifest, data.num_windows, this.recipe, done.progress
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
    share = recipe.loss.info_nce_share
    if hasattr(network, "loss"):
        loss = f"the architecture's own, see lvm/models/{this.model.replace('-', '_')}.py"
    else:
        loss = "squared distance of unit vectors (MSE)" + (
            f", with InfoNCE at {share:g} of its gradient norm" if share else ""
        )
    start = [f"layers of {this.layers_from}"] if this.layers_from is not None else []
    if recipe.solved_start:
        start.append("inputs along the principal directions")
        if getattr(network, "solves_output", True):
            start.append("output layer by ridge regression")
    batch = recipe.batch_size(sizes["train"])
    peak = recipe.peak_rate(this.model, sizes["train"])
    config = {
        "run": this.fingerprint,
        "series": this.series,
        "seed": this.seed,
        **({} if this.training_seed is None else {"training_seed": this.training_seed}),
        "windows": asdict(this.windows),
        "vectors": vectors_entry(data.array.directory, manifest),
        "coherence": data.coherence.to_dict(),
        "recipe": recipe.to_dict(),
        "device": done.device,
        **({} if this.reach is None else {"reach": this.reach}),
        **({} if this.prototypes is None else {"tmd": coder_name()}),
    }
    provenance = {
        "Data source": f"{manifest.source or 'not stated'} (licence: {manifest.licence or 'not stated'})",
        "Vectors": f"{manifest.rows:,}, fingerprint {this.vectors_fingerprint}",
        "Sequences": f"{sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test windows of "
        f"{this.windows.context} vectors and the next, split by article",
        **(
            {}
            if this.prototypes is None
            else {"Codes": f"beside each vector the 16 bits of its TMD code ({coder_name()})"}
        ),
        "Loss": loss,
        "Start": ", ".join(start) or "random",
        "Optimiser": f"{recipe.optimiser}, peak learning rate {peak:.2g}, batch {batch}, "
        f"recipe {recipe.name}",
        "Epochs": f"{progress.epoch} trained ({progress.stopped}); these are the weights of epoch "
        f"{best['epoch']}",
        "Seed": str(this.seed)
        if this.training_seed is None
        else f"{this.seed} of the split, {this.training_seed} of training",
        "Device": done.device,
    }
    issues = []
    if best["val_cosine"] <= context_mean:
        issues.append(
            "On validation articles it does not beat the mean of its context (cosine "
            f"{best['val_cosine']:.4f} against {context_mean:.4f})."
        )
    if data.coherence.fault is not None:
        issues.append(f"Trained on text the coherence test refuses: {data.coherence.fault}.")
    folder = save_record(
        models,
        this.model,
        network,
        manifest.identity,
        config,
        metrics,
        provenance,
        tuple(issues),
        done.ranker,
    )
    return folder, metrics


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
        raise OutputError(f"{models} is a file, expected a folder for models; choose another")
    if (models / "manifest.json").exists():
        kind = Manifest.load(models).kind
        raise OutputError(f"{models} holds {kind}, expected models or an empty folder; choose another")


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
