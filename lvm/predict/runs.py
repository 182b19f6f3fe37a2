"""A training run: its settings, its checkpoints, and how it goes on from one. Whoever starts runs (Ray Train, Ray Tune)
says where checkpoints go."""

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
from lvm.predict.ranking import RankHead, fit_rank_head
from lvm.predict.team import ALONE, Team
from lvm.predict.tracking import MlflowCurves
from lvm.predict.training import Progress, Recipe, bfloat16_is_faster, fit
from lvm.storage import Location, local_folder, local_folder_for
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.sequences import Windows, WindowSettings, make_windows
from lvm.vectors.shards import file_sha256, fingerprint

TRAINING_VERSION = 1
"""Raised when the same settings give other weights than before, so that models are trained anew."""

WEIGHTS, BEST = "model.safetensors", "best.safetensors"
"""In each checkpoint: the epoch's weights, and those of the best epoch where that is an earlier one."""

CHECKSUMS = "sha256.json"
"""In each checkpoint, by file name: weights and an optimiser's state do not show that a bit of them turned."""


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
    """Of the split by article and, where `training_seed` is None, of training."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture's config that differ from its default; `dim` is the vectors' length."""
    reach: int | None = None
    """Validation windows are those that have so many context vectors, of which the model reads the last ones: so runs
    of different context lengths are judged on the same targets. None: of as many as the model reads."""
    layers_from: Location | None = None
    """Folder of a GPT-2 checkpoint that `gpt2` starts from."""
    training_seed: int | None = None
    """Of the first weights, the order of batches and the dropout; None is `seed`."""
    prototypes: Prototypes | None = None
    """Labels of the vectors' codec, for a model that reads each vector's TMD code beside it; None for one that reads
    vectors alone."""

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
        """A run on this array; the network's `dim` is its vectors'."""
        sizes = {"dim": array.identity.dim, **(sizes or {})}
        return cls(model, array.directory, array.fingerprint, windows, recipe, seed, sizes, **options)

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
        if self.training_seed is not None:
            parts["training_seed"] = self.training_seed
        if self.prototypes is not None:
            parts["tmd"] = coder_name()
        return fingerprint(parts)

    @property
    def series(self) -> str:
        """The fingerprint without the training's seed: runs that differ in it alone are of one series."""
        return replace(self, training_seed=None).fingerprint

    @property
    def alias(self) -> str:
        """What its records are called: the architecture, and -tmd where it reads codes."""
        return self.model if self.prototypes is None else f"{self.model}-tmd"

    @property
    def label(self) -> str:
        """What a person reads: the alias and, where it is not the split's, the training's seed."""
        return self.alias if self.training_seed is None else f"{self.alias} seed {self.training_seed}"

    @property
    def seed_of_training(self) -> int:
        """The seed that training draws from."""
        return self.seed if self.training_seed is None else self.training_seed

    @property
    def name(self) -> str:
        """Name of the run: the same settings go on with the same run."""
        return f"{self.alias}-{self.fingerprint}"

    @property
    def parameters(self) -> dict[str, Any]:
        """What a person compares runs by."""
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
        """The untrained model; its first weights are torch's random ones, or of `layers_from`."""
        model: Any = build(self.model, dict(self.sizes), tmd=self.prototypes is not None)
        if self.prototypes is not None:
            model.tmd.prototypes.copy_(torch.from_numpy(self.prototypes.vectors))
        if self.layers_from is not None:
            model.load_layers(local_folder(self.layers_from))
        return model  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Outcome:
    """What a finished run gives."""

    progress: Progress
    device: str
    """What it was trained on, in words."""
    ranker: RankHead | None
    """Of the best epoch's weights."""


def train_run(
    this: TrainRun,
    checkpoint: Path | None,
    keep: Callable[[Path | None, dict[str, Any]], None],
    tell: Callable[[dict[str, Any]], None],
    events: Location,
    team: Team = ALONE,
    mlflow: str | None = None,
) -> Outcome:
    """Train to the end, from a checkpoint where there is one.

    keep: is given the folder of a checkpoint and the curve's new entry after each epoch; the folder goes when it
    returns. tell: takes what a person may want to know: the curve's entries, `resumed`, `rank_loss`. events: folder of
    TensorBoard's curves. team: the workers that train this together, each of which calls this; `keep` gets a folder in
    the first alone, None in the others, which tell nothing and whose outcome has no head. mlflow: URI of
    `prepare_mlflow`, for the curves there too. Raises InputError when the vectors changed or do not suffice,
    TrainingError when the loss is no longer a number.
    """
    from torch.utils.tensorboard import SummaryWriter

    parts = windows_of(this)
    best: dict[str, Tensor] = {}
    torch.manual_seed(this.seed_of_training)
    model = this.build()
    progress: Progress | None = None
    optimiser_state: dict[str, Any] | None = None
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint / WEIGHTS))
        best = load_file(checkpoint / (BEST if (checkpoint / BEST).exists() else WEIGHTS))
        # Absent where the run had its record already: then no step is left to take.
        if (moments := checkpoint / "optimiser.pt").exists():
            optimiser_state = torch.load(moments, map_location="cpu", weights_only=True)
        progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    start = progress.epoch if progress is not None else 0
    if checkpoint is not None and team.rank == 0:
        tell({"resumed": start})
    device = pick_device()
    model.to(device)

    def save(model: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        if team.rank:
            keep(None, progress.curve[-1])
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(_on_cpu(model.state_dict()), folder / WEIGHTS)
            if progress.best is not progress.curve[-1]:
                save_file(_on_cpu(best), folder / BEST)
            torch.save(optimiser.state_dict(), folder / "optimiser.pt")
            (folder / "progress.json").write_text(json.dumps(progress.to_dict()))
            sums = {name: file_sha256(folder / name) for name in os.listdir(folder)}
            (folder / CHECKSUMS).write_text(json.dumps(sums))
            keep(folder, progress.curve[-1])

    with ExitStack() as opened:
        if team.rank == 0:
            writer = SummaryWriter(opened.enter_context(local_folder_for(events)), purge_step=start + 1)
            opened.callback(writer.close)
        curves = None
        if team.rank == 0 and mlflow is not None:
            curves = MlflowCurves(mlflow, this.name, this.parameters)
            opened.push(lambda kind, *_: curves.close(kind is None))

        def log(row: dict[str, Any]) -> None:
            for key, value in row.items():
                if key != "epoch":
                    writer.add_scalar(key, value, row["epoch"])
            writer.flush()
            if curves is not None and (fault := curves.log(row)):
                tell({"note": fault})
            tell({**row, "device": str(device)})

        progress = fit(
            model,
            this.model,
            parts["train"],
            parts["val"],
            this.recipe,
            this.seed_of_training,
            progress=progress,
            optimiser_state=optimiser_state,
            best=best,
            save=save,
            log=log if team.rank == 0 else None,
            team=team,
        )
    if team.rank:
        return Outcome(progress, str(device), None)
    outcome = outcome_of(this, model, parts["train"], progress, tell)
    return outcome if team.size == 1 else replace(outcome, device=f"{team.size} x {outcome.device}")


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def outcome_of(
    this: TrainRun,
    model: Architecture,
    train: Windows,
    progress: Progress,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """What a run gives, with the head where its recipe has one. model: with the best epoch's weights, on its device."""
    device = next(model.parameters()).device
    ranker = None
    if this.recipe.rank is not None:
        bfloat16 = this.recipe.bfloat16 and bfloat16_is_faster(device)
        ranker = fit_rank_head(model, train, this.recipe.rank, this.seed_of_training, bfloat16, log)
    return Outcome(progress, str(device), ranker)


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
