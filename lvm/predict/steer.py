"""Around the predictor: a full context before it, and a decodable vector after it.

Letters: B predictions, K neighbours, T places in a context, N corpus vectors, D = 768.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lvm.errors import InputError

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.int64]

PASSTHROUGH = "passthrough"
"""The model that predicts nothing: it decodes the last context vector, which shows what the codec can do."""

CONTEXT_CHUNKS = 5
"""Chunks a predictor reads, where its record does not say another number."""


class Neighbours(Protocol):
    """A search index over the corpus vectors."""

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], Rows]:
        """Cosines and rows, both (B, k), best first; row -1 where fewer than k were found."""


class Corpus(Protocol):
    """The vectors the index was built from, and their texts."""

    @property
    def vectors(self) -> Floats:
        """(N, D) unit vectors; may be float16 and memory-mapped."""

    def texts(self, rows: Sequence[int]) -> list[str]:
        """Chunk texts of these rows."""


def unit(vectors: Floats) -> NDArray[np.float32]:
    """Vectors along the last axis scaled to length 1, float32; an all-zero one stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: NDArray[np.float32] = np.zeros(vectors.shape, dtype=np.float32)
    np.divide(vectors, lengths, out=result, where=lengths > 0, casting="same_kind")
    return result


@dataclass(frozen=True)
class SnapSettings:
    """The original system's blend, "manifold snap + topic anchor"; its shares."""

    neighbours: int = 16
    """Nearest corpus vectors that make up the snap."""
    blend: tuple[float, float, float] = (0.75, 0.15, 0.10)
    """Shares of snap, query and context mean."""
    drift_blend: tuple[float, float, float] = (0.60, 0.25, 0.15)
    """The shares when the snap has drifted from the topic."""
    min_query_cosine: float = 0.20
    """Below it the snap has drifted from the query."""
    min_context_cosine: float = 0.30
    """Below it the snap has drifted from the context mean."""


@dataclass(frozen=True)
class Snapped:
    """Predictions moved onto the corpus, and what moved them."""

    vectors: NDArray[np.float32]
    """(B, D) unit vectors."""
    rows: Rows
    """(B, K) corpus rows that took part, best first, -1 where fewer were found."""
    drifted: NDArray[np.bool_]
    """(B,) True where the drift blend was used."""


def snap(
    predictions: NDArray[np.float32],
    queries: NDArray[np.float32],
    context_means: NDArray[np.float32],
    index: Neighbours,
    vectors: Floats,
    settings: SnapSettings | None = None,
    barred: Callable[[Rows], NDArray[np.bool_]] | None = None,
) -> Snapped:
    """Each prediction as the similarity-weighted mean of its neighbours, anchored to its context.

    predictions, queries (the last context vector) and context_means: (B, D); `vectors` is what the rows of
    `index` point into. All three parts are scaled to length 1 before the blend, so the shares are true
    shares. Neighbours with a negative cosine have no weight; when none has any, the prediction itself takes
    the snap's place. `barred` maps (B, k) rows to True where a row may not be used: an evaluation bars the
    article it holds out, whose true next chunk would otherwise be found in the index.
    """
    settings = settings or SnapSettings()
    scores, rows = allowed_neighbours(predictions, index, settings.neighbours, len(vectors), barred)
    weights = np.where(rows >= 0, np.maximum(scores, 0.0), 0.0).astype(np.float32)
    mixed = np.empty(predictions.shape, dtype=np.float32)
    for first in range(0, len(rows), 256):  # 256 x 16 x 768 float32 is 13 MB
        part = slice(first, first + 256)
        found = np.asarray(vectors[np.maximum(rows[part], 0)], dtype=np.float32)
        mixed[part] = np.einsum("bk,bkd->bd", weights[part], found)
    lost = ~weights.any(axis=1)
    mixed[lost] = predictions[lost]
    snapped, query, mean = unit(mixed), unit(queries), unit(context_means)
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
    """Cosines and rows (B, wanted) of the nearest of `num_vectors` that are not barred, best first; row -1
    where there are no more. `barred` as in `snap`."""
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
    # A stable sort on "not usable" brings the usable to the front and keeps their order.
    order = np.argsort(~usable, axis=1, kind="stable")[:, :wanted]
    kept = np.take_along_axis(usable, order, axis=1)
    best = np.where(kept, np.take_along_axis(rows, order, axis=1), -1)
    return np.take_along_axis(scores, order, axis=1), best.astype(np.int64)


