"""An LRU cache bounded in bytes."""

import dataclasses
import sys
from typing import Any, TypeVar

import numpy as np
from cachetools import LRUCache

V = TypeVar("V")

ENTRY_BYTES = 300
"""Overhead per entry: its key and its slots in the three tables of `LRUCache`."""


def size_of(value: Any) -> int:
    """Bytes of a value with its contents: text, numbers, arrays, and tuples, lists, sets, dicts and dataclasses.
    Shared objects count once per reference."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes) + 128
    size = sys.getsizeof(value)
    if dataclasses.is_dataclass(value):
        return size + sum(size_of(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, dict):
        return size + sum(size_of(k) + size_of(v) for k, v in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        return size + sum(map(size_of, value))
    return size


class Cache(LRUCache[bytes, V]):
    """LRU cache with hit statistics. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: total size of all entries; 0 disables the cache."""
        super().__init__(max_bytes, getsizeof=lambda value: size_of(value) + ENTRY_BYTES)
        self.hits = self.misses = 0

    def find(self, key: bytes) -> V | None:
        """The value, or None; counts as a hit or a miss."""
        found = self.get(key)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: bytes, value: V) -> None:
        """Store a value, unless it is larger than the whole cache."""
        if self.getsizeof(value) <= self.maxsize:
            self[key] = value

    @property
    def hit_rate(self) -> float:
        """Share of look-ups that were hits; 0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0
