"""The service: text to text over HTTP. `build(args)` makes the application, whoever runs it.

    latent serve --run out/demo                              on this machine
    serve run serve.app:build run=out/demo                   the same, by Ray's own command
    serve deploy serve/config.yaml                           on a cluster

One gateway (here) answers HTTP and sends rows to encoder, predictor, retriever and decoder. Importing this
module starts nothing.
"""

import asyncio
import hashlib
import json
import logging
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import Chunk, Chunker, chunk_id
from lvm.corpus.readers import Article
from lvm.errors import InputError
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH
from lvm.vectors.shards import write_bytes
from lvm.vectors.tmd import all_labels, nearest
from serve.breaker import Breaker
from serve.decoder import Decoder
from serve.door import Listener
from serve.encoder import Encoder
from serve.guard import LOOPBACK, Guard, error_body, read_keys
from serve.health import TARGETS, Seen, Window
from serve.metrics import GatewayMetrics
from serve.pipeline import Clock, Pipeline, Said, Wish, judge
from serve.predictor import Predictor
from serve.retriever import CorpusChunk, NearRow, Retriever
from serve.schema import (
    ChunkItem,
    ChunkReply,
    ChunkRequest,
    CodecRecord,
    ContextReply,
    DecodeReply,
    DecodeRequest,
    Embedding,
    EmbeddingsReply,
    EmbeddingsRequest,
    EncodeReply,
    EncodeRequest,
    ErrorReply,
    Generated,
    GeneratedInput,
    GenerateReply,
    GenerateRequest,
    HealthReply,
    IngestChunk,
    IngestReply,
    IngestRequest,
    Milliseconds,
    ModelRecord,
    ModelsReply,
    Neighbour,
    PredictReply,
    PredictRequest,
    RefusedError,
    SearchReply,
    SearchRequest,
    TmdCode,
    TmdReply,
    TmdRequest,
    Usage,
    came_about,
    decoded_text,
    pack,
    unpack,
)
from serve.settings import Scale, ServeArgs, require_run
from serve.smoothing import Smoother, SmoothingError
from serve.stage import Call, DeadlineError, FullError, Stage, StageError, UnavailableError

logger = logging.getLogger("ray.serve")

WEB = Path(__file__).parent / "web"

SUBSCRIBERS = {"jxe": "gtr-jxe", "ielab": "gtr-ielab"}
"""The original's names of codecs."""

LOST = (RayActorError, DeploymentUnavailableError)
"""The call did not come back; every operation is a function of its input, so it may be sent again."""

IN_STREAM = {DeadlineError: 408, FullError: 429, StageError: 503, UnavailableError: 503}
"""What the reply's status would have been, told in the stream's last event."""

OUR_FAULT = "the service failed, which is its fault; its log has request {}"

DESCRIPTION = """Documents to vectors, a model that predicts the next vector, and the vector back to text.

`POST /v1/generate` does all of it; the others are its stages. Errors have the form
`{"error": {"message", "type", "code", "request_id"}}`; the message says what was expected, what came and what to do.
"""


