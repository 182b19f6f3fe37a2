"""Several arrays are indexed as their concatenation is."""

from typing import Any

import numpy as np
import pytest

from lvm.vectors.parted import Parted

RANDOM = np.random.default_rng(0)
PARTS = [RANDOM.standard_normal((n, 4)).astype(np.float16) for n in (7, 0, 5, 9)]
WHOLE = np.concatenate(PARTS)


@pytest.mark.parametrize(
    "key",
    [
        *(0, 6, 7, 20, -1, -21, np.int64(12)),
        *(
            slice(None),
            slice(2, 5),
            slice(5, 9),
            slice(7, 12),
            slice(9, 9),
            slice(-3, None),
            slice(20, 3, -2),
        ),
        *([3, 3, 20], [], np.array([[1, 8], [-1, 0]]), WHOLE[:, 0] > 0, np.arange(20) + 1),
    ],
    ids=str,
)
def test_every_kind_of_index(key: Any) -> None:
    key = np.asarray(key, int) if isinstance(key, list) else key
    found = Parted(PARTS)[key]
    np.testing.assert_array_equal(found, WHOLE[key])
    assert (found.dtype, found.shape) == (WHOLE.dtype, WHOLE[key].shape)


def test_it_is_an_array_where_one_is_asked_for() -> None:
    parted = Parted(PARTS)
    assert (len(parted), parted.shape, parted.dtype, parted.ndim) == (21, (21, 4), np.float16, 2)
    np.testing.assert_array_equal(np.asarray(parted, np.float32), WHOLE.astype(np.float32))
    np.testing.assert_array_equal(np.diff(parted, axis=0), np.diff(WHOLE, axis=0))
    assert np.shares_memory(parted[8:11], PARTS[2])  # a view
    wide = Parted([np.array(["a", "bc"]), np.array(["defg"])])
    assert (wide.dtype, wide[[0, 2]].tolist()) == (np.dtype("<U4"), ["a", "defg"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sorted_one_is_searched_without_a_copy(side: Any) -> None:
    parts = [np.array(p, np.int32) for p in ([1, 1, 4], [], [4, 4], [4, 9, 9], [12])]
    for values in (range(14), 4, [[0, 20]]):
        found = np.searchsorted(Parted(parts), values, side)  # type: ignore[call-overload]
        np.testing.assert_array_equal(found, np.searchsorted(np.concatenate(parts), values, side))


def test_rows_that_are_not_there_are_refused() -> None:
    for key in (21, -22, [3, 21], np.ones(20, bool), (1, 0), 1.5):
        with pytest.raises(IndexError):
            Parted(PARTS)[key]
