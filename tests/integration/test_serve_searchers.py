"""An index divided among searchers answers as one that every retriever holds."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from lvm.vectors.array import open_vectors
from lvm.vectors.index import IndexSettings, build_index, load_index
from tests.integration.serving import make_run, running, vectors_of
from tests.integration.test_serve_faults import load, wait_for

pytestmark = pytest.mark.slow


def test_searchers_find_what_the_index_finds_and_one_that_dies_costs_no_request(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_articles=12, models=("amn",))
    array = open_vectors(run / "vectors")
    build_index(array, run / "index", IndexSettings(part_vectors=-(-len(array) // 5)))
    whole = load_index(run / "index")
    assert len(whole.manifest.shards) == 5
    texts = array.texts(range(0, len(array), 40))
    options = (
        "--set",
        "searchers=2",
        "--set",
        "inline=encoder,predictor",
        "--set",
        "breaker.max_refused_share=1",
    )
    with running(run, *options) as service:
        queries = vectors_of(service, texts)
        reply = service.post("/v1/search", {"vectors": queries.tolist(), "k": 7})
        assert reply.status == 200, reply.body
        scores, rows = whole.search(queries, 7)
        for found, wanted, cosines in zip(reply.json["results"], rows, scores, strict=True):
            assert [f["chunk_id"] for f in found] == [str(array.chunk_ids[i]) for i in wanted]
            np.testing.assert_allclose([f["cosine"] for f in found], cosines, atol=1e-3)

        (first,), (second,) = (service.replica_pids(f"Searcher{n}") for n in (1, 2))
        with load(service, clients=2, steps=0, neighbours=1) as under:
            wait_for("answers", lambda: len(under.answers) > 4, 90)
            os.kill(first, signal.SIGSTOP)  # so that it dies with searches that it has not answered
            time.sleep(1)
            os.kill(first, signal.SIGKILL)
            wait_for("another searcher", lambda: set(service.replica_pids("Searcher1")) - {first}, 60)
            answered = len(under.answers)
            wait_for("answers after it", lambda: len(under.answers) > answered + 8, 90)
        assert set(under.statuses()) == {200}, [a for a in under.answers if a[2] != 200][:2]
        assert service.replica_pids("Searcher2") == [second]
