"""Ingest articles into the concept store: chunk, encode, divide into episodes, assign TMD codes, store.

An article is identified by its source and id. Its rows are stored in one transaction with a hash of everything that
determines them, so ingesting an unchanged article again does nothing, and a changed one replaces its rows.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity
from lvm.corpus.chunker import RULES, Chunk, Chunker, Tokenizer
from lvm.corpus.coherence import find_episodes
from lvm.corpus.records import Article
from lvm.corpus.tmd import Coded
from lvm.errors import DatabaseError, InputError
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.entries import content_hash, entries_of, require_text
from lvm.vectors.postgres import database_errors, execute, fetch_one
from lvm.vectors.shards import CHUNK_SCHEMA, VectorType, vectors_to_table

STAGES = ("look up", "chunk", "encode", "episodes", "tmd", "store")
"""Stages of ingestion, in order; the names of the timings."""

Coder = Callable[[list[str], NDArray[np.float32]], Sequence[Coded | None]]
"""Function from N texts and their (N, D) vectors to N TMD codes, or None if a text gets no code."""


class Encoder(Protocol):
    """The part of a codec that ingestion uses."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def tokenizer(self) -> Tokenizer: ...

    def encode_chunks(self, texts: list[str]) -> Any:
        """`.vectors` (N, D) float32 of unit norm, `.norms`, `.num_tokens`, `.truncated` of N texts."""


@dataclass(frozen=True)
class Outcome:
    """Result of ingesting one article."""

    status: Literal["stored", "known", "refused"]
    """Stored now, stored before with the same content, or refused."""
    chunks: int = 0
    """Rows stored now."""
    episodes: int = 0
    """Coherent runs of paragraphs among them."""
    coded: int = 0
    """Rows with a TMD code."""
    reason: str = ""
    """Why it was refused."""


class Ingester:
    """Ingests articles into one dataset. Not thread-safe."""

    def __init__(
        self,
        store: ConceptStore,
        dataset: Dataset,
        codec: Encoder,
        coder: Coder | None = None,
        coded_by: str = "",
        language: str = "en",
        chunker: Chunker | None = None,
    ) -> None:
        """coded_by: name and settings of the coder; articles coded by another are replaced. chunker: a chunker for
        this codec and language whose word cache to share; by default a new one."""
        self._store, self._dataset, self._codec, self._coder = store, dataset, codec, coder
        self._chunker = chunker or Chunker(codec.tokenizer, language)
        made_by = {"codec": codec.identity.digest, "rules": RULES, "language": language, "tmd": coded_by}
        self._made_by: dict[str, Any] = made_by
        self.seconds = dict.fromkeys(STAGES, 0.0)
        """Time spent in each stage so far."""

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun

    def ingest(self, articles: Sequence[Article]) -> list[Outcome]:
        """Ingest a batch; returns the outcome of each article. Refused articles do not affect the others.

        Raises DatabaseError if the connection is lost; earlier articles of the batch are stored then.
        """
        outcomes: dict[int, Outcome] = {}
        hashes = [content_hash({"title": a.title, "text": a.text, **self._made_by}) for a in articles]
        for i, article in enumerate(articles):
            try:
                for name in ("source", "article_id", "title", "text"):
                    require_text(getattr(article, name), f"{name} of article {article.article_id!r}")
            except InputError as err:
                outcomes[i] = Outcome("refused", reason=str(err))
        with self._timed("look up"):
            valid = [(a.source, a.article_id) for i, a in enumerate(articles) if i not in outcomes]
            contents = stored_contents(self._store, self._dataset, valid)
        for i, article in enumerate(articles):
            if i not in outcomes and contents.get((article.source, article.article_id)) == hashes[i]:
                outcomes[i] = Outcome("known")
        new = [i for i in range(len(articles)) if i not in outcomes]
        with self._timed("chunk"):
            cut = self._chunker.chunk([articles[i] for i in new])
        texts = [chunk.text for chunks in cut for chunk in chunks]
        with self._timed("encode"):
            encoded = self._codec.encode_chunks(texts) if texts else None
        with self._timed("tmd"):
            codes = self._code(texts, encoded)
        start = 0
        for i, chunks in zip(new, cut, strict=True):
            rows = slice(start, start + len(chunks))
            start += len(chunks)
            article = articles[i]
            try:
                table, episodes = self._table(article, chunks, encoded, codes, rows)
                key = (article.source, article.article_id)
                with self._timed("store"):
                    stored = store_article(self._store, self._dataset, *key, hashes[i], table)
            except InputError as err:
                outcomes[i] = Outcome("refused", reason=str(err))
                continue
            num_coded = sum(c is not None for c in codes[rows])
            outcomes[i] = Outcome("stored", len(chunks), episodes, num_coded) if stored else Outcome("known")
        return [outcomes[i] for i in range(len(articles))]

    def _code(self, texts: list[str], encoded: Any) -> list[Coded | None]:
        if self._coder is None or not texts:
            return [None] * len(texts)
        # Texts whose vector is not finite are refused later, when they are stored.
        finite = np.isfinite(encoded.vectors).all(axis=1, keepdims=True)
        return list(self._coder(texts, np.where(finite, encoded.vectors, 0)))

    def _table(
        self, article: Article, chunks: list[Chunk], encoded: Any, codes: list[Coded | None], rows: slice
    ) -> tuple[pa.Table, int]:
        """The article's rows and its number of episodes. Raises InputError on invalid vectors."""
        columns = {
            "chunk_id": [c.chunk_id for c in chunks],
            "doc_id": [0] * len(chunks),  # assigned by the store
            "position": [c.position for c in chunks],
            "title": [article.title] * len(chunks),
            "text": [c.text for c in chunks],
            "source": [article.source] * len(chunks),
            "num_tokens": [c.num_tokens for c in chunks],
        }
        table = pa.table(columns, schema=CHUNK_SCHEMA)
        dtype: VectorType = "float16" if self._dataset.storage == "halfvec" else "float32"
        vectors, norms, num_tokens, truncated = _rows(encoded, rows, self._codec.identity.dim)
        table = vectors_to_table(table, vectors, norms, num_tokens, truncated, dtype)
        with self._timed("episodes"):
            episodes, coherence = find_episodes(vectors, np.array([c.paragraph for c in chunks], np.int64))
        extra = {
            "tmd_code": pa.array([c and c.tmd.code for c in codes[rows]], pa.int32()),
            "tmd_confidence": pa.array([c and c.confidence for c in codes[rows]], pa.float32()),
            "episode": pa.array(episodes, pa.int32()),
            "coherence": pa.array(coherence, pa.float32()),
        }
        for name, values in extra.items():
            table = table.append_column(name, values)
        return table, len(np.unique(episodes))


