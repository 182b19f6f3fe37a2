"""The concept store in Postgres: one row per chunk, with its vector, TMD code and position in its article.

A *dataset* is a named set of rows of one codec. Each has its own partition, with a CHECK constraint on the codec's
digest, so the server itself rejects vectors of another codec; dropping the partition clears the dataset.

Related modules: tables (`concept_schema`), import (`concept_load`, `ingest`), export (`concept_export`) and search
(`concept_search`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from psycopg import sql
from psycopg.types.json import Jsonb

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError
from lvm.vectors.concept_schema import (
    attach,
    enable_pgvector,
    make_parent,
    make_partition,
    migrate,
    partition_table,
)
from lvm.vectors.entries import COLUMNS, Storage, require_name
from lvm.vectors.postgres import CONNECT_WAIT_S, connect, database_errors, execute, fetch_one, server_name
from lvm.vectors.shards import VectorType

CURSOR_ROWS = 2000
"""Rows per fetch from a server-side cursor: 3 MB of float16 vectors."""

COLUMN_NAMES = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
"""Column list in SQL, in the order in which entries are copied."""


@dataclass(frozen=True)
class Dataset:
    """The store's entry for one dataset."""

    id: int
    """Number in the names of its tables."""
    name: str
    """As given to --dataset; `dataset_source` of its rows."""
    identity: CodecIdentity
    storage: Storage
    source: str
    """Where the text comes from."""
    licence: str
    loaded: str | None
    """Fingerprint of the shards it was last loaded from; None if articles were ingested since."""
    version: str
    """UUID that changes with every change of the rows."""

    @property
    def table(self) -> sql.Identifier:
        """Its partition."""
        return partition_table(self.id)


