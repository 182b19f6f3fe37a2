"""The predictor deployment: contexts to the next vector. Each replica holds every model of the run.

Models are not multiplexed: four take 130 MB and predict in milliseconds, while a replica takes half a gigabyte before
it loads weights, and loading on demand would take longer than all predictions of a request (tests/bench/results/).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from lvm.predict.steer import PASSTHROUGH
from serve.metrics import replica_metrics
from serve.release import Held, Release
from serve.rows import Outcome, RowQueue
from serve.settings import ServeArgs, device_of, models_of, require_run

if TYPE_CHECKING:
    from lvm.predict.predictor import TrainedPredictor


@dataclass(frozen=True)
class ContextRow:
    """Input of one prediction."""

    model: str
    """Alias, or "passthrough"."""
    vectors: NDArray[np.float32]
    """(T, D), norm 1, oldest first."""
    search: bool = False
    """Whether to return the search vector too, by a second forward pass."""


@dataclass(frozen=True)
class Predicted:
    """The next vector, and the record of the model that predicted it."""

    vector: NDArray[np.float32]
    """(D,), norm 1."""
    search: NDArray[np.float32]
    """(D,), norm 1: the rank head's vector (`lvm.predict.ranking`); the prediction itself if not requested."""
    folder: str


@serve.deployment
class Predictor:
    """All predictors of a run."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        torch.set_num_threads(args.predictor.num_threads)
        self._args = args
        self._held = Held(self._load)
        self._queue: RowQueue[tuple[dict[str, TrainedPredictor], ContextRow], Predicted] = RowQueue(
            self._work,
            args.queue_rows * 2,
            group=lambda job: (id(job[0]), job[1].model, len(job[1].vectors), job[1].search),
            measure=replica_metrics().measure,
        )

    async def reconfigure(self, wanted: Mapping[str, Any]) -> None:
        """Load the release of a `user_config`."""
        await self._held.prepare(wanted, self._args)

    def _load(self, release: Release) -> "dict[str, TrainedPredictor]":
        # Imports torch; the gateway imports this module only for its rows.
        from lvm.predict.predictor import load_predictor

        predictors = {}
        for alias, folder in release.models:
            predictor = load_predictor(folder, models_of(release.run), device_of(self._args.predictor))
            assert predictor.record is not None
            if release.run:
                predictor.require_codec(require_run(release.run).identity, f"{release.run}/vectors")
            blank = np.zeros((1, predictor.context, predictor.record.identity.dim), np.float32)
            predictor(blank), predictor.search(blank)  # warm up
            predictors[alias] = predictor
        return predictors

    def _work(self, rows: "list[tuple[dict[str, TrainedPredictor], ContextRow]]") -> Sequence[Predicted]:
        contexts = np.stack([row.vectors for _, row in rows])
        predictors, first = rows[0]
        if first.model == PASSTHROUGH:
            return [Predicted(vector, vector, PASSTHROUGH) for vector in contexts[:, -1]]
        predictor = predictors[first.model]
        vectors = predictor(contexts)
        searches = predictor.search(contexts) if first.search else vectors
        return [Predicted(v, s, predictor.name) for v, s in zip(vectors, searches, strict=True)]

    async def run(
        self, rows: list[ContextRow], remaining_s: list[float], release: Release
    ) -> list[Outcome[Predicted]]:
        """One outcome per context."""
        predictors = await self._held.get(release)
        return await self._queue.submit([(predictors, row) for row in rows], remaining_s)

    async def describe(self, release: Release) -> dict[str, dict[str, Any]]:
        """Each alias's record: folder, context length, architecture, parameters, codec, metrics, training."""
        return {
            alias: dict(folder=p.name, context=p.context, config=p.record.config, metrics=p.record.metrics)
            for alias, p in (await self._held.get(release)).items()
            if p.record is not None
        }
