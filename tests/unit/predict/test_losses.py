"""Losses: their numbers by hand, and InfoNCE held to its share."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.errors import InputError
from lvm.info_nce import info_nce
from lvm.predict.losses import MAX_SHARE, LossReport, LossSettings, backward, mse


def units(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_mse_is_two_minus_two_cosines() -> None:
    predicted, targets = units(8, 16, seed=1), units(8, 16, seed=2)
    expected = 2 - 2 * F.cosine_similarity(predicted, targets).mean()
    torch.testing.assert_close(mse(predicted, targets), expected)
    torch.testing.assert_close(mse(predicted, targets), 16 * F.mse_loss(predicted, targets))


def test_losses_are_float32_whatever_comes_in() -> None:
    predicted, targets = units(8, 16, seed=1).bfloat16(), units(8, 16, seed=2)
    assert mse(predicted, targets).dtype == torch.float32
    assert info_nce(predicted, targets, 0.07).dtype == torch.float32


def test_info_nce_of_orthogonal_targets_by_hand() -> None:
    # Each prediction is its own target, the others are at cosine 0; at temperature 0.5 the own scores 2.
    targets = torch.eye(4)
    own = torch.tensor(2.0).exp()
    torch.testing.assert_close(info_nce(targets, targets, 0.5), -torch.log(own / (own + 3)))


def test_info_nce_both_ways_is_the_mean_of_the_two() -> None:
    first, second = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    there, back = info_nce(first, second, 0.1), info_nce(second, first, 0.1)
    assert there != back
    torch.testing.assert_close(info_nce(first, second, 0.1, both_ways=True), (there + back) / 2)


def gradients(settings: LossSettings, seed: int = 0) -> tuple[Tensor, LossReport]:
    """All of a small network's gradients in one row, and the report."""
    torch.manual_seed(seed)
    model = nn.Linear(16, 16)
    predicted = F.normalize(model(units(32, 16, seed=3)), dim=-1)
    report = backward(settings, predicted, units(32, 16, seed=4), model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), report


def test_mse_alone_sets_the_gradient_of_mse() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    loss = mse(F.normalize(model(units(32, 16, seed=3)), dim=-1), units(32, 16, seed=4))
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found, report = gradients(LossSettings())
    torch.testing.assert_close(found, expected)
    assert report.loss == pytest.approx(loss.item())
    assert report.info_nce is None


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_info_nce_adds_exactly_its_share_of_the_gradient(share: float, temperature: float) -> None:
    alone, _ = gradients(LossSettings())
    both, report = gradients(LossSettings(share, temperature))
    assert (both - alone).norm().item() == pytest.approx(share * alone.norm().item(), rel=1e-3)
    assert report.mse_gradient_norm == pytest.approx(alone.norm().item(), rel=1e-4)
    assert report.info_nce_gradient_norm * report.info_nce_scale == pytest.approx(
        share * alone.norm().item(), rel=1e-3
    )


def test_info_nce_without_a_gradient_adds_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    one = F.normalize(model(units(1, 16, seed=3)), dim=-1)  # nothing to tell apart in a batch of one
    report = backward(LossSettings(0.3), one, units(1, 16, seed=4), model.parameters())
    assert report.info_nce_scale == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("share", [-0.1, MAX_SHARE + 0.01, 1.0, float("nan")])
def test_a_share_that_ruins_predictions_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"info_nce_share must be between 0 and 0\.5"):
        LossSettings(share)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="temperature"):
        LossSettings(temperature=0.0)


def test_mse_alone_is_the_default() -> None:
    assert dataclasses.asdict(LossSettings())["info_nce_share"] == 0.0
