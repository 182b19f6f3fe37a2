"""Hyena: convolutions as long as the context, each followed by a gate.

Poli et al. 2023, "Hyena Hierarchy", arXiv 2302.10866. z = v, then z = gate * (filter convolved with z), `order` times;
v and the gates are projections with a convolution of three taps. The filters are the output of a small network with
sine activations over the position, times a window that decays at a rate per channel. Choices: order 2; a fixed `scale`
in positions instead of a maximum length, so that filters do not depend on the context's length; a skip term, as in the
authors' code; a feed-forward of four times the width.

Letters: B batch, T positions, W width, O order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvm.models.convolution import ShortConvolution, causal_convolution
from lvm.models.trunk import Trunk, TrunkConfig, with_feed_forward

SLOWEST, FASTEST = math.log(100) / 1.5, math.log(100) / 0.3
"""Range of the window's decay rates: to a hundredth after 1.5 or 0.3 scales, as in the authors' code."""


@dataclass(frozen=True)
class HyenaConfig(TrunkConfig):
    """Sizes of the network."""

    order: int = 2
    """Convolutions, and gates, per layer."""
    scale: int = 64
    """Positions after which the filters' window has mostly decayed."""
    bands: int = 8
    """Frequencies of the filters' position encoding."""
    filter_width: int = 64
    """Inner width of the filter network."""


TOY = HyenaConfig(width=32, num_layers=2, bands=2, filter_width=8)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}


class Filters(nn.Module):
    """The long filters as functions of the position."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.scale, self.bands, self.order = config.scale, config.bands, config.order
        self.first = nn.Linear(1 + 2 * config.bands, config.filter_width)
        self.second = nn.Linear(config.filter_width, config.filter_width)
        self.last = nn.Linear(config.filter_width, config.order * config.width, bias=False)
        self.frequency = nn.Parameter(torch.full((config.filter_width,), 10.0))
        self.rate = nn.Parameter(torch.linspace(SLOWEST, FASTEST, config.width))

    def forward(self, length: int) -> Tensor:
        """(O, W, length)."""
        rate = self.rate
        t = torch.arange(length, device=rate.device, dtype=rate.dtype)[:, None] / self.scale
        band = torch.arange(1, self.bands + 1, device=rate.device, dtype=rate.dtype)
        angle = 2.0 * torch.pi * t * band
        x = torch.cat((t, angle.cos(), angle.sin()), dim=-1)
        x = torch.sin(self.frequency * self.first(x))
        x = torch.sin(self.frequency * self.second(x))
        made: Tensor = self.last(x).unflatten(-1, (self.order, -1)).permute(1, 2, 0)
        return made * torch.exp(-t[:, 0] * rate.abs()[:, None])


class HyenaOperator(nn.Module):
    """Projections, convolutions and gates."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.order, width = config.order, config.width
        self.in_proj = nn.Linear(width, (config.order + 1) * width)
        self.conv = ShortConvolution((config.order + 1) * width, 3)
        self.filters = Filters(config)
        self.skip = nn.Parameter(torch.randn(config.order, width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """(B, T, W) from (B, T, W); there is no recurrent form."""
        projected, _ = self.conv(self.in_proj(x))
        z, *gates = projected.transpose(1, 2).chunk(self.order + 1, dim=1)
        filters = self.filters(x.shape[1])
        for gate, kernel, skip in zip(gates, filters, self.skip, strict=True):
            z = gate * (causal_convolution(z, kernel) + skip[:, None] * z)
        return self.out(z.transpose(1, 2)), None


class Hyena(Trunk):
    """Next vector from the last position of a stack of Hyena operators."""

    has_steps = False

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config, with_feed_forward(config, lambda: HyenaOperator(config)))
