"""S4D: one diagonal state space model per channel, computed as a long convolution.

Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893. Choices:
S4D-Lin (A[n] = -1/2 + i pi n), zero-order hold, B fixed to 1, C random; GELU and a gated linear layer after the
convolution, as in the paper. Step sizes are larger than the paper's 0.001 to 0.1, which suit a thousand positions and
more: a context here has 5 to 64. Complex arithmetic is written out in real numbers, to run on any device.

    x[t] = exp(dt A) x[t - 1] + (exp(dt A) - 1) / A u[t]        y[t] = 2 Re(C x[t]) + D u[t]

Letters: B batch, T positions, W width, N complex numbers of a channel's state, one of each conjugate pair.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models.convolution import causal_convolution
from lvm.models.trunk import Trunk, TrunkConfig, wide

DT_MIN, DT_MAX = 0.01, 1.0
"""Range of the initial step sizes, log-uniform: channels that forget within 2 to 200 positions."""


@dataclass(frozen=True)
class S4Config(TrunkConfig):
    """Sizes of the network."""

    width: int = 768
    num_layers: int = 6
    state: int = 32
    """Complex numbers in a channel's state, N: half the paper's N, which includes the conjugates."""


TOY = S4Config(width=32, num_layers=2, state=4)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}

Pair = tuple[Tensor, Tensor]
"""Real and imaginary part."""


class S4D(nn.Module):
    """A state space model per channel, GELU, gated linear layer."""

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(width) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN))
        self.log_decay = nn.Parameter(torch.full((width, state), math.log(0.5)))
        self.frequency = nn.Parameter(torch.pi * torch.arange(state, dtype=torch.float32).repeat(width, 1))
        self.c = nn.Parameter(torch.randn(2, width, state) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, memory: Pair | None = None) -> tuple[Tensor, Pair | None]:
        """(B, T, W) and the new state, a pair of (B, W, N).

        Without a memory, more than one position is computed by convolution and no state is returned; otherwise one
        position at a time.
        """
        if memory is None and x.shape[1] > 1:
            u = x.transpose(1, 2)
            y = causal_convolution(u, self.kernel(x.shape[1])) + self.skip[:, None] * u
            return F.glu(self.out(F.gelu(y.transpose(1, 2))), dim=-1), None
        outputs = []
        for u in wide(x).unbind(dim=1):
            y, memory = self.recur(u, memory)
            outputs.append(y)
        return F.glu(self.out(F.gelu(torch.stack(outputs, dim=1))), dim=-1), memory

    def kernel(self, length: int) -> Tensor:
        """(W, length) impulse response."""
        (real, imag), (c_real, c_imag) = self._exponent(), self._response()
        place = torch.arange(length, device=real.device, dtype=real.dtype)
        fade, angle = (real[..., None] * place).exp(), imag[..., None] * place
        taps = fade * (c_real[..., None] * angle.cos() - c_imag[..., None] * angle.sin())
        return 2.0 * taps.sum(dim=1)

    def recur(self, u: Tensor, memory: Pair | None) -> tuple[Tensor, Pair]:
        """y (B, W) of one position and the new state, from u (B, W) and the old state."""
        (real, imag), (c_real, c_imag) = self._exponent(), self._response()
        # Inputs enter this state with weight 1; the factor (exp(dt A) - 1) / A is part of C.
        old_real, old_imag = memory if memory is not None else (torch.zeros_like(real),) * 2
        fade_real, fade_imag = real.exp() * imag.cos(), real.exp() * imag.sin()
        new_real = fade_real * old_real - fade_imag * old_imag + u[..., None]
        new_imag = fade_real * old_imag + fade_imag * old_real
        y = 2.0 * (c_real * new_real - c_imag * new_imag).sum(dim=-1) + self.skip * u
        return y, (new_real, new_imag)

    def _exponent(self) -> Pair:
        """(W, N) dt A."""
        dt = wide(self.log_dt).exp()[:, None]
        return -dt * self.log_decay.exp(), dt * self.frequency

    def _response(self) -> Pair:
        """(W, N) C (exp(dt A) - 1) / A."""
        (real, imag), dt = self._exponent(), self.log_dt.exp()[:, None]
        a_real, a_imag = real / dt, imag / dt
        top_real, top_imag = real.exp() * imag.cos() - 1.0, real.exp() * imag.sin()
        size = a_real.square() + a_imag.square()
        b_real = (top_real * a_real + top_imag * a_imag) / size
        b_imag = (top_imag * a_real - top_real * a_imag) / size
        c_real, c_imag = self.c
        return c_real * b_real - c_imag * b_imag, c_real * b_imag + c_imag * b_real


class S4(Trunk):
    """Next vector from the last position of a stack of diagonal state spaces."""

    def __init__(self, config: S4Config) -> None:
        super().__init__(config, [S4D(config.width, config.state) for _ in range(config.num_layers)])
