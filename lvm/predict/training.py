"""Fitting a predictor: plain PyTorch on batches from anywhere. Ray, disks and logs come in as functions.

`fit` reads in the order evaluate, log, save, stop?, step. Its state is the weights, the optimiser and a
`Progress`; learning rate, batches and dropout follow from the settings, the seed and the epoch alone. So a
run that is killed and goes on from its last checkpoint does what it would have done.

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


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained."""

    name: str
    """Shown in records."""
    learning_rates: Mapping[str, float]
    """Peak learning rate of each architecture."""
    optimiser: Literal["adam", "adamw"]
    """AdamW decays weights (not biases, not LayerNorm) beside the gradient."""
    epochs: int
    """Passes over the training windows, or over max_windows_per_epoch of them."""
    batch_windows: int
    """Windows a step; fewer on small sets where small_sets is on."""
    weight_decay: float = 0.0
    """AdamW's decay a step, times the learning rate."""
    warmup_share: float = 0.0
    """Part of the run in which the learning rate rises from 0 to its peak."""
    final_rate_share: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    max_gradient_norm: float | None = None
    """Longer gradients are scaled down to this; None leaves them."""
    max_windows_per_epoch: int | None = None
    """An epoch ends after so many windows; the next goes on where it ended."""
    max_val_windows: int = 8192
    """Validation windows scored after each epoch, evenly spaced over all."""
    patience: int | None = None
    """Epochs without a better val cosine after which training stops."""
    max_minutes: float | None = None
    """Longest training time; the learning rate falls in time for it."""
    small_sets: bool = False
    """Under 50,000 windows: smaller batches, and a learning rate that falls with the root of their number."""
    solved_start: bool = False
    """Start from a solved output layer (`lvm.predict.start`) instead of at random."""
    bfloat16: bool = False
    """Multiply in bfloat16 where the device is faster with it; weights and loss stay float32."""
    loss: LossSettings = field(default_factory=LossSettings)
    """What is minimised."""
    rank: RankSettings | None = None
    """How the head that searches is trained, after the predictor; None for no head."""

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
        """The recipe `to_dict` gave."""
        rank = record.get("rank")
        return cls(
            **{
                **record,
                "loss": LossSettings(**record["loss"]),
                "rank": None if rank is None else RankSettings(**rank),
            }
        )

    def batch_size(self, num_windows: int) -> int:
        """Windows a step for a training set of this size."""
        if not self.small_sets:
            return self.batch_windows
        # About 24 steps an epoch or more, down to 64 windows a step.
        fitting: int = 2 ** int(math.log2(max(num_windows / 24, 1)))
        return max(min(self.batch_windows, fitting), min(64, self.batch_windows))

    def peak_rate(self, model: str, num_windows: int) -> float:
        """Highest learning rate for this architecture on a training set of this size."""
        shrink = min(1.0, math.sqrt(num_windows / 50_000)) if self.small_sets else 1.0
        return self.learning_rates[model] * shrink

    def windows_per_epoch(self, num_windows: int) -> int:
        """Windows seen in one epoch."""
        return min(num_windows, self.max_windows_per_epoch or num_windows)

    def steps_per_epoch(self, num_windows: int) -> int:
        """Batches in one epoch."""
        return math.ceil(self.windows_per_epoch(num_windows) / self.batch_size(num_windows))


CLASSIC = Recipe(
    name="classic",
    learning_rates=dict.fromkeys(MODELS, 5e-4),
    optimiser="adam",
    epochs=20,
    batch_windows=32,
)
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
"""`fast` with room for an architecture that `fast` cuts short: on Wikipedia and two cores the Transformer's 20 minutes
were over after four of eight epochs (tests/bench/results). Its rank head and rates are those of `fast`."""

RECIPES = {r.name: r for r in (FAST, CLASSIC, LONG)}

OWN_RECIPES = {OPTIMIZED: LONG}
"""Recipes that belong to a name of MODELS, whatever recipe the others are trained with."""


def recipe_named(name: str) -> Recipe:
    """The recipe of this name. Raises InputError listing the names."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_for(model: str, name: str) -> Recipe:
    """The recipe this model is trained with when `name` is asked for. Raises InputError listing the names."""
    recipe = recipe_named(name)
    return OWN_RECIPES.get(model, recipe)


# ------------------------------------------------------------------------------------------------- progress


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimiser, all it needs to go on."""

    epoch: int = 0
    """Epochs trained."""
    seconds: float = 0.0
    """Time trained and evaluated, over all attempts."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """One entry an epoch: epoch, train_loss, learning_rate, val_loss, val_cosine, seconds, and with InfoNCE
    what `LossReport` measured, each a mean over the epoch's steps. Epoch 0 is the start, before any step: a
    candidate like the others, without what only training measures."""
    stopped: str | None = None
    """Why training ended, None while it goes on."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    @property
    def best(self) -> dict[str, Any]:
        """The curve's entry with the highest val cosine, the earlier of two equal ones."""
        return max(self.curve, key=lambda row: (row["val_cosine"], -row["epoch"]))


@dataclass(frozen=True)
class Score:
    """Means over the validation windows."""

    loss: float
    """Squared distance, 2 - 2 cosine."""
    cosine: float


# ----------------------------------------------------------------------------------------------- data order


