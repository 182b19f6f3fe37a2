"""The gateway deployment: handles HTTP requests and sends rows to encoder, predictor, retriever and decoder."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import Chunker
from lvm.errors import DatabaseError, InputError
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH
from serve.breaker import Breaker
from serve.concepts import Concepts
from serve.encoder import Encoder
from serve.guard import LOOPBACK, App, Guard, read_keys
from serve.metrics import GatewayMetrics
from serve.pipeline import CorpusStages, Pipeline
from serve.predictor import Predictor
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
from serve.stage import Call, FullError, Stage, StageError

LOST = (RayActorError, DeploymentUnavailableError)
"""Errors of calls that were lost. Every operation is a pure function of its input, so they are resent."""

DESCRIPTION = """Documents to vectors, a model that predicts the next vector, and the vector back to text.

`POST /v1/generate` runs all stages; the other routes are single stages. Errors have the form
`{"error": {"message", "type", "param", "code", "request_id"}}`; the message says what was expected, what came and
what to do.
"""


@serve.deployment
@serve.ingress()
class Gateway:
    """Handles HTTP requests."""

    async def __init__(
        self,
        args: ServeArgs,
        models: dict[str, str],
        encoder: DeploymentHandle | None,
        predictor: DeploymentHandle | None,
        retriever: DeploymentHandle | None,
        decoder: DeploymentHandle,
    ) -> None:
        """models: alias to record folder. Parts without a handle run in this process (`ServeArgs.inline`). Raises
        InputError when the service would be reachable from a network without an API key."""
        self._args = args
        self._keys = [*args.api_keys_sha256, *(read_keys(args.api_keys_file) if args.api_keys_file else [])]
        require_key_unless_loopback(self._keys, _http_host())
        self._metrics = GatewayMetrics()
        if args.inline:
            import torch

            torch.set_num_threads(1)  # leave the other core to the decoder
        parts: dict[str, Any] = {
            "encoder": encoder or Encoder.func_or_class(args),
            "predictor": predictor or Predictor.func_or_class(args, models),
            "decoder": decoder,
        }
        if args.run:
            parts["retriever"] = retriever or Retriever.func_or_class(args)
        described = {
            name: await (part.describe.remote() if isinstance(part, DeploymentHandle) else part.describe())
            for name, part in parts.items()
        }
        identity = CodecIdentity.from_dict(described["encoder"])
        served = {name: described[name]["codec"] for name in ("decoder", "retriever") if name in described}
        served |= {f"model {alias}": r["config"]["codec"] for alias, r in described["predictor"].items()}
        for name, codec in served.items():
            require_same_codec(identity, CodecIdentity.from_dict(codec), "the encoder", f"the {name}")
        records = {alias: _model_record(alias, r) for alias, r in described["predictor"].items()}
        records[PASSTHROUGH] = ModelRecord(
            name=PASSTHROUGH,
            folder=PASSTHROUGH,
            architecture=PASSTHROUGH,
            parameters=0,
            context=CONTEXT_CHUNKS,
            created="",
            codec=identity.digest,
        )
        contexts = {alias: record.context for alias, record in records.items()}
        tokenizer = load_tokenizer(codec_name(args), args.codec_path)

        def stage(name: str, part: str, method: str, max_rows: int, max_calls: int = args.max_calls) -> Stage:
            where = parts[part]
            call = _call(where, method) if isinstance(where, DeploymentHandle) else getattr(where, method)
            return Stage(name, call, LOST, max_calls, max_rows, self._metrics.measure_call)

        pipeline = Pipeline(
            identity,
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
            Breaker(args.breaker),
            self._metrics,
            args.cache_bytes,
            args.decode_patience_s,
            dict(models),
            contexts,
        )
        concepts = None
        if args.dataset:
            concepts = Concepts(args, identity, tokenizer)
            with suppress(DatabaseError):  # other routes work without the store, and its requests reconnect
                await concepts.open()
        self._service = Service(
            args,
            identity,
            records,
            described["decoder"],
            described.get("retriever", {}),
            Chunker(tokenizer),
            pipeline,
            self._metrics,
            concepts,
        )

    def __serve_build_asgi_app__(self) -> Any:
        """The routes, behind the guard."""
        app = FastAPI(
            title="Latent vector models",
            version="1",
            description=DESCRIPTION,
            docs_url=None,  # its page loads scripts from a CDN; use any viewer with /openapi.json
            redoc_url=None,
        )
        errors: Errors = {
            status: {"model": ErrorReply} for status in (400, 401, 404, 408, 413, 422, 429, 503)
        }
        for kind in (GenerateRoute, VectorRoutes, CorpusRoutes, OpenAIRoutes, StatusRoutes):
            kind(self._service).add_to(app, errors)
        add_error_replies(app, self._service)
        guarded: App = Guard(app, self._args.limits, self._keys, self._metrics)
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
    """Address on which this cluster's HTTP proxies listen."""
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
        context=described["context"],
        created=str(config.get("created", "")),
        val_cosine=float(cosine) if isinstance(cosine, int | float) and np.isfinite(cosine) else None,
        codec=config["codec"]["digest"],
    )
