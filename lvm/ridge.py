"""Ridge regression in closed form: one eigendecomposition, then any number of penalties."""

import torch
from torch import Tensor


class Ridge:
    """Ridge regression of (M, D) targets on (M, H) features, with an unpenalised bias."""

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        self.mean_x, self.mean_y = features.mean(dim=0), targets.mean(dim=0)
        centred = features - self.mean_x
        values, self.vectors = torch.linalg.eigh((centred.T @ centred).cpu().double())
        self.values = values.clamp_min(0.0)
        self.cross = self.vectors.T @ (centred.T @ (targets - self.mean_y)).cpu().double()

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """(H, D) weights and (D,) bias, float32; the penalty is a multiple of the features' mean variance."""
        shrunk = self.values + penalty * self.values.mean().clamp_min(1e-12)
        weight = (self.vectors @ (self.cross / shrunk[:, None])).to(self.mean_x)
        return weight, self.mean_y - self.mean_x @ weight
