"""Encoders with int8 matrix products, for high throughput on a CPU.

Weights are quantised symmetrically per output channel, inputs per row (a token), and sums are exact in int32, so a
text's vector does not depend on its batch. oneDNN uses VNNI or AMX instructions at full rate: on two cores without AMX
about 1.0 TOP/s, against 0.5 for FBGEMM (`lvm.codec.runner`, better for a decoder's few rows) and 0.25 TFLOP/s in
float32 (tests/bench/results/LOG.md). The remaining cost is passes over memory, of which there are few:

- T5's layer norm scales rows and columns. A row's scale does not change its int8 values and is applied after the
  product; the column weights are folded into the matrix.
- Outputs of a relu are not negative, so they are quantised in 255 steps from 0.
- What `mini` computes per token, before attention (embedding, first projections), is a precomputed table.

Letters: B rows, T positions, M = B*T, D model width, H heads, K width of a head.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.mini import MiniEncoder
from lvm.codec.t5 import Block, RMSNorm, T5Stack


class Product:
    """Quantised rows (M, D) uint8 times one fixed weight (out, D), to (M, out) float32; the caller scales the rows."""

    def __init__(self, weight: Tensor, positive_input: bool = False, relu: bool = False) -> None:
        """positive_input: rows come from `positive_digits`, else from `digits`. relu: applied to the result."""
        weight = weight.detach().float()
        self.scales = weight.abs().amax(1).clamp_min(1e-30) / 127
        rounded = torch.round(weight / self.scales[:, None]).to(torch.int8)
        self.zeros = torch.zeros(len(rounded), dtype=torch.int32)
        self.step, self.zero = (1 / 255, 0) if positive_input else (1 / 127, 128)
        self.after = "relu" if relu else "none"
        self.packed: Any = torch.ops.onednn.qlinear_prepack(rounded, None)

    def __call__(self, digits: Tensor) -> Tensor:
        inputs = (digits, self.step, self.zero)
        weights = (self.packed, self.scales, self.zeros)
        no_bias, output = None, (1.0, 0, torch.float32)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *inputs, *weights, no_bias, *output, self.after, [], ""
        )
        return out


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, D) quantised to uint8 by row, 127 steps to the row's maximum of |x| and zero point 128; and that maximum,
    (M, 1)."""
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).clamp_min_(1e-30)
    return _quantised(x / largest, 1 / 127, 128), largest


def positive_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, D) >= 0 quantised to uint8 by row, 255 steps to the row's maximum; and that, (M, 1). Overwrites x."""
    largest = x.amax(-1, keepdim=True).clamp_min_(1e-30)
    return _quantised(x.div_(largest), 1 / 255, 0), largest


def _quantised(x: Tensor, step: float, zero: int) -> Tensor:
    with warnings.catch_warnings():
        # torch will drop quantized tensor types some time after 2.13, the release pyproject.toml pins.
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(x, step, zero, torch.quint8)
    # A uint8 view without a copy: `int_repr` takes several times as long as the rounding.
    storage = quantised.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, quantised.shape, quantised.stride())


def _norm_scale(norm: RMSNorm, x: Tensor) -> Tensor:
    """The factor of each row of x (M, D) in T5's layer norm, without the column weights, (M, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(length.square_().div_(x.shape[-1]).add_(norm.epsilon))


class _Layer:
    def __init__(self, block: Block) -> None:
        own, feed = block.self_attention, block.feed_forward
        attention, inside = own.SelfAttention, feed.DenseReluDense
        self.own_norm, self.feed_norm = own.layer_norm, feed.layer_norm
        heads = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
        self.heads = Product(heads * own.layer_norm.weight)
        self.out = Product(attention.o.weight)
        self.inner = Product(inside.wi.weight * feed.layer_norm.weight, relu=True)
        self.outer = Product(inside.wo.weight, positive_input=True)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x (M, D), (M, 3*H*K)."""
        bytes_, largest = digits(x)
        return self.heads(bytes_).mul_(largest.mul_(_norm_scale(self.own_norm, x)))

    def add_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x (M, D) plus the output projection of the attention's result (M, H*K)."""
        bytes_, largest = digits(mixed)
        return torch.addcmul(x, self.out(bytes_), largest)

    def add_feed_forward(self, x: Tensor) -> Tensor:
        """x (M, D) plus its feed-forward; relu(s*y) = s*relu(y) for s > 0, so all scales are applied last."""
        bytes_, largest = digits(x)
        inner, second = positive_digits(self.inner(bytes_))
        return x.addcmul_(self.outer(inner), largest.mul_(_norm_scale(self.feed_norm, x)).mul_(second))


