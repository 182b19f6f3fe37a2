"""Shared by the routes: the loaded models, request validation and admission control.

Failed checks raise RefusedError, whose message says what was expected, what was received and what to do.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from fastapi import Request

from lvm.codec.identity import CodecIdentity
from lvm.corpus.chunker import Chunk, Chunker
from lvm.corpus.records import Article
from lvm.corpus.tmd import Prototypes, phrases
from lvm.predict.record import default_alias
from serve.concepts import Concepts
from serve.health import Seen, Window
from serve.metrics import GatewayMetrics
from serve.pipeline import NO_CORPUS, Clock, CorpusStages, Pipeline
from serve.release import Release
from serve.schema import CodecRecord, Milliseconds, ModelRecord, RefusedError
from serve.settings import ServeArgs
from serve.smoothing import Smoother
from serve.stage import DeadlineError, FullError

SUBSCRIBERS = {"jxe": "gtr-jxe", "ielab": "gtr-ielab"}
"""Codec names of the original system's API."""

NO_STORE = "none is open; start the service with --dataset, the name of a dataset in Postgres"


class Service:
    """The application's state in one gateway."""

    def __init__(
        self,
        args: ServeArgs,
        release: Release,
        identity: CodecIdentity,
        models: dict[str, ModelRecord],
        decoder: dict[str, Any],
        corpus: dict[str, Any],
        chunker: Chunker,
        pipeline: Pipeline,
        metrics: GatewayMetrics,
        concepts: Concepts | None = None,
    ) -> None:
        """models: by alias. decoder and corpus: results of their `describe`. Raises RefusedError when the default model
        is not among the models."""
        self.args, self.limits, self.release, self.identity = args, args.limits, release, identity
        self.rejected = ""
        """Message about a newer release that could not be loaded; empty if there is none."""
        self.codec = CodecRecord(**identity.to_dict())
        self.models, self.decoder, self.corpus = models, decoder, corpus
        self.default_model = args.default_model or default_alias(models)
        self.model(self.default_model)
        self.pipeline, self.metrics, self.concepts = pipeline, metrics, concepts
        self.smoother, self.window = Smoother(args.smoothing), Window()
        self.pending = 0
        """Inputs being processed."""
        self._prototypes: Prototypes | None = None
        self._chunker, self._chunking = chunker, asyncio.Lock()

    def reply_fields(self, request: Request, clock: Clock) -> dict[str, Any]:
        """Fields that the replies of all stages have."""
        milliseconds = Milliseconds(**clock.finish())
        return {"request_id": request.state.request_id, "codec": self.codec, "milliseconds": milliseconds}

    def model(self, name: str) -> ModelRecord:
        """The model with this alias or record folder."""
        for alias, record in self.models.items():
            if name in (alias, record.folder):
                return record
        raise RefusedError(
            404, f"no model {name!r} is loaded; available: {', '.join(self.models)}", param="model"
        )

    def require_codec(self, name: str, what: str) -> None:
        """Refuse a codec other than the loaded one. what: the field that names it."""
        loaded = {self.identity.name, self.identity.digest}
        if SUBSCRIBERS.get(name, name) not in loaded:
            raise RefusedError(
                404,
                f"{what} {name!r} is not loaded; available: {self.identity}. Vectors of one codec cannot be decoded "
                "by another",
                param=what,
            )

    def require_corpus(self, what: str) -> CorpusStages:
        """The corpus operations. Raises RefusedError if no corpus is loaded. what: the feature that needs it."""
        if self.pipeline.corpus is None:
            raise RefusedError(422, f"{what} needs a corpus, and {NO_CORPUS}", param=what)
        return self.pipeline.corpus

    def require_concepts(self, what: str) -> Concepts:
        """The concept store. Raises RefusedError if none is open. what: the feature that needs it."""
        if self.concepts is None:
            raise RefusedError(422, f"{what} needs the concept store, and {NO_STORE}", param=what)
        return self.concepts

    async def prototypes(self, deadline: float) -> Prototypes:
        """Prototype vectors of the TMD labels, encoded on first use."""
        if self._prototypes is None:
            encoded, _ = await self.pipeline.encode([phrase for phrase, _ in phrases()], deadline)
            self._prototypes = Prototypes(np.stack([e.vector for e in encoded]))
        return self._prototypes

    def require_steps(self, steps: int | None) -> None:
        """Refuse a number of corrector steps that exceeds the limit or that the codec does not support."""
        if steps is None:
            return
        self.require_at_most("steps", steps, "max_steps")
        supported = self.decoder["steps"]
        if supported is not None and steps not in supported:
            raise RefusedError(
                422,
                f"codec {self.identity.name} supports steps {', '.join(map(str, supported))}, got {steps}; choose one "
                "of these or leave steps out",
            )

    def deadline(self, seconds: float | None) -> float:
        """The deadline on `time.monotonic`. seconds: the requested time limit, if any."""
        if seconds is not None:
            self.require_at_most("deadline_s", seconds, "max_deadline_s")
        return time.monotonic() + (seconds or self.limits.default_deadline_s)

    def require_at_most(self, what: str, value: float, limit: str, unit: str = "") -> None:
        """Refuse a value above its limit. what: the field. limit: a field of `Limits`."""
        maximum = getattr(self.limits, limit)
        if not value <= maximum:
            raise RefusedError(
                422,
                f"{what} is {value:g}{' ' + unit if unit else ''}, limit {limit} is {maximum:g}; ask for less",
                param=field_of(what),
            )

    def require_one(self, **given: Any) -> None:
        """Refuse a request unless exactly one of these fields is given."""
        count = sum(value is not None for value in given.values())
        if count != 1:
            names, got = " or ".join(given), "both" if count else "neither"
            raise RefusedError(422, f"expected either {names}, got {got}")

    def texts(self, texts: str | list[str], what: str, limit: str = "max_texts") -> list[str]:
        """The texts as a list. Refuses an empty list, empty texts, and what exceeds the limits."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise RefusedError(422, f"{what} is empty; expected at least one text", param=what)
        self.require_at_most(what, len(listed), limit, "texts")
        self.require_words(listed, what)
        return listed

    def require_words(self, texts: Sequence[str], what: str, empty: bool = False) -> None:
        """Refuse texts that are too long or not valid UTF-8 and, unless `empty`, those without words."""
        for i, text in enumerate(texts):
            self.require_at_most(f"{what}[{i}]", len(text), "max_characters", "characters")
            try:
                text.encode()
            except UnicodeEncodeError as err:  # JSON can escape half a surrogate pair; UTF-8 cannot encode it
                raise RefusedError(
                    422,
                    f"{what}[{i}] holds half a surrogate pair at character {err.start}; send whole characters",
                    param=field_of(what),
                ) from err
            if not empty and not text.strip():
                raise RefusedError(
                    422, f"{what}[{i}] holds only white space; expected words", param=field_of(what)
                )

    async def cut(self, texts: Sequence[str]) -> list[list[Chunk]]:
        """The chunks of each text."""
        articles = [Article(str(i), "", text, "request") for i, text in enumerate(texts)]
        async with self._chunking:  # the chunker's word cache is not thread-safe
            if sum(map(len, texts)) < 4000:
                return self._chunker.chunk(articles)  # under a millisecond: cheaper than a thread
            return await asyncio.to_thread(self._chunker.chunk, articles)

    def require_room(self, inputs: int) -> None:
        """Raise FullError if that many more inputs would exceed the limit max_pending."""
        if self.pending + inputs > self.limits.max_pending:
            raise FullError(
                f"{self.pending} inputs are being processed and {inputs} more would exceed limit max_pending, "
                f"{self.limits.max_pending}; try again after the time in Retry-After"
            )

    @contextmanager
    def admitted(self, inputs: int) -> Iterator[None]:
        """Count inputs as pending while the block runs; raises FullError if there are too many."""
        self.require_room(inputs)
        self.pending += inputs
        self.metrics.pending.set(self.pending)
        try:
            yield
        finally:
            self.pending -= inputs
            self.metrics.pending.set(self.pending)

    def note(self, err: Exception, request: Request, seconds: float | None = None) -> None:
        """Count a failed request. seconds: the duration of a request for text, which counts towards health."""
        if isinstance(err, DeadlineError):
            self.metrics.deadline.inc(1, {"route": request.scope["route"].path})
        elif isinstance(err, FullError):
            self.metrics.refused.inc(1, {"reason": "full"})
        if seconds is not None:
            self.window.add(Seen(seconds, not isinstance(err, DeadlineError | FullError)))


def field_of(what: str) -> str:
    """`input` of `input[3]`."""
    return what.partition("[")[0]
