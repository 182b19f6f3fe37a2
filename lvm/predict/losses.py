"""Training loss of predictors: squared distance (MSE), optionally with a limited share of InfoNCE.

Adding InfoNCE to MSE ruined two runs of the original system, even at a weight of 0.05, where its gradients were still
32 times larger. So the share applies to gradient norms instead: `backward` computes both gradients and scales
InfoNCE's to a given share of MSE's norm, at most MAX_SHARE.

Letters: B batch, D vector length.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lvm.errors import InputError
from lvm.info_nce import info_nce

MAX_SHARE = 0.5
"""Maximum norm of InfoNCE's gradient, as a share of MSE's, so that MSE dominates."""


@dataclass(frozen=True)
class LossSettings:
    """The training loss."""

    info_nce_share: float = 0.0
    """Norm of InfoNCE's gradient as a share of MSE's, 0 to MAX_SHARE; 0 is MSE alone."""
    temperature: float = 0.07
    """InfoNCE divides cosines by this."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.info_nce_share <= MAX_SHARE:
            raise InputError(
                f"info_nce_share must be between 0 and {MAX_SHARE}, got {self.info_nce_share}; "
                "larger shares of InfoNCE ruined the predictions"
            )
        if self.temperature <= 0.0:
            raise InputError(f"temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True)
class LossReport:
    """Measurements of one training step."""

    loss: float
    """Batch mean of the squared distance (without InfoNCE), or of the architecture's own loss."""
    info_nce: float | None = None
    """Batch mean of InfoNCE. This and the fields below are None if it is not used."""
    mse_gradient_norm: float | None = None
    """L2 norm over all parameters."""
    info_nce_gradient_norm: float | None = None
    """L2 norm over all parameters, before scaling."""
    info_nce_scale: float | None = None
    """Factor applied to InfoNCE's gradient."""


def mse(predicted: Tensor, targets: Tensor) -> Tensor:
    """Squared distance, 2 - 2 cosine for unit vectors; the batch mean as a float32 scalar.

    predicted, targets: (B, D) unit vectors. D times torch's `mse_loss`: same minimum, but gradients well above Adam's
    epsilon.
    """
    return (predicted.float() - targets.float()).square().sum(dim=-1).mean()


def backward(
    settings: LossSettings,
    predicted: Tensor,
    targets: Tensor,
    parameters: Iterable[Tensor],
    weight: float = 1.0,
) -> LossReport:
    """Set every parameter's `.grad` from this batch.

    predicted, targets: (B, D) unit vectors; parameters: those that `predicted` was computed from. weight: factor of
    MSE's gradient, ignored with InfoNCE.
    """
    distance = mse(predicted, targets)
    if settings.info_nce_share == 0.0:
        (weight * distance).backward()
        return LossReport(distance.item())
    used = [p for p in parameters if p.requires_grad]
    contrast = info_nce(predicted, targets, settings.temperature)
    # Some parameters are unused with short contexts (Linformer's summaries of full blocks).
    first = torch.autograd.grad(distance, used, retain_graph=True, allow_unused=True, materialize_grads=True)
    second = torch.autograd.grad(contrast, used, allow_unused=True, materialize_grads=True)
    first_norm, second_norm = _norm(first), _norm(second)
    scale = settings.info_nce_share * first_norm / second_norm if second_norm > 0.0 else 0.0
    for parameter, a, b in zip(used, first, second, strict=True):
        parameter.grad = a + scale * b
    return LossReport(distance.item(), contrast.item(), first_norm, second_norm, scale)


def _norm(gradients: tuple[Tensor, ...]) -> float:
    norm: float = torch.stack([g.float().norm() for g in gradients]).norm().item()
    return norm
