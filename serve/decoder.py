"""The decoder deployment: vectors to text by the ladder, with continuous batching.

Each round takes every row one step further. A row that arrives during a round joins the next.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from lvm.codec.ladder import Answer, Ladder, LadderSettings
from lvm.predict.steer import unit
from serve.metrics import replica_metrics
from serve.rows import Outcome, StreamQueue
from serve.settings import ServeArgs, load_served


@dataclass(frozen=True)
class VectorRow:
    """One vector to decode."""

    vector: NDArray[np.float32]
    """(D,), norm 1."""
    context: NDArray[np.float32] | None = None
    """(T, D), vectors of the preceding chunks, which the text should not repeat."""
    steps: int | None = None
    """Exactly this many corrector steps of the codec's decoder; None for the whole ladder."""
    cache: bool = True
    coming: int = 0
    """Other requests of the gateway that were about to be sent to the decoder when this one was sent."""


class _Rows:
    """Adapts the ladder to `Stream`."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self.drop, self.run = ladder.drop, ladder.run

    def add(self, row: VectorRow) -> int:
        return self._ladder.add(row.vector, row.context, row.steps, row.cache)


@serve.deployment
class Decoder:
    """A codec's decoder and its writer. The gateway replaces refused texts by corpus chunks."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        torch.set_num_threads(args.decoder.num_threads)
        self._codec = load_served(args, args.decoder)
        settings = LadderSettings(candidates=args.candidates, cache_bytes=args.cache_bytes)
        self._ladder = Ladder(self._codec, self._codec.writer, settings)
        # Warm up both engines: a text's own vector is inverted, a mixed one goes to the writer.
        own = self._codec.encode_chunks(["warm up", "a second text"]).vectors
        for vector in (own[0], unit(own.sum(0))):
            self._ladder.add(vector, cache=False)
        while len(self._ladder):
            self._ladder.run()
        self._queue: StreamQueue[VectorRow, Answer] = StreamQueue(
            _Rows(self._ladder), 2 * args.queue_rows, measure=replica_metrics().measure
        )

    async def run(self, rows: list[VectorRow], remaining_s: list[float]) -> list[Outcome[Answer]]:
        """One outcome per vector; refused texts are answers with `accepted` False."""
        return await self._queue.submit(rows, remaining_s, rows[-1].coming if rows else 0)

    async def describe(self) -> dict[str, Any]:
        """The codec's identity, its supported steps, the ladder, the writer and the cache."""
        cache = self._ladder.cache
        return {
            "codec": self._codec.identity.to_dict(),
            "steps": None if self._codec.supported_steps is None else list(self._codec.supported_steps),
            "ladder": list(self._ladder.steps),
            "digest": self._ladder.digest,
            "writer": None if self._codec.writer is None else str(self._codec.writer.identity),
            "no_writer": self._codec.no_writer,
            "cache": {"entries": len(cache), "bytes": cache.currsize, "hit_rate": cache.hit_rate},
        }
