"""The order of the stages, the caches, and what happens when the decoder does not answer; calls in this process."""

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from lvm.codec.ladder import Answer
from serve.breaker import Breaker
from serve.decoder import VectorRow
from serve.encoder import EncodedText
from serve.pipeline import ChunkOptions, CorpusStages, Pipeline, judge
from serve.predictor import Predicted
from serve.retriever import CorpusChunk
from serve.rows import Outcome
from serve.settings import BreakerArgs
from serve.stage import DeadlineError, Stage, UnavailableError
from tests.doubles import FakeCodec

FIVE = [f"chunk {word} of the river" for word in ("one", "two", "three", "four", "five")]


class Quiet:
    """Takes every metric and keeps none."""

    def __getattr__(self, name: str) -> "Quiet":
        return self

    def __call__(self, *_: object, **__: object) -> None: ...


class LostError(Exception):
    """As when a replica dies."""


class Parts:
    """What the deployments would answer."""

    def __init__(self) -> None:
        self.codec = FakeCodec()
        self.calls: Counter[str] = Counter()
        self.fault: str | None = None
        self.decode_s = 0.0
        self.decoder_lost = False
        self.folder = "lstm-1"
        self.corpus = True
        self.near_texts = ["a corpus chunk of the river", "another corpus chunk"]

    async def encode(self, rows: list[str], _: list[float]) -> list[Outcome[Any]]:
        self.calls["encode"] += len(rows)
        vectors = self.codec.encode_chunks(rows).vectors
        return [Outcome(EncodedText(v, 1.0, 5, False)) for v in vectors]

    async def predict(self, rows: list[Any], _: list[float]) -> list[Outcome[Any]]:
        self.calls["predict"] += len(rows)
        return [Outcome(Predicted(row.vectors[0], row.vectors[-1], self.folder)) for row in rows]

    async def snap(self, rows: list[Any], _: list[float]) -> list[Outcome[Any]]:
        self.calls["snap"] += len(rows)
        return [Outcome((row.query, False)) for row in rows]

    async def near(self, rows: list[Any], _: list[float]) -> list[Outcome[Any]]:
        self.calls["near"] += len(rows)
        chunks = [CorpusChunk(t, "T", "s", "id", 0, 0.5) for t in self.near_texts]
        return [Outcome([c for c in chunks if c.text not in row.barred][: row.k]) for row in rows]

    async def decode(self, rows: list[VectorRow], _: list[float]) -> list[Outcome[Any]]:
        self.calls["decode"] += len(rows)
        if self.decoder_lost:
            raise LostError
        await asyncio.sleep(self.decode_s)
        refusals = () if self.fault is None else (self.fault,)
        return [Outcome(Answer("the river rose again", "writer", 0.9, refusals=refusals)) for _ in rows]

    def pipeline(self, patience_s: float = 10, **breaker: Any) -> Pipeline:
        def stage(name: str, call: Any) -> Stage:
            return Stage(name, call, (LostError,), 4, 8, attempts=2)

        return Pipeline(
            self.codec.identity,
            stage("encode", self.encode),
            stage("predict", self.predict),
            stage("decode", self.decode),
            CorpusStages(stage("context", self.snap), stage("snap", self.snap), stage("search", self.near))
            if self.corpus
            else None,
            Breaker(BreakerArgs(**breaker)),
            Quiet(),  # type: ignore[arg-type]
            10**6,
            patience_s,
            {"lstm": "lstm-1", "long": "lstm-2"},
            {"lstm": 5, "long": 7},
        )


def options(model: str = "lstm", seconds: float = 10, **more: Any) -> ChunkOptions:
    return ChunkOptions(model, time.monotonic() + seconds, **more)


def test_a_good_text_needs_no_corpus() -> None:
    parts = Parts()
    predicted = asyncio.run(parts.pipeline().predict_next(FIVE, options()))
    assert (predicted.answer.text, predicted.folder, predicted.context.mode) == (
        "the river rose again",
        "lstm-1",
        "seq",
    )
    assert parts.calls == {"encode": 5, "predict": 1, "snap": 1, "decode": 1}
    vectors = parts.codec.encode_chunks([FIVE[0], FIVE[-1]]).vectors
    assert predicted.prediction_cosine == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def test_each_model_reads_as_many_chunks_as_it_was_trained_on() -> None:
    parts = Parts()
    predicted = asyncio.run(parts.pipeline().predict_next([*FIVE, *"abcd"], options("long")))
    assert predicted.context.texts == (*FIVE[2:], *"abcd")


def test_no_more_is_read_than_a_predictor_reads() -> None:
    parts = Parts()
    predicted = asyncio.run(parts.pipeline().predict_next(["older", "old", *FIVE], options()))
    assert predicted.context.texts == tuple(FIVE)
    assert parts.calls["encode"] == 5


