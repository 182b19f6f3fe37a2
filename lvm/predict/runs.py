"""A training run: its settings, its checkpoints, and resuming from one. Ray Train and Ray Tune are in jobs/; they
decide where checkpoints are stored."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvm.corpus.tmd import Prototypes, coder_name
from lvm.devices import pick_device
from lvm.errors import InputError
from lvm.models import CONFIGS, Architecture, build
from lvm.predict.predictor import SHIPPED
from lvm.predict.ranking import RankHead, fit_rank_head
from lvm.predict.record import CONFIG, load_record, on_cpu, read_aliases, read_json
from lvm.predict.team import ALONE, Team
from lvm.predict.tracking import MlflowCurves
from lvm.predict.training import (
    SMALL_SET,
    TRIAL_EPOCHS,
    Progress,
    Recipe,
    bfloat16_is_faster,
    choose_start,
    fit,
)
from lvm.storage import Location, local_folder, local_folder_for
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.sequences import Windows, WindowSettings, make_windows
from lvm.vectors.shards import file_sha256, fingerprint

TRAINING_VERSION = 1
"""Increased when the same settings give different weights than before, so that models are trained again."""

WEIGHTS, BEST = "model.safetensors", "best.safetensors"
"""Files of a checkpoint: the epoch's weights, and those of the best epoch if it is an earlier one."""

CHECKSUMS = "sha256.json"
"""File of a checkpoint: SHA-256 by file name, to detect corrupt weights and optimiser state."""


