"""Routes for chunking, TMD codes and ingestion."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from fastapi import FastAPI, Request

from lvm.corpus.chunker import chunk_id
from lvm.corpus.records import Article
from lvm.vectors.shards import write_bytes
from serve.concepts import Concepts
from serve.encoder import EncodedText
from serve.pipeline import Clock
from serve.requests import ms_since, request_id
from serve.routes import Errors
from serve.schema import (
    ChunkItem,
    ChunkReply,
    ChunkRequest,
    IngestChunk,
    IngestedArticle,
    IngestReply,
    IngestRequest,
    RefusedError,
    TmdCode,
    TmdReply,
    TmdRequest,
)
from serve.service import Service


class CorpusRoutes:
    """Chunk texts, assign TMD codes, and ingest articles into the concept store or the inbox."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI, errors: Errors) -> None:
        """Register the routes."""
        add_post = partial(app.add_api_route, methods=["POST"], responses=errors)
        add_post("/v1/chunk", self.chunk, response_model=ChunkReply)
        add_post("/v1/tmd", self.tmd, response_model=TmdReply)
        add_post("/v1/ingest", self.ingest, response_model=IngestReply)

    async def chunk(self, request: Request, body: ChunkRequest) -> ChunkReply:
        """Texts to chunks within the codec's limit."""
        begun = time.perf_counter()
        texts = self._service.texts(body.text, "text")
        with self._service.admitted(len(texts)):
            cut = await self._service.cut(texts)
        results = [
            [ChunkItem(position=c.position, text=c.text, num_tokens=c.num_tokens) for c in cs] for cs in cut
        ]
        return ChunkReply(
            request_id=request_id(request),
            codec=self._service.codec,
            results=results,
            milliseconds=ms_since(begun),
        )

    async def tmd(self, request: Request, body: TmdRequest) -> TmdReply:
        """Texts to TMD codes: domain, task and modifier."""
        clock = Clock()
        texts = self._service.texts(body.texts, "texts")
        with self._service.admitted(len(texts)):
            codes = await self._codes(texts, self._service.deadline(body.deadline_s), clock)
        return TmdReply(results=codes, **self._service.reply_fields(request, clock))

    async def _codes(self, texts: Sequence[str], deadline: float, clock: Clock) -> list[TmdCode]:
        prototypes = await self._service.prototypes(deadline)
        encoded, timing = await self._service.pipeline.encode(texts, deadline)
        clock.add("encode", timing)
        return [
            TmdCode(
                code=found.tmd.code,
                domain=found.tmd.names[0],
                task=found.tmd.names[1],
                modifier=found.tmd.names[2],
                cosines=[round(c, 6) for c in found.cosines or ()],
                confidence=round(found.confidence, 6),
                features=[int(f) for f in found.tmd.features()],
            )
            for found in prototypes.nearest(np.stack([e.vector for e in encoded]))
        ]

    async def ingest(self, request: Request, body: IngestRequest) -> IngestReply:
        """Store articles in the concept store, each only once; /v1/search finds them from then on. Without a store,
        write them to the inbox, for `latent run --input INBOX`."""
        clock = Clock()
        deadline = self._service.deadline(body.deadline_s)
        concepts = self._service.concepts
        if not self._service.args.inbox and concepts is None:
            raise RefusedError(
                422, "no place to store articles; start the service with --dataset NAME or --inbox DIR"
            )
        if not body.articles:
            raise RefusedError(422, "articles is empty; expected at least one")
        self._service.require_at_most("articles", len(body.articles), "max_texts")
        for i, given in enumerate(body.articles):
            self._service.require_words([given.text], f"articles[{i}].text")
            self._service.require_words([given.id, given.title, given.source], f"articles[{i}]", empty=True)
        if concepts is not None:
            return await self._store(request, body, concepts, deadline, clock)
        with self._service.admitted(len(body.articles)):
            cut = await self._service.cut([a.text for a in body.articles])
            for i, chunks in enumerate(cut):
                self._service.require_at_most(f"articles[{i}]", len(chunks), "max_chunks", "chunks")
            codes = await self._codes([c.text for chunks in cut for c in chunks], deadline, clock)
            lines = "".join(a.model_dump_json() + "\n" for a in body.articles).encode()
            file = f"ingest-{hashlib.sha256(lines).hexdigest()[:16]}.jsonl"
            await asyncio.to_thread(write_bytes, Path(self._service.args.inbox) / file, lines)
        coded = iter(codes)
        results = [
            [
                IngestChunk(
                    chunk_id=chunk_id(file, article.id, c.position),  # the same id as from `latent run`
                    position=c.position,
                    text=c.text,
                    num_tokens=c.num_tokens,
                    tmd=next(coded),
                )
                for c in chunks
            ]
            for article, chunks in zip(body.articles, cut, strict=True)
        ]
        return IngestReply(file=file, results=results, **self._service.reply_fields(request, clock))

    async def _store(
        self, request: Request, body: IngestRequest, concepts: Concepts, deadline: float, clock: Clock
    ) -> IngestReply:
        articles = [Article(a.id, a.title, a.text, a.source) for a in body.articles]
        prototypes = await self._service.prototypes(deadline)

        async def encode(texts: Sequence[str]) -> Sequence[EncodedText]:
            # Bypass the cache, so that an article does not evict texts that will be requested again.
            encoded, timing = await self._service.pipeline.encode(texts, deadline, cache=False)
            clock.add("encode", timing)
            return encoded

        with self._service.admitted(len(articles)):
            outcomes = await concepts.ingest(articles, encode, prototypes, deadline)
        return IngestReply(
            dataset=concepts.name,
            articles=[
                IngestedArticle(
                    id=a.article_id,
                    source=a.source,
                    status=o.status,
                    chunks=o.chunks,
                    episodes=o.episodes,
                    reason=o.reason,
                )
                for a, o in zip(articles, outcomes, strict=True)
            ],
            **self._service.reply_fields(request, clock),
        )
