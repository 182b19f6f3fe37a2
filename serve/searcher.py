"""The searcher deployments: each holds a share of the index's parts, for corpora whose codes fill no single node.

The retriever keeps the vectors and texts, which are memory-mapped, and asks all searchers at once.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from lvm.errors import InputError
from lvm.storage import Location
from lvm.vectors.index import DividedIndex, Index, Nearest, load_index, published
from serve.release import Held, Release
from serve.settings import ServeArgs, once_a_node


@serve.deployment
class Searcher:
    """Searches one share of an index's parts."""

    def __init__(self, args: ServeArgs, share: int) -> None:
        import faiss

        faiss.omp_set_num_threads(args.searcher.num_threads)
        self._args = args

        def load(release: Release) -> Index:
            with once_a_node(release.run) as folder:
                return load_index(folder / "index", share, args.searchers)

        self._held = Held(load)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="search")

    async def reconfigure(self, wanted: Mapping[str, Any]) -> None:
        """Load the release of a `user_config`."""
        await self._held.prepare(wanted, self._args)

    async def describe(self, release: Release) -> dict[str, Any]:
        """Version of the index, and number of vectors in this share."""
        index = await self._held.get(release)
        return {"version": index.directory.name, "vectors": len(index)}

    async def search(
        self, queries: NDArray[np.float32], k: int, probes: int | None, release: Release
    ) -> Nearest:
        """`Index.search` in this share; fewer than k per query if it has fewer vectors."""
        index = await self._held.get(release)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, index.search, queries, min(k, len(index)), probes)


def divided_index(
    folder: Location, searchers: Sequence[DeploymentHandle], release: Release, timeout_s: float
) -> DividedIndex:
    """The published index of a folder, searched by `searchers`. For threads: each search blocks.

    Raises InputError if the searchers do not hold this version together.
    """
    version, manifest = published(folder, len(searchers))

    def ask(method: str, *arguments: Any) -> list[Any]:
        sent = [getattr(each, method).remote(*arguments, release) for each in searchers]
        return [reply.result(timeout_s=timeout_s) for reply in sent]

    held = ask("describe")
    if {h["version"] for h in held} != {version.name} or sum(h["vectors"] for h in held) != manifest.rows:
        raise InputError(
            f"the searchers hold {held}, expected {manifest.rows} vectors of version {version.name}; the index was "
            "published again meanwhile: roll out again with another release"
        )
    return DividedIndex(
        version, manifest, None, searchers=lambda queries, k, probes: ask("search", queries, k, probes)
    )
