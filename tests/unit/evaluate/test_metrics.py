"""Each measure against a case worked out by hand, or against the slow way of computing it."""

import numpy as np
import pytest
import torch

from lvm.errors import InputError
from lvm.evaluate.metrics import (
    HISTOGRAM_EDGES,
    Pool,
    Ranks,
    clustered_interval,
    cosines,
    histogram,
    measure_latency,
    peak_bytes,
    ranks_in_article,
    ranks_in_pool,
    score_windows,
    summarise_attention,
    summarise_ranks,
    text_scores,
)
from lvm.predict.steer import unit

DIM = 16
CONTEXT = 5


def made_array(num_articles: int = 6, num_chunks: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Float16 unit vectors and their doc ids, sorted by article."""
    random = np.random.default_rng(seed)
    vectors = unit(random.standard_normal((num_articles * num_chunks, DIM))).astype(np.float16)
    return vectors, np.repeat(np.arange(num_articles, dtype=np.int32) * 3, num_chunks)


def windows_of(doc_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Context rows (M, T) and target rows (M,) of every window."""
    starts = np.array([s for s in range(len(doc_ids) - CONTEXT) if doc_ids[s] == doc_ids[s + CONTEXT]])
    return starts[:, None] + np.arange(CONTEXT), starts + CONTEXT


def test_cosines_do_not_depend_on_length_and_zero_has_none() -> None:
    first = np.array([[3, 4], [1, 0], [0, 0]], dtype=np.float32)
    second = np.array([[30, 40], [0, 2], [1, 1]], dtype=np.float32)
    np.testing.assert_allclose(cosines(first, second), [1, 0, 0], atol=1e-6)


def test_interval_is_as_wide_as_articles_differ_not_windows() -> None:
    # Ten articles, each with 200 equal windows: the windows add no information.
    per_article = np.linspace(0, 1, 10)
    values, articles = np.repeat(per_article, 200), np.repeat(np.arange(10), 200)
    interval = clustered_interval(values, articles)
    one_each = clustered_interval(per_article, np.arange(10))
    assert [interval.mean, interval.low, interval.high] == pytest.approx(
        [one_each.mean, one_each.low, one_each.high]
    )
    assert interval.mean == pytest.approx(0.5)
    assert interval.num_articles == 10
    # 1.96 standard errors of ten draws of a value with standard deviation 0.319, either way.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.319 / np.sqrt(10), rel=0.15)
    naive = clustered_interval(values, np.arange(len(values)))
    assert (naive.high - naive.low) < (interval.high - interval.low) / 5


def test_interval_weights_articles_by_their_windows() -> None:
    values = np.array([0.0] * 9 + [1.0])
    articles = np.array([7] * 9 + [2])
    interval = clustered_interval(values, articles)
    assert interval.mean == pytest.approx(0.1)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one test window"):
        clustered_interval(np.array([]), np.array([]))


def test_interval_is_the_same_however_many_draws_fit_a_block() -> None:
    values = np.random.default_rng(0).random(5000)
    # 5,000 articles split the 1,000 draws into two blocks.
    interval = clustered_interval(values, np.arange(5000))
    assert interval.low < values.mean() < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(5000), rel=0.15)


def test_rank_in_pool_equals_the_slow_way() -> None:
    vectors, doc_ids = made_array()
    context_rows, target_rows = windows_of(doc_ids)
    predicted = unit(np.random.default_rng(1).standard_normal((len(target_rows), DIM)))
    truth = unit(vectors[target_rows].astype(np.float32))
    pool = Pool.draw(vectors, 30, seed=2)
    found = ranks_in_pool(predicted, truth, target_rows, context_rows, pool)
    for i, target in enumerate(target_rows):
        rows = (set(pool.rows.tolist()) | {int(target)}) - set(context_rows[i].tolist())
        scores = {r: float(predicted[i] @ unit(vectors[r].astype(np.float32))) for r in rows}
        own = float(predicted[i] @ truth[i])
        assert found.ranks[i] == 1 + sum(s >= own - 1e-6 for r, s in scores.items() if r != target)
        assert found.candidates[i] == len(rows)


