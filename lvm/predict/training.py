"""The training loop of predictors: plain PyTorch; checkpoints and logs are handled by callbacks.

`fit` repeats: evaluate, log, save, stop?, train one epoch. Its state is the weights, the optimiser and a `Progress`;
learning rate, batches and dropout depend only on settings, seed and epoch. So a run resumed from a checkpoint
continues as if it had not been interrupted.

Letters: B batch, T context vectors, D vector length.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lvm.errors import InputError, TrainingError
from lvm.models import MODELS, OPTIMIZED, Architecture
from lvm.predict.losses import LossReport, LossSettings, backward, mse
from lvm.predict.ranking import RankSettings
from lvm.predict.start import SOLVED_WINDOWS, Batch, WindowSource, solve_start, spread_batches
from lvm.predict.team import ALONE, Team

# ------------------------------------------------------------------------------------------------- settings


SMALL_SET = 50_000
"""Training windows below which `Recipe.small_sets` applies, and a run may start from a bundled record: larger sets
train well by themselves, and may hold the very articles that the bundled models have read."""


@dataclass(frozen=True)
class Recipe:
    """Training settings."""

    name: str
    """Shown in records."""
    learning_rates: Mapping[str, float]
    """Peak learning rate of each architecture."""
    optimiser: Literal["adam", "adamw"]
    """AdamW applies weight decay to matrices, not to biases and LayerNorm."""
    epochs: int
    """Passes over the training windows, or over max_windows_per_epoch of them."""
    batch_windows: int
    """Windows per step; fewer with small_sets."""
    weight_decay: float = 0.0
    """AdamW's coefficient; multiplied by the learning rate."""
    warmup_share: float = 0.0
    """Share of the run in which the learning rate rises from 0 to its peak."""
    final_rate_share: float = 0.0
    """Learning rate at the end of the cosine schedule, as a share of the peak."""
    max_gradient_norm: float | None = None
    """Gradient clipping; None for none."""
    max_windows_per_epoch: int | None = None
    """An epoch ends after this many windows; the next one continues from there."""
    max_val_windows: int = 8192
    """Maximum validation windows evaluated after each epoch, evenly spaced."""
    patience: int | None = None
    """Stop after this many epochs without a better val cosine."""
    max_minutes: float | None = None
    """Maximum training time; the learning rate schedule ends with it."""
    small_sets: bool = False
    """Below SMALL_SET windows, use smaller batches and scale the learning rate with the square root of their number."""
    solved_start: bool = False
    """Initialise the model with `lvm.predict.start` instead of at random."""
    bfloat16: bool = False
    """Multiply in bfloat16 if that is faster on the device; weights and loss stay float32."""
    loss: LossSettings = field(default_factory=LossSettings)
    rank: RankSettings | None = None
    """Settings of the rank head, trained after the predictor; None for no head."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_windows", "max_val_windows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(f"max_minutes must be above 0, got {self.max_minutes}")
        if missing := set(MODELS) - set(self.learning_rates):
            raise InputError(f"recipe {self.name} has no learning rate for {', '.join(sorted(missing))}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Recipe":
        """Inverse of `to_dict`."""
        rank = record.get("rank")
        loss = LossSettings(**record["loss"])
        return cls(**{**record, "loss": loss, "rank": None if rank is None else RankSettings(**rank)})

    def batch_size(self, num_windows: int) -> int:
        """Windows per step for a training set of this size."""
        if not self.small_sets:
            return self.batch_windows
        # At least about 24 steps per epoch, and at least 64 windows per step.
        fitting: int = 2 ** int(math.log2(max(num_windows / 24, 1)))
        return max(min(self.batch_windows, fitting), min(64, self.batch_windows))

    def peak_rate(self, model: str, num_windows: int) -> float:
        """Peak learning rate for this architecture and a training set of this size."""
        shrink = min(1.0, math.sqrt(num_windows / SMALL_SET)) if self.small_sets else 1.0
        return self.learning_rates[model] * shrink

    def windows_per_epoch(self, num_windows: int) -> int:
        """Windows seen in one epoch."""
        return min(num_windows, self.max_windows_per_epoch or num_windows)

    def steps_per_epoch(self, num_windows: int) -> int:
        """Batches in one epoch."""
        return math.ceil(self.windows_per_epoch(num_windows) / self.batch_size(num_windows))


CLASSIC = Recipe("classic", dict.fromkeys(MODELS, 5e-4), optimiser="adam", epochs=20, batch_windows=32)
"""The original system's recipe (MSE on unit vectors, Adam, cosine schedule)."""

