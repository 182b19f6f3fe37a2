"""The controls disturb the order of the text and nothing else; the two newer baselines know training articles alone."""

from pathlib import Path

import numpy as np
import pytest

from lvm.evaluate.baselines import NearestNeighbour, WeightedMean
from lvm.evaluate.controls import as_written, backwards, shuffled
from lvm.predict.steer import unit
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import Windows, make_windows
from tests.doubles import fake_articles, write_vectors


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    folder: Path = tmp_path_factory.mktemp("controls")
    write_vectors(folder, fake_articles(12))
    return make_windows(open_vectors(folder))


def test_shuffled_contexts_hold_the_same_chunks_in_another_order(windows: Windows) -> None:
    (contexts, targets, rows, target_rows), (mixed, same, mixed_rows, same_rows) = (
        next(iter(f(windows))) for f in (as_written, shuffled)
    )
    assert np.array_equal(targets, same)
    assert np.array_equal(target_rows, same_rows)
    assert not np.array_equal(rows, mixed_rows)
    assert np.array_equal(np.sort(mixed_rows, axis=1), rows)
    stored = np.asarray(windows.array.vectors)
    np.testing.assert_array_equal(mixed, stored[mixed_rows].astype(np.float32))
    np.testing.assert_array_equal(contexts, stored[rows].astype(np.float32))
    assert len({tuple(order) for order in np.argsort(mixed_rows, axis=1).tolist()}) > 10


def test_backwards_the_first_chunk_is_to_be_predicted_from_the_last_ones(windows: Windows) -> None:
    contexts, targets, rows, target_rows = next(iter(backwards(windows)))
    assert np.array_equal(target_rows, windows.starts[: len(target_rows)])
    assert (np.diff(rows, axis=1) == -1).all()
    assert (rows[:, -1] - target_rows == 1).all()
    stored = np.asarray(windows.array.vectors)
    np.testing.assert_array_equal(contexts, stored[rows].astype(np.float32))
    np.testing.assert_array_equal(targets, stored[target_rows].astype(np.float32))


def test_the_weighted_mean_takes_the_decay_that_finds_best() -> None:
    contexts = unit(np.random.default_rng(0).standard_normal((4 * 3, 8)).astype(np.float32)).reshape(4, 3, 8)
    fitted = WeightedMean.fit(lambda predict: -abs(predict.decay - 0.6))  # type: ignore[attr-defined]
    assert fitted.decay == 0.6
    by_hand = 0.36 * contexts[:, 0] + 0.6 * contexts[:, 1] + contexts[:, 2]
    np.testing.assert_allclose(fitted(contexts), unit(by_hand), atol=1e-6)


def test_the_nearest_neighbour_says_what_followed_the_most_similar_context(windows: Windows) -> None:
    contexts, targets = windows.batch(slice(0, 40))
    fitted = NearestNeighbour.fit(
        lambda: iter([(contexts[:25], targets[:25]), (contexts[25:], targets[25:])])
    )
    np.testing.assert_allclose(fitted(contexts), unit(targets), atol=1e-6)
    blurred = unit((contexts + 0.05).reshape(-1, contexts.shape[2])).reshape(contexts.shape)
    assert (np.einsum("bd,bd->b", fitted(blurred), unit(targets)) > 0.99).mean() > 0.9