def test_rank_in_article_equals_the_slow_way() -> None:
    vectors, doc_ids = made_array()
    context_rows, target_rows = windows_of(doc_ids)
    order = np.random.default_rng(5).permutation(len(target_rows))
    context_rows, target_rows = context_rows[order], target_rows[order]
    predicted = unit(np.random.default_rng(1).standard_normal((len(target_rows), DIM)))
    truth = unit(vectors[target_rows].astype(np.float32))
    found = ranks_in_article(predicted, truth, target_rows, context_rows, vectors, doc_ids)
    for i, target in enumerate(target_rows):
        rows = set(np.flatnonzero(doc_ids == doc_ids[target]).tolist()) - set(context_rows[i].tolist())
        scores = {r: float(predicted[i] @ unit(vectors[r].astype(np.float32))) for r in rows}
        own = float(predicted[i] @ truth[i])
        assert found.ranks[i] == 1 + sum(s >= own - 1e-6 for r, s in scores.items() if r != target)
        assert found.candidates[i] == len(rows) == 12 - CONTEXT


def test_a_duplicate_of_the_true_chunk_counts_against_the_prediction() -> None:
    vectors, doc_ids = made_array()
    vectors[11] = vectors[5]
    context_rows, target_rows = np.arange(5)[None], np.array([5])
    truth = unit(vectors[[5]].astype(np.float32))
    pool = Pool.draw(vectors, len(vectors), seed=0)
    assert ranks_in_article(truth, truth, target_rows, context_rows, vectors, doc_ids).ranks.tolist() == [2]
    assert ranks_in_pool(truth, truth, target_rows, context_rows, pool).ranks.tolist() == [2]


def test_pool_of_all_rows_knows_where_each_row_is() -> None:
    vectors, _ = made_array()
    pool = Pool.draw(vectors, 10_000, seed=0)
    assert pool.rows.tolist() == list(range(len(vectors)))
    some = Pool.draw(vectors, 10, seed=0)
    assert len(set(some.rows.tolist())) == 10
    places = some.columns_of(np.arange(len(vectors)))
    assert (places >= 0).sum() == 10
    assert (some.rows[places[places >= 0]] == np.flatnonzero(places >= 0)).all()