FAST = Recipe(
    name="fast",
    learning_rates={**dict.fromkeys(MODELS, 3e-4), "lstm": 1e-3},
    optimiser="adamw",
    epochs=8,
    batch_windows=256,
    weight_decay=0.05,
    warmup_share=0.1,
    final_rate_share=0.02,
    max_gradient_norm=1.0,
    max_windows_per_epoch=40_000,
    max_val_windows=4096,
    patience=2,
    max_minutes=20.0,
    small_sets=True,
    solved_start=True,
    bfloat16=True,
    rank=RankSettings(),
)
"""The default."""

LONG = replace(FAST, name="long", epochs=24, patience=4, max_minutes=120.0)
"""`fast` with more time: on Wikipedia and two cores, 20 minutes suffice for only four of the Transformer's eight epochs
(tests/bench/results)."""

RECIPES = {r.name: r for r in (FAST, CLASSIC, LONG)}

OWN_RECIPES = {OPTIMIZED: LONG}
"""Models with a recipe of their own, which replaces any recipe asked for by name."""


def recipe_named(name: str) -> Recipe:
    """The recipe of this name. Raises InputError listing the names."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_for(model: str, name: str) -> Recipe:
    """The recipe for this model if `name` is asked for. Raises InputError listing the names."""
    recipe = recipe_named(name)
    return OWN_RECIPES.get(model, recipe)


TRIAL_EPOCHS = 2
"""Epochs after which `choose_start` compares. On the demo's 2,674 windows, one epoch left AMN undecided (val cosine
0.2479 and 0.2480); two and three agree with the whole run."""


# ------------------------------------------------------------------------------------------------- progress


@dataclass
class Progress:
    """State of a run; with the weights and the optimiser, all that is needed to resume."""

    epoch: int = 0
    """Epochs trained."""
    seconds: float = 0.0
    """Time of training and evaluation, over all attempts."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """The learning curve, one entry per epoch: epoch, train_loss, learning_rate, val_loss, val_cosine, seconds, and
    with InfoNCE the fields of `LossReport`, averaged over the epoch's steps. Epoch 0 is the initial model, without
    the values measured in training."""
    stopped: str | None = None
    """Why training ended; None before that."""
    bundled: str | None = None
    """Folder name of the bundled record whose weights the run started from; None if it started otherwise."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    @property
    def best(self) -> dict[str, Any]:
        """The entry with the highest val cosine; the earliest if several have it."""
        return max(self.curve, key=lambda row: (row["val_cosine"], -row["epoch"]))


@dataclass(frozen=True)
class Score:
    """Means over the validation windows."""

    loss: float
    """Squared distance, 2 - 2 cosine."""
    cosine: float


def shuffled_windows(total: int, recipe: Recipe, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Indices of each batch of an epoch (from 1), out of `total` windows, shuffled by seed and epoch.

    With max_windows_per_epoch, consecutive epochs continue through one shuffled order, so no window repeats before all
    were seen.
    """
    wanted = recipe.windows_per_epoch(total)
    offset = (epoch - 1) * wanted
    chosen: list[NDArray[np.int64]] = []
    while wanted:
        cycle, start = divmod(offset, total)
        order = np.random.default_rng((seed, cycle)).permutation(total)
        chosen.append(order[start : start + wanted])
        offset += len(chosen[-1])
        wanted -= len(chosen[-1])
    indices = np.concatenate(chosen)
    size = recipe.batch_size(total)
    for low in range(0, len(indices), size):
        yield indices[low : low + size]


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 in hardware.

    With AVX-512 BF16, a training step takes 0.5 to 0.6 of its float32 time (AMD Zen 4, one thread, batch 256, the four
    main models); without hardware support bfloat16 is slower than float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    return False


# --------------------------------------------------------------------------------------------------- the loop


def learning_rate(recipe: Recipe, peak: float, done: float) -> float:
    """The learning rate at this share (0 to 1) of the run: linear warm-up, then a cosine decay."""
    if done < recipe.warmup_share:
        return peak * done / recipe.warmup_share
    rest = (done - recipe.warmup_share) / max(1.0 - recipe.warmup_share, 1e-9)
    low = peak * recipe.final_rate_share
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))


def make_optimiser(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters; the learning rate is set before each step."""
    parameters = list(model.parameters())
    fused = device.type in ("cpu", "cuda")  # one pass over the weights: 12 ms instead of 60 for 18 million
    if recipe.optimiser == "adam":
        return torch.optim.Adam(parameters, lr=0.0, fused=fused)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)


