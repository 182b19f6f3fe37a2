import numpy as np
import pytest

from lvm.codec.quality import (
    next_chunk_retrieval,
    rank_correlation,
    read_back,
    rotated,
    tfidf_svd_vectors,
    token_f1,
)
from lvm.errors import InputError


def test_token_f1_counts_repeated_words_once_each() -> None:
    assert token_f1("a b c d", "a b c d") == 1.0
    assert token_f1("a b", "c d") == 0.0
    assert token_f1("a a b", "a c") == pytest.approx(2 * 1 / 5)


def test_read_back_of_equal_texts_is_perfect() -> None:
    texts = ["The river flows south to the sea.", "A second sentence of some length stands here."]
    assert read_back(texts, texts) == {"bleu": pytest.approx(100.0), "token_f1": 1.0, "exact": 1.0}
    assert read_back(texts, texts[::-1])["exact"] == 0.0


def test_unequal_numbers_of_texts_are_refused() -> None:
    with pytest.raises(InputError, match="one decoded text for each source"):
        read_back(["a"], [])


def test_retrieval_finds_neighbours_and_leaves_the_chunk_itself_out() -> None:
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((50, 64))
    vectors = np.repeat(topics, 2, axis=0) + 0.1 * rng.standard_normal((100, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = next_chunk_retrieval(vectors, np.repeat(np.arange(50), 2).astype(np.int32))
    assert found["next_r1"] == 1.0
    assert found["neighbour_cosine"] > 0.9 > 0.1 > found["stranger_cosine"]
    scattered = rng.standard_normal((100, 64)).astype(np.float32)
    assert next_chunk_retrieval(scattered, np.zeros(100, np.int32))["next_r10"] < 0.4


def test_equal_vectors_do_not_count_as_found() -> None:
    same = np.tile(np.eye(8, dtype=np.float32)[:1], (30, 1))
    assert next_chunk_retrieval(same, np.zeros(30, np.int32))["next_r10"] == 0.0


def test_articles_of_one_chunk_are_refused() -> None:
    with pytest.raises(InputError, match="expected whole articles"):
        next_chunk_retrieval(np.eye(4, dtype=np.float32), np.arange(4, dtype=np.int32))


def test_baseline_vectors_have_unit_norm() -> None:
    texts = [f"word{i} shared text number{i % 7} here" for i in range(40)]
    vectors = tfidf_svd_vectors(texts, 16)
    assert vectors.shape == (40, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_turned_vectors_lie_at_the_stated_cosine_in_different_directions() -> None:
    vectors = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    off = rotated(vectors, 0.8)
    np.testing.assert_allclose(np.linalg.norm(off, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose((off * vectors).sum(1), 0.8, atol=1e-5)
    away = off - 0.8 * vectors
    between = (away @ away.T)[~np.eye(50, dtype=bool)]
    assert np.abs(between).max() < 0.36 * 0.75
    np.testing.assert_allclose(rotated(vectors, 1.0), vectors, atol=1e-6)
    with pytest.raises(InputError, match="cosine must be above 0"):
        rotated(vectors, 0.0)


def test_rank_correlation_is_one_for_a_turned_space_and_none_for_another() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    docs = np.repeat(np.arange(40), 10).astype(np.int32)
    turn = np.linalg.qr(rng.standard_normal((32, 32)))[0].astype(np.float32)
    assert rank_correlation(vectors, vectors @ turn, docs) > 0.999
    other = rng.standard_normal((400, 16)).astype(np.float32)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    assert abs(rank_correlation(vectors, other, docs)) < 0.05
    assert np.isnan(rank_correlation(vectors, other, np.arange(400, dtype=np.int32)))
