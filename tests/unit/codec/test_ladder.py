"""The ladder's rungs, checks and cache, with a codec whose texts are set down per step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from lvm.codec.identity import CodecIdentity
from lvm.codec.ladder import (
    DecodeCache,
    Ladder,
    LadderSettings,
    Nearest,
    bigram_share,
    character_entropy,
    faults,
    keywords,
)
from lvm.errors import InputError

GOOD = "The river flooded the valley and carried the old bridge away."
LOOP = "the old mill by the old mill by the old mill by the old mill"
DIM = 8


def identity(**changes: object) -> CodecIdentity:
    fields = {
        "name": "scripted",
        "encoder_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "pooling": "mean",
        "dense": False,
        "normalized": True,
        "max_tokens": 32,
        "dim": DIM,
    }
    return CodecIdentity(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class Texts:
    texts: list[str]
    cosines: np.ndarray


@dataclass
class ScriptedCodec:
    """Decodes row i of a batch of `len(script)` known vectors to script[i][steps]."""

    script: list[dict[int, str]]
    identity: CodecIdentity = field(default_factory=identity)
    calls: list[tuple[int, int]] = field(default_factory=list)

    @property
    def vectors(self) -> np.ndarray:
        return np.eye(DIM, dtype=np.float32)[: len(self.script)]

    def decode(self, vectors: np.ndarray, steps: int = 0) -> Texts:
        self.calls.append((steps, len(vectors)))
        rows = vectors.argmax(axis=1)
        return Texts([self.script[r][steps] for r in rows], np.full(len(vectors), 0.9, dtype=np.float32))


class OneStepCodec(ScriptedCodec):
    supported_steps = (0,)


def nearest(vectors: np.ndarray) -> Sequence[Nearest]:
    return [Nearest(f"chunk {v.argmax()}", 0.5) for v in vectors]


def test_a_good_text_ends_on_the_first_rung() -> None:
    codec = ScriptedCodec([{1: GOOD}])
    (answer,) = Ladder(codec, nearest).decode(codec.vectors, [GOOD])
    assert (answer.text, answer.rung, answer.reasons) == (GOOD, "steps=1", ())
    assert answer.cosine == pytest.approx(0.9)
    assert codec.calls == [(1, 1)]
    assert set(answer.milliseconds) == {"steps=1"}


def test_only_the_failing_vector_climbs() -> None:
    codec = ScriptedCodec([{1: GOOD}, {1: LOOP, 3: LOOP, 5: GOOD}, {1: LOOP, 3: GOOD}])
    answers = Ladder(codec, nearest).decode(codec.vectors)
    assert [a.rung for a in answers] == ["steps=1", "steps=5", "steps=3"]
    assert codec.calls == [(1, 3), (3, 2), (5, 1)]
    assert [a.refused for a in answers] == [(), (LOOP, LOOP), (LOOP,)]
    assert answers[1].reasons == (
        "steps=1: bigram repetition 29% > 25%",
        "steps=3: bigram repetition 29% > 25%",
    )


def test_the_last_rung_is_the_nearest_chunk_marked_as_extractive() -> None:
    codec = ScriptedCodec([{1: LOOP, 3: LOOP, 5: "aaaa"}])
    (answer,) = Ladder(codec, nearest).decode(codec.vectors)
    assert (answer.text, answer.rung, answer.cosine) == ("chunk 0", "extractive", 0.5)
    assert answer.reasons[-1] == "steps=5: character entropy 0.0 < 2.8 bits"
    assert answer.refused == (LOOP, LOOP, "aaaa")
    assert set(answer.milliseconds) == {"steps=1", "steps=3", "steps=5", "extractive"}


def test_without_an_index_the_last_text_is_given_with_its_own_faults() -> None:
    codec = ScriptedCodec([{1: LOOP, 3: LOOP, 5: LOOP}])
    (answer,) = Ladder(codec).decode(codec.vectors)
    assert (answer.text, answer.rung, len(answer.reasons)) == (LOOP, "steps=5", 3)


def test_a_codec_without_corrector_has_one_decoding_rung() -> None:
    codec = OneStepCodec([{0: LOOP}])
    (answer,) = Ladder(codec, nearest).decode(codec.vectors)
    assert codec.calls == [(0, 1)]
    assert answer.rung == "extractive"


def test_a_text_without_a_keyword_of_its_source_climbs() -> None:
    codec = ScriptedCodec([{1: GOOD, 3: "Copper conducts heat and electricity very well."}])
    (answer,) = Ladder(codec, nearest).decode(codec.vectors, ["Copper is a metal used in wires."])
    assert answer.rung == "steps=3"
    assert answer.reasons == ("steps=1: no keyword shared with the source",)


def test_repeated_vectors_are_decoded_once_and_then_cached() -> None:
    codec = ScriptedCodec([{1: GOOD}])
    ladder = Ladder(codec)
    twice = np.repeat(codec.vectors, 2, axis=0)
    assert [a.cached for a in ladder.decode(twice)] == [False, False]
    assert [a.cached for a in ladder.decode(codec.vectors + 0.0004)] == [True]
    assert codec.calls == [(1, 1)]
    assert (ladder.cache.hits, ladder.cache.misses, ladder.cache.hit_rate) == (1, 1, 0.5)


def test_cache_key_tells_codec_steps_and_third_decimal_apart() -> None:
    vector = np.full(DIM, 0.1, dtype=np.float32)
    same = DecodeCache.key(identity(), vector, 1)
    assert DecodeCache.key(identity(name="other name, same numbers"), vector + 0.0003, 1) == same
    assert DecodeCache.key(identity(pooling="cls"), vector, 1) != same
    assert DecodeCache.key(identity(), vector, 3) != same
    assert DecodeCache.key(identity(), vector + 0.001, 1) != same


def test_full_cache_drops_what_was_used_longest_ago() -> None:
    cache = DecodeCache(2)
    cache.put(b"a", "A", 1.0)
    cache.put(b"b", "B", 1.0)
    assert cache.get(b"a") == ("A", 1.0)
    cache.put(b"c", "C", 1.0)
    assert len(cache) == 2
    assert cache.get(b"b") is None
    assert cache.get(b"a") == ("A", 1.0)


def test_a_cache_of_no_entries_holds_nothing() -> None:
    codec = ScriptedCodec([{1: GOOD}])
    ladder = Ladder(codec, settings=LadderSettings(cache_entries=0))
    ladder.decode(codec.vectors)
    assert [a.cached for a in ladder.decode(codec.vectors)] == [False]


def test_bigram_share_counts_the_most_frequent_repeated_bigram() -> None:
    assert bigram_share("a b c a b d a b") == pytest.approx(3 / 7)
    assert bigram_share("short text") == 0.0
    assert bigram_share("") == 0.0


def test_character_entropy_is_in_bits() -> None:
    assert character_entropy("") == 0.0
    assert character_entropy("abababab") == pytest.approx(1.0)
    assert character_entropy("abcdefgh") == pytest.approx(3.0)
    assert 3.5 < character_entropy(GOOD) < 4.5


def test_keywords_leave_out_function_words_and_case() -> None:
    assert keywords("The River was NOT in Čáslav, 1742.") == {"river", "čáslav", "1742"}


def test_a_source_without_keywords_is_not_held_against_the_text() -> None:
    assert faults(GOOD, "It is.", LadderSettings()) == []
    assert faults(GOOD, None, LadderSettings()) == []


def test_no_vectors_give_no_answers() -> None:
    codec = ScriptedCodec([{1: GOOD}])
    assert Ladder(codec).decode(np.empty((0, DIM), dtype=np.float32)) == []
    assert codec.calls == []


def test_wrong_shapes_are_refused_with_what_was_expected() -> None:
    ladder = Ladder(ScriptedCodec([{1: GOOD}]))
    with pytest.raises(InputError, match=r"shape \(2, 5\), expected \(B, 8\)"):
        ladder.decode(np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(InputError, match="got 1 source texts for 2 vectors"):
        ladder.decode(np.eye(2, DIM, dtype=np.float32), ["one"])


@pytest.mark.parametrize("steps", [(), (3, 1), (1, 1), (-1, 2)])
def test_unordered_rungs_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected ascending numbers"):
        LadderSettings(steps=steps)


class EarlyCodec(ScriptedCodec):
    stops_early = True


def test_a_text_that_no_step_changes_skips_the_rungs_that_would_repeat_it() -> None:
    script = [{0: LOOP, 1: LOOP}, {0: LOOP, 1: LOOP + " a", 3: LOOP + " a"}, {0: LOOP, 1: GOOD}]
    codec = EarlyCodec(script)
    stuck, later, good = Ladder(codec, nearest).decode(codec.vectors, [GOOD] * 3)
    assert codec.calls == [(1, 3), (0, 2), (3, 1)]
    assert (stuck.rung, stuck.text) == ("extractive", "chunk 0")
    assert stuck.reasons[-1] == "steps=1: further steps change nothing"
    assert stuck.refused == (LOOP,)
    assert (later.rung, later.refused) == ("extractive", (LOOP + " a", LOOP + " a"))
    assert later.reasons[-1] == "steps=3: further steps change nothing"
    assert good.rung == "steps=1"


def test_without_an_index_a_text_that_no_step_changes_is_given_where_it_stuck() -> None:
    codec = EarlyCodec([{0: LOOP, 1: LOOP}])
    (answer,) = Ladder(codec).decode(codec.vectors, [GOOD])
    assert (answer.text, answer.rung, answer.refused) == (LOOP, "steps=1", ())
    assert any("bigram" in reason for reason in answer.reasons)
    assert codec.calls == [(1, 1), (0, 1)]
