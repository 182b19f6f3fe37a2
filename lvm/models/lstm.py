"""Two LSTM layers over the context; the last state, projected, is the prediction.

The original documents call it bidirectional, but its 5,120,768 parameters are those of one direction. Parameter names
are those of the original system, so its checkpoints load by name. LSTM: Hochreiter and Schmidhuber 1997, as in
`torch.nn.LSTM`.

Letters: B batch, T context vectors, D vector length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of the network."""

    dim: int = 768
    """Length of a vector, D."""
    hidden: int = 512
    """Width of the LSTM."""
    num_layers: int = 2
    """Stacked LSTM layers."""
    dropout: float = 0.2
    """Between layers."""


TOY = LSTMConfig(hidden=32)
SPACE = {"hidden": (256, 512, 1024), "num_layers": (2, 3, 4)}


class LSTM(nn.Module):
    """Next vector from the state after the last context vector."""

    adds_mean = False
    """The prediction is the output layer's alone."""
    reads = ("lstm",)
    """Names of the layers that take vectors."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        dropout = config.dropout if config.num_layers > 1 else 0.0
        self.lstm = nn.LSTM(config.dim, config.hidden, config.num_layers, dropout=dropout, batch_first=True)
        self.output_proj = nn.Linear(config.hidden, config.dim)

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        return F.normalize(self.output_layer(self.features(contexts)).float(), dim=-1)

    def each_step(self, contexts: Tensor) -> Tensor:
        """(B, T, D) unit vectors: position t is the prediction from contexts[:, : t + 1]."""
        states, _ = self.lstm(contexts)
        return F.normalize(self.output_proj(states).float(), dim=-1)

    def features(self, contexts: Tensor) -> Tensor:
        """(B, hidden) inputs of the output layer from contexts (B, T, D)."""
        states: Tensor = self.lstm(contexts)[0]
        return states[:, -1]

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer; its output, scaled to norm 1, is the prediction."""
        return self.output_proj

    @property
    def num_directions(self) -> int:
        """Number of rows of `start_from`'s directions."""
        return self.config.hidden

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Initialise the hidden layers so that `features` carry the context's mean, with more weight on later vectors.

        directions: (hidden, D) orthonormal rows, the vectors' principal directions. The first layer's cell accumulates
        the inputs' projections and forgets slowly; the other layers pass their input through. The random weights are
        scaled to a tenth, so that the units differ. Gates are in torch's order i, f, g, o.
        """
        hidden = self.config.hidden
        for tensor in self.lstm.parameters():
            tensor.mul_(0.1)
        for layer in range(self.config.num_layers):
            inputs = self.lstm.get_parameter(f"weight_ih_l{layer}")
            bias = self.lstm.get_parameter(f"bias_ih_l{layer}")
            passed = directions if layer == 0 else torch.eye(hidden).to(inputs)
            inputs[2 * hidden : 3 * hidden].add_(passed)
            bias[hidden : 2 * hidden].add_(2.0 if layer == 0 else -2.0)  # forget gate: 0.88, 0.12
            bias[3 * hidden :].add_(1.0)
