"""Initial weights of a predictor: hidden layers that carry the context mean, an output layer fitted by regression.

From random weights, a predictor first has to learn what a linear regression finds at once. On 330,000 windows of
Wikipedia, an LSTM trained for six epochs remained below the mean of its context; initialised this way, it beats every
baseline except the regression before its first step. The architecture and its number of parameters do not change.

Letters: M windows, B batch, T context vectors, D vector length, H inputs of the output layer.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lvm.errors import InputError
from lvm.models import Architecture
from lvm.models.codes import FEATURES
from lvm.ridge import Ridge

Batch = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(B, T, D) contexts with their (B, D) targets, unit vectors."""

SOLVED_WINDOWS = 16_384
"""Maximum training windows used, evenly spaced: about 20 per dimension."""

HELD_OUT_SHARE = 0.2
"""Share of these windows, the last ones, that chooses the penalty; in corpus order, so from other articles."""

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Ridge penalties to try, as multiples of the features' mean variance."""


class WindowSource(Protocol):
    """The part of `lvm.vectors.sequences.Windows` that training uses."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> Batch:
        """Contexts and targets of these windows."""


def spread_batches(
    windows: WindowSource, limit: int, batch_windows: int = 512, first: int = 0, every: int = 1
) -> Iterator[Batch]:
    """Up to `limit` windows, evenly spaced, in order. Of their batches, every `every`th, starting with `first`."""
    indices = np.linspace(0, len(windows) - 1, min(limit, len(windows))).astype(np.int64)
    for low in range(first * batch_windows, len(indices), every * batch_windows):
        yield windows.batch(indices[low : low + batch_windows])


def solve_start(model: Architecture, windows: WindowSource) -> float | None:
    """Initialise all of the model's weights from windows; returns the penalty chosen, or None if the architecture has
    no output layer that a regression can fit.

    Raises InputError on fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(f"expected at least 2 training windows to start from, got {len(windows)}")
    device = next(model.parameters()).device
    count, dim = model.num_directions, model.config.dim
    directions = principal_directions(spread_batches(windows, SOLVED_WINDOWS), min(count, dim))
    # Units beyond the number of directions, and the inputs of TMD codes, start at zero.
    more = FEATURES if hasattr(model, "tmd") else 0
    model.start_from(F.pad(directions, (0, more, 0, count - len(directions))).to(device))
    if not getattr(model, "solves_output", True):
        return None
    return solve_output(model, spread_batches(windows, SOLVED_WINDOWS))


def principal_directions(batches: Iterable[Batch], count: int) -> Tensor:
    """(count, D) float32 orthonormal rows: the principal directions of the targets, without subtracting their mean.

    Eigenvectors of the D x D matrix of second moments, largest first. Raises InputError if count exceeds D.
    """
    moments: Tensor | None = None
    for _, targets in batches:
        rows = torch.from_numpy(targets).double()
        added = rows.T @ rows
        moments = added if moments is None else moments + added
    if moments is None:
        raise InputError("expected at least one training window, got none")
    if count > len(moments):
        dim = len(moments)
        raise InputError(f"expected at most {dim} directions of {dim}-d vectors, got {count}")
    # With fewer windows than D, directions without variance come last; they are orthonormal too.
    vectors: Tensor = torch.linalg.eigh(moments)[1]
    directions: Tensor = vectors.flip(1)[:, :count].T.float().contiguous()
    return directions


@torch.no_grad()
def solve_output(model: Architecture, batches: Iterable[Batch]) -> float:
    """Set the output layer to a ridge regression of the targets on the model's features; returns the penalty chosen.

    batches: in corpus order; the last HELD_OUT_SHARE of the windows choose the penalty by cosine.
    """
    model.eval()
    layer = model.output_layer
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for contexts, targets in batches:
        x = torch.from_numpy(contexts).to(layer.weight.device)
        rows.append((model.features(x).float(), torch.from_numpy(targets).to(x), x.mean(dim=1)))
    features, truth, means = (torch.cat(part) for part in zip(*rows, strict=True))
    num_fitted = max(1, round(len(features) * (1 - HELD_OUT_SHARE)))
    fitted, held_out = slice(None, num_fitted), slice(num_fitted, None)

    wanted, added = truth, torch.zeros_like(truth)
    if model.adds_mean:
        # The model adds the context mean to the output, and only the sum's direction counts. So the targets are scaled
        # until their component along the mean equals it, and the output need not undo part of the mean.
        centred = means[fitted] - means[fitted].mean(dim=0)
        share = (centred * truth[fitted]).sum() / centred.square().sum().clamp_min(1e-12)
        wanted, added = truth / share.clamp_min(0.05) - means, means

    best = (-2.0, PENALTIES[0])
    solver = Ridge(features[fitted], wanted[fitted])
    for penalty in PENALTIES:
        weight, bias = solver.solve(penalty)
        predicted = added[held_out] + features[held_out] @ weight + bias
        best = max(best, (F.cosine_similarity(predicted, truth[held_out]).mean().item(), penalty))
    weight, bias = Ridge(features, wanted).solve(best[1])
    layer.weight.copy_(weight.T)
    layer.bias.copy_(bias)
    return best[1]
