"""Hyena: convolutions as long as the context, with a gate after each.

Poli et al. 2023, "Hyena Hierarchy", arXiv 2302.10866. z = v, then z = gate * (filter convolved with z), `order` times;
v and the gates are projections with three taps of convolution each. The filters come from a small network with
sines over the place, times a window that fades, at a rate of each channel. Choices: order 2; `scale` places in place of
a longest length, so that a filter is the same for any context; a term for the place itself, as in the authors' code;
a feed-forward of four times the width.

Letters: B batch, T places, W width, O order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvm.models.convolution import ShortConvolution, causal_convolution
from lvm.models.trunk import FeedForward, Trunk

SLOWEST, FASTEST = math.log(100) / 1.5, math.log(100) / 0.3
"""Rates of the window: it has faded to a hundredth after 1.5 and after 0.3 scales, as in the authors' code."""


@dataclass(frozen=True)
class HyenaConfig:
    """Sizes of the network."""

    dim: int = 768
    """Length of a vector, D."""
    width: int = 512
    """Length of a state of the residual stream, W."""
    num_layers: int = 4
    """Pairs of Hyena and feed-forward."""
    order: int = 2
    """Convolutions, and gates, of a layer."""
    scale: int = 64
    """Places after which the filters' window has mostly faded."""
    bands: int = 8
    """Frequencies of the place that a filter is made from."""
    filter_width: int = 64
    """Inner width of the network that makes the filters."""
    dropout: float = 0.1
    """Share of the outputs of a part zeroed while training."""


TOY = HyenaConfig(width=32, num_layers=2, bands=2, filter_width=8)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}
"""Sizes that `latent sweep` tries."""


class Filters(nn.Module):
    """The long filters as functions of the place."""

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
        self.order = config.order
        self.in_proj = nn.Linear(config.width, (config.order + 1) * config.width)
        self.conv = ShortConvolution((config.order + 1) * config.width, 3)
        self.filters = Filters(config)
        self.skip = nn.Parameter(torch.randn(config.order, config.width))
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """(B, T, W) from (B, T, W); it has no step form."""
        projected, _ = self.conv(self.in_proj(x))
        z, *gates = projected.transpose(1, 2).chunk(self.order + 1, dim=1)
        filters = self.filters(x.shape[1])
        for gate, kernel, skip in zip(gates, filters, self.skip, strict=True):
            z = gate * (causal_convolution(z, kernel) + skip[:, None] * z)
        return self.out(z.transpose(1, 2)), None


class Hyena(Trunk):
    """Next vector from the last place of a stack of Hyena operators."""

    has_steps = False

    def __init__(self, config: HyenaConfig) -> None:
        mixers: list[nn.Module] = []
        for _ in range(config.num_layers):
            mixers += [HyenaOperator(config), FeedForward(config.width, 4 * config.width)]
        super().__init__(config, mixers)