@serve.deployment
@serve.ingress()
class Gateway:
    """Answers HTTP."""

    async def __init__(
        self,
        args: ServeArgs,
        models: dict[str, str],
        encoder: DeploymentHandle | None,
        predictor: DeploymentHandle | None,
        retriever: DeploymentHandle | None,
        decoder: DeploymentHandle,
    ) -> None:
        """models: alias to record folder. What has no handle runs here, `ServeArgs.inline`. Raises InputError where the
        service would be open to a network without a key."""
        self._args, self._limits = args, args.limits
        self._keys = [*args.api_keys_sha256, *(read_keys(args.api_keys_file) if args.api_keys_file else [])]
        require_key_unless_loopback(self._keys, _http_host())
        self.metrics = GatewayMetrics()
        self._window = Window()
        self._pending = 0
        self._replicas: dict[str, int] = {}
        self._replicas_at = 0.0
        if args.inline:
            import torch

            torch.set_num_threads(1)  # the decoder has the other core
        parts: dict[str, Any] = {
            "encoder": encoder or Encoder.func_or_class(args),
            "predictor": predictor or Predictor.func_or_class(args, models),
            "retriever": retriever or Retriever.func_or_class(args),
            "decoder": decoder,
        }
        described = {
            name: await (part.describe.remote() if isinstance(part, DeploymentHandle) else part.describe())
            for name, part in parts.items()
        }
        self._identity = CodecIdentity.from_dict(described["encoder"])
        self._decoder, self._corpus = described["decoder"], described["retriever"]
        for name, record in (("decoder", self._decoder["codec"]), ("retriever", self._corpus["codec"])):
            require_same_codec(self._identity, CodecIdentity.from_dict(record), "the encoder", f"the {name}")
        self._codec = CodecRecord(**self._identity.to_dict())
        self._models = {alias: _model_record(alias, r) for alias, r in described["predictor"].items()}
        self._models[PASSTHROUGH] = ModelRecord(
            name=PASSTHROUGH,
            folder=PASSTHROUGH,
            architecture=PASSTHROUGH,
            parameters=0,
            created="",
            codec=self._identity.digest,
        )
        self._default = args.default_model or ("lstm" if "lstm" in self._models else next(iter(self._models)))
        self._record(self._default)
        name = args.codec or require_run(args.run).identity.name
        self._chunker = Chunker(load_tokenizer(name, args.codec_path))
        self._chunking = asyncio.Lock()
        self._smoother = Smoother(args.smoothing)

        def stage(name: str, part: str, method: str, max_rows: int, max_calls: int = args.max_calls) -> Stage:
            where = parts[part]
            call = _call(where, method) if isinstance(where, DeploymentHandle) else getattr(where, method)
            return Stage(name, call, LOST, max_calls, max_rows, self.metrics.measure_call)

        self._pipeline = Pipeline(
            self._identity,
            stage("encode", "encoder", "run", args.queue_rows * CONTEXT_CHUNKS),
            stage("context", "retriever", "fill", args.queue_rows),
            stage("predict", "predictor", "run", args.queue_rows),
            stage("snap", "retriever", "snap", args.queue_rows),
            stage("search", "retriever", "near", args.queue_rows),
            stage("decode", "decoder", "run", args.queue_rows, max_calls=args.queue_rows),
            Breaker(args.breaker),
            self.metrics,
            args.cache_entries,
            args.decode_patience_s,
            dict(models),
        )

    def __serve_build_asgi_app__(self) -> Any:
        """The routes, behind the guard."""
        app = FastAPI(
            title="Latent vector models",
            version="1",
            description=DESCRIPTION,
            docs_url=None,  # its page loads scripts from a CDN; /openapi.json serves any viewer
            redoc_url=None,
            lifespan=self._listening,
        )
        errors: dict[int | str, dict[str, Any]] = {
            status: {"model": ErrorReply} for status in (400, 401, 404, 408, 413, 422, 429, 503)
        }
        for path, handler, reply in (
            ("/v1/generate", self.generate, GenerateReply),
            ("/v1/chunk", self.chunk, ChunkReply),
            ("/v1/encode", self.encode, EncodeReply),
            ("/v1/embeddings", self.embeddings, EmbeddingsReply),
            ("/v1/predict", self.predict, PredictReply),
            ("/v1/decode", self.decode, DecodeReply),
            ("/v1/search", self.search, SearchReply),
            ("/v1/tmd", self.tmd, TmdReply),
            ("/v1/ingest", self.ingest, IngestReply),
        ):
            app.add_api_route(path, handler, methods=["POST"], response_model=reply, responses=errors)
        app.add_api_route("/v1/models", self.list_models, response_model=ModelsReply, responses=errors)
        app.add_api_route(
            "/health", self.health, response_model=HealthReply, responses={503: {"model": HealthReply}}
        )
        app.add_api_route("/metrics", self.prometheus, response_class=PlainTextResponse, responses=errors)
        for path, file in (("/", "index.html"), ("/style.css", "style.css"), ("/page.js", "page.js")):
            app.add_api_route(path, _page(file), include_in_schema=False)
        for kind, handle in (
            (RefusedError, self._refused),
            (RequestValidationError, self._invalid),
            (HTTPException, self._http_error),
            (InputError, self._input_error),
            (DeadlineError, self._late),
            (FullError, self._full),
            (UnavailableError, self._unavailable),
            (StageError, self._broken),
            (Exception, self._broken),
        ):
            app.add_exception_handler(kind, handle)
        self._guarded = Guard(app, self._limits, self._keys, self.metrics)
        return self._guarded

    @asynccontextmanager
    async def _listening(self, _: FastAPI) -> AsyncIterator[None]:
        """While the replica lives: its socket for the launcher of this machine, where there is one."""
        if not self._args.sockets:
            yield
            return
        async with Listener(self._guarded, self._args.sockets).serving(self._limits.max_deadline_s):
            yield

    # ---------------------------------------------------------------------------------------------- generate

    async def generate(self, request: Request, body: GenerateRequest) -> Any:
        """Text, or chunks, to the predicted next text; with `length`, a continuation; with `stream`, as
        server-sent events `chunk`, then `done` (or `error`)."""
        begun = time.perf_counter()
        deadline = self._deadline(body.deadline_s)
        record = self._record(body.model or self._default)
        self._limit("length", body.length, "max_rollout", self._limits.max_rollout)
        self._limit("neighbours", body.neighbours, "max_neighbours", self._limits.max_neighbours)
        self._check_steps(body.steps)
        if body.smooth and not self._smoother.configured:
            raise RefusedError(
                422,
                "smooth is true but no chat endpoint is configured; start the service with --smoothing-url",
            )
        inputs = await self._inputs(body)
        wish = Wish(record.name, deadline, body.fill, body.snap, body.steps, body.neighbours, body.cache)
        _log(request, model=record.name, inputs=len(inputs), length=body.length)
        if body.stream:
            self._require_room(len(inputs))
            events = self._events(request, body, inputs, wish, record, begun)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
            )
        with self._admitted(len(inputs)):
            try:
                results = await _gather([self._continue(chunks, wish, body) for chunks in inputs])
            except Exception as err:
                self._window.add(
                    Seen(time.perf_counter() - begun, not isinstance(err, DeadlineError | FullError))
                )
                raise
        for result in results:
            for generated in result.generated:
                self._see(generated, time.perf_counter() - begun)
        _log(request, sources=[g.source for r in results for g in r.generated])
        return GenerateReply(
            request_id=_request_id(request),
            model=record,
            codec=self._codec,
            results=results,
            milliseconds=_ms(begun),
        )

    async def _continue(self, chunks: list[str], wish: Wish, body: GenerateRequest) -> GeneratedInput:
        generated: list[Generated] = []
        truncated = 0
        async for said in self._pipeline.continue_(chunks, wish, body.length):
            truncated = truncated or said.truncated
            generated.append(await self._generated(said, wish, body.smooth))
        return GeneratedInput(
            chunks=chunks,
            truncated=truncated,
            generated=generated,
            text=" ".join(g.text for g in generated),
        )

    async def _generated(self, said: Said, wish: Wish, smooth: bool) -> Generated:
        answer, context = said.answer, said.context
        text, smoothed_from, failed = answer.text, None, None
        if smooth:
            try:
                left = wish.deadline - time.monotonic()
                text = await self._smoother.smooth(context.texts, answer.text, left)
                smoothed_from = answer.text
            except SmoothingError as err:
                failed = str(err)
        return Generated(
            text=text,
            cosine=round(answer.cosine, 6),
            **came_about(answer),
            snapped_cosine=round(said.prediction_cosine, 6),
            drifted=said.drifted,
            context=ContextReply(mode=context.mode, texts=list(context.texts), origins=list(context.origins)),
            cached=said.cached,
            neighbours=[_neighbour(n) for n in said.neighbours],
            smoothed_from=smoothed_from,
            smoothing_error=failed,
            retries=said.retries,
            milliseconds=Milliseconds(**said.milliseconds),
        )

    async def _events(
        self,
        request: Request,
        body: GenerateRequest,
        inputs: list[list[str]],
        wish: Wish,
        record: ModelRecord,
        begun: float,
    ) -> AsyncIterator[str]:
        """Server-sent events of all inputs, as they come."""
        queue: asyncio.Queue[tuple[int, int, Generated] | None] = asyncio.Queue()

        async def write(number: int, chunks: list[str]) -> None:
            place = 0
            async for said in self._pipeline.continue_(chunks, wish, body.length):
                queue.put_nowait((number, place, await self._generated(said, wish, body.smooth)))
                place += 1

        async def write_all() -> None:
            try:
                await _gather([write(i, chunks) for i, chunks in enumerate(inputs)])
            finally:
                queue.put_nowait(None)

        opening = {
            "request_id": _request_id(request),
            "model": record.model_dump(),
            "codec": self._codec.model_dump(),
            "inputs": [{"chunks": chunks} for chunks in inputs],
        }
        task: asyncio.Task[None] | None = None
        try:
            with self._admitted(len(inputs)):
                yield _event("start", opening)
                task = asyncio.create_task(write_all())
                since = begun
                while (item := await queue.get()) is not None:
                    number, place, generated = item
                    self._see(generated, time.perf_counter() - since)
                    since = time.perf_counter()
                    yield _event("chunk", {"input": number, "place": place, **generated.model_dump()})
                await task
            yield _event("done", {"milliseconds": _ms(begun)})
        except Exception as err:  # the status line has been sent: all that is left is to say it in the stream
            self._note(err, request, time.perf_counter() - begun)
            status, message = (
                next((s for kind, s in IN_STREAM.items() if isinstance(err, kind)), 500),
                str(err),
            )
            if status == 500:
                logger.exception(
                    "a stream failed", extra={"log_fields": {"request_id": _request_id(request)}}
                )
                message = OUR_FAULT.format(_request_id(request))
            yield _event("error", error_body(status, message, _request_id(request)))
        finally:
            if task is not None:
                task.cancel()  # the reader may have gone: what nobody reads is not computed

    def _note(self, err: Exception, request: Request, seconds: float | None = None) -> None:
        """Count a request that got no answer. seconds: where it asked for text, what it took."""
        if isinstance(err, DeadlineError):
            self.metrics.deadline.inc(1, {"route": request.scope["route"].path})
        elif isinstance(err, FullError):
            self.metrics.refused.inc(1, {"reason": "full"})
        if seconds is not None:
            self._window.add(Seen(seconds, not isinstance(err, DeadlineError | FullError)))

    def _see(self, generated: Generated, seconds: float) -> None:
        quality = judge(generated.text, generated.refusals, generated.context.texts)
        self._window.add(Seen(seconds, False, quality.gibberish, quality.keyword_hit))

    async def _inputs(self, body: GenerateRequest) -> list[list[str]]:
        """The chunk lists of a request, checked."""
        if (body.text is None) == (body.chunks is None):
            raise RefusedError(
                422, "expected either text or chunks, got " + ("neither" if body.text is None else "both")
            )
        if body.text is not None:
            texts = self._texts(body.text, "text")
            cut = await self._cut(texts)
            for i, chunks in enumerate(cut):
                if not chunks:
                    raise RefusedError(422, f"text[{i}] holds only white space; expected words")
            inputs = [[c.text for c in chunks] for chunks in cut]
        else:
            chunks_or_lists: Sequence[Any] = body.chunks or []
            if not chunks_or_lists:
                raise RefusedError(422, "chunks is empty; expected at least one text")
            many = isinstance(chunks_or_lists[0], list)
            inputs = [list(c) for c in chunks_or_lists] if many else [list(chunks_or_lists)]
            self._limit("chunks", len(inputs), "max_texts", self._limits.max_texts, "lists")
            for i, chunks in enumerate(inputs):
                name = f"chunks[{i}]" if many else "chunks"
                if not chunks:
                    raise RefusedError(422, f"{name} is empty; expected at least one text")
                self._limit(name, len(chunks), "max_chunks", self._limits.max_chunks, "chunks")
                self._check_texts(chunks, name)
        for i, chunks in enumerate(inputs):
            self._limit(f"input {i}", len(chunks), "max_chunks", self._limits.max_chunks, "chunks")
        return inputs

    # ------------------------------------------------------------------------------------------------ stages

    async def chunk(self, request: Request, body: ChunkRequest) -> ChunkReply:
        """Texts to chunks within the codec's limit."""
        begun = time.perf_counter()
        texts = self._texts(body.text, "text")
        with self._admitted(len(texts)):
            cut = await self._cut(texts)
        results = [
            [ChunkItem(position=c.position, text=c.text, num_tokens=c.num_tokens) for c in cs] for cs in cut
        ]
        return ChunkReply(
            request_id=_request_id(request), codec=self._codec, results=results, milliseconds=_ms(begun)
        )

    async def encode(self, request: Request, body: EncodeRequest) -> EncodeReply:
        """Texts to unit vectors."""
        clock = Clock()
        texts = self._texts(body.texts, "texts")
        with self._admitted(len(texts)):
            encoded, timing = await self._pipeline.encode(texts, self._deadline(body.deadline_s), body.cache)
        clock.add("encode", timing)
        return EncodeReply(
            request_id=_request_id(request),
            codec=self._codec,
            vectors=[pack(e.vector, body.encoding_format) for e in encoded],
            num_tokens=[e.num_tokens for e in encoded],
            truncated=[e.truncated for e in encoded],
            cached=[e.cached for e in encoded],
            milliseconds=Milliseconds(**clock.finish()),
        )

    async def embeddings(self, request: Request, body: EmbeddingsRequest) -> EmbeddingsReply:
        """Texts to vectors in OpenAI's form; `model` is the codec's name."""
        clock = Clock()
        self._check_codec(body.model, "model")
        if body.dimensions not in (None, self._identity.dim):
            raise RefusedError(
                422, f"dimensions is {body.dimensions}; this codec has {self._identity.dim}, or leave it out"
            )
        texts = self._texts(body.input, "input")
        with self._admitted(len(texts)):
            encoded, timing = await self._pipeline.encode(texts, self._deadline(None))
        clock.add("encode", timing)
        tokens = sum(min(e.num_tokens, self._identity.max_tokens) for e in encoded)
        return EmbeddingsReply(
            data=[
                Embedding(index=i, embedding=pack(e.vector, body.encoding_format))
                for i, e in enumerate(encoded)
            ],
            model=self._identity.name,
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
            request_id=_request_id(request),
            codec=self._codec,
            milliseconds=Milliseconds(**clock.finish()),
        )

    async def predict(self, request: Request, body: PredictRequest) -> PredictReply:
        """Context vectors to the next vector."""
        clock = Clock()
        record = self._record(body.model or self._default)
        if (body.vectors is None) == (body.contexts is None):
            got = "neither" if body.vectors is None else "both"
            raise RefusedError(422, f"expected either vectors (one context) or contexts, got {got}")
        given = [body.vectors] if body.vectors is not None else body.contexts or []
        if not given:
            raise RefusedError(422, "contexts is empty; expected at least one list of vectors")
        self._limit("contexts", len(given), "max_vectors", self._limits.max_vectors)
        contexts = []
        for i, vectors in enumerate(given):
            name = "vectors" if body.vectors is not None else f"contexts[{i}]"
            if not vectors:
                raise RefusedError(422, f"{name} is empty; expected at least one vector")
            self._limit(name, len(vectors), "max_context", self._limits.max_context, "vectors")
            contexts.append(unpack(vectors, self._identity.dim, name))
        with self._admitted(len(contexts)):
            predicted, timing = await self._pipeline.predict(
                contexts, record.name, self._deadline(body.deadline_s)
            )
        clock.add("predict", timing)
        return PredictReply(
            request_id=_request_id(request),
            model=record,
            codec=self._codec,
            vectors=[pack(p.vector, body.encoding_format) for p in predicted],
            milliseconds=Milliseconds(**clock.finish()),
        )

    async def decode(self, request: Request, body: DecodeRequest) -> DecodeReply:
        """Vectors to text."""
        clock = Clock()
        for name in _names(body.codec), _names(body.subscribers):
            for codec in name:
                self._check_codec(codec, "codec")
        self._check_steps(body.steps)
        if not body.vectors:
            raise RefusedError(422, "vectors is empty; expected at least one")
        self._limit("vectors", len(body.vectors), "max_vectors", self._limits.max_vectors)
        vectors = unpack(body.vectors, self._identity.dim, "vectors")
        with self._admitted(len(vectors)):
            answers, timing = await self._pipeline.decode(
                vectors,
                self._deadline(body.deadline_s),
                body.steps,
                body.cache,
                corpus=body.steps is None,
            )
        clock.add("decode", timing)
        return DecodeReply(
            request_id=_request_id(request),
            codec=self._codec,
            results=[decoded_text(a) for a in answers],
            milliseconds=Milliseconds(**clock.finish()),
        )

    async def search(self, request: Request, body: SearchRequest) -> SearchReply:
        """Texts or vectors to the nearest chunks of the corpus."""
        clock = Clock()
        deadline = self._deadline(body.deadline_s)
        if (body.query is None) == (body.vectors is None):
            raise RefusedError(
                422, "expected either query or vectors, got " + ("neither" if body.query is None else "both")
            )
        self._limit("k", body.k, "max_neighbours", self._limits.max_neighbours)
        if body.query is not None:
            texts = self._texts(body.query, "query")
            with self._admitted(len(texts)):
                encoded, timing = await self._pipeline.encode(texts, deadline)
            clock.add("encode", timing)
            queries = np.stack([e.vector for e in encoded])
        else:
            if not body.vectors:
                raise RefusedError(422, "vectors is empty; expected at least one")
            self._limit("vectors", len(body.vectors), "max_vectors", self._limits.max_vectors)
            queries = unpack(body.vectors, self._identity.dim, "vectors")
        with self._admitted(len(queries)):
            found, timing = await self._pipeline.finder.run([NearRow(q, body.k) for q in queries], deadline)
        clock.add("snap", timing)
        return SearchReply(
            request_id=_request_id(request),
            codec=self._codec,
            results=[[_neighbour(c) for c in chunks] for chunks in found],
            milliseconds=Milliseconds(**clock.finish()),
        )

    async def tmd(self, request: Request, body: TmdRequest) -> TmdReply:
        """Texts to domain, task and modifier."""
        clock = Clock()
        texts = self._texts(body.texts, "texts")
        with self._admitted(len(texts)):
            codes = await self._codes(texts, self._deadline(body.deadline_s), clock)
        return TmdReply(
            request_id=_request_id(request),
            codec=self._codec,
            results=codes,
            milliseconds=Milliseconds(**clock.finish()),
        )

    async def _codes(self, texts: Sequence[str], deadline: float, clock: Clock) -> list[TmdCode]:
        labels, _ = await self._pipeline.encode(all_labels(), deadline)
        encoded, timing = await self._pipeline.encode(texts, deadline)
        clock.add("encode", timing)
        found = nearest(np.stack([e.vector for e in encoded]), np.stack([e.vector for e in labels]))
        return [
            TmdCode(
                code=tmd.code,
                domain=tmd.names[0],
                task=tmd.names[1],
                modifier=tmd.names[2],
                cosines=[round(c, 6) for c in cosines],
                features=[int(f) for f in tmd.features()],
            )
            for tmd, cosines in found
        ]

    async def ingest(self, request: Request, body: IngestRequest) -> IngestReply:
        """Articles into the inbox, cut and coded. `latent run --input INBOX` takes them into a corpus; what is
        served now does not change."""
        clock = Clock()
        deadline = self._deadline(body.deadline_s)
        if not self._args.inbox:
            raise RefusedError(422, "no inbox is configured; start the service with --inbox DIR")
        if not body.articles:
            raise RefusedError(422, "articles is empty; expected at least one")
        self._limit("articles", len(body.articles), "max_texts", self._limits.max_texts)
        for i, given in enumerate(body.articles):
            self._check_texts([given.text], f"articles[{i}].text")
            self._check_texts([given.id, given.title, given.source], f"articles[{i}]", empty=True)
        with self._admitted(len(body.articles)):
            cut = await self._cut([a.text for a in body.articles])
            for i, chunks in enumerate(cut):
                self._limit(f"articles[{i}]", len(chunks), "max_chunks", self._limits.max_chunks, "chunks")
            codes = await self._codes([c.text for chunks in cut for c in chunks], deadline, clock)
            lines = "".join(a.model_dump_json() + "\n" for a in body.articles).encode()
            file = f"ingest-{hashlib.sha256(lines).hexdigest()[:16]}.jsonl"
            await asyncio.to_thread(write_bytes, Path(self._args.inbox) / file, lines)
        coded = iter(codes)
        results = [
            [
                IngestChunk(
                    chunk_id=chunk_id(file, article.id, c.position),  # as `latent run` will name it
                    position=c.position,
                    text=c.text,
                    num_tokens=c.num_tokens,
                    tmd=next(coded),
                )
                for c in chunks
            ]
            for article, chunks in zip(body.articles, cut, strict=True)
        ]
        return IngestReply(
            request_id=_request_id(request),
            codec=self._codec,
            file=file,
            results=results,
            milliseconds=Milliseconds(**clock.finish()),
        )

    # --------------------------------------------------------------------------------------- about the service

    async def list_models(self) -> ModelsReply:
        """What is loaded: models, codec, decoder, corpus, and the limits of a request."""
        models = list(self._models.values())
        names = [*self._models, self._identity.name]
        return ModelsReply(
            data=[{"id": name, "object": "model", "created": 0, "owned_by": "latent"} for name in names],
            models=models,
            default_model=self._default,
            codec=self._codec,
            decoder={k: v for k, v in self._decoder.items() if k != "codec"},
            corpus={k: v for k, v in self._corpus.items() if k != "codec"},
            limits=self._limits.model_dump(),
            smoothing=self._smoother.configured,
        )

    async def health(self, response: Response) -> HealthReply:
        """Ready, degraded (and which target is missed), or not ready (503)."""
        replicas = await self._running_replicas()
        lacking = [name for name, count in replicas.items() if count == 0]
        missed = self._window.missed()
        if self._pipeline.breaker.open:
            missed.append(self._pipeline.breaker.reason)
        # Without a decoder or a predictor-less passthrough the service still answers, from the corpus.
        if [name for name in lacking if name != "Decoder"]:
            status, response.status_code = "not ready", 503
        else:
            status = "degraded" if missed or lacking else "ready"
        return HealthReply(
            status=status,
            reasons=[*(f"no replica of {name} runs" for name in lacking), *missed],
            targets=TARGETS,
            figures=self._window.figures(),
            breaker={
                "open": self._pipeline.breaker.open,
                "times_opened": self._pipeline.breaker.times_opened,
            },
            replicas=replicas,
            pending=self._pending,
        )

    async def _running_replicas(self) -> dict[str, int]:
        if time.monotonic() - self._replicas_at > 1.0:
            self._replicas_at = time.monotonic()
            app = serve.get_replica_context().app_name
            status = await asyncio.to_thread(serve.status)
            self._replicas = {
                name: sum(n for state, n in d.replica_states.items() if state == "RUNNING")
                for name, d in status.applications[app].deployments.items()
            }
        return self._replicas

    async def prometheus(self) -> PlainTextResponse:
        """This node's metrics of the service, as Ray's agent exports them; for a cluster, scrape the agents."""
        try:
            text = await asyncio.to_thread(_node_metrics)
        except OSError as err:
            raise RefusedError(
                503, f"Ray's metrics agent does not answer ({err}); try again later", 5
            ) from err
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # ------------------------------------------------------------------------------------------------- checks

    def _record(self, name: str) -> ModelRecord:
        for alias, record in self._models.items():
            if name in (alias, record.folder):
                return self._models[alias]
        raise RefusedError(404, f"no model {name!r} is loaded; there are: {', '.join(self._models)}")

    def _check_codec(self, name: str, what: str) -> None:
        loaded = {self._identity.name, self._identity.digest}
        if SUBSCRIBERS.get(name, name) not in loaded:
            raise RefusedError(
                404,
                f"{what} {name!r} is not loaded; there is: {self._identity}. Vectors of one codec cannot be read "
                "by another's decoder",
            )

    def _check_steps(self, steps: int | None) -> None:
        if steps is None:
            return
        self._limit("steps", steps, "max_steps", self._limits.max_steps)
        able = self._decoder["steps"]
        if able is not None and steps not in able:
            raise RefusedError(
                422,
                f"codec {self._identity.name} takes steps {', '.join(map(str, able))}, got {steps}; or leave it out",
            )

    def _deadline(self, seconds: float | None) -> float:
        if seconds is not None:
            self._limit("deadline_s", seconds, "max_deadline_s", self._limits.max_deadline_s)
        return time.monotonic() + (seconds or self._limits.default_deadline_s)

    def _limit(self, what: str, value: float, limit: str, most: float, unit: str = "") -> None:
        if not value <= most:
            raise RefusedError(
                422,
                f"{what} is {value:g}{' ' + unit if unit else ''}, limit {limit} is {most:g}; ask for less",
            )

    def _texts(self, texts: str | list[str], what: str) -> list[str]:
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise RefusedError(422, f"{what} is empty; expected at least one text")
        self._limit(what, len(listed), "max_texts", self._limits.max_texts, "texts")
        self._check_texts(listed, what)
        return listed

    def _check_texts(self, texts: Sequence[str], what: str, empty: bool = False) -> None:
        for i, text in enumerate(texts):
            self._limit(
                f"{what}[{i}]", len(text), "max_characters", self._limits.max_characters, "characters"
            )
            try:
                text.encode()
            except UnicodeEncodeError as err:  # JSON can say half a surrogate pair; UTF-8 cannot
                raise RefusedError(
                    422,
                    f"{what}[{i}] holds half a surrogate pair at character {err.start}; send whole characters",
                ) from err
            if not empty and not text.strip():
                raise RefusedError(422, f"{what}[{i}] holds only white space; expected words")

    async def _cut(self, texts: Sequence[str]) -> list[list[Chunk]]:
        articles = [Article(str(i), "", text, "request") for i, text in enumerate(texts)]
        async with self._chunking:  # the chunker's memory of words is not made for two threads
            if sum(map(len, texts)) < 4000:
                return self._chunker.chunk(articles)  # under a millisecond: a thread would cost more
            return await asyncio.to_thread(self._chunker.chunk, articles)

    def _require_room(self, inputs: int) -> None:
        if self._pending + inputs > self._limits.max_pending:
            raise FullError(
                f"{self._pending} inputs are at work and {inputs} more would pass limit max_pending, "
                f"{self._limits.max_pending}; try again after the time in Retry-After"
            )

    @contextmanager
    def _admitted(self, inputs: int) -> Iterator[None]:
        """Counts inputs as at work; raises FullError where they are too many."""
        self._require_room(inputs)
        self._pending += inputs
        self.metrics.pending.set(self._pending)
        try:
            yield
        finally:
            self._pending -= inputs
            self.metrics.pending.set(self._pending)

    # ------------------------------------------------------------------------------------------------- errors

    async def _refused(self, request: Request, err: Exception) -> Response:
        assert isinstance(err, RefusedError)
        return _error(request, err.status, str(err), err.retry_after_s)

    async def _invalid(self, request: Request, err: Exception) -> Response:
        assert isinstance(err, RequestValidationError)
        first = err.errors()[0]
        # Not the input itself: it may be large, secret, or hold a NaN that no JSON can say.
        place = ".".join(str(p) for p in first["loc"] if p != "body") or "body"
        return _error(request, 422, f"{place}: {first['msg']} ({len(err.errors())} such); see /openapi.json")

    async def _http_error(self, request: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)
        message = str(err.detail)
        if err.status_code == 404:
            message = f"no route {request.method} {request.url.path[:100]}; /openapi.json lists them"
        elif err.status_code == 400:  # FastAPI's word for a body that Python's JSON reader gave up on
            message = "the body is no JSON this service can read; send an object as /openapi.json shows"
        return _error(request, err.status_code, message)

    async def _input_error(self, request: Request, err: Exception) -> Response:
        return _error(request, 422, str(err))

    async def _late(self, request: Request, err: Exception) -> Response:
        self._note(err, request)
        return _error(request, 408, f"{err}; ask for less at once, or name a longer deadline_s")

    async def _full(self, request: Request, err: Exception) -> Response:
        assert isinstance(err, FullError)
        self._note(err, request)
        return _error(request, 429, str(err), err.retry_after_s)

    async def _unavailable(self, request: Request, err: Exception) -> Response:
        return _error(request, 503, str(err), 5)

    async def _broken(self, request: Request, err: Exception) -> Response:
        return _error(request, 500, OUR_FAULT.format(_request_id(request)))


