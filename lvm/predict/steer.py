"""Steps before and after prediction: complete short contexts, and snap predictions to the corpus.

Letters: B predictions, K neighbours, T context length, N corpus vectors, D vector length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from lvm.errors import InputError

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]

PASSTHROUGH = "passthrough"
"""Name of the model that returns the last context vector; decoding it shows the codec's own quality."""

CONTEXT_CHUNKS = 5
"""Default context length."""


class Neighbours(Protocol):
    """A search index over the corpus vectors."""

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], Rows]:
        """Cosines and rows, both (B, k), best first; row -1 if fewer than k were found."""


class Corpus(Protocol):
    """The vectors that the index was built from, and their texts."""

    @property
    def vectors(self) -> Floats:
        """(N, D) unit vectors; may be float16 and memory-mapped."""

    def texts(self, rows: Sequence[int]) -> list[str]:
        """Chunk texts of these rows."""


def unit(vectors: Floats) -> NDArray[np.float32]:
    """Vectors along the last axis scaled to norm 1, float32; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: NDArray[np.float32] = np.zeros(vectors.shape, dtype=np.float32)
    np.divide(vectors, lengths, out=result, where=lengths > 0, casting="same_kind")
    return result


@dataclass(frozen=True)
class SnapSettings:
    """Settings of the snap; the original system's "manifold snap + topic anchor"."""

    neighbours: int = 16
    """Nearest corpus vectors to average."""
    blend: tuple[float, float, float] = (0.75, 0.15, 0.10)
    """Shares of that average, the query and the context mean."""
    drift_blend: tuple[float, float, float] = (0.60, 0.25, 0.15)
    """Shares if the average has drifted off topic."""
    min_query_cosine: float = 0.20
    """It has drifted if its cosine to the query is lower, …"""
    min_context_cosine: float = 0.30
    """… or its cosine to the context mean."""


@dataclass(frozen=True)
class Snapped:
    """Snapped predictions."""

    vectors: NDArray[np.float32]
    """(B, D) unit vectors."""
    rows: Rows
    """(B, K) corpus rows that were averaged, best first; -1 if fewer were found."""
    drifted: NDArray[np.bool_]
    """(B,) True if the drift blend was used."""


def snap(
    predictions: NDArray[np.float32],
    queries: NDArray[np.float32],
    context_means: NDArray[np.float32],
    index: Neighbours,
    vectors: Floats,
    settings: SnapSettings | None = None,
    barred: Callable[[Rows], NDArray[np.bool_]] | None = None,
) -> Snapped:
    """Replace each prediction by the mean of its neighbours, weighted by cosine, blended with its context.

    predictions, queries (the last context vectors) and context_means: (B, D); vectors: (N, D), of the rows of `index`.
    All three are scaled to norm 1 before blending. Neighbours with a negative cosine have weight 0; if all have, the
    prediction is used instead of their mean. barred: maps rows (B, k) to True for rows that must not be used, such as
    the held-out article of an evaluation, whose true next chunk would otherwise be found.
    """
    settings = settings or SnapSettings()
    scores, rows = allowed_neighbours(predictions, index, settings.neighbours, len(vectors), barred)
    weights = np.where(rows >= 0, np.maximum(scores, 0.0), 0.0).astype(np.float32)
    means = np.empty(predictions.shape, dtype=np.float32)
    for first in range(0, len(rows), 256):  # 256 x 16 x 768 float32 is 13 MB
        part = slice(first, first + 256)
        found = np.asarray(vectors[np.maximum(rows[part], 0)], dtype=np.float32)
        means[part] = np.einsum("bk,bkd->bd", weights[part], found)
    no_weight = ~weights.any(axis=1)
    means[no_weight] = predictions[no_weight]
    snapped, query, mean = unit(means), unit(queries), unit(context_means)
    drifted = (np.einsum("bd,bd->b", snapped, query) < settings.min_query_cosine) | (
        np.einsum("bd,bd->b", snapped, mean) < settings.min_context_cosine
    )
    shares = np.where(drifted[:, None], settings.drift_blend, settings.blend).astype(np.float32)
    blended = shares[:, :1] * snapped + shares[:, 1:2] * query + shares[:, 2:] * mean
    return Snapped(unit(blended), rows, drifted)


def allowed_neighbours(
    predictions: NDArray[np.float32],
    index: Neighbours,
    wanted: int,
    num_vectors: int,
    barred: Callable[[Rows], NDArray[np.bool_]] | None,
) -> tuple[NDArray[np.float32], Rows]:
    """Cosines and rows (B, wanted) of the nearest vectors that are not barred, best first; row -1 if there are fewer.

    barred: as in `snap`.
    """
    k = wanted if barred is None else wanted * 4
    while True:
        k = min(k, num_vectors)
        scores, rows = index.search(predictions, k)
        usable = rows >= 0
        if barred is not None:
            usable &= ~barred(rows)
        if k == num_vectors or (usable.sum(axis=1) >= wanted).all():
            break
        k *= 4
    # A stable sort moves the usable rows to the front and keeps their order.
    order = np.argsort(~usable, axis=1, kind="stable")[:, :wanted]
    kept = np.take_along_axis(usable, order, axis=1)
    best = np.where(kept, np.take_along_axis(rows, order, axis=1), -1)
    return np.take_along_axis(scores, order, axis=1), best.astype(np.int64)


