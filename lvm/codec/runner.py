"""T5 stacks for inference: fused weights in a chosen precision, caches in fixed buffers.

Precisions of matrix products, all with float32 results and a float32 residual stream:

- "float32": as trained; only then are our token ids equal to vec2text's.
- "bfloat16": weights and inputs in bfloat16.
- "int8": weights quantised symmetrically per output channel, inputs per row, exact int32 sums. As the scale is per row,
  a row's product does not depend on its batch.

Letters: B rows, T positions, S memory positions, P positions of a cache, D model width, H heads, K width of a head, V
vocabulary.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.inference import Int8Encoder
from lvm.codec.t5 import RMSNorm, T5Stack
from lvm.errors import InputError

Precision = Literal["float32", "bfloat16", "int8"]
"""Precision of weights and of the inputs of matrix products."""

INT8_ROWS = 256
"""Maximum rows per int8 product. With 1,024, FBGEMM reached 300 GOP/s on two cores instead of 500 to 600."""

ARGMAX_BLOCK = 128
"""Block size in `first_largest`; T5's and mini's vocabulary sizes are multiples of it."""

LONG_MEMORY = 48
"""Memory positions from which bfloat16 keys and values are faster than float32 in one-row products: memory bandwidth
limits them there, call overhead below (tests/bench/results/LOG.md)."""

FEW_KEYS = 8
"""Below this many keys, attention is computed by elementwise products: batched ones would take twice as long."""


def best_precision(device: torch.device) -> Precision:
    """The fastest precision for which the device has instructions."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type == "cpu":
        capability = torch.cpu.get_capabilities()
        if capability.get("avx512_vnni") or capability.get("amx_int8"):
            return "int8"
        return "bfloat16" if capability.get("avx512_bf16") else "float32"
    return "float32"


def require_precision(name: str) -> Precision:
    """`name` as a Precision. Raises InputError on an unknown one."""
    known: tuple[Precision, ...] = get_args(Precision)
    for precision in known:
        if name == precision:
            return precision
    raise InputError(f"unknown precision {name!r}; expected one of {', '.join(known)}")


class Matrix:
    """x @ weight.T for one fixed weight, (…, D) float32 to (…, out) float32."""

    def __init__(self, weight: Tensor, precision: Precision) -> None:
        weight = weight.detach()
        self.precision = precision
        if precision == "int8":
            self.packed = _pack(weight.float())
        else:
            self.weight = weight.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        if self.precision == "float32":
            return F.linear(x, self.weight)
        if self.precision == "bfloat16":
            return F.linear(x.bfloat16(), self.weight).float()
        return _by_rows(self._product, x)

    def largest(self, x: Tensor) -> Tensor:
        """argmax over the outputs, (B, D) to (B,) int64."""
        if self.precision != "int8":
            return first_largest(self(x))
        # A row's scale is positive, so it does not change the argmax.
        return torch.cat([first_largest(self.unscaled(part)[0]) for part in x.split(INT8_ROWS)])

    def unscaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product (M, out) of x (M, D) before scaling by row, and the scales (M, 1), which are 1 unless in int8."""
        if self.precision != "int8":
            return self(x), x.new_ones(len(x), 1)
        # Two passes, but vector_norm(inf) and aminmax over the last axis take ten times as long on a CPU.
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        # Rows scaled to -1..1 share one step and zero point.
        return self._int8(x / largest, 1 / 127, 128), largest

    def of_shares(self, x: Tensor) -> Tensor:
        """The product of rows (M, D) in 0..1 with maximum 1: in int8 all 255 steps are used, and no row scale."""
        return self._int8(x, 1 / 255, 0) if self.precision == "int8" else self(x)

    def _int8(self, x: Tensor, step: float, zero: int) -> Tensor:
        """The product of x quantised with this step and zero point."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        out: Tensor = product(x, step, zero, self.packed)
        return out

    def _product(self, x: Tensor) -> Tensor:
        out, scale = self.unscaled(x)
        return out.mul_(scale)


