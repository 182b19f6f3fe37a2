"""Shards into the concept store: staged in parallel, merged at once, the same after every kill.

A load copies shards into an unlogged staging table, each in a transaction of its own that also notes the shard in
`cpe_staged`; that table is unlogged as well, so a crash of the server empties both. One transaction then merges all.
Killed at any moment, the same load goes on from the shards that are noted, and readers see the old rows or the new.
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
from lvm.vectors.concept_schema import (
    add_keys,
    attach,
    make_parent,
    make_partition,
    parent_table,
    partition_table,
)
from lvm.vectors.concepts import COLUMN_NAMES, ConceptStore, Dataset
from lvm.vectors.entries import COLUMNS, KEPT, Storage, entries_of, require_name
from lvm.vectors.postgres import database_errors, fetch_one
from lvm.vectors.shards import Manifest, Shard, file_sha256, fingerprint, read_table


@dataclass(frozen=True)
class Load:
    """A load under way; pickled on its way to the workers."""

    stage: str
    """Name of the staging table."""
    dataset: str
    """Dataset it goes to."""
    identity: CodecIdentity
    """Codec of the vectors."""
    storage: Storage
    """Column type of the vectors."""


@contextmanager
def loading(store: ConceptStore, name: str, manifest: Manifest) -> Iterator[Load]:
    """A load of these shards into a dataset, from where an earlier one of the same was killed.

    Raises IdentityError where the dataset is another codec's, DatabaseError where another load of it runs.
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
            f"dataset {name!r} stores float16, the shards hold float32 and would be rounded; load into another "
            "--dataset, or encode with --dtype float16"
        )
    stage = f"cpe_stage_{fingerprint([name, manifest.fingerprint, storage])}"
    lock = int.from_bytes(hashlib.sha256(f"load {name}".encode()).digest()[:8], signed=True)
    with database_errors(f"beginning the load of dataset {name!r}"):
        # Of the connection: gone with this process, whatever ends it.
        if not fetch_one(store.connection, "SELECT pg_try_advisory_lock(%s)", [lock])[0]:
            raise DatabaseError(
                f"another load of dataset {name!r} is under way; wait for it, or end that process, then run again"
            )
        make_parent(store.connection, identity.dim, storage)
        with store.connection.transaction():
            store.drop_stages(name, keep=stage)
            store.connection.execute(
                sql.SQL("CREATE UNLOGGED TABLE IF NOT EXISTS {} (LIKE {} INCLUDING STORAGE)").format(
                    sql.Identifier(stage), parent_table(identity.dim, storage)
                )
            )
            store.connection.execute(
                "INSERT INTO cpe_stage (stage, dataset) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [stage, name],
            )
    try:
        yield Load(stage, name, identity, storage)
    finally:
        with suppress(psycopg.Error):  # a lost connection has let it go already
            store.connection.execute("SELECT pg_advisory_unlock(%s)", [lock])


def staged(store: ConceptStore, load: Load) -> dict[str, int]:
    """Shard to its rows, of those this load has copied."""
    with database_errors("reading what is loaded already"):
        return dict(
            store.connection.execute(
                "SELECT shard, entries FROM cpe_staged WHERE stage = %s", [load.stage]
            ).fetchall()
        )


def copy_shard(store: ConceptStore, load: Load, directory: Location, shard: Shard) -> int:
    """Copy one shard into the staging table, once however often it is asked for; its rows.

    Raises InputError naming the shard when its bytes, texts, ids or vectors are not what they must be.
    """
    path = directory / shard.file
    what = f"shard {shard.file}"
    if (found := file_sha256(path)) != shard.sha256:
        raise InputError(
            f"{path} has SHA-256 {found[:16]}…, its manifest says {shard.sha256[:16]}…: it changed or was damaged. "
            "Run `latent encode` again; only that is redone"
        )
    rows = entries_of(read_table(path), load.dataset, load.identity, load.storage, what)
    with database_errors(f"loading {what}"), store.connection.transaction():
        # Waits for another worker that has the shard in hand: at most one of them is left from a killed run.
        noted = store.connection.execute(
            "INSERT INTO cpe_staged (stage, shard, entries) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING 1",
            [load.stage, shard.file, shard.rows],
        ).fetchone()
        if noted is not None:
            store.copy(sql.Identifier(load.stage), rows)
    return shard.rows


