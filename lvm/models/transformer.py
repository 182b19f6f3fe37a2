"""Four causal decoder layers over the context; the last place, through a small head, is the prediction.

Each layer attends to the places so far of its own input and, in a second attention, to the projected context
itself (the "memory" of a decoder), both causal. The original documents call it an encoder; 17,867,520
parameters say decoder layers with cross-attention. LayerNorm comes after each sum, ReLU in the feed-forward,
as in `torch.nn.TransformerDecoderLayer`'s defaults. Vaswani et al. 2017, positions by sine and cosine.
Parameter names are the original's, so its checkpoints load by name.

Letters: B batch, T context vectors, D vector length, W width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network."""

    dim: int = 768
    """Length of a vector, D."""
    width: int = 512
    """Length of a state, W."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 8
    """Attention heads; they share the width."""
    feed_forward: int = 2048
    """Inner width of the feed-forward part."""
    dropout: float = 0.1
    """Share of the numbers zeroed after each part of a layer, and in the attention, while training."""


TOY = TransformerConfig(width=32, num_layers=2, num_heads=4, feed_forward=64)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}
"""Sizes that `latent sweep` tries."""


def sinusoidal_positions(length: int, width: int, like: Tensor) -> Tensor:
    """(length, width) position codes in `like`'s dtype: sine in even places, cosine in odd ones."""
    position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(
        torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / width)
    )
    angles = position * rate
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(like.dtype)


class Transformer(nn.Module):
    """Next vector from the last place of the last layer."""

    adds_mean = False
    """The output layer alone makes the prediction."""
    reads = ("input_proj",)
    """Layers that read vectors."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(config.dim, config.width)
        layer = nn.TransformerDecoderLayer(
            config.width, config.num_heads, config.feed_forward, config.dropout, batch_first=True
        )
        self.transformer_decoder = nn.TransformerDecoder(layer, config.num_layers)
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width),
            nn.GELU(),
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.dim),
        )

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        return F.normalize(self.output_layer(self.features(contexts)).float(), dim=-1)

    def each_step(self, contexts: Tensor) -> Tensor:
        """(B, T, D) unit vectors: place t holds the prediction from contexts[:, : t + 1]."""
        return F.normalize(self.head(self._states(contexts)).float(), dim=-1)

    def features(self, contexts: Tensor) -> Tensor:
        """(B, W) inputs of the output layer from contexts (B, T, D)."""
        features: Tensor = self.head[:-1](self._states(contexts)[:, -1])
        return features

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer; its output, scaled to norm 1, is the prediction."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last

    @property
    def num_directions(self) -> int:
        """Rows `start_from` takes."""
        return self.config.width

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Set the hidden layers so that `features` carry the context's mean and its last vector.

        directions: (W, D) orthonormal rows along which the vectors vary most. Both attentions of the first
        layer add four times the mean of the places so far to the residual path; what the other parts add is
        cut to a tenth. The head's GELU works where it is a straight line, and its LayerNorm takes the shift
        out again. The input's bias takes out what the position codes of five places have in common.
        """
        width = self.config.width
        eye = torch.eye(width).to(directions)
        self.input_proj.weight.copy_(directions * math.sqrt(width))
        self.input_proj.bias.copy_(-sinusoidal_positions(5, width, directions).mean(dim=0))
        for number, layer in enumerate(self.transformer_decoder.layers):
            assert isinstance(layer, nn.TransformerDecoderLayer)
            layer.linear2.weight.mul_(0.1)
            layer.linear2.bias.mul_(0.1)
            for attention in (layer.self_attn, layer.multihead_attn):
                attention.out_proj.weight.mul_(0.1)
                if number == 0:
                    assert attention.in_proj_weight is not None
                    attention.in_proj_weight[2 * width :].copy_(eye)  # after queries and keys: the values
                    attention.out_proj.weight.copy_(4.0 * eye)
        first = self.head[0]
        assert isinstance(first, nn.Linear)
        first.weight.mul_(0.1).add_(0.5 * eye)
        first.bias.fill_(3.0)

    def _states(self, contexts: Tensor) -> Tensor:
        length = contexts.shape[1]
        inputs: Tensor = self.input_proj(contexts)
        inputs = inputs + sinusoidal_positions(length, self.config.width, inputs)
        # Place t sees the places up to t: what comes later is what the predictor is to find.
        later = torch.ones(length, length, dtype=torch.bool, device=contexts.device).triu(1)
        states: Tensor = self.transformer_decoder(inputs, inputs, tgt_mask=later, memory_mask=later)
        return states
