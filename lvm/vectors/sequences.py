"""Windows over a memory-mapped array of vectors: T consecutive chunks of an article and the next one.

A window is the row number of its first chunk; contexts and targets are read batch by batch, so no vector is stored
more than once (the original system's training file holds each six times).

Letters: N chunks, M windows, B batch, T context length, D vector length.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.arguments import whole
from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError
from lvm.vectors.array import Rows, VectorArray

SPLITS = ("train", "val", "test")
VAL_SHARE = TEST_SHARE = 0.1
"""Shares of the articles; the rest is for training."""
MAX_SEED = 2**63 - 1
"""Largest seed that NumPy and torch both take."""
MAX_CONTEXT = 64
"""Longest context: articles with more chunks are rare."""
MIN_ARTICLES = 10
"""So that each share is at least one article."""


@dataclass(frozen=True)
class WindowSettings:
    """Filters that decide which windows are used for training."""

    context: int = 5
    """Context length T."""
    min_neighbour_cosine: float = 0.0
    """Minimum mean cosine of the T pairs of neighbours in a window, target included; below it the text is incoherent.
    A mean, because single pairs often differ: with the `mini` codec on Wikipedia, 4 % of the pairs are below 0, and
    20 % of the windows contain one."""
    max_neighbour_cosine: float = 0.95
    """Maximum cosine of two neighbours in a window; above it a chunk repeats the one before, except for a number or
    punctuation (3 in 80,000 chunks of Wikipedia)."""
    min_tokens: int = 5
    """Minimum tokens of each chunk in a window, end of sequence included."""
    min_chunks: int = 0
    """Minimum chunks per article; T + 1 are needed in any case."""
    allow_truncated: bool = False
    """Whether windows may contain chunks that the codec truncated."""
    allow_repeated: bool = False
    """Whether to keep windows whose text occurs more than once (an article copied under another title)."""

    def __post_init__(self) -> None:
        whole("context", self.context, 1, MAX_CONTEXT)
        for name in ("min_tokens", "min_chunks"):
            whole(name, getattr(self, name), 0)
        if not -1.0 <= self.min_neighbour_cosine < self.max_neighbour_cosine <= 1.01:
            raise InputError(
                "expected -1 <= min_neighbour_cosine < max_neighbour_cosine <= 1.01, got "
                f"{self.min_neighbour_cosine} and {self.max_neighbour_cosine}"
            )


@dataclass(frozen=True, eq=False)
class Windows:
    """M windows of T context vectors and a target, stored as row numbers of an array."""

    array: VectorArray
    starts: NDArray[np.int64]
    """(M,) row of the first context vector; the others and the target are the next T rows."""
    context: int
    """T."""
    report: dict[str, Any] = field(default_factory=dict)
    """Number of windows that each filter of `make_windows` dropped."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def identity(self) -> CodecIdentity:
        """Codec of the vectors."""
        return self.array.identity

    @property
    def rows_of_context(self) -> NDArray[np.int64]:
        """(M, T) rows of the context vectors."""
        rows: NDArray[np.int64] = self.starts[:, None] + np.arange(self.context)
        return rows

    @property
    def rows_of_target(self) -> NDArray[np.int64]:
        """(M,) rows of the targets."""
        return self.starts + self.context

    @property
    def doc_ids(self) -> NDArray[np.int32]:
        """(M,) article of each window."""
        return self.array.doc_ids[self.starts]

    def batch(self, indices: Rows | slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Contexts (B, T, D) and targets (B, D) of these windows, float32 copies."""
        rows = self.starts[indices][:, None] + np.arange(self.context + 1)
        vectors = self.array.vectors[rows].astype(np.float32)
        return vectors[:, :-1], vectors[:, -1]

    def batches(self, batch_rows: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """All windows in order, `batch_rows` at a time."""
        batch_rows = whole("batch_rows", batch_rows)
        for low in range(0, len(self), batch_rows):
            yield self.batch(slice(low, low + batch_rows))

    def subset(self, indices: Rows) -> "Windows":
        """These windows only: integers, or a mask of M booleans."""
        chosen = np.asarray(indices, np.int64) if len(indices) == 0 else np.asarray(indices)
        return Windows(self.array, self.starts[chosen], self.context, self.report)

    def last(self, context: int) -> "Windows":
        """Windows with the same targets and only the last `context` context vectors.

        Raises InputError if there are fewer.
        """
        context = whole("context", context, 1, self.context)
        return Windows(self.array, self.starts + (self.context - context), context, self.report)

    def split(self, seed: int = 0) -> dict[str, "Windows"]:
        """Windows of the train, val and test articles; no article is in two splits.

        All articles of the array are split, so filters and context length do not move an article to another split.
        Raises InputError if a split would be empty.
        """
        with_window = len(np.unique(self.doc_ids))
        if with_window < MIN_ARTICLES:
            raise InputError(
                f"expected at least {MIN_ARTICLES} articles with a window of {self.context} + 1 chunks for a "
                f"split of 80/10/10, got {with_window} in {self.array.directory}; add articles or longer ones"
            )
        parts = {}
        for name, articles in split_articles(np.unique(self.array.doc_ids), seed).items():
            parts[name] = self.subset(np.isin(self.doc_ids, articles))
            if not len(parts[name]):
                raise InputError(
                    f"none of the {len(articles)} {name} articles has a window of {self.context} + 1 chunks "
                    f"({with_window} articles have one); add articles, or longer ones"
                )
        return parts


def split_articles(doc_ids: Rows, seed: int = 0) -> dict[str, NDArray[Any]]:
    """The distinct doc ids of the train (80 %), val (10 %) and test (10 %) articles, each ascending.

    Depends only on the set of ids and the seed: not on their order, the machine, or numpy's version. If articles are
    added, few of the others change their split. Raises InputError if there are fewer than MIN_ARTICLES.
    """
    seed = whole("seed", seed, 0, MAX_SEED)
    articles = np.unique(np.asarray(doc_ids))
    if len(articles) < MIN_ARTICLES:
        raise InputError(
            f"expected at least {MIN_ARTICLES} articles with a window for a split of 80/10/10, "
            f"got {len(articles)}; add articles"
        )
    order = np.lexsort((articles, _hash(articles, seed)))
    num_test, num_val = round(len(articles) * TEST_SHARE), round(len(articles) * VAL_SHARE)
    test, val, train = np.split(articles[order], (num_test, num_test + num_val))
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def _hash(values: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014) of value and seed."""
    mixed = values.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def make_windows(array: VectorArray, settings: WindowSettings | None = None) -> Windows:
    """All windows of T + 1 consecutive chunks of one article that pass the filters, in corpus order.

    `report` has the settings and counts: candidates, windows dropped by each filter (the first that applies), and
    windows kept. Raises InputError if none is left.
    """
    if not isinstance(array, VectorArray):
        raise InputError(f"array is a {type(array).__name__}, expected what lvm.open_vectors returns")
    settings = settings or WindowSettings()
    if not isinstance(settings, WindowSettings):
        raise InputError(f"settings are a {type(settings).__name__}, expected lvm.WindowSettings(context=5)")
    length = settings.context + 1
    doc_ids = np.asarray(array.doc_ids)
    positions = np.asarray(array.positions)
    num_candidates = max(len(array) - length + 1, 0)
    last = slice(length - 1, length - 1 + num_candidates)
    # Rows are sorted and positions unique, so the same article and a distance of T mean that there is no gap.
    same_article = doc_ids[:num_candidates] == doc_ids[last]
    no_gap = positions[last] - positions[:num_candidates] == settings.context
    starts = np.flatnonzero(same_article & no_gap)
    report: dict[str, Any] = {"settings": asdict(settings), "chunks": len(array), "candidates": len(starts)}

    def keep(reason: str, bad: NDArray[np.bool_], width: int) -> None:
        """Drop the windows with any of their first `width` rows marked bad."""
        nonlocal starts
        before = np.concatenate(([0], np.cumsum(bad)))
        stay = before[starts + width] == before[starts]
        report[reason] = int(len(starts) - stay.sum())
        starts = starts[stay]

    cosines = np.asarray(array.neighbour_cosines)
    articles, inverse, counts = np.unique(doc_ids, return_inverse=True, return_counts=True)
    keep("dropped_short_article", counts[inverse] < settings.min_chunks, length)
    keep("dropped_short_chunk", np.asarray(array.num_tokens) < settings.min_tokens, length)
    keep("dropped_truncated", np.asarray(array.truncated) & (not settings.allow_truncated), length)
    # T pairs of T + 1 rows: cosine i is that of rows i and i + 1.
    summed = np.concatenate(([0.0], np.cumsum(cosines, dtype=np.float64)))
    sums = summed[starts + settings.context] - summed[starts]
    coherent = sums >= settings.min_neighbour_cosine * settings.context - 1e-9
    report["dropped_jump"] = int(len(starts) - coherent.sum())
    starts = starts[coherent]
    keep("dropped_near_duplicate", cosines > settings.max_neighbour_cosine, length - 1)
    if settings.allow_repeated:
        report["dropped_repeated"] = 0
    else:
        first = _first_of_each(np.asarray(array.text_keys), starts, length)
        report["dropped_repeated"] = int(len(starts) - len(first))
        starts = starts[first]
    report["kept"] = len(starts)
    report["articles"] = len(articles)
    report["articles_with_window"] = len(np.unique(doc_ids[starts]))
    if not len(starts):
        dropped = ", ".join(f"{k} {v}" for k, v in report.items() if k.startswith("dropped_") and v)
        raise InputError(
            f"no window of {settings.context} + 1 consecutive chunks in {array.directory} "
            f"({len(array)} chunks of {len(articles)} articles, {report['candidates']} candidates; "
            f"{dropped or 'articles are too short'}); expected at least one. "
            "Take longer articles, or loosen WindowSettings."
        )
    return Windows(array, starts.astype(np.int64), settings.context, report)


def _first_of_each(text_keys: NDArray[np.uint64], starts: NDArray[Any], length: int) -> NDArray[Any]:
    """Indices, ascending, of the first window of each distinct text."""
    keys = np.zeros(len(starts), np.uint64)
    for offset in range(length):
        keys = keys * np.uint64(0x100000001B3) + text_keys[starts + offset]
    _, first = np.unique(keys, return_index=True)
    return np.sort(first)