def first_largest(values: Tensor) -> Tensor:
    """argmax over the last axis, (B, V) to (B,) int64; the first on ties.

    torch's argmax is not vectorised on a CPU. If V is a multiple of ARGMAX_BLOCK, the maximum of each block and then
    the index in the best block take a ninth of the time (64 rows of 32,128).
    """
    B, V = values.shape
    if V % ARGMAX_BLOCK or values.device.type != "cpu":
        return values.argmax(-1)
    blocks = values.view(B, -1, ARGMAX_BLOCK)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(B), block].argmax(-1)
    return block * ARGMAX_BLOCK + inside


def _pack(weight: Tensor) -> Any:
    """A weight (out, D) packed for FBGEMM, in int8 with a symmetric range per output."""
    # 127, not 128, makes the range symmetric: no zero point needs correction.
    scale = weight.abs().amax(1).clamp_min(1e-30) / 127
    rounded = torch.round(weight / scale[:, None]).to(torch.int8)
    zero = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        # torch will drop quantized tensor types some time after 2.13, the release pyproject.toml pins.
        warnings.simplefilter("ignore")
        quantized = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function of x (…, D), INT8_ROWS rows at a time."""
    if x.dim() == 2 and len(x) <= INT8_ROWS:  # as in a decoder step, where call overhead dominates
        return function(x)
    rows = x.reshape(-1, x.shape[-1])
    parts = [function(part) for part in rows.split(INT8_ROWS)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(*x.shape[:-1], out.shape[-1])


class _Layer:
    """The weights of a block; those with the same input are fused into one product."""

    def __init__(self, stack: T5Stack, number: int, precision: Precision) -> None:
        block = stack.blocks[number]
        own, feed = block.self_attention, block.feed_forward
        attention = own.SelfAttention
        self.own_norm = own.layer_norm
        self.qkv = Matrix(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]), precision)
        self.own_out = Matrix(attention.o.weight, precision)
        if stack.config.is_decoder:
            cross = block.cross_attention.EncDecAttention
            self.cross_norm = block.cross_attention.layer_norm
            self.cross_q = Matrix(cross.q.weight, precision)
            self.cross_kv = Matrix(torch.cat([cross.k.weight, cross.v.weight]), precision)
            self.cross_out = Matrix(cross.o.weight, precision)
        self.feed_norm = feed.layer_norm
        self.inner = Matrix(feed.DenseReluDense.wi.weight, precision)
        self.outer = Matrix(feed.DenseReluDense.wo.weight, precision)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, D)."""
        if self.inner.precision == "int8":
            return _by_rows(self._feed_forward_int8, x)
        return self.outer(self.inner(_norm(self.feed_norm, x)).relu_())

    def _feed_forward_int8(self, x: Tensor) -> Tensor:
        # relu(s * y) = s * relu(y) for s > 0, so the scales of both products are applied at the end.
        inner, first = self.inner.unscaled(_norm(self.feed_norm, x))
        out, second = self.outer.unscaled(inner.relu_())
        return out.mul_(first.mul_(second))


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight.float(), norm.epsilon)


@dataclass
class Cache:
    """Self-attention and cross-attention keys and values of B rows being decoded."""

    own: Tensor
    """(layers, 2, B, H, P, K) float32: keys and values of the positions decoded so far."""
    memory: list[tuple[Tensor, Tensor]]
    """Per layer, keys and values (B, H, S, K) of the memory, bfloat16 if it is long."""
    memory_bias: Tensor | None
    """(B, 1, S) float32, -inf where the memory is padding; None without padding."""
    place: int = 0
    """Number of positions decoded so far."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (B',) int64, in this order; a row may be repeated."""
        t = self.place
        kept = self.own.new_empty((*self.own.shape[:2], len(rows), *self.own.shape[3:]))
        kept[:, :, :, :, :t] = self.own[:, :, rows, :, :t]
        self.own = kept
        self.memory = [(k[rows], v[rows]) for k, v in self.memory]
        if self.memory_bias is not None:
            self.memory_bias = self.memory_bias[rows]

    def keep_own(self, rows: Tensor) -> None:
        """As `keep`, for as many rows, each with the same memory as the one it replaces (a vector's beams)."""
        t = self.place
        self.own[:, :, :, :, :t] = self.own[:, :, rows, :, :t]


