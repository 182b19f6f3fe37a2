"""Causal softmax attention with a cache of keys and values.

Letters: B batch, H heads, T positions, S positions including earlier ones, P size of a head, W = H P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def heads_of(x: Tensor, head_dim: int) -> Tensor:
    """(B, H, T, P) from (B, T, H P)."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads


def joined(x: Tensor) -> Tensor:
    """(B, T, H P) from (B, H, T, P)."""
    return x.transpose(1, 2).flatten(2)


class CausalAttention(nn.Module):
    """Each position attends to itself and earlier ones (Vaswani et al. 2017)."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, W), and the keys and values (B, H, S, P) so far.

        seen: bool, broadcast to (B, H, T, S), True where a position is attended to; None for causal attention.
        """
        q, k, v = (heads_of(part, self.head_dim) for part in self.qkv(x).chunk(3, dim=-1))
        if memory is not None:
            k, v = torch.cat((memory[0], k), dim=2), torch.cat((memory[1], v), dim=2)
        if seen is None:
            length, total = q.shape[2], k.shape[2]
            seen = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
        return self.out(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))), (k, v)
