"""Texts to vectors in three stages that can overlap: tokenise (pre), forward pass (core), normalise (post)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.inference import Int8MiniEncoder
from lvm.codec.mini import MiniConfig
from lvm.codec.runner import Precision, StackRunner, best_precision
from lvm.codec.t5 import T5Stack
from lvm.codec.tokenizer import ChunkTokenizer, require_texts
from lvm.errors import InputError

BATCH_TOKENS = {"cpu": 2048}
"""Maximum tokens per batch, padding included, by device type: larger batches do not fit a CPU's cache
(tests/bench/results/LOG.md)."""

DEFAULT_BATCH_TOKENS = 32_768
"""The same for all other devices: enough rows to keep them busy."""

MAX_PADDING = 128
"""Maximum padding tokens per batch: they cost about as much as one more batch. Texts are sorted by length, so most
batches have none."""

MIN_COSINE = 0.9995
"""A lower precision is used only if its vectors of all GATE_TEXTS have at least this cosine to those in float32."""

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
"""Texts on which a lower precision is checked when a codec loads: short, long, plain, unusual."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of N texts, in their order."""

    vectors: npt.NDArray[np.float32]
    """(N, D), unit norm."""
    norms: npt.NDArray[np.float32]
    """(N,) norm of the network's output before normalisation."""
    num_tokens: npt.NDArray[np.int32]
    """(N,) tokens of the whole text before truncation, end of sequence included."""
    truncated: npt.NDArray[np.bool_]
    """(N,) True where the text exceeded the codec's limit and was truncated."""


@dataclass(frozen=True)
class Sizes:
    """The part of an encoder's configuration that callers need."""

    dim: int
    """Length of a vector, D."""


class GtrEncoder(nn.Module):
    """GTR's T5 encoder with mean pooling, and optionally a Dense layer and L2 normalisation.

    Without both it is vec2text's `gtr_base`, with both the model of sentence-transformers (`lvm.codec.gtr`).
    """

    def __init__(
        self, table: Tensor, stack: T5Stack, dense: tuple[Tensor, Tensor | None] | None, normalised: bool
    ) -> None:
        """table: (V, L) token embeddings; dense: weight (D, L) and bias (D,) of the layer after pooling, if any."""
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
        self.config = Sizes(table.shape[1] if dense is None else dense[0].shape[0])

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids (B, T) int64 and mask (B, T) bool, None without padding, to (B, D) float32."""
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
        """This encoder with matrix products in `precision`; the encoder itself for float32."""
        if precision == "float32":
            return self
        dense = None if self.weight is None else (self.weight, self.bias)
        other = GtrEncoder(self.table, self.stack, dense, self.normalised)
        other.runner = StackRunner(self.stack, precision)
        return other


class Network(Protocol):
    """An encoder: token ids (B, T) int64 and mask (B, T) bool, None without padding, to (B, D)."""

    @property
    def config(self) -> "Sizes | MiniConfig": ...
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
        """precision: of the matrix products; "auto" for the device's fastest, if it keeps MIN_COSINE, else float32."""
        self.network: Any = network.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.batch_tokens = BATCH_TOKENS.get(device.type, DEFAULT_BATCH_TOKENS)
        self.use("float32" if precision == "auto" else precision)
        if precision == "auto" and best_precision(device) != "float32":
            self.use_if_close(best_precision(device))

    def use(self, precision: Precision) -> None:
        """Set the precision of matrix products."""
        self.precision = precision
        self._forward: Callable[[Tensor, Tensor | None], Tensor] = self.network
        with torch.inference_mode():
            if isinstance(self.network, GtrEncoder):
                self._forward = self.network.prepared(precision)
            elif precision == "int8":
                self._forward = Int8MiniEncoder(self.network)

    def use_if_close(self, precision: Precision) -> None:
        """Set this precision, or float32 if its vector of any of GATE_TEXTS falls below MIN_COSINE."""
        self.use("float32")
        exact = self.encode(GATE_TEXTS).vectors
        self.use(precision)
        if not ((self.encode(GATE_TEXTS).vectors * exact).sum(1) >= MIN_COSINE).all():
            self.use("float32")

    def pre(self, texts: Sequence[str]) -> tuple[list[list[int]], npt.NDArray[np.int32]]:
        """Token ids of each text, truncated to the limit, and the lengths before truncation (N,)."""
        ids, lengths = self.tokenizer.encode(require_texts(texts))
        return ids, np.asarray(lengths, np.int32)

    def batches(
        self, ids: Sequence[Sequence[int]], batch_size: int | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, Tensor | None]]:
        """Yields row numbers (B,), padded ids (B, T) and mask (B, T), None without padding; longest texts first.

        batch_size: maximum texts per batch; None to limit only its tokens.
        """
        max_rows = len(ids) if batch_size is None else batch_size
        lengths = np.fromiter((len(r) for r in ids), np.int64, len(ids))
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            T = int(lengths[order[start]])
            rows = order[start : start + max(1, min(max_rows, self.batch_tokens // T))]
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
        """The forward pass: padded ids (B, T) and mask (B, T), None without padding, to (B, D) float32."""
        # A prepared encoder applies its precision itself.
        autocast = self.precision == "bfloat16" and self._forward is self.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            vectors: Tensor = self._forward(ids, mask)
        return vectors

    def post(
        self, vectors: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(N, D) vectors scaled to unit norm, and their norms (N,). Raises InputError on NaN, infinity or zero."""
        norms = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if bad.size:
            raise InputError(
                f"the encoder returned a zero or non-finite vector for text {bad[0]} ({bad.size} in all); "
                "check the weights"
            )
        return vectors / norms[:, None], norms.astype(np.float32)

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int | None = None,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> Encoded:
        """Vectors of texts, in their order.

        batch_size: maximum texts per batch, None to suit the device. advance: called after each batch with its number
        of texts.
        """
        ids, lengths = self.pre(texts)
        vectors = np.empty((len(texts), self.network.config.dim), np.float32)
        for rows, padded, mask in self.batches(ids, batch_size):
            vectors[rows] = self.core(padded, mask).float().cpu().numpy()
            advance(len(rows))
        units, norms = self.post(vectors)
        return Encoded(units, norms, lengths, lengths > self.tokenizer.max_tokens)
