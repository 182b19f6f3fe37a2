"""Text to text across the deployments: encode, complete the context, predict, snap, decode.

lvm implements the stages; this module adds their order, caching, the circuit breaker and timing. Results equal those
of `latent predict` on the same run.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lvm.cache import Cache
from lvm.codec.identity import CodecIdentity
from lvm.codec.ladder import Answer, LadderSettings, Nearest, extracted, faults, keywords
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH, Context, Fill, Mode, Origin, build_context
from serve.breaker import Breaker
from serve.decoder import VectorRow
from serve.encoder import EncodedText
from serve.metrics import GatewayMetrics
from serve.predictor import ContextRow, Predicted
from serve.retriever import CorpusChunk, FillRow, NearRow, SnapRow
from serve.stage import DeadlineError, Stage, Timing, UnavailableError

STAGES = ("queue", "encode", "context", "predict", "snap", "decode")
"""Keys of `PredictedChunk.milliseconds`."""


@dataclass(frozen=True)
class ChunkOptions:
    """A request's options for each chunk."""

    model: str
    deadline: float
    """On `time.monotonic`."""
    fill: Fill = "retrieve"
    snap: bool = True
    steps: int | None = None
    """Exactly this many corrector steps of the codec's decoder; None for the whole ladder."""
    neighbours: int = 0
    cache: bool = True


@dataclass(frozen=True)
class ReadContext:
    """The predictor's context without its vectors, which would take most of a cached answer's bytes."""

    mode: Mode
    texts: tuple[str, ...]
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class PredictedChunk:
    """One predicted chunk, with its context and timings."""

    answer: Answer
    folder: str
    """Record of the model, or "passthrough"."""
    context: ReadContext
    truncated: int
    """Number of context texts that exceeded the codec's limit."""
    prediction_cosine: float
    """Cosine of the raw prediction to the snapped vector; 1 without a snap."""
    drifted: bool
    neighbours: tuple[CorpusChunk, ...]
    milliseconds: dict[str, float] = field(compare=False)
    cached: str | None = None
    """None, "answer" (the whole answer was cached), or "vector" (the decoded text was)."""
    retries: int = 0


@dataclass(frozen=True)
class _Steered:
    """Result of all stages before the decoder."""

    folder: str
    context: Context
    truncated: int
    raw: NDArray[np.float32]
    """(D,), the prediction."""
    steered: NDArray[np.float32]
    """(D,), the vector to decode."""
    drifted: bool
    near: list[CorpusChunk]


class Clock:
    """Milliseconds by stage; waiting time counts as the stage "queue"."""

    def __init__(self) -> None:
        self.ms = dict.fromkeys(STAGES, 0.0)
        self.retries = 0
        self._begun = time.perf_counter()

    def add(self, stage: str, timing: Timing) -> None:
        """Add a call's timing."""
        self.ms[stage] += timing.work_ms
        self.ms["queue"] += timing.queue_ms
        self.retries += timing.retries

    def finish(self) -> dict[str, float]:
        """Rounded milliseconds, with "total"."""
        total = (time.perf_counter() - self._begun) * 1000
        return {**{k: round(v, 3) for k, v in self.ms.items()}, "total": round(total, 3)}


@dataclass(frozen=True)
class CorpusStages:
    """The retriever's operations."""

    fill: Stage
    snap: Stage
    find: Stage


NO_CORPUS = "no corpus is loaded; start the service with --run, the folder of a `latent run`"


