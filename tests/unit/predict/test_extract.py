"""Answers from the corpus: one prediction for all contexts does not give one answer for all."""

import numpy as np
import pytest

from lvm.predict.extract import Extractor
from lvm.predict.steer import unit
from lvm.vectors.array import open_vectors
from lvm.vectors.index import build_index
from tests.doubles import FakeCodec, fake_articles, write_vectors


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    folder = tmp_path_factory.mktemp("extract")
    write_vectors(folder, fake_articles(40), FakeCodec(dim=96))
    array = open_vectors(folder)
    return Extractor(array, build_index(array, folder / "index"))


def test_the_search_vectors_tell_contexts_apart_that_have_one_prediction(extractor: Extractor) -> None:
    vectors = np.asarray(extractor._corpus.vectors, np.float32)
    wanted = np.arange(5, 400, 40)
    searches = unit(vectors[wanted])
    same = np.repeat(unit(vectors.mean(0, keepdims=True) + 0.3 * vectors[:1]), len(wanted), axis=0)
    alone, _ = extractor.nearest(same)
    together, cosines = extractor.nearest(same, search=searches)
    assert len(set(alone.tolist())) == 1
    assert len(set(together.tolist())) == len(wanted)
    # The cosine stays that of the prediction.
    assert cosines == pytest.approx(np.einsum("bd,bd->b", vectors[together], same), abs=1e-3)


def test_without_a_rank_head_the_prediction_alone_is_the_query(extractor: Extractor) -> None:
    vectors = unit(np.asarray(extractor._corpus.vectors[::37], np.float32))
    assert np.array_equal(extractor.nearest(vectors)[0], extractor.nearest(vectors, search=vectors)[0])
