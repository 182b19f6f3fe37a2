"""Search in the concept store: nearest vectors with filters, and the vector index."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from lvm.corpus.tmd import ANY_CODE, Wanted
from lvm.vectors.concepts import CURSOR_ROWS, ConceptStore, Dataset
from lvm.vectors.entries import read_vectors, require_text
from lvm.vectors.postgres import database_errors, execute, fetch_one
from lvm.vectors.shards import require_unit_vectors

IndexKind = Literal["hnsw", "ivfflat", "none"]

MAX_INDEXED = {"vector": 2000, "halfvec": 4000}
"""Maximum dimensions that pgvector can index (its README, "Indexing")."""

_COLUMNS = sql.SQL("cpe_id, doc_id, position, title, concept_text, source, tmd_code")

INDEX_ROWS = 2000
"""Rows from which an index pays off; a scan of fewer takes milliseconds."""


@dataclass(frozen=True)
class Hit:
    """One search result."""

    chunk_id: str
    """32 hex digits."""
    score: float | None
    """Cosine to the query vector; None without one."""
    doc_id: int
    """Article number in the dataset."""
    position: int
    """Position in the article, from 0."""
    title: str
    text: str
    source: str
    tmd_code: int | None
    """16-bit TMD code; None if it has none."""


@dataclass(frozen=True)
class Filters:
    """Conditions on the rows to find; None matches all."""

    source: str | None = None
    """Exact source."""
    contains: str | None = None
    """Substring of the text, ignoring case."""
    tmd_code: int | None = None
    """Exact TMD code."""
    wanted: Wanted = ANY_CODE
    """Domain, task or modifier of the code."""

    def where(self) -> tuple[sql.Composable, list[Any]]:
        """A WHERE condition and its parameters."""
        wanted = [
            ("source = %s", self.source),
            ("concept_text ILIKE %s ESCAPE '!'", self._pattern()),
            ("tmd_code = %s", self.tmd_code),
            ("tmd_code >> 12 = %s", self.wanted.domain),
            ("tmd_code >> 7 & 31 = %s", self.wanted.task),
            ("tmd_code >> 1 & 63 = %s", self.wanted.modifier),
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


def ensure_index(store: ConceptStore, dataset: Dataset, kind: IndexKind) -> str:
    """Create the vector index of this kind if the dataset has INDEX_ROWS or more; returns "", or why there is none."""
    with database_errors(f"indexing dataset {dataset.name!r}"):
        if kind == "none":
            return "none was asked for"
        if dataset.storage == "real":
            return store.missing or "the dataset was created without pgvector; load it into another one"
        if dataset.identity.dim > MAX_INDEXED[dataset.storage]:
            return f"pgvector indexes {dataset.storage} up to {MAX_INDEXED[dataset.storage]} dimensions"
        rows = int(fetch_one(store.connection, sql.SQL("SELECT count(*) FROM {}").format(dataset.table))[0])
        if rows < INDEX_ROWS:
            return f"{rows:,} rows are scanned just as fast; an index is built from {INDEX_ROWS:,}"
        if store.index_kind(dataset) == kind:
            return ""
        name = sql.Identifier(f"cpe_d{dataset.id}_vec")
        # pgvector's README: rows / 1000 lists up to a million rows, above that their square root.
        lists = max(1, round(rows / 1000 if rows <= 1_000_000 else rows**0.5))
        options = sql.SQL("" if kind == "hnsw" else f"WITH (lists = {lists})")
        with store.locked(dataset.name):
            if (existing := store.index_kind(dataset)) == kind:  # another process built it meanwhile
                return ""
            megabytes = min(max(rows * dataset.identity.dim * 4 * 3 // 2 >> 20, 64), 1024)
            store.connection.execute(f"SET LOCAL maintenance_work_mem = '{megabytes}MB'")
            if existing != "none":
                execute(store.connection, "DROP INDEX {}", name)
            parts = (name, dataset.table, sql.SQL(kind), sql.SQL(dataset.storage), options)
            execute(store.connection, "CREATE INDEX {} ON {} USING {} (concept_vec {}_ip_ops) {}", *parts)
    return ""


def search(
    store: ConceptStore,
    dataset: Dataset,
    vector: NDArray[Any] | None,
    limit: int,
    filters: Filters | None = None,
) -> list[Hit]:
    """The rows nearest to `vector`, (D,) of unit norm, best first; without it, the first rows in article order.

    Only rows that match `filters`. Raises InputError if the vector has a wrong length or a norm other than 1.
    """
    filters = filters or Filters()
    for text, what in ((filters.source, "the source filter"), (filters.contains, "the text filter")):
        if text is not None:
            require_text(text, what)
    where, parameters = filters.where()
    with database_errors(f"searching dataset {dataset.name!r}"):
        if vector is None:
            first = "SELECT NULL, {} FROM {} WHERE {} ORDER BY doc_id, position LIMIT %s"
            parts = (_COLUMNS, dataset.table, where)
            found = execute(store.connection, first, *parts, parameters=[*parameters, limit])
            return [_hit(row) for row in found]
        query = np.asarray(vector, np.float32)
        require_unit_vectors(query[None], dataset.identity.dim, "the query")
        if dataset.storage == "real":
            return _scan(store, dataset, query, limit, where, parameters)
        # Cast to the column's type, or the index is not used.
        literal = "[" + ",".join(map(repr, query.tolist())) + "]"
        distance = sql.SQL(f"concept_vec <#> %s::{dataset.storage}({dataset.identity.dim})")
        with store.connection.transaction():
            for setting, value in (
                ("hnsw.ef_search", str(min(1000, max(100, 2 * limit)))),
                ("hnsw.iterative_scan", "strict_order"),  # continues until `limit` rows match the filters
                ("ivfflat.probes", "16"),
                ("ivfflat.iterative_scan", "relaxed_order"),
            ):
                store.connection.execute("SELECT set_config(%s, %s, true)", [setting, value])
            found = execute(
                store.connection,
                "SELECT -({0}), {1} FROM {2} WHERE {3} ORDER BY {0} LIMIT %s",
                *(distance, _COLUMNS, dataset.table, where),
                parameters=[literal, *parameters, literal, limit],
            )
            return sorted((_hit(row) for row in found), key=lambda h: -(h.score or 0.0))


def _scan(
    store: ConceptStore,
    dataset: Dataset,
    query: NDArray[np.float32],
    limit: int,
    where: sql.Composable,
    parameters: list[Any],
) -> list[Hit]:
    """`search` on a server without pgvector: reads the vectors of all matching rows and compares them here."""
    best: list[tuple[float, uuid.UUID]] = []
    with store.connection.transaction(), store.connection.cursor("scan", binary=True) as cursor:
        cursor.itersize = CURSOR_ROWS
        vectors_of = sql.SQL("SELECT cpe_id, array_send(concept_vec) FROM {} WHERE {}")
        cursor.execute(vectors_of.format(dataset.table, where), parameters)
        while rows := cursor.fetchmany(CURSOR_ROWS):
            scores = read_vectors([r[1] for r in rows], "real", dataset.identity.dim) @ query
            best += [(float(s), r[0]) for s, r in zip(scores, rows, strict=True)]
            best = sorted(best, key=lambda b: -b[0])[:limit]
    rows_of = "SELECT {} FROM {} WHERE cpe_id = ANY(%s)"
    found = execute(store.connection, rows_of, _COLUMNS, dataset.table, parameters=[[i for _, i in best]])
    by_id = {row[0]: row for row in found}
    return [_hit((score, *by_id[i])) for score, i in best if i in by_id]


def _hit(row: Sequence[Any]) -> Hit:
    score, cpe_id, *rest = row
    return Hit(cpe_id.hex, None if score is None else float(score), *rest)
