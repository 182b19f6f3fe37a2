"""The route that runs all stages: text, or chunks, to the predicted next text."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from serve.guard import error_body
from serve.health import Seen
from serve.pipeline import ChunkOptions, PredictedChunk, judge
from serve.requests import OUR_FAULT, log, ms_since, request_id
from serve.routes import Errors, neighbour
from serve.schema import (
    ContextReply,
    Generated,
    GeneratedInput,
    GenerateReply,
    GenerateRequest,
    Milliseconds,
    ModelRecord,
    RefusedError,
    event,
    provenance,
)
from serve.service import Service
from serve.smoothing import SmoothingError
from serve.stage import DeadlineError, FullError, StageError, UnavailableError

logger = logging.getLogger("ray.serve")

IN_STREAM = {DeadlineError: 408, FullError: 429, StageError: 503, UnavailableError: 503}
"""Status in a stream's `error` event, by exception."""


class GenerateRoute:
    """All stages in one call; replies with JSON or a stream."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI, errors: Errors) -> None:
        """Register the route."""
        post = ["POST"]
        app.add_api_route(
            "/v1/generate", self.generate, methods=post, response_model=GenerateReply, responses=errors
        )

    async def generate(self, request: Request, body: GenerateRequest) -> Any:
        """Text, or chunks, to the predicted next text; with `length`, a continuation; with `stream`, as
        server-sent events `start`, `chunk`, then `done` (or `error`)."""
        begun = time.perf_counter()
        deadline = self._service.deadline(body.deadline_s)
        record = self._service.model(body.model or self._service.default_model)
        self._service.require_at_most("length", body.length, "max_rollout")
        self._service.require_at_most("neighbours", body.neighbours, "max_neighbours")
        self._service.require_steps(body.steps)
        if body.snap or body.neighbours:
            self._service.require_corpus("snap" if body.snap else "neighbours")
        if body.smooth and not self._service.smoother.configured:
            raise RefusedError(
                422, "smooth needs a chat endpoint, and none is set; start the service with --smoothing-url"
            )
        inputs = await self._inputs(body)
        options = ChunkOptions(
            record.name, deadline, body.fill, body.snap, body.steps, body.neighbours, body.cache
        )
        log(request, model=record.name, inputs=len(inputs), length=body.length)
        if body.stream:
            self._service.require_room(len(inputs))
            events = self._events(request, body, inputs, options, record, begun)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
            )
        with self._service.admitted(len(inputs)):
            try:
                results = await gather([self._continue(chunks, options, body) for chunks in inputs])
            except Exception as err:
                seconds = time.perf_counter() - begun
                self._service.window.add(Seen(seconds, not isinstance(err, DeadlineError | FullError)))
                raise
        for result in results:
            for generated in result.generated:
                self._see(generated, time.perf_counter() - begun)
        log(request, sources=[g.source for r in results for g in r.generated])
        return GenerateReply(
            request_id=request_id(request),
            model=record,
            codec=self._service.codec,
            results=results,
            milliseconds=ms_since(begun),
        )

    async def _continue(
        self, chunks: list[str], options: ChunkOptions, body: GenerateRequest
    ) -> GeneratedInput:
        generated: list[Generated] = []
        truncated = 0
        async for predicted in self._service.pipeline.continue_(chunks, options, body.length):
            truncated = truncated or predicted.truncated
            generated.append(await self._generated(predicted, options, body.smooth))
        return GeneratedInput(
            chunks=chunks, truncated=truncated, generated=generated, text=" ".join(g.text for g in generated)
        )

    async def _generated(self, predicted: PredictedChunk, options: ChunkOptions, smooth: bool) -> Generated:
        answer, context = predicted.answer, predicted.context
        text, smoothed_from, failed = answer.text, None, None
        if smooth:
            try:
                left = options.deadline - time.monotonic()
                text = await self._service.smoother.smooth(context.texts, answer.text, left)
                smoothed_from = answer.text
            except SmoothingError as err:
                failed = str(err)
        return Generated(
            text=text,
            cosine=round(answer.cosine, 6),
            **provenance(answer),
            snapped_cosine=round(predicted.prediction_cosine, 6),
            drifted=predicted.drifted,
            context=ContextReply(mode=context.mode, texts=list(context.texts), origins=list(context.origins)),
            cached=predicted.cached,
            neighbours=[neighbour(n) for n in predicted.neighbours],
            smoothed_from=smoothed_from,
            smoothing_error=failed,
            retries=predicted.retries,
            milliseconds=Milliseconds(**predicted.milliseconds),
        )

    async def _events(
        self,
        request: Request,
        body: GenerateRequest,
        inputs: list[list[str]],
        options: ChunkOptions,
        record: ModelRecord,
        begun: float,
    ) -> AsyncIterator[str]:
        """Server-sent events of all inputs, in the order in which chunks are ready."""
        queue: asyncio.Queue[tuple[int, int, Generated] | None] = asyncio.Queue()

        async def write(number: int, chunks: list[str]) -> None:
            place = 0
            async for predicted in self._service.pipeline.continue_(chunks, options, body.length):
                queue.put_nowait((number, place, await self._generated(predicted, options, body.smooth)))
                place += 1

        async def write_all() -> None:
            try:
                await gather([write(i, chunks) for i, chunks in enumerate(inputs)])
            finally:
                queue.put_nowait(None)

        opening = {
            "request_id": request_id(request),
            "model": record.model_dump(),
            "codec": self._service.codec.model_dump(),
            "inputs": [{"chunks": chunks} for chunks in inputs],
        }
        task: asyncio.Task[None] | None = None
        try:
            with self._service.admitted(len(inputs)):
                yield event("start", opening)
                task = asyncio.create_task(write_all())
                since = begun
                while (item := await queue.get()) is not None:
                    number, place, generated = item
                    self._see(generated, time.perf_counter() - since)
                    since = time.perf_counter()
                    yield event("chunk", {"input": number, "place": place, **generated.model_dump()})
                await task
            yield event("done", {"milliseconds": ms_since(begun)})
        except Exception as err:  # the status line is already sent, so the error goes into the stream
            self._service.note(err, request, time.perf_counter() - begun)
            status = next((s for kind, s in IN_STREAM.items() if isinstance(err, kind)), 500)
            message = str(err)
            if status == 500:
                logger.exception("a stream failed", extra={"log_fields": {"request_id": request_id(request)}})
                message = OUR_FAULT.format(request_id(request))
            yield event("error", error_body(status, message, request_id(request)))
        finally:
            if task is not None:
                task.cancel()  # the client may have disconnected

    def _see(self, generated: Generated, seconds: float) -> None:
        quality = judge(generated.text, generated.refusals, generated.context.texts)
        self._service.window.add(Seen(seconds, False, quality.gibberish, quality.keyword_hit))

    async def _inputs(self, body: GenerateRequest) -> list[list[str]]:
        """The chunks of each input, validated."""
        self._service.require_one(text=body.text, chunks=body.chunks)
        if body.text is not None:
            texts = self._service.texts(body.text, "text")
            cut = await self._service.cut(texts)
            if [] in cut:
                raise RefusedError(422, f"text[{cut.index([])}] holds only white space; expected words")
            inputs = [[c.text for c in chunks] for chunks in cut]
        else:
            chunks_or_lists: Sequence[Any] = body.chunks or []
            if not chunks_or_lists:
                raise RefusedError(422, "chunks is empty; expected at least one text")
            many = isinstance(chunks_or_lists[0], list)
            inputs = [list(c) for c in chunks_or_lists] if many else [list(chunks_or_lists)]
            self._service.require_at_most("chunks", len(inputs), "max_texts", "lists")
            for i, chunks in enumerate(inputs):
                name = f"chunks[{i}]" if many else "chunks"
                if not chunks:
                    raise RefusedError(422, f"{name} is empty; expected at least one text")
                self._service.require_at_most(name, len(chunks), "max_chunks", "chunks")
                self._service.require_words(chunks, name)
        for i, chunks in enumerate(inputs):
            self._service.require_at_most(f"input {i}", len(chunks), "max_chunks", "chunks")
        return inputs


async def gather(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results in order; the first failure cancels the others and is raised."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
