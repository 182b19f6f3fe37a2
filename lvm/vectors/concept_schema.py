"""Tables of the concept store: forward-only migrations, and the tables of each dataset.

cpe_entry                  a view over all rows, for people and other programs
cpe_halfvec_768 …          one table per storage type and dimension, partitioned by dataset
cpe_d7                     the partition of dataset 7, with its primary key, uniqueness and vector index
cpe_dataset, cpe_article   the datasets, and the content hash of each ingested article
cpe_stage, cpe_staged      loads in progress; their rows are in unlogged tables until the merge
"""

from psycopg import errors, sql

from lvm.codec.identity import CodecIdentity
from lvm.errors import DatabaseError
from lvm.vectors.entries import COLUMNS, Storage
from lvm.vectors.postgres import Connection, execute, fetch_one

MIGRATIONS = (
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
"""SQL of each schema version, applied in order. Never edit one that was released: append another."""

MIGRATION_LOCK = 0x6C61_7465_6E74  # "latent"


def migrate(connection: Connection, where: str) -> None:
    """Apply missing migrations. where: the server, for messages. Raises DatabaseError if the schema is newer."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [MIGRATION_LOCK])
        # Not CREATE TABLE IF NOT EXISTS: that needs the CREATE privilege even if the table exists.
        if fetch_one(connection, "SELECT to_regclass('cpe_migration') IS NULL")[0]:
            connection.execute(
                "CREATE TABLE cpe_migration "
                "(version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now())"
            )
        at = fetch_one(connection, "SELECT coalesce(max(version), 0) FROM cpe_migration")[0]
        if at > len(MIGRATIONS):
            raise DatabaseError(
                f"the store in {where} has schema version {at}, this program knows {len(MIGRATIONS)}; install a newer "
                "version of it"
            )
        for version, statements in enumerate(MIGRATIONS[at:], at + 1):
            connection.execute(statements)
            connection.execute("INSERT INTO cpe_migration (version) VALUES (%s)", [version])


def enable_pgvector(connection: Connection) -> str:
    """Enable pgvector in this database; returns "", or why that is not possible."""
    if fetch_one(connection, "SELECT count(*) FROM pg_extension WHERE extname = 'vector'")[0]:
        return ""
    try:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except errors.UniqueViolation:  # another connection just enabled it
        return ""
    except (errors.FeatureNotSupported, errors.UndefinedFile):
        return "pgvector is not installed on the server (Debian: postgresql-NN-pgvector)"
    except errors.InsufficientPrivilege:
        return "pgvector is installed but not enabled; ask the database's owner to run CREATE EXTENSION vector in it"
    return ""


def parent_table(dim: int, storage: Storage) -> sql.Identifier:
    """Name of the partitioned table of this storage type and dimension."""
    return sql.Identifier(f"cpe_{storage}_{dim}")


def partition_table(number: int) -> sql.Identifier:
    """Name of a dataset's partition."""
    return sql.Identifier(f"cpe_d{number}")


def make_parent(connection: Connection, dim: int, storage: Storage) -> None:
    """Create the partitioned table of this type and dimension if needed, and update the view over all such tables."""
    parent = parent_table(dim, storage)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [MIGRATION_LOCK])
        if fetch_one(connection, "SELECT to_regclass(%s) IS NOT NULL", [parent.as_string()])[0]:
            return
        kind = sql.SQL("real[]" if storage == "real" else f"{storage}({dim})")
        connection.execute(
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
                size=sql.SQL("cardinality(concept_vec)" if storage == "real" else "vector_dims(concept_vec)"),
                dim=sql.Literal(dim),
            )
        )
        # Inline if a row fits on a page, as pgvector's README advises: comparing a vector then needs no TOAST lookup.
        plain = dim * (2 if storage == "halfvec" else 4) < 6000
        mode = sql.SQL("PLAIN" if plain else "EXTERNAL")
        execute(connection, "ALTER TABLE {} ALTER COLUMN concept_vec SET STORAGE {}", parent, mode)
        tables = connection.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'p' AND relname ~ '^cpe_(vector|halfvec|real)_[0-9]+$' "
            "AND pg_table_is_visible(oid) ORDER BY relname"
        ).fetchall()
        others = sql.SQL(", ").join(sql.Identifier(c) for c in COLUMNS if c != "concept_vec")
        # The dimensions differ, so the view has real[]; pgvector casts vector and halfvec to it.
        select = sql.SQL("SELECT {}, concept_vec::real[] AS concept_vec FROM {}")
        selects = [select.format(others, sql.Identifier(name)) for (name,) in tables]
        execute(connection, "CREATE OR REPLACE VIEW cpe_entry AS {}", sql.SQL(" UNION ALL ").join(selects))


def make_partition(
    connection: Connection, number: int, identity: CodecIdentity, storage: Storage, name: str
) -> None:
    """Create a dataset's table, not yet attached to its parent: creating it in place would block all readers."""
    tables = (partition_table(number), parent_table(identity.dim, storage))
    execute(
        connection,
        "CREATE TABLE {} (LIKE {} INCLUDING ALL, CONSTRAINT one_codec CHECK (codec = {}), "
        "CONSTRAINT one_dataset CHECK (dataset_source = {}))",
        *(*tables, sql.Literal(identity.digest), sql.Literal(name)),
    )


def attach(connection: Connection, number: int, dim: int, storage: Storage, name: str) -> None:
    """Add keys to a partition, after its rows, and attach it to its parent, where readers see it."""
    partition, parent = partition_table(number), parent_table(dim, storage)
    execute(connection, "ALTER TABLE {} ADD PRIMARY KEY (cpe_id), ADD UNIQUE (doc_id, position)", partition)
    attach_for = "ALTER TABLE {} ATTACH PARTITION {} FOR VALUES IN ({})"
    execute(connection, attach_for, parent, partition, sql.Literal(name))
