"""The decode loop: vectors to token ids, greedily, with caches in fixed buffers.

Self-attention keys and values live in buffers of the codec's `max_tokens`; those of the cross-attention are
computed once per call; only the last position goes through the output table; finished rows leave the batch.

Letters: B rows still running, H heads, K width of a head, T places so far, L width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.mini import MiniHypothesizer
from lvm.codec.t5 import T5Stack


class StackCache:
    """A decoder stack run one position at a time over a fixed memory."""

    def __init__(self, stack: T5Stack, memory: Tensor, max_places: int) -> None:
        c = stack.config
        B = memory.shape[0]
        self.stack = stack
        self.place = 0
        self.bias = stack.position_bias(max_places)  # (1, H, T, T)
        shape = (c.num_layers, B, c.num_heads, max_places, c.d_kv)
        self.keys = memory.new_empty(shape)
        self.values = memory.new_empty(shape)
        self.memory_keys: list[Tensor] = []
        self.memory_values: list[Tensor] = []
        for block in stack.blocks:
            cross = block.attends_memory.EncDecAttention
            self.memory_keys.append(cross.split(cross.k(memory)))
            self.memory_values.append(cross.split(cross.v(memory)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone; `rows` is (B,) int64, increasing."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self.memory_keys = [k[rows] for k in self.memory_keys]
        self.memory_values = [v[rows] for v in self.memory_values]

    def step(self, x: Tensor) -> Tensor:
        """The stack's output at the next place, (B, L), from its input there, (B, L)."""
        t = self.place
        bias = self.bias[:, :, t : t + 1, : t + 1].to(x.dtype)
        x = x[:, None]
        for i, block in enumerate(self.stack.blocks):
            first, second, last = block.attends_itself, block.attends_memory, block.feeds_forward
            attention = first.SelfAttention
            normed = first.layer_norm(x)
            self.keys[i, :, :, t] = attention.split(attention.k(normed))[:, :, 0]
            self.values[i, :, :, t] = attention.split(attention.v(normed))[:, :, 0]
            out = F.scaled_dot_product_attention(
                attention.split(attention.q(normed)),
                self.keys[i, :, :, : t + 1],
                self.values[i, :, :, : t + 1],
                attn_mask=bias,
                scale=1.0,
            )
            x = x + attention.o(out.transpose(1, 2).flatten(-2))
            cross = second.EncDecAttention
            out = F.scaled_dot_product_attention(
                cross.split(cross.q(second.layer_norm(x))),
                self.memory_keys[i],
                self.memory_values[i],
                scale=1.0,
            )
            x = x + cross.o(out.transpose(1, 2).flatten(-2))
            x = x + last.DenseReluDense(last.layer_norm(x))
        self.place += 1
        last_state: Tensor = self.stack.final_layer_norm(x)[:, 0]
        return last_state


@torch.inference_mode()
def hypothesize(
    table: Tensor, hypothesizer: MiniHypothesizer, vectors: Tensor, end_id: int
) -> list[list[int]]:
    """Greedy token ids of each vector, end token included where the text ended by itself.

    table: (V, L), the encoder's token embeddings, in the dtype to multiply in (the hypothesizer's own).
    vectors: (B, D) float32 of unit norm. At most the codec's `max_tokens` ids a row.
    """
    config = hypothesizer.config
    dtype = table.dtype
    num_rows = vectors.shape[0]
    written = torch.full((num_rows, config.max_tokens), end_id, dtype=torch.int64, device=vectors.device)
    if num_rows == 0:
        return []
    lexical = hypothesizer.unscale(vectors)[:, None]  # (B, 1, L) float32
    residual = lexical.clone()
    cache = StackCache(hypothesizer.decoder, hypothesizer.remember(vectors.to(dtype)), config.max_tokens)
    running = torch.arange(num_rows, device=vectors.device)
    previous = table.new_zeros(num_rows, config.lexical_dim)
    for t in range(config.max_tokens):
        priors, glimpse = hypothesizer.priors(lexical, residual, first=t)
        x = hypothesizer.hidden(previous, glimpse[:, 0].to(dtype))
        state = cache.step(x)
        directions = hypothesizer.head(state, priors[:, 0])
        logits = F.linear(directions.to(dtype), table).float() + hypothesizer.bias
        chosen = logits.argmax(-1)
        written[running, t] = chosen
        going = chosen != end_id
        if not going.all():
            rows = going.nonzero()[:, 0]
            if rows.numel() == 0:
                break
            running, chosen = running[rows], chosen[rows]
            lexical, residual = lexical[rows], residual[rows]
            cache.keep(rows)
        previous = table[chosen]
        e = previous.float()[:, None]
        explained = config.word_weight * e + config.order_weight * hypothesizer.rotation(e, t)
        residual = residual - explained
    ends = (written == end_id).int()
    stop = torch.where(ends.any(1), ends.argmax(1) + 1, config.max_tokens)
    return [row[:n] for row, n in zip(written.tolist(), stop.tolist(), strict=True)]
