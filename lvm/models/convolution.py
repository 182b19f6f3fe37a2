"""Causal depthwise convolutions.

Letters: B batch, W channels, T positions, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models.trunk import wide

DIRECT_PLACES = 64
"""Up to this length the direct sum is faster than the FFT."""


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """y (B, W, T) with y[t] = sum over s <= t of kernel[s] u[t - s], float32 or float64.

    u: (B, W, T); kernel: (W, T). By an FFT of twice the length, so that nothing wraps around; by a direct sum for short
    inputs, and on MPS, for lack of complex numbers.
    """
    length = u.shape[-1]
    with torch.autocast(u.device.type, enabled=False):
        u, kernel = wide(u), wide(kernel)
        if length <= DIRECT_PLACES or u.device.type == "mps":
            return F.conv1d(F.pad(u, (length - 1, 0)), kernel.flip(-1)[:, None], groups=len(kernel))
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y: Tensor = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
        return y


class ShortConvolution(nn.Module):
    """Causal depthwise convolution of K taps, with bias; its memory is the last K - 1 inputs."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, taps, groups=width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, W) and the memory (B, K - 1, W) from x (B, T, W)."""
        taps = self.conv.kernel_size[0]
        if memory is None:
            memory = x.new_zeros(len(x), taps - 1, x.shape[-1])
        seen = torch.cat((memory, x), dim=1)
        y = self.conv(seen.transpose(1, 2)).transpose(1, 2)
        return y, seen[:, seen.shape[1] - taps + 1 :]
