"""What a predictor is trained on: squared distance, alone or with a held-back share of InfoNCE.

InfoNCE beside MSE wrecked two runs of the original system, even at a weight of 0.05: its gradients were 32
times the larger ones. So it has no weight here. `backward` measures both gradients on the parameters and adds
InfoNCE's scaled to a stated share of MSE's norm, at most MAX_SHARE, and says what it measured.

Letters: B batch, D vector length.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lvm.errors import InputError
from lvm.info_nce import info_nce

MAX_SHARE = 0.5
"""Most of MSE's gradient norm that InfoNCE's may have: MSE keeps the say."""


@dataclass(frozen=True)
class LossSettings:
    """What is minimised."""

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
    """What one call of `backward` saw; plain numbers."""

    loss: float
    """The batch's mean of what is minimised: squared distance, beside which InfoNCE is reported by itself, or the
    architecture's own loss."""
    info_nce: float | None = None
    """None where MSE was alone, as are the three below."""
    mse_gradient_norm: float | None = None
    """L2 norm over all parameters."""
    info_nce_gradient_norm: float | None = None
    """L2 norm over all parameters, before scaling."""
    info_nce_scale: float | None = None
    """Factor InfoNCE's gradient was multiplied with."""


def mse(predicted: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of the squared distance, a float32 scalar.

    predicted, targets: (B, D) unit vectors, for which it is 2 - 2 cosine. It is D times torch's `mse_loss`:
    the same minimum, with gradients well above the epsilon of Adam.
    """
    return (predicted.float() - targets.float()).square().sum(dim=-1).mean()


def backward(
    settings: LossSettings,
    predicted: Tensor,
    targets: Tensor,
    parameters: Iterable[Tensor],
    weight: float = 1.0,
) -> LossReport:
    """Set every parameter's `.grad` from this batch, and return what was measured.

    predicted, targets: (B, D) unit vectors; parameters: those that `predicted` was computed from. weight: factor of the
    gradient of squared distance alone.
    """
    distance = mse(predicted, targets)
    if settings.info_nce_share == 0.0:
        (weight * distance).backward()
        return LossReport(distance.item())
    used = [p for p in parameters if p.requires_grad]
    contrast = info_nce(predicted, targets, settings.temperature)
    # Not every parameter takes part in contexts this short (Linformer's summaries of finished blocks).
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