class Pipeline:
    """All stages of the application, used by one gateway."""

    def __init__(
        self,
        identity: CodecIdentity,
        encoder: Stage,
        predictor: Stage,
        decoder: Stage,
        corpus: CorpusStages | None,
        breaker: Breaker,
        metrics: GatewayMetrics,
        cache_bytes: int,
        decode_patience_s: float,
        folders: dict[str, str],
        contexts: dict[str, int],
    ) -> None:
        """corpus: None if no corpus is loaded; then vectors are not snapped, and refused texts are not replaced.
        folders: alias to record folder. contexts: alias to context length; CONTEXT_CHUNKS for others."""
        self.identity, self.breaker = identity, breaker
        self.encoder, self.predictor, self.decoder, self.corpus = encoder, predictor, decoder, corpus
        self._metrics, self._patience_s = metrics, decode_patience_s
        self._folders, self._contexts = folders, contexts
        self._vectors: Cache[EncodedText] = Cache(cache_bytes)
        self._answers: Cache[PredictedChunk] = Cache(cache_bytes)
        self._before_decoder = 0
        """Requests in a stage before the decoder."""

    async def encode(
        self, texts: Sequence[str], deadline: float, cache: bool = True
    ) -> tuple[list[EncodedText], Timing]:
        """One EncodedText per text. Cached vectors are reused, and equal texts are encoded once."""
        found: dict[str, EncodedText] = {}
        if cache:
            for text in texts:
                held = self._vectors.get(_digest(text))
                if held is not None:
                    found[text] = replace(held, cached=True)
            hits = sum(t in found for t in texts)
            self._count_lookups("text", hits, len(texts) - hits)
        missing = [t for t in dict.fromkeys(texts) if t not in found]
        values, timing = await self.encoder.run(missing, deadline)
        for text, value in zip(missing, values, strict=True):
            found[text] = value
            if cache:
                # A copy: a view of a row would keep the whole batch in memory.
                self._vectors.put(_digest(text), replace(value, vector=value.vector.copy()))
        return [found[t] for t in texts], timing

    async def predict_next(self, texts: Sequence[str], options: ChunkOptions) -> PredictedChunk:
        """The chunk that follows these (at least one).

        If only the decoder fails, the corpus answers, if one is loaded. Raises DeadlineError, StageError or
        UnavailableError.
        """
        key = self._key(texts, options)
        if options.cache:
            begun = time.perf_counter()
            held = self._answers.get(key)
            self._count_lookups("answer", int(held is not None), int(held is None))
            if held is not None:
                took = round((time.perf_counter() - begun) * 1000, 3)
                predicted = replace(
                    held,
                    milliseconds={**dict.fromkeys(STAGES, 0.0), "total": took},
                    cached="answer",
                    retries=0,
                )
                self._count(predicted, options)
                return predicted
        clock = Clock()
        self._before_decoder += 1
        try:
            steered = await self._steer(texts[-self._context_length(options) :], options, clock)
        finally:
            self._before_decoder -= 1
        answer = await self._decode(steered, options, clock)
        predicted = PredictedChunk(
            answer,
            steered.folder,
            ReadContext(steered.context.mode, steered.context.texts, steered.context.origins),
            steered.truncated,
            float((steered.raw * steered.steered).sum()),
            steered.drifted,
            tuple(steered.near),
            clock.finish(),
            "vector" if answer.cached else None,
            clock.retries,
        )
        if (
            options.cache
            and answer.emergency is None
            and steered.folder == self._folders.get(options.model, PASSTHROUGH)
        ):
            # Not emergency answers, nor those of a model version that is being replaced.
            self._answers.put(key, predicted)
        self._count(predicted, options)
        return predicted

    async def continue_(
        self, texts: Sequence[str], options: ChunkOptions, length: int
    ) -> AsyncIterator[PredictedChunk]:
        """`length` chunks, each predicted from all before it. Generated text is re-encoded, so a continuation of n
        chunks equals n requests that each append the last answer."""
        chunks = list(texts)
        for _ in range(length):
            predicted = await self.predict_next(chunks, options)
            chunks.append(predicted.answer.text)
            yield predicted

    async def predict(
        self, contexts: Sequence[NDArray[np.float32]], model: str, deadline: float, search: bool = False
    ) -> tuple[list[Predicted], Timing]:
        """One Predicted per context (T, D) of unit vectors. search: whether to compute the search vector too."""
        if model == PASSTHROUGH:
            return [Predicted(c[-1], c[-1], PASSTHROUGH) for c in contexts], Timing()
        return await self.predictor.run([ContextRow(model, c, search) for c in contexts], deadline)

    async def decode(
        self,
        vectors: NDArray[np.float32],
        deadline: float,
        steps: int | None = None,
        cache: bool = True,
        corpus: bool = True,
    ) -> tuple[list[Answer], Timing]:
        """One Answer per unit vector of (B, D). corpus: whether corpus chunks may replace refused texts."""
        corpus = corpus and self.corpus is not None
        rows = [VectorRow(v, None, steps, cache) for v in vectors]
        refusal = self.breaker.refuses(self.decoder.depth) if corpus else None
        timing = Timing()
        answers: list[Answer | None] = [None] * len(rows)
        if refusal is None:
            try:
                found, timing = await self._decode_rows(rows, deadline, bounded=corpus, predicted=False)
                answers = list(found)
            except (UnavailableError, DeadlineError) as err:
                if not corpus or time.monotonic() >= deadline:
                    raise
                refusal = str(err)
        missing = [i for i, a in enumerate(answers) if a is None or (corpus and not a.accepted)]
        if missing and self.corpus is not None:
            near_rows = [NearRow(vectors[i], 1, answers=True) for i in missing]
            near, added = await self.corpus.find.run(near_rows, deadline)
            timing = Timing(timing.queue_ms + added.queue_ms, timing.work_ms + added.work_ms, timing.retries)
            for i, chunks in zip(missing, near, strict=True):
                answers[i] = extracted(answers[i], Nearest(chunks[0].text, chunks[0].cosine), refusal)
        return [a for a in answers if a is not None], timing

    async def _steer(self, texts: Sequence[str], options: ChunkOptions, clock: Clock) -> _Steered:
        """All stages before the decoder."""
        encoded, timing = await self.encode(texts, options.deadline, options.cache)
        clock.add("encode", timing)
        vectors = np.stack([e.vector for e in encoded])
        context = await self._context(vectors, texts, options, clock)
        # Passthrough tests only the codec.
        snaps = options.snap and options.model != PASSTHROUGH and self.corpus is not None
        (predicted,), timing = await self.predict([context.vectors], options.model, options.deadline, snaps)
        clock.add("predict", timing)
        folder, raw = predicted.folder, predicted.vector
        steered, drifted = raw, False
        if snaps and self.corpus is not None:
            row = SnapRow(predicted.search, context.vectors[-1], context.vectors.mean(0))
            ((steered, drifted),), timing = await self.corpus.snap.run([row], options.deadline)
            clock.add("snap", timing)
        near: list[CorpusChunk] = []
        if options.neighbours and self.corpus is not None:
            # The context's own chunks are no continuation of it.
            near_row = NearRow(steered, options.neighbours, frozenset(context.texts))
            (near,), timing = await self.corpus.find.run([near_row], options.deadline)
            clock.add("snap", timing)
        return _Steered(folder, context, sum(e.truncated for e in encoded), raw, steered, drifted, near)

    async def _context(
        self, vectors: NDArray[np.float32], texts: Sequence[str], options: ChunkOptions, clock: Clock
    ) -> Context:
        length = self._context_length(options)
        if options.fill == "retrieve" and len(texts) < length and self.corpus is not None:
            row = FillRow(vectors, tuple(texts), length)
            (context,), timing = await self.corpus.fill.run([row], options.deadline)
            clock.add("context", timing)
            return context  # type: ignore[no-any-return]
        begun = time.perf_counter()
        context = build_context(vectors, texts, length, options.fill)
        clock.ms["context"] += (time.perf_counter() - begun) * 1000
        return context

    def _context_length(self, options: ChunkOptions) -> int:
        return self._contexts.get(options.model, CONTEXT_CHUNKS)

    async def _decode(self, steered: _Steered, options: ChunkOptions, clock: Clock) -> Answer:
        refusal = self.breaker.refuses(self.decoder.depth)
        if refusal is not None and self.corpus is None:
            raise UnavailableError(f"{refusal}; {NO_CORPUS}, to get answers from it meanwhile")
        answer: Answer | None = None
        if refusal is None:
            coming = self._before_decoder
            row = VectorRow(steered.steered, steered.context.vectors, options.steps, options.cache, coming)
            try:
                predicted = options.steps is None and options.model != PASSTHROUGH
                (answer,), timing = await self._decode_rows([row], options.deadline, True, predicted)
                clock.add("decode", timing)
                self._count_lookups("vector", int(answer.cached), int(not answer.cached))
            except (UnavailableError, DeadlineError) as err:
                if self.corpus is None or time.monotonic() >= options.deadline:
                    raise
                refusal = str(err)
        if answer is not None and (answer.accepted or options.steps is not None or self.corpus is None):
            return answer
        assert self.corpus is not None
        (predicted,), timing = await self.predict(
            [steered.context.vectors], options.model, options.deadline, search=True
        )
        clock.add("predict", timing)
        row = NearRow(steered.raw, 1, frozenset(steered.context.texts), answers=True, search=predicted.search)
        ((chunk,),), timing = await self.corpus.find.run([row], options.deadline)
        clock.add("decode", timing)
        return extracted(answer, Nearest(chunk.text, chunk.cosine), refusal)

    async def _decode_rows(
        self, rows: Sequence[VectorRow], deadline: float, bounded: bool, predicted: bool
    ) -> tuple[list[Answer], Timing]:
        """The decoder's answers; every outcome is reported to the breaker.

        bounded: wait at most `decode_patience_s`. predicted: whether the vectors are predictions, so that refused
        texts are not due to the client's input.
        """
        begun = time.monotonic()
        limit = min(deadline, begun + self._patience_s) if bounded else deadline
        # The breaker's limit is per vector and for the ladder's steps; larger requests may take longer.
        share = len(rows) * max(1.0, *((r.steps or 0) / _SETTINGS.steps[-1] for r in rows))
        try:
            answers, timing = await self.decoder.run(rows, limit)
        except (DeadlineError, asyncio.CancelledError) as err:
            late = isinstance(err, DeadlineError) and limit < deadline
            if (late and share == 1) or self.breaker.too_slow((time.monotonic() - begun) / share):
                self.breaker.done(None, None)
            else:
                self.breaker.unknown()
            if late:
                raise DeadlineError(f"the decoder gave no answer in {self._patience_s:g} s") from err
            raise
        except Exception:
            self.breaker.done(None, None)
            raise
        else:
            refused = not any(a.accepted for a in answers) if predicted else None
            self.breaker.done((time.monotonic() - begun) / share, refused)
            return answers, timing
        finally:
            self._metrics.breaker.set(int(self.breaker.open))

    def _key(self, texts: Sequence[str], options: ChunkOptions) -> bytes:
        context = tuple(texts[-self._context_length(options) :])
        model = self.identity.digest, self._folders.get(options.model, options.model)
        chosen = options.fill, options.snap, options.steps, options.neighbours
        return _digest(repr((model, chosen, context)))

    def _count_lookups(self, cache: str, hits: int, misses: int) -> None:
        if hits:
            self._metrics.cache.inc(hits, {"cache": cache, "result": "hit"})
        if misses:
            self._metrics.cache.inc(misses, {"cache": cache, "result": "miss"})

    def _count(self, predicted: PredictedChunk, options: ChunkOptions) -> None:
        m, label = self._metrics, {"model": options.model}
        for stage in STAGES:
            m.stage.observe(predicted.milliseconds[stage] / 1000, {"stage": stage})
        m.answers.inc(1, {"model": options.model, "source": predicted.answer.source})
        m.cosine.observe(predicted.answer.cosine, label)
        quality = judge(predicted.answer.text, predicted.answer.refusals, predicted.context.texts)
        if quality.gibberish:
            m.gibberish.inc(1, label)
        if quality.keyword_hit:
            m.keyword_hits.inc(1, label)
        if quality.entity_hit:
            m.entity_hits.inc(1, label)


@dataclass(frozen=True)
class Quality:
    """Quality of an answer in its context."""

    gibberish: bool
    """It is not language, repeats itself, or uses too few different characters."""
    keyword_hit: bool
    entity_hit: bool
    """It shares a capitalised word that is not at the start of a sentence; True if the context has none."""


def _digest(text: str) -> bytes:
    """16-byte cache key of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


_NAME = re.compile(r"(?<=[\w,;] )[A-Z]\w{2,}")
_SETTINGS = LadderSettings()


def judge(text: str, refusals: Sequence[str], context: Sequence[str]) -> Quality:
    """Quality of an answer in this context. refusals: why the ladder refused it; empty if it did not."""
    source = " ".join(context)
    wanted, names = keywords(source), set(_NAME.findall(source))
    return Quality(
        bool(refusals) or bool(faults(text, _SETTINGS)),
        not wanted or bool(wanted & keywords(text)),
        not names or any(name in text for name in names),
    )
