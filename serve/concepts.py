"""The gateway's client of the concept store: each thread has its own connection, so the event loop never blocks.

An operation on a dead connection is retried on a new one, since all are idempotent: a search changes nothing, and an
article is stored only once.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from psycopg import errors

from lvm.codec.encoder import Encoded
from lvm.codec.identity import CodecIdentity
from lvm.corpus.chunker import Chunker, Tokenizer
from lvm.corpus.records import Article
from lvm.corpus.tmd import Prototypes, coder_name
from lvm.errors import DatabaseError, InputError, LvmError
from lvm.vectors.concept_search import Filters, Hit, ensure_index, search
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.ingest import Ingester, Outcome
from serve.encoder import EncodedText
from serve.settings import ServeArgs
from serve.stage import DeadlineError

CONNECTIONS = 4
"""Connections per gateway, hence the number of concurrent searches and ingestions."""

CONNECT_WAIT_S = 2.0
"""How long to retry when the server has no free connection; short, as a client is waiting."""

Encode = Callable[[Sequence[str]], Coroutine[Any, Any, Sequence[EncodedText]]]
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Encoder:
    """Makes the service's async encoder callable from an `Ingester`'s thread."""

    identity: CodecIdentity
    tokenizer: Tokenizer
    encode: Encode
    loop: asyncio.AbstractEventLoop

    def encode_chunks(self, texts: list[str]) -> Encoded:
        rows = asyncio.run_coroutine_threadsafe(self.encode(texts), self.loop).result()
        return Encoded(
            np.stack([r.vector for r in rows]),
            np.array([r.norm for r in rows], np.float32),
            np.array([r.num_tokens for r in rows], np.int32),
            np.array([r.truncated for r in rows], np.bool_),
        )


class _Own(threading.local):
    """Thread-local state."""

    opened: tuple[ConceptStore, Dataset] | None = None
    chunker: Chunker | None = None


class Concepts:
    """A client of one dataset."""

    def __init__(self, args: ServeArgs, identity: CodecIdentity, tokenizer: Tokenizer) -> None:
        """Does not connect yet. Raises InputError when no database is configured."""
        self._url = args.database_url or os.environ.get("LATENT_DATABASE_URL", "")
        if not self._url:
            raise InputError(
                f"no database is configured for dataset {args.dataset!r}; set database_url, or LATENT_DATABASE_URL "
                "where the gateways run"
            )
        self.name = args.dataset
        self._identity, self._tokenizer = identity, tokenizer
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="concepts")
        self._own = _Own()
        self._indexed = False
        self._indexing: asyncio.Task[None] | None = None

    def _open(self) -> tuple[ConceptStore, Dataset]:
        if self._own.opened is None:
            store = ConceptStore(self._url, CONNECT_WAIT_S)
            try:
                self._own.opened = store, store.ensure(self.name, self._identity, "float16", source="ingest")
            except BaseException:
                store.connection.close()
                raise
        return self._own.opened

    def _with_store(self, work: Callable[[ConceptStore, Dataset], Value], deadline: float | None) -> Value:
        for attempt in range(2):
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineError("the deadline passed in the queue of the concept store")
            store, dataset = self._open()
            try:
                left = 0 if deadline is None else max(1, int((deadline - time.monotonic()) * 1000))
                store.limit_statements(left)
                return work(store, dataset)
            except (DatabaseError, InputError) as err:
                if isinstance(err.__cause__, errors.QueryCanceled):
                    raise DeadlineError("the deadline passed in the concept store") from err
                if not self._stale(store, dataset):
                    raise
                store.connection.close()
                self._own.opened = None
                if attempt:
                    raise
        raise AssertionError("not reached")

    def _stale(self, store: ConceptStore, dataset: Dataset) -> bool:
        """Whether the connection was lost, or the dataset was replaced in the meantime."""
        if store.connection.closed:
            return True
        found = store.find(self.name)
        return found is None or found.id != dataset.id

    async def _run(
        self, work: Callable[[ConceptStore, Dataset], Value], deadline: float | None = None
    ) -> Value:
        done = asyncio.get_running_loop().run_in_executor(self._threads, self._with_store, work, deadline)
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return await done
        except TimeoutError as err:
            raise DeadlineError("the deadline passed in the concept store") from err

    async def open(self) -> None:
        """Connect, and create the dataset if it does not exist.

        Raises IdentityError when it holds another codec's vectors, DatabaseError when the server does not respond.
        """
        await self._run(lambda store, dataset: None)

    async def search(
        self, vectors: NDArray[np.float32], k: int, filters: Filters, deadline: float
    ) -> list[list[Hit]]:
        """The k nearest rows that pass the filters, for each of (B, D) unit vectors, best first."""
        return await self._run(
            lambda store, dataset: [search(store, dataset, v, k, filters) for v in vectors], deadline
        )

    async def ingest(
        self, articles: Sequence[Article], encode: Encode, prototypes: Prototypes, deadline: float
    ) -> list[Outcome]:
        """Store articles; returns an outcome for each. Stored articles can be searched from then on."""
        loop = asyncio.get_running_loop()
        encoder = _Encoder(self._identity, self._tokenizer, encode, loop)

        def work(store: ConceptStore, dataset: Dataset) -> list[Outcome]:
            self._own.chunker = self._own.chunker or Chunker(self._tokenizer)
            coder = lambda _, v: prototypes.nearest(v)  # noqa: E731
            # The coder name of `latent ingest`, so that each recognises articles stored by the other.
            ingester = Ingester(store, dataset, encoder, coder, coder_name(), chunker=self._own.chunker)
            return ingester.ingest(articles)

        outcomes = await self._run(work, deadline)
        if not self._indexed and self._indexing is None and any(o.status == "stored" for o in outcomes):
            self._indexing = asyncio.create_task(self._index())
        return outcomes

    async def _index(self) -> None:
        """Create a vector index once the dataset is large enough; Postgres keeps it up to date from then on."""
        try:
            self._indexed = not await self._run(lambda store, dataset: ensure_index(store, dataset, "hnsw"))
        except LvmError:
            pass  # until the next article triggers another attempt, searches scan
        finally:
            self._indexing = None
