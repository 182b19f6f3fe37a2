"""The predictor deployment: contexts to the next vector, with every model of the run in each replica.

All models share one process, without multiplexing: four of them take 130 MB and predict in milliseconds, while a
replica takes half a gigabyte before loading any weights, and loading on demand would cost a request more than all its
predictions (tests/bench/results/).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from lvm.predict.steer import PASSTHROUGH
from serve.metrics import replica_metrics
from serve.rows import Outcome, RowQueue
from serve.settings import ServeArgs, device_of, models_of, require_run


@dataclass(frozen=True)
class ContextRow:
    """Input of one prediction."""

    model: str
    """Alias, or "passthrough"."""
    vectors: NDArray[np.float32]
    """(T, D), norm 1, oldest first."""
    search: bool = False
    """Whether to return the search vector too, which takes a second pass of the predictor."""


@dataclass(frozen=True)
class Predicted:
    """The next vector, and the record that predicted it."""

    vector: NDArray[np.float32]
    """(D,), norm 1."""
    search: NDArray[np.float32]
    """(D,), norm 1: the rank head's vector (`lvm.predict.ranking`); the prediction itself if not requested."""
    folder: str


@serve.deployment
class Predictor:
    """All predictors of a run."""

    def __init__(self, args: ServeArgs, models: dict[str, str]) -> None:
        """models: alias to folder name under the run's models/, fixed when the application is built: a new version of a
        model means a new application, which Ray Serve rolls out replica by replica."""
        import torch

        # Imports torch, so not at the top: the gateway imports this module for its row classes.
        from lvm.predict.predictor import load_predictor

        torch.set_num_threads(args.predictor.num_threads)
        self._predictors = {}
        for alias, folder in models.items():
            predictor = load_predictor(folder, models_of(args), device_of(args.predictor))
            assert predictor.record is not None
            if args.run:
                predictor.require_codec(require_run(args.run).identity, f"{args.run}/vectors")
            blank = np.zeros((1, predictor.context, predictor.record.identity.dim), np.float32)
            predictor(blank), predictor.search(blank)  # warm up
            self._predictors[alias] = predictor
        self._queue: RowQueue[ContextRow, Predicted] = RowQueue(
            self._work,
            args.queue_rows * 2,
            group=lambda row: (row.model, len(row.vectors), row.search),
            measure=replica_metrics().measure,
        )

    def _work(self, rows: list[ContextRow]) -> Sequence[Predicted]:
        contexts = np.stack([row.vectors for row in rows])
        if rows[0].model == PASSTHROUGH:
            return [Predicted(vector, vector, PASSTHROUGH) for vector in contexts[:, -1]]
        predictor = self._predictors[rows[0].model]
        vectors = predictor(contexts)
        searching = predictor.search(contexts) if rows[0].search else vectors
        return [Predicted(v, s, predictor.name) for v, s in zip(vectors, searching, strict=True)]

    async def run(self, rows: list[ContextRow], remaining_s: list[float]) -> list[Outcome[Predicted]]:
        """One outcome per context."""
        return await self._queue.submit(rows, remaining_s)

    async def describe(self) -> dict[str, dict[str, Any]]:
        """Each alias's record: folder, context length, architecture, parameters, codec, metrics, training."""
        return {
            alias: {
                "folder": p.name,
                "context": p.context,
                "config": p.record.config,
                "metrics": p.record.metrics,
            }
            for alias, p in self._predictors.items()
            if p.record is not None
        }
