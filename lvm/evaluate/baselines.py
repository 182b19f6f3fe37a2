"""Baselines that a trained predictor must beat.

Each is called with (B, T, D) float32 contexts and returns (B, D) float32 unit vectors, as the models do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lvm.errors import InputError
from lvm.evaluate.metrics import Float32Array, Predict, cosines
from lvm.predict.steer import unit

Batches = Callable[[], Iterator[tuple[Float32Array, Float32Array]]]
"""Called once per pass over the data; yields (B, T, D) contexts with their (B, D) targets."""


@dataclass(frozen=True)
class CorpusMean:
    """The best constant prediction."""

    vector: Float32Array
    """(D,) unit vector, the mean of the training targets."""

    def __call__(self, contexts: Float32Array) -> Float32Array:
        return np.repeat(self.vector[None], len(contexts), axis=0)

    @classmethod
    def fit(cls, batches: Batches) -> "CorpusMean":
        """The mean over one pass of the training batches. Raises InputError when there are none."""
        total: NDArray[np.float64] | None = None
        for _, targets in batches():
            added = targets.sum(axis=0, dtype=np.float64)
            total = added if total is None else total + added
        if total is None:
            raise InputError("no training windows; the corpus mean needs at least one")
        return cls(unit(total[None].astype(np.float32))[0])


def context_mean(contexts: Float32Array) -> Float32Array:
    """The mean of the context, scaled to norm 1."""
    return unit(contexts.mean(axis=1))


def copy_last(contexts: Float32Array) -> Float32Array:
    """The last context vector: `passthrough`."""
    return unit(contexts[:, -1])


DECAYS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Candidates for `WeightedMean.decay`; 1 is the plain mean."""


@dataclass(frozen=True)
class WeightedMean:
    """The mean of the context, where each vector weighs `decay` times the next one."""

    decay: float

    def __call__(self, contexts: Float32Array) -> Float32Array:
        weights = self.decay ** np.arange(contexts.shape[1] - 1, -1, -1, dtype=np.float32)
        return unit(np.einsum("t,btd->bd", weights, contexts))

    @classmethod
    def fit(cls, reciprocal_rank: Callable[[Predict], float]) -> "WeightedMean":
        """The one of DECAYS with the best reciprocal rank. reciprocal_rank: of a predictor, on training windows."""
        return max((cls(decay) for decay in DECAYS), key=reciprocal_rank)


NEIGHBOUR_WINDOWS = 50_000
"""Training windows that the nearest neighbour is searched in, 150 MB at 768-d."""


@dataclass(frozen=True)
class NearestNeighbour:
    """The successor of the most similar training context, by cosine of the context means."""

    means: Float32Array
    """(N, D) unit means of training contexts."""
    successors: Float32Array
    """(N, D) unit vectors, the next vector of each context."""

    def __call__(self, contexts: Float32Array) -> Float32Array:
        nearest = (context_mean(contexts) @ self.means.T).argmax(axis=1)
        predicted: Float32Array = self.successors[nearest]
        return predicted

    @classmethod
    def fit(cls, batches: Batches) -> "NearestNeighbour":
        """All windows of one pass over the training batches. Raises InputError when there are none."""
        pairs = [(context_mean(contexts), unit(targets)) for contexts, targets in batches()]
        if not pairs:
            raise InputError("no training windows; the nearest neighbour needs at least one")
        means, successors = zip(*pairs, strict=True)
        return cls(np.concatenate(means), np.concatenate(successors))


@dataclass(frozen=True)
class RidgeSettings:
    """Data and penalties of the ridge regression."""

    max_train_windows: int = 50_000
    """Most training windows. The normal equations cost rows x (T D)^2; 50,000 rows of 5 x 768 are 0.7 T
    multiplications, some twenty seconds on two cores."""
    max_val_windows: int = 4_000
    """Most validation windows, on which the penalty is chosen."""
    penalties: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Penalties to try, as multiples of the mean eigenvalue of the inputs' scatter matrix (X'X, centred)."""


RIDGE_CONTEXT = 8
"""Last context vectors that the regression reads; its cost grows with the cube of their number."""


def inputs_of(contexts: Float32Array) -> Float32Array:
    """(B, T * D) concatenation of the last vectors of contexts (B, any T, D)."""
    return contexts[:, -RIDGE_CONTEXT:].reshape(len(contexts), -1)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression from the context's last vectors, concatenated, to the next vector."""

    weights: Float32Array
    """(T * D, D), T at most RIDGE_CONTEXT."""
    bias: Float32Array
    """(D,), not penalised."""
    penalty: float
    """The chosen one of RidgeSettings.penalties."""
    val_cosine: float
    """Mean cosine on the validation windows with that penalty."""
    num_windows: int
    """Training windows it was fitted on."""

    def __call__(self, contexts: Float32Array) -> Float32Array:
        return unit(inputs_of(contexts) @ self.weights + self.bias)


