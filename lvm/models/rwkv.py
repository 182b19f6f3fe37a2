"""RWKV-6 (Finch): a matrix-valued state per head, with data-dependent decay per channel.

Peng et al. 2024, "Eagle and Finch", arXiv 2404.05892, section 4. Choices: version 6, whose parallel form needs no
matrix inverse; token shift and decay through low-rank maps as in the paper, with its initial values, but small random
ones where the paper initialises a low-rank factor with zeros; the paper's channel mix as feed-forward.

    y[t] = r[t]^T (S[t - 1] + diag(u) k[t] v[t]^T)        S[t] = diag(w[t]) S[t - 1] + k[t] v[t]^T

Letters: B batch, T positions, W width, H heads, N size of a head, L positions of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models.attention import heads_of, joined
from lvm.models.trunk import Trunk, TrunkConfig, wide

CHUNK = 8
"""Positions per chunk: the pairwise decays take L times the memory of the keys."""


@dataclass(frozen=True)
class RWKVConfig(TrunkConfig):
    """Sizes of the network."""

    head_dim: int = 64
    """N; must divide the width."""
    shift_rank: int = 32
    """Rank of the token-shift maps."""
    decay_rank: int = 64
    """Rank of the decay map."""


TOY = RWKVConfig(width=32, num_layers=2, head_dim=16, shift_rank=4, decay_rank=4)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}


def wkv(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, N) and the state (B, H, N, N) after the last position, float32 or float64.

    r, k, v, log_w: (B, H, T, N), log_w negative; u: (H, N); state: before the first position, None for zero.
    """
    with torch.autocast(r.device.type, enabled=False):
        r, k, v, log_w, u = wide(r), wide(k), wide(v), wide(log_w), wide(u)
        if state is None:
            state = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :])
        parts = []
        for low in range(0, r.shape[2], chunk):
            at = slice(low, low + chunk)
            here, keys, values = r[:, :, at], k[:, :, at], v[:, :, at]
            total = log_w[:, :, at].cumsum(dim=2)  # decay up to and including each position
            before = total - log_w[:, :, at]
            length = here.shape[2]
            past = torch.ones(length, length, dtype=torch.bool, device=r.device).tril(-1)[..., None]
            fade = (before[:, :, :, None] - total[:, :, None]).masked_fill(~past, -torch.inf).exp()
            scores = torch.einsum("bhtn,bhsn,bhtsn->bhts", here, keys, fade)
            own = (here * u[:, None] * keys).sum(dim=-1, keepdim=True)
            parts.append(scores @ values + own * values + (here * before.exp()) @ state)
            left = (total[:, :, -1:] - total).exp()
            state = total[:, :, -1].exp()[..., None] * state + (keys * left).transpose(-1, -2) @ values
        return torch.cat(parts, dim=2), state


def shifted(x: Tensor, last: Tensor | None) -> Tensor:
    """(B, T, W) x delayed by one position; last: (B, 1, W) the vector before the first one, None for zero."""
    return torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)


class TimeMix(nn.Module):
    """RWKV-6's attention."""

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        width, rank = config.width, config.shift_rank
        self.head_dim = config.head_dim
        depth = layer / max(config.num_layers - 1, 1)
        left = 1.0 - layer / config.num_layers
        place = torch.arange(width) / width
        slow = 1.0 - place**left
        # For decay, key, value, receptance and gate.
        mixes = (slow, slow, slow - 0.3 * depth, 1.0 - place ** (0.5 * left), 1.0 - place ** (0.5 * left))
        self.mix = nn.Parameter(slow.clone())
        self.mixes = nn.Parameter(torch.stack(mixes))
        self.shift_down = nn.Parameter(torch.empty(width, 5 * rank).uniform_(-0.01, 0.01))
        self.shift_up = nn.Parameter(torch.empty(5, rank, width).uniform_(-0.01, 0.01))
        channel = torch.arange(width) / max(width - 1, 1)
        self.decay = nn.Parameter(-6.0 + 5.0 * channel ** (0.7 + 1.3 * depth))
        self.decay_down = nn.Parameter(torch.empty(width, config.decay_rank).uniform_(-0.01, 0.01))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, width).uniform_(-0.01, 0.01))
        zigzag = ((torch.arange(width) + 1) % 3 - 1) * 0.1
        self.bonus = nn.Parameter(depth * (1.0 - channel) + zigzag)
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = nn.GroupNorm(width // config.head_dim, width, eps=64e-5)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, W), and the last input (B, 1, W) with the state (B, H, N, N)."""
        back = shifted(x, memory[0] if memory else None) - x
        low = torch.tanh((x + back * self.mix) @ self.shift_down).unflatten(-1, (5, -1))
        mixes = self.mixes + torch.einsum("btir,irw->btiw", low, self.shift_up)
        for_w, for_k, for_v, for_r, for_g = (x[:, :, None] + back[:, :, None] * mixes).unbind(dim=2)
        log_w = -wide(self.decay + torch.tanh(for_w @ self.decay_down) @ self.decay_up).exp()
        r, k, v, log_w = (
            heads_of(part, self.head_dim)
            for part in (self.receptance(for_r), self.key(for_k), self.value(for_v), log_w)
        )
        y, state = wkv(
            r, k, v, log_w, self.bonus.unflatten(0, (-1, self.head_dim)), memory[1] if memory else None
        )
        normed = self.norm(joined(y).flatten(0, 1)).view_as(x)
        return self.out(normed * F.silu(self.gate(for_g))), (x[:, -1:], state)


class ChannelMix(nn.Module):
    """RWKV-6's feed-forward: squared ReLU, gated by the receptance."""

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        width, inner = config.width, 7 * config.width // 2
        mix = 1.0 - (torch.arange(width) / width) ** (1.0 - layer / config.num_layers)
        self.mix_key = nn.Parameter(mix.clone())
        self.mix_receptance = nn.Parameter(mix.clone())
        self.key = nn.Linear(width, inner, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, W), and the last input (B, 1, W)."""
        back = shifted(x, memory) - x
        inner = torch.relu(self.key(x + back * self.mix_key)).square()
        gate = torch.sigmoid(self.receptance(x + back * self.mix_receptance))
        return gate * self.out(inner), x[:, -1:]


class RWKV(Trunk):
    """Next vector from the last position of a stack of RWKV-6 layers."""

    def __init__(self, config: RWKVConfig) -> None:
        mixers = [part(config, n) for n in range(config.num_layers) for part in (TimeMix, ChannelMix)]
        super().__init__(config, mixers)
