"""Baselines: what they predict, and that ridge regression is the solution it claims to be."""

from collections.abc import Iterator

import numpy as np
import pytest

from lvm.errors import InputError
from lvm.evaluate.baselines import (
    Batches,
    CorpusMean,
    Ridge,
    RidgeSettings,
    context_mean,
    copy_last,
    describe,
    fit_ridge,
    mean_cosine,
)
from lvm.predict.steer import unit

CONTEXT, DIM = 3, 4


def batches_of(contexts: np.ndarray, targets: np.ndarray, rows: int = 7) -> Batches:
    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for low in range(0, len(targets), rows):
            yield contexts[low : low + rows], targets[low : low + rows]

    return batches


def linear_windows(num: int, seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and targets whose next vector is a fixed linear map of the context, with noise."""
    random = np.random.default_rng(seed)
    contexts = unit(random.standard_normal((num, CONTEXT, DIM)))
    mapping = np.random.default_rng(99).standard_normal((CONTEXT * DIM, DIM))
    targets = contexts.reshape(num, -1) @ mapping + 0.5 + noise * random.standard_normal((num, DIM))
    return contexts, unit(targets)


def test_context_mean_and_copy_last_are_unit_vectors() -> None:
    contexts, _ = linear_windows(5, 0)
    np.testing.assert_allclose(context_mean(contexts), unit(contexts.mean(axis=1)), atol=1e-6)
    np.testing.assert_allclose(copy_last(3 * contexts), contexts[:, 2], atol=1e-6)


def test_corpus_mean_is_the_direction_of_all_training_targets() -> None:
    contexts, targets = linear_windows(23, 0)
    fitted = CorpusMean.fit(batches_of(contexts, targets))
    np.testing.assert_allclose(fitted.vector, unit(targets.mean(axis=0)), atol=1e-6)
    assert fitted(contexts[:3]).shape == (3, DIM)
    assert describe(fitted) == {"parameters": DIM}


@pytest.mark.parametrize("num_windows", [8, 200])  # fewer and more than the T x D = 12 inputs
def test_ridge_is_the_closed_form_solution(num_windows: int) -> None:
    contexts, targets = linear_windows(num_windows, 0)
    settings = RidgeSettings(penalties=(0.3,))
    fitted = fit_ridge(batches_of(contexts, targets), batches_of(contexts, targets), settings)
    x, y = contexts.reshape(num_windows, -1).astype(np.float64), targets.astype(np.float64)
    x_centred, y_centred = x - x.mean(axis=0), y - y.mean(axis=0)
    scatter = x_centred.T @ x_centred
    penalty = 0.3 * np.trace(scatter) / (CONTEXT * DIM)
    weights = np.linalg.solve(scatter + penalty * np.eye(CONTEXT * DIM), x_centred.T @ y_centred)
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-4)
    np.testing.assert_allclose(fitted.bias, y.mean(axis=0) - x.mean(axis=0) @ weights, atol=1e-4)
    np.testing.assert_allclose(fitted(contexts), unit(x @ fitted.weights + fitted.bias), atol=1e-5)
    assert fitted.num_windows == num_windows


def test_ridge_takes_the_penalty_that_does_best_on_validation() -> None:
    train, val = linear_windows(30, 0, noise=2.0), linear_windows(400, 1, noise=0.0)
    settings = RidgeSettings(penalties=(1e-6, 1.0, 1e6))
    each = {
        p: fit_ridge(batches_of(*train), batches_of(*val), RidgeSettings(penalties=(p,))).val_cosine
        for p in settings.penalties
    }
    chosen = fit_ridge(batches_of(*train), batches_of(*val), settings)
    assert chosen.val_cosine == max(each.values())
    assert chosen.penalty == max(each, key=lambda p: each[p]) == 1.0
    assert chosen.val_cosine == pytest.approx(mean_cosine(chosen, batches_of(*val)))


def test_ridge_beats_the_other_baselines_on_linear_data() -> None:
    train, val, test = (linear_windows(n, s) for n, s in ((500, 0), (100, 1), (100, 2)))
    ridge = fit_ridge(batches_of(*train), batches_of(*val), RidgeSettings())
    assert isinstance(ridge, Ridge)
    held_out = batches_of(*test)
    others = (context_mean, copy_last, CorpusMean.fit(batches_of(*train)))
    assert mean_cosine(ridge, held_out) > 0.95
    assert all(mean_cosine(ridge, held_out) > mean_cosine(o, held_out) + 0.1 for o in others)
    assert describe(ridge)["parameters"] == CONTEXT * DIM * DIM + DIM


def test_no_windows_are_refused() -> None:
    empty = batches_of(np.empty((0, CONTEXT, DIM), np.float32), np.empty((0, DIM), np.float32))
    some = batches_of(*linear_windows(10, 0))
    with pytest.raises(InputError, match="ridge regression needs at least one"):
        fit_ridge(empty, some, RidgeSettings())
    with pytest.raises(InputError, match="corpus mean needs at least one"):
        CorpusMean.fit(empty)
    with pytest.raises(InputError, match="no windows to average over"):
        mean_cosine(copy_last, empty)
    with pytest.raises(InputError, match="at least one penalty"):
        fit_ridge(some, some, RidgeSettings(penalties=()))
