"""Concepts in Postgres: a row a chunk, with its vector, its TMD code and its place in its article.

A *dataset* is a named set of rows of one codec. Each has a partition of its own, with a CHECK that holds the codec's
digest, so the server itself refuses a vector of another codec; dropping the partition clears the dataset.

    cpe_entry                  a view over all rows, for people and other programs
    cpe_halfvec_768 …          one table a storage type and dimension, partitioned by dataset
    cpe_d7                     the partition of dataset 7: key, order and vector index are here
    cpe_dataset, cpe_article   what there is, and which articles were ingested from which content
    cpe_stage, cpe_staged      loads under way; their rows lie in unlogged tables until the merge

A load copies shards into an unlogged staging table, each in a transaction of its own that also notes the shard in
`cpe_staged`; that table is unlogged as well, so a crash of the server empties both. One transaction then merges all.
Killed at any moment, the same load goes on from the shards that are noted, and readers see the old rows or the new.
"""

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import psycopg
import pyarrow as pa
from numpy.typing import NDArray
from psycopg import errors, sql
from psycopg.types.json import Jsonb

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import DatabaseError, InputError, OutputError
from lvm.storage import Location
from lvm.vectors.entries import (
    COLUMNS,
    KEPT,
    Storage,
    entries_of,
    export_schema,
    read_vectors,
    require_name,
    require_text,
)
from lvm.vectors.postgres import connect, database_errors, server_name
from lvm.vectors.shards import (
    Manifest,
    Shard,
    VectorType,
    file_sha256,
    fingerprint,
    read_table,
    require_unit_vectors,
)

IndexKind = Literal["hnsw", "ivfflat", "none"]

MAX_INDEXED = {"vector": 2000, "halfvec": 4000}
"""Most dimensions pgvector's indexes take (its README, "Indexing")."""

INDEX_ROWS = 2000
"""From here on an index pays; below it a scan of the dataset takes milliseconds."""

CURSOR_ROWS = 2000
"""Rows fetched from a server-side cursor at once: 3 MB of float16 vectors."""

_NAMES = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))

_MIGRATIONS = (
    """
    CREATE TABLE cpe_dataset (
        id integer GENERATED ALWAYS AS IDENTITY UNIQUE,
        name text PRIMARY KEY,
        codec_digest text NOT NULL,
        codec jsonb NOT NULL,
        dim integer NOT NULL CHECK (dim > 0),
        storage text NOT NULL CHECK (storage IN ('vector', 'halfvec', 'real')),
        source text NOT NULL DEFAULT '',
        licence text NOT NULL DEFAULT '',
        loaded text,
        next_doc_id integer NOT NULL DEFAULT 0,
        version uuid NOT NULL DEFAULT gen_random_uuid(),
        created timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE cpe_article (
        dataset text NOT NULL REFERENCES cpe_dataset (name) ON DELETE CASCADE,
        source text NOT NULL,
        article_id text NOT NULL,
        doc_id integer NOT NULL,
        content text NOT NULL,
        chunks integer NOT NULL,
        stored timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (dataset, source, article_id)
    );
    CREATE TABLE cpe_stage (stage text PRIMARY KEY, dataset text NOT NULL, begun timestamptz NOT NULL DEFAULT now());
    CREATE UNLOGGED TABLE cpe_staged (
        stage text NOT NULL, shard text NOT NULL, entries integer NOT NULL, PRIMARY KEY (stage, shard)
    );
    """,
)
"""One text a version, applied in order and never undone or changed."""

_MIGRATION_LOCK = 0x6C61_7465_6E74  # "latent"


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
        return sql.Identifier(f"cpe_d{self.id}")


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


@dataclass(frozen=True)
class Hit:
    """A row that a search found."""

    chunk_id: str
    """32 hex digits."""
    score: float | None
    """Cosine to the query's vector; None where there was none."""
    doc_id: int
    """Its article's number in the dataset."""
    position: int
    """Its place in the article, from 0."""
    title: str
    """Of the article."""
    text: str
    """Of the chunk."""
    source: str
    """Of the article."""
    tmd_code: int | None
    """16 bits, None where it was never coded."""


