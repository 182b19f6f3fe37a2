"""The rank head: a second output of a predictor, used as the query to search for the next chunk.

A predictor trained on squared distance returns the mean of the possible next vectors. It is closer to the true one than
any baseline, but also close to many other chunks, so as a query it ranks the true chunk lower than the context mean
does. The rank head is trained to find the next chunk among those around it. Predictions are decoded; the head's vectors
are used for search (snap, ranks).

The head is a linear bottleneck over the context and the features of the predictor, which is frozen. Its loss is InfoNCE
(van den Oord et al. 2018) with neighbouring windows as negatives, because the chunks of one article are the hardest to
tell apart; the window's own context is no negative, since a search excludes it too. On 343,000 windows of Wikipedia, 32
windows per article instead of 8 raised the reciprocal rank from 0.109 to 0.115 and recall at 10 of 10,000 from 0.504
to 0.508.

Letters: B windows of a batch, T context vectors, D vector length, H features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
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
    """Training settings of the head."""

    windows: int = 1_500_000
    """Training windows, each at most PASSES times."""
    places: int = 16
    """Random places in the corpus per batch."""
    windows_a_place: int = 32
    """Windows around each place, from one article."""
    span: int = 40
    """Maximum distance of these windows from the place, in chunks."""
    temperature: float = 0.05
    """InfoNCE divides cosines by this."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.3
    """AdamW's decay of the matrices, against overfitting to single articles."""

    def __post_init__(self) -> None:
        for name in ("windows", "places", "windows_a_place", "span", "temperature", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")


PASSES = 6
"""Maximum epochs: on small sets, more would overfit."""

CHANNELS = 128
"""Width of the bottleneck; wider heads overfit to the training articles. On a million windows, 768 channels were worse
than 256 (reciprocal rank within the article 0.114 against 0.120)."""

DECAY = 0.7
"""Initial weights of the context vectors: each is this fraction of the following one's."""


class RankHead(nn.Module):
    """Query vectors from contexts and the predictor's features."""

    def __init__(self, context: int, dim: int, features: int, channels: int = CHANNELS) -> None:
        """context: T, dim: D, features: H, 0 if the predictor has none."""
        super().__init__()
        self.sizes = {"context": context, "dim": dim, "features": features, "channels": channels}
        self.weights = nn.Parameter(DECAY ** torch.arange(context - 1, -1, -1.0))
        self.read = nn.Linear(context * dim + features, channels, bias=False)
        self.add = nn.Linear(channels, dim)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)

    def forward(self, contexts: Tensor, features: Tensor | None = None) -> Tensor:
        """(B, D) float32 unit vectors from contexts (B, any T, D) and features (B, H).

        Longer contexts are cut to the last vectors, shorter ones are padded with zeros at the start.
        """
        length, dim = self.sizes["context"], self.sizes["dim"]
        contexts = contexts[:, -length:]
        contexts = F.pad(contexts, (0, 0, length - contexts.shape[1], 0))
        # Entries of a unit vector are around 1 / sqrt(D): scaled to about 1, so that all weights learn alike.
        inputs = contexts.flatten(1) * math.sqrt(dim)
        if features is not None:
            inputs = torch.cat((inputs, features), dim=1)
        learnt: Tensor = self.add(self.read(inputs))
        kept = torch.einsum("t,btd->bd", self.weights.to(contexts), contexts)
        return F.normalize(kept.float() + learnt.float() / math.sqrt(dim), dim=-1)


def features_of(model: nn.Module, contexts: Tensor) -> Tensor | None:
    """(B, H) inputs of the predictor's output layer; None if it has no such layer."""
    if not hasattr(model, "features") or not getattr(model, "solves_output", True):
        return None
    features: Callable[[Tensor], Tensor] = model.features  # type: ignore[assignment]
    return features(contexts)


def rank_loss(
    found: Tensor,
    targets: Tensor,
    target_rows: NDArray[np.int64],
    context_rows: NDArray[np.int64],
    temperature: float,
) -> Tensor:
    """InfoNCE loss of finding each window's target among the batch's targets, except those in its context; a scalar.

    found, targets: (B, D) unit vectors; target_rows (B,) and context_rows (B, T): rows of the vector array.
    """
    own = (context_rows[:, :, None] == target_rows[None, None, :]).any(axis=1)
    scores = (found @ targets.T / temperature).masked_fill(torch.from_numpy(own).to(found.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def near_windows(windows: Windows, settings: RankSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """Distinct windows of one batch, ascending: some around each of several random places, of one article each."""
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
    start: RankHead | None = None,
) -> RankHead:
    """Train a head for this predictor, on its device; the predictor is not changed.

    windows: the predictor's training windows. log: called every hundred steps with step, steps and rank_loss. start: a
    head to start from; ignored if its sizes differ, as with another context length.
    Raises TrainingError if the loss becomes NaN or infinite.
    """
    settings = settings or RankSettings()
    device = next(model.parameters()).device
    model = model.eval()
    contexts, _ = windows.batch(slice(0, 1))
    with torch.inference_mode():
        example = features_of(model, torch.from_numpy(contexts).to(device))
    torch.manual_seed(seed)
    head = RankHead(windows.context, contexts.shape[2], 0 if example is None else example.shape[1]).to(device)
    if start is not None and start.sizes == head.sizes:
        head.load_state_dict(start.state_dict())
    groups = [
        {"params": [p for p in head.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in head.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.0)
    rng = np.random.default_rng(seed)
    target_rows, context_rows = windows.rows_of_target, windows.rows_of_context
    batch_windows = settings.places * settings.windows_a_place
    steps = math.ceil(min(settings.windows, PASSES * len(windows)) / batch_windows)
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
                f"the rank head's loss is {loss.item()} at step {step} of {steps}; expected a number. Use a lower "
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
