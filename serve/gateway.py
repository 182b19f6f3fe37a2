"""The gateway deployment: handles HTTP requests and sends rows to encoder, predictor, retriever and decoder."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import Chunker
from lvm.errors import DatabaseError, InputError
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH
from serve.breaker import Breaker
from serve.concepts import Concepts
from serve.encoder import Encoder
from serve.guard import LOOPBACK, Guard, read_keys
from serve.metrics import GatewayMetrics
from serve.pipeline import CorpusStages, Pipeline
from serve.predictor import Predictor
from serve.release import Release, read_release
from serve.requests import add_error_replies
from serve.retriever import Retriever
from serve.routes import Errors
from serve.routes.corpus import CorpusRoutes
from serve.routes.generate import GenerateRoute
from serve.routes.openai import OpenAIRoutes
from serve.routes.status import StatusRoutes
from serve.routes.vectors import VectorRoutes
from serve.schema import ErrorReply, ModelRecord
from serve.service import Service
from serve.settings import ServeArgs, codec_name
from serve.stage import LOST, Call, FullError, Stage, StageError

ATTEMPTS = 4
"""Calls of `describe` before giving up: seven seconds with the backoff, in which a lost replica restarts."""

DESCRIPTION = """Documents to vectors, a model that predicts the next vector, and the vector back to text.

`POST /v1/generate` runs all stages; the other routes are single stages. Errors have the form
`{"error": {"message", "type", "param", "code", "request_id"}}`; the message says what was expected, what was
received and what to do.
"""


@serve.deployment
@serve.ingress()
class Gateway:
    """Handles HTTP requests."""

    async def __init__(
        self,
        args: ServeArgs,
        encoder: DeploymentHandle | None,
        predictor: DeploymentHandle | None,
        retriever: DeploymentHandle | None,
        decoder: DeploymentHandle,
    ) -> None:
        """Deployments without a handle run in this process (`ServeArgs.inline`); `reconfigure` names the run. Raises
        InputError when the service would be reachable from a network without an API key."""
        self._args = args
        self._keys = [*args.api_keys_sha256, *(read_keys(args.api_keys_file) if args.api_keys_file else [])]
        require_key_unless_loopback(self._keys, _http_host())
        self._metrics = GatewayMetrics()
        if args.inline:
            import torch

            torch.set_num_threads(1)  # leave the other core to the decoder
        self._parts: dict[str, Any] = {
            "encoder": encoder or Encoder.func_or_class(args),
            "predictor": predictor or Predictor.func_or_class(args),
            "decoder": decoder,
        }
        if args.run:
            self._parts["retriever"] = retriever or Retriever.func_or_class(args)
        self._identity = CodecIdentity.from_dict(await self._describe("encoder"))
        self._decoder = await self._describe("decoder")
        decoders = CodecIdentity.from_dict(self._decoder["codec"])
        require_same_codec(self._identity, decoders, "the encoder", "the decoder")
        self._tokenizer = load_tokenizer(codec_name(args), args.codec_path)
        self._breaker = Breaker(args.breaker)
        self._concepts: Concepts | None = None
        if args.dataset:
            self._concepts = Concepts(args, self._identity, self._tokenizer)
            with suppress(DatabaseError):  # other routes work without it, and requests reconnect
                await self._concepts.open()
        self._service: Service | None = None
        self._app: ASGIApp = Starlette()

    async def reconfigure(self, wanted: Mapping[str, Any]) -> None:
        """Switch to the release of a `user_config`; requests in flight finish with theirs.

        If it cannot be loaded, the previous release stays. /health reports that; only the log gives the reason, as it
        may contain paths. Without a previous release, raises InputError, IdentityError, or a deployment's error.
        """
        try:
            release = await asyncio.to_thread(read_release, wanted, self._args)
            service = await self._serve(release)
        except Exception as err:
            if self._service is None:
                raise
            # Not raised, as Ray would stop the replica.
            self._service.rejected = (
                f"release {str(wanted.get('release', ''))!r} was rejected; see the gateway's log"
            )
            logging.getLogger("ray.serve").error(
                "%s was rejected: %s", dict(wanted), _last_line(err), exc_info=err
            )
        else:
            self._app, self._service = self._guarded(service), service

    async def _serve(self, release: Release) -> Service:
        """The service for a release, once the deployments have loaded it."""
        args = self._args
        models = await self._describe("predictor", release)
        corpus = await self._describe("retriever", release) if args.run else {}
        served = {f"model {alias}": r["config"]["codec"] for alias, r in models.items()}
        served |= {"retriever": corpus["codec"]} if corpus else {}
        for name, codec in served.items():
            require_same_codec(self._identity, CodecIdentity.from_dict(codec), "the encoder", f"the {name}")
        records = {alias: _model_record(alias, r) for alias, r in models.items()}
        records[PASSTHROUGH] = ModelRecord(
            name=PASSTHROUGH,
            folder=PASSTHROUGH,
            architecture=PASSTHROUGH,
            parameters=0,
            context=CONTEXT_CHUNKS,
            created="",
            codec=self._identity.digest,
        )
        contexts = {alias: record.context for alias, record in records.items()}

        def stage(name: str, part: str, method: str, max_rows: int, max_calls: int = args.max_calls) -> Stage:
            target = self._parts[part]
            call = _call(target, method) if isinstance(target, DeploymentHandle) else getattr(target, method)
            if part in ("predictor", "retriever"):
                call = partial(call, release=release)
            return Stage(name, call, LOST, max_calls, max_rows, self._metrics.measure_call)

        pipeline = Pipeline(
            self._identity,
            stage("encode", "encoder", "run", args.queue_rows * max(contexts.values())),
            stage("predict", "predictor", "run", args.queue_rows),
            stage("decode", "decoder", "run", args.queue_rows, max_calls=args.queue_rows),
            CorpusStages(
                stage("context", "retriever", "fill", args.queue_rows),
                stage("snap", "retriever", "snap", args.queue_rows),
                stage("search", "retriever", "near", args.queue_rows),
            )
            if args.run
            else None,
            self._breaker,
            self._metrics,
            args.cache_bytes,
            args.decode_patience_s,
            dict(release.models),
            contexts,
        )
        return Service(
            args,
            release,
            self._identity,
            records,
            self._decoder,
            corpus,
            Chunker(self._tokenizer),
            pipeline,
            self._metrics,
            self._concepts,
        )

    async def _describe(self, name: str, *release: Release) -> dict[str, Any]:
        """A deployment's `describe`; retried when its replica is lost."""
        part = self._parts[name]
        for attempt in range(ATTEMPTS):
            try:
                if isinstance(part, DeploymentHandle):
                    return await part.describe.remote(*release)  # type: ignore[no-any-return]
                return await part.describe(*release)  # type: ignore[no-any-return]
            except LOST:
                if attempt + 1 == ATTEMPTS:
                    raise
                await asyncio.sleep(2**attempt)
        raise AssertionError

    def __serve_build_asgi_app__(self) -> Any:
        """Routes each request to the current release; Ray calls this once, before there is a release."""

        async def current(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)

        return current

    def _guarded(self, service: Service) -> ASGIApp:
        """The routes of a service, wrapped in the guard."""
        app = FastAPI(
            title="Latent vector models",
            version="1",
            description=DESCRIPTION,
            docs_url=None,  # it loads scripts from a CDN; point any viewer at /openapi.json
            redoc_url=None,
        )
        errors: Errors = {s: {"model": ErrorReply} for s in (400, 401, 404, 408, 413, 422, 429, 503)}
        for kind in (GenerateRoute, VectorRoutes, CorpusRoutes, OpenAIRoutes, StatusRoutes):
            kind(service).add_to(app, errors)
        add_error_replies(app, service)
        guarded: ASGIApp = Guard(app, self._args.limits, self._keys, self._metrics)
        if self._args.cors_origins:
            # Outside the guard: preflight requests have no key, and pages must be able to read error replies.
            guarded = CORSMiddleware(
                guarded,
                allow_origins=self._args.cors_origins,
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After", "X-Request-ID"],
            )
        return guarded


