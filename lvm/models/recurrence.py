"""Linear recurrence with decay, which Mamba-2, RetNet and linear attention have in common.

    S[t] = exp(log_decay[t]) S[t - 1] + k[t] v[t]^T        y[t] = q[t]^T S[t]

Within a chunk it is computed like attention, in quadratic time; the state carries over from chunk to chunk. This is the
"state space duality" of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6) and the chunkwise form of RetNet (Sun et
al. 2023, arXiv 2307.08621, section 2.3). Exponents are never positive, so nothing overflows.

Letters: B batch, H heads, T positions, N length of a key, P length of a value.
"""

import torch
from torch import Tensor

from lvm.models.trunk import wide

CHUNK = 64
"""Positions per chunk: all of a usual context."""


def fading_sum(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, P) and the state (B, H, N, P) after the last position, float32 or float64.

    q, k: (B, H, T, N); v: (B, H, T, P); log_decay: (B, H, T), at most 0. B and H may be 1, to broadcast. state: before
    the first position; None for zero.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay = wide(q), wide(k), wide(v), wide(log_decay)
        parts = []
        for low in range(0, v.shape[2], chunk):
            at = slice(low, low + chunk)
            total = log_decay[:, :, at].cumsum(dim=-1)
            # Decay from s to t, for s <= t.
            between = total[..., :, None] - total[..., None, :]
            past = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).tril()
            weights = between.masked_fill(~past, -torch.inf).exp()
            y = (q[:, :, at] @ k[:, :, at].transpose(-1, -2) * weights) @ v[:, :, at]
            if state is not None:
                y = y + total.exp()[..., None] * (q[:, :, at] @ state)
            left = (total[..., -1:] - total).exp()[..., None]
            added = (k[:, :, at] * left).transpose(-1, -2) @ v[:, :, at]
            state = added if state is None else total[..., -1].exp()[..., None, None] * state + added
            parts.append(y)
        assert state is not None
        return torch.cat(parts, dim=2), state
