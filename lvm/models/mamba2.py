"""Mamba-2: a state space model whose decay, input and output depend on the current vector.

Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060. The state of each head is a matrix; at each position it is
multiplied by a scalar decay, the outer product of B and x is added, and C reads it. Choices: the paper's block
(parallel projections, four taps of convolution with SiLU over x, B and C, gated RMSNorm before the last projection),
one group of B and C for all heads, no feed-forward between blocks. The parallel form is in `lvm.models.recurrence`.

Letters: B batch, T positions, W width, H heads, P length of a head, N length of B and C, E = H P inner width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models.attention import heads_of, joined
from lvm.models.convolution import ShortConvolution
from lvm.models.recurrence import fading_sum
from lvm.models.trunk import Trunk, TrunkConfig, wide

DT_MIN, DT_MAX = 0.001, 0.1
"""Range of the initial step sizes, log-uniform (from S4, by way of Mamba, arXiv 2312.00752, section 6)."""


@dataclass(frozen=True)
class Mamba2Config(TrunkConfig):
    """Sizes of the network."""

    num_layers: int = 6
    state: int = 64
    """Length of B and C, N."""
    head_dim: int = 64
    """P; must divide the inner width."""
    expand: int = 2
    """Inner width as a multiple of the width."""
    taps: int = 4
    """Kernel size of the short convolution."""


TOY = Mamba2Config(width=32, num_layers=2, state=8, head_dim=16)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}

Memory = tuple[Tensor, Tensor]
"""Inputs of the convolution (B, taps - 1, E + 2 N), state (B, H, N, P)."""


class SSD(nn.Module):
    """Mamba-2's block without norm and residual."""

    def __init__(self, width: int, state: int, head_dim: int, expand: int, taps: int) -> None:
        super().__init__()
        inner = expand * width
        self.head_dim = head_dim
        num_heads = inner // head_dim
        self.sizes = (inner, inner + 2 * state, num_heads)
        self.state_sizes = (inner, state, state)
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(inner + 2 * state, taps)
        steps = torch.exp(torch.rand(num_heads) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN))
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        self.log_a = nn.Parameter(torch.empty(num_heads).uniform_(1.0, 16.0).log())
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(B, T, W) and the new memory."""
        gate, mixed, dt = self.in_proj(x).split(self.sizes, dim=-1)
        mixed, taps = self.conv(mixed, memory[0] if memory else None)
        values, b, c = F.silu(mixed).split(self.state_sizes, dim=-1)
        step = F.softplus(wide(dt) + self.dt_bias).transpose(1, 2)  # (B, H, T)
        log_decay = -self.log_a.exp()[:, None] * step
        v = heads_of(values, self.head_dim)
        y, state = fading_sum(
            c[:, None], b[:, None], wide(v) * step[..., None], log_decay, memory[1] if memory else None
        )
        y = joined(y + self.skip[:, None, None] * v)
        return self.out(self.norm(y * F.silu(wide(gate)))), (taps, state)


class Mamba2(Trunk):
    """Next vector from the last position of a stack of Mamba-2 blocks."""

    def __init__(self, config: Mamba2Config) -> None:
        sizes = (config.width, config.state, config.head_dim, config.expand, config.taps)
        super().__init__(config, [SSD(*sizes) for _ in range(config.num_layers)], nn.RMSNorm)
