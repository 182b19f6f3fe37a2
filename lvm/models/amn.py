"""Attention mixture network: the context's mean, plus a correction computed from an attention mixture.

The mean of the context is already a fair prediction, so the network predicts the difference to it. One attention head,
with the mean as its query, weighs the context vectors; its weights can be shown to users. The network ignores order: a
permuted context gives the same prediction.

Parameter names are those of the original system, so its checkpoints load by name.

Letters: B batch, T context vectors, D vector length.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AMNConfig:
    """Sizes of the network."""

    dim: int = 768
    """Length of a vector, D."""
    key_dim: int = 256
    """Length of the attention's query and keys."""
    hidden: int = 512
    """Width of the correction's first layer; the second has half."""


TOY = AMNConfig(key_dim=16, hidden=32)
SPACE = {"hidden": (256, 512, 1024), "key_dim": (128, 256, 512)}


class AMN(nn.Module):
    """normalize(mean + correction), the correction being a function of mean and mixture."""

    adds_mean = True
    """The prediction is the context's mean plus the output layer's, normalised."""
    reads = ("context_encoder", "query_encoder", "residual_net.0")
    """Names of the layers that take vectors."""

    def __init__(self, config: AMNConfig) -> None:
        super().__init__()
        self.config = config
        self.context_encoder = nn.Linear(config.dim, config.key_dim)
        self.query_encoder = nn.Linear(config.dim, config.key_dim)
        self.residual_net = nn.Sequential(
            nn.Linear(2 * config.dim, config.hidden),
            nn.GELU(),
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, config.hidden // 2),
            nn.GELU(),
            nn.LayerNorm(config.hidden // 2),
            nn.Linear(config.hidden // 2, config.dim),
        )

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        correction = self.output_layer(self.features(contexts))
        return F.normalize((contexts.mean(dim=1) + correction).float(), dim=-1)

    def features(self, contexts: Tensor) -> Tensor:
        """(B, hidden / 2) inputs of the output layer from contexts (B, T, D)."""
        mean = contexts.mean(dim=1)
        mixture = torch.einsum("bt,btd->bd", self._weights(contexts, mean), contexts)
        features: Tensor = self.residual_net[:-1](torch.cat((mean, mixture), dim=-1))
        return features

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer; its output plus the mean, scaled to norm 1, is the prediction."""
        last = self.residual_net[-1]
        assert isinstance(last, nn.Linear)
        return last

    @property
    def num_directions(self) -> int:
        """Number of rows of `start_from`'s directions."""
        return self.config.hidden

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Initialise the hidden layers so that `features` carry the context's mean.

        directions: (hidden, D) orthonormal rows, the vectors' principal directions. The first layer projects the mean
        onto them, the second passes on the first half. Large biases keep both GELUs in their linear range, and the
        LayerNorms remove the shift. The random weights are scaled to a tenth.
        """
        dim, hidden = self.config.dim, self.config.hidden
        first, second = self.residual_net[0], self.residual_net[3]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        for layer in (first, second):
            layer.weight.mul_(0.1)
            layer.bias.fill_(3.0)
        first.weight[:, :dim].add_(directions[:, :dim] * math.sqrt(hidden))
        second.weight.add_(0.5 * torch.eye(hidden)[: hidden // 2].to(directions))

    def attention(self, contexts: Tensor) -> Tensor:
        """(B, T) weights of the mixture over contexts (B, T, D); each row sums to 1."""
        return self._weights(contexts, contexts.mean(dim=1))

    def _weights(self, contexts: Tensor, mean: Tensor) -> Tensor:
        keys = self.context_encoder(contexts)
        query = self.query_encoder(mean)
        scores = torch.einsum("bk,btk->bt", query, keys) / math.sqrt(self.config.key_dim)
        return scores.float().softmax(dim=-1)
