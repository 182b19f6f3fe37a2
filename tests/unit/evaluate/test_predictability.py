"""Ridge retrieval of the next chunk, on vectors whose next one is known."""

import numpy as np
import pytest

from lvm.errors import InputError
from lvm.evaluate.predictability import ridge_retrieval

DIM = 16


def corpus(num_articles: int, length: int, known: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors; where `known`, each is a fixed rotation of the one five before it, else noise."""
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.standard_normal((DIM, DIM)))
    rows = []
    for _ in range(num_articles):
        article = list(random.standard_normal((5, DIM)))
        while len(article) < length:
            article.append(turn @ article[-5] if known else random.standard_normal(DIM))
        rows += article
    vectors = np.asarray(rows, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.repeat(np.arange(num_articles, dtype=np.int32), length)


def test_what_is_linear_is_found_and_noise_is_not() -> None:
    vectors, docs = corpus(120, 8, known=True)
    found = ridge_retrieval(vectors, docs, num_windows=250, num_candidates=200)
    assert found["r1"] > 0.95
    assert found["cosine"] > 0.95
    vectors, docs = corpus(120, 8, known=False)
    chance = ridge_retrieval(vectors, docs, num_windows=250, num_candidates=200)
    assert chance["r10"] < 0.15  # 10 of 195


def test_candidates_are_whole_articles_at_the_end_and_fit_nothing() -> None:
    vectors, docs = corpus(60, 8, known=True)
    found = ridge_retrieval(vectors, docs, num_windows=10_000, num_candidates=100)
    assert found["candidates"] == 104  # thirteen articles of eight
    assert found["asked_windows"] == 13 * 3
    assert found["fitted_windows"] == (60 - 13) * 3 * 9 // 10
    # Other vectors on the candidates' side leave the regression as it was.
    changed = vectors.copy()
    changed[-104:] = corpus(13, 8, known=False, seed=5)[0]
    assert ridge_retrieval(changed, docs, 10_000, 100)["penalty"] == found["penalty"]
    assert ridge_retrieval(changed, docs, 10_000, 100)["r10"] < 0.3


def test_the_context_is_no_candidate() -> None:
    # All vectors of an article alike but for a trace: the context would outrank the true next chunk.
    random = np.random.default_rng(3)
    centres = np.repeat(random.standard_normal((60, DIM)), 7, axis=0)
    vectors = (centres + 0.01 * random.standard_normal(centres.shape)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    docs = np.repeat(np.arange(60, dtype=np.int32), 7)
    found = ridge_retrieval(vectors, docs, num_windows=60, num_candidates=70)
    # Of an article's seven chunks two can be the answer once the context is out.
    assert found["r1"] > 0.35


def test_too_little_text_is_said() -> None:
    vectors, docs = corpus(10, 4, known=False)
    with pytest.raises(InputError, match="give 0 windows before the last 20 chunks and 0 in them"):
        ridge_retrieval(vectors, docs, 100, 20)