class _Wide:
    """Solver for fewer windows than inputs: keeps the n rows and solves an (n, n) system."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.rows.append(x)
        self.targets.append(y)
        self.count += len(x)

    def finish(self) -> None:
        x, y = torch.cat(self.rows), torch.cat(self.targets)
        self.mean_x, self.mean_y = x.mean(dim=0), y.mean(dim=0)
        self.x, self.y = x - self.mean_x, y - self.mean_y
        self.gram = self.x @ self.x.T
        self.scale = float(self.gram.diagonal().sum()) / x.shape[1]

    def solve(self, penalty: float) -> torch.Tensor:
        penalised = self.gram.clone()
        penalised.diagonal().add_(penalty)
        return self.x.T @ torch.cholesky_solve(self.y, torch.linalg.cholesky(penalised))


class _Tall:
    """Solver for any number of windows: keeps only sums and solves a (T D, T D) system."""

    def __init__(self, inputs: int, outputs: int) -> None:
        # float64: with 50,000 rows the centring in finish() subtracts numbers of similar size.
        self.count = 0
        self.mean_x = torch.zeros(inputs, dtype=torch.float64)
        self.mean_y = torch.zeros(outputs, dtype=torch.float64)
        self.scatter = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.count += len(x)
        self.mean_x += x.sum(dim=0, dtype=torch.float64)
        self.mean_y += y.sum(dim=0, dtype=torch.float64)
        self.scatter += x.T @ x
        self.cross += x.T @ y

    def finish(self) -> None:
        self.mean_x /= self.count
        self.mean_y /= self.count
        self.scatter.addr_(self.mean_x, self.mean_x, alpha=-self.count)
        self.cross.addr_(self.mean_x, self.mean_y, alpha=-self.count)
        self.scale = float(self.scatter.diagonal().mean())
        self.mean_x, self.mean_y = self.mean_x.float(), self.mean_y.float()
        self.scatter, self.cross = self.scatter.float(), self.cross.float()

    def solve(self, penalty: float) -> torch.Tensor:
        penalised = self.scatter.clone()
        penalised.diagonal().add_(penalty)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(penalised))


def _solver(batches: Batches) -> _Wide | _Tall:
    """The cheaper solver for the number of windows, ready to solve; both give the same solution."""
    solver: _Wide | _Tall = _Wide()
    for contexts, targets in batches():
        x = torch.from_numpy(inputs_of(contexts))
        y = torch.from_numpy(targets)
        if isinstance(solver, _Wide) and solver.count + len(x) > x.shape[1]:
            tall = _Tall(x.shape[1], y.shape[1])
            for held_x, held_y in zip(solver.rows, solver.targets, strict=True):
                tall.add(held_x, held_y)
            solver = tall
        solver.add(x, y)
    if solver.count == 0:
        raise InputError("no training windows; the ridge regression needs at least one")
    solver.finish()
    return solver


def fit_ridge(train: Batches, val: Batches, settings: RidgeSettings) -> Ridge:
    """The closed-form solution with the penalty that has the best mean cosine on `val`.

    `train` and `val` must already respect the settings' limits. Sums are float64. The systems are solved in float32,
    in half the time, as the penalty bounds their condition number to some thousands. Memory: about 400 MB at 5 x 768,
    whatever the number of windows. Raises InputError when there are no windows or no penalties.
    """
    solver = _solver(train)
    best: Ridge | None = None
    for penalty in settings.penalties:
        weights = solver.solve(penalty * max(solver.scale, 1e-12))
        bias = solver.mean_y - solver.mean_x @ weights
        fitted = Ridge(weights.numpy(), bias.numpy(), penalty, 0.0, solver.count)
        cosine = mean_cosine(fitted, val)
        if best is None or cosine > best.val_cosine:
            best = replace(fitted, val_cosine=cosine)
    if best is None:
        raise InputError("RidgeSettings.penalties is empty; expected at least one penalty")
    return best


def mean_cosine(predict: Predict, batches: Batches) -> float:
    """Mean cosine of predictions and targets over one pass. Raises InputError on no windows."""
    total, count = 0.0, 0
    for contexts, targets in batches():
        total += float(cosines(predict(contexts), targets).sum(dtype=np.float64))
        count += len(targets)
    if count == 0:
        raise InputError("no windows to average over; expected at least one")
    return total / count


def describe(predict: Any) -> dict[str, Any]:
    """Number of parameters and fitted settings of a baseline, for the report."""
    if isinstance(predict, Ridge):
        return {
            "parameters": predict.weights.size + predict.bias.size,
            "penalty": predict.penalty,
            "val_cosine": predict.val_cosine,
            "train_windows": predict.num_windows,
        }
    if isinstance(predict, WeightedMean):
        return {"parameters": 1, "decay": predict.decay}
    if isinstance(predict, NearestNeighbour):
        return {
            "parameters": predict.means.size + predict.successors.size,
            "train_windows": len(predict.means),
        }
    return {"parameters": predict.vector.size if isinstance(predict, CorpusMean) else 0}