def test_without_a_corpus_the_decoder_alone_answers() -> None:
    parts = Parts()
    parts.corpus = False
    pipeline = parts.pipeline()
    predicted = asyncio.run(pipeline.predict_next(FIVE[:2], options()))
    assert predicted.context.mode == "repeat_pad"  # nothing to retrieve from
    assert predicted.answer.source == "writer"
    assert parts.calls == {"encode": 2, "predict": 1, "decode": 1}
    parts.fault = "no language"
    predicted = asyncio.run(pipeline.predict_next(FIVE, options()))
    assert predicted.answer.refusals == ("no language",)  # for want of a better one
    vectors = parts.codec.encode_chunks(FIVE).vectors
    answers, _ = asyncio.run(pipeline.decode(vectors, time.monotonic() + 10))
    assert [a.refusals for a in answers] == [("no language",)] * 5
    parts.decoder_lost = True
    with pytest.raises(UnavailableError):
        asyncio.run(pipeline.predict_next(FIVE[1:], options()))


def test_without_a_snap_the_prediction_itself_is_decoded() -> None:
    parts = Parts()
    predicted = asyncio.run(parts.pipeline().predict_next(FIVE, options(snap=False)))
    assert predicted.prediction_cosine == pytest.approx(1.0, abs=1e-5)
    assert "snap" not in parts.calls


def test_answers_that_are_all_refused_open_the_breaker() -> None:
    parts = Parts()
    parts.fault = "no language"
    pipeline = parts.pipeline(window=4)

    async def main() -> list[Answer]:
        return [(await pipeline.predict_next([*FIVE, str(n)], options())).answer for n in range(6)]

    answers = asyncio.run(main())
    assert [a.attempts[0].refusals for a in answers[:4]] == [("no language",)] * 4
    assert all("were refused" in (a.emergency or "") for a in answers[4:])
    assert parts.calls["decode"] == 4


def test_passthrough_predicts_and_snaps_nothing() -> None:
    parts = Parts()
    predicted = asyncio.run(parts.pipeline().predict_next(FIVE, options("passthrough")))
    assert (predicted.folder, predicted.prediction_cosine) == ("passthrough", pytest.approx(1.0, abs=1e-5))
    assert parts.calls == {"encode": 5, "decode": 1}


def test_a_refused_text_gives_way_to_a_corpus_chunk_that_was_not_just_read() -> None:
    parts = Parts()
    parts.fault = "no language"
    predicted = asyncio.run(parts.pipeline().predict_next([*FIVE[:4], parts.near_texts[0]], options()))
    assert (predicted.answer.text, predicted.answer.source) == (parts.near_texts[1], "corpus")
    assert [(a.text, a.refusals) for a in predicted.answer.attempts] == [
        ("the river rose again", ("no language",))
    ]


def test_the_same_again_comes_from_memory_unless_told_otherwise() -> None:
    parts = Parts()
    pipeline = parts.pipeline()

    async def main() -> list[str | None]:
        predicted = [await pipeline.predict_next(FIVE, options()) for _ in range(2)]
        predicted.append(await pipeline.predict_next(FIVE, options(steps=1)))
        predicted.append(await pipeline.predict_next(FIVE, options(cache=False)))
        return [s.cached for s in predicted]

    assert asyncio.run(main()) == [None, "answer", None, None]
    assert parts.calls["decode"] == 3
    assert parts.calls["encode"] == 10  # once, and once more without the cache


@pytest.mark.parametrize(
    "other",
    [{"model": "passthrough"}, {"fill": "repeat"}, {"snap": False}, {"steps": 1}, {"neighbours": 1}],
    ids=lambda other: next(iter(other)),
)
def test_what_was_wished_otherwise_is_another_answer(other: dict[str, Any]) -> None:
    pipeline = Parts().pipeline()

    async def main() -> list[str | None]:
        requests = [options(), options(**other), options(**other)]
        return [(await pipeline.predict_next(FIVE, w)).cached for w in requests]

    assert asyncio.run(main()) == [None, None, "answer"]


def test_answers_of_a_version_that_is_being_replaced_are_not_kept() -> None:
    parts = Parts()
    pipeline = parts.pipeline()

    async def main() -> list[tuple[str, str | None]]:
        parts.folder = "lstm-0"
        predicted = [await pipeline.predict_next(FIVE, options())]
        parts.folder = "lstm-1"
        predicted += [await pipeline.predict_next(FIVE, options()) for _ in range(2)]
        return [(s.folder, s.cached) for s in predicted]

    assert asyncio.run(main()) == [("lstm-0", None), ("lstm-1", None), ("lstm-1", "answer")]


def test_texts_met_before_are_marked() -> None:
    parts = Parts()
    pipeline = parts.pipeline()

    async def main() -> list[bool]:
        await pipeline.encode(FIVE[:2], time.monotonic() + 10)
        encoded, _ = await pipeline.encode(FIVE[:3], time.monotonic() + 10)
        return [e.cached for e in encoded]

    assert asyncio.run(main()) == [True, True, False]


