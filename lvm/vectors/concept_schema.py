"""Tables of the concept store: migrations that only go forward, and what each dataset gets.

cpe_entry                  a view over all rows, for people and other programs
cpe_halfvec_768 …          one table a storage type and dimension, partitioned by dataset
cpe_d7                     the partition of dataset 7: key, order and vector index are here
cpe_dataset, cpe_article   what there is, and which articles were ingested from which content
cpe_stage, cpe_staged      loads under way; their rows lie in unlogged tables until the merge
"""

from psycopg import errors, sql

from lvm.codec.identity import CodecIdentity
from lvm.errors import DatabaseError
from lvm.vectors.entries import COLUMNS, Storage
from lvm.vectors.postgres import Connection, fetch_one

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
"""One text a version, applied in order and never undone or changed."""

MIGRATION_LOCK = 0x6C61_7465_6E74  # "latent"


def migrate(connection: Connection, where: str) -> None:
    """Bring the tables up to this version; where: names the server. Raises DatabaseError on those of a newer one."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [MIGRATION_LOCK])
        # Asked, so that a reader needs no right to create.
        if fetch_one(connection, "SELECT to_regclass('cpe_migration') IS NULL")[0]:
            connection.execute(
                "CREATE TABLE cpe_migration "
                "(version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now())"
            )
        at = fetch_one(connection, "SELECT coalesce(max(version), 0) FROM cpe_migration")[0]
        if at > len(MIGRATIONS):
            raise DatabaseError(
                f"the store in {where} has version {at}, this program knows {len(MIGRATIONS)}; "
                "install a newer version of it"
            )
        for version, statements in enumerate(MIGRATIONS[at:], at + 1):
            connection.execute(statements)
            connection.execute("INSERT INTO cpe_migration (version) VALUES (%s)", [version])


def enable_pgvector(connection: Connection) -> str:
    """Have pgvector; what is missing where that cannot be."""
    if fetch_one(connection, "SELECT count(*) FROM pg_extension WHERE extname = 'vector'")[0]:
        return ""
    try:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except errors.UniqueViolation:  # another connection did so at the same moment
        return ""
    except (errors.FeatureNotSupported, errors.UndefinedFile):
        return "pgvector is not installed on the server (Debian: postgresql-NN-pgvector)"
    except errors.InsufficientPrivilege:
        return "pgvector is installed and not enabled; its owner may run CREATE EXTENSION vector in this database"
    return ""


def parent_table(dim: int, storage: Storage) -> sql.Identifier:
    """Name of the table of this type and dimension."""
    return sql.Identifier(f"cpe_{storage}_{dim}")


def partition_table(number: int) -> sql.Identifier:
    """Name of a dataset's partition."""
    return sql.Identifier(f"cpe_d{number}")


def make_parent(connection: Connection, dim: int, storage: Storage) -> None:
    """Have the table of this type and dimension, and the view over all such tables."""
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
        # In the row where it fits a page, as pgvector's README advises: the server then reads no second table for
        # each vector it compares.
        plain = dim * (2 if storage == "halfvec" else 4) < 6000
        connection.execute(
            sql.SQL("ALTER TABLE {} ALTER COLUMN concept_vec SET STORAGE {}").format(
                parent, sql.SQL("PLAIN" if plain else "EXTERNAL")
            )
        )
        tables = connection.execute(
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
        connection.execute(
            sql.SQL("CREATE OR REPLACE VIEW cpe_entry AS {}").format(sql.SQL(" UNION ALL ").join(selects))
        )


def make_partition(
    connection: Connection, number: int, identity: CodecIdentity, storage: Storage, name: str
) -> None:
    """The dataset's table, not yet part of its parent: making it in place would lock every reader out."""
    table = partition_table(number)
    connection.execute(
        sql.SQL(
            "CREATE TABLE {} (LIKE {} INCLUDING ALL, CONSTRAINT one_codec CHECK (codec = {}), "
            "CONSTRAINT one_dataset CHECK (dataset_source = {}))"
        ).format(table, parent_table(identity.dim, storage), sql.Literal(identity.digest), sql.Literal(name))
    )


def add_keys(connection: Connection, number: int) -> None:
    """Key and order of a partition's rows."""
    connection.execute(
        sql.SQL("ALTER TABLE {} ADD PRIMARY KEY (cpe_id), ADD UNIQUE (doc_id, position)").format(
            partition_table(number)
        )
    )


def attach(connection: Connection, number: int, dim: int, storage: Storage, name: str) -> None:
    """Make a partition visible in its parent."""
    connection.execute(
        sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES IN ({})").format(
            parent_table(dim, storage), partition_table(number), sql.Literal(name)
        )
    )
