"""Measures of a codec: how faithfully it decodes its own vectors, and how close it places neighbouring chunks."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lvm.errors import InputError

MISMATCHED_COSINE = 0.3
"""Mean round-trip cosine below which encoder and decoder do not match. The original system measured 0.05 to 0.11 with
the wrong encoder, and 0.63 or more with the right one."""


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` of the indices 0 to count - 1, evenly spaced, ascending, distinct."""
    return np.unique(np.linspace(0, count - 1, limit).astype(np.int64)) if count else np.empty(0, np.int64)


def token_f1(source: str, written: str) -> float:
    """F1 of two texts as multisets of words (split at white space), 0 to 1."""
    wanted, got = Counter(source.split()), Counter(written.split())
    total = wanted.total() + got.total()
    return 2 * (wanted & got).total() / total if total else 1.0


def read_back(sources: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (sacrebleu's default, 0 to 100), mean token F1 and share of exact matches (0 to 1)."""
    import sacrebleu

    if len(sources) != len(written) or not sources:
        raise InputError(
            f"expected one decoded text for each source, at least 1, got {len(written)} for {len(sources)}"
        )
    pairs = list(zip(sources, written, strict=True))
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(written), [list(sources)]).score),
        "token_f1": float(np.mean([token_f1(a, b) for a, b in pairs])),
        "exact": float(np.mean([" ".join(a.split()) == " ".join(b.split()) for a, b in pairs])),
    }


def rotated(vectors: NDArray[np.float32], cosine: float, seed: int = 0) -> NDArray[np.float32]:
    """Each unit row of (N, D) rotated in a random direction, to exactly this cosine with the original; float32.

    A predictor's error is not random, but this noise is comparable between codecs.
    """
    if not 0 < cosine <= 1:
        raise InputError(f"cosine must be above 0 and at most 1, got {cosine}")
    away = np.random.default_rng(seed).standard_normal(vectors.shape, dtype=np.float32)
    away -= (away * vectors).sum(1, keepdims=True) * vectors
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return np.asarray(cosine * vectors + np.sqrt(1 - cosine**2) * away, np.float32)


def next_chunk_retrieval(
    vectors: NDArray[np.float32], doc_ids: NDArray[np.int32], seed: int = 0
) -> dict[str, float]:
    """Retrieval of each chunk's successor in its article from all other chunks (R@1, R@10), and the mean cosines of
    successive chunks and of random pairs from different articles.

    vectors: (N, D) unit rows in article order; doc_ids: (N,). Ties count against the successor.
    Raises InputError when no chunk has a successor.
    """
    has_next = np.flatnonzero(doc_ids[:-1] == doc_ids[1:])
    if not has_next.size:
        raise InputError(
            f"none of {len(doc_ids)} chunks is followed by one of its article; expected whole articles"
        )
    ranks = np.empty(len(has_next), np.int64)
    nearness = np.empty(len(has_next), np.float32)
    for low in range(0, len(has_next), 1024):
        rows = has_next[low : low + 1024]
        cosines = vectors[rows] @ vectors.T
        here = np.arange(len(rows))
        target = cosines[here, rows + 1]
        cosines[here, rows] = -np.inf
        nearness[low : low + 1024] = target
        ranks[low : low + 1024] = (cosines >= target[:, None]).sum(1)
    first, second = np.random.default_rng(seed).integers(0, len(vectors), (2, 20_000))
    strangers = doc_ids[first] != doc_ids[second]
    first, second = first[strangers], second[strangers]
    stranger_cosine = (vectors[first] * vectors[second]).sum(1).mean() if strangers.any() else np.nan
    return {
        "next_r1": float((ranks <= 1).mean()),
        "next_r10": float((ranks <= 10).mean()),
        "neighbour_cosine": float(nearness.mean()),
        "stranger_cosine": float(stranger_cosine),
    }


def rank_correlation(
    vectors: NDArray[np.float32], others: NDArray[np.float32], doc_ids: NDArray[np.int32], seed: int = 0
) -> float:
    """Spearman correlation of two codecs' cosines over the same pairs of chunks: up to 20,000 within seven chunks of
    each other in an article, and as many random pairs. NaN if no article has two chunks.

    vectors, others: (N, D) and (N, E) unit rows in article order; doc_ids: (N,).
    """
    from scipy.stats import spearmanr

    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(doc_ids), 20_000)
    further = np.minimum(first + rng.integers(1, 8, len(first)), len(doc_ids) - 1)
    within = (doc_ids[further] == doc_ids[first]) & (further != first)
    near = np.stack((first[within], further[within]))
    if not near.size:
        return float("nan")
    a, b = np.concatenate((near, rng.integers(0, len(doc_ids), near.shape)), axis=1)
    return float(spearmanr((vectors[a] * vectors[b]).sum(1), (others[a] * others[b]).sum(1)).statistic)


def tfidf_svd_vectors(texts: Sequence[str], dim: int, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors (N, at most dim) by TF-IDF and truncated SVD, fitted on the texts themselves: a baseline codec."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    weighted = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    rank = min(dim, weighted.shape[1] - 1, weighted.shape[0] - 1)
    vectors = TruncatedSVD(rank, random_state=seed).fit_transform(weighted).astype(np.float32)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9))