def stored_contents(
    store: ConceptStore, dataset: Dataset, articles: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """Content hash of each of these (source, id) articles that is stored."""
    with database_errors("looking up the articles"):
        rows = store.connection.execute(
            "SELECT source, article_id, content FROM cpe_article WHERE dataset = %s AND article_id = ANY(%s)",
            [dataset.name, [a for _, a in articles]],
        ).fetchall()
    return {(s, a): content for s, a, content in rows}


def store_article(
    store: ConceptStore, dataset: Dataset, source: str, article_id: str, content: str, chunks: pa.Table
) -> bool:
    """Store, or replace, one article's chunks in one transaction; False if this content is stored already.

    chunks: in `vector_schema` with the optional columns; doc_id is ignored and assigned by the store.
    Raises InputError as `entries_of` does, and on an id or source that Postgres cannot store.
    """
    require_text(article_id, "the article's id")
    require_text(source, "the article's source")
    what = f"article {article_id!r}"
    with database_errors(f"storing {what}"), store.locked(dataset.name):
        found = store.find(dataset.name)
        if found is None or found.id != dataset.id:
            raise DatabaseError(f"dataset {dataset.name!r} was cleared meanwhile; run the same command again")
        before = store.connection.execute(
            "SELECT content, doc_id FROM cpe_article WHERE (dataset, source, article_id) = (%s, %s, %s)",
            [dataset.name, source, article_id],
        ).fetchone()
        if before is not None and before[0] == content:
            return False
        if before is None and chunks.num_rows:
            # A load of shards may have stored the article: look for the id of its first chunk.
            first = [uuid.UUID(hex=chunks.column("chunk_id")[0].as_py())]
            query = "SELECT NULL, doc_id FROM {} WHERE cpe_id = %s"
            before = execute(store.connection, query, dataset.table, parameters=first).fetchone()
        if before is None:
            query = "UPDATE cpe_dataset SET next_doc_id = next_doc_id + 1 WHERE name = %s RETURNING next_doc_id - 1"
            number = fetch_one(store.connection, query, [dataset.name])[0]
        else:
            number = before[1]
            execute(store.connection, "DELETE FROM {} WHERE doc_id = %s", dataset.table, parameters=[number])
        numbers = pa.array([number] * chunks.num_rows, pa.int32())
        chunks = chunks.set_column(chunks.schema.get_field_index("doc_id"), "doc_id", numbers)
        store.copy(dataset.table, entries_of(chunks, dataset.name, dataset.identity, dataset.storage, what))
        store.connection.execute(
            "INSERT INTO cpe_article (dataset, source, article_id, doc_id, content, chunks) "
            "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (dataset, source, article_id) "
            "DO UPDATE SET content = excluded.content, chunks = excluded.chunks, stored = now()",
            [dataset.name, source, article_id, number, content, chunks.num_rows],
        )
        update = "UPDATE cpe_dataset SET loaded = NULL, version = gen_random_uuid() WHERE name = %s"
        store.connection.execute(update, [dataset.name])
    return True


def _rows(encoded: Any, rows: slice, dim: int) -> tuple[NDArray[Any], ...]:
    """Vectors, norms, token counts and truncation flags of some texts; empty if nothing was encoded."""
    if encoded is None:
        return np.zeros((0, dim), np.float32), np.zeros(0), np.zeros(0), np.zeros(0)
    return encoded.vectors[rows], encoded.norms[rows], encoded.num_tokens[rows], encoded.truncated[rows]
