"""Snap and context building against an exact index over vectors small enough to check by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from lvm.errors import InputError
from lvm.predict.steer import FillSettings, SnapSettings, build_context, snap

DIM = 4


class ExactIndex:
    """Brute force search that pads with row -1, as faiss does."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.asked: list[int] = []

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(k)
        scores = queries @ self.vectors.T.astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)
        found = np.take_along_axis(scores, order, axis=1)
        pad = max(0, k - order.shape[1])
        return (
            np.pad(found, ((0, 0), (0, pad)), constant_values=-np.inf).astype(np.float32),
            np.pad(order, ((0, 0), (0, pad)), constant_values=-1),
        )

    def texts(self, rows: Sequence[int]) -> list[str]:
        return [f"chunk {row}" for row in rows]


def unit(*rows: Sequence[float]) -> np.ndarray:
    array = np.array(rows, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


AXES = np.eye(DIM, dtype=np.float32)


def test_snap_is_the_weighted_mean_of_the_neighbours() -> None:
    corpus = unit([1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0])
    prediction = unit([3, 4, 0, 0])
    only_snap = SnapSettings(neighbours=3, blend=(1, 0, 0), drift_blend=(1, 0, 0))
    snapped = snap(prediction, prediction, prediction, ExactIndex(corpus), corpus, only_snap)
    # Cosines 0.6, 0.8 and -0.6; the negative one is clipped.
    np.testing.assert_allclose(snapped.vectors, unit([0.6, 0.8, 0, 0]), atol=1e-6)
    assert snapped.rows.tolist() == [[1, 0, 2]]


def test_snap_blends_75_15_10_near_the_topic_and_60_25_15_when_drifted() -> None:
    corpus = AXES[:1]
    prediction = np.repeat(AXES[:1], 3, axis=0)
    query = np.stack([AXES[0], AXES[1], AXES[0]])
    mean = np.stack([unit([1, 1, 0, 0])[0], AXES[0], AXES[2]]) * 0.5  # its length must not matter
    snapped = snap(prediction, query, mean, ExactIndex(corpus), corpus, SnapSettings(neighbours=1))
    root = 1 / np.sqrt(2)
    assert snapped.drifted.tolist() == [False, True, True]
    np.testing.assert_allclose(
        snapped.vectors,
        unit(
            [0.75 + 0.15 + 0.10 * root, 0.10 * root, 0, 0],
            [0.60 + 0.15, 0.25, 0, 0],
            [0.60 + 0.25, 0, 0.15, 0],
        ),
        atol=1e-6,
    )


def test_snap_without_a_like_neighbour_keeps_the_prediction_in_its_place() -> None:
    corpus = -AXES[:1]
    snapped = snap(AXES[:1], AXES[1:2], AXES[2:3], ExactIndex(corpus), corpus)
    np.testing.assert_allclose(snapped.vectors, unit([0.60, 0.25, 0.15, 0]), atol=1e-6)


def test_snap_searches_on_until_enough_rows_are_not_barred() -> None:
    rng = np.random.default_rng(0)
    corpus = unit(*rng.standard_normal((400, DIM)))
    index = ExactIndex(corpus)
    predictions = corpus[:300]
    near = np.argsort(-(predictions @ corpus.T), axis=1)[:, :70]

    def barred(rows: np.ndarray) -> np.ndarray:
        return (rows[:, :, None] == near[:, None, :]).any(axis=2)

    settings = SnapSettings(neighbours=16)
    snapped = snap(predictions, predictions, predictions, index, corpus, settings, barred)
    assert not barred(snapped.rows).any()
    assert (snapped.rows >= 0).all()
    assert index.asked == [64, 256]
    np.testing.assert_array_equal(snapped.rows, np.argsort(-(predictions @ corpus.T), axis=1)[:, 70:86])


def test_snap_with_fewer_free_rows_than_wanted_uses_those() -> None:
    snapped = snap(
        AXES[:1], AXES[:1], AXES[:1], ExactIndex(AXES), AXES, SnapSettings(), lambda rows: rows != 0
    )
    assert snapped.rows.tolist() == [[0, -1, -1, -1]]
    np.testing.assert_allclose(snapped.vectors, AXES[:1], atol=1e-6)


def test_five_chunks_of_text_are_a_sequence_and_of_more_the_last_count() -> None:
    vectors = unit(*np.random.default_rng(1).standard_normal((7, DIM)))
    context = build_context(vectors, [str(i) for i in range(7)])
    assert (context.mode, context.texts) == ("seq", ("2", "3", "4", "5", "6"))
    np.testing.assert_allclose(context.vectors, vectors[2:], atol=1e-6)


def test_one_chunk_is_completed_from_the_corpus_with_the_likest_next_to_it() -> None:
    corpus = unit([1, 2, 0, 0], [1, 0, 1, 0], [1, 0, 0, 3], [1, 1, 1, 1])
    index = ExactIndex(corpus)
    context = build_context(AXES[:1], ["mine"], index=index, corpus=index)
    assert context.mode == "ann"
    assert context.origins == ("retrieved",) * 4 + ("text",)
    assert context.texts[-2:] == ("chunk 1", "mine")
    likeness = (context.vectors @ AXES[0]).tolist()
    assert likeness == sorted(likeness)


def test_supports_are_diverse() -> None:
    # Rows 0 and 1 are nearest but nearly the same; row 2 is a bit farther and says something else.
    corpus = unit([1, 0.50, 0, 0], [1, 0.55, 0.2, 0], [1, 0, 0, 0.75])
    index = ExactIndex(corpus)

    def taken(diversity: float) -> set[str]:
        settings = FillSettings(diversity=diversity, max_cosine=1.1)
        return set(build_context(AXES[:1], ["mine"], 3, index=index, corpus=index, settings=settings).texts)

    assert taken(0.3) == {"chunk 0", "chunk 2", "mine"}
    assert taken(0.0) == {"chunk 0", "chunk 1", "mine"}


def test_near_duplicates_of_the_text_or_of_a_support_are_no_supports() -> None:
    corpus = unit([1, 0.01, 0, 0], [1, 1, 0, 0], [1, 1, 0.01, 0])
    index = ExactIndex(corpus)
    context = build_context(AXES[:1], ["mine"], 3, index=index, corpus=index)
    assert context.texts == ("chunk 1", "mine", "mine") or context.texts == ("chunk 2", "mine", "mine")
    assert (context.mode, context.origins) == ("mixed", ("retrieved", "repeated", "text"))


def test_several_chunks_and_supports_are_mixed() -> None:
    index = ExactIndex(unit([1, 2, 0, 0], [0, 1, 1, 0], [1, 0, 0, 3]))
    context = build_context(AXES[:2], ["a", "b"], index=index, corpus=index)
    assert (context.mode, context.texts[-2:]) == ("mixed", ("a", "b"))
    assert context.origins == ("retrieved",) * 3 + ("text",) * 2


@pytest.mark.parametrize("with_index", [True, False])
def test_without_retrieval_the_first_chunk_is_repeated(with_index: bool) -> None:
    index = ExactIndex(AXES) if with_index else None
    fill = "repeat" if with_index else "retrieve"
    context = build_context(AXES[:2], ["a", "b"], fill=fill, index=index, corpus=index)
    assert (context.mode, context.texts) == ("repeat_pad", ("a", "a", "a", "a", "b"))
    assert context.origins == ("repeated",) * 3 + ("text",) * 2
    np.testing.assert_allclose(context.vectors, AXES[[0, 0, 0, 0, 1]])


def test_no_fill_keeps_the_last_chunk_alone_for_passthrough() -> None:
    context = build_context(AXES[:2] * 3, ["a", "b"], fill="none")
    assert (context.mode, context.texts, context.origins) == ("passthrough", ("b",), ("text",))
    np.testing.assert_allclose(context.vectors, AXES[1:2])


def test_a_context_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="got 0 chunk texts and 0 vectors"):
        build_context(np.empty((0, DIM), dtype=np.float32), [])
    with pytest.raises(InputError, match="got 1 chunk texts and 2 vectors"):
        build_context(AXES[:2], ["a"])
    with pytest.raises(InputError, match="pass both or neither"):
        build_context(AXES[:1], ["a"], index=ExactIndex(AXES))