@dataclass(frozen=True)
class TrainRun:
    """One architecture on one set of windows: everything that a worker needs. Can be pickled."""

    model: str
    """Key of MODELS."""
    vectors: Location
    """Folder of the encode job."""
    vectors_fingerprint: str
    """Fingerprint of that folder's manifest."""
    windows: WindowSettings
    recipe: Recipe
    seed: int
    """Seed of the split by article and, if `training_seed` is None, of training."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture's config that differ from its default; `dim` is the vectors' length."""
    reach: int | None = None
    """Context length of the validation windows, of which the model reads the last vectors, so that runs of different
    context lengths are compared on the same targets. None: the model's own."""
    layers_from: Location | None = None
    """Folder of a GPT-2 checkpoint to initialise `gpt2` from."""
    training_seed: int | None = None
    """Seed of initial weights, batch order and dropout; None: `seed`."""
    prototypes: Prototypes | None = None
    """TMD labels of the vectors' codec, for a model that also reads each vector's code; None for vectors only."""
    bundled: str | None = None
    """Folder name of a bundled record to start from if that is better (`choose_start`)."""

    @classmethod
    def of(
        cls,
        array: VectorArray,
        model: str,
        windows: WindowSettings,
        recipe: Recipe,
        seed: int = 0,
        sizes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "TrainRun":
        """A run on this array, with its vector length as `dim`."""
        sizes = {"dim": array.identity.dim, **(sizes or {})}
        return cls(model, array.directory, array.fingerprint, windows, recipe, seed, sizes, **options)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that determines the weights."""
        recipe = self.recipe.to_dict()
        # The learning rates of other architectures do not matter.
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
        optional = {
            "reach": self.reach,
            "layers_from": None if self.layers_from is None else str(self.layers_from),
            "training_seed": self.training_seed,
            "tmd": None if self.prototypes is None else coder_name(),
            "bundled": self.bundled,
        }
        return fingerprint(parts | {k: v for k, v in optional.items() if v is not None})

    @property
    def series(self) -> str:
        """The fingerprint without the training seed: equal for runs that differ only in it."""
        return replace(self, training_seed=None).fingerprint

    @property
    def alias(self) -> str:
        """Alias of its records: the architecture, with -tmd if it reads codes."""
        return self.model if self.prototypes is None else f"{self.model}-tmd"

    @property
    def label(self) -> str:
        """Name in messages: the alias, and the training seed if it is set."""
        return self.alias if self.training_seed is None else f"{self.alias} seed {self.training_seed}"

    @property
    def seed_of_training(self) -> int:
        """`training_seed`, or `seed` if that is None."""
        return self.seed if self.training_seed is None else self.training_seed

    @property
    def name(self) -> str:
        """Unique name of the run; starting it again with the same settings resumes it."""
        return f"{self.alias}-{self.fingerprint}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Main settings, for experiment trackers."""
        return {
            "model": self.alias,
            "recipe": self.recipe.name,
            "epochs": self.recipe.epochs,
            "learning_rate": self.recipe.learning_rates[self.model],
            "seed": self.seed_of_training,
            "context": self.windows.context,
            "vectors": self.vectors_fingerprint,
            **self.sizes,
        }

    def build(self) -> Architecture:
        """The untrained model, with random weights or those of `layers_from`."""
        model: Any = build(self.model, dict(self.sizes), tmd=self.prototypes is not None)
        if self.prototypes is not None:
            model.tmd.prototypes.copy_(torch.from_numpy(self.prototypes.vectors))
        if self.layers_from is not None:
            model.load_layers(local_folder(self.layers_from))
        return model  # type: ignore[no-any-return]


def bundled_start(array: VectorArray, model: str, num_windows: int) -> str | None:
    """Folder name of the bundled record that a run of this architecture could start from: `num_windows` are few, and
    the vectors are of its codec. None if there is none."""
    name = read_aliases(SHIPPED).get(model)
    if name is None or num_windows >= SMALL_SET:
        return None
    digest = read_json(SHIPPED / name / CONFIG)["codec"]["digest"]
    return name if digest == array.identity.digest else None


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run."""

    progress: Progress
    device: str
    """Device that it was trained on, for people."""
    ranker: RankHead | None
    """Rank head for the best epoch's weights."""


def train_run(
    run: TrainRun,
    checkpoint: Path | None,
    on_checkpoint: Callable[[Path | None, dict[str, Any]], None],
    on_progress: Callable[[dict[str, Any]], None],
    events: Location,
    team: Team = ALONE,
    mlflow: str | None = None,
) -> Outcome:
    """Train to the end, from a checkpoint if there is one.

    on_checkpoint: called after each epoch with a checkpoint's folder, deleted afterwards, and the new entry of the
    learning curve. on_progress: receives progress messages: the curve's entries, `resumed`, `rank_loss`. events: folder
    for TensorBoard. team: the workers that train this model together, each of which calls this function. In all but the
    first, `on_checkpoint` gets None as folder, `on_progress` is not called and the outcome has no rank head. mlflow:
    URI from `prepare_mlflow`, to log the curve there too. Raises InputError if the vectors changed or are too few,
    TrainingError if the loss becomes NaN or infinite.
    """
    from torch.utils.tensorboard import SummaryWriter

    parts = windows_of(run)
    best: dict[str, Tensor] = {}
    torch.manual_seed(run.seed_of_training)
    model = run.build()
    progress: Progress | None = None
    optimiser_state: dict[str, Any] | None = None
    device = pick_device()
    model.to(device)
    if checkpoint is None:
        progress, note = start_run(run, model, parts, team)
        if note is not None and team.rank == 0:
            on_progress({"note": note})
    else:
        model.load_state_dict(load_file(checkpoint / WEIGHTS))
        best = best_weights(checkpoint)
        # Deleted once the run has its record: then training is over.
        if (state := checkpoint / "optimiser.pt").exists():
            optimiser_state = torch.load(state, map_location="cpu", weights_only=True)
        progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    start = progress.epoch if progress is not None else 0
    if checkpoint is not None and team.rank == 0:
        on_progress({"resumed": start})

    def save(model: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        if team.rank:
            on_checkpoint(None, progress.curve[-1])
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(on_cpu(model.state_dict()), folder / WEIGHTS)
            if progress.best is not progress.curve[-1]:
                save_file(on_cpu(best), folder / BEST)
            torch.save(optimiser.state_dict(), folder / "optimiser.pt")
            (folder / "progress.json").write_text(json.dumps(progress.to_dict()))
            sums = {name: file_sha256(folder / name) for name in os.listdir(folder)}
            (folder / CHECKSUMS).write_text(json.dumps(sums))
            on_checkpoint(folder, progress.curve[-1])

    with ExitStack() as opened:
        if team.rank == 0:
            writer = SummaryWriter(opened.enter_context(local_folder_for(events)), purge_step=start + 1)
            opened.callback(writer.close)
        curves = None
        if team.rank == 0 and mlflow is not None:
            curves = MlflowCurves(mlflow, run.name, run.parameters)
            opened.push(lambda kind, *_: curves.close(kind is None))

        def log(row: dict[str, Any]) -> None:
            for key, value in row.items():
                if key != "epoch":
                    writer.add_scalar(key, value, row["epoch"])
            writer.flush()
            if curves is not None and (fault := curves.log(row)):
                on_progress({"note": fault})
            on_progress({**row, "device": str(device)})

        progress = fit(
            model,
            run.model,
            parts["train"],
            parts["val"],
            run.recipe,
            run.seed_of_training,
            progress=progress,
            optimiser_state=optimiser_state,
            best=best,
            save=save,
            log=log if team.rank == 0 else None,
            team=team,
        )
    if team.rank:
        return Outcome(progress, str(device), None)
    outcome = outcome_of(run, model, parts["train"], progress, on_progress)
    return outcome if team.size == 1 else replace(outcome, device=f"{team.size} x {outcome.device}")


def start_run(
    run: TrainRun, model: Architecture, parts: Mapping[str, Windows], team: Team = ALONE
) -> tuple[Progress | None, str | None]:
    """Choose between the recipe's start and the run's bundled record; returns the state to hand to `fit`, and a note
    for people. Both are None for a run without a bundled record, which `fit` initialises."""
    if run.bundled is None:
        return None, None
    weights = load_record(SHIPPED, run.bundled).model.state_dict()
    cosines = choose_start(
        model, run.model, parts["train"], parts["val"], run.recipe, run.seed_of_training, weights, team
    )
    better = cosines["weights"] >= cosines["recipe"]
    figures = (
        f"val cosine after {TRIAL_EPOCHS} epochs {cosines['weights']:.4f}, without it {cosines['recipe']:.4f}"
    )
    if better:
        return Progress(bundled=run.bundled), f"starts from the bundled {run.bundled} ({figures})"
    return Progress(), f"does not start from the bundled {run.bundled} ({figures})"


def outcome_of(
    run: TrainRun,
    model: Architecture,
    train: Windows,
    progress: Progress,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """The result of a run, after training the rank head if its recipe has one.

    model: with the best epoch's weights, on its device.
    """
    device = next(model.parameters()).device
    ranker = None
    if run.recipe.rank is not None:
        bfloat16 = run.recipe.bfloat16 and bfloat16_is_faster(device)
        start = None if progress.bundled is None else load_record(SHIPPED, progress.bundled).ranker
        ranker = fit_rank_head(model, train, run.recipe.rank, run.seed_of_training, bfloat16, log, start)
    return Outcome(progress, str(device), ranker)


def best_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint's best epoch, which are a file of their own unless it is the latest."""
    return load_file(checkpoint / (BEST if (checkpoint / BEST).exists() else WEIGHTS))


def windows_of(run: TrainRun) -> dict[str, Windows]:
    """Windows of train, val and test. Raises InputError if the vectors changed since the run was created."""
    array = open_vectors(run.vectors)
    if array.fingerprint != run.vectors_fingerprint:
        raise InputError(f"{run.vectors} changed while this job ran; run it again")
    parts = make_windows(array, run.windows).split(run.seed)
    if run.reach is not None:
        longer = make_windows(array, replace(run.windows, context=run.reach)).split(run.seed)
        parts["val"] = longer["val"].last(run.windows.context)
    return parts


def require_whole(checkpoint: Any) -> None:
    """Raise InputError, naming the file, if a file of a checkpoint is corrupt.

    Checkpoints on object storage are not checked: it has its own checksums, and the check would download everything.
    """
    folder = Path(checkpoint.path)
    if not folder.is_dir() or not (folder / CHECKSUMS).exists():
        return
    for name, sha256 in json.loads((folder / CHECKSUMS).read_text()).items():
        if name == "optimiser.pt" and not (folder / name).exists():
            continue  # deleted once the run has its record
        if (got := file_sha256(folder / name)) != sha256:
            raise InputError(f"{folder / name} has SHA-256 {got[:16]}…, expected {sha256[:16]}…")
