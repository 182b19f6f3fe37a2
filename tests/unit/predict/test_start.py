"""The solved start: directions, the ridge regression against scikit-learn's, and what it is worth."""

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from lvm.errors import InputError
from lvm.models import MODELS, ORIGINAL, TOYS, Predictor, build
from lvm.predict.start import (
    HELD_OUT_SHARE,
    PENALTIES,
    principal_directions,
    solve_output,
    solve_start,
    spread_batches,
)
from tests.unit.predict.conftest import DIM, MemoryWindows


def toy(name: str) -> Predictor:
    torch.manual_seed(0)
    return MODELS[name](TOYS[name]).eval()


def cosine(model: Predictor, windows: MemoryWindows) -> float:
    contexts, targets = (torch.from_numpy(a) for a in windows.batch(slice(None)))
    with torch.inference_mode():
        return torch.cosine_similarity(model(contexts), targets).mean().item()


@pytest.mark.parametrize("dim", [DIM, 48], ids=["longer than the hidden layer", "shorter"])
@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if getattr(m, "solves_output", True)])
def test_the_start_beats_context_mean_and_corpus_mean_before_any_step(name: str, dim: int) -> None:
    train, val = MemoryWindows(256, dim=dim), MemoryWindows(64, seed=1, dim=dim)
    contexts, targets = (torch.from_numpy(a) for a in val.batch(slice(None)))
    corpus_mean = torch.from_numpy(train.vectors[:, 5].mean(axis=0))
    baselines = [
        torch.cosine_similarity(guess, targets).mean().item()
        for guess in (contexts.mean(dim=1), corpus_mean[None])
    ]
    toys = asdict(TOYS[name])
    width = "width" if "width" in toys else "hidden"
    model = build(name, ({} if name in ORIGINAL else toys) | {"dim": dim, width: 64})
    before = cosine(model.eval(), val)
    solve_start(model, train)
    assert cosine(model, val) > max(before, *baselines) + 0.05


def test_a_network_that_adds_the_mean_need_not_undo_it() -> None:
    # The answer is a little of the context's mean, much that all answers share, and chance. A correction of rank
    # 16 cannot take the mean's 768 numbers back, so the rest has to be made longer instead.
    random = np.random.default_rng(0)
    windows = MemoryWindows(600)
    contexts = random.standard_normal((600, 5, DIM))
    shared = random.standard_normal(DIM)
    answers = 0.5 * contexts.mean(axis=1) + 0.5 * shared + 0.5 * random.standard_normal((600, DIM))
    vectors = np.concatenate([contexts, answers[:, None]], axis=1)
    windows.vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    model = toy("amn")
    solve_start(model, windows)
    inputs, truth = (torch.from_numpy(a) for a in windows.batch(slice(None)))
    constant = torch.cosine_similarity(truth.mean(dim=0)[None], truth).mean().item()
    mean = torch.cosine_similarity(inputs.mean(dim=1), truth).mean().item()
    assert cosine(model, windows) > max(constant, mean) + 0.02


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_the_output_layer_is_the_ridge_regression_of_scikit_learn(name: str, train: MemoryWindows) -> None:
    model = toy(name)
    penalty = solve_output(model, spread_batches(train, 9999))
    assert penalty in PENALTIES
    contexts, targets = train.batch(slice(None))
    with torch.no_grad():
        features = model.features(torch.from_numpy(contexts)).double().numpy()
    scatter = ((features - features.mean(axis=0)) ** 2).sum() / features.shape[1]
    expected = Ridge(alpha=penalty * scatter).fit(features, targets)
    np.testing.assert_allclose(model.output_layer.weight.detach().numpy(), expected.coef_, atol=2e-4)
    np.testing.assert_allclose(model.output_layer.bias.detach().numpy(), expected.intercept_, atol=2e-4)


def test_the_penalty_is_the_best_one_on_the_last_windows(train: MemoryWindows) -> None:
    # Each penalty alone, fitted on the first windows and scored on the last ones.
    model = toy("gru")
    found = solve_output(model, spread_batches(train, 9999))
    contexts, targets = train.batch(slice(None))
    with torch.no_grad():
        features = model.features(torch.from_numpy(contexts)).double().numpy()
    fitted = round(len(features) * (1 - HELD_OUT_SHARE))
    scatter = ((features[:fitted] - features[:fitted].mean(axis=0)) ** 2).sum() / features.shape[1]
    scores = {}
    for penalty in PENALTIES:
        ridge = Ridge(alpha=penalty * scatter).fit(features[:fitted], targets[:fitted])
        predicted = torch.from_numpy(ridge.predict(features[fitted:]))
        scores[penalty] = torch.cosine_similarity(predicted, torch.from_numpy(targets[fitted:])).mean().item()
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_start_changes_neither_the_sizes_nor_the_names(name: str, train: MemoryWindows) -> None:
    model = toy(name)
    before = copy.deepcopy(model.state_dict())
    solve_start(model, train)
    after = model.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.isfinite(v).all() for v in after.values())
    assert asdict(model.config) == asdict(TOYS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_network_wider_than_the_vectors_starts_too(name: str) -> None:
    toys = asdict(TOYS[name]) | {"dim": 24}
    model = build(name, toys | {"width" if "width" in toys else "hidden": 48})
    random = np.random.default_rng(0)
    windows = MemoryWindows(40)
    windows.vectors = random.standard_normal((40, 6, 24)).astype(np.float32)
    windows.vectors /= np.linalg.norm(windows.vectors, axis=-1, keepdims=True)
    solve_start(model, windows)
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    assert torch.isfinite(model.eval()(torch.from_numpy(windows.vectors[:, :5]))).all()


def test_two_windows_are_enough_and_one_is_refused() -> None:
    for name in MODELS:
        model = toy(name)
        solve_start(model, MemoryWindows(2))
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    with pytest.raises(InputError, match="at least 2 training windows to start from, got 1"):
        solve_start(toy("amn"), MemoryWindows(1))


def test_spread_batches_are_even_over_all_windows(val: MemoryWindows) -> None:
    found = np.concatenate([t for _, t in spread_batches(val, 4, batch_windows=3)])
    assert np.array_equal(found, val.vectors[[0, 21, 42, 63], 5])
    assert sum(len(t) for _, t in spread_batches(val, 9999)) == 64


def test_principal_directions_are_orthonormal_and_hold_the_variance() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((50, 3)) @ generator.standard_normal((3, DIM))
    targets = rows.astype(np.float32)
    directions = principal_directions([(targets[:, None], targets)], 10)
    torch.testing.assert_close(directions @ directions.T, torch.eye(10), atol=1e-5, rtol=0)
    back = (torch.from_numpy(targets) @ directions[:3].T) @ directions[:3]
    torch.testing.assert_close(back, torch.from_numpy(targets), atol=1e-3, rtol=1e-3)


def test_more_directions_than_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="at most 4 directions of 4-d vectors, got 5"):
        principal_directions([(np.zeros((2, 1, 4), np.float32), np.zeros((2, 4), np.float32))], 5)
