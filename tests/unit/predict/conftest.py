"""Windows made in memory, with an answer worth learning."""

from typing import Any

import numpy as np
import pytest

from lvm.predict.start import Batch

DIM = 768


class MemoryWindows:
    """Windows of a made-up walk: the next vector is a fixed turn of the last one, plus noise."""

    def __init__(self, count: int, seed: int = 0, dim: int = DIM) -> None:
        generator = np.random.default_rng(seed)
        topics = np.random.default_rng(7).standard_normal((8, dim))
        kind = generator.integers(0, 8, count)
        vectors = topics[kind][:, None] + 0.7 * generator.standard_normal((count, 6, dim))
        vectors[:, 5] = np.roll(topics, 1, axis=1)[kind] + 0.3 * generator.standard_normal((count, dim))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        self.vectors = vectors.astype(np.float32)

    def __len__(self) -> int:
        return len(self.vectors)

    def batch(self, indices: Any) -> Batch:
        chosen = self.vectors[indices]
        return chosen[:, :5], chosen[:, 5]


@pytest.fixture(scope="session")
def train() -> MemoryWindows:
    """256 windows of eight topics."""
    return MemoryWindows(256)


@pytest.fixture(scope="session")
def val() -> MemoryWindows:
    """64 other windows of the same topics."""
    return MemoryWindows(64, seed=1)
