"""RetNet: attention without softmax, whose weights decay with distance at a rate per head.

Sun et al. 2023, "Retentive Network", arXiv 2307.08621. As in the paper, values, gate and feed-forward have twice the
width. Choices: queries and keys are rotated by position (xPos without its scale, as the decay has the same role); the
scores are not normalised, which the norm of each head would cancel. The parallel form is in `lvm.models.recurrence`.

    S[n] = gamma S[n - 1] + k[n] v[n]^T        y[n] = q[n]^T S[n]        gamma = 1 - 2^(-5 - head)

Letters: B batch, T positions, W width, H heads, P length of a head's keys.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models.attention import heads_of, joined
from lvm.models.recurrence import fading_sum
from lvm.models.trunk import Trunk, TrunkConfig, wide, with_feed_forward


@dataclass(frozen=True)
class RetNetConfig(TrunkConfig):
    """Sizes of the network."""

    head_dim: int = 64
    """Size of a head's keys, P, even; must divide the width. Values are twice as long."""


TOY = RetNetConfig(width=32, num_layers=2, head_dim=16)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}

Memory = tuple[int, Tensor]
"""Positions so far, state (B, H, P, 2 P)."""


def rotated(x: Tensor, start: int) -> Tensor:
    """x (B, H, T, P) at positions `start` and after, with each pair of numbers rotated by position times a rate.

    Rates from 1 down to 1 / 10,000 (Su et al. 2021, RoFormer, arXiv 2104.09864).
    """
    length, size = x.shape[-2:]
    place = torch.arange(start, start + length, device=x.device, dtype=x.dtype)[:, None]
    rate = torch.exp(torch.arange(0, size, 2, device=x.device, dtype=x.dtype) * (-math.log(10_000.0) / size))
    angle = place * rate
    even, odd = x[..., 0::2], x[..., 1::2]
    parts = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(parts, dim=-1).flatten(-2)


class Retention(nn.Module):
    """Multi-scale retention."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, 2 * width, bias=False)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(B, T, W) and the new memory."""
        start, state = memory if memory else (0, None)
        q = rotated(wide(heads_of(self.query(x), self.head_dim)), start)
        k = rotated(wide(heads_of(self.key(x), self.head_dim)), start) / math.sqrt(self.head_dim)
        v = heads_of(self.value(x), 2 * self.head_dim)
        head = torch.arange(q.shape[1], device=x.device, dtype=q.dtype)
        log_decay = torch.log1p(-(2.0 ** (-5.0 - head)))[None, :, None].expand(1, -1, x.shape[1])
        y, state = fading_sum(q, k, v, log_decay, state)
        normed = joined(F.layer_norm(y, y.shape[-1:]))
        return self.out(F.silu(self.gate(x)) * normed), (start + x.shape[1], state)


class RetNet(Trunk):
    """Next vector from the last position of a stack of retention layers."""

    def __init__(self, config: RetNetConfig) -> None:
        retention = partial(Retention, config.width, config.head_dim)
        super().__init__(config, with_feed_forward(config, retention, factor=2))
