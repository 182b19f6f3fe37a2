"""Texts to vectors, in three stages that can overlap: tokenise (pre), multiply (core), finish (post)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.mini import MiniEncoder
from lvm.codec.runner import Precision, StackRunner
from lvm.codec.t5 import T5Stack
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.errors import InputError

BATCH_TOKENS = 8192
"""Tokens a batch, padding included: on two cores larger batches gain nothing and leave the cache."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of N texts, in the order of the texts."""

    vectors: npt.NDArray[np.float32]
    """(N, 768), unit norm."""
    norms: npt.NDArray[np.float32]
    """(N,) norm of what the network gave before it was scaled to 1."""
    num_tokens: npt.NDArray[np.int32]
    """(N,) tokens of the whole text, end of sequence included, before any cut."""
    truncated: npt.NDArray[np.bool_]
    """(N,) True where the text was longer than the codec's limit and was cut."""


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it fast, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        capability = torch.cpu.get_capabilities()
        return (
            torch.bfloat16 if capability.get("avx512_bf16") or capability.get("amx_bf16") else torch.float32
        )
    return torch.float32


@dataclass(frozen=True)
class GtrSizes:
    """What callers ask of an encoder's configuration."""

    dim: int
    """Length of a vector, D."""


class GtrEncoder(nn.Module):
    """GTR's T5 encoder with mean pooling, and Dense and L2 normalisation where the contract has them.

    Without both it is what vec2text calls `gtr_base`, with both sentence-transformers' own model (`lvm.codec.gtr`).
    """

    def __init__(
        self, table: Tensor, stack: T5Stack, dense: tuple[Tensor, Tensor | None] | None, normalised: bool
    ) -> None:
        """table: (V, L) token embeddings; dense: weight (D, L) and bias (D,) of the layer after the pooling."""
        super().__init__()
        self.table: Tensor
        self.weight: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("table", table)
        self.register_buffer("weight", None if dense is None else dense[0])
        self.register_buffer("bias", None if dense is None else dense[1])
        self.stack = stack
        self.runner: StackRunner | None = None
        self.normalised = normalised
        self.config = GtrSizes(table.shape[1] if dense is None else dense[0].shape[0])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, T) int64 and mask (B, T) bool to (B, D) float32."""
        embedded = F.embedding(ids, self.table)
        run = self.stack if self.runner is None else self.runner.encode
        states = run(embedded, mask).float()
        pooled = states.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)
        if self.weight is not None:
            pooled = F.linear(pooled, self.weight, self.bias)
        return F.normalize(pooled, dim=-1) if self.normalised else pooled

    def prepared(self, precision: Precision) -> "GtrEncoder":
        """The same encoder for the decode loop, its products in another precision; itself for float32."""
        if precision == "float32":
            return self
        dense = None if self.weight is None else (self.weight, self.bias)
        other = GtrEncoder(self.table, self.stack, dense, self.normalised)
        other.runner = StackRunner(self.stack, precision)
        return other


class TextEncoder:
    """A codec's encoder with its tokenizer, on one device."""

    def __init__(
        self,
        network: MiniEncoder | GtrEncoder,
        tokenizer: ChunkTokenizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: of the matrix products; None for the fastest the device has."""
        self.network = network.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype or best_dtype(device)

    def pre(
        self, texts: Sequence[str]
    ) -> tuple[list[list[int]], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids of each text (cut to the limit), whole lengths (N,), and whether each was cut (N,)."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is a {type(text).__name__}, expected str; give texts alone")
        ids, lengths = self.tokenizer.encode(texts)
        counts = np.asarray(lengths, np.int32)
        return ids, counts, counts > self.tokenizer.max_tokens

    def batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor]]:
        """Row numbers, padded ids (B, T) and mask (B, T), longest texts first, under the token budget."""
        lengths = np.fromiter((len(r) for r in ids), np.int64, len(ids))
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            T = int(lengths[order[start]])
            rows = order[start : start + max(1, BATCH_TOKENS // T)]
            padded = np.full((len(rows), T), self.tokenizer.pad_id, np.int64)
            for i, row in enumerate(rows):
                padded[i, : lengths[row]] = ids[row]
            mask = np.arange(T)[None] < lengths[rows][:, None]
            yield rows, torch.from_numpy(padded).to(self.device), torch.from_numpy(mask).to(self.device)
            start += len(rows)

    @torch.inference_mode()
    def core(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Padded ids (B, T) and mask (B, T) to (B, D) float32; the heavy part."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            vectors: Tensor = self.network(ids, mask)
        return vectors

    def post(
        self, vectors: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Unit vectors and their norms before. Raises InputError on a value that is no number."""
        norms = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if bad.size:
            raise InputError(
                f"the encoder gave no finite vector for text {bad[0]} ({bad.size} such); check the weights"
            )
        return vectors / norms[:, None], norms.astype(np.float32)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Vectors of texts in their order; batching by length changes nothing but the speed."""
        ids, lengths, cut = self.pre(texts)
        vectors = np.empty((len(texts), self.network.config.dim), np.float32)
        for rows, padded, mask in self.batches(ids):
            vectors[rows] = self.core(padded, mask).float().cpu().numpy()
        units, norms = self.post(vectors)
        return Encoded(units, norms, lengths, cut)
