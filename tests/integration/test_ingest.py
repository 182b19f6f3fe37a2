"""Ingestion against a real Postgres: each article once, in one transaction, and bad ones left out."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvm.corpus.chunker import chunk_id
from lvm.corpus.records import Article
from lvm.corpus.tmd import Coded, Prototypes, Tmd, phrases
from lvm.errors import DatabaseError
from lvm.vectors.array import open_vectors
from lvm.vectors.concept_export import read_articles
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.ingest import STAGES, Ingester
from lvm.vectors.shards import Manifest, with_footer, write_table
from tests.doubles import BrokenCodec, FakeCodec
from tests.integration.test_concepts import HOSTILE, rows

TEXT = "Apples pears plums. Apples plums.\n\nPears apples plums.\n\nTrains tracks steam.\n\nSteam trains coal tracks."


def article(number: int | str, text: str = TEXT, title: str = "T", source: str = "s") -> Article:
    return Article(str(number), title, text, source)


def opened(database: str, codec: FakeCodec | None = None) -> tuple[ConceptStore, Dataset]:
    store = ConceptStore(database)
    return store, store.ensure("notes", (codec or FakeCodec()).identity, "float16")


def code_all(texts: list[str], vectors: np.ndarray) -> list[Coded | None]:
    return [Coded(Tmd(len(t) % 16, 2, 3), (0.5, 0.5, 0.5)) if "coal" not in t else None for t in texts]


def test_an_article_becomes_rows_in_order_with_episodes_codes_and_names_of_the_chunk_job(
    database: str,
) -> None:
    store, dataset = opened(database)
    with store:
        ingester = Ingester(store, dataset, FakeCodec(), code_all, "test")
        (outcome,) = ingester.ingest([article("a")])
        found = read_articles(store, dataset, 0, 9)
    texts = found.column("text").to_pylist()
    assert texts == ["Apples pears plums. Apples plums.", *TEXT.split("\n\n")[1:]]
    assert found.column("chunk_id").to_pylist() == [chunk_id("s", "a", i) for i in range(4)]
    assert found.column("position").to_pylist() == [0, 1, 2, 3]
    assert found.column("episode").to_pylist() == [0, 0, 1, 1]
    coherence = found.column("coherence").to_pylist()
    assert coherence[0] == coherence[1] > 0.3
    vectors = FakeCodec().encode_chunks(texts).vectors
    assert coherence[2] == pytest.approx(float(vectors[2] @ vectors[3]), abs=1e-6)
    assert found.column("tmd_code").to_pylist() == [
        *(Tmd(len(t) % 16, 2, 3).code for t in texts[:3]), None
    ]  # fmt: skip
    assert (outcome.status, outcome.chunks, outcome.episodes, outcome.coded) == ("stored", 4, 2, 3)
    assert set(ingester.seconds) == set(STAGES)
    assert all(ingester.seconds[stage] > 0 for stage in STAGES)


def test_each_article_is_stored_once_and_again_when_anything_that_decides_it_changes(database: str) -> None:
    store, dataset = opened(database)
    with store:
        articles = [article(i) for i in range(5)]
        first = Ingester(store, dataset, FakeCodec(), code_all, "test")
        assert {o.status for o in first.ingest(articles)} == {"stored"}
        before = rows(store, "notes")
        assert {o.status for o in first.ingest(articles)} == {"known"}
        assert rows(store, "notes") == before
        assert [o.status for o in first.ingest([article(7), article(7)])] == ["stored", "known"]
        changed = [
            article(0, "Other words.\n\nMore."),
            article(1, title="U"),
            article(2),
            article(3, source="t"),
        ]
        assert [o.status for o in first.ingest(changed)] == ["stored", "stored", "known", "stored"]
        found = read_articles(store, dataset, 0, 0).column("text").to_pylist()
        assert found == ["Other words.", "More."]
        other_coder = Ingester(store, dataset, FakeCodec(), None, "none")
        assert [o.status for o in other_coder.ingest([article(2)])] == ["stored"]
        assert read_articles(store, dataset, 2, 2).column("tmd_code").null_count == 4
        assert store.stats(dataset)["articles"] == 7


def test_the_same_articles_from_several_at_once_are_stored_once(database: str) -> None:
    store, dataset = opened(database)
    articles = [article(i) for i in range(12)]
    statuses: list[str] = []

    def ingest() -> None:
        with ConceptStore(database) as mine:
            statuses.extend(o.status for o in Ingester(mine, dataset, FakeCodec()).ingest(articles))

    threads = [threading.Thread(target=ingest) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store:
        assert sorted(statuses) == ["known"] * 36 + ["stored"] * 12
        assert store.stats(dataset)["rows"] == 48
        assert store.stats(dataset)["articles"] == 12


def test_bad_articles_are_refused_with_their_reason_and_the_others_stored(database: str) -> None:
    codec = BrokenCodec()
    store, dataset = opened(database, codec)
    bad = {
        "NUL": article("b", "one\0two"),
        "NUL in its id": article("b\0"),
        "NUL in its title": article("b", title="\0"),
        "NUL in its source": article("b", source="a\0"),
        "surrogate": article("b", "lone \ud800 half"),
        "NaN": article("b", "good\n\npoison\n\ngood"),
    }
    with store:
        ingester = Ingester(store, dataset, codec, lambda t, v: Prototypes(prototypes()).nearest(v), "p")
        outcomes = ingester.ingest([article("first"), *bad.values(), article("last")])
        assert [o.status for o in outcomes] == ["stored", *["refused"] * len(bad), "stored"]
        for name, outcome in zip(bad, outcomes[1:], strict=False):
            assert name.split()[0] in outcome.reason, outcome.reason
        assert store.stats(dataset)["rows"] == 8
        assert [o.status for o in ingester.ingest([article("b")])] == ["stored"]


def prototypes() -> np.ndarray:
    return FakeCodec().encode_chunks([phrase for phrase, _ in phrases()]).vectors


def test_articles_without_words_and_hostile_strings(database: str) -> None:
    store, dataset = opened(database)
    with store:
        ingester = Ingester(store, dataset, FakeCodec())
        hostile = [article(h, f"{h} words\n\n{h}", h, h) for h in HOSTILE]
        outcomes = ingester.ingest([article("empty", " \n\n\t"), *hostile])
        assert {o.status for o in outcomes} == {"stored"}
        assert outcomes[0].chunks == 0
        titles = read_articles(store, dataset, 0, 99).column("title").to_pylist()
        assert set(titles) == set(HOSTILE)
        assert {o.status for o in ingester.ingest(hostile)} == {"known"}


def test_a_connection_that_is_cut_leaves_whole_articles(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, dataset = opened(database)
    copy = ConceptStore.copy
    calls = 0

    def cut_in_the_third(self: ConceptStore, table: Any, entries: Any) -> None:
        nonlocal calls
        calls += 1
        copy(self, table, entries)
        if calls == 3:
            with ConceptStore(database) as other:
                other.connection.execute(
                    "SELECT pg_terminate_backend(%s, 5000)", [self.connection.info.backend_pid]
                )

    monkeypatch.setattr(ConceptStore, "copy", cut_in_the_third)
    with pytest.raises(DatabaseError, match="the connection is lost"):
        Ingester(store, dataset, FakeCodec()).ingest([article(i) for i in range(5)])
    monkeypatch.undo()
    with ConceptStore(database) as store:
        assert store.stats(dataset)["rows"] == 8
        outcomes = Ingester(store, dataset, FakeCodec()).ingest([article(i) for i in range(5)])
        assert [o.status for o in outcomes] == ["known", "known", "stored", "stored", "stored"]
        assert store.stats(dataset)["rows"] == 20


def test_what_is_ingested_trains_as_shards_do(database: str, tmp_path: Path) -> None:
    store, dataset = opened(database)
    with store:
        Ingester(store, dataset, FakeCodec(), code_all, "test").ingest([article(i) for i in range(4)])
        table = read_articles(store, dataset, 0, 99)
    shard = write_table(
        tmp_path / "part-00000.parquet", with_footer(table, {"codec": dataset.identity.to_dict()})
    )
    settings = {"codec": dataset.identity.digest, "dtype": "float16"}
    Manifest("vectors", settings, {}, (shard,), shard.rows, dataset.identity.to_dict()).save(tmp_path)
    array = open_vectors(tmp_path)
    assert len(array) == 16
    assert array.texts([0]) == ["Apples pears plums. Apples plums."]