def require_key_unless_loopback(key_hashes: Sequence[str], host: str) -> None:
    """Raise InputError unless `host` is loopback or there is an API key."""
    if host not in LOOPBACK and not key_hashes:
        raise InputError(
            f"the service would listen on {host} without an API key; set LATENT_API_KEYS or --api-keys-file, or "
            "listen on 127.0.0.1"
        )


def _http_host() -> str:
    """Address that this cluster's HTTP proxies listen on."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host or "127.0.0.1")


def _last_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[-1]


def _call(handle: DeploymentHandle, method: str) -> Call:
    caller = handle.options(method_name=method)

    async def call(rows: list[Any], remaining_s: list[float], **release: Release) -> Any:
        try:
            return await caller.remote(rows, remaining_s, **release)
        except BackPressureError as err:
            raise FullError(f"the queue of {method} is full; try again later") from err
        except RayTaskError as err:
            if isinstance(err.cause, LOST):  # a deployment behind this one lost its replica
                raise err.cause from err
            raise StageError(_last_line(err)) from err

    return call


def _model_record(alias: str, described: dict[str, Any]) -> ModelRecord:
    config, metrics = described["config"], described["metrics"]
    cosine = metrics.get("val_cosine")
    return ModelRecord(
        name=alias,
        folder=described["folder"],
        architecture=config["model"],
        parameters=int(config.get("parameters", 0)),
        context=described["context"],
        created=str(config.get("created", "")),
        val_cosine=float(cosine) if isinstance(cosine, int | float) and np.isfinite(cosine) else None,
        codec=config["codec"]["digest"],
    )
