"""The concept store against a real Postgres: round trips, idempotent loads, and what is refused."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from psycopg import errors

from lvm.corpus.tmd import Wanted
from lvm.errors import DatabaseError, IdentityError, InputError, LvmError, OutputError
from lvm.vectors.concept_export import article_ranges, read_articles
from lvm.vectors.concept_load import copy_shard, loading, merge, staged
from lvm.vectors.concept_search import Filters, ensure_index, search
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.entries import entries_of, read_vectors, wire_vectors
from lvm.vectors.ingest import store_article, stored_contents
from lvm.vectors.postgres import connect
from lvm.vectors.shards import Manifest, read_table, table_to_vectors, vectors_to_table, write_table
from tests.doubles import FakeCodec, chunk_table, fake_articles, write_vectors

HOSTILE = [
    "'; DROP TABLE cpe_dataset; --",
    "a\"b\\c'd",
    "%s %(x)s {} {0} %",
    "$1 \x01\x7f \n\t\r é 😀 \u202e",
    "\\N",
    "\\.",
    "a!b_c%d",
]


def load(store: ConceptStore, name: str, source: Path, replace_all: bool = False) -> Dataset:
    manifest = Manifest.load(source, "vectors")
    with loading(store, name, manifest) as under_way:
        for shard in manifest.shards:
            copy_shard(store, under_way, source, shard)
        return merge(store, under_way, manifest, replace_all)


def rows(store: ConceptStore, dataset: str) -> list[tuple[Any, ...]]:
    """All that the view shows of a dataset."""
    return store.connection.execute(
        "SELECT * FROM cpe_entry WHERE dataset_source = %s ORDER BY doc_id, position", [dataset]
    ).fetchall()


def tables(store: ConceptStore) -> set[str]:
    found = store.connection.execute(
        "SELECT relname FROM pg_class WHERE relname LIKE 'cpe%' AND relkind IN ('r', 'p') AND pg_table_is_visible(oid)"
    )
    return {name for (name,) in found}


def one_shard(directory: Path, table: pa.Table, codec: FakeCodec | None = None) -> Path:
    """A finished encode job of one shard with these rows."""
    codec = codec or FakeCodec()
    shard = write_table(directory / "part-00000.parquet", table)
    settings = {"codec": codec.identity.digest, "dtype": "float16"}
    Manifest("vectors", settings, {}, (shard,), shard.rows, codec.identity.to_dict()).save(directory)
    return directory


def encoded(texts: list[str], dtype: Any = "float16", **columns: list[Any]) -> pa.Table:
    """Rows of one article, some of their columns replaced."""
    table = chunk_table([texts])
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
    out = FakeCodec().encode_chunks(texts)
    return vectors_to_table(table, out.vectors, out.norms, out.num_tokens, out.truncated, dtype)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """60 chunks of 20 articles in 3 shards."""
    write_vectors(tmp_path / "vectors", fake_articles(20, 3))
    return tmp_path / "vectors"


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("storage", ["vector", "halfvec", "real"])
def test_vectors_come_back_from_the_wire_as_they_went(storage: Any) -> None:
    vectors = (
        np.random.default_rng(0)
        .standard_normal((5, 7))
        .astype(np.float16 if storage == "halfvec" else np.float32)
    )
    back = read_vectors(wire_vectors(vectors, storage), storage, 7)
    np.testing.assert_array_equal(back, vectors)
    assert back.dtype == vectors.dtype


def test_what_is_loaded_is_read_back_bit_by_bit_in_order(database: str, source: Path) -> None:
    with ConceptStore(database) as store:
        assert store.missing == ""
        dataset = load(store, "wiki", source)
        assert dataset.storage == "halfvec"
        shards = [read_table(source / s.file) for s in Manifest.load(source).shards]
        wanted = pa.concat_tables(shards).replace_schema_metadata(None)
        found = read_articles(store, dataset, 0, 10**6)
        assert found.select(wanted.column_names).equals(wanted)
        assert found.column("tmd_code").null_count == 60
        assert store.stats(dataset)["rows"] == 60
        assert article_ranges(store, dataset, 25) == [(0, 8, 27), (9, 17, 27), (18, 19, 6)]
        assert len(rows(store, "wiki")) == 60


def test_float32_is_kept_and_other_dimensions_lie_beside(database: str, tmp_path: Path) -> None:
    table = encoded(["one two", "three"], "float32")
    codec = FakeCodec()
    source = one_shard(tmp_path / "a", table)
    manifest = replace(Manifest.load(source), settings={"codec": codec.identity.digest, "dtype": "float32"})
    manifest.save(source)
    small = FakeCodec("small")
    small.identity = replace(small.identity, dim=8)
    vectors = np.eye(8, dtype=np.float32)[:2]
    ones = np.ones(2, np.float32)
    short = vectors_to_table(chunk_table([["one two", "three"]]), vectors, ones, ones, ones > 2)
    with ConceptStore(database) as store:
        dataset = load(store, "exact", source)
        assert dataset.storage == "vector"
        np.testing.assert_array_equal(
            table_to_vectors(read_articles(store, dataset, 0, 9)), table_to_vectors(table)
        )
        other = load(store, "small", one_shard(tmp_path / "b", short, small))
        np.testing.assert_array_equal(table_to_vectors(read_articles(store, other, 0, 9)), vectors)
        kinds = store.connection.execute(
            "SELECT dataset_source, cardinality(concept_vec), count(*) FROM cpe_entry GROUP BY 1, 2 ORDER BY 1"
        ).fetchall()
        assert kinds == [("exact", 768, 2), ("small", 8, 2)]


def test_hostile_strings_come_back_from_every_text_field(database: str, tmp_path: Path) -> None:
    texts = [f"{text} {i}" for i, text in enumerate(HOSTILE)]
    table = encoded(texts, title=HOSTILE, source=HOSTILE)
    source = one_shard(tmp_path / "a", table)
    with ConceptStore(database) as store:
        for name in HOSTILE:
            if "\n" in name:  # a name of several lines is odd and harmless
                name = name.strip()
            dataset = load(store, name, source)
            found = read_articles(store, dataset, 0, 9)
            assert found.column("text").to_pylist() == texts
            assert found.column("title").to_pylist() == found.column("source").to_pylist() == HOSTILE
            assert len(rows(store, name)) == len(HOSTILE)
            for row, text in enumerate(HOSTILE):
                hits = search(store, dataset, None, 99, Filters(source=text))
                assert [h.position for h in hits] == [row]
                hits = search(store, dataset, None, 99, Filters(contains=text.upper()))
                assert [h.position for h in hits] == [row], text
            chunks = table.slice(0, 2)
            assert store_article(store, dataset, name, name, name, chunks)
            assert stored_contents(store, dataset, [(name, name)]) == {(name, name): name}
        assert {d.name for d in store.datasets()} == {n.strip() if "\n" in n else n for n in HOSTILE}
        assert store.clear(HOSTILE[0]) == 2
        assert len(store.datasets()) == len(HOSTILE) - 1


# ---------------------------------------------------------------------------------------------------- loading


def test_a_second_load_changes_nothing_and_a_changed_one_only_what_differs(
    database: str, source: Path, tmp_path: Path
) -> None:
    with ConceptStore(database) as store:
        first = load(store, "wiki", source)
        before = rows(store, "wiki")
        kept = "SELECT cpe_id, xmin::text FROM cpe_entry_rows ORDER BY 1"
        store.connection.execute(f"CREATE VIEW cpe_entry_rows AS SELECT cpe_id, xmin FROM cpe_d{first.id}")  # type: ignore[arg-type]
        versions = store.connection.execute(kept).fetchall()
        again = load(store, "wiki", source)
        assert rows(store, "wiki") == before
        assert store.connection.execute(kept).fetchall() == versions  # no row was written again
        assert again.version != first.version
        assert again.loaded == Manifest.load(source).fingerprint

        articles = fake_articles(20, 3)
        articles[4] = articles[4][:2]  # one chunk fewer
        articles[7][1] = "something else"
        write_vectors(tmp_path / "new", articles)
        load(store, "wiki", tmp_path / "new")
        after = rows(store, "wiki")
        assert len(after) == 59
        changed = set(map(str, after)) - set(map(str, before))
        assert len(changed) == 1
        assert "something else" in next(iter(changed))
        assert tables(store) & {"cpe_stage", "cpe_staged"} == {"cpe_stage", "cpe_staged"}
        assert not [t for t in tables(store) if t.startswith("cpe_stage_")]


def test_codes_survive_a_load_of_the_same_text_and_go_with_another(
    database: str, source: Path, tmp_path: Path
) -> None:
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", source)
        store.connection.execute(f"UPDATE cpe_d{dataset.id} SET tmd_code = 4242")  # type: ignore[arg-type]
        articles = fake_articles(20, 3)
        articles[0][0] = "other words"
        write_vectors(tmp_path / "new", articles)
        load(store, "wiki", tmp_path / "new")
        assert store.codes(dataset) == {4242: 59}


def test_codes_that_shards_have_are_loaded_with_them(database: str, tmp_path: Path) -> None:
    table = encoded(["one two", "three", "four"])
    table = table.append_column("tmd_code", pa.array([2, 4, 65534], pa.int32()))
    table = table.append_column("tmd_confidence", pa.array([0.25, 0.5, 1.0], pa.float32()))
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", one_shard(tmp_path / "a", table))
        found = read_articles(store, dataset, 0, 9)
    assert found.select(table.column_names).equals(table)


def test_articles_of_other_loads_stay_unless_they_are_to_be_replaced(
    database: str, source: Path, tmp_path: Path
) -> None:
    more = vectors_of(chunk_table(fake_articles(2, 3, seed=5), first_doc=100))
    one_shard(tmp_path / "more", more)
    other = vectors_of(chunk_table(fake_articles(2, 3, seed=6), first_doc=100, source="elsewhere"))
    one_shard(tmp_path / "other", other)
    with ConceptStore(database) as store:
        load(store, "wiki", source)
        load(store, "wiki", tmp_path / "more")
        assert len(rows(store, "wiki")) == 66
        before = rows(store, "wiki")
        with pytest.raises(OutputError, match="holds other articles under these numbers: 'Article 100'"):
            load(store, "wiki", tmp_path / "other")
        assert rows(store, "wiki") == before
        load(store, "wiki", tmp_path / "other", replace_all=True)
        assert len(rows(store, "wiki")) == 6


def vectors_of(chunks: pa.Table) -> pa.Table:
    out = FakeCodec().encode_chunks(chunks.column("text").to_pylist())
    return vectors_to_table(chunks, out.vectors, out.norms, out.num_tokens, out.truncated)


def test_a_shard_is_copied_once_however_many_ask_at_the_same_time(database: str, source: Path) -> None:
    manifest = Manifest.load(source)
    with ConceptStore(database) as store, loading(store, "wiki", manifest) as under_way:

        def copy_all() -> None:
            with ConceptStore(database) as mine:
                for shard in manifest.shards:
                    copy_shard(mine, under_way, source, shard)

        threads = [threading.Thread(target=copy_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        merge(store, under_way, manifest)
        assert len(rows(store, "wiki")) == manifest.rows


def test_a_load_that_was_killed_goes_on_and_nothing_shows_before_its_end(database: str, source: Path) -> None:
    manifest = Manifest.load(source)
    with ConceptStore(database) as store, loading(store, "wiki", manifest) as under_way:
        copy_shard(store, under_way, source, manifest.shards[0])
        assert store.find("wiki") is None
        with pytest.raises(DatabaseError, match="2 of 3 shards are not loaded"):
            merge(store, under_way, manifest)
    with ConceptStore(database) as store:
        with loading(store, "wiki", manifest) as under_way:
            assert staged(store, under_way) == {"part-00000.parquet": 24}
        load(store, "wiki", source)
        assert len(rows(store, "wiki")) == 60


def test_two_loads_of_one_dataset_do_not_mix(database: str, source: Path) -> None:
    manifest = Manifest.load(source)
    with ConceptStore(database) as one, ConceptStore(database) as two, loading(one, "wiki", manifest):
        with pytest.raises(DatabaseError, match="another load of dataset 'wiki' is under way"):
            load(two, "wiki", source)
        load(two, "other", source)


# --------------------------------------------------------------------------------------------------- refusals


def test_vectors_of_another_codec_are_refused_by_us_and_by_the_server(
    database: str, source: Path, tmp_path: Path
) -> None:
    write_vectors(tmp_path / "other", fake_articles(2), FakeCodec("another"))
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", source)
        with pytest.raises(IdentityError, match="they differ in encoder_sha256"):
            load(store, "wiki", tmp_path / "other")
        with pytest.raises(IdentityError, match="they differ in encoder_sha256"):
            store.ensure("wiki", FakeCodec("another").identity, "float16")
        with pytest.raises(errors.CheckViolation, match="one_codec"):
            store.connection.execute(f"UPDATE cpe_d{dataset.id} SET codec = 'other' WHERE doc_id = 0")  # type: ignore[arg-type]
        assert len(rows(store, "wiki")) == 60


def broken(kind: str) -> pa.Table:
    texts = ["one two", "three four"]
    match kind:
        case "NUL in the text":
            return encoded(["one two", "three\0four"])
        case "NUL in the title":
            return encoded(texts, title=["a", "b\0"])
        case "NUL in the source":
            return encoded(texts, source=["a\0", "b"])
        case "no UTF-8":
            table = encoded(texts)
            bytes_ = pa.array([b"one two", b"\xff\xfe"]).view(pa.string())
            return table.set_column(table.schema.get_field_index("text"), "text", bytes_)
        case "no id":
            return encoded(texts, chunk_id=["ab" * 16, "no hex"])
        case "twice":
            return encoded(texts, chunk_id=["ab" * 16, "ab" * 16])
        case "one place twice":
            return encoded(texts, position=[0, 0])
        case "no title":
            return encoded(texts, title=["a", None])
        case _:
            table = encoded(texts)
            vectors = table_to_vectors(table).copy()
            vectors[1] = {"NaN": np.nan, "infinity": np.inf, "not of norm 1": 0.5}[kind]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 768)
            return table.set_column(table.schema.get_field_index("vector"), "vector", flat)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NUL in the text", r"text of row 1 \(id [0-9a-f]{32}\) holds a NUL character at position 5"),
        ("NUL in the title", "title of row 1"),
        ("NUL in the source", "source of row 0"),
        ("no UTF-8", "Invalid UTF8"),
        ("no id", "chunk_id of row 1 is 'no hex'; expected 32 hex digits"),
        ("twice", "hold a chunk or a position in an article twice"),
        ("one place twice", "hold a chunk or a position in an article twice"),
        ("no title", "has no title"),
        ("NaN", "holds NaN or infinity"),
        ("infinity", "holds NaN or infinity"),
        ("not of norm 1", "has norm 1"),
    ],
)
def test_a_bad_row_is_named_and_nothing_of_its_load_is_seen(
    database: str, tmp_path: Path, kind: str, message: str
) -> None:
    source = one_shard(tmp_path / "bad", broken(kind))
    with ConceptStore(database) as store:
        with pytest.raises(InputError, match=message):
            load(store, "wiki", source)
        assert store.find("wiki") is None
        assert store.connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_shard_that_changed_since_its_manifest_is_refused(database: str, source: Path) -> None:
    write_table(source / "part-00001.parquet", encoded(["one"]))
    with ConceptStore(database) as store, pytest.raises(InputError, match="its manifest says"):
        load(store, "wiki", source)


@pytest.mark.parametrize("name", ["", " ", " a", "a" * 201, "a\0b", "\ud800"])
def test_a_name_that_is_none_is_refused(database: str, source: Path, name: str) -> None:
    with ConceptStore(database) as store, pytest.raises(InputError):
        load(store, name, source)


def test_a_full_disk_is_said_and_leaves_nothing(database: str, source: Path) -> None:
    manifest = Manifest.load(source)
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", source)
        before = rows(store, "wiki")
        # The server's own refusal, by its code, where it would write the first row.
        store.connection.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full'; END $$"
        )
        store.connection.execute(
            f"CREATE TRIGGER filled BEFORE DELETE OR INSERT ON cpe_d{dataset.id} EXECUTE FUNCTION full_disk()"  # type: ignore[arg-type]
        )
        with pytest.raises(DatabaseError, match="No space left on device; make room on the server's disk"):
            load(store, "wiki", source)
        assert rows(store, "wiki") == before
        with loading(store, "wiki", manifest) as under_way:
            assert len(staged(store, under_way)) == 3  # what was copied is kept


@pytest.fixture
def small_disk(server: str, database: str) -> Iterator[tuple[str, Path]]:
    """URL of a store whose tables lie on a real disk of 4 MB, and where that is mounted."""
    folder = Path(tempfile.mkdtemp(prefix="latent-postgres-small-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("no small disk: run as root, where it may mount one (in a container with SYS_ADMIN)")
    try:
        with psycopg.connect(server, autocommit=True) as admin:
            (data,) = admin.execute("SHOW data_directory").fetchone() or ("",)
            os.chown(folder, Path(data).stat().st_uid, -1)
            admin.execute(f"CREATE TABLESPACE small LOCATION '{folder}'")  # type: ignore[call-overload]
            yield f"{database}%20-cdefault_tablespace%3Dsmall", folder
            schema = database.partition("search_path%3D")[2].partition("%2C")[0]
            admin.execute(f"DROP SCHEMA {schema} CASCADE")  # type: ignore[call-overload]
            admin.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def test_a_disk_that_is_really_full_is_said_and_the_load_goes_on_when_there_is_room(
    small_disk: tuple[str, Path], source: Path, tmp_path: Path
) -> None:
    url, disk = small_disk
    write_vectors(tmp_path / "large", fake_articles(150, 20), articles_per_shard=10)
    with ConceptStore(url) as store:
        load(store, "wiki", source)
        before = rows(store, "wiki")
        said = "No space left on device.*; make room on the server's disk"
        with pytest.raises(DatabaseError, match=said):
            load(store, "wiki", tmp_path / "large", replace_all=True)
        assert rows(store, "wiki") == before
        manifest = Manifest.load(tmp_path / "large")
        with loading(store, "wiki", manifest) as under_way:
            copied = len(staged(store, under_way))
        assert 0 < copied < 15
        subprocess.run(["mount", "-o", "remount,size=128m", str(disk)], check=True)
        load(store, "wiki", tmp_path / "large", replace_all=True)
        assert len(rows(store, "wiki")) == 3000


# ------------------------------------------------------------------------------------------------ connections


def test_a_server_that_is_not_there_and_an_address_that_is_none() -> None:
    with pytest.raises(
        DatabaseError, match=r"cannot connect to Postgres at 127\.0\.0\.1:1, database a: .*refused"
    ):
        connect("postgresql://me:secret@127.0.0.1:1/a")
    for url in ("mysql://a", "no address", "postgresql://a:secret@h/x?nonsense=1"):
        with pytest.raises(InputError, match="expected postgresql://") as caught:
            connect(url)
        assert "secret" not in str(caught.value)


def test_wrong_credentials_and_a_missing_database_are_said(server: str, database: str) -> None:
    with psycopg.connect(server, autocommit=True) as admin:
        (folder,) = admin.execute("SHOW data_directory").fetchone() or ("",)
    hba = Path(folder) / "pg_hba.conf"
    before = hba.read_text()
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS guarded")
        admin.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'")
        hba.write_text("local all guarded scram-sha-256\n" + before)
        admin.execute("SELECT pg_reload_conf(), pg_sleep(0.3)")  # the new rules come with a signal
    try:
        url = database.replace("postgres:@", "guarded:{}@")
        with pytest.raises(DatabaseError, match=r"password authentication failed.*PGPASSWORD") as caught:
            connect(url.format("wrong"))
        assert "wrong" not in str(caught.value)
        connect(url.format("right")).close()
        with pytest.raises(DatabaseError, match='role "nobody" does not exist; give user'):
            connect(database.replace("postgres:@", "nobody:@"))
        with pytest.raises(DatabaseError, match="does not exist; create that database"):
            connect(server.replace("/postgres?", "/nowhere?"))
    finally:
        hba.write_text(before)
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute("SELECT pg_reload_conf()")


def test_a_full_server_is_asked_again_until_one_leaves(server: str, database: str) -> None:
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS narrow")
        admin.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 1")
    url = database.replace("postgres:@", "narrow:@")
    first = connect(url)
    with pytest.raises(DatabaseError, match=r"no free connection for 0\.3 s: pass --workers"):
        connect(url, wait_s=0.3)
    timer = threading.Timer(0.4, first.close)
    timer.start()
    connect(url, wait_s=20).close()
    timer.join()


def test_a_connection_that_is_cut_in_mid_load_leaves_nothing_and_the_load_goes_on(
    database: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(source)

    def load_and_be_cut() -> None:
        with ConceptStore(database) as store, loading(store, "wiki", manifest) as under_way:
            copy_shard(store, under_way, source, manifest.shards[0])

            def cut_after_three(*arguments: Any) -> Any:
                rows = entries_of(*arguments)
                yield from (next(rows) for _ in range(3))
                with psycopg.connect(database, autocommit=True) as admin:
                    admin.execute(
                        "SELECT pg_terminate_backend(%s, 5000)", [store.connection.info.backend_pid]
                    )
                yield from rows

            monkeypatch.setattr("lvm.vectors.concept_load.entries_of", cut_after_three)
            copy_shard(store, under_way, source, manifest.shards[1])

    with pytest.raises(DatabaseError, match="the connection is lost"):
        load_and_be_cut()
    monkeypatch.undo()
    with ConceptStore(database) as store:
        assert store.find("wiki") is None
        with loading(store, "wiki", manifest) as under_way:
            assert set(staged(store, under_way)) == {"part-00000.parquet"}
        load(store, "wiki", source)
        assert len(rows(store, "wiki")) == 60


def test_a_user_who_may_not_write_is_told_so(server: str, database: str, source: Path) -> None:
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS reader")
        admin.execute("CREATE ROLE reader LOGIN")
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", source)
        (schema,) = store.connection.execute("SELECT current_schema()").fetchone() or ("",)
        store.connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO reader")  # type: ignore[arg-type]
        store.connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader")  # type: ignore[arg-type]
    with ConceptStore(database.replace("postgres:@", "reader:@")) as store:
        assert len(search(store, dataset, None, 5)) == 5
        with pytest.raises(DatabaseError, match=r"must be owner.*grant this user the privilege"):
            store.clear("wiki")
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("DROP OWNED BY reader")


# ------------------------------------------------------------------------------------- without pgvector, search


def test_without_pgvector_vectors_are_arrays_and_searches_give_the_same(
    plain: str, database: str, source: Path
) -> None:
    query = table_to_vectors(read_table(source / "part-00001.parquet"))[5].astype(np.float32)
    with ConceptStore(plain) as store:
        assert "pgvector is installed but not enabled" in store.missing
        dataset = load(store, "plain", source)
        assert dataset.storage == "real"
        assert "CREATE EXTENSION vector" in ensure_index(store, dataset, "hnsw")
        found = search(store, dataset, query, 7)
        some = search(store, dataset, query, 7, Filters(contains="w9x1"))
        exact = read_articles(store, dataset, 0, 99)
    with ConceptStore(database) as store:
        assert store.missing == ""
        other = load(store, "wiki", source)
        same = search(store, other, query, 7)
        assert [h.chunk_id for h in found] == [h.chunk_id for h in same]
        np.testing.assert_allclose([h.score for h in found], [h.score for h in same], atol=2e-3)  # type: ignore[arg-type]
        assert [h.chunk_id for h in some] == [
            h.chunk_id for h in search(store, other, query, 7, Filters(contains="w9x1"))
        ]
        assert (
            read_articles(store, other, 0, 99)
            .select(["chunk_id", "text"])
            .equals(exact.select(["chunk_id", "text"]))
        )


def test_the_index_finds_what_a_scan_finds_also_through_filters(database: str, tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", fake_articles(50, 60), articles_per_shard=50)
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", tmp_path / "v")
        store.connection.execute(
            f"UPDATE cpe_d{dataset.id} SET tmd_code = ((doc_id % 16) << 12) | ((position % 32) << 7)"
        )  # type: ignore[arg-type]
        query = table_to_vectors(read_articles(store, dataset, 7, 7))[3].astype(np.float32)
        filters = [
            Filters(),
            Filters(wanted=Wanted(3)),
            Filters(wanted=Wanted(3, 9)),
            Filters(tmd_code=7 << 12 | 3 << 7),
        ]
        scanned = [search(store, dataset, query, 10, f) for f in filters]
        assert scanned[0][0].doc_id == 7
        assert {h.doc_id % 16 for h in scanned[1]} == {3}
        assert {(h.doc_id % 16, h.position % 32) for h in scanned[2]} == {(3, 9)}
        for kind in ("hnsw", "ivfflat"):
            assert ensure_index(store, dataset, kind) == ""  # type: ignore[arg-type]
            assert store.index_kind(dataset) == kind
            store.connection.execute("SET enable_seqscan = off")
            for wanted, f in zip(scanned, filters, strict=True):
                found = {h.chunk_id for h in search(store, dataset, query, 10, f)}
                assert len(found & {h.chunk_id for h in wanted}) >= 0.9 * len(wanted), (kind, f)
        assert store.stats(dataset)["index"] == "ivfflat"


def test_a_query_of_another_length_or_norm_is_refused(database: str, source: Path) -> None:
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", source)
        for bad in (np.ones(5, np.float32), np.ones(768, np.float32), np.full(768, np.nan, np.float32)):
            with pytest.raises(InputError, match="the query"):
                search(store, dataset, bad, 3)
        with pytest.raises(InputError, match="NUL"):
            search(store, dataset, None, 3, Filters(contains="a\0"))


# ------------------------------------------------------------------------------------------- ingest, migrations


def test_an_article_is_stored_once_and_a_changed_one_takes_the_place_of_the_old(
    database: str, source: Path
) -> None:
    first, second = encoded(["one two", "three"]), encoded(["one two", "other", "third"])
    with ConceptStore(database) as store:
        dataset = store.ensure("notes", FakeCodec().identity, "float16", "notes", "CC0-1.0")
        assert store.ensure("notes", FakeCodec().identity, "float16") == dataset
        assert store_article(store, dataset, "s", "a", "1", first)
        assert not store_article(store, dataset, "s", "a", "1", first)
        version = store.dataset("notes").version
        assert not store_article(store, dataset, "s", "a", "1", first)
        assert store.dataset("notes").version == version
        assert store_article(store, dataset, "s", "a", "2", second)
        assert read_articles(store, dataset, 0, 9).column("text").to_pylist() == ["one two", "other", "third"]
        bad = encoded(["one two", "nul\0"])
        with pytest.raises(InputError, match="NUL"):
            store_article(store, dataset, "s", "a", "3", bad)
        assert stored_contents(store, dataset, [("s", "a")]) == {("s", "a"): "2"}
        assert read_articles(store, dataset, 0, 9).num_rows == 3
        store.clear("notes")
        with pytest.raises(DatabaseError, match="'notes' was cleared meanwhile"):
            store_article(store, dataset, "s", "a", "4", second)


def test_an_article_that_a_load_brought_keeps_its_number(database: str, source: Path) -> None:
    with ConceptStore(database) as store:
        dataset = load(store, "wiki", source)
        known = read_table(source / "part-00001.parquet").slice(0, 2)
        assert store_article(store, dataset, "double", "8", "new", known)
        assert read_articles(store, dataset, 8, 8).num_rows == 2
        new = encoded(["quite new"], chunk_id=["cd" * 16])
        store_article(store, dataset, "double", "new", "x", new)
        assert read_articles(store, dataset, 20, 99).column("text").to_pylist() == ["quite new"]
        assert store.dataset("wiki").loaded is None


def test_clearing_takes_the_named_dataset_alone(database: str, source: Path) -> None:
    with ConceptStore(database) as store:
        load(store, "one", source)
        load(store, "two", source)
        assert store.clear("one") == 60
        assert [d.name for d in store.datasets()] == ["two"]
        assert len(rows(store, "two")) == 60
        assert rows(store, "one") == []
        with pytest.raises(InputError, match=r"no dataset 'one' in Postgres at .*; there are: 'two'"):
            store.clear("one")
        load(store, "one", source)
        assert len(rows(store, "one")) == 60


def test_stores_that_open_at_once_make_the_tables_once_and_newer_ones_are_refused(database: str) -> None:
    failed: list[BaseException] = []

    def open_store() -> None:
        try:
            ConceptStore(database).connection.close()
        except LvmError as err:
            failed.append(err)

    threads = [threading.Thread(target=open_store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with psycopg.connect(database, autocommit=True) as admin:
        assert admin.execute("SELECT version FROM cpe_migration").fetchall() == [(1,)]
        admin.execute("INSERT INTO cpe_migration VALUES (2)")
    with pytest.raises(
        DatabaseError, match="has schema version 2, this program knows 1; install a newer version"
    ):
        ConceptStore(database)
