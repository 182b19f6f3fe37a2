"""The decoder deployment: vectors to text by the ladder, behind a queue that keeps its batch full.

The engine goes by rounds: one step for every row, whatever its rung. A row that arrives during a round joins the next.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from lvm.codec.ladder import Answer, DecodeCache
from lvm.codec.stream import LadderStream
from serve.metrics import replica_metrics
from serve.rows import Outcome, StreamQueue
from serve.settings import ServeArgs, codec_of_run


@dataclass(frozen=True)
class VectorRow:
    """One vector to read."""

    vector: NDArray[np.float32]
    """(D,), norm 1."""
    source: str | None = None
    """Text whose keywords a good text shares."""
    steps: int | None = None
    """Exactly this many corrector steps; None climbs the ladder."""
    cache: bool = True
    coming: int = 0
    """Other requests of the same gateway on their way to the decoder when this one was sent."""


class _Rows:
    """The ladder's stream as the queue wants it."""

    def __init__(self, stream: LadderStream) -> None:
        self._stream = stream
        self.drop, self.run = stream.drop, stream.run

    def add(self, row: VectorRow) -> int:
        return self._stream.add(row.vector, row.source, row.steps, row.cache)


@serve.deployment
class Decoder:
    """A codec's decoder. The extractive rung is the gateway's: it holds the neighbours already."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        torch.set_num_threads(args.decoder.num_threads)
        self._codec = codec_of_run(args)
        self._stream = LadderStream(self._codec, cache=DecodeCache(args.cache_entries))
        self._codec.decode(self._codec.encode(["warm up"]).vectors, self._stream.ladder.steps[0])
        self._queue: StreamQueue[VectorRow, Answer] = StreamQueue(
            _Rows(self._stream), 2 * args.queue_rows, measure=replica_metrics().measure
        )

    async def run(self, rows: list[VectorRow], remaining_s: list[float]) -> list[Outcome[Answer]]:
        """One outcome a vector. An answer whose last reason names its own rung was refused there."""
        return await self._queue.submit(rows, remaining_s, rows[-1].coming if rows else 0)

    async def describe(self) -> dict[str, Any]:
        """The codec's identity, the steps it takes, and the cache."""
        cache = self._stream.ladder.cache
        return {
            "codec": self._codec.identity.to_dict(),
            "steps": None if self._codec.supported_steps is None else list(self._codec.supported_steps),
            "ladder": list(self._stream.ladder.steps),
            "cache": {"entries": len(cache), "hit_rate": cache.hit_rate},
        }
