"""Four GRU layers, each with a residual connection and LayerNorm; the last state, projected, is the prediction.

Parameter names are those of the original system, so its checkpoints load by name. GRU: Cho et al. 2014, as in
`torch.nn.GRU`; post-norm, as in the original Transformer.

Letters: B batch, T context vectors, D vector length.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GRUConfig:
    """Sizes of the network."""

    dim: int = 768
    """Length of a vector, D."""
    hidden: int = 512
    """Width of the GRUs."""
    num_layers: int = 4
    """Blocks of GRU, residual and LayerNorm."""
    dropout: float = 0.0
    """Applied to each GRU's output before the residual sum."""


TOY = GRUConfig(hidden=32, num_layers=2)
SPACE = {"hidden": (256, 512, 1024), "num_layers": (4, 5, 6)}


class Block(nn.Module):
    """norm(x + GRU(x)) over (B, T, hidden)."""

    def __init__(self, config: GRUConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(config.hidden, config.hidden, batch_first=True)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        """(B, T, hidden) from (B, T, hidden)."""
        out, _ = self.gru(states)
        normed: Tensor = self.norm(states + self.dropout(out))
        return normed


class GRU(nn.Module):
    """Next vector from the state after the last context vector."""

    adds_mean = False
    """The prediction is the output layer's alone."""
    reads = ("input_proj",)
    """Names of the layers that take vectors."""

    def __init__(self, config: GRUConfig) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(config.dim, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.output_proj = nn.Linear(config.hidden, config.dim)

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        return F.normalize(self.output_layer(self.features(contexts)).float(), dim=-1)

    def each_step(self, contexts: Tensor) -> Tensor:
        """(B, T, D) unit vectors: position t is the prediction from contexts[:, : t + 1]."""
        return F.normalize(self.output_proj(self._states(contexts)).float(), dim=-1)

    def features(self, contexts: Tensor) -> Tensor:
        """(B, hidden) inputs of the output layer from contexts (B, T, D)."""
        return self._states(contexts)[:, -1]

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

        directions: (hidden, D) orthonormal rows, the vectors' principal directions. The first GRU accumulates the
        inputs' projections and forgets slowly; its input is scaled down, so that the sum outweighs the residual of the
        last vector, and LayerNorm restores the scale. The other blocks pass their input through. The random weights are
        scaled to a tenth, so that the units differ. Gates are in torch's order r, z, n.
        """
        hidden, small = self.config.hidden, 0.01
        self.input_proj.weight.copy_(directions * math.sqrt(hidden) * small)
        self.input_proj.bias.zero_()
        grus = [block.gru for block in self.blocks if isinstance(block, Block)]
        for gru in grus:
            for tensor in gru.parameters():
                tensor.mul_(0.1)
        inputs, bias = grus[0].get_parameter("weight_ih_l0"), grus[0].get_parameter("bias_ih_l0")
        inputs[2 * hidden :].add_(torch.eye(hidden).to(inputs) * 15.0)
        bias[hidden : 2 * hidden].add_(2.0)  # update gate: 0.88 of the state is kept

    def _states(self, contexts: Tensor) -> Tensor:
        states: Tensor = self.input_proj(contexts)
        for block in self.blocks:
            states = block(states)
        return states
