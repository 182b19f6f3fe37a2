"""The routes, by resource. Each class takes the service and adds its routes to the application."""

from typing import Any

from lvm.corpus.tmd import unpack
from serve.retriever import CorpusChunk
from serve.schema import Neighbour

Errors = dict[int | str, dict[str, Any]]
"""Error replies of every route by status, for the OpenAPI document."""


def neighbour(chunk: CorpusChunk) -> Neighbour:
    """A corpus chunk in a reply."""
    return Neighbour(
        text=chunk.text,
        title=chunk.title,
        source=chunk.source,
        chunk_id=chunk.chunk_id,
        position=chunk.position,
        cosine=round(chunk.cosine, 6),
        tmd=None if chunk.tmd_code is None else list(unpack(chunk.tmd_code).names),
    )