Mode = Literal["seq", "ann", "mixed", "repeat_pad", "passthrough"]
Fill = Literal["retrieve", "repeat", "none"]
Origin = Literal["text", "retrieved", "repeated"]


@dataclass(frozen=True)
class FillSettings:
    """How missing context chunks are found in the corpus."""

    candidates: int = 50
    """Nearest chunks that are considered."""
    diversity: float = 0.3
    """Weight of being unlike the supports already taken, against likeness to the text; 0 takes the nearest.
    Maximal marginal relevance, Carbonell and Goldstein 1998, with lambda = 1 - diversity."""
    max_cosine: float = 0.95
    """A candidate nearer than this to a chunk of the context is a near-duplicate and says nothing new."""


@dataclass(frozen=True)
class Context:
    """What the predictor reads, oldest chunk first."""

    vectors: NDArray[np.float32]
    """(T, D) unit vectors; (1, D) in mode "passthrough"."""
    texts: tuple[str, ...]
    """The chunk in each place."""
    origins: tuple[Origin, ...]
    """Where each came from: the user's text, the corpus, or a repetition."""
    mode: Mode
    """"seq": all from the text. "ann": one chunk of text, the rest retrieved. "mixed": several chunks of
    text and retrieved ones, or retrieved and repeated ones. "repeat_pad": the first chunk repeated.
    "passthrough": the last chunk alone, for answering without a prediction."""


def build_context(
    vectors: NDArray[np.float32],
    texts: Sequence[str],
    places: int = 5,
    fill: Fill = "retrieve",
    index: Neighbours | None = None,
    corpus: Corpus | None = None,
    settings: FillSettings | None = None,
) -> Context:
    """A context of `places` chunks that ends with the text's own.

    vectors (n, D) and texts (n,) are the text's chunks in order; of more than `places` the last ones count.
    Missing places stand before the text: diverse supports from the corpus, the least like the text first,
    and where there is no corpus, or too little in it, the first chunk again. Raises InputError on no chunks,
    and on `fill="retrieve"` with an index but no corpus.
    """
    if len(texts) == 0 or len(texts) != len(vectors):
        raise InputError(
            f"got {len(texts)} chunk texts and {len(vectors)} vectors; expected as many, at least one"
        )
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
    words = (given_texts[0],) * repeats + given_texts
    if supports and corpus is not None:
        # Repetitions of the first chunk stay beside it; the supports come before them.
        parts.insert(0, unit(np.asarray(corpus.vectors[supports], dtype=np.float32)))
        words = (*corpus.texts(supports), *words)
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
    return Context(np.concatenate(parts), words, tuple(origins), mode)


def _diverse_supports(
    given: NDArray[np.float32], wanted: int, index: Neighbours, vectors: Floats, settings: FillSettings
) -> list[int]:
    """Up to `wanted` corpus rows like the text but unlike each other, the least like the text first."""
    centre = unit(given.mean(axis=0, keepdims=True))
    _, found = index.search(centre, min(settings.candidates, len(vectors)))
    rows = found[0][found[0] >= 0]
    candidates = unit(np.asarray(vectors[rows], dtype=np.float32))
    likeness = candidates @ centre[0]
    nearest_taken = (candidates @ given.T).max(axis=1, initial=-1.0)
    open_ = nearest_taken < settings.max_cosine
    # The text itself is no rival for place: only supports already taken count against a candidate.
    redundancy = np.zeros(len(rows), dtype=np.float32)
    chosen: list[int] = []
    while len(chosen) < wanted and open_.any():
        worth = (1 - settings.diversity) * likeness - settings.diversity * redundancy
        best = int(np.where(open_, worth, -np.inf).argmax())
        chosen.append(best)
        near = candidates @ candidates[best]
        open_ &= near < settings.max_cosine
        open_[best] = False
        redundancy = near if len(chosen) == 1 else np.maximum(redundancy, near)
    return [int(rows[c]) for c in sorted(chosen, key=lambda c: float(likeness[c]))]
