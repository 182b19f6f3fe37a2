"""The retriever deployment: the corpus and its FAISS index, memory-mapped, so that a node's replicas share pages."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from lvm.corpus.tmd import Prototypes, Wanted
from lvm.predict.extract import Extractor
from lvm.predict.steer import Context, build_context, snap
from lvm.vectors.array import open_vectors
from lvm.vectors.index import load_index
from serve.release import Held, Release
from serve.rows import EXPIRED, Outcome
from serve.searcher import divided_index
from serve.settings import ServeArgs, once_a_node, require_run


@dataclass(frozen=True)
class FillRow:
    """Chunks to complete to a full context."""

    vectors: NDArray[np.float32]
    """(n, D), n under `length`."""
    texts: tuple[str, ...]
    length: int
    """The model's context length."""


@dataclass(frozen=True)
class SnapRow:
    """A prediction to snap."""

    prediction: NDArray[np.float32]
    """(D,)."""
    query: NDArray[np.float32]
    """(D,) the last context vector."""
    context_mean: NDArray[np.float32]
    """(D,)."""


@dataclass(frozen=True)
class CodeFilter:
    """TMD codes to keep, and the prototypes that assign a code to each chunk."""

    wanted: Wanted
    prototypes: Prototypes


@dataclass(frozen=True)
class NearRow:
    """A vector to search with."""

    vector: NDArray[np.float32]
    """(D,)."""
    k: int
    barred: frozenset[str] = frozenset()
    """Texts to exclude: those of the context, which are not a continuation of it."""
    codes: CodeFilter | None = None
    """Only chunks whose code passes."""
    answers: bool = False
    """True: return the single best answer (`lvm.predict.extract`) instead of the k nearest."""
    search: NDArray[np.float32] | None = None
    """(D,) vector of the predictor's rank head, which takes part in the search for the best answer."""


@dataclass(frozen=True)
class CorpusChunk:
    """One chunk of the corpus."""

    text: str
    title: str
    source: str
    chunk_id: str
    position: int
    cosine: float
    tmd_code: int | None = None
    """If requested."""


class _Corpus:
    """The corpus of one release."""

    def __init__(self, release: Release, searchers: Sequence[DeploymentHandle], timeout_s: float) -> None:
        """searchers: deployments that search the index; without any, it is searched here."""
        self.identity = require_run(release.run).identity
        with once_a_node(release.run) as folder:
            self._array = open_vectors(folder / "vectors")
            self._index = load_index(folder / "index") if not searchers else None
        if self._index is None:  # not under the lock, which the searchers take
            self._index = divided_index(release.run, searchers, timeout_s)
        self._index.require_array(self._array)
        self._extractor = Extractor(self._array, self._index)
        self._codes: NDArray[np.int32] | None = None

    def describe(self) -> dict[str, Any]:
        """Codec, number of chunks, and the index's type and measured recall."""
        return {
            "codec": self.identity.to_dict(),
            "chunks": len(self._array),
            "index": {**self._index.manifest.settings, **self._index.manifest.report},
        }

    def fill(self, rows: list[FillRow]) -> list[Context]:
        """One full context per row."""
        return [
            build_context(row.vectors, row.texts, row.length, "retrieve", self._index, self._array)
            for row in rows
        ]

    def snap(self, rows: list[SnapRow]) -> list[tuple[NDArray[np.float32], bool]]:
        """The steered unit vector (D,) of each row, and whether the drift blend was used."""
        done = snap(
            np.stack([r.prediction for r in rows]),
            np.stack([r.query for r in rows]),
            np.stack([r.context_mean for r in rows]),
            self._index,
            self._array.vectors,
        )
        return [(v, bool(d)) for v, d in zip(done.vectors, done.drifted, strict=True)]

    def near(self, rows: list[NearRow]) -> list[list[CorpusChunk]]:
        """The k nearest chunks of each row, best first; fewer if the corpus has no more."""
        answering = [i for i, row in enumerate(rows) if row.answers]
        if answering:
            best = self._best_answers([rows[i] for i in answering])
            others = [i for i, row in enumerate(rows) if not row.answers]
            rest = self.near([rows[i] for i in others]) if others else []
            by_row = dict(zip(answering + others, [*best, *rest], strict=True))
            return [by_row[i] for i in range(len(rows))]
        if any(row.codes for row in rows):
            return [self._filtered(row, row.codes) if row.codes else self.near([row])[0] for row in rows]
        # Twice the number of excluded texts, since the corpus may contain some of them more than once.
        k = min(len(self._index), max(r.k + 2 * len(r.barred) for r in rows))
        scores, found = self._index.search(np.stack([r.vector for r in rows]), k)
        answers = []
        for row, row_scores, row_found in zip(rows, scores, found, strict=True):
            wanted = row_found[: row.k + 2 * len(row.barred)]
            wanted = wanted[wanted >= 0]
            texts = self._array.texts(wanted)
            kept = [i for i, text in enumerate(texts) if text not in row.barred] or list(range(len(texts)))
            answers.append([self._chunk(int(wanted[i]), float(row_scores[i])) for i in kept[: row.k]])
        return answers

    def _filtered(self, row: NearRow, filters: CodeFilter) -> list[CorpusChunk]:
        """The nearest chunks whose codes pass, by a full scan: the index does not know codes."""
        if self._codes is None:  # on the first such request
            self._codes = filters.prototypes.codes(self._array.vectors)
        numbers = np.flatnonzero(filters.wanted.matches(self._codes))
        blocks = np.split(numbers, range(16_384, len(numbers), 16_384))
        cosines = np.concatenate([self._array.vectors[b].astype(np.float32) @ row.vector for b in blocks])
        best = np.argsort(-cosines, kind="stable")[: row.k]
        return [
            replace(self._chunk(int(numbers[i]), float(cosines[i])), tmd_code=int(self._codes[numbers[i]]))
            for i in best
        ]

    def _best_answers(self, rows: list[NearRow]) -> list[list[CorpusChunk]]:
        """The best answer for each row's vector; an excluded text only if there is no other."""
        places, cosines = self._extractor.answers(
            np.stack([r.vector for r in rows]),
            [r.barred for r in rows],
            np.stack([r.vector if r.search is None else r.search for r in rows]),
        )
        numbers = np.maximum(places, 0)
        return [[self._chunk(int(n), float(c))] for n, c in zip(numbers, cosines, strict=True)]

    def _chunk(self, number: int, cosine: float) -> CorpusChunk:
        (text,), (title,), (source,) = (
            read([number]) for read in (self._array.texts, self._array.titles, self._array.sources)
        )
        chunk_id, position = str(self._array.chunk_ids[number]), int(self._array.positions[number])
        return CorpusChunk(text, title, source, chunk_id, position, cosine)