class Int8Encoder:
    """A T5 encoder stack for CPU inference, with its own copy of the weights."""

    def __init__(self, stack: T5Stack) -> None:
        self.config = stack.config
        self.layers = [_Layer(block) for block in stack.blocks]
        self.final_norm = stack.final_layer_norm
        self._stack = stack
        self._biases: dict[int, Tensor] = {}

    def encode(self, x: Tensor, mask: Tensor | None = None, first: Tensor | None = None) -> Tensor:
        """States (B, T, D) float32 of x (B, T, D) float32.

        mask: (B, T) bool, True on real tokens; None without padding. first: the first layer's queries, keys and values
        (B, T, 3*H*K), if already computed.
        """
        B, T, D = x.shape
        if T not in self._biases:
            self._biases[T] = self._stack.position_bias(T).detach().float()
        bias = self._biases[T]
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
        x = x.reshape(B * T, D)
        for number, layer in enumerate(self.layers):
            heads = layer.project(x) if first is None or number else first
            q, k, v = heads.view(B, T, 3, self.config.num_heads, self.config.d_kv).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            x = layer.add_attention(x, mixed.transpose(1, 2).reshape(B * T, -1))
            x = layer.add_feed_forward(x)
        scale = _norm_scale(self.final_norm, x)
        return (x * scale).mul_(self.final_norm.weight).view(B, T, D)


class Int8MiniEncoder:
    """`MiniEncoder` for CPU inference."""

    def __init__(self, network: MiniEncoder) -> None:
        self.config = c = network.config
        self.topic_norm, self.centre, self.outward = network.topic_norm, network.centre, network.outward
        table = network.tokens.weight.detach().float()
        inward = network.inward(table) * c.lexical_dim**0.5
        block = network.contextual.blocks[0].self_attention
        attention = block.SelfAttention
        normed = block.layer_norm(inward)
        # Per token id, in float32: the input to the residual stream, and the first layer's projections of it.
        self.starts = inward.detach()
        self.heads = torch.cat([p(normed) for p in (attention.q, attention.k, attention.v)], -1).detach()
        # A zero row for padding, so that sums over positions need no mask.
        self.topics = F.pad(network.topics.weight.detach().float(), (0, 0, 0, 1))
        a, b = F.pad(table, (0, 0, 0, 1)).chunk(2, dim=-1)
        self.tokens = torch.complex(a.contiguous(), b.contiguous())
        # Rotating coordinate pairs is a complex product, and the unrotated term adds to its factor.
        rotation = network.rotation
        self.binding = c.word_weight + c.order_weight * torch.complex(rotation.cos, rotation.sin)
        self.stack = Int8Encoder(network.contextual)

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids (B, T) int64 and mask (B, T) bool, None without padding, to (B, 768) float32 of unit norm."""
        B, T = ids.shape
        padded = ids if mask is None else ids.masked_fill(~mask, len(self.topics) - 1)
        bound = torch.view_as_real((F.embedding(padded, self.tokens) * self.binding[:T]).sum(1))
        lexical = bound.transpose(1, 2).reshape(B, -1)
        hidden = self.stack.encode(F.embedding(ids, self.starts), mask, F.embedding(ids, self.heads))
        if mask is None:
            count = torch.full((B, 1), float(T))
            mean, peak = hidden.mean(1), hidden.amax(1)
        else:
            count = mask.sum(1, keepdim=True).float()
            mean = hidden.masked_fill(~mask[..., None], 0.0).sum(1) / count
            peak = hidden.masked_fill(~mask[..., None], float("-inf")).amax(1)
        bag = F.embedding_bag(padded, self.topics, mode="sum") / count.sqrt()
        topic = F.normalize(bag + self.outward(torch.cat((mean, peak), dim=-1)) - self.centre, dim=-1)
        return F.normalize(torch.cat((topic * self.topic_norm, lexical), dim=-1), dim=-1)