def train_step(
    forward: nn.Module,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    contexts: Tensor,
    targets: Tensor,
    recipe: Recipe,
    bfloat16: bool,
    weight: float = 1.0,
) -> LossReport:
    """One optimiser step on one batch. If the loss is not finite, the weights are left unchanged.

    forward: `Team.forward` of the model. contexts: (B, T, D), targets: (B, D), on the model's device. weight: from
    `Team.part`. The loss is `model.loss(contexts, targets)` if the architecture has its own, else the recipe's.
    """
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(contexts.device.type, torch.bfloat16, enabled=bfloat16):
        output = forward(contexts, targets)
    if hasattr(model, "loss"):
        (weight * output).backward()
        report = LossReport(output.item())
    else:
        report = backward(recipe.loss, output, targets, model.parameters(), weight)
    if not math.isfinite(report.loss):
        return report
    if recipe.max_gradient_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimiser.step()
    return report


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], bfloat16: bool = False, team: Team = ALONE) -> Score:
    """Mean loss and cosine over all windows of all workers; leaves the model in evaluation mode.

    Raises InputError if there is no window.
    """
    model.eval()
    device = next(model.parameters()).device
    count, loss, cosine = 0.0, 0.0, 0.0
    for contexts, targets in batches:
        truth = torch.from_numpy(targets).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted = model(torch.from_numpy(contexts).to(device)).float()
        loss += float(mse(predicted, truth)) * len(targets)
        cosine += float(F.cosine_similarity(predicted, truth).sum())
        count += len(targets)
    count, loss, cosine = team.all_reduce(count, loss, cosine)
    if not count:
        raise InputError("expected at least one window to evaluate on, got none")
    return Score(loss / count, cosine / count)