class StackRunner:
    """A T5 stack for inference, with its own copy of the weights."""

    def __init__(self, stack: T5Stack, precision: Precision) -> None:
        self.config = stack.config
        self.precision = precision
        # oneDNN's int8 products are twice as fast as FBGEMM's for an encoder's many rows, slower for a decoder's few.
        use_onednn = precision == "int8" and not stack.config.is_decoder
        self._int8_encoder = Int8Encoder(stack) if use_onednn else None
        numbers = range(0 if use_onednn else stack.config.num_layers)
        self.layers = [_Layer(stack, i, precision) for i in numbers]
        self.final_norm = stack.final_layer_norm
        self._stack = stack
        self._biases: dict[int, Tensor] = {}

    def _bias(self, T: int) -> Tensor:
        """The position bias (1, H, T, T) float32, cached."""
        if T not in self._biases:
            self._biases[T] = self._stack.position_bias(T).detach().float()
        return self._biases[T]

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encoder states (B, T, D) float32 of x (B, T, D) float32; mask (B, T) bool is True on real tokens."""
        if self._int8_encoder is not None:
            return self._int8_encoder.encode(x, mask)
        c = self.config
        B, T, _ = x.shape
        bias = self._bias(T)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        bias = bias.to(dtype)
        for layer in self.layers:
            qkv = layer.qkv(_norm(layer.own_norm, x)).to(dtype)
            q, k, v = qkv.view(B, T, 3, c.num_heads, c.d_kv).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            x = x + layer.own_out(out.transpose(1, 2).reshape(B, T, -1).float())
            x += layer.feed_forward(x)
        return _norm(self.final_norm, x)

    def begin(self, memory: Tensor, mask: Tensor | None, max_places: int) -> Cache:
        """A cache for decoding with a memory (B, S, D) float32; mask (B, S) bool is True on real positions."""
        c = self.config
        B, S, _ = memory.shape
        dtype = torch.bfloat16 if self.precision != "float32" and S >= LONG_MEMORY else torch.float32
        pairs = []
        for layer in self.layers:
            kv = layer.cross_kv(memory).view(B, S, 2, c.num_heads, c.d_kv)
            keys, values = kv.permute(2, 0, 3, 1, 4)
            pairs.append((keys.to(dtype).contiguous(), values.to(dtype).contiguous()))
        bias = None
        if mask is not None and not bool(mask.all()):
            bias = torch.zeros(B, 1, S, device=memory.device).masked_fill_(~mask[:, None], float("-inf"))
        own = memory.new_empty(c.num_layers, 2, B, c.num_heads, max_places, c.d_kv)
        return Cache(own, pairs, bias)

    def step(self, cache: Cache, x: Tensor) -> Tensor:
        """Decoder state at the next position, (B, D) float32, from its input x (B, D) there."""
        c = self.config
        B, t = x.shape[0], cache.place
        bias = self._bias(cache.own.shape[4])[:, :, t, : t + 1]  # (1, H, t + 1)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(_norm(layer.own_norm, x)).view(B, 3, c.num_heads, c.d_kv)
            keys, values = cache.own[i, 0], cache.own[i, 1]
            keys[:, :, t], values[:, :, t] = qkv[:, 1], qkv[:, 2]
            out = _attend(qkv[:, 0], keys[:, :, : t + 1], values[:, :, : t + 1], bias)
            x = x + layer.own_out(out)
            q = layer.cross_q(_norm(layer.cross_norm, x)).view(B, c.num_heads, c.d_kv)
            x += layer.cross_out(_attend(q, *cache.memory[i], cache.memory_bias))
            x += layer.feed_forward(x)
        cache.place += 1
        return _norm(self.final_norm, x)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query per row: q (B, H, K) over k and v (B, H, S, K), to (B, H*K) float32; bias (1 or B, 1 or H,
    S). For single queries, fused attention kernels take 1.5 to 8 times as long.
    """
    if k.shape[2] < FEW_KEYS and k.dtype == torch.float32:
        few = (q[:, :, None] * k).sum(-1)  # (B, H, S)
        if bias is not None:
            few += bias
        return (few.softmax(-1)[..., None] * v).sum(2).flatten(1)
    scores = torch.matmul(q[:, :, None].to(k.dtype), k.transpose(2, 3)).float()  # (B, H, 1, S)
    if bias is not None:
        scores += bias[:, :, None]
    out = torch.matmul(scores.softmax(-1).to(v.dtype), v)
    return out.flatten(1).float()
