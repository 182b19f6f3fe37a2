"""Arrays of made-up articles, laid out once a run; tests that change files make their own."""

from pathlib import Path

import pytest

from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.sequences import Windows, make_windows
from tests.doubles import fake_articles, write_vectors


@pytest.fixture(scope="session")
def array(tmp_path_factory: pytest.TempPathFactory) -> VectorArray:
    """30 articles of 12 chunks."""
    directory = tmp_path_factory.mktemp("vectors")
    write_vectors(directory, fake_articles(30))
    return open_vectors(directory)


@pytest.fixture(scope="session")
def windows(array: VectorArray) -> Windows:
    """7 windows of each article."""
    return make_windows(array)


@pytest.fixture(scope="session")
def large_array(tmp_path_factory: pytest.TempPathFactory) -> VectorArray:
    """5,000 chunks: enough for an index with lists."""
    directory = tmp_path_factory.mktemp("large")
    write_vectors(directory, fake_articles(250, 20), articles_per_shard=50)
    return open_vectors(directory)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished encode job of its own."""
    write_vectors(tmp_path / "vectors", fake_articles(12, 8))
    return tmp_path / "vectors"
