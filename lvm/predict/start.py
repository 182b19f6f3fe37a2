"""Where a predictor starts from: hidden layers that carry the context's mean, an output layer solved by ridge.

From random weights a predictor first has to learn what a linear regression knows at once. On 330,000 windows of
Wikipedia an LSTM trained for six epochs stayed below the mean of its context; started so, it is above every
baseline but the regression before its first step, and training goes on from there. The architecture and its
number of parameters are untouched; what a model is after this, it could have been by chance.

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
"""Training windows a start is made from, evenly spaced over all: 20 for each number of a vector."""

HELD_OUT_SHARE = 0.2
"""Of these windows, the last part chooses the penalty: they come in corpus order, so from articles of its own."""

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Ridge penalties tried, as multiples of the features' mean variance."""


class WindowSource(Protocol):
    """What training needs of windows; `lvm.vectors.sequences.Windows` has it."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> Batch:
        """Contexts and targets of these windows."""


def spread_batches(
    windows: WindowSource, most: int, batch_windows: int = 512, first: int = 0, every: int = 1
) -> Iterator[Batch]:
    """At most `most` windows, evenly spaced over all, in order; of their batches one in `every`, from `first` on."""
    indices = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(np.int64)
    for low in range(first * batch_windows, len(indices), every * batch_windows):
        yield windows.batch(indices[low : low + batch_windows])


def solve_start(model: Architecture, windows: WindowSource) -> float | None:
    """Set all of the model's weights from windows; the penalty that was chosen comes back, None where the architecture
    has no output layer that a regression could set.

    Raises InputError with fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(f"expected at least 2 training windows to start from, got {len(windows)}")
    device = next(model.parameters()).device
    count, dim = model.num_directions, model.config.dim
    directions = principal_directions(spread_batches(windows, SOLVED_WINDOWS), min(count, dim))
    # A layer wider than the vectors begins with as many of its units as there are directions; codes begin with nothing.
    more = FEATURES if hasattr(model, "tmd") else 0
    model.start_from(F.pad(directions, (0, more, 0, count - len(directions))).to(device))
    if not getattr(model, "solves_output", True):
        return None
    return solve_output(model, spread_batches(windows, SOLVED_WINDOWS))


def principal_directions(batches: Iterable[Batch], count: int) -> Tensor:
    """(count, D) float32 orthonormal rows along which the targets vary most, the mean's direction included.

    Eigenvectors of the D x D matrix of second moments, largest first. Raises InputError when count exceeds D.
    """
    moments: Tensor | None = None
    for _, targets in batches:
        rows = torch.from_numpy(targets).double()
        added = rows.T @ rows
        moments = added if moments is None else moments + added
    if moments is None:
        raise InputError("expected at least one training window, got none")
    if count > len(moments):
        raise InputError(
            f"expected at most {len(moments)} directions of {len(moments)}-d vectors, got {count}"
        )
    # Unseen directions (fewer windows than D) come last, orthonormal all the same.
    vectors: Tensor = torch.linalg.eigh(moments)[1]
    directions: Tensor = vectors.flip(1)[:, :count].T.float().contiguous()
    return directions


@torch.no_grad()
def solve_output(model: Architecture, batches: Iterable[Batch]) -> float:
    """Set the output layer to the ridge regression of the targets on the model's features; the penalty.

    Batches in corpus order; HELD_OUT_SHARE of the windows, the last ones, choose the penalty by cosine.
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
        # Only the direction of the sum counts, and it already holds the mean once. So the targets are made
        # longer, until the part of the mean in them is the mean itself: the correction need not undo it.
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
