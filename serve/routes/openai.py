"""Routes for OpenAI's clients; see docs/clients.md."""

import time
from datetime import datetime
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from serve.encoder import EncodedText
from serve.pipeline import Clock
from serve.routes import Errors
from serve.schema import (
    EmbeddingsReply,
    EmbeddingsRequest,
    ModelReply,
    ModelsReply,
    RefusedError,
    Usage,
    embeddings_json,
)
from serve.service import Service


class OpenAIRoutes:
    """Embeddings and models in OpenAI's format."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI, errors: Errors) -> None:
        """Register the routes."""
        add = partial(app.add_api_route, responses=errors)
        add("/v1/embeddings", self.embeddings, methods=["POST"], response_model=EmbeddingsReply)
        add("/v1/models", self.list_models, response_model=ModelsReply)
        add("/v1/models/{model:path}", self.get_model, response_model=ModelReply)

    async def embeddings(self, request: Request, body: EmbeddingsRequest) -> Any:
        """Texts to vectors in OpenAI's format; `model` is the codec's name. Texts above the codec's limit are
        truncated, as reported in `truncated`."""
        clock = Clock()
        if body.model is not None:
            self._service.require_codec(body.model, "model")
        if body.dimensions not in (None, self._service.identity.dim):
            raise RefusedError(
                422,
                f"dimensions is {body.dimensions}, but codec {self._service.identity.name} has vectors of "
                f"{self._service.identity.dim} numbers, which cannot be shortened; leave dimensions out",
                param="dimensions",
            )
        limits = self._service.limits
        texts = self._service.texts(body.input, "input", "max_embeddings")
        batches = [texts[i : i + limits.max_texts] for i in range(0, len(texts), limits.max_texts)]
        seconds = min(limits.default_deadline_s * len(batches), limits.max_deadline_s)
        deadline = time.monotonic() + max(seconds, limits.default_deadline_s)
        encoded: list[EncodedText] = []
        with self._service.admitted(len(batches[0])):  # batches are processed one at a time
            for batch in batches:
                found, timing = await self._service.pipeline.encode(batch, deadline)
                clock.add("encode", timing)
                encoded += found
        tokens = sum(e.num_tokens for e in encoded)
        reply = EmbeddingsReply(
            data=[],
            model=self._service.identity.name,
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
            truncated=[e.truncated for e in encoded],
            **self._service.reply_fields(request, clock),
        )
        pieces = embeddings_json(reply, [e.vector for e in encoded], body.encoding_format or "float")
        return StreamingResponse(pieces, media_type="application/json")

    async def list_models(self) -> ModelsReply:
        """The loaded models, codec, decoder and corpus, and the limits of a request."""
        return ModelsReply(
            data=self._listed(),
            models=list(self._service.models.values()),
            default_model=self._service.default_model,
            codec=self._service.codec,
            decoder={k: v for k, v in self._service.decoder.items() if k != "codec"},
            corpus={k: v for k, v in self._service.corpus.items() if k != "codec"},
            limits=self._service.limits.model_dump(),
            smoothing=self._service.smoother.configured,
        )

    async def get_model(self, model: str) -> ModelReply:
        """One entry of `data` in /v1/models."""
        for listed in self._listed():
            if listed.id == model:
                return listed
        available = ", ".join(m.id for m in self._listed())
        raise RefusedError(404, f"no model {model[:100]!r} is loaded; available: {available}", param="model")

    def _listed(self) -> list[ModelReply]:
        models = [ModelReply(id=alias, created=_unix(r.created)) for alias, r in self._service.models.items()]
        return [*models, ModelReply(id=self._service.identity.name, created=0)]


def _unix(created: str) -> int:
    """Unix time of an ISO timestamp; 0 for any other text."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0
