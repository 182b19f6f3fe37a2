"""The concept store as a gateway sees it: connections of its own, in threads, so that the event loop never waits.

Every operation may be done twice: a search changes nothing, and an article is stored once however often it comes. So
what met a connection that had died meanwhile is done again on a new one.
"""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

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
"""Of one gateway: as many searches and ingestions go on side by side."""

CONNECT_WAIT_S = 2.0
"""How long a full server is asked again: somebody waits."""

Encode = Callable[[Sequence[str]], Awaitable[Sequence[EncodedText]]]
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Encoder:
    """The service's encoder as an `Ingester` takes one, called from a thread."""

    identity: CodecIdentity
    tokenizer: Tokenizer
    encode: Encode
    loop: asyncio.AbstractEventLoop

    async def _encode(self, texts: list[str]) -> Sequence[EncodedText]:
        return await self.encode(texts)

    def encode_chunks(self, texts: list[str]) -> Encoded:
        rows = asyncio.run_coroutine_threadsafe(self._encode(texts), self.loop).result()
        return Encoded(
            np.stack([r.vector for r in rows]),
            np.array([r.norm for r in rows], np.float32),
            np.array([r.num_tokens for r in rows], np.int32),
            np.array([r.truncated for r in rows], np.bool_),
        )


class _Own(threading.local):
    """What a thread keeps for itself."""

    opened: tuple[ConceptStore, Dataset] | None = None
    chunker: Chunker | None = None


class Concepts:
    """One dataset of a store."""

    def __init__(self, args: ServeArgs, identity: CodecIdentity, tokenizer: Tokenizer) -> None:
        """Opens nothing yet. Raises InputError where no server is named."""
        self._url = args.database_url or os.environ.get("LATENT_DATABASE_URL", "")
        if not self._url:
            raise InputError(
                f"dataset {args.dataset!r} is to be served and no database is named; set database_url, or "
                "LATENT_DATABASE_URL where the gateways run"
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
        """Whether the connection is gone, or the dataset was cleared meanwhile."""
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
        """Connect, and make the dataset where there is none.

        Raises IdentityError where it holds another codec's vectors, DatabaseError where the server does not answer.
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
        """What became of each article; those stored are found from now on."""
        loop = asyncio.get_running_loop()
        encoder = _Encoder(self._identity, self._tokenizer, encode, loop)

        def work(store: ConceptStore, dataset: Dataset) -> list[Outcome]:
            self._own.chunker = self._own.chunker or Chunker(self._tokenizer)
            coder = lambda _, v: prototypes.nearest(v)  # noqa: E731
            # Named as `latent ingest` names it: an article that came by the one is known to the other.
            ingester = Ingester(store, dataset, encoder, coder, coder_name(), chunker=self._own.chunker)
            return ingester.ingest(articles)

        outcomes = await self._run(work, deadline)
        if not self._indexed and self._indexing is None and any(o.status == "stored" for o in outcomes):
            self._indexing = asyncio.create_task(self._index())
        return outcomes

    async def _index(self) -> None:
        """Have an index where the dataset wants one; the server keeps it up to date from then on."""
        try:
            self._indexed = not await self._run(lambda store, dataset: ensure_index(store, dataset, "hnsw"))
        except LvmError:
            pass  # a search scans meanwhile, and the next article tries again
        finally:
            self._indexing = None
