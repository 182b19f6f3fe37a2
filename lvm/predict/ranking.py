"""A second vector for every context: the one to search with.

Squared distance makes a predictor answer with the mean of what may follow, which is near many chunks and first to none:
it lies nearer to the true next vector than any baseline does, and finds it later than the plain mean of its context. So
a predictor has a head besides, trained to find, of the chunks around it, the next one. What is decoded is the
prediction; what is searched with (snap, ranks) is the head's vector.

The head is linear, through a few hundred channels, in the context and in the predictor's features, which stay as they
are. Its loss is InfoNCE (van den Oord et al. 2018) over batches of neighbouring windows, since what is hard is to tell
the next chunk from the others of its article; the window's own context is left out of the negatives, as it is no
candidate in a search either. On 343,000 windows of Wikipedia, 32 windows an article in place of 8 took the reciprocal
rank from 0.109 to 0.115 and recall at 10 of 10,000 from 0.504 to 0.508.

Letters: B windows of a batch, T context vectors, D vector length, H features.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lvm.errors import InputError, TrainingError
from lvm.vectors.sequences import Windows


@dataclass(frozen=True)
class RankSettings:
    """How the head is trained."""

    windows: int = 1_500_000
    """Windows seen, at most PASSES times each."""
    places: int = 16
    """Places in the corpus from which a batch is drawn."""
    windows_a_place: int = 32
    """Windows from around each, of one article."""
    span: int = 40
    """How far from the place they may lie, in chunks."""
    temperature: float = 0.05
    """InfoNCE divides cosines by this."""
    learning_rate: float = 3e-4
    """Highest, of AdamW."""
    weight_decay: float = 0.3
    """Of the matrices, times the learning rate: what is known of few articles fades."""

    def __post_init__(self) -> None:
        for name in ("windows", "places", "windows_a_place", "span", "temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


PASSES = 6
"""Times a window is seen at most: on few windows more is learning by heart."""

CHANNELS = 128
"""Between inputs and output: with more the head learns the training articles by heart. All 768 of them, on a million
windows, found worse (reciprocal rank 0.114 within the article, against 0.120 at 256)."""

DECAY = 0.7
"""Start of the context's own weights: each vector counts this much of the next one."""


class RankHead(nn.Module):
    """Vectors to search with, from contexts and the predictor's features."""

    def __init__(self, context: int, dim: int, features: int, channels: int = CHANNELS) -> None:
        """context: T, dim: D, features: H, 0 for a predictor that has none."""
        super().__init__()
        self.sizes = {"context": context, "dim": dim, "features": features, "channels": channels}
        self.weights = nn.Parameter(DECAY ** torch.arange(context - 1, -1, -1.0))
        self.read = nn.Linear(context * dim + features, channels, bias=False)
        self.add = nn.Linear(channels, dim)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)

    def forward(self, contexts: Tensor, features: Tensor | None = None) -> Tensor:
        """(B, D) float32 unit vectors from contexts (B, any T, D) and features (B, H).

        Of longer contexts the last vectors are read; in shorter ones the missing, older ones count nothing.
        """
        length, dim = self.sizes["context"], self.sizes["dim"]
        contexts = contexts[:, -length:]
        contexts = F.pad(contexts, (0, 0, length - contexts.shape[1], 0))
        # Entries of a unit vector are near 1 / root D; at 1 every weight moves alike.
        inputs = contexts.flatten(1) * math.sqrt(dim)
        if features is not None:
            inputs = torch.cat((inputs, features), dim=1)
        learnt: Tensor = self.add(self.read(inputs))
        kept = torch.einsum("t,btd->bd", self.weights.to(contexts), contexts)
        return F.normalize(kept.float() + learnt.float() / math.sqrt(dim), dim=-1)


def features_of(model: nn.Module, contexts: Tensor) -> Tensor | None:
    """(B, H) what the predictor's output layer reads; None where it has no such layer."""
    if not hasattr(model, "features") or not getattr(model, "solves_output", True):
        return None
    features: Callable[[Tensor], Tensor] = model.features  # type: ignore[assignment]
    return features(contexts)


@torch.inference_mode()
def search_vectors(model: nn.Module, head: RankHead, contexts: Tensor) -> Tensor:
    """(B, D) unit vectors to search with, from contexts (B, T, D) on the model's device."""
    found: Tensor = head(contexts, features_of(model, contexts))
    return found.float()


def rank_loss(
    found: Tensor,
    targets: Tensor,
    target_rows: NDArray[np.int64],
    context_rows: NDArray[np.int64],
    temperature: float,
) -> Tensor:
    """InfoNCE of finding each window's target among the batch's, without those in its own context; a scalar.

    found, targets: (B, D) unit vectors; target_rows (B,) and context_rows (B, T): rows of the vector array.
    """
    own = (context_rows[:, :, None] == target_rows[None, None, :]).any(axis=1)
    scores = (found @ targets.T / temperature).masked_fill(torch.from_numpy(own).to(found.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def near_windows(windows: Windows, settings: RankSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """Windows of one batch, ascending, none twice: some around each of several places, of one article each."""
    docs, last = windows.doc_ids, len(windows)
    chosen = []
    for place in rng.integers(0, last, settings.places):
        around = np.arange(max(0, place - settings.span), min(last, place + settings.span + 1))
        around = around[docs[around] == docs[place]]
        chosen.append(rng.permutation(around)[: settings.windows_a_place])
    return np.unique(np.concatenate(chosen))


def fit_rank_head(
    model: nn.Module,
    windows: Windows,
    settings: RankSettings | None = None,
    seed: int = 0,
    bfloat16: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> RankHead:
    """A head for this predictor, on its device; the predictor stays as it is.

    windows: those that the predictor was trained on. log: called every hundred steps with step, steps, rank_loss.
    Raises TrainingError when the loss is no longer a number.
    """
    settings = settings or RankSettings()
    device = next(model.parameters()).device
    model = model.eval()
    contexts, _ = windows.batch(slice(0, 1))
    with torch.inference_mode():
        example = features_of(model, torch.from_numpy(contexts).to(device))
    torch.manual_seed(seed)
    head = RankHead(windows.context, contexts.shape[2], 0 if example is None else example.shape[1]).to(device)
    groups = [
        {"params": [p for p in head.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in head.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.0)
    rng = np.random.default_rng(seed)
    target_rows, context_rows = windows.rows_of_target, windows.rows_of_context
    a_batch = settings.places * settings.windows_a_place
    steps = math.ceil(min(settings.windows, PASSES * len(windows)) / a_batch)
    losses: list[float] = []
    for step in range(1, steps + 1):
        done = (step - 0.5) / steps
        rate = settings.learning_rate * min(1.0, done / 0.1) * 0.5 * (1.0 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate
        rows = near_windows(windows, settings, rng)
        batch = [torch.from_numpy(a).to(device) for a in windows.batch(rows)]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                features = features_of(model, batch[0])
            found = head(batch[0], features)
        truth = F.normalize(batch[1].float(), dim=-1)
        loss = rank_loss(found, truth, target_rows[rows], context_rows[rows], settings.temperature)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the rank head's loss is {loss.item()} at step {step} of {steps}; expected a number. Take a lower "
                "learning rate."
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if log is not None and (step % 100 == 0 or step == steps):
            log({"step": step, "steps": steps, "rank_loss": float(np.mean(losses[-100:]))})
    return head.eval()