@dataclass(frozen=True)
class Filters:
    """What a row must be to be found; None asks for nothing."""

    source: str | None = None
    """Equal to its source."""
    contains: str | None = None
    """Somewhere in its text, in any case."""
    tmd_code: int | None = None
    """Equal to its code."""
    domain: int | None = None
    """Number of its domain, and so on."""
    task: int | None = None
    modifier: int | None = None

    def where(self) -> tuple[sql.Composable, list[Any]]:
        """A condition and its parameters."""
        wanted = [
            ("source = %s", self.source),
            ("concept_text ILIKE %s ESCAPE '!'", self._pattern()),
            ("tmd_code = %s", self.tmd_code),
            ("tmd_code >> 12 = %s", self.domain),
            ("tmd_code >> 7 & 31 = %s", self.task),
            ("tmd_code >> 1 & 63 = %s", self.modifier),
        ]
        given = [(sql.SQL(c), v) for c, v in wanted if v is not None]
        return sql.SQL(" AND ").join(c for c, _ in given) if given else sql.SQL("true"), [v for _, v in given]

    def _pattern(self) -> str | None:
        if self.contains is None:
            return None
        plain = self.contains
        for mark in "!%_":
            plain = plain.replace(mark, f"!{mark}")
        return f"%{plain}%"


# ----------------------------------------------------------------------------------------------------- store


