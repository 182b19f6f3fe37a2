"""Search in the concept store: nearest vectors through filters, and the index that makes it fast."""

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
from lvm.vectors.postgres import database_errors, fetch_one
from lvm.vectors.shards import require_unit_vectors

IndexKind = Literal["hnsw", "ivfflat", "none"]

MAX_INDEXED = {"vector": 2000, "halfvec": 4000}
"""Most dimensions pgvector's indexes take (its README, "Indexing")."""

INDEX_ROWS = 2000
"""From here on an index pays; below it a scan of the dataset takes milliseconds."""


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
    wanted: Wanted = ANY_CODE
    """Parts of its code."""

    def where(self) -> tuple[sql.Composable, list[Any]]:
        """A condition and its parameters."""
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
    """Have a vector index of this kind over a dataset of INDEX_ROWS or more; why there is none, else ""."""
    with database_errors(f"indexing dataset {dataset.name!r}"):
        if kind == "none":
            return "none was asked for"
        if dataset.storage == "real":
            return (
                store.missing or "the dataset was made when the server had no pgvector; load it into another"
            )
        if dataset.identity.dim > MAX_INDEXED[dataset.storage]:
            return f"pgvector indexes {dataset.storage} up to {MAX_INDEXED[dataset.storage]} dimensions"
        rows = int(fetch_one(store.connection, sql.SQL("SELECT count(*) FROM {}").format(dataset.table))[0])
        if rows < INDEX_ROWS:
            return f"{rows:,} rows are scanned as fast, {INDEX_ROWS:,} would get one"
        if store.index_kind(dataset) == kind:
            return ""
        name = sql.Identifier(f"cpe_d{dataset.id}_vec")
        # pgvector's README: rows / 1000 lists up to a million rows, their root above.
        lists = max(1, round(rows / 1000 if rows <= 1_000_000 else rows**0.5))
        options = sql.SQL("" if kind == "hnsw" else f"WITH (lists = {lists})")
        with store.alone(dataset.name):
            if (there := store.index_kind(dataset)) == kind:  # another process made it meanwhile
                return ""
            need = rows * dataset.identity.dim * 4 * 3 // 2 >> 20
            store.connection.execute(
                "SELECT set_config('maintenance_work_mem', %s, true)", [f"{min(max(need, 64), 1024)}MB"]
            )
            if there != "none":
                store.connection.execute(sql.SQL("DROP INDEX {}").format(name))
            store.connection.execute(
                sql.SQL("CREATE INDEX {} ON {} USING {} (concept_vec {}_ip_ops) {}").format(
                    name, dataset.table, sql.SQL(kind), sql.SQL(dataset.storage), options
                )
            )
    return ""


def search(
    store: ConceptStore,
    dataset: Dataset,
    vector: NDArray[Any] | None,
    limit: int,
    filters: Filters | None = None,
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
            found = store.connection.execute(
                sql.SQL("SELECT NULL, {} FROM {} WHERE {} ORDER BY doc_id, position LIMIT %s").format(
                    columns, dataset.table, where
                ),
                [*parameters, limit],
            ).fetchall()
            return [_hit(row) for row in found]
        query = np.asarray(vector, np.float32)
        require_unit_vectors(query[None], dataset.identity.dim, "the query")
        if dataset.storage == "real":
            return _scan(store, dataset, query, limit, where, parameters)
        # As the column's type, else the index does not fit the question.
        literal = "[" + ",".join(map(repr, query.tolist())) + "]"
        asked = sql.SQL(f"concept_vec <#> %s::{dataset.storage}({dataset.identity.dim})")
        with store.connection.transaction():
            for setting, value in (
                ("hnsw.ef_search", str(min(1000, max(100, 2 * limit)))),
                ("hnsw.iterative_scan", "strict_order"),  # goes on until `limit` rows pass the filters
                ("ivfflat.probes", "16"),
                ("ivfflat.iterative_scan", "relaxed_order"),
            ):
                store.connection.execute("SELECT set_config(%s, %s, true)", [setting, value])
            found = store.connection.execute(
                sql.SQL("SELECT -({0}), {1} FROM {2} WHERE {3} ORDER BY {0} LIMIT %s").format(
                    asked, columns, dataset.table, where
                ),
                [literal, *parameters, literal, limit],
            ).fetchall()
        return sorted((_hit(row) for row in found), key=lambda h: -(h.score or 0.0))


def _scan(
    store: ConceptStore,
    dataset: Dataset,
    query: NDArray[np.float32],
    limit: int,
    where: sql.Composable,
    parameters: list[Any],
) -> list[Hit]:
    """The same on a server that cannot compare vectors: all that pass are read and compared here."""
    best: list[tuple[float, uuid.UUID]] = []
    with store.connection.transaction(), store.connection.cursor("scan", binary=True) as cursor:
        cursor.itersize = CURSOR_ROWS
        cursor.execute(
            sql.SQL("SELECT cpe_id, array_send(concept_vec) FROM {} WHERE {}").format(dataset.table, where),
            parameters,
        )
        while rows := cursor.fetchmany(CURSOR_ROWS):
            scores = read_vectors([r[1] for r in rows], "real", dataset.identity.dim) @ query
            best += [(float(s), r[0]) for s, r in zip(scores, rows, strict=True)]
            best = sorted(best, key=lambda b: -b[0])[:limit]
    found = store.connection.execute(
        sql.SQL(
            "SELECT NULL, cpe_id, doc_id, position, title, concept_text, source, tmd_code FROM {} "
            "WHERE cpe_id = ANY(%s)"
        ).format(dataset.table),
        [[i for _, i in best]],
    ).fetchall()
    by_id = {row[1]: row for row in found}
    return [_hit((score, *by_id[i][1:])) for score, i in best if i in by_id]


def _hit(row: Sequence[Any]) -> Hit:
    score, cpe_id, *rest = row
    return Hit(cpe_id.hex, None if score is None else float(score), *rest)