Mode = Literal["seq", "ann", "mixed", "repeat_pad", "passthrough"]
Fill = Literal["retrieve", "repeat", "none"]
FILLS: tuple[Fill, ...] = get_args(Fill)
Origin = Literal["text", "retrieved", "repeated"]


@dataclass(frozen=True)
class FillSettings:
    """How chunks to complete a short context are chosen from the corpus."""

    candidates: int = 50
    """Nearest chunks to consider."""
    diversity: float = 0.3
    """Weight of dissimilarity to chunks chosen already against similarity to the text; 0 takes the nearest.
    Maximal marginal relevance, Carbonell and Goldstein 1998, with lambda = 1 - diversity."""
    max_cosine: float = 0.95
    """Candidates closer than this to a chunk of the context are near-duplicates and are skipped."""


@dataclass(frozen=True)
class Context:
    """Input of the predictor, oldest chunk first."""

    vectors: NDArray[np.float32]
    """(T, D) unit vectors; (1, D) in mode "passthrough"."""
    texts: tuple[str, ...]
    """Text of each chunk."""
    origins: tuple[Origin, ...]
    """Origin of each chunk: the user's text, the corpus, or repetition."""
    mode: Mode
    """"seq": all chunks from the text. "ann": one from the text, the others retrieved. "mixed": retrieved chunks with
    several from the text, or with repeated ones. "repeat_pad": the first chunk repeated. "passthrough": only the last
    chunk."""


def build_context(
    vectors: NDArray[np.float32],
    texts: Sequence[str],
    places: int = 5,
    fill: Fill = "retrieve",
    index: Neighbours | None = None,
    corpus: Corpus | None = None,
    settings: FillSettings | None = None,
) -> Context:
    """A context of `places` chunks that ends with the chunks of the text.

    vectors (n, D), texts (n,): the text's chunks in order; the last `places` are used. If there are fewer, diverse
    chunks from the corpus come before them, the least similar first, and if there is no corpus, or too few chunks in
    it, repetitions of the first chunk. Raises InputError on no chunks, and on an index without its corpus.
    """
    if len(texts) == 0 or len(texts) != len(vectors):
        counts = f"{len(texts)} chunk texts and {len(vectors)} vectors"
        raise InputError(f"got {counts}; expected the same number, at least one")
    if fill == "none":
        return Context(unit(vectors[-1:]), (texts[-1],), ("text",), "passthrough")
    given = unit(vectors[-places:])
    given_texts = tuple(texts[-places:])
    missing = places - len(given)
    supports: list[int] = []
    if missing and fill == "retrieve" and index is not None:
        if corpus is None:
            raise InputError("an index without its corpus cannot fill a context; pass both or neither")
        supports = _diverse_supports(given, missing, index, corpus.vectors, settings or FillSettings())
    repeats = missing - len(supports)
    parts = [np.repeat(given[:1], repeats, axis=0), given]
    all_texts = (given_texts[0],) * repeats + given_texts
    if supports and corpus is not None:
        parts.insert(0, unit(np.asarray(corpus.vectors[supports], dtype=np.float32)))
        all_texts = (*corpus.texts(supports), *all_texts)
    origins: list[Origin] = ["retrieved"] * len(supports)
    origins += ["repeated"] * repeats
    origins += ["text"] * len(given)
    mode: Mode
    if not missing:
        mode = "seq"
    elif not supports:
        mode = "repeat_pad"
    else:
        mode = "ann" if len(given) == 1 and not repeats else "mixed"
    return Context(np.concatenate(parts), all_texts, tuple(origins), mode)


def _diverse_supports(
    given: NDArray[np.float32], wanted: int, index: Neighbours, vectors: Floats, settings: FillSettings
) -> list[int]:
    """Up to `wanted` corpus rows, similar to the text but not to each other, the least similar to the text first."""
    centre = unit(given.mean(axis=0, keepdims=True))
    _, found = index.search(centre, min(settings.candidates, len(vectors)))
    rows = found[0][found[0] >= 0]
    candidates = unit(np.asarray(vectors[rows], dtype=np.float32))
    similarity = candidates @ centre[0]
    usable = (candidates @ given.T).max(axis=1, initial=-1.0) < settings.max_cosine
    redundancy = np.zeros(
        len(rows), dtype=np.float32
    )  # similarity to the chunks chosen so far, not to the text
    chosen: list[int] = []
    while len(chosen) < wanted and usable.any():
        score = (1 - settings.diversity) * similarity - settings.diversity * redundancy
        best = int(np.where(usable, score, -np.inf).argmax())
        chosen.append(best)
        near = candidates @ candidates[best]
        usable &= near < settings.max_cosine
        usable[best] = False
        redundancy = near if len(chosen) == 1 else np.maximum(redundancy, near)
    return [int(rows[c]) for c in sorted(chosen, key=lambda c: float(similarity[c]))]