class ConceptStore:
    """One connection to a store, its tables brought up to this version. Use it as a context manager.

    Every method raises DatabaseError where the server refuses or is gone.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = connect(url)
        try:
            with database_errors(f"the tables of the store in {server_name(url)}"):
                self._migrate()
                self.missing = self._extension()
        except BaseException:
            self.connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    missing: str
    """What is missing on the server for pgvector's types and indexes; "" where nothing is."""

    def _migrate(self) -> None:
        with self.connection.transaction():
            self.connection.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATION_LOCK])
            if self._one("SELECT to_regclass('cpe_migration') IS NULL")[
                0
            ]:  # so that a reader needs no right to create
                self.connection.execute(
                    "CREATE TABLE cpe_migration "
                    "(version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now())"
                )
            at = self._one("SELECT coalesce(max(version), 0) FROM cpe_migration")[0]
            if at > len(_MIGRATIONS):
                raise DatabaseError(
                    f"the store in {server_name(self.url)} has version {at}, this program knows {len(_MIGRATIONS)}; "
                    "install a newer version of it"
                )
            for version, statements in enumerate(_MIGRATIONS[at:], at + 1):
                self.connection.execute(statements)
                self.connection.execute("INSERT INTO cpe_migration (version) VALUES (%s)", [version])

    def _extension(self) -> str:
        """Have pgvector; what is missing where that cannot be."""
        if self._one("SELECT count(*) FROM pg_extension WHERE extname = 'vector'")[0]:
            return ""
        try:
            self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except errors.UniqueViolation:  # another connection did so at the same moment
            return ""
        except (errors.FeatureNotSupported, errors.UndefinedFile):
            return "pgvector is not installed on the server (Debian: postgresql-NN-pgvector)"
        except errors.InsufficientPrivilege:
            return "pgvector is installed and not enabled; its owner may run CREATE EXTENSION vector in this database"
        return ""

    def _one(self, query: Any, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
        row = self.connection.execute(query, parameters).fetchone()
        assert row is not None
        return row

    # ------------------------------------------------------------------------------------------- datasets

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
                self._parent(identity.dim, storage)
                with self.connection.transaction():
                    if (number := self._note(name, identity, storage, source, licence)) is not None:
                        self._partition(number, identity, storage, name)
                        self._keys(number)
                        self._attach(number, identity.dim, storage, name)
            found = self.dataset(name)
        require_same_codec(found.identity, identity, f"dataset {name!r}", "what is to be stored")
        return found

    def _note(
        self, name: str, identity: CodecIdentity, storage: Storage, source: str, licence: str
    ) -> int | None:
        row = self.connection.execute(
            "INSERT INTO cpe_dataset (name, codec_digest, codec, dim, storage, source, licence) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO NOTHING RETURNING id",
            [name, identity.digest, Jsonb(identity.to_dict()), identity.dim, storage, source, licence],
        ).fetchone()
        return None if row is None else int(row[0])

    def _parent(self, dim: int, storage: Storage) -> None:
        """Have the table of this type and dimension, and the view over all such tables."""
        parent = _parent(dim, storage)
        with self.connection.transaction():
            self.connection.execute("SELECT pg_advisory_xact_lock(%s)", [_MIGRATION_LOCK])
            if self._one("SELECT to_regclass(%s) IS NOT NULL", [parent.as_string()])[0]:
                return
            kind = sql.SQL("real[]" if storage == "real" else f"{storage}({dim})")
            self.connection.execute(
                sql.SQL(
                    """
                    CREATE TABLE {parent} (
                        dataset_source text NOT NULL,
                        cpe_id uuid NOT NULL,
                        concept_text text NOT NULL,
                        concept_vec {kind} NOT NULL CHECK ({size} = {dim}),
                        tmd_code integer CHECK (tmd_code BETWEEN 0 AND 65534 AND tmd_code % 2 = 0),
                        tmd_confidence real,
                        source text NOT NULL,
                        doc_id integer NOT NULL CHECK (doc_id >= 0),
                        position integer NOT NULL CHECK (position >= 0),
                        title text NOT NULL,
                        num_tokens integer NOT NULL,
                        truncated boolean NOT NULL,
                        norm real NOT NULL,
                        episode integer,
                        coherence real,
                        codec text NOT NULL
                    ) PARTITION BY LIST (dataset_source)
                    """
                ).format(
                    parent=parent,
                    kind=kind,
                    size=sql.SQL(
                        "cardinality(concept_vec)" if storage == "real" else "vector_dims(concept_vec)"
                    ),
                    dim=sql.Literal(dim),
                )
            )
            # In the row where it fits a page, as pgvector's README advises: the server then reads no second table for
            # each vector it compares.
            plain = dim * (2 if storage == "halfvec" else 4) < 6000
            self.connection.execute(
                sql.SQL("ALTER TABLE {} ALTER COLUMN concept_vec SET STORAGE {}").format(
                    parent, sql.SQL("PLAIN" if plain else "EXTERNAL")
                )
            )
            tables = self.connection.execute(
                "SELECT relname FROM pg_class WHERE relkind = 'p' AND relname ~ '^cpe_(vector|halfvec|real)_[0-9]+$' "
                "AND pg_table_is_visible(oid) ORDER BY relname"
            ).fetchall()
            others = sql.SQL(", ").join(sql.Identifier(c) for c in COLUMNS if c != "concept_vec")
            # Of different dimensions, so as real[]; ::real[] is pgvector's own cast, of halfvec too.
            selects = [
                sql.SQL("SELECT {}, concept_vec::real[] AS concept_vec FROM {}").format(
                    others, sql.Identifier(name)
                )
                for (name,) in tables
            ]
            self.connection.execute(
                sql.SQL("CREATE OR REPLACE VIEW cpe_entry AS {}").format(sql.SQL(" UNION ALL ").join(selects))
            )

    def _partition(self, number: int, identity: CodecIdentity, storage: Storage, name: str) -> None:
        """The dataset's table, not yet part of its parent: making it in place would lock every reader out."""
        table = sql.Identifier(f"cpe_d{number}")
        self.connection.execute(
            sql.SQL(
                "CREATE TABLE {} (LIKE {} INCLUDING ALL, CONSTRAINT one_codec CHECK (codec = {}), "
                "CONSTRAINT one_dataset CHECK (dataset_source = {}))"
            ).format(table, _parent(identity.dim, storage), sql.Literal(identity.digest), sql.Literal(name))
        )

    def _keys(self, number: int) -> None:
        self.connection.execute(
            sql.SQL("ALTER TABLE {} ADD PRIMARY KEY (cpe_id), ADD UNIQUE (doc_id, position)").format(
                sql.Identifier(f"cpe_d{number}")
            )
        )

    def _attach(self, number: int, dim: int, storage: Storage, name: str) -> None:
        self.connection.execute(
            sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES IN ({})").format(
                _parent(dim, storage), sql.Identifier(f"cpe_d{number}"), sql.Literal(name)
            )
        )

    @contextmanager
    def _alone(self, dataset: str) -> Iterator[None]:
        """A transaction that alone changes this dataset. What changes its rows gives it a new version."""
        with self.connection.transaction():
            self.connection.execute("SELECT FROM cpe_dataset WHERE name = %s FOR UPDATE", [dataset])
            yield

    def clear(self, name: str) -> int:
        """Remove a dataset with all that belongs to it, in one transaction; the number of rows it had.

        Raises InputError with the names there are.
        """
        found = self.dataset(name)
        with database_errors(f"clearing dataset {name!r}"), self.connection.transaction():
            rows = int(self._one(sql.SQL("SELECT count(*) FROM {}").format(found.table))[0])
            self._drop_stages(name, keep=None)
            self.connection.execute(sql.SQL("DROP TABLE {}").format(found.table))
            self.connection.execute("DELETE FROM cpe_dataset WHERE name = %s", [name])
        return rows

    def stats(self, dataset: Dataset) -> dict[str, Any]:
        """Counts and sizes of one dataset: rows, articles, coded rows, bytes, its index, loads under way."""
        with database_errors(f"counting dataset {dataset.name!r}"):
            rows, articles, coded, truncated, tokens = self._one(
                sql.SQL(
                    "SELECT count(*), count(DISTINCT doc_id), count(tmd_code), count(*) FILTER (WHERE truncated), "
                    "coalesce(sum(num_tokens), 0) FROM {}"
                ).format(dataset.table)
            )
            size = self._one("SELECT pg_total_relation_size(%s::regclass)", [dataset.table.as_string()])[0]
            stages = self._one("SELECT count(*) FROM cpe_stage WHERE dataset = %s", [dataset.name])[0]
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

    # ---------------------------------------------------------------------------------------------- load

    @contextmanager
    def loading(self, name: str, manifest: Manifest) -> Iterator[Load]:
        """A load of these shards into a dataset, from where an earlier one of the same was killed.

        Raises IdentityError where the dataset is another codec's, DatabaseError where another load of it runs.
        """
        require_name(name)
        identity = manifest.identity
        found = self.find(name)
        if found is not None:
            require_same_codec(found.identity, identity, f"dataset {name!r}", "the shards")
        wanted = self.storage_for(manifest.settings.get("dtype", "float16"))
        storage = found.storage if found else wanted
        if storage == "halfvec" and wanted == "vector":
            raise InputError(
                f"dataset {name!r} stores float16, the shards hold float32 and would be rounded; load into another "
                "--dataset, or encode with --dtype float16"
            )
        stage = f"cpe_stage_{fingerprint([name, manifest.fingerprint, storage])}"
        lock = int.from_bytes(hashlib.sha256(f"load {name}".encode()).digest()[:8], signed=True)
        with database_errors(f"beginning the load of dataset {name!r}"):
            # Of the session: gone with this process, whatever ends it.
            if not self._one("SELECT pg_try_advisory_lock(%s)", [lock])[0]:
                raise DatabaseError(
                    f"another load of dataset {name!r} is under way; wait for it, or end that process, then run again"
                )
            self._parent(identity.dim, storage)
            with self.connection.transaction():
                self._drop_stages(name, keep=stage)
                self.connection.execute(
                    sql.SQL("CREATE UNLOGGED TABLE IF NOT EXISTS {} (LIKE {} INCLUDING STORAGE)").format(
                        sql.Identifier(stage), _parent(identity.dim, storage)
                    )
                )
                self.connection.execute(
                    "INSERT INTO cpe_stage (stage, dataset) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                    [stage, name],
                )
        try:
            yield Load(stage, name, identity, storage)
        finally:
            with suppress(psycopg.Error):  # a lost connection has let it go already
                self.connection.execute("SELECT pg_advisory_unlock(%s)", [lock])

    def _drop_stages(self, dataset: str, keep: str | None) -> None:
        for (stage,) in self.connection.execute(
            "SELECT stage FROM cpe_stage WHERE dataset = %s AND stage IS DISTINCT FROM %s", [dataset, keep]
        ).fetchall():
            self.connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(stage)))
            self.connection.execute("DELETE FROM cpe_staged WHERE stage = %s", [stage])
            self.connection.execute("DELETE FROM cpe_stage WHERE stage = %s", [stage])

    def staged(self, load: Load) -> dict[str, int]:
        """Shard to its rows, of those this load has copied."""
        with database_errors("reading what is loaded already"):
            return dict(
                self.connection.execute(
                    "SELECT shard, entries FROM cpe_staged WHERE stage = %s", [load.stage]
                ).fetchall()
            )

    def copy(self, load: Load, directory: Location, shard: Shard) -> int:
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
        with database_errors(f"loading {what}"), self.connection.transaction():
            # Waits for another worker that has the shard in hand: at most one of them is left from a killed run.
            noted = self.connection.execute(
                "INSERT INTO cpe_staged (stage, shard, entries) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING RETURNING 1",
                [load.stage, shard.file, shard.rows],
            ).fetchone()
            if noted is not None:
                self._copy(sql.Identifier(load.stage), rows)
        return shard.rows

    def _copy(self, table: sql.Identifier, rows: Iterator[tuple[Any, ...]]) -> None:
        command = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(table, _NAMES)
        types = [t if t != "uuid" else "bytea" for t in COLUMNS.values()]  # 16 bytes on the wire, both
        with self.connection.cursor() as cursor, cursor.copy(command) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    def merge(self, load: Load, manifest: Manifest, replace: bool = False) -> Dataset:
        """Make the staged rows the dataset's, in one transaction, and drop the staging table.

        Rows of articles that are not in these shards stay, unless `replace`. Raises InputError when a chunk comes
        twice, OutputError when the dataset holds other articles under these numbers.
        """
        staged = self.staged(load)
        wrong = [s.file for s in manifest.shards if staged.get(s.file) != s.rows]
        if wrong:
            raise DatabaseError(
                f"{len(wrong)} of {len(manifest.shards)} shards are not loaded ({wrong[0]} …): the server lost them in "
                "a crash; run the same command again"
            )
        cure = "Remove what is there twice from the input, then chunk and encode again"
        try:
            with database_errors(f"merging into dataset {load.dataset!r}"), self._alone(load.dataset):
                number = self._note(
                    load.dataset, load.identity, load.storage, manifest.source, manifest.licence
                )
                if number is not None:  # rows first, then their keys: sorting beats inserting one by one
                    table = sql.Identifier(f"cpe_d{number}")
                    self._partition(number, load.identity, load.storage, load.dataset)
                    self.connection.execute(
                        sql.SQL("INSERT INTO {0} ({1}) SELECT {1} FROM {2}").format(
                            table, _NAMES, sql.Identifier(load.stage)
                        )
                    )
                    self._keys(number)
                    self._attach(number, load.identity.dim, load.storage, load.dataset)
                else:
                    table = self._merge_into(self.dataset(load.dataset), load, replace)
                self.connection.execute(
                    sql.SQL(
                        "UPDATE cpe_dataset SET loaded = %s, source = %s, licence = %s, version = gen_random_uuid(), "
                        "next_doc_id = greatest(next_doc_id, (SELECT coalesce(max(doc_id), -1) + 1 FROM {})) "
                        "WHERE name = %s"
                    ).format(table),
                    [manifest.fingerprint, manifest.source, manifest.licence, load.dataset],
                )
                self._drop_stages(load.dataset, keep=None)
        except DatabaseError as err:
            if isinstance(err.__cause__, errors.UniqueViolation | errors.CardinalityViolation):
                raise InputError(
                    f"the shards hold a chunk or a place in an article twice: {err}. {cure}"
                ) from err
            raise
        with database_errors("counting the new rows"):
            self.connection.execute(sql.SQL("ANALYZE {}").format(table))
        return self.dataset(load.dataset)

    def _merge_into(self, dataset: Dataset, load: Load, replace: bool) -> sql.Identifier:
        table, stage = dataset.table, sql.Identifier(load.stage)
        require_same_codec(dataset.identity, load.identity, f"dataset {load.dataset!r}", "the shards")
        if dataset.storage != load.storage:  # it was cleared and made again meanwhile
            raise DatabaseError(
                f"dataset {load.dataset!r} changed during the load; run the same command again"
            )
        if replace:
            self.connection.execute(sql.SQL("DELETE FROM {}").format(table))
            self.connection.execute("DELETE FROM cpe_article WHERE dataset = %s", [load.dataset])
        other = self.connection.execute(
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
        self.connection.execute(
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
        self.connection.execute(
            sql.SQL(
                "INSERT INTO {table} AS e ({columns}) SELECT {columns} FROM {stage} ON CONFLICT (cpe_id) DO UPDATE "
                "SET ({new}) = ROW({values}) WHERE ROW({own}) IS DISTINCT FROM ROW({values})"
            ).format(
                table=table,
                columns=_NAMES,
                stage=stage,
                new=sql.SQL(", ").join(map(sql.Identifier, new)),
                values=sql.SQL(", ").join(values),
                own=own,
            )
        )
        return table

    # --------------------------------------------------------------------------------------------- index

    def index_kind(self, dataset: Dataset) -> str:
        """ "hnsw", "ivfflat", or "none"."""
        row = self.connection.execute(
            "SELECT amname FROM pg_class c JOIN pg_am a ON a.oid = c.relam JOIN pg_index i ON i.indexrelid = c.oid "
            "WHERE c.relname = %s AND i.indisvalid AND pg_table_is_visible(c.oid)",
            [f"cpe_d{dataset.id}_vec"],
        ).fetchone()
        return "none" if row is None else str(row[0])

    def ensure_index(self, dataset: Dataset, kind: IndexKind) -> str:
        """Have a vector index of this kind over a dataset of INDEX_ROWS or more; why there is none, else ""."""
        with database_errors(f"indexing dataset {dataset.name!r}"):
            if kind == "none":
                return "none was asked for"
            if dataset.storage == "real":
                return (
                    self.missing
                    or "the dataset was made when the server had no pgvector; load it into another"
                )
            if dataset.identity.dim > MAX_INDEXED[dataset.storage]:
                return f"pgvector indexes {dataset.storage} up to {MAX_INDEXED[dataset.storage]} dimensions"
            rows = int(self._one(sql.SQL("SELECT count(*) FROM {}").format(dataset.table))[0])
            if rows < INDEX_ROWS:
                return f"{rows:,} rows are scanned as fast, {INDEX_ROWS:,} would get one"
            if (there := self.index_kind(dataset)) == kind:
                return ""
            name = sql.Identifier(f"cpe_d{dataset.id}_vec")
            # pgvector's README: rows / 1000 lists up to a million rows, their root above.
            lists = max(1, round(rows / 1000 if rows <= 1_000_000 else rows**0.5))
            options = sql.SQL("" if kind == "hnsw" else f"WITH (lists = {lists})")
            with self.connection.transaction():
                need = rows * dataset.identity.dim * 4 * 3 // 2 >> 20
                self.connection.execute(
                    "SELECT set_config('maintenance_work_mem', %s, true)", [f"{min(max(need, 64), 1024)}MB"]
                )
                if there != "none":
                    self.connection.execute(sql.SQL("DROP INDEX {}").format(name))
                self.connection.execute(
                    sql.SQL("CREATE INDEX {} ON {} USING {} (concept_vec {}_ip_ops) {}").format(
                        name, dataset.table, sql.SQL(kind), sql.SQL(dataset.storage), options
                    )
                )
        return ""

    # -------------------------------------------------------------------------------------------- search

    def search(
        self, dataset: Dataset, vector: NDArray[Any] | None, limit: int, filters: Filters | None = None
    ) -> list[Hit]:
        """The rows nearest to `vector`, (D,) of unit norm, best first; without it, the first in article order.

        Only rows that `filters` lets through. Raises InputError on a vector of another length or of another
        norm than 1.
        """
        filters = filters or Filters()
        for text, what in (
            (filters.source, "the source asked for"),
            (filters.contains, "the text asked for"),
        ):
            if text is not None:
                require_text(text, what)
        where, parameters = filters.where()
        columns = sql.SQL("cpe_id, doc_id, position, title, concept_text, source, tmd_code")
        with database_errors(f"searching dataset {dataset.name!r}"):
            if vector is None:
                found = self.connection.execute(
                    sql.SQL("SELECT NULL, {} FROM {} WHERE {} ORDER BY doc_id, position LIMIT %s").format(
                        columns, dataset.table, where
                    ),
                    [*parameters, limit],
                ).fetchall()
                return [_hit(row) for row in found]
            query = np.asarray(vector, np.float32)
            require_unit_vectors(query[None], dataset.identity.dim, "the query")
            if dataset.storage == "real":
                return self._scan(dataset, query, limit, where, parameters)
            # As the column's type, else the index does not fit the question.
            literal = "[" + ",".join(map(repr, query.tolist())) + "]"
            asked = sql.SQL(f"concept_vec <#> %s::{dataset.storage}({dataset.identity.dim})")
            with self.connection.transaction():
                for setting, value in (
                    ("hnsw.ef_search", str(min(1000, max(100, 2 * limit)))),
                    ("hnsw.iterative_scan", "strict_order"),  # goes on until `limit` rows pass the filters
                    ("ivfflat.probes", "16"),
                    ("ivfflat.iterative_scan", "relaxed_order"),
                ):
                    self.connection.execute("SELECT set_config(%s, %s, true)", [setting, value])
                found = self.connection.execute(
                    sql.SQL("SELECT -({0}), {1} FROM {2} WHERE {3} ORDER BY {0} LIMIT %s").format(
                        asked, columns, dataset.table, where
                    ),
                    [literal, *parameters, literal, limit],
                ).fetchall()
            return sorted((_hit(row) for row in found), key=lambda h: -(h.score or 0.0))

    def _scan(
        self,
        dataset: Dataset,
        query: NDArray[np.float32],
        limit: int,
        where: sql.Composable,
        parameters: list[Any],
    ) -> list[Hit]:
        """The same on a server that cannot compare vectors: all that pass are read and compared here."""
        best: list[tuple[float, uuid.UUID]] = []
        with self.connection.transaction(), self.connection.cursor("scan", binary=True) as cursor:
            cursor.itersize = CURSOR_ROWS
            cursor.execute(
                sql.SQL("SELECT cpe_id, array_send(concept_vec) FROM {} WHERE {}").format(
                    dataset.table, where
                ),
                parameters,
            )
            while rows := cursor.fetchmany(CURSOR_ROWS):
                scores = read_vectors([r[1] for r in rows], "real", dataset.identity.dim) @ query
                best += [(float(s), r[0]) for s, r in zip(scores, rows, strict=True)]
                best = sorted(best, key=lambda b: -b[0])[:limit]
        found = self.connection.execute(
            sql.SQL(
                "SELECT NULL, cpe_id, doc_id, position, title, concept_text, source, tmd_code FROM {} "
                "WHERE cpe_id = ANY(%s)"
            ).format(dataset.table),
            [[i for _, i in best]],
        ).fetchall()
        by_id = {row[1]: row for row in found}
        return [_hit((score, *by_id[i][1:])) for score, i in best if i in by_id]

    # -------------------------------------------------------------------------------------------- export

    def snapshot(self) -> str:
        """Begin a transaction that sees one state for good; its name, with which others see the same."""
        self.connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return str(self._one("SELECT pg_export_snapshot()")[0])

    def ranges(self, dataset: Dataset, rows: int) -> list[tuple[int, int, int]]:
        """Ranges of whole articles in order: first and last doc_id, and about `rows` rows each, in truth the third."""
        found: list[tuple[int, int, int]] = []
        first, count = None, 0
        with database_errors(f"dividing dataset {dataset.name!r}"):
            articles = self.connection.execute(
                sql.SQL("SELECT doc_id, count(*) FROM {} GROUP BY doc_id ORDER BY doc_id").format(
                    dataset.table
                )
            ).fetchall()
        for doc_id, chunks in articles:
            first = doc_id if first is None else first
            count += chunks
            if count >= rows:
                found.append((first, doc_id, count))
                first, count = None, 0
        if first is not None:
            found.append((first, articles[-1][0], count))
        return found

    def read(self, dataset: Dataset, first: int, last: int, snapshot: str | None = None) -> pa.Table:
        """Rows of articles `first` to `last`, both included, in order of article and position, in `export_schema`."""
        dtype: VectorType = "float16" if dataset.storage == "halfvec" else "float32"
        schema = export_schema(dataset.identity.dim, dtype)
        send = "array_send" if dataset.storage == "real" else f"{dataset.storage}_send"
        names = {"chunk_id": "cpe_id", "text": "concept_text", "vector": f"{send}(concept_vec)"}
        select = sql.SQL(", ".join(names.get(n, n) for n in schema.names))
        rows: list[tuple[Any, ...]] = []
        with database_errors(f"reading dataset {dataset.name!r}"), self.connection.transaction():
            if snapshot is not None:
                self.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                self.connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
            with self.connection.cursor("export", binary=True) as cursor:
                cursor.itersize = CURSOR_ROWS
                cursor.execute(
                    sql.SQL(
                        "SELECT {} FROM {} WHERE doc_id BETWEEN %s AND %s ORDER BY doc_id, position"
                    ).format(select, dataset.table),
                    [first, last],
                )
                while block := cursor.fetchmany(CURSOR_ROWS):
                    rows += block
        columns = dict(
            zip(schema.names, zip(*rows, strict=True) if rows else [()] * len(schema), strict=True)
        )
        vectors = read_vectors(columns.pop("vector"), dataset.storage, dataset.identity.dim)
        columns["chunk_id"] = tuple(i.hex for i in columns["chunk_id"])
        arrays = {n: pa.array(v, schema.field(n).type) for n, v in columns.items()}
        arrays["vector"] = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), dataset.identity.dim
        )
        return pa.Table.from_arrays([arrays[n] for n in schema.names], schema=schema)

    # -------------------------------------------------------------------------------------------- ingest

    def contents(self, dataset: Dataset, articles: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Source and id of each of these articles that is stored, to the hash of what it was stored from."""
        with database_errors("looking up the articles"):
            rows = self.connection.execute(
                "SELECT source, article_id, content FROM cpe_article WHERE dataset = %s AND article_id = ANY(%s)",
                [dataset.name, [a for _, a in articles]],
            ).fetchall()
        return {(s, a): content for s, a, content in rows}

    def store_article(
        self, dataset: Dataset, source: str, article_id: str, content: str, chunks: pa.Table
    ) -> bool:
        """Store one article's chunks in one transaction, in place of those it had; False where this content was there.

        chunks: in `vector_schema` with the optional columns; its doc_id is not read, the store gives the number.
        Raises InputError as `entries_of` does, and on an id or source that Postgres cannot hold.
        """
        require_text(article_id, "the article's id")
        require_text(source, "the article's source")
        what = f"article {article_id!r}"
        with database_errors(f"storing {what}"), self._alone(dataset.name):
            if self.dataset(dataset.name).id != dataset.id:
                raise DatabaseError(
                    f"dataset {dataset.name!r} was cleared meanwhile; run the same command again"
                )
            before = self.connection.execute(
                "SELECT content, doc_id FROM cpe_article WHERE (dataset, source, article_id) = (%s, %s, %s)",
                [dataset.name, source, article_id],
            ).fetchone()
            if before is not None and before[0] == content:
                return False
            if before is None and chunks.num_rows:
                # A load may have brought the article: its first chunk's name says so.
                before = self.connection.execute(
                    sql.SQL("SELECT NULL, doc_id FROM {} WHERE cpe_id = %s").format(dataset.table),
                    [uuid.UUID(hex=chunks.column("chunk_id")[0].as_py())],
                ).fetchone()
            if before is None:
                number = self._one(
                    "UPDATE cpe_dataset SET next_doc_id = next_doc_id + 1 WHERE name = %s RETURNING next_doc_id - 1",
                    [dataset.name],
                )[0]
            else:
                number = before[1]
                self.connection.execute(
                    sql.SQL("DELETE FROM {} WHERE doc_id = %s").format(dataset.table), [number]
                )
            numbers = pa.array([number] * chunks.num_rows, pa.int32())
            chunks = chunks.set_column(chunks.schema.get_field_index("doc_id"), "doc_id", numbers)
            self._copy(
                dataset.table, entries_of(chunks, dataset.name, dataset.identity, dataset.storage, what)
            )
            self.connection.execute(
                "INSERT INTO cpe_article (dataset, source, article_id, doc_id, content, chunks) "
                "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (dataset, source, article_id) "
                "DO UPDATE SET content = excluded.content, chunks = excluded.chunks, stored = now()",
                [dataset.name, source, article_id, number, content, chunks.num_rows],
            )
            self.connection.execute(
                "UPDATE cpe_dataset SET loaded = NULL, version = gen_random_uuid() WHERE name = %s",
                [dataset.name],
            )
        return True


def _parent(dim: int, storage: Storage) -> sql.Identifier:
    return sql.Identifier(f"cpe_{storage}_{dim}")


def _hit(row: Sequence[Any]) -> Hit:
    score, cpe_id, *rest = row
    return Hit(cpe_id.hex, None if score is None else float(score), *rest)