@serve.deployment
class Retriever:
    """Searches the corpus of a run."""

    def __init__(self, args: ServeArgs, searchers: Sequence[DeploymentHandle] = ()) -> None:
        """searchers: those that hold the index, if `ServeArgs.searchers` says so."""
        import faiss

        faiss.omp_set_num_threads(args.retriever.num_threads)
        self._args = args
        self._held = Held(lambda release: _Corpus(release, searchers, args.limits.default_deadline_s))
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="search")

    async def reconfigure(self, wanted: Mapping[str, Any]) -> None:
        """Load the release of a `user_config`."""
        await self._held.prepare(wanted, self._args)

    async def fill(
        self, rows: list[FillRow], remaining_s: list[float], release: Release
    ) -> list[Outcome[Context]]:
        """`_Corpus.fill`. Like the methods below, returns one outcome per row."""
        return await self._each(rows, remaining_s, (await self._held.get(release)).fill)

    async def snap(
        self, rows: list[SnapRow], remaining_s: list[float], release: Release
    ) -> list[Outcome[tuple[NDArray[np.float32], bool]]]:
        """`_Corpus.snap`."""
        return await self._each(rows, remaining_s, (await self._held.get(release)).snap)

    async def near(
        self, rows: list[NearRow], remaining_s: list[float], release: Release
    ) -> list[Outcome[list[CorpusChunk]]]:
        """`_Corpus.near`."""
        return await self._each(rows, remaining_s, (await self._held.get(release)).near)

    async def describe(self, release: Release) -> dict[str, Any]:
        """`_Corpus.describe`."""
        return (await self._held.get(release)).describe()

    async def _each(
        self, rows: list[Any], remaining_s: list[float], work: Callable[[list[Any]], Sequence[Any]]
    ) -> list[Outcome[Any]]:
        """Process a call's rows as one batch, in a thread: FAISS releases the GIL, so calls run in parallel."""
        since, now = time.perf_counter(), time.monotonic()

        def live_work() -> tuple[list[int], Sequence[Any], float, float]:
            begun = time.perf_counter()
            late = time.monotonic() - now
            live = [i for i, left in enumerate(remaining_s) if left > late]
            values = work([rows[i] for i in live]) if live else []
            return live, values, (begun - since) * 1000, (time.perf_counter() - begun) * 1000

        loop = asyncio.get_running_loop()
        live, values, queue_ms, work_ms = await loop.run_in_executor(self._threads, live_work)
        outcomes: list[Outcome[Any]] = [Outcome(error=EXPIRED, queue_ms=queue_ms) for _ in rows]
        for i, value in zip(live, values, strict=True):
            outcomes[i] = Outcome(value, None, queue_ms, work_ms, len(live))
        return outcomes
