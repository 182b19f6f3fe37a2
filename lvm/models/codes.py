"""Predictors that also read each vector's TMD code: D + 16 inputs in place of D, as in the original system.

A code is a function of the vector, the nearest label on each axis (`lvm.corpus.tmd.Prototypes`), so the network
computes it in front of every layer that takes vectors. Contexts stay (B, T, D), and training, evaluation and serving
are unchanged. The labels' vectors are a buffer, saved with the weights. Where a layer takes a mix of vectors (AMN's
mean, the noise of lcm-diffusion), the code is that of the mix.

Letters: B batch, T context vectors, D vector length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXES = (16, 32, 64)
"""Labels of each axis: domain, task, modifier."""

FEATURES = 16
"""Inputs per code: 4 + 5 + 6 bits, and the spare one, always 0."""


class Codes(nn.Module):
    """The bits of vectors' codes."""

    prototypes: Tensor

    def __init__(self, dim: int) -> None:
        """The prototypes are zeros until they are loaded."""
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(sum(AXES), dim))

    @torch.no_grad()
    def forward(self, vectors: Tensor) -> Tensor:
        """(..., 16) bits as 0 and 1, highest first, of vectors (..., D)."""
        with torch.autocast(vectors.device.type, enabled=False):  # rounded cosines could change the codes
            cosines = vectors.to(self.prototypes) @ self.prototypes.T
        bits = []
        for part in cosines.split(AXES, dim=-1):
            places = torch.arange(part.shape[-1].bit_length() - 2, -1, -1, device=part.device)
            bits.append(part.argmax(dim=-1, keepdim=True) >> places & 1)
        return F.pad(torch.cat(bits, dim=-1), (0, 1)).to(vectors.dtype)

    def beside(self, vectors: Tensor) -> Tensor:
        """(..., n (D + 16)) from n concatenated vectors (..., n D): these, then their codes."""
        apart = vectors.unflatten(-1, (-1, self.prototypes.shape[1]))
        return torch.cat((vectors, self(apart).flatten(-2)), dim=-1)


class CodedLinear(nn.Linear):
    """A linear layer over vectors and their codes."""

    def __init__(self, plain: nn.Linear, codes: Codes) -> None:
        """plain: the layer over vectors that this one replaces."""
        num_vectors = plain.in_features // codes.prototypes.shape[1]
        super().__init__(plain.in_features + num_vectors * FEATURES, plain.out_features)
        self._codes = (codes,)  # in a tuple, so that it is not registered: the predictor has it once

    def forward(self, input: Tensor) -> Tensor:
        """(..., out) from (..., n D)."""
        return super().forward(self._codes[0].beside(input))


class CodedLSTM(nn.LSTM):
    """An LSTM over vectors and their codes."""

    def __init__(self, plain: nn.LSTM, codes: Codes) -> None:
        """plain: the LSTM over vectors that this one replaces."""
        sizes = (plain.input_size + FEATURES, plain.hidden_size, plain.num_layers)
        super().__init__(*sizes, dropout=plain.dropout, batch_first=True)
        self._codes = (codes,)

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As torch's, from (B, T, D)."""
        return super().forward(self._codes[0].beside(input), hx)


def read_codes(model: nn.Module, dim: int, reads: tuple[str, ...]) -> None:
    """Make an untrained predictor read codes: replace the layers named in `reads`, and add the `Codes` as `tmd`."""
    codes = Codes(dim)
    for name in reads:
        plain: Any = model.get_submodule(name)
        kind = CodedLSTM if isinstance(plain, nn.LSTM) else CodedLinear
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, kind(plain, codes))
    model.add_module("tmd", codes)
