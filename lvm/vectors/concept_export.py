"""Export from the concept store, sorted by article and position; workers read in parallel from one snapshot."""

from typing import Any

import pyarrow as pa
from psycopg import sql

from lvm.vectors.concepts import CURSOR_ROWS, ConceptStore, Dataset
from lvm.vectors.entries import export_schema, read_vectors
from lvm.vectors.postgres import database_errors, execute, fetch_one
from lvm.vectors.shards import VectorType


def begin_snapshot(store: ConceptStore) -> str:
    """Begin a read-only transaction; returns its snapshot's name, with which other connections see the same state."""
    store.connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    return str(fetch_one(store.connection, "SELECT pg_export_snapshot()")[0])


def article_ranges(store: ConceptStore, dataset: Dataset, rows: int) -> list[tuple[int, int, int]]:
    """Ranges of whole articles, in order, of about `rows` rows: (first doc_id, last doc_id, exact number of rows)."""
    found: list[tuple[int, int, int]] = []
    first, count = None, 0
    with database_errors(f"dividing dataset {dataset.name!r}"):
        query = sql.SQL("SELECT doc_id, count(*) FROM {} GROUP BY doc_id ORDER BY doc_id")
        articles = store.connection.execute(query.format(dataset.table)).fetchall()
    for doc_id, chunks in articles:
        first = doc_id if first is None else first
        count += chunks
        if count >= rows:
            found.append((first, doc_id, count))
            first, count = None, 0
    if first is not None:
        found.append((first, articles[-1][0], count))
    return found


def read_articles(
    store: ConceptStore, dataset: Dataset, first: int, last: int, snapshot: str | None = None
) -> pa.Table:
    """Rows of articles `first` to `last`, inclusive, sorted by article and position, in `export_schema`."""
    dtype: VectorType = "float16" if dataset.storage == "halfvec" else "float32"
    schema = export_schema(dataset.identity.dim, dtype)
    send = "array_send" if dataset.storage == "real" else f"{dataset.storage}_send"
    names = {"chunk_id": "cpe_id", "text": "concept_text", "vector": f"{send}(concept_vec)"}
    columns_sql = sql.SQL(", ".join(names.get(n, n) for n in schema.names))
    query = sql.SQL("SELECT {} FROM {} WHERE doc_id BETWEEN %s AND %s ORDER BY doc_id, position")
    rows: list[tuple[Any, ...]] = []
    with database_errors(f"reading dataset {dataset.name!r}"), store.connection.transaction():
        if snapshot is not None:
            store.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            execute(store.connection, "SET TRANSACTION SNAPSHOT {}", sql.Literal(snapshot))
        with store.connection.cursor("export", binary=True) as cursor:
            cursor.itersize = CURSOR_ROWS
            cursor.execute(query.format(columns_sql, dataset.table), [first, last])
            while block := cursor.fetchmany(CURSOR_ROWS):
                rows += block
    columns = dict(zip(schema.names, zip(*rows, strict=True) if rows else [()] * len(schema), strict=True))
    vectors = read_vectors(columns.pop("vector"), dataset.storage, dataset.identity.dim)
    columns["chunk_id"] = tuple(i.hex for i in columns["chunk_id"])
    arrays = {n: pa.array(v, schema.field(n).type) for n, v in columns.items()}
    arrays["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dataset.identity.dim)
    return pa.Table.from_arrays([arrays[n] for n in schema.names], schema=schema)