class ConceptStore:
    """A connection to a store, with its schema migrated to this version. Use it as a context manager.

    Every method raises DatabaseError if the server cannot be reached or rejects a command.
    """

    missing: str
    """Why pgvector is not available on the server; "" if it is."""

    def __init__(self, url: str, wait_s: float = CONNECT_WAIT_S) -> None:
        """wait_s: how long to retry while the server has no free connection."""
        self.url = url
        self.connection = connect(url, wait_s)
        try:
            with database_errors(f"the tables of the store in {server_name(url)}"):
                migrate(self.connection, server_name(url))
                self.missing = enable_pgvector(self.connection)
        except BaseException:
            self.connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def limit_statements(self, milliseconds: int) -> None:
        """Set a time limit: slower statements raise DatabaseError; 0 for no limit."""
        with database_errors("setting a time limit"):
            self.connection.execute("SELECT set_config('statement_timeout', %s, false)", [str(milliseconds)])

    def datasets(self, name: str | None = None) -> list[Dataset]:
        """All datasets, sorted by name; with `name`, only that one."""
        with database_errors("listing the datasets"):
            rows = self.connection.execute(
                "SELECT id, name, codec, storage, source, licence, loaded, version::text "
                "FROM cpe_dataset WHERE %s::text IS NULL OR name = %s ORDER BY name",
                [name, name],
            ).fetchall()
        return [Dataset(i, n, CodecIdentity.from_dict(c), *rest) for i, n, c, *rest in rows]

    def find(self, name: str) -> Dataset | None:
        """The dataset of this name, or None."""
        return next(iter(self.datasets(require_name(name))), None)

    def dataset(self, name: str) -> Dataset:
        """The dataset of this name. Raises InputError, listing the existing names, if there is none."""
        if (found := self.find(name)) is None:
            names = ", ".join(repr(d.name) for d in self.datasets()) or "none yet"
            raise InputError(f"no dataset {name!r} in {server_name(self.url)}; there are: {names}")
        return found

    def storage_for(self, dtype: VectorType) -> Storage:
        """Column type that stores vectors of `dtype` without loss; "real" without pgvector."""
        return "real" if self.missing else "halfvec" if dtype == "float16" else "vector"

    def ensure(
        self, name: str, identity: CodecIdentity, dtype: VectorType, source: str = "", licence: str = ""
    ) -> Dataset:
        """The dataset of this name, created if there is none. Raises IdentityError if it has another codec."""
        found = self.find(name)
        if found is None:
            storage = self.storage_for(dtype)
            with database_errors(f"creating dataset {name!r}"):
                make_parent(self.connection, identity.dim, storage)
                with self.connection.transaction():
                    if (number := self.add(name, identity, storage, source, licence)) is not None:
                        make_partition(self.connection, number, identity, storage, name)
                        attach(self.connection, number, identity.dim, storage, name)
            found = self.dataset(name)
        require_same_codec(found.identity, identity, f"dataset {name!r}", "the vectors to store")
        return found

    def add(
        self, name: str, identity: CodecIdentity, storage: Storage, source: str, licence: str
    ) -> int | None:
        """Insert a dataset's entry, without its table; returns its number, or None if the name exists."""
        row = self.connection.execute(
            "INSERT INTO cpe_dataset (name, codec_digest, codec, dim, storage, source, licence) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO NOTHING RETURNING id",
            [name, identity.digest, Jsonb(identity.to_dict()), identity.dim, storage, source, licence],
        ).fetchone()
        return None if row is None else int(row[0])

    @contextmanager
    def locked(self, dataset: str) -> Iterator[None]:
        """A transaction with an exclusive lock on this dataset. If it changes rows, it must set a new version."""
        with self.connection.transaction():
            self.connection.execute("SELECT FROM cpe_dataset WHERE name = %s FOR UPDATE", [dataset])
            yield

    def copy(self, table: sql.Identifier, rows: Iterator[tuple[Any, ...]]) -> None:
        """Insert rows from `entries_of` with a binary COPY."""
        command = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(table, COLUMN_NAMES)
        types = [t if t != "uuid" else "bytea" for t in COLUMNS.values()]  # the same 16 bytes on the wire
        with self.connection.cursor() as cursor, cursor.copy(command) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    def drop_stages(self, dataset: str, keep: str | None) -> None:
        """Drop the staging tables of a dataset's loads, except `keep`."""
        for (stage,) in self.connection.execute(
            "SELECT stage FROM cpe_stage WHERE dataset = %s AND stage IS DISTINCT FROM %s", [dataset, keep]
        ).fetchall():
            execute(self.connection, "DROP TABLE IF EXISTS {}", sql.Identifier(stage))
            self.connection.execute("DELETE FROM cpe_staged WHERE stage = %s", [stage])
            self.connection.execute("DELETE FROM cpe_stage WHERE stage = %s", [stage])

    def clear(self, name: str) -> int:
        """Delete a dataset and everything that belongs to it, in one transaction; returns its number of rows.

        Raises InputError, listing the existing names, if there is none.
        """
        found = self.dataset(name)
        with database_errors(f"clearing dataset {name!r}"), self.connection.transaction():
            rows = int(fetch_one(self.connection, sql.SQL("SELECT count(*) FROM {}").format(found.table))[0])
            self.drop_stages(name, keep=None)
            execute(self.connection, "DROP TABLE {}", found.table)
            self.connection.execute("DELETE FROM cpe_dataset WHERE name = %s", [name])
        return rows

    def stats(self, dataset: Dataset) -> dict[str, Any]:
        """Counts and sizes of one dataset: rows, articles, coded rows, bytes, index, unfinished loads."""
        with database_errors(f"counting dataset {dataset.name!r}"):
            rows, articles, coded, truncated, tokens = fetch_one(
                self.connection,
                sql.SQL(
                    "SELECT count(*), count(DISTINCT doc_id), count(tmd_code), count(*) FILTER (WHERE truncated), "
                    "coalesce(sum(num_tokens), 0) FROM {}"
                ).format(dataset.table),
            )
            bytes_of = "SELECT pg_total_relation_size(%s::regclass)"
            size = fetch_one(self.connection, bytes_of, [dataset.table.as_string()])[0]
            count_stages = "SELECT count(*) FROM cpe_stage WHERE dataset = %s"
            stages = fetch_one(self.connection, count_stages, [dataset.name])[0]
        return {
            "dataset": dataset.name,
            "codec": str(dataset.identity),
            "dim": dataset.identity.dim,
            "storage": dataset.storage,
            "rows": rows,
            "articles": articles,
            "coded": coded,
            "truncated": truncated,
            "tokens": int(tokens),
            "bytes": size,
            "index": self.index_kind(dataset),
            "unfinished_loads": stages,
            "source": dataset.source,
            "licence": dataset.licence,
        }

    def codes(self, dataset: Dataset) -> dict[int, int]:
        """Number of rows of each TMD code."""
        query = sql.SQL("SELECT tmd_code, count(*) FROM {} WHERE tmd_code IS NOT NULL GROUP BY 1 ORDER BY 1")
        with database_errors(f"counting the codes of dataset {dataset.name!r}"):
            return dict(self.connection.execute(query.format(dataset.table)).fetchall())

    def index_kind(self, dataset: Dataset) -> str:
        """Kind of the vector index: "hnsw", "ivfflat", or "none"."""
        row = self.connection.execute(
            "SELECT amname FROM pg_class c JOIN pg_am a ON a.oid = c.relam JOIN pg_index i ON i.indexrelid = c.oid "
            "WHERE c.relname = %s AND i.indisvalid AND pg_table_is_visible(c.oid)",
            [f"cpe_d{dataset.id}_vec"],
        ).fetchone()
        return "none" if row is None else str(row[0])
