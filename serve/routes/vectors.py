"""Routes for single stages on vectors: encode, predict, decode, search."""

import time
from functools import partial

import numpy as np
from fastapi import FastAPI, Request

from lvm.corpus.tmd import Wanted
from lvm.vectors.concept_search import Filters, Hit
from serve.pipeline import Clock
from serve.retriever import CodeFilter, CorpusChunk, NearRow
from serve.routes import Errors, neighbour
from serve.schema import (
    DecodeReply,
    DecodeRequest,
    EncodeReply,
    EncodeRequest,
    PredictReply,
    PredictRequest,
    RefusedError,
    SearchReply,
    SearchRequest,
    decoded_text,
    pack,
    unpack,
)
from serve.service import NO_STORE, Service
from serve.stage import Timing


class VectorRoutes:
    """Encode, predict, decode and search."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI, errors: Errors) -> None:
        """Register the routes."""
        add_post = partial(app.add_api_route, methods=["POST"], responses=errors)
        add_post("/v1/encode", self.encode, response_model=EncodeReply)
        add_post("/v1/predict", self.predict, response_model=PredictReply)
        add_post("/v1/decode", self.decode, response_model=DecodeReply)
        add_post("/v1/search", self.search, response_model=SearchReply)

    async def encode(self, request: Request, body: EncodeRequest) -> EncodeReply:
        """Texts to unit vectors."""
        clock = Clock()
        texts = self._service.texts(body.texts, "texts")
        with self._service.admitted(len(texts)):
            encoded, timing = await self._service.pipeline.encode(
                texts, self._service.deadline(body.deadline_s), body.cache
            )
        clock.add("encode", timing)
        return EncodeReply(
            vectors=[pack(e.vector, body.encoding_format) for e in encoded],
            num_tokens=[e.num_tokens for e in encoded],
            truncated=[e.truncated for e in encoded],
            cached=[e.cached for e in encoded],
            **self._service.reply_fields(request, clock),
        )

    async def predict(self, request: Request, body: PredictRequest) -> PredictReply:
        """Context vectors to the next vector."""
        clock = Clock()
        record = self._service.model(body.model or self._service.default_model)
        self._service.require_one(vectors=body.vectors, contexts=body.contexts)
        given = [body.vectors] if body.vectors is not None else body.contexts or []
        if not given:
            raise RefusedError(422, "contexts is empty; expected at least one list of vectors")
        self._service.require_at_most("contexts", len(given), "max_vectors")
        contexts = []
        for i, vectors in enumerate(given):
            name = "vectors" if body.vectors is not None else f"contexts[{i}]"
            if not vectors:
                raise RefusedError(422, f"{name} is empty; expected at least one vector")
            self._service.require_at_most(name, len(vectors), "max_context", "vectors")
            contexts.append(unpack(vectors, self._service.identity.dim, name))
        with self._service.admitted(len(contexts)):
            predicted, timing = await self._service.pipeline.predict(
                contexts, record.name, self._service.deadline(body.deadline_s)
            )
        clock.add("predict", timing)
        return PredictReply(
            model=record,
            vectors=[pack(p.vector, body.encoding_format) for p in predicted],
            **self._service.reply_fields(request, clock),
        )

    async def decode(self, request: Request, body: DecodeRequest) -> DecodeReply:
        """Vectors to text."""
        clock = Clock()
        for codec in _names(body.codec) + _names(body.subscribers):
            self._service.require_codec(codec, "codec")
        self._service.require_steps(body.steps)
        if not body.vectors:
            raise RefusedError(422, "vectors is empty; expected at least one")
        self._service.require_at_most("vectors", len(body.vectors), "max_vectors")
        vectors = unpack(body.vectors, self._service.identity.dim, "vectors")
        with self._service.admitted(len(vectors)):
            deadline = self._service.deadline(body.deadline_s)
            answers, timing = await self._service.pipeline.decode(
                vectors, deadline, body.steps, body.cache, corpus=body.steps is None
            )
        clock.add("decode", timing)
        return DecodeReply(
            results=[decoded_text(a) for a in answers], **self._service.reply_fields(request, clock)
        )

    async def search(self, request: Request, body: SearchRequest) -> SearchReply:
        """Texts or vectors to the nearest chunks of the run or the dataset that pass the filters."""
        clock = Clock()
        from_store = body.corpus == "store" or (body.corpus is None and self._service.concepts is not None)
        wanted = Wanted.of(body.domain, body.task, body.modifier)
        if from_store:
            concepts = self._service.require_concepts("search")
        else:
            corpus = self._service.require_corpus("search")
            for name in ("source", "contains"):
                if getattr(body, name) is not None:
                    raise RefusedError(422, f"{name} filters a dataset only, and {NO_STORE}", param=name)
        deadline = self._service.deadline(body.deadline_s)
        self._service.require_one(query=body.query, vectors=body.vectors)
        self._service.require_at_most("k", body.k, "max_neighbours")
        if body.query is not None:
            texts = self._service.texts(body.query, "query")
            with self._service.admitted(len(texts)):
                encoded, timing = await self._service.pipeline.encode(texts, deadline)
            clock.add("encode", timing)
            queries = np.stack([e.vector for e in encoded])
        else:
            if not body.vectors:
                raise RefusedError(422, "vectors is empty; expected at least one")
            self._service.require_at_most("vectors", len(body.vectors), "max_vectors")
            queries = unpack(body.vectors, self._service.identity.dim, "vectors")
        with self._service.admitted(len(queries)):
            begun = time.perf_counter()
            if from_store:
                filters = Filters(body.source, body.contains, None, wanted)
                hits = await concepts.search(queries, body.k, filters, deadline)
                timing = Timing(work_ms=(time.perf_counter() - begun) * 1000)
                found = [[_chunk(hit) for hit in query_hits] for query_hits in hits]
            else:
                codes = CodeFilter(wanted, await self._service.prototypes(deadline)) if wanted else None
                rows = [NearRow(q, body.k, codes=codes) for q in queries]
                found, timing = await corpus.find.run(rows, deadline)
        clock.add("snap", timing)
        return SearchReply(
            results=[[neighbour(c) for c in chunks] for chunks in found],
            **self._service.reply_fields(request, clock),
        )


def _chunk(hit: Hit) -> CorpusChunk:
    return CorpusChunk(
        hit.text, hit.title, hit.source, hit.chunk_id, hit.position, hit.score or 0.0, hit.tmd_code
    )


def _names(value: str | list[str] | None) -> list[str]:
    """The names in a list or a comma-separated string."""
    if value is None:
        return []
    listed = value.split(",") if isinstance(value, str) else value
    return [name.strip() for name in listed]
