"""The training loop on windows made in memory: learns, stops, resumes, refuses what is no number."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lvm.devices import pick_device
from lvm.errors import InputError, TrainingError
from lvm.models import MODELS, TOYS, Predictor
from lvm.predict import training
from lvm.predict.losses import LossSettings
from lvm.predict.training import (
    CLASSIC,
    FAST,
    LONG,
    RECIPES,
    Progress,
    Recipe,
    choose_start,
    evaluate,
    fit,
    learning_rate,
    recipe_for,
    recipe_named,
    shuffled_windows,
)
from tests.unit.predict.conftest import MemoryWindows

QUICK = replace(FAST, epochs=3, batch_windows=32, bfloat16=False, patience=None, small_sets=False)


def toy(name: str, seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    return MODELS[name](TOYS[name])


# ---- learning


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [QUICK, replace(CLASSIC, epochs=3)], ids=lambda r: r.name)
def test_training_raises_the_val_cosine(
    name: str, recipe: Recipe, train: MemoryWindows, val: MemoryWindows
) -> None:
    recipe = replace(recipe, learning_rates=dict.fromkeys(MODELS, 3e-3), solved_start=False)
    if name == "lcm-diffusion":  # each batch shows it one time and one noise a target
        recipe = replace(recipe, epochs=15)
    start, *epochs = fit(toy(name), name, train, val, recipe, seed=0).curve
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert epochs[-1]["val_cosine"] > start["val_cosine"] + 0.2


def test_the_curve_has_a_full_row_an_epoch(train: MemoryWindows, val: MemoryWindows) -> None:
    rows: list[dict[str, Any]] = []
    progress = fit(toy("amn"), "amn", train, val, QUICK, seed=0, log=rows.append)
    assert rows == progress.curve
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3]
    for row in rows:
        trained = {"train_loss", "learning_rate"} if row["epoch"] else set()
        assert set(row) == {"epoch", "val_loss", "val_cosine", "seconds"} | trained
        assert row["val_loss"] == pytest.approx(2 - 2 * row["val_cosine"], abs=1e-4)
    assert progress.stopped == "all 3 epochs are done"
    json.dumps(progress.to_dict())


def test_evaluate_is_the_mean_over_windows_not_over_batches(val: MemoryWindows) -> None:
    model = toy("lstm").train()
    whole = evaluate(model, [val.batch(slice(None))])
    parts = evaluate(model, [val.batch(slice(0, 3)), val.batch(slice(3, None))])
    assert parts.cosine == pytest.approx(whole.cosine, abs=1e-6)
    assert parts.loss == pytest.approx(2 - 2 * whole.cosine, abs=1e-5)


def test_evaluate_without_windows_is_refused() -> None:
    with pytest.raises(InputError, match="at least one window"):
        evaluate(toy("amn"), [])


def test_fast_starts_above_the_context_mean(train: MemoryWindows, val: MemoryWindows) -> None:
    contexts, targets = (torch.from_numpy(a) for a in val.batch(slice(None)))
    baseline = torch.cosine_similarity(contexts.mean(dim=1), targets).mean().item()
    start = fit(toy("amn"), "amn", train, val, replace(QUICK, epochs=1), seed=0).curve[0]
    assert start["val_cosine"] > baseline + 0.2


def test_info_nce_is_logged_with_its_gradients(train: MemoryWindows, val: MemoryWindows) -> None:
    recipe = replace(QUICK, epochs=1, loss=LossSettings(info_nce_share=0.2))
    row = fit(toy("gru"), "gru", train, val, recipe, seed=0).curve[1]
    assert row["info_nce"] > 0
    assert row["info_nce_gradient_norm"] > 0
    assert row["info_nce_scale"] > 0
    assert row["mse_gradient_norm"] > 0


@pytest.mark.parametrize(("taught", "better"), [(2, "weights"), (0, "recipe")])
def test_the_better_start_is_the_one_that_is_better_after_two_epochs(
    taught: int, better: str, train: MemoryWindows, val: MemoryWindows
) -> None:
    rates = dict.fromkeys(MODELS, 3e-3)
    slow = replace(QUICK, learning_rates=dict.fromkeys(MODELS, 1e-5))
    teacher, model = toy("amn", seed=1), toy("amn")
    if taught:
        fit(teacher, "amn", train, val, replace(QUICK, epochs=30, learning_rates=rates), seed=0)
    weights = copy.deepcopy(teacher.state_dict())
    cosines = choose_start(model, "amn", train, val, slow, 0, weights)
    assert max(cosines, key=lambda start: cosines[start]) == better
    kept = all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert kept == (better == "weights")
    # Going on from there is an ordinary run, whose first row is the start that was chosen.
    progress = fit(model, "amn", train, val, replace(slow, epochs=2), 0, progress=Progress())
    assert progress.best["val_cosine"] == pytest.approx(cosines[better], abs=1e-4)


# ---- stopping


def test_patience_ends_a_run_that_no_longer_improves(train: MemoryWindows, val: MemoryWindows) -> None:
    flat = replace(QUICK, epochs=9, patience=2, learning_rates=dict.fromkeys(MODELS, 0.0))
    progress = fit(toy("amn"), "amn", train, val, flat, seed=0)
    # Nothing is learned, so the start stays the best.
    assert progress.epoch == 2
    assert progress.best["epoch"] == 0
    assert progress.stopped == "val cosine did not rise for 2 epochs"


def test_minutes_end_a_run_in_the_middle_of_an_epoch(train: MemoryWindows, val: MemoryWindows) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    recipe = replace(QUICK, epochs=50, max_minutes=0.2)
    progress = fit(toy("amn"), "amn", train, val, recipe, seed=0, clock=clock)
    assert progress.epoch < 5
    assert progress.stopped == "0.2 minutes are over"
    # The learning rate fell in time for the end.
    assert progress.curve[-1]["learning_rate"] <= 0.021 * QUICK.learning_rates["amn"]


def test_the_learning_rate_rises_then_falls_to_its_last_share() -> None:
    recipe = replace(FAST, warmup_share=0.1, final_rate_share=0.02)
    rates = [learning_rate(recipe, 1.0, done) for done in (0.0, 0.05, 0.1, 0.55, 1.0, 1.5)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.51, 0.02, 0.02])


def test_classic_is_a_cosine_from_the_peak_to_nothing() -> None:
    rates = [learning_rate(CLASSIC, 5e-4, done) for done in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([5e-4, 2.5e-4, 0.0])


# ---- resuming


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("killed_after", [0, 1])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    name: str, killed_after: int, train: MemoryWindows, val: MemoryWindows
) -> None:
    whole_model = toy(name)
    whole = fit(whole_model, name, train, val, QUICK, seed=3)

    saved: list[tuple[dict[str, Any], dict[str, Any], Progress, dict[str, torch.Tensor]]] = []
    best: dict[str, torch.Tensor] = {}

    def save(model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        saved.append(copy.deepcopy((model.state_dict(), optimiser.state_dict(), progress, best)))

    fit(toy(name), name, train, val, QUICK, seed=3, best=best, save=save)
    weights, optimiser_state, progress, best = saved[killed_after]
    assert progress.epoch == killed_after
    again = toy(name, seed=99)
    again.load_state_dict(weights)
    torch.manual_seed(12345)
    resumed = fit(
        again, name, train, val, QUICK, seed=3, progress=progress, optimiser_state=optimiser_state, best=best
    )
    assert [r["epoch"] for r in resumed.curve] == [0, 1, 2, 3]
    assert resumed.curve[0] == whole.curve[0] | {"seconds": resumed.curve[0]["seconds"]}
    for before, after in zip(whole.curve[1:], resumed.curve[1:], strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-6)
        assert after["val_cosine"] == pytest.approx(before["val_cosine"], rel=1e-6)
    for expected, found in zip(whole_model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_finished_run_takes_no_further_step(train: MemoryWindows, val: MemoryWindows) -> None:
    model = toy("amn")
    progress = fit(model, "amn", train, val, QUICK, seed=0)
    before = copy.deepcopy(model.state_dict())
    seconds = progress.seconds
    again = fit(model, "amn", train, val, QUICK, seed=0, progress=Progress(**progress.to_dict()))
    assert again.curve == progress.curve
    assert again.seconds == seconds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_weights_in_the_end_are_those_of_the_best_epoch(
    train: MemoryWindows, val: MemoryWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rate that grows until it spoils what was learnt.
    monkeypatch.setattr(training, "learning_rate", lambda recipe, peak, done: 1e-3 if done < 0.4 else 3.0)
    model = toy("lstm")
    progress = fit(model, "lstm", train, val, replace(QUICK, max_gradient_norm=None), seed=0)
    best, last = progress.best, progress.curve[-1]
    assert last["val_cosine"] < best["val_cosine"] - 0.01
    assert evaluate(model, [val.batch(slice(None))]).cosine == pytest.approx(best["val_cosine"], abs=1e-6)


# ---- NaN


def test_a_loss_that_is_no_number_names_epoch_and_batch(train: MemoryWindows, val: MemoryWindows) -> None:
    broken = MemoryWindows(256)
    broken.vectors[:, 5, 0] = np.nan
    with pytest.raises(TrainingError, match=r"gru: the loss is nan at epoch 1, batch 1 of 8"):
        fit(toy("gru"), "gru", broken, val, replace(QUICK, solved_start=False), seed=0)


def test_weights_that_explode_are_reported(train: MemoryWindows, val: MemoryWindows) -> None:
    wild = replace(QUICK, learning_rates=dict.fromkeys(MODELS, 1e30), max_gradient_norm=None)
    with pytest.raises(TrainingError, match=r"expected a number.*lower learning rate"):
        fit(toy("transformer"), "transformer", train, val, wild, seed=0)


# ---- order of the data


def test_an_epoch_holds_every_window_once_in_its_own_order(train: MemoryWindows) -> None:
    def seen(epoch: int, seed: int = 0) -> np.ndarray:
        return train.batch(np.concatenate(list(shuffled_windows(len(train), QUICK, seed, epoch))))[1][:, 0]

    assert sorted(seen(1)) == sorted(train.vectors[:, 5, 0])
    assert not np.array_equal(seen(1), seen(2))
    assert not np.array_equal(seen(1), seen(1, seed=1))
    assert np.array_equal(seen(2), seen(2))


def test_capped_epochs_go_through_all_windows_before_one_comes_again(train: MemoryWindows) -> None:
    recipe = replace(QUICK, max_windows_per_epoch=96)
    firsts = [np.concatenate(list(shuffled_windows(len(train), recipe, 0, e))) for e in (1, 2, 3)]
    assert [len(f) for f in firsts] == [96, 96, 96]
    together = np.concatenate(firsts)
    assert len(np.unique(together[:256])) == 256


# ---- settings


def test_classic_is_the_original_recipe() -> None:
    assert (CLASSIC.optimiser, CLASSIC.epochs, CLASSIC.batch_windows) == ("adam", 20, 32)
    assert set(CLASSIC.learning_rates.values()) == {5e-4}
    assert CLASSIC.loss == LossSettings()
    assert CLASSIC.patience is None
    assert not CLASSIC.solved_start


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_a_recipe_survives_its_record(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_small_sets_get_smaller_batches_and_rates() -> None:
    assert FAST.batch_size(1_500) == 64
    assert FAST.batch_size(200_000) == 256
    assert FAST.peak_rate("lstm", 200_000) == FAST.learning_rates["lstm"]
    expected = FAST.learning_rates["lstm"] * math.sqrt(1_500 / 50_000)
    assert FAST.peak_rate("lstm", 1_500) == pytest.approx(expected)
    assert FAST.steps_per_epoch(1_500) == 24
    assert CLASSIC.batch_size(100) == 32
    assert CLASSIC.peak_rate("lstm", 100) == 5e-4


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown recipe 'slow'; expected one of fast, classic"):
        recipe_named("slow")


def test_the_optimized_transformer_has_a_recipe_of_its_own_whatever_is_asked_for() -> None:
    assert (
        recipe_for("transformer-optimized", "fast") == recipe_for("transformer-optimized", "classic") == LONG
    )
    assert recipe_for("transformer", "fast") == FAST
    assert (LONG.epochs, LONG.rank) == (24, FAST.rank)
    with pytest.raises(InputError, match="unknown recipe 'slow'"):
        recipe_for("transformer-optimized", "slow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"max_minutes": 0.0}, "max_minutes must be above 0"),
        ({"learning_rates": {"lstm": 1e-3}}, "no learning rate for amn, gpt2, gru, hybrid, hyena"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(FAST, **change)


def test_the_device_is_one_that_works() -> None:
    assert torch.zeros(2, device=pick_device()).sum().item() == 0.0