def merge(store: ConceptStore, load: Load, manifest: Manifest, replace: bool = False) -> Dataset:
    """Make the staged rows the dataset's, in one transaction, and drop the staging table.

    Rows of articles that are not in these shards stay, unless `replace`. Raises InputError when a chunk comes
    twice, OutputError when the dataset holds other articles under these numbers.
    """
    there = staged(store, load)
    wrong = [s.file for s in manifest.shards if there.get(s.file) != s.rows]
    if wrong:
        raise DatabaseError(
            f"{len(wrong)} of {len(manifest.shards)} shards are not loaded ({wrong[0]} …): the server lost them in "
            "a crash; run the same command again"
        )
    cure = "Remove what is there twice from the input, then chunk and encode again"
    try:
        with database_errors(f"merging into dataset {load.dataset!r}"), store.alone(load.dataset):
            number = store.note(load.dataset, load.identity, load.storage, manifest.source, manifest.licence)
            if number is not None:  # rows first, then their keys: sorting beats inserting one by one
                table = partition_table(number)
                make_partition(store.connection, number, load.identity, load.storage, load.dataset)
                store.connection.execute(
                    sql.SQL("INSERT INTO {0} ({1}) SELECT {1} FROM {2}").format(
                        table, COLUMN_NAMES, sql.Identifier(load.stage)
                    )
                )
                add_keys(store.connection, number)
                attach(store.connection, number, load.identity.dim, load.storage, load.dataset)
            else:
                table = _merge_into(store, store.dataset(load.dataset), load, replace)
            store.connection.execute(
                sql.SQL(
                    "UPDATE cpe_dataset SET loaded = %s, source = %s, licence = %s, version = gen_random_uuid(), "
                    "next_doc_id = greatest(next_doc_id, (SELECT coalesce(max(doc_id), -1) + 1 FROM {})) "
                    "WHERE name = %s"
                ).format(table),
                [manifest.fingerprint, manifest.source, manifest.licence, load.dataset],
            )
            store.drop_stages(load.dataset, keep=None)
    except DatabaseError as err:
        if isinstance(err.__cause__, errors.UniqueViolation | errors.CardinalityViolation):
            raise InputError(
                f"the shards hold a chunk or a place in an article twice: {err}. {cure}"
            ) from err
        raise
    with database_errors("counting the new rows"):
        store.connection.execute(sql.SQL("ANALYZE {}").format(table))
    return store.dataset(load.dataset)


def _merge_into(store: ConceptStore, dataset: Dataset, load: Load, replace: bool) -> sql.Identifier:
    table, stage = dataset.table, sql.Identifier(load.stage)
    require_same_codec(dataset.identity, load.identity, f"dataset {load.dataset!r}", "the shards")
    if dataset.storage != load.storage:  # it was cleared and made again meanwhile
        raise DatabaseError(f"dataset {load.dataset!r} changed during the load; run the same command again")
    if replace:
        store.connection.execute(sql.SQL("DELETE FROM {}").format(table))
        store.connection.execute("DELETE FROM cpe_article WHERE dataset = %s", [load.dataset])
    other = store.connection.execute(
        sql.SQL(
            "SELECT e.doc_id, e.title, s.doc_id, s.title FROM {0} e JOIN {1} s ON e.doc_id = s.doc_id "
            "WHERE s.position = 0 AND e.position = 0 AND e.cpe_id <> s.cpe_id UNION ALL "
            "SELECT e.doc_id, e.title, s.doc_id, s.title FROM {0} e JOIN {1} s ON e.cpe_id = s.cpe_id "
            "WHERE e.doc_id <> s.doc_id LIMIT 1"
        ).format(table, stage)
    ).fetchone()
    if other is not None:
        raise OutputError(
            f"dataset {load.dataset!r} holds other articles under these numbers: it has {other[1]!r} as "
            f"{other[0]}, the shards {other[3]!r} as {other[2]}. Load into another --dataset, or pass --replace to "
            "have these shards and nothing else in it"
        )
    store.connection.execute(
        sql.SQL(
            "DELETE FROM {} e WHERE e.doc_id IN (SELECT doc_id FROM {}) "
            "AND NOT EXISTS (SELECT 1 FROM {} s WHERE s.cpe_id = e.cpe_id)"
        ).format(table, stage, stage)
    )
    new = [c for c in COLUMNS if c != "cpe_id"]
    given = sql.SQL("excluded.{}")
    kept = sql.SQL(
        "CASE WHEN excluded.{0} IS NULL AND e.concept_text = excluded.concept_text THEN e.{0} ELSE excluded.{0} END"
    )
    values = [(kept if c in KEPT else given).format(sql.Identifier(c)) for c in new]
    own = sql.SQL(", ").join(sql.SQL("e.{}").format(sql.Identifier(c)) for c in new)
    store.connection.execute(
        sql.SQL(
            "INSERT INTO {table} AS e ({columns}) SELECT {columns} FROM {stage} ON CONFLICT (cpe_id) DO UPDATE "
            "SET ({new}) = ROW({values}) WHERE ROW({own}) IS DISTINCT FROM ROW({values})"
        ).format(
            table=table,
            columns=COLUMN_NAMES,
            stage=stage,
            new=sql.SQL(", ").join(map(sql.Identifier, new)),
            values=sql.SQL(", ").join(values),
            own=own,
        )
    )
    return table
