"""The ladder by rounds gives the ladder's answers, with the shipped codec."""

import numpy as np
import pytest

from lvm.codec.inverter import Request, Rounds
from lvm.codec.ladder import DecodeCache, Ladder
from lvm.codec.stream import LadderStream
from lvm.codec.zoo import Codec, load_codec

TEXTS = [
    "The steam engine was first used to pump water out of mines.",
    "Penicillin was found by chance in a London hospital.",
    "Companies learned to grow it in deep stirred tanks.",
]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("mini", precision="float32")


@pytest.fixture(scope="module")
def vectors(codec: Codec) -> np.ndarray:
    """Three texts' own vectors, three blends that no text has, and one of noise."""
    own = codec.encode(TEXTS).vectors
    noise = np.random.default_rng(0).standard_normal((1, own.shape[1])).astype(np.float32)
    mixed = np.concatenate([own, own + own[::-1] + own[[1, 0, 0]], noise])
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def drain(stream: LadderStream) -> dict:
    answers: dict = {}
    for _ in range(50):
        answers |= stream.run()
        if not len(stream):
            return answers
    raise AssertionError("rows never left")


def test_rows_that_join_at_any_time_get_the_ladders_answers(codec: Codec, vectors: np.ndarray) -> None:
    sources = [*TEXTS, *["zebra crossing"] * 4]
    expected = Ladder(codec).decode(vectors, sources)
    stream = LadderStream(codec)
    tickets = [stream.add(v, s) for v, s in zip(vectors[:3], sources[:3], strict=True)]
    answers = stream.run()
    tickets += [stream.add(v, s) for v, s in zip(vectors[3:], sources[3:], strict=True)]
    answers |= drain(stream)
    assert {e.rung for e in expected} != {"steps=1"}  # some climbed, or the test says nothing
    for ticket, want in zip(tickets, expected, strict=True):
        got = answers[ticket]
        assert got.text == want.text
        if not any("further steps change nothing" in reason for reason in got.reasons):
            assert (got.rung, got.refused, got.reasons) == (want.rung, want.refused, want.reasons)
        else:  # the rounds know at once that a row is settled; the ladder needs a rung more to see the same text again
            assert any("further steps change nothing" in reason for reason in want.reasons)
            assert got.reasons[0] == want.reasons[0]
        assert got.cosine == pytest.approx(want.cosine, abs=1e-4)


def test_exactly_so_many_steps_climb_no_further(codec: Codec, vectors: np.ndarray) -> None:
    stream = LadderStream(codec)
    tickets = [stream.add(vectors[3], "zebra", steps=s) for s in (0, 2)]
    answers = drain(stream)
    for ticket, steps in zip(tickets, (0, 2), strict=True):
        assert answers[ticket].rung == f"steps={steps}"
        assert answers[ticket].text == codec.decode(vectors[3:4], steps).texts[0]
        assert any("no keyword" in reason for reason in answers[ticket].reasons)


def test_the_cache_answers_the_same_without_a_round(codec: Codec, vectors: np.ndarray) -> None:
    stream = LadderStream(codec, cache=DecodeCache(100))
    first = [stream.add(v, TEXTS[0]) for v in vectors]
    answers = drain(stream)
    again = [stream.add(v, TEXTS[0]) for v in vectors]
    cached = stream.run()
    for a, b in zip(first, again, strict=True):
        if answers[a].reasons and "further" in answers[a].reasons[-1]:
            continue  # where it stuck is no rung of the cache; it is decoded again
        assert cached[b].cached
        assert (cached[b].text, cached[b].rung) == (answers[a].text, answers[a].rung)
    drain(stream)
    anew = stream.add(vectors[0], TEXTS[0], cache=False)
    assert not drain(stream)[anew].cached


def test_a_dropped_row_leaves_no_answer_and_takes_no_round(codec: Codec, vectors: np.ndarray) -> None:
    stream = LadderStream(codec)
    gone, stays = stream.add(vectors[0], None), stream.add(vectors[1], None)
    stream.drop(gone)
    answers = drain(stream)
    assert set(answers) == {stays}
    assert stream.run() == {}


def test_a_text_that_is_written_again_shares_the_next_rounds_writing(
    codec: Codec, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, blend = vectors[0], vectors[3]
    alone = codec.inverter.invert(np.stack([blend, text]), steps=1)
    written: list[int] = []
    hypothesize = codec.inverter.hypothesize
    monkeypatch.setattr(
        codec.inverter, "hypothesize", lambda v: (written.append(len(v)), hypothesize(v))[1], raising=True
    )
    rounds = Rounds(codec.inverter)
    first = rounds.add(Request(blend, steps=1))
    assert rounds.run() == {}
    assert rounds.inside()[first].steps_used == 0
    second = rounds.add(Request(text, steps=1))
    left = rounds.run()
    assert written == [1, 2]
    assert [left[first], left[second]] == alone
    assert left[first].steps_used == 1
