"""Mamba-2 blocks with causal attention in place of every sixth.

Dao and Gu 2024, arXiv 2405.21060, section 9.2.3, and Lieber et al. 2024 (Jamba, arXiv 2403.19887): a few attention
layers recall what the decaying state has lost. Choices: no position codes, as the state space encodes order; no
feed-forward.

Letters: B batch, T positions, W width.
"""

from dataclasses import dataclass

from torch import nn

from lvm.models.attention import CausalAttention
from lvm.models.mamba2 import SSD
from lvm.models.trunk import Trunk, TrunkConfig


@dataclass(frozen=True)
class HybridConfig(TrunkConfig):
    """Sizes of the network."""

    num_layers: int = 6
    attention_every: int = 6
    """Every attention_every-th block is attention."""
    state: int = 64
    """Mamba-2's N."""
    head_dim: int = 64
    """Of both kinds of block."""
    expand: int = 2
    """Mamba-2's inner width as a multiple of the width."""
    taps: int = 4
    """Kernel size of Mamba-2's short convolution."""


TOY = HybridConfig(width=32, num_layers=3, attention_every=3, state=8, head_dim=16)
SPACE = {"width": (256, 512, 768), "num_layers": (6, 12)}


class Hybrid(Trunk):
    """Next vector from the last position of a stack of Mamba-2 and attention."""

    def __init__(self, config: HybridConfig) -> None:
        sizes = (config.width, config.state, config.head_dim, config.expand, config.taps)
        mixers: list[nn.Module] = [
            SSD(*sizes) if number % config.attention_every else CausalAttention(config.width, config.head_dim)
            for number in range(1, config.num_layers + 1)
        ]
        super().__init__(config, mixers, nn.RMSNorm)
