"""Load shards into the concept store: staged in parallel, merged in one transaction, resumable.

A load copies shards into an unlogged staging table, one transaction per shard, and records each in `cpe_staged`; that
table is unlogged too, so a server crash empties both. One transaction then merges all. An interrupted load resumes
from the shards recorded, and readers see either the old rows or the new ones.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psycopg
from psycopg import errors, sql

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import DatabaseError, InputError, OutputError
from lvm.storage import Location
from lvm.vectors.concept_schema import attach, make_parent, make_partition, parent_table, partition_table
from lvm.vectors.concepts import COLUMN_NAMES, ConceptStore, Dataset
from lvm.vectors.entries import COLUMNS, KEPT, Storage, entries_of, require_name
from lvm.vectors.postgres import database_errors, execute, fetch_one
from lvm.vectors.shards import Manifest, Shard, file_sha256, fingerprint, read_table


@dataclass(frozen=True)
class Load:
    """A load in progress. Can be pickled."""

    stage: str
    """Name of the staging table."""
    dataset: str
    identity: CodecIdentity
    storage: Storage


@contextmanager
def loading(store: ConceptStore, name: str, manifest: Manifest) -> Iterator[Load]:
    """Begin, or resume, the load of these shards into a dataset.

    Raises IdentityError if the dataset has another codec, DatabaseError if another load into it is running.
    """
    require_name(name)
    identity = manifest.identity
    found = store.find(name)
    if found is not None:
        require_same_codec(found.identity, identity, f"dataset {name!r}", "the shards")
    wanted = store.storage_for(manifest.settings.get("dtype", "float16"))
    storage = found.storage if found else wanted
    if storage == "halfvec" and wanted == "vector":
        raise InputError(
            f"dataset {name!r} stores float16, but the shards hold float32, which would be rounded; load into another "
            "--dataset, or encode with --dtype float16"
        )
    stage = f"cpe_stage_{fingerprint([name, manifest.fingerprint, storage])}"
    lock = int.from_bytes(hashlib.sha256(f"load {name}".encode()).digest()[:8], signed=True)
    with database_errors(f"beginning the load of dataset {name!r}"):
        # Held by the connection: released when this process ends, even if it is killed.
        if not fetch_one(store.connection, "SELECT pg_try_advisory_lock(%s)", [lock])[0]:
            raise DatabaseError(
                f"another load of dataset {name!r} is under way; wait for it, or end that process, then run again"
            )
        make_parent(store.connection, identity.dim, storage)
        with store.connection.transaction():
            store.drop_stages(name, keep=stage)
            create = "CREATE UNLOGGED TABLE IF NOT EXISTS {} (LIKE {} INCLUDING STORAGE)"
            execute(store.connection, create, sql.Identifier(stage), parent_table(identity.dim, storage))
            store.connection.execute(
                "INSERT INTO cpe_stage (stage, dataset) VALUES (%s, %s) ON CONFLICT DO NOTHING", [stage, name]
            )
    try:
        yield Load(stage, name, identity, storage)
    finally:
        with suppress(psycopg.Error):  # a lost connection has released the lock already
            store.connection.execute("SELECT pg_advisory_unlock(%s)", [lock])


def staged(store: ConceptStore, load: Load) -> dict[str, int]:
    """Shards that this load has copied, with their numbers of rows."""
    query = "SELECT shard, entries FROM cpe_staged WHERE stage = %s"
    with database_errors("reading which shards are staged"):
        return dict(store.connection.execute(query, [load.stage]).fetchall())


def copy_shard(store: ConceptStore, load: Load, directory: Location, shard: Shard) -> int:
    """Copy one shard into the staging table unless it is there; returns its number of rows.

    Raises InputError naming the shard if its checksum, texts, ids or vectors are wrong.
    """
    path = directory / shard.file
    what = f"shard {shard.file}"
    if (found := file_sha256(path)) != shard.sha256:
        raise InputError(
            f"{path} has SHA-256 {found[:16]}…, its manifest says {shard.sha256[:16]}…: it changed or was damaged. "
            "Run `latent encode` again; only this shard is redone"
        )
    rows = entries_of(read_table(path), load.dataset, load.identity, load.storage, what)
    with database_errors(f"loading {what}"), store.connection.transaction():
        # Blocks while another worker, left over from a killed run, copies the same shard.
        inserted = store.connection.execute(
            "INSERT INTO cpe_staged (stage, shard, entries) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING 1",
            [load.stage, shard.file, shard.rows],
        ).fetchone()
        if inserted is not None:
            store.copy(sql.Identifier(load.stage), rows)
    return shard.rows


def merge(store: ConceptStore, load: Load, manifest: Manifest, replace: bool = False) -> Dataset:
    """Merge the staged rows into the dataset, in one transaction, and drop the staging table.

    Articles that are not in these shards are kept, unless `replace`. Raises InputError if a chunk repeats,
    OutputError if the dataset has other articles under these numbers.
    """
    copied = staged(store, load)
    missing = [s.file for s in manifest.shards if copied.get(s.file) != s.rows]
    if missing:
        raise DatabaseError(
            f"{len(missing)} of {len(manifest.shards)} shards are not loaded ({missing[0]} …): the server lost them in "
            "a crash; run the same command again"
        )
    try:
        with database_errors(f"merging into dataset {load.dataset!r}"), store.locked(load.dataset):
            number = store.add(load.dataset, load.identity, load.storage, manifest.source, manifest.licence)
            if number is not None:  # a new dataset: adding its keys after the rows is faster
                table = partition_table(number)
                make_partition(store.connection, number, load.identity, load.storage, load.dataset)
                insert = "INSERT INTO {0} ({1}) SELECT {1} FROM {2}"
                execute(store.connection, insert, table, COLUMN_NAMES, sql.Identifier(load.stage))
                attach(store.connection, number, load.identity.dim, load.storage, load.dataset)
            else:
                table = _merge_into(store, store.dataset(load.dataset), load, replace)
            execute(
                store.connection,
                "UPDATE cpe_dataset SET loaded = %s, source = %s, licence = %s, version = gen_random_uuid(), "
                "next_doc_id = greatest(next_doc_id, (SELECT coalesce(max(doc_id), -1) + 1 FROM {})) WHERE name = %s",
                table,
                parameters=[manifest.fingerprint, manifest.source, manifest.licence, load.dataset],
            )
            store.drop_stages(load.dataset, keep=None)
    except DatabaseError as err:
        if isinstance(err.__cause__, errors.UniqueViolation | errors.CardinalityViolation):
            raise InputError(
                f"the shards hold a chunk or a position in an article twice: {err}. Remove the duplicates from the "
                "input, then chunk and encode again"
            ) from err
        raise
    with database_errors("counting the new rows"):
        execute(store.connection, "ANALYZE {}", table)
    return store.dataset(load.dataset)


def _merge_into(store: ConceptStore, dataset: Dataset, load: Load, replace: bool) -> sql.Identifier:
    table, stage = dataset.table, sql.Identifier(load.stage)
    require_same_codec(dataset.identity, load.identity, f"dataset {load.dataset!r}", "the shards")
    if dataset.storage != load.storage:  # it was cleared and created again meanwhile
        raise DatabaseError(f"dataset {load.dataset!r} changed during the load; run the same command again")
    if replace:
        execute(store.connection, "DELETE FROM {}", table)
        store.connection.execute("DELETE FROM cpe_article WHERE dataset = %s", [load.dataset])
    other = execute(
        store.connection,
        "SELECT e.doc_id, e.title, s.doc_id, s.title FROM {0} e JOIN {1} s ON e.doc_id = s.doc_id "
        "WHERE s.position = 0 AND e.position = 0 AND e.cpe_id <> s.cpe_id UNION ALL "
        "SELECT e.doc_id, e.title, s.doc_id, s.title FROM {0} e JOIN {1} s ON e.cpe_id = s.cpe_id "
        "WHERE e.doc_id <> s.doc_id LIMIT 1",
        *(table, stage),
    ).fetchone()
    if other is not None:
        raise OutputError(
            f"dataset {load.dataset!r} holds other articles under these numbers: {other[1]!r} as {other[0]}, where the "
            f"shards have {other[3]!r} as {other[2]}. Load into another --dataset, or pass --replace to replace its "
            "content with these shards"
        )
    execute(
        store.connection,
        "DELETE FROM {0} e WHERE e.doc_id IN (SELECT doc_id FROM {1}) "
        "AND NOT EXISTS (SELECT 1 FROM {1} s WHERE s.cpe_id = e.cpe_id)",
        *(table, stage),
    )
    new = [c for c in COLUMNS if c != "cpe_id"]
    given = sql.SQL("excluded.{}")
    kept = sql.SQL(
        "CASE WHEN excluded.{0} IS NULL AND e.concept_text = excluded.concept_text THEN e.{0} ELSE excluded.{0} END"
    )
    values = [(kept if c in KEPT else given).format(sql.Identifier(c)) for c in new]
    own = sql.SQL(", ").join(sql.SQL("e.{}").format(sql.Identifier(c)) for c in new)
    names = sql.SQL(", ").join(map(sql.Identifier, new))
    execute(
        store.connection,
        "INSERT INTO {0} AS e ({1}) SELECT {1} FROM {2} ON CONFLICT (cpe_id) DO UPDATE "
        "SET ({3}) = ROW({4}) WHERE ROW({5}) IS DISTINCT FROM ROW({4})",
        *(table, COLUMN_NAMES, stage, names, sql.SQL(", ").join(values), own),
    )
    return table