def test_a_decoder_that_takes_too_long_leaves_an_answer_of_the_corpus_that_is_not_kept() -> None:
    parts = Parts()
    parts.decode_s = 5
    pipeline = parts.pipeline(patience_s=0.05)

    async def main() -> None:
        for _ in range(2):
            predicted = await pipeline.predict_next(FIVE, options())
            assert predicted.answer.source == "corpus"
            assert predicted.answer.emergency == "the decoder gave no answer in 0.05 s"
            assert predicted.cached is None

    asyncio.run(main())


def test_a_decoder_that_is_lost_leaves_answers_of_the_corpus_and_opens_the_breaker() -> None:
    parts = Parts()
    parts.decoder_lost = True
    pipeline = parts.pipeline(window=4)

    async def main() -> list[str]:
        predicted = [await pipeline.predict_next([*FIVE, str(n)], options()) for n in range(6)]
        parts.decoder_lost = False
        return [s.answer.emergency or "" for s in predicted]

    reasons = asyncio.run(main())
    assert all("lost 2 calls" in r for r in reasons[:4])
    assert all("breaker open" in r for r in reasons[4:])
    assert parts.calls["decode"] == 8


def test_a_deadline_that_passes_is_no_reason_to_answer_late() -> None:
    parts = Parts()
    parts.decode_s = 5
    with pytest.raises(DeadlineError):
        asyncio.run(parts.pipeline().predict_next(FIVE, options(seconds=0.05)))


def test_clients_with_short_deadlines_or_that_hang_up_open_no_breaker() -> None:
    parts = Parts()
    parts.decode_s = 1
    pipeline = parts.pipeline(window=4)

    async def main() -> None:
        for n in range(8):
            with pytest.raises(DeadlineError):
                await pipeline.predict_next([*FIVE, str(n)], options(seconds=0.05))
            hanging = asyncio.ensure_future(pipeline.predict_next([*FIVE, str(n)], options()))
            await asyncio.sleep(0.05)
            hanging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hanging
        assert (await pipeline.predict_next(FIVE, options())).answer.source == "writer"

    asyncio.run(main())
    assert not pipeline.breaker.open
    assert pipeline.breaker.times_opened == 0


@pytest.mark.parametrize("how", ["deadline", "hang up", "patience"])
def test_a_decoder_that_answers_nobody_in_time_opens_the_breaker_however_its_clients_leave(how: str) -> None:
    parts = Parts()
    parts.decode_s = 30
    pipeline = parts.pipeline(patience_s=0.05 if how == "patience" else 60, window=4, max_decode_s=0.1)

    async def main() -> None:
        requests = [options(seconds=2 if how == "deadline" else 60) for _ in range(4)]
        asking = [
            asyncio.ensure_future(pipeline.predict_next([*FIVE, str(n)], w)) for n, w in enumerate(requests)
        ]
        while parts.calls["decode"] < 4:
            await asyncio.sleep(0.01)
        if how == "hang up":
            await asyncio.sleep(0.2)
            for task in asking:
                task.cancel()
        await asyncio.wait(asking)

    asyncio.run(main())
    assert pipeline.breaker.open


def test_large_requests_and_vectors_that_are_no_texts_open_no_breaker() -> None:
    parts = Parts()
    parts.fault = "no language"
    parts.decode_s = 0.15
    pipeline = parts.pipeline(window=4, max_decode_s=0.1)
    vectors = parts.codec.encode_chunks(FIVE).vectors

    async def main() -> None:
        for _ in range(8):
            await pipeline.decode(vectors, time.monotonic() + 10)
            await pipeline.decode(vectors[:1], time.monotonic() + 10, steps=10)
            await pipeline.decode(vectors, time.monotonic() + 10, steps=1, corpus=False)

    asyncio.run(main())
    assert pipeline.breaker.times_opened == 0
    assert parts.calls["decode"] == 8 * 11


def test_exact_decoding_never_answers_from_the_corpus() -> None:
    parts = Parts()
    parts.decoder_lost = True
    vectors = parts.codec.encode_chunks(FIVE[:1]).vectors
    with pytest.raises(UnavailableError):
        asyncio.run(parts.pipeline().decode(vectors, time.monotonic() + 10, steps=1, corpus=False))
    (answer,), _ = asyncio.run(parts.pipeline().decode(vectors, time.monotonic() + 10))
    assert answer.source == "corpus"


def test_a_continuation_reads_what_it_wrote() -> None:
    parts = Parts()
    parts.fault = "refused"

    async def main() -> list[str]:
        return [s.answer.text async for s in parts.pipeline().continue_(FIVE, options(), 2)]

    assert asyncio.run(main()) == parts.near_texts


def test_quality_of_an_answer() -> None:
    context = ["In those days Napoleon crossed the river."]
    good = judge("Then Napoleon burned the bridge over the river.", (), context)
    assert (good.gibberish, good.keyword_hit, good.entity_hit) == (False, True, True)
    bad = judge("the the the the the the", (), context)
    assert (bad.gibberish, bad.keyword_hit, bad.entity_hit) == (True, False, False)
    assert judge("Then Napoleon burned the bridge over the river.", ("no language",), context).gibberish
