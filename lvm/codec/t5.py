"""T5 blocks in plain torch, with the parameter names of transformers' T5Stack.

Why our own: inference needs caches in fixed buffers and fused weights (`lvm.codec.runner`), which the general-purpose
classes do not offer. A test checks equality with transformers.

Letters: B batch, T positions, S memory positions, D model width, H heads, K width of a head.
Source: Raffel et al. 2020 (arXiv:1910.10683) and the T5 v1.0/1.1 checkpoints.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.errors import InputError


@dataclass(frozen=True)
class T5Config:
    """Sizes of one stack."""

    d_model: int
    """Width of a hidden state."""
    d_kv: int
    """Width of one attention head."""
    num_heads: int
    """Attention heads."""
    d_ff: int
    """Width inside the feed-forward layer."""
    num_layers: int
    """Blocks."""
    is_decoder: bool
    """Whether self-attention is causal and cross-attention to a memory follows it."""
    num_buckets: int = 32
    """Buckets of relative distance (T5's relative_attention_num_buckets)."""
    max_distance: int = 128
    """Distances of this and more share the last bucket (T5's relative_attention_max_distance)."""
    epsilon: float = 1e-6
    """Added to the mean square in the layer norm (T5's layer_norm_epsilon)."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_kv", "num_heads", "d_ff", "num_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"T5Config.{name} must be at least 1, got {getattr(self, name)}")


def relative_buckets(T: int, S: int, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each (query, key) distance, (T, S) int64. T5's `_relative_position_bucket`."""
    distance = torch.arange(S)[None, :] - torch.arange(T)[:, None]
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = bucket + (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (share * (num_buckets - exact)).long()
    return bucket + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D), in the dtype of the weight."""
        return F.rms_norm(x.to(self.weight.dtype), (x.shape[-1],), self.weight, self.epsilon)


class Attention(nn.Module):
    """Unscaled dot-product attention; the first block's self-attention has the stack's position bias."""

    def __init__(self, config: T5Config, has_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.d_kv = config.num_heads, config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.v.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5 / math.sqrt(2 * config.num_layers))

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H*K) to (B, H, T, K)."""
        return x.view(*x.shape[:-1], self.heads, self.d_kv).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of x (B, T, D) to memory (B, S, D), (B, T, D); bias (1 or B, H, T, S) is added to the scores."""
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        mask = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        merged: Tensor = self.o(out.transpose(1, 2).flatten(-2))
        return merged


class FeedForward(nn.Module):
    """wo(relu(wi(x))), as in T5 v1.0."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        nn.init.normal_(self.wi.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=config.d_ff**-0.5 / math.sqrt(2 * config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        out: Tensor = self.wo(F.relu(self.wi(x)))
        return out


class _SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, has_bias)
        self.layer_norm = RMSNorm(config.d_model, config.epsilon)


class _CrossAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config.d_model, config.epsilon)


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config.d_model, config.epsilon)


class Block(nn.Module):
    """Self-attention, cross-attention (decoders only) and feed-forward, each with a residual connection."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [_SelfAttentionLayer(config, has_bias)]
        if config.is_decoder:
            layers.append(_CrossAttentionLayer(config))
        layers.append(_FeedForwardLayer(config))
        self.layer = nn.ModuleList(layers)

    @property
    def self_attention(self) -> _SelfAttentionLayer:
        """The self-attention layer."""
        return cast(_SelfAttentionLayer, self.layer[0])

    @property
    def cross_attention(self) -> _CrossAttentionLayer:
        """The cross-attention layer; decoders only."""
        return cast(_CrossAttentionLayer, self.layer[1])

    @property
    def feed_forward(self) -> _FeedForwardLayer:
        """The feed-forward layer."""
        return cast(_FeedForwardLayer, self.layer[-1])

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        first, last = self.self_attention, self.feed_forward
        normed = first.layer_norm(x)
        x = x + first.SelfAttention(normed, normed, bias)
        if memory is not None:
            cross = self.cross_attention
            x = x + cross.EncDecAttention(cross.layer_norm(x), memory, None)
        out: Tensor = x + last.DenseReluDense(last.layer_norm(x))
        return out


class T5Stack(nn.Module):
    """A T5 encoder or decoder without embedding table and output head."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.epsilon)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [cast(Block, block) for block in self.block]

    def position_bias(self, T: int) -> Tensor:
        """Bias of the self-attention scores, (1, H, T, T); in a decoder -inf above the diagonal."""
        c = self.config
        buckets = relative_buckets(T, T, not c.is_decoder, c.num_buckets, c.max_distance)
        table = self.blocks[0].self_attention.SelfAttention.relative_attention_bias
        bias: Tensor = table(buckets.to(table.weight.device)).permute(2, 0, 1)[None]
        if c.is_decoder:
            ahead = torch.ones(T, T, dtype=torch.bool, device=bias.device).triu(1)
            bias = bias.masked_fill(ahead, float("-inf"))
        return bias

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D). mask: (B, T) bool, True on real positions; None without padding. memory: (B, S, D),
        without padding, for a decoder."""
        bias = self.position_bias(x.shape[1])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
        for block in self.blocks:
            x = block(x, bias, memory)
        out: Tensor = self.final_layer_norm(x)
        return out
