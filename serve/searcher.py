"""The searcher deployments: each holds a share of the index's parts, for corpora whose codes fill no single node.

The retriever keeps the vectors and texts, which are memory-mapped, and asks all searchers at once.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from lvm.storage import location
from lvm.vectors.index import DividedIndex, Index, Nearest, load_index, published
from serve.release import Held
from serve.settings import ServeArgs, once_a_node


@serve.deployment
class Searcher:
    """Searches one share of an index's parts."""

    def __init__(self, args: ServeArgs, share: int) -> None:
        import faiss

        faiss.omp_set_num_threads(args.searcher.num_threads)

        def load(named: tuple[str, str]) -> Index:
            run, version = named
            with once_a_node(run) as folder:
                return load_index(folder / "index", share, args.searchers, version)

        self._held = Held(load)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="search")

    async def load(self, run: str, version: str) -> None:
        """Load a version of a run's index, beside the one before."""
        await self._held.get((run, version))

    async def search(
        self, run: str, version: str, queries: NDArray[np.float32], k: int, probes: int | None
    ) -> Nearest:
        """`Index.search` in this share; fewer than k per query if it has fewer vectors."""
        index = await self._held.get((run, version))  # a replica that was restarted loads it now
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, index.search, queries, min(k, len(index)), probes)


def divided_index(run: str, searchers: Sequence[DeploymentHandle], timeout_s: float) -> DividedIndex:
    """A run's published index, once all `searchers` have loaded it. For threads: it blocks, as searches do.

    timeout_s: of a search; loading may take longer.
    """
    folder, manifest = published(location(run) / "index", len(searchers))

    def ask(method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        sent = [getattr(each, method).remote(run, folder.name, *arguments) for each in searchers]
        return [
            reply.result(timeout_s=None if until is None else max(0.0, until - time.monotonic()))
            for reply in sent
        ]

    ask("load")
    return DividedIndex(
        folder,
        manifest,
        None,
        searchers=lambda queries, k, probes: ask("search", queries, k, probes, timeout_s=timeout_s),
    )
