"""Performer: softmax attention by positive random features, in time linear in the number of positions.

Choromanski et al. 2020, "Rethinking Attention with Performers", arXiv 2009.14794: FAVOR+. exp(q^T k) is the mean over
random w of exp(w^T q - |q|^2 / 2) exp(w^T k - |k|^2 / 2), so that the sum over positions can be computed before the
product with the query. Choices: orthogonal w with the norms of independent ones, drawn once and stored with the
weights; sinusoidal positions; a feed-forward of four times the width. A query's features are divided by the largest,
which cancels; keys are not, as their maximum over positions would leak the future.

Letters: B batch, T positions, W width, H heads, P length of a head, M features.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lvm.models.attention import heads_of, joined
from lvm.models.recurrence import fading_sum
from lvm.models.trunk import Trunk, TrunkConfig, wide, with_feed_forward

EPSILON = 1e-6
"""Added to each feature, as in the authors' code: keys so long that all features vanish get equal weight."""


@dataclass(frozen=True)
class PerformerConfig(TrunkConfig):
    """Sizes of the network."""

    head_dim: int = 64
    """P; must divide the width."""
    num_features: int = 128
    """Random features per layer, M."""


TOY = PerformerConfig(width=32, num_layers=2, head_dim=16, num_features=32)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}


def orthogonal_features(count: int, size: int) -> Tensor:
    """(count, size) rows, orthogonal within each block of `size`, with the norms of Gaussian rows."""
    blocks = []
    for _ in range(-(-count // size)):
        q, r = torch.linalg.qr(torch.randn(size, size))
        # The signs make the directions uniform (Mezzadri 2007, arXiv math-ph/0609050).
        blocks.append((q * r.diagonal().sign()).T)
    lengths = torch.randn(count, size).norm(dim=1)
    rows: Tensor = torch.cat(blocks)[:count] * lengths[:, None]
    return rows


class FavorAttention(nn.Module):
    """Causal attention with FAVOR+ features."""

    features: Tensor

    def __init__(self, width: int, head_dim: int, num_features: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("features", orthogonal_features(num_features, head_dim))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, W), and the sums so far (B, H, M, P + 1): of features times values, and of features."""
        q, k, v = (wide(heads_of(part, self.head_dim)) for part in self.qkv(x).chunk(3, dim=-1))
        with torch.autocast(x.device.type, enabled=False):
            scale = self.head_dim**-0.25
            features = self.features.to(q.dtype)
            at_q, at_k = scale * q @ features.T, scale * k @ features.T
            phi_q = (at_q - at_q.amax(dim=-1, keepdim=True)).exp() + EPSILON
            phi_k = (at_k - 0.5 * (scale * k).square().sum(dim=-1, keepdim=True)).exp() + EPSILON
            ones = torch.ones_like(v[..., :1])
            no_decay = torch.zeros(1, 1, x.shape[1], device=x.device)
            y, memory = fading_sum(phi_q, phi_k, torch.cat((v, ones), dim=-1), no_decay, memory)
        return self.out(joined(y[..., :-1] / y[..., -1:])), memory


class Performer(Trunk):
    """Next vector from the last position of a stack of FAVOR+ attention."""

    def __init__(self, config: PerformerConfig) -> None:
        attention = partial(FavorAttention, config.width, config.head_dim, config.num_features)
        super().__init__(config, with_feed_forward(config, attention), positions=True)