def test_rank_summary_counts_hits_and_chance() -> None:
    ranks = Ranks(np.array([1, 2, 6, 1]), np.array([4, 20, 8, 1]))
    summary = summarise_ranks(ranks)
    # The last window has no rival and is left out.
    assert summary["windows"] == 3
    assert summary["mean_candidates"] == pytest.approx(32 / 3)
    assert summary["r1"] == pytest.approx(1 / 3)
    assert summary["r5"] == pytest.approx(2 / 3)
    assert summary["r10"] == 1.0
    assert summary["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 6) / 3)
    assert summary["chance_r5"] == pytest.approx((1 + 5 / 20 + 5 / 8) / 3)
    harmonic = [sum(1 / i for i in range(1, n + 1)) / n for n in (4, 20, 8)]
    assert summary["chance_mrr"] == pytest.approx(sum(harmonic) / 3)


def test_rank_summary_without_rivals_is_none() -> None:
    summary = summarise_ranks(Ranks(np.array([1, 1]), np.array([1, 1])))
    assert summary["windows"] == 0
    assert summary["r1"] is summary["chance_mrr"] is summary["mean_candidates"] is None


def test_window_scores_of_copying_the_last_vector() -> None:
    vectors, doc_ids = made_array()
    context_rows, target_rows = windows_of(doc_ids)
    contexts = vectors[context_rows].astype(np.float32)
    targets = vectors[target_rows].astype(np.float32)

    def batches() -> object:
        for low in range(0, len(targets), 4):
            part = slice(low, low + 4)
            yield contexts[part], targets[part], context_rows[part], target_rows[part]

    pool = Pool.draw(vectors, 20, seed=0)
    scores = score_windows(lambda c: 2 * c[:, -1], None, batches(), pool, vectors, doc_ids)  # type: ignore[arg-type]
    last = contexts[:, -1]
    np.testing.assert_allclose(scores.cosine, cosines(last, targets), atol=1e-6)
    np.testing.assert_allclose(scores.margin, scores.cosine - 1, atol=1e-6)
    np.testing.assert_allclose(scores.norm, 2, atol=1e-2)
    np.testing.assert_allclose(scores.squared_error, ((2 * last - targets) ** 2).mean(axis=1), atol=1e-6)
    assert len(scores.in_article.ranks) == len(scores.in_pool.candidates) == len(targets)


def test_a_predictor_that_breaks_its_contract_is_named_by_row() -> None:
    vectors, doc_ids = made_array()
    context_rows, target_rows = windows_of(doc_ids)
    batch = (
        vectors[context_rows].astype(np.float32),
        vectors[target_rows].astype(np.float32),
        context_rows,
        target_rows,
    )
    pool = Pool.draw(vectors, 20, seed=0)

    def nan_at_third(contexts: np.ndarray) -> np.ndarray:
        predicted = contexts[:, -1].copy()
        predicted[2, 0] = np.nan
        return predicted

    with pytest.raises(InputError, match="vector row 7 holds NaN"):
        score_windows(nan_at_third, None, iter([batch]), pool, vectors, doc_ids)
    with pytest.raises(InputError, match=r"returned shape \(42, 5, 16\), expected \(42, 16\)"):
        score_windows(lambda c: c, None, iter([batch]), pool, vectors, doc_ids)
    with pytest.raises(InputError, match="no test windows"):
        score_windows(nan_at_third, None, iter([]), pool, vectors, doc_ids)


def test_histogram_counts_every_value_even_beyond_the_ends() -> None:
    counts = histogram(np.array([-0.9, -0.199, 0.005, 0.015, 1.0, 1.0000001]))
    assert sum(counts) == 6
    assert counts[0] == 2
    assert counts[-1] == 2
    assert counts[int(np.searchsorted(HISTOGRAM_EDGES, 0.01, side="right")) - 1] == 2


def test_attention_summary_is_by_place() -> None:
    weights = np.array([[0.1, 0.9], [0.3, 0.7], [0.2, 0.8]])
    first, last = summarise_attention(weights)
    assert first["mean"] == pytest.approx(0.2)
    assert first["p50"] == pytest.approx(0.2)
    assert last["p10"] == pytest.approx(0.72)


def test_text_scores_of_equal_and_of_foreign_texts() -> None:
    truths = ["the river flooded the whole valley in spring", "copper wires carry the current to every house"]
    same = text_scores(truths, truths)
    assert same["rouge1"] == same["rouge2"] == same["rougeL"] == 1.0
    assert same["bleu"] == pytest.approx(100)
    other = text_scores(["", "zebra zebra"], truths)
    assert other["rouge1"] == other["rougeL"] == 0.0
    assert other["bleu"] < 1
    half = text_scores(["the river", truths[1]], truths)
    # Two of two words found, two of eight: F = 2 * 1 * 0.25 / 1.25 = 0.4, averaged with 1.
    assert half["rouge1"] == pytest.approx((0.4 + 1) / 2)


def test_text_scores_need_a_truth_for_each_text() -> None:
    with pytest.raises(InputError, match="got 1 decoded texts for 2 true ones"):
        text_scores(["a"], ["a", "b"])


def test_latency_is_measured_on_the_asked_batch_and_warm_up_is_dropped() -> None:
    shapes: list[tuple[int, ...]] = []

    def predict(contexts: np.ndarray) -> np.ndarray:
        shapes.append(contexts.shape)
        return contexts[:, -1]

    latency = measure_latency(predict, CONTEXT, DIM, batch=32, repeats=20)
    assert set(shapes) == {(32, CONTEXT, DIM)}
    assert (latency.repeats, len(shapes)) == (20, 25)
    assert 0 < latency.p50_ms <= latency.p95_ms <= latency.p99_ms
    assert latency.vector_ms == pytest.approx(latency.mean_ms / 32)


def test_latency_of_a_slow_predictor_stops_at_its_budget_but_not_before_five_calls() -> None:
    calls: list[int] = []

    def predict(contexts: np.ndarray) -> np.ndarray:
        calls.append(len(contexts))
        return contexts[:, -1]

    latency = measure_latency(predict, CONTEXT, DIM, batch=1, repeats=1000, budget_s=0.0)
    assert (latency.repeats, len(calls)) == (5, 6)


def test_peak_bytes_sees_what_a_call_holds() -> None:
    def predict(contexts: np.ndarray) -> np.ndarray:
        wide = torch.zeros(len(contexts), 250_000)  # 1 MB a row
        return np.asarray((wide + 1)[:, :DIM])

    measured = peak_bytes(predict, CONTEXT, DIM, batch=3, device="cpu")
    assert 6_000_000 <= measured < 6_100_000
