"""Four causal decoder layers over the context; the last position, through a small head, is the prediction.

Each layer has causal self-attention and causal cross-attention to the projected context (the "memory" of a decoder).
The original documents call it an encoder, but its 17,867,520 parameters are those of decoder layers with
cross-attention. Post-norm and ReLU, as in `torch.nn.TransformerDecoderLayer`'s defaults; sinusoidal positions (Vaswani
et al. 2017). Parameter names are those of the original system, so its checkpoints load by name.

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
    """Width of the layers, W."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 8
    """Must divide the width."""
    feed_forward: int = 2048
    """Inner width of the feed-forward part."""
    dropout: float = 0.1
    """After each part of a layer, and on the attention weights."""


TOY = TransformerConfig(width=32, num_layers=2, num_heads=4, feed_forward=64)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}


def sinusoidal_positions(length: int, width: int, like: Tensor) -> Tensor:
    """(length, width) position codes in `like`'s dtype: sine in even columns, cosine in odd ones."""
    position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(
        torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / width)
    )
    angles = position * rate
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(like.dtype)


class Transformer(nn.Module):
    """Next vector from the last position of the last layer."""

    adds_mean = False
    """The prediction is the output layer's alone."""
    reads = ("input_proj",)
    """Names of the layers that take vectors."""

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
        """(B, T, D) unit vectors: position t is the prediction from contexts[:, : t + 1]."""
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
        """Number of rows of `start_from`'s directions."""
        return self.config.width

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Initialise the hidden layers so that `features` carry the context's mean and its last vector.

        directions: (W, D) orthonormal rows, the vectors' principal directions. Both attentions of the first layer add
        four times the running mean to the residual stream; the outputs of the other parts are scaled to a tenth. A
        large bias keeps the head's GELU in its linear range, and its LayerNorm removes the shift. The mean of the first
        five position codes is subtracted from the input.
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
        later = torch.ones(length, length, dtype=torch.bool, device=contexts.device).triu(1)  # causal mask
        states: Tensor = self.transformer_decoder(inputs, inputs, tgt_mask=later, memory_mask=later)
        return states
