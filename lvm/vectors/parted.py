"""Several arrays read as one, so that no file and no mapping has to hold a whole corpus."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Parted:
    """Arrays of equal width, one after the other, indexed as if concatenated: by a row, a slice, an array of rows of
    any shape, or a mask. A slice within one part is a view, everything else a copy; `numpy.asarray` copies all."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        """parts: one or more."""
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.dtype = np.result_type(*parts)
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("several parts cannot be one array without a copy")
        return np.concatenate(self.parts, dtype=dtype or self.dtype)

    def searchsorted(self, values: Any, side: Any = "left", sorter: None = None) -> NDArray[np.int64]:
        """As of an ascending array: where `values` belong. `numpy.searchsorted` calls it."""
        given = np.asarray(values)
        full = [number for number, part in enumerate(self.parts) if len(part)]
        numbers = np.searchsorted([self.parts[number][-1] for number in full], given.reshape(-1), side)
        places = [
            self._start(full[i]) + int(np.searchsorted(self.parts[full[i]], value, side))
            if i < len(full)
            else len(self)
            for i, value in zip(numbers, given.reshape(-1), strict=True)
        ]
        return np.array(places, np.int64).reshape(given.shape)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            low, high, step = key.indices(len(self))
            number = self._part_of(low)
            if step == 1 and low < high <= self._ends[number]:
                start = low - self._start(number)
                return self.parts[number][start : start + high - low]
            return self._gather(np.arange(low, high, step))
        rows = np.asarray(key)
        if isinstance(key, tuple) or (rows.size and rows.dtype.kind not in "iub"):
            raise IndexError(f"expected rows (an integer, a slice, integers or a mask), got {key!r}")
        if rows.dtype == bool:
            if rows.shape != self.shape[:1]:
                raise IndexError(f"a mask of shape {rows.shape} does not fit {len(self)} rows")
            rows = np.flatnonzero(rows)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are outside of {len(self)}")
        rows = rows.astype(np.int64) % len(self)
        if rows.ndim == 0:
            number = self._part_of(int(rows))
            return self.parts[number][int(rows) - self._start(number)]
        return self._gather(rows.reshape(-1)).reshape(*rows.shape, *self.shape[1:])

    def _part_of(self, row: int) -> int:
        return min(int(np.searchsorted(self._ends, row, side="right")), len(self.parts) - 1)

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - len(self.parts[number])

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        numbers = np.searchsorted(self._ends, rows, side="right")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self.parts[number][rows[here] - self._start(number)]
        return out
