"""Concepts in Postgres: a row per chunk, with its vector, its TMD code and its place in its article.

A *dataset* is a named set of rows of one codec. Each has a partition of its own, with a CHECK that holds the codec's
digest, so the server itself refuses a vector of another codec; dropping the partition clears the dataset.

Beside this file: the tables (`concept_schema`), and rows in (`concept_load`, `ingest`), out (`concept_export`) and
found (`concept_search`).
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
    add_keys,
    attach,
    enable_pgvector,
    make_parent,
    make_partition,
    migrate,
    partition_table,
)
from lvm.vectors.entries import COLUMNS, Storage, require_name
from lvm.vectors.postgres import CONNECT_WAIT_S, connect, database_errors, fetch_one, server_name
from lvm.vectors.shards import VectorType

CURSOR_ROWS = 2000
"""Rows fetched from a server-side cursor at once: 3 MB of float16 vectors."""

COLUMN_NAMES = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
"""In SQL, in the order that entries are copied in."""


@dataclass(frozen=True)
class Dataset:
    """What the store knows of one dataset."""

    id: int
    """Number in the names of its tables."""
    name: str
    """As given to --dataset; `dataset_source` of its rows."""
    identity: CodecIdentity
    """Codec of every vector in it."""
    storage: Storage
    """Column type of the vectors."""
    source: str
    """Where the text comes from, in words."""
    licence: str
    """Licence of the text."""
    loaded: str | None
    """Fingerprint of the shards it was last loaded from; None where articles came since."""
    version: str
    """Another one after every change."""

    @property
    def table(self) -> sql.Identifier:
        """Its partition."""
        return partition_table(self.id)


class ConceptStore:
    """One connection to a store, its tables brought up to this version. Use it as a context manager.

    Every method raises DatabaseError where the server refuses or is gone.
    """

    def __init__(self, url: str, wait_s: float = CONNECT_WAIT_S) -> None:
        """wait_s: how long a full server is asked again."""
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

    missing: str
    """What is missing on the server for pgvector's types and indexes; "" where nothing is."""

    def limit_statements(self, milliseconds: int) -> None:
        """The server ends a statement that takes longer, with DatabaseError; 0 for no limit."""
        with database_errors("setting a time limit"):
            self.connection.execute("SELECT set_config('statement_timeout', %s, false)", [str(milliseconds)])

    def datasets(self, name: str | None = None) -> list[Dataset]:
        """All datasets, by name; only the one of this name where given."""
        with database_errors("listing the datasets"):
            rows = self.connection.execute(
                "SELECT id, name, codec, storage, source, licence, loaded, version::text "
                "FROM cpe_dataset WHERE %s::text IS NULL OR name = %s ORDER BY name",
                [name, name],
            ).fetchall()
        return [Dataset(i, n, CodecIdentity.from_dict(c), *rest) for i, n, c, *rest in rows]

    def find(self, name: str) -> Dataset | None:
        """The dataset of this name, None where there is none."""
        return next(iter(self.datasets(require_name(name))), None)

    def dataset(self, name: str) -> Dataset:
        """The dataset of this name. Raises InputError with those there are."""
        if (found := self.find(name)) is None:
            names = ", ".join(repr(d.name) for d in self.datasets()) or "none yet"
            raise InputError(f"no dataset {name!r} in {server_name(self.url)}; there are: {names}")
        return found

    def storage_for(self, dtype: VectorType) -> Storage:
        """Column type that holds vectors of `dtype` exactly, real where pgvector is missing."""
        return "real" if self.missing else "halfvec" if dtype == "float16" else "vector"

    def ensure(
        self, name: str, identity: CodecIdentity, dtype: VectorType, source: str = "", licence: str = ""
    ) -> Dataset:
        """The dataset of this name and codec, made where there is none.

        Raises IdentityError where it holds another codec's vectors.
        """
        found = self.find(name)
        if found is None:
            storage = self.storage_for(dtype)
            with database_errors(f"making dataset {name!r}"):
                make_parent(self.connection, identity.dim, storage)
                with self.connection.transaction():
                    if (number := self.note(name, identity, storage, source, licence)) is not None:
                        make_partition(self.connection, number, identity, storage, name)
                        add_keys(self.connection, number)
                        attach(self.connection, number, identity.dim, storage, name)
            found = self.dataset(name)
        require_same_codec(found.identity, identity, f"dataset {name!r}", "what is to be stored")
        return found

    def note(
        self, name: str, identity: CodecIdentity, storage: Storage, source: str, licence: str
    ) -> int | None:
        """Write a new dataset down; its number, None where there is one of this name."""
        row = self.connection.execute(
            "INSERT INTO cpe_dataset (name, codec_digest, codec, dim, storage, source, licence) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO NOTHING RETURNING id",
            [name, identity.digest, Jsonb(identity.to_dict()), identity.dim, storage, source, licence],
        ).fetchone()
        return None if row is None else int(row[0])

    @contextmanager
    def alone(self, dataset: str) -> Iterator[None]:
        """A transaction that alone changes this dataset. What changes its rows gives it a new version."""
        with self.connection.transaction():
            self.connection.execute("SELECT FROM cpe_dataset WHERE name = %s FOR UPDATE", [dataset])
            yield

    def copy(self, table: sql.Identifier, rows: Iterator[tuple[Any, ...]]) -> None:
        """Write rows, as `entries_of` gives them, in binary form."""
        command = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(table, COLUMN_NAMES)
        types = [t if t != "uuid" else "bytea" for t in COLUMNS.values()]  # 16 bytes on the wire, both
        with self.connection.cursor() as cursor, cursor.copy(command) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    def drop_stages(self, dataset: str, keep: str | None) -> None:
        """Remove what loads of a dataset have staged, but for one."""
        for (stage,) in self.connection.execute(
            "SELECT stage FROM cpe_stage WHERE dataset = %s AND stage IS DISTINCT FROM %s", [dataset, keep]
        ).fetchall():
            self.connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(stage)))
            self.connection.execute("DELETE FROM cpe_staged WHERE stage = %s", [stage])
            self.connection.execute("DELETE FROM cpe_stage WHERE stage = %s", [stage])

    def clear(self, name: str) -> int:
        """Remove a dataset with all that belongs to it, in one transaction; the number of rows it had.

        Raises InputError with the names there are.
        """
        found = self.dataset(name)
        with database_errors(f"clearing dataset {name!r}"), self.connection.transaction():
            rows = int(fetch_one(self.connection, sql.SQL("SELECT count(*) FROM {}").format(found.table))[0])
            self.drop_stages(name, keep=None)
            self.connection.execute(sql.SQL("DROP TABLE {}").format(found.table))
            self.connection.execute("DELETE FROM cpe_dataset WHERE name = %s", [name])
        return rows

    def stats(self, dataset: Dataset) -> dict[str, Any]:
        """Counts and sizes of one dataset: rows, articles, coded rows, bytes, its index, loads under way."""
        with database_errors(f"counting dataset {dataset.name!r}"):
            rows, articles, coded, truncated, tokens = fetch_one(
                self.connection,
                sql.SQL(
                    "SELECT count(*), count(DISTINCT doc_id), count(tmd_code), count(*) FILTER (WHERE truncated), "
                    "coalesce(sum(num_tokens), 0) FROM {}"
                ).format(dataset.table),
            )
            size = fetch_one(
                self.connection, "SELECT pg_total_relation_size(%s::regclass)", [dataset.table.as_string()]
            )[0]
            stages = fetch_one(
                self.connection, "SELECT count(*) FROM cpe_stage WHERE dataset = %s", [dataset.name]
            )[0]
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
        """TMD code to the number of rows that carry it."""
        with database_errors(f"counting the codes of dataset {dataset.name!r}"):
            return dict(
                self.connection.execute(
                    sql.SQL(
                        "SELECT tmd_code, count(*) FROM {} WHERE tmd_code IS NOT NULL GROUP BY 1 ORDER BY 1"
                    ).format(dataset.table)
                ).fetchall()
            )

    def index_kind(self, dataset: Dataset) -> str:
        """ "hnsw", "ivfflat", or "none"."""
        row = self.connection.execute(
            "SELECT amname FROM pg_class c JOIN pg_am a ON a.oid = c.relam JOIN pg_index i ON i.indexrelid = c.oid "
            "WHERE c.relname = %s AND i.indisvalid AND pg_table_is_visible(c.oid)",
            [f"cpe_d{dataset.id}_vec"],
        ).fetchone()
        return "none" if row is None else str(row[0])
