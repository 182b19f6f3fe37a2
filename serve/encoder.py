"""The encoder deployment: texts to unit vectors, batched across callers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from serve.metrics import replica_metrics
from serve.rows import Outcome, RowQueue
from serve.settings import ServeArgs, load_served


@dataclass(frozen=True)
class EncodedText:
    """One text's vector."""

    vector: NDArray[np.float32]
    """(D,), norm 1."""
    norm: float
    num_tokens: int
    truncated: bool
    cached: bool = False
    """Whether it came from the cache."""


@serve.deployment
class Encoder:
    """A codec's encoder."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        torch.set_num_threads(args.encoder.num_threads)
        self._codec = load_served(args, args.encoder)
        self._codec.encode_chunks(["warm up"])
        self._queue: RowQueue[str, EncodedText] = RowQueue(
            self._work, args.queue_rows * 5, measure=replica_metrics().measure
        )

    def _work(self, texts: list[str]) -> Sequence[EncodedText]:
        encoded = self._codec.encode_chunks(texts)
        columns = encoded.vectors, encoded.norms, encoded.num_tokens, encoded.truncated
        return [
            EncodedText(v, float(n), int(count), bool(cut)) for v, n, count, cut in zip(*columns, strict=True)
        ]

    async def run(self, texts: list[str], remaining_s: list[float]) -> list[Outcome[EncodedText]]:
        """One outcome per text."""
        return await self._queue.submit(texts, remaining_s)

    async def describe(self) -> dict[str, Any]:
        """The codec's identity."""
        return self._codec.identity.to_dict()