def build(args: ServeArgs) -> serve.Application:
    """The application. Raises InputError where the run folder is not whole or a model is not there.

    Reads which folder each model alias points to now: build again to roll out a newer one.
    """
    run = str(Path(args.run).absolute())
    inbox = args.inbox and str(Path(args.inbox).absolute())
    args = args.model_copy(update={"run": run, "inbox": inbox})
    require_run(run)
    models = _aliases(Path(run) / "models")

    def scaled(deployment: Any, scale: Scale, max_ongoing: int) -> Any:
        return deployment.options(
            max_ongoing_requests=max_ongoing,
            autoscaling_config={
                "min_replicas": scale.min_replicas,
                "max_replicas": scale.max_replicas,
                "target_ongoing_requests": scale.target_ongoing_requests,
                "upscale_delay_s": scale.upscale_delay_s,
                "downscale_delay_s": scale.downscale_delay_s,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 3.0,
            },
            ray_actor_options={
                "num_cpus": scale.num_cpus,
                "num_gpus": scale.num_gpus,
                "resources": scale.resources,
                "runtime_env": {
                    "env_vars": {"OMP_NUM_THREADS": str(scale.num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
                },
            },
            health_check_period_s=2.0,
            health_check_timeout_s=20.0,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=10.0,
            max_surge_percent=100,  # a new version's replica is ready before the old one's stops
        )

    calls = args.max_calls

    def apart(name: str, deployment: Any, scale: Scale, max_ongoing: int, *given: Any) -> Any:
        return None if name in args.inline else scaled(deployment, scale, max_ongoing).bind(args, *given)

    return (
        scaled(Gateway, args.gateway, 4 * args.limits.max_pending)
        .options(
            max_queued_requests=args.limits.max_pending,
            backpressure_config={"status_code": 429, "retry_after_s": 1},
        )
        .bind(  # type: ignore[no-any-return]
            args,
            models,
            apart("encoder", Encoder, args.encoder, calls),
            apart("predictor", Predictor, args.predictor, calls, models),
            apart("retriever", Retriever, args.retriever, 3 * calls),
            scaled(Decoder, args.decoder, 2 * args.queue_rows).bind(args),
        )
    )


def require_key_unless_loopback(key_hashes: Sequence[str], host: str) -> None:
    """Return where `host` is loopback or there is a key; else raise InputError."""
    if host not in LOOPBACK and not key_hashes:
        raise InputError(
            f"the service would listen on {host} without an API key; set LATENT_API_KEYS or --api-keys-file, or "
            "listen on 127.0.0.1"
        )


# ------------------------------------------------------------------------------------------------------ details


def _aliases(models: Path) -> dict[str, str]:
    path = models / "aliases.json"
    if not path.is_file():
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as err:
        raise InputError(f"{path} cannot be read ({err}); expected JSON written by `latent train`") from err


def _http_host() -> str:
    """Address the HTTP proxies of this cluster listen on."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host or "127.0.0.1")


def _call(handle: DeploymentHandle, method: str) -> Call:
    caller = handle.options(method_name=method)

    async def call(rows: list[Any], remaining_s: list[float]) -> Any:
        try:
            return await caller.remote(rows, remaining_s)
        except BackPressureError as err:
            raise FullError(f"the queue of {method} is full; try again later") from err
        except RayTaskError as err:
            raise StageError(str(err).strip().splitlines()[-1]) from err

    return call


def _model_record(alias: str, described: dict[str, Any]) -> ModelRecord:
    config, metrics = described["config"], described["metrics"]
    cosine = metrics.get("val_cosine")
    return ModelRecord(
        name=alias,
        folder=described["folder"],
        architecture=config["model"],
        parameters=int(config.get("parameters", 0)),
        created=str(config.get("created", "")),
        val_cosine=float(cosine) if isinstance(cosine, int | float) and np.isfinite(cosine) else None,
        codec=config["codec"]["digest"],
    )


def _neighbour(chunk: CorpusChunk) -> Neighbour:
    return Neighbour(
        text=chunk.text,
        title=chunk.title,
        source=chunk.source,
        chunk_id=chunk.chunk_id,
        position=chunk.position,
        cosine=round(chunk.cosine, 6),
    )


def _names(value: str | list[str] | None) -> list[str]:
    """Names of a list, or of a string with commas."""
    if value is None:
        return []
    listed = value.split(",") if isinstance(value, str) else value
    return [name.strip() for name in listed]


async def _gather(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results in order; the first failure ends the others and is raised as it is."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _page(file: str) -> Callable[[], Coroutine[Any, Any, FileResponse]]:
    async def page() -> FileResponse:
        return FileResponse(
            WEB / file,
            headers={
                "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
            },
        )

    return page


def _node_metrics() -> str:
    import ray

    mine = ray.get_runtime_context().get_node_id()
    (port,) = [n["MetricsExportPort"] for n in ray.nodes() if n["NodeID"] == mine]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return "\n".join(line for line in lines if "ray_latent_" in line) + "\n"


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _request_id(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))


def _log(request: Request, **fields: Any) -> None:
    """More fields for the line the guard writes of this request."""
    request.scope["state"].setdefault("log", {}).update(fields)


def _error(request: Request, status: int, message: str, retry_after_s: int | None = None) -> JSONResponse:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    message = message.encode("utf-8", "replace").decode()  # it may quote what no UTF-8 can say
    return JSONResponse(error_body(status, message, _request_id(request)), status, headers)


def _ms(since: float) -> float:
    return round((time.perf_counter() - since) * 1000, 3)