def shuffled_windows(total: int, recipe: Recipe, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """The windows, of `total`, of each batch of one epoch, counted from 1, in an order that seed and epoch decide.

    With max_windows_per_epoch, epochs walk on through one shuffled order, so that every window is seen before
    one comes again.
    """
    wanted = recipe.windows_per_epoch(total)
    place = (epoch - 1) * wanted
    chosen: list[NDArray[np.int64]] = []
    while wanted:
        turn, start = divmod(place, total)
        order = np.random.default_rng((seed, turn)).permutation(total)
        chosen.append(order[start : start + wanted])
        place += len(chosen[-1])
        wanted -= len(chosen[-1])
    indices = np.concatenate(chosen)
    size = recipe.batch_size(total)
    for low in range(0, len(indices), size):
        yield indices[low : low + size]


# --------------------------------------------------------------------------------------------- device, dtype


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether this device has bfloat16 multiplication of its own.

    On a CPU with AVX-512 BF16 a training step takes 0.5 to 0.6 of its float32 time (measured on AMD Zen 4,
    one thread, batch 256, all four models); without it, bfloat16 is emulated and slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    return False


# --------------------------------------------------------------------------------------------------- the loop


def learning_rate(recipe: Recipe, peak: float, done: float) -> float:
    """The rate when this share of the run (0 to 1) is done: a straight rise, then half a cosine."""
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
    """One step on one batch; what its loss and gradients were.

    forward: `Team.forward` of the model. contexts: (B, T, D), targets: (B, D), on the model's device, and their weight
    (`Team.part`). What is minimised is `model.loss(contexts, targets)` where the architecture has one of its own, else
    the recipe's. A loss that is no number leaves the weights as they were.
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
    """Loss and cosine, means over all windows, those of the whole team; the model is left in evaluation mode.

    Raises InputError where there is no window.
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
    count, loss, cosine = team.sums(count, loss, cosine)
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
    """Train `model` in place, on the device it is on, until the recipe or the val cosine says stop; it then has the
    weights of its best epoch by val cosine.

    name: key of MODELS. Without `progress` training begins, from a solved start where the recipe says so;
    with it the caller has loaded the weights. `save` is called once an epoch, 0 included, with a state from
    which another call goes on (`progress`, `optimiser_state`, `best` and the weights); `log` likewise, with the curve's
    new entry. best: weights of the best epoch so far, kept up to date in place; {} or None to begin with.

    team: the workers that train this model together, each of which calls this with the same arguments.

    Raises TrainingError naming epoch and batch when the loss is no longer a number; what was saved stays
    good.
    """
    device = next(model.parameters()).device
    bfloat16 = recipe.bfloat16 and bfloat16_is_faster(device)
    peak = recipe.peak_rate(name, len(train))
    steps_per_epoch = recipe.steps_per_epoch(len(train))
    if hasattr(model, "loss") and recipe.loss.info_nce_share:
        raise InputError(
            f"{name} has a loss of its own, beside which InfoNCE has no place; expected info_nce_share 0 for it, got "
            f"{recipe.loss.info_nce_share:g}"
        )
    if team.size > 1 and recipe.loss.info_nce_share:
        raise InputError(
            "InfoNCE beside squared distance trains with one worker a model; expected no more than 1"
        )
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
        best.update(_copy_of_weights(model))
    forward = team.forward(model)
    begun = clock() - progress.seconds
    trained: dict[str, float] = {}
    while True:
        # Evaluate: whoever compares models, or picks a checkpoint, reads this. A resumed run has it already.
        resumed = bool(progress.curve) and progress.curve[-1]["epoch"] == progress.epoch
        if not resumed:
            batches = spread_batches(val, recipe.max_val_windows, first=team.rank, every=team.size)
            score = evaluate(model, batches, bfloat16, team)
            if not math.isfinite(score.loss):
                raise TrainingError(
                    f"{name}: the validation loss is {score.loss} after epoch {progress.epoch}; expected a "
                    f"number. Training of {name} ends here. Take a lower learning rate."
                )
            progress.seconds = team.of_first(clock() - begun)
            row = {
                "epoch": progress.epoch,
                **trained,
                "val_loss": score.loss,
                "val_cosine": score.cosine,
                "seconds": round(progress.seconds, 3),
            }
            progress.curve.append(row)
            if progress.best is row:
                best.update(_copy_of_weights(model))
            # Log, then save: a kill between the two costs the epoch, a line too many costs nothing.
            if log is not None:
                log(row)
            if save is not None:
                save(model, optimiser, progress)

        # Stop?
        progress.stopped = _reason_to_stop(progress, recipe)
        if progress.stopped is not None:
            if best:
                model.load_state_dict(best)
            return progress

        # Step through one epoch. Dropout draws from the epoch's own seed, so resuming changes nothing.
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
            report = train_step(
                forward,
                model,
                optimiser,
                torch.from_numpy(contexts).to(device),
                torch.from_numpy(targets).to(device),
                recipe,
                bfloat16,
                weight,
            )
            # One of them has to know what all do next.
            loss, seconds = team.sums(
                report.loss * weight / team.size, clock() - begun if team.rank == 0 else 0.0
            )
            report = replace(report, loss=loss)
            if not math.isfinite(report.loss):
                raise TrainingError(
                    f"{name}: the loss is {report.loss} at epoch {progress.epoch}, batch {number} of "
                    f"{steps_per_epoch} (learning rate {rate:.2g}); expected a number. Training of {name} "
                    "ends here. Take a lower learning rate."
                )
            reports.append(report)
            if done >= 1.0:
                break  # out of minutes
        trained = {**_means(reports), "learning_rate": rate}


def _copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
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
    """Means over an epoch's steps, of what was measured."""
    row = {"train_loss": float(np.mean([r.loss for r in reports]))}
    for name in ("info_nce", "mse_gradient_norm", "info_nce_gradient_norm", "info_nce_scale"):
        values = [getattr(r, name) for r in reports]
        if values[0] is not None:
            row[name] = float(np.mean(values))
    return row
