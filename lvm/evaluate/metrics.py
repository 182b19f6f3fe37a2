"""The measures of the evaluation.

Letters: B windows in a batch, M windows in all, T chunks in a context, D vector length, P rows in a pool.
Vectors are scored batch by batch, so memory does not grow with the number of windows.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lvm.errors import InputError
from lvm.predict.steer import unit

Float32Array = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Predict = Callable[[Float32Array], Float32Array]
"""(B, T, D) contexts to (B, D) predictions."""

TIE = 1e-6
"""Cosines closer than this are tied, and a tie counts against the prediction. float32 sums over 768 products differ by
about 1e-7 with the order of summation."""


def cosines(first: Floats, second: Floats) -> Float32Array:
    """Row by row cosine of two (B, D) arrays, (B,) float32; 0 where a row is all zeros."""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = np.einsum("bd,bd->b", first, second)
    result: Float32Array = np.zeros(len(products), dtype=np.float32)
    np.divide(products, lengths, out=result, where=lengths > 0, casting="same_kind")
    return result


@dataclass(frozen=True)
class Spread:
    """One measure over trainings that differ only in their seed."""

    mean: float
    deviation: float
    """Sample standard deviation (n - 1)."""
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least two values."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)), list(values))


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    """2.5 % quantile of the resampled means."""
    high: float
    """97.5 % quantile of the resampled means."""
    num_articles: int
    """Articles in the sample."""


def clustered_interval(values: Floats, articles: Ints, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of (M,) values and its 95 % bootstrap interval, resampling whole articles.

    Windows of one article overlap and share a topic: resampling windows would give far too narrow an interval.
    articles: (M,) each value's article. The same seed draws the same articles for every model. Raises InputError when
    there are no values.
    """
    if len(values) == 0:
        raise InputError("no values to average; expected at least one test window")
    _, groups = np.unique(articles, return_inverse=True)
    sums = np.bincount(groups, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(groups).astype(np.float64)
    num_articles = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    # Draws are (rows, articles) int64; 4 M of them are 32 MB.
    rows = max(1, 4_000_000 // num_articles)
    for first in range(0, resamples, rows):
        drawn = rng.integers(num_articles, size=(min(rows, resamples - first), num_articles))
        means[first : first + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), num_articles)


@dataclass(frozen=True)
class Pool:
    """Candidate chunks for retrieval over the corpus."""

    rows: NDArray[np.int64]
    """(P,) rows of the vector array, ascending, unique."""
    vectors: Float32Array
    """(P, D) their vectors, scaled to norm 1: stored as float16 their norms are off by up to 2e-4, which would decide
    between near-duplicates."""

    @classmethod
    def draw(cls, vectors: Floats, size: int, seed: int) -> "Pool":
        """`size` random rows of the (N, D) array, or all where there are fewer."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(vectors), size=min(size, len(vectors)), replace=False)
        rows = np.sort(chosen.astype(np.int64))
        return cls(rows, unit(np.asarray(vectors[rows], dtype=np.float32)))

    def columns_of(self, rows: Ints) -> NDArray[np.int64]:
        """Index in the pool of each of `rows` (any shape), -1 where it is not in the pool."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[places] == rows, places, -1).astype(np.int64)


@dataclass(frozen=True)
class Ranks:
    """Ranks of the true next chunks."""

    ranks: NDArray[np.int64]
    """1 is best."""
    candidates: NDArray[np.int64]
    """Number of candidates, the true one included."""


def ranks_in_pool(
    predicted: Float32Array, truth: Float32Array, target_rows: Ints, context_rows: Ints, pool: Pool
) -> Ranks:
    """Rank of the truth among itself and the pool, without the window's context chunks.

    predicted, truth: (B, D) unit rows; target_rows: (B,), context_rows: (B, T) rows of the vector array.
    Context chunks are known not to be the next chunk; they would rank first for a predictor that repeats its context.
    """
    scores = predicted @ pool.vectors.T
    barred = pool.columns_of(np.concatenate([context_rows, target_rows[:, None]], axis=1))
    windows, places = np.nonzero(barred >= 0)
    scores[windows, barred[windows, places]] = -np.inf
    true_scores = np.einsum("bd,bd->b", predicted, truth)
    ahead = (scores >= true_scores[:, None] - TIE).sum(axis=1)
    return Ranks(1 + ahead, 1 + len(pool.rows) - (barred >= 0).sum(axis=1))


def ranks_in_article(
    predicted: Float32Array,
    truth: Float32Array,
    target_rows: Ints,
    context_rows: Ints,
    vectors: Floats,
    doc_ids: Ints,
) -> Ranks:
    """Rank of the truth among all chunks of its article, without the window's context chunks.

    vectors: (N, D) and doc_ids: (N,), sorted by doc_id, as in the vector array. Chunks before the context are
    candidates, too: the predictor has to know the order.
    """
    ranks = np.empty(len(predicted), dtype=np.int64)
    candidates = np.empty(len(predicted), dtype=np.int64)
    true_scores = np.einsum("bd,bd->b", predicted, truth)
    docs = doc_ids[target_rows]
    for doc in np.unique(docs):
        windows = np.nonzero(docs == doc)[0]
        first, last = np.searchsorted(doc_ids, [doc, doc + 1])
        scores = predicted[windows] @ unit(np.asarray(vectors[first:last], dtype=np.float32)).T
        own = np.concatenate([context_rows[windows], target_rows[windows, None]], axis=1) - first
        np.put_along_axis(scores, own, -np.inf, axis=1)
        ranks[windows] = 1 + (scores >= true_scores[windows, None] - TIE).sum(axis=1)
        candidates[windows] = last - first - context_rows.shape[1]
    return Ranks(ranks, candidates)


def summarise_ranks(found: Ranks) -> dict[str, float | None]:
    """Recall at 1, 5 and 10, mean reciprocal rank, the same for a random order (`chance_`), and counts.

    Windows whose only candidate is the truth are left out; `windows` counts the others. Without any, every measure is
    None.
    """
    kept = found.candidates > 1
    ranks, candidates = found.ranks[kept], found.candidates[kept]
    if len(ranks) == 0:
        nothing = {
            f"{prefix}{name}": None for name in ("r1", "r5", "r10", "mrr") for prefix in ("", "chance_")
        }
        return {"windows": 0, "mean_candidates": None, **nothing}
    harmonic = np.cumsum(1.0 / np.arange(1, candidates.max() + 1))
    summary: dict[str, float | None] = {"windows": len(ranks), "mean_candidates": float(candidates.mean())}
    for k in (1, 5, 10):
        summary[f"r{k}"] = float((ranks <= k).mean())
        summary[f"chance_r{k}"] = float((np.minimum(k, candidates) / candidates).mean())
    summary["mrr"] = float((1.0 / ranks).mean())
    summary["chance_mrr"] = float((harmonic[candidates - 1] / candidates).mean())
    return summary


@dataclass(frozen=True)
class WindowScores:
    """One predictor's measures, one value per window, in the windows' order."""

    cosine: Float32Array
    """(M,) cosine of prediction and true next vector."""
    squared_error: Float32Array
    """(M,) mean over D of the squared difference, before the prediction is normalised."""
    norm: Float32Array
    """(M,) norm of the prediction before it is normalised; expected to be 1."""
    margin: Float32Array
    """(M,) cosine(prediction, truth) - cosine(prediction, last context vector); below 0 the prediction is closer to the
    last chunk read."""
    in_article: Ranks
    in_pool: Ranks


def score_windows(
    predict: Predict,
    search: Predict | None,
    batches: Iterator[tuple[Float32Array, Float32Array, Ints, Ints]],
    pool: Pool,
    vectors: Floats,
    doc_ids: Ints,
) -> WindowScores:
    """All measures for each window of `batches`: contexts (B, T, D), targets (B, D), context rows (B, T), target rows
    (B,).

    search: the rank head, whose vectors are ranked in place of the predictions; None without one. Raises InputError
    when the predictor returns a wrong shape or a number that is not finite, naming the first such row.
    """
    parts: list[WindowScores] = []
    for contexts, targets, context_rows, target_rows in batches:
        predicted = np.asarray(predict(contexts), dtype=np.float32)
        if predicted.shape != targets.shape:
            raise InputError(
                f"the predictor returned shape {predicted.shape}, expected {targets.shape}; "
                "a predictor maps (B, T, D) contexts to (B, D) vectors"
            )
        finite = np.isfinite(predicted).all(axis=1)
        if not finite.all():
            row = int(target_rows[np.nonzero(~finite)[0][0]])
            raise InputError(
                f"the prediction for vector row {row} holds NaN or infinity, expected finite numbers; "
                "train this model again"
            )
        direction = unit(predicted)
        truth = unit(targets)
        sought = direction if search is None else unit(search(contexts))
        cosine = np.einsum("bd,bd->b", direction, truth)
        parts.append(
            WindowScores(
                cosine=cosine,
                squared_error=((predicted - targets) ** 2).mean(axis=1),
                norm=np.linalg.norm(predicted, axis=1),
                margin=cosine - cosines(direction, contexts[:, -1]),
                in_article=ranks_in_article(sought, truth, target_rows, context_rows, vectors, doc_ids),
                in_pool=ranks_in_pool(sought, truth, target_rows, context_rows, pool),
            )
        )
    if not parts:
        raise InputError("no test windows; expected at least one")

    def joined(ranks: Sequence[Ranks]) -> Ranks:
        return Ranks(np.concatenate([r.ranks for r in ranks]), np.concatenate([r.candidates for r in ranks]))

    return WindowScores(
        cosine=np.concatenate([p.cosine for p in parts]),
        squared_error=np.concatenate([p.squared_error for p in parts]),
        norm=np.concatenate([p.norm for p in parts]),
        margin=np.concatenate([p.margin for p in parts]),
        in_article=joined([p.in_article for p in parts]),
        in_pool=joined([p.in_pool for p in parts]),
    )


HISTOGRAM_EDGES = np.linspace(-0.2, 1.0, 61)
"""Bins of the cosine plots, 0.02 wide; values outside count in the end bins."""


def histogram(values: Floats) -> list[int]:
    """Counts of (M,) cosines in the bins of HISTOGRAM_EDGES; they sum to M."""
    clipped = np.clip(values, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return [int(n) for n in np.histogram(clipped, HISTOGRAM_EDGES)[0]]


def summarise_attention(weights: Floats) -> list[dict[str, float]]:
    """Mean and quantiles of (M, T) attention weights for each of the T positions, oldest chunk first."""
    quantiles = np.quantile(weights, [0.1, 0.25, 0.5, 0.75, 0.9], axis=0)
    names = ("p10", "p25", "p50", "p75", "p90")
    return [
        {"mean": float(weights[:, t].mean())} | {name: float(quantiles[i, t]) for i, name in enumerate(names)}
        for t in range(weights.shape[1])
    ]


def text_scores(decoded: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1/2/L F-measure, 0..1 (rouge-score, no stemming), and corpus BLEU, 0..100 (sacrebleu, tokenizer 13a).

    Raises InputError on unequal or zero counts.
    """
    if len(decoded) != len(truths) or not truths:
        raise InputError(f"got {len(decoded)} decoded texts for {len(truths)} true ones; expected as many")
    # Imported here as both take about a second, and only decoded text needs them.
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scored = [scorer.score(truth, text) for text, truth in zip(decoded, truths, strict=True)]
    means = {
        name: float(np.mean([s[name].fmeasure for s in scored])) for name in ("rouge1", "rouge2", "rougeL")
    }
    return means | {"bleu": float(sacrebleu.corpus_bleu(list(decoded), [list(truths)]).score)}


LATENCY_BATCHES = (1, 32, 128)
"""Batch sizes at which latency is measured."""


@dataclass(frozen=True)
class Latency:
    """Wall time of one call at one batch size, in milliseconds."""

    batch: int
    repeats: int
    """Timed calls, after the warm-up."""
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    vector_ms: float
    """mean_ms / batch."""


def measure_latency(
    predict: Predict, context: int, dim: int, batch: int, repeats: int = 200, budget_s: float = 1.0
) -> Latency:
    """Latency of `predict` on random unit contexts of one batch size.

    One process, all its threads, float32 contexts in memory; copies to and from a device are included. Up to five
    warm-up calls are dropped. Stops after `repeats` calls or `budget_s` seconds, but not before five calls; the warm-up
    has the same budget.
    """
    rng = np.random.default_rng(0)
    contexts = unit(rng.standard_normal((batch, context, dim), dtype=np.float32))
    began = time.perf_counter()
    for _ in range(5):
        predict(contexts)
        if time.perf_counter() - began > budget_s:
            break
    times_ms: list[float] = []
    began = time.perf_counter()
    while len(times_ms) < repeats and (len(times_ms) < 5 or time.perf_counter() - began < budget_s):
        start = time.perf_counter()
        predict(contexts)
        times_ms.append((time.perf_counter() - start) * 1000)
    p50, p95, p99 = np.quantile(times_ms, [0.5, 0.95, 0.99])
    mean = float(np.mean(times_ms))
    return Latency(batch, len(times_ms), mean, float(p50), float(p95), float(p99), mean / batch)


def peak_bytes(predict: Predict, context: int, dim: int, batch: int, device: str) -> int:
    """Peak memory of one call beyond the weights, in bytes, by torch's allocator."""
    contexts = np.zeros((batch, context, dim), dtype=np.float32)
    predict(contexts)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        predict(contexts)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        predict(contexts)
    # The profiler's tables give memory by operator; the peak is the maximum running sum over its raw events.
    live = peak = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
