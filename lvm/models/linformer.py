"""Linformer, made causal: positions in earlier blocks are attended to through a few learned summaries.

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768. The paper projects all keys and
values along the sequence, E K and F V, which leaks the future and fixes the length. Choices: each block of positions
is projected by itself to `rank` keys and values, with E and F shared by blocks and heads; a position attends to the
summaries of earlier blocks and to the exact keys of its own block up to itself. This is causal for any length and costs
T (block + T rank / block) scores instead of T^2. Attention within one block is exact. Sinusoidal positions; a
feed-forward of four times the width.

Letters: B batch, T positions, W width, H heads, P size of a head, F blocks, L positions of a block, R rank.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models.attention import heads_of, joined
from lvm.models.trunk import Trunk, TrunkConfig, wide, with_feed_forward


@dataclass(frozen=True)
class LinformerConfig(TrunkConfig):
    """Sizes of the network."""

    head_dim: int = 64
    """P; must divide the width."""
    block: int = 8
    """Positions per block, L."""
    rank: int = 2
    """Summaries per block, R."""


TOY = LinformerConfig(width=32, num_layers=2, head_dim=16, block=2, rank=1)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}


class BlockAttention(nn.Module):
    """Exact attention within a block, to summaries of earlier blocks."""

    def __init__(self, width: int, head_dim: int, block: int, rank: int) -> None:
        super().__init__()
        self.head_dim, self.block = head_dim, block
        self.qkv = nn.Linear(width, 3 * width)
        # Close to the mean of the block, with noise so that the summaries differ.
        self.key_summary = nn.Parameter(1.0 / block + torch.randn(rank, block) / block)
        self.value_summary = nn.Parameter(1.0 / block + torch.randn(rank, block) / block)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """(B, T, W) from (B, T, W); there is no recurrent form."""
        length = x.shape[1]
        num_blocks = -(-length // self.block)
        padded = F.pad(x, (0, 0, 0, num_blocks * self.block - length))
        q, k, v = (
            heads_of(part, self.head_dim).unflatten(2, (num_blocks, self.block))  # (B, H, F, L, P)
            for part in self.qkv(padded).chunk(3, dim=-1)
        )
        # The last block needs no summary: no position comes after it.
        keys, values = (
            torch.einsum("rl,bhflp->bhfrp", summary, part[:, :, :-1]).flatten(2, 3)
            for summary, part in ((self.key_summary, k), (self.value_summary, v))
        )
        own = q @ k.transpose(-1, -2)
        past = torch.ones(self.block, self.block, dtype=torch.bool, device=x.device).tril()
        own = own.masked_fill(~past, -torch.inf)
        before = torch.einsum("bhflp,bhsp->bhfls", q, keys)
        number = torch.arange(num_blocks, device=x.device)
        of_block = number[:-1].repeat_interleave(len(self.key_summary))
        before = before.masked_fill(of_block >= number[:, None, None], -torch.inf)
        weights = wide(torch.cat((before, own), dim=-1) / math.sqrt(self.head_dim)).softmax(dim=-1)
        weights = weights.to(v.dtype)
        split = before.shape[-1]
        y = torch.einsum("bhfls,bhsp->bhflp", weights[..., :split], values) + weights[..., split:] @ v
        return self.out(joined(y.flatten(2, 3))[:, :length]), None


class Linformer(Trunk):
    """Next vector from the last position of a stack of block attention."""

    has_steps = False

    def __init__(self, config: LinformerConfig) -> None:
        attention = partial(BlockAttention, config.width, config.head_dim, config.block, config.rank)
        super().__init__(config, with_feed_forward(config, attention), positions=True)