def fit(
    model: Architecture,
    name: str,
    train: WindowSource,
    val: WindowSource,
    recipe: Recipe,
    seed: int,
    *,
    progress: Progress | None = None,
    optimiser_state: dict[str, Any] | None = None,
    best: dict[str, Tensor] | None = None,
    save: Callable[[nn.Module, torch.optim.Optimizer, Progress], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    team: Team = ALONE,
) -> Progress:
    """Train `model` in place, on its device, until the recipe says to stop. The final weights are those of the best
    epoch by val cosine.

    name: key of MODELS. progress, optimiser_state, best: state to resume from; the caller has loaded the weights. best
    has the weights of the best epoch so far and is updated in place. save: called after each epoch, including 0, with
    the state to resume from; log: before it, with the new entry of the learning curve. team: the workers that train
    this model together, each of which calls this function with the same arguments.

    Raises TrainingError, naming epoch and batch, if the loss becomes NaN or infinite; saved states remain valid.
    """
    device = next(model.parameters()).device
    bfloat16 = recipe.bfloat16 and bfloat16_is_faster(device)
    peak = recipe.peak_rate(name, len(train))
    steps_per_epoch = recipe.steps_per_epoch(len(train))
    if hasattr(model, "loss") and recipe.loss.info_nce_share:
        raise InputError(
            f"{name} has its own loss, which cannot be combined with InfoNCE; expected info_nce_share 0 for it, got "
            f"{recipe.loss.info_nce_share:g}"
        )
    if team.size > 1 and recipe.loss.info_nce_share:
        raise InputError(f"a loss with InfoNCE needs 1 worker per model, got {team.size}; train with one")
    prepare = getattr(model, "prepare", None)
    if progress is None and prepare is not None:
        prepare(torch.from_numpy(targets) for _, targets in spread_batches(train, SOLVED_WINDOWS))
    if progress is None and recipe.solved_start:
        solve_start(model, train)
    optimiser = make_optimiser(model, recipe, device)
    if optimiser_state is not None:
        optimiser.load_state_dict(optimiser_state)
    progress = progress or Progress()
    best = {} if best is None else best
    if not best and progress.curve and progress.best["epoch"] == progress.epoch:
        best.update(copy_of_weights(model))
    forward = team.forward(model)
    begun = clock() - progress.seconds
    trained: dict[str, float] = {}
    while True:
        # Evaluate, unless the run was resumed here: then the curve has this epoch already.
        resumed = bool(progress.curve) and progress.curve[-1]["epoch"] == progress.epoch
        if not resumed:
            batches = spread_batches(val, recipe.max_val_windows, first=team.rank, every=team.size)
            score = evaluate(model, batches, bfloat16, team)
            if not math.isfinite(score.loss):
                raise TrainingError(
                    f"{name}: the validation loss is {score.loss} after epoch {progress.epoch}; expected a "
                    f"number. Training of {name} ends here. Use a lower learning rate."
                )
            progress.seconds = team.broadcast(clock() - begun)
            row = {"epoch": progress.epoch, **trained, "val_loss": score.loss, "val_cosine": score.cosine}
            row["seconds"] = round(progress.seconds, 3)
            progress.curve.append(row)
            if progress.best is row:
                best.update(copy_of_weights(model))
            # Log, then save: if the run is killed in between, the epoch is repeated and merely logged twice.
            if log is not None:
                log(row)
            if save is not None:
                save(model, optimiser, progress)

        progress.stopped = _reason_to_stop(progress, recipe)
        if progress.stopped is not None:
            if best:
                model.load_state_dict(best)
            return progress

        # Train one epoch. Seeding dropout by epoch makes a resumed run equal to an uninterrupted one.
        progress.epoch += 1
        torch.manual_seed((seed * 1_000_003 + progress.epoch) * team.size + team.rank)
        model.train()
        reports: list[LossReport] = []
        rate, seconds = 0.0, progress.seconds
        for number, indices in enumerate(shuffled_windows(len(train), recipe, seed, progress.epoch), start=1):
            mine, weight = team.part(indices)
            contexts, targets = train.batch(mine)
            steps_done = (progress.epoch - 1) * steps_per_epoch + number - 0.5
            done = steps_done / (recipe.epochs * steps_per_epoch)
            if recipe.max_minutes is not None:
                done = max(done, seconds / (60.0 * recipe.max_minutes))
            rate = learning_rate(recipe, peak, done)
            for group in optimiser.param_groups:
                group["lr"] = rate
            x, y = torch.from_numpy(contexts).to(device), torch.from_numpy(targets).to(device)
            report = train_step(forward, model, optimiser, x, y, recipe, bfloat16, weight)
            # The same loss and time on all workers, so that they all stop together.
            elapsed = clock() - begun if team.rank == 0 else 0.0
            loss, seconds = team.all_reduce(report.loss * weight / team.size, elapsed)
            report = replace(report, loss=loss)
            if not math.isfinite(report.loss):
                raise TrainingError(
                    f"{name}: the loss is {report.loss} at epoch {progress.epoch}, batch {number} of "
                    f"{steps_per_epoch} (learning rate {rate:.2g}); expected a number. Training of {name} "
                    "ends here. Use a lower learning rate."
                )
            reports.append(report)
            if done >= 1.0:
                break  # max_minutes are over
        trained = {**_means(reports), "learning_rate": rate}


def choose_start(
    model: Architecture,
    name: str,
    train: WindowSource,
    val: WindowSource,
    recipe: Recipe,
    seed: int,
    weights: Mapping[str, Tensor],
    team: Team = ALONE,
) -> dict[str, float]:
    """Leave `model` either with `weights` or initialised as the recipe says, whichever has the better val cosine after
    TRIAL_EPOCHS epochs of training at most; returns both cosines, as `weights` and `recipe`.

    Trained weights are compared after some training because they have not seen this corpus, while an initialisation by
    regression is fitted to it. Arguments as in `fit`.
    """
    short = replace(recipe, epochs=TRIAL_EPOCHS, solved_start=False, patience=None)
    if recipe.solved_start:
        solve_start(model, train)
    starts: dict[str, Mapping[str, Tensor]] = {"weights": weights, "recipe": copy_of_weights(model)}
    cosines = {}
    for start, state in starts.items():
        model.load_state_dict(dict(state))
        cosines[start] = fit(model, name, train, val, short, seed, progress=Progress(), team=team).best[
            "val_cosine"
        ]
    model.load_state_dict(dict(starts[max(cosines, key=lambda start: cosines[start])]))
    return cosines


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _reason_to_stop(progress: Progress, recipe: Recipe) -> str | None:
    if progress.epoch >= recipe.epochs:
        return f"all {recipe.epochs} epochs are done"
    if progress.curve and recipe.patience is not None:
        since = progress.epoch - progress.best["epoch"]
        if since >= recipe.patience:
            return f"val cosine did not rise for {since} epochs"
    if recipe.max_minutes is not None and progress.seconds >= 60.0 * recipe.max_minutes:
        return f"{recipe.max_minutes:g} minutes are over"
    return None


def _means(reports: list[LossReport]) -> dict[str, float]:
    """Means over an epoch's steps of the fields that were measured."""
    row = {"train_loss": float(np.mean([r.loss for r in reports]))}
    for name in ("info_nce", "mse_gradient_norm", "info_nce_gradient_norm", "info_nce_scale"):
        values = [getattr(r, name) for r in reports]
        if values[0] is not None:
            row[name] = float(np.mean(values))
    return row
