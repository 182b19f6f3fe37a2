"""The predictor deployment: every model of the run in each replica, contexts to the next vector.

All models in one process, not a replica each and not multiplexed: the four take 130 MB and predict in
milliseconds, while a replica takes half a gigabyte before its first weight, and loading on demand costs a request more
than every prediction it will ask for (tests/bench/results/).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from lvm.codec.identity import require_same_codec
from lvm.predict.steer import PASSTHROUGH
from serve.metrics import replica_metrics
from serve.rows import Outcome, RowQueue
from serve.settings import ServeArgs, require_run


@dataclass(frozen=True)
class ContextRow:
    """What one prediction is made from."""

    model: str
    """Alias, or "passthrough"."""
    vectors: NDArray[np.float32]
    """(T, D), norm 1, oldest first."""


@dataclass(frozen=True)
class Predicted:
    """The next vector, and the record that gave it."""

    vector: NDArray[np.float32]
    """(D,), norm 1."""
    folder: str


@serve.deployment
class Predictor:
    """All predictors of a run."""

    def __init__(self, args: ServeArgs, models: dict[str, str]) -> None:
        """models: alias to folder name under the run's models/, fixed when the application was built: another
        version of a model is another application, which Ray Serve rolls out replica by replica."""
        import torch

        from lvm.predict.record import load_record  # torch; the gateway imports this module for its rows

        torch.set_num_threads(args.predictor.num_threads)
        manifest = require_run(args.run)
        self._records = {}
        for alias, folder in models.items():
            record = load_record(Path(args.run) / "models", folder)
            require_same_codec(record.identity, manifest.identity, f"model {folder}", f"{args.run}/vectors")
            with torch.inference_mode():
                record.model(torch.zeros(1, record.context, record.identity.dim))  # the first call allocates
            self._records[alias] = record
        self._queue: RowQueue[ContextRow, Predicted] = RowQueue(
            self._work,
            args.queue_rows * 2,
            group=lambda row: (row.model, len(row.vectors)),
            measure=replica_metrics().measure,
        )

    def _work(self, rows: list[ContextRow]) -> Sequence[Predicted]:
        import torch

        contexts = np.stack([row.vectors for row in rows])
        if rows[0].model == PASSTHROUGH:
            return [Predicted(vector, PASSTHROUGH) for vector in contexts[:, -1]]
        record = self._records[rows[0].model]
        with torch.inference_mode():
            vectors = record.model(torch.from_numpy(contexts)).float().numpy()
        return [Predicted(vector, record.folder.name) for vector in vectors]

    async def run(self, rows: list[ContextRow], remaining_s: list[float]) -> list[Outcome[Predicted]]:
        """One outcome a context."""
        return await self._queue.submit(rows, remaining_s)

    async def describe(self) -> dict[str, dict[str, Any]]:
        """Each alias's record: folder, context length, architecture, parameters, codec, metrics, training."""
        return {
            alias: {"folder": r.folder.name, "context": r.context, "config": r.config, "metrics": r.metrics}
            for alias, r in self._records.items()
        }
