"""Texts to vectors, in three stages that can overlap: tokenise (pre), multiply (core), finish (post)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.inference import Int8MiniEncoder
from lvm.codec.runner import Precision, StackRunner, best_precision
from lvm.codec.t5 import T5Stack
from lvm.codec.tokenizer import ChunkTokenizer, require_texts
from lvm.errors import InputError

BATCH_TOKENS = {"cpu": 2048}
"""Tokens a batch, padding included, by device type: on a CPU more leave the cache (tests/bench/results/LOG.md)."""

MORE_BATCH_TOKENS = 32_768
"""Tokens a batch on any other device: enough rows to fill it."""

MAX_PADDING = 128
"""Padding a batch may hold: about what one batch more costs. Texts come sorted by length, so most hold none."""

MIN_COSINE = 0.9995
"""Least cosine to float32 that a lower precision must keep on every one of GATE_TEXTS to be taken."""

GATE_TEXTS = (
    "Yes.",
    "The river rises in the hills north of the town.",
    "In 1871 the company opened a second factory, where it made engines for ships and for railways.",
    "Most of the species live in warm, shallow water, and feed on plankton during the night.",
    "x^2 + 3y = 0 (mod 7), ISBN 978-3-16-148410-0; see §4.2!",
    "Its sugar and coffee were produced by half a million slaves, most of them born in Africa,",
    "Lech Wałęsa, né à Popowo, čtyřicet, 東京, Αθήνα",
    "She studied law in Vienna, but gave it up after two years and turned to painting.",
)
"""Short and long, plain and odd texts that a lower precision is judged on when a codec loads."""


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

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids (B, T) int64 and mask (B, T) bool, None when all places are real, to (B, D) float32."""
        embedded = F.embedding(ids, self.table)
        run = self.stack if self.runner is None else self.runner.encode
        states = run(embedded, mask).float()
        if mask is None:
            pooled = states.mean(1)
        else:
            pooled = states.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)
        if self.weight is not None:
            pooled = F.linear(pooled, self.weight, self.bias)
        return F.normalize(pooled, dim=-1) if self.normalised else pooled

    def prepared(self, precision: Precision) -> "GtrEncoder":
        """The same encoder with its products in another precision; itself for float32."""
        if precision == "float32":
            return self
        dense = None if self.weight is None else (self.weight, self.bias)
        other = GtrEncoder(self.table, self.stack, dense, self.normalised)
        other.runner = StackRunner(self.stack, precision)
        return other


class Sizes(Protocol):
    """What is asked of an encoder's configuration."""

    @property
    def dim(self) -> int: ...


class Network(Protocol):
    """An encoder: token ids (B, T) and mask (B, T), None when all places are real, to (B, D)."""

    @property
    def config(self) -> Sizes: ...
    def to(self, device: torch.device) -> Any: ...
    def __call__(self, ids: Tensor, mask: Tensor | None) -> Any: ...


class TextEncoder:
    """A codec's encoder with its tokenizer, on one device."""

    def __init__(
        self,
        network: Network,
        tokenizer: ChunkTokenizer,
        device: torch.device,
        precision: Precision | Literal["auto"] = "auto",
    ) -> None:
        """precision: of the matrix products; "auto" for the fastest the device has, where it keeps MIN_COSINE."""
        self.network: Any = network.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.batch_tokens = BATCH_TOKENS.get(device.type, MORE_BATCH_TOKENS)
        self.use("float32")
        if precision == "auto":
            self.use_fastest()
        else:
            self.use(precision)

    def use(self, precision: Precision) -> None:
        """Multiply in this precision from now on."""
        self.precision = precision
        self._forward: Callable[[Tensor, Tensor | None], Tensor] = self.network
        with torch.inference_mode():
            if isinstance(self.network, GtrEncoder):
                self._forward = self.network.prepared(precision)
            elif precision == "int8":
                self._forward = Int8MiniEncoder(self.network)

    def use_fastest(self) -> None:
        """The device's best precision, or float32 where a text's vector would turn too far from float32's.

        Which weights bear int8 cannot be told from their sizes, so it is measured.
        """
        self.use("float32")
        best = best_precision(self.device)
        if best == "float32":
            return
        exact = self.encode(GATE_TEXTS).vectors
        self.use(best)
        if not (np.einsum("nd,nd->n", self.encode(GATE_TEXTS).vectors, exact) >= MIN_COSINE).all():
            self.use("float32")

    def pre(
        self, texts: Sequence[str]
    ) -> tuple[list[list[int]], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids of each text (cut to the limit), whole lengths (N,), and whether each was cut (N,)."""
        ids, lengths = self.tokenizer.encode(require_texts(texts))
        counts = np.asarray(lengths, np.int32)
        return ids, counts, counts > self.tokenizer.max_tokens

    def batches(
        self, ids: Sequence[Sequence[int]], batch_size: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor | None]]:
        """Row numbers, padded ids (B, T) and mask (B, T), longest texts first, under the token budget.

        batch_size: most texts of a batch; None for the token budget alone. The mask is None for a batch without
        padding, which most are.
        """
        most = len(ids) if batch_size is None else batch_size
        lengths = np.fromiter((len(r) for r in ids), np.int64, len(ids))
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            T = int(lengths[order[start]])
            rows = order[start : start + max(1, min(most, self.batch_tokens // T))]
            padding = np.cumsum(T - lengths[rows])
            rows = rows[: int(np.searchsorted(padding, MAX_PADDING, side="right"))]
            padded = np.full((len(rows), T), self.tokenizer.pad_id, np.int64)
            for i, row in enumerate(rows):
                padded[i, : lengths[row]] = ids[row]
            mask = None
            if padding[len(rows) - 1]:
                mask = torch.from_numpy(np.arange(T)[None] < lengths[rows][:, None]).to(self.device)
            yield rows, torch.from_numpy(padded).to(self.device), mask
            start += len(rows)

    @torch.inference_mode()
    def core(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Padded ids (B, T) and mask (B, T), None when all places are real, to (B, D) float32; the heavy part."""
        # A prepared encoder holds its precision itself.
        automatic = self.precision == "bfloat16" and self._forward is self.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=automatic):
            vectors: Tensor = self._forward(ids, mask)
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

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int | None = None,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> Encoded:
        """Vectors of texts in their order; batching by length changes nothing but the speed.

        batch_size: most texts multiplied at once, None for as many as suit the device. advance: called with the number
        of texts of each batch when it is done.
        """
        ids, lengths, cut = self.pre(texts)
        vectors = np.empty((len(texts), self.network.config.dim), np.float32)
        for rows, padded, mask in self.batches(ids, batch_size):
            vectors[rows] = self.core(padded, mask).float().cpu().numpy()
            advance(len(rows))
        units, norms = self.post(vectors)
        return Encoded(units, norms, lengths, cut)
