"""The ladder's attempts, choices and cache, with a codec and a writer whose texts are set down beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from lvm.codec.identity import CodecIdentity
from lvm.codec.ladder import (
    Attempt,
    Ladder,
    LadderSettings,
    Nearest,
    bigram_share,
    character_entropy,
    ends_sentence,
    extracted,
    faults,
    keywords,
    opens_sentence,
)
from lvm.errors import InputError

GOOD = "The river flooded the valley and carried the old bridge away."
LOOP = "the old mill by the old mill by the old mill by the old mill"
SALAD = "colourless of ideas furiously the sleep and bridge was to"
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


@dataclass(frozen=True)
class Read:
    text: str
    cosine: float
    steps_used: int
    no_text: bool = False


@dataclass
class Encoded:
    vectors: np.ndarray


@dataclass
class ScriptedCodec:
    """Vector i (a unit axis) is read as script[i], one entry a round; texts encode to what `known` says."""

    script: list[list[Read]]
    known: dict[str, np.ndarray] = field(default_factory=dict)
    identity: CodecIdentity = field(default_factory=identity)
    decoder_digest: str = "decoder one"
    supported_steps: tuple[int, ...] | None = None
    asked: list[tuple[int, int, bool]] = field(default_factory=list)
    """(vector, steps, leave_blends) of each that was read."""

    @property
    def vectors(self) -> np.ndarray:
        return np.eye(DIM, dtype=np.float32)[: len(self.script)]

    def reading(self) -> "ScriptedReading":
        return ScriptedReading(self)

    def encode_chunks(self, texts: list[str]) -> Encoded:
        return Encoded(np.stack([self.known.get(t, np.full(DIM, 0.1)) for t in texts]).astype(np.float32))


class ScriptedReading:
    def __init__(self, codec: ScriptedCodec) -> None:
        self._codec = codec
        self._rows: dict[int, tuple[int, int]] = {}
        self._inside: dict[int, Read] = {}
        self.rounds = 0

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, vector: np.ndarray, steps: int, leave_blends: bool) -> int:
        ticket = len(self._codec.asked)
        self._codec.asked.append((int(vector.argmax()), steps, leave_blends))
        self._rows[ticket] = (int(vector.argmax()), 0)
        return ticket

    def drop(self, ticket: int) -> None:
        self._rows.pop(ticket, None)
        self._inside.pop(ticket, None)

    def inside(self) -> Mapping[int, Read]:
        return dict(self._inside)

    def run(self) -> Mapping[int, Read]:
        self.rounds += 1
        left: dict[int, Read] = {}
        for ticket, (row, place) in list(self._rows.items()):
            found = self._codec.script[row][place]
            if place + 1 == len(self._codec.script[row]):
                left[ticket] = found
                self.drop(ticket)
            else:
                self._inside[ticket] = found
                self._rows[ticket] = (row, place + 1)
        return left


@dataclass(frozen=True)
class Draft:
    text: str
    log_prob: float = -0.5


@dataclass
class ScriptedWriter:
    """Writes drafts[i] for vector i; texts in `odd` are no language."""

    drafts: dict[int, list[Draft]]
    odd: dict[str, float] = field(default_factory=dict)
    identity: CodecIdentity = field(default_factory=identity)
    digest: str = "writer one"
    least_log_prob: float = -2.5
    usual_log_prob: float = -1.5
    judged: list[list[str]] = field(default_factory=list)

    @property
    def centre(self) -> np.ndarray:
        return np.zeros(DIM, np.float32)

    def drafting(self) -> "ScriptedDrafting":
        return ScriptedDrafting(self)

    def log_probs(self, texts: Sequence[str]) -> np.ndarray:
        self.judged.append(list(texts))
        return np.array([self.odd.get(t, -1.0) for t in texts], np.float32)


class ScriptedDrafting:
    def __init__(self, writer: ScriptedWriter) -> None:
        self._writer = writer
        self._waiting: dict[int, list[Draft]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, vector: np.ndarray, candidates: int) -> int:
        self._next += 1
        self._waiting[self._next] = self._writer.drafts[int(vector.argmax())][:candidates]
        return self._next

    def drop(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)

    def run(self) -> Mapping[int, Sequence[Draft]]:
        done, self._waiting = self._waiting, {}
        return done


def nearest(vectors: np.ndarray, rows: Sequence[int]) -> list[Nearest]:
    return [Nearest(f"chunk {v.argmax()} for {row}", 0.5) for v, row in zip(vectors, rows, strict=True)]


def axis(number: int, share: float = 1.0) -> np.ndarray:
    """A vector whose cosine to axis `number` is `share`."""
    out = np.zeros(DIM, np.float32)
    out[number], out[-1] = share, np.sqrt(1 - share**2)
    return out


BLEND = [Read("", -2.0, 0, no_text=True)]


def test_a_text_that_encodes_to_the_vector_again_is_exact_odd_as_it_may_read() -> None:
    codec = ScriptedCodec([[Read(GOOD, 0.99, 1)], [Read(LOOP, 0.97, 1)]])
    for answer, text in zip(Ladder(codec).decode(codec.vectors, nearest=nearest), (GOOD, LOOP), strict=True):
        assert (answer.text, answer.source, answer.steps, answer.accepted) == (text, "exact", 1, True)
    assert [a[1] for a in codec.asked] == [5, 5]


def test_an_exact_text_may_come_at_a_later_attempt_and_the_row_leaves_there() -> None:
    rounds = [Read(SALAD, 0.4, 1), Read(SALAD, 0.5, 2), Read(GOOD, 0.95, 3), Read("never seen", 1.0, 5)]
    codec = ScriptedCodec([rounds])
    (answer,) = Ladder(codec).decode(codec.vectors)
    assert (answer.text, answer.steps) == (GOOD, 3)
    assert [(a.text, a.steps, a.refusals) for a in answer.attempts] == [
        (SALAD, 1, ("round-trip cosine 0.40 < 0.85",))
    ]


def test_a_vector_that_no_text_has_is_written() -> None:
    codec = ScriptedCodec([BLEND])
    (answer,) = Ladder(codec, ScriptedWriter({0: [Draft(GOOD)]})).decode(codec.vectors)
    assert (answer.text, answer.source, answer.log_prob, answer.attempts) == (GOOD, "writer", -1.0, ())
    assert codec.asked == [(0, 5, True)]


def test_without_a_writer_the_corpus_answers_and_the_refused_text_is_kept() -> None:
    codec = ScriptedCodec([[Read(SALAD, 0.3, 1, no_text=True)]])
    (answer,) = Ladder(codec).decode(codec.vectors, nearest=nearest)
    assert (answer.text, answer.source, answer.cosine) == ("chunk 0 for 0", "corpus", 0.5)
    assert answer.attempts == (Attempt(SALAD, "exact", 1, 0.3, ("no text encodes to this vector",)),)
    assert codec.asked == [(0, 5, False)]
    assert set(answer.milliseconds) == {"read", "extract"}


def test_without_writer_and_corpus_the_refused_text_is_given_with_what_speaks_against_it() -> None:
    codec = ScriptedCodec([[Read(LOOP, 0.3, 1)]])
    (answer,) = Ladder(codec).decode(codec.vectors)
    assert (answer.text, answer.accepted) == (LOOP, False)
    assert answer.refusals == ("round-trip cosine 0.30 < 0.85", "bigram repetition 29% > 25%")


def test_of_the_drafts_the_likeliest_nearest_and_newest_is_taken() -> None:
    far, near, unlikely, said = (
        f"A text that is {w}." for w in ("far away", "near it", "unlikely", "said before")
    )
    drafts = [Draft(far), Draft(near), Draft(unlikely, -6.0), Draft(said)]
    before = np.zeros(DIM, np.float32)
    before[[0, 3]] = 0.75, np.sqrt(1 - 0.75**2)
    known = {far: axis(0, 0.2), near: axis(0, 0.6), unlikely: axis(0, 0.7), said: before}
    codec = ScriptedCodec([BLEND], known)
    writer = ScriptedWriter({0: drafts})
    for candidates, context, expected in (
        (1, None, far),
        (3, None, near),
        (4, None, said),
        (4, before[None, None], near),
    ):
        ladder = Ladder(codec, writer, LadderSettings(candidates=candidates))
        (answer,) = ladder.decode(codec.vectors, context)
        assert answer.text == expected
        assert answer.cosine == pytest.approx(float(known[expected][0]))


def test_a_draft_opens_a_sentence_where_the_context_has_ended_one() -> None:
    opening, going_on = "The river rose again.", "and the river rose again."
    known = {opening: axis(0, 0.60), going_on: axis(0, 0.61)}
    codec = ScriptedCodec([BLEND], known)
    ladder = Ladder(
        codec, ScriptedWriter({0: [Draft(opening), Draft(going_on)]}), LadderSettings(candidates=2)
    )
    for opens, expected in ((True, opening), (False, going_on), (None, going_on)):
        given = None if opens is None else [opens]
        for _ in range(2):  # the second from the cache
            (answer,) = ladder.decode(codec.vectors, opens=given)
            assert answer.text == expected


@pytest.mark.parametrize(
    ("text", "ends", "opens"),
    [
        ("He left.", True, True),
        ('He said: "Go!"', True, True),
        ("(it was late.)", True, False),
        ("who left in May,", False, False),
        ("1912 was dry", False, True),
        ("彼は行った。", True, True),
        ("...", True, False),
    ],
)
def test_where_a_sentence_ends_and_opens(text: str, ends: bool, opens: bool) -> None:
    assert (ends_sentence(text), opens_sentence(text)) == (ends, opens)


def test_a_draft_that_is_no_language_or_repeats_is_refused_and_the_next_one_judged() -> None:
    known = {SALAD: axis(0, 0.9), LOOP: axis(0, 0.8), GOOD: axis(0, 0.3)}
    codec = ScriptedCodec([BLEND], known)
    writer = ScriptedWriter({0: [Draft(SALAD), Draft(LOOP), Draft(GOOD)]}, odd={SALAD: -3.1})
    (answer,) = Ladder(codec, writer, LadderSettings(candidates=3)).decode(codec.vectors, nearest=nearest)
    assert (answer.text, answer.source) == (GOOD, "writer")
    assert [a.refusals for a in answer.attempts] == [
        ("not language: -3.10 nats per character < -2.50",),
        ("bigram repetition 29% > 25%",),
    ]
    assert writer.judged == [[SALAD], [LOOP], [GOOD]]


def test_where_no_draft_reads_the_corpus_answers() -> None:
    codec = ScriptedCodec([BLEND])
    writer = ScriptedWriter({0: [Draft(SALAD)]}, odd={SALAD: -3.1})
    (answer,) = Ladder(codec, writer).decode(codec.vectors, nearest=nearest)
    assert (answer.source, answer.attempts[0].text) == ("corpus", SALAD)
    (alone,) = Ladder(codec, writer).decode(codec.vectors)
    assert (alone.text, alone.accepted) == (SALAD, False)


@pytest.mark.parametrize(
    ("likely", "cosine", "expected"),
    [(-1.0, 0.8, "exact"), (-1.6, 0.8, "writer"), (-1.0, 0.5, "writer")],
)
def test_in_between_stands_whichever_encodes_nearer_if_it_reads(
    likely: float, cosine: float, expected: str
) -> None:
    codec = ScriptedCodec([[Read(SALAD, cosine, 1), Read(SALAD, cosine, 5)]], {GOOD: axis(0, 0.6)})
    writer = ScriptedWriter({0: [Draft(GOOD)]}, odd={SALAD: likely})
    (answer,) = Ladder(codec, writer).decode(codec.vectors)
    assert answer.source == expected


def test_exactly_so_many_steps_give_the_decoders_own_text_whatever_it_is() -> None:
    codec = ScriptedCodec([[Read("first", 0.1, 0), Read(LOOP, 0.2, 2)]])
    ladder = Ladder(codec, ScriptedWriter({0: [Draft(GOOD)]}))
    ticket = ladder.add(codec.vectors[0], steps=2)
    assert ladder.run() == {}
    answer = ladder.run()[ticket]
    assert (answer.text, answer.source, answer.steps, answer.accepted) == (LOOP, "exact", 2, True)
    assert codec.asked == [(0, 2, False)]


def test_a_codec_without_a_decoder_writes_every_vector_and_needs_a_writer() -> None:
    codec = ScriptedCodec([BLEND], supported_steps=())
    (answer,) = Ladder(codec, ScriptedWriter({0: [Draft(GOOD)]})).decode(codec.vectors)
    assert (answer.source, codec.asked) == ("writer", [])
    with pytest.raises(InputError, match="has neither a decoder nor a writer"):
        Ladder(codec).decode(codec.vectors)


def test_rows_join_at_any_round_and_a_dropped_one_leaves_no_answer() -> None:
    codec = ScriptedCodec(
        [[Read(SALAD, 0.2, 1), Read(GOOD, 0.9, 5)], [Read(GOOD, 0.9, 1)], [Read(GOOD, 0.9, 1)]]
    )
    ladder = Ladder(codec)
    first = ladder.add(codec.vectors[0])
    assert ladder.run() == {}
    second, gone = ladder.add(codec.vectors[1]), ladder.add(codec.vectors[2])
    ladder.drop(gone)
    assert set(ladder.run()) == {first, second}
    assert len(ladder) == 0


def test_a_known_answer_comes_from_the_cache_and_only_for_the_same_decoder() -> None:
    codec = ScriptedCodec([[Read(GOOD, 0.99, 1)]])
    ladder = Ladder(codec)
    twice = np.repeat(codec.vectors, 2, axis=0)
    assert [a.cached for a in ladder.decode(twice)] == [False, False]
    assert len(codec.asked) == 1  # equal rows are read once
    (again,) = ladder.decode(codec.vectors + 0.0004)
    assert (again.cached, again.text) == (True, GOOD)
    assert (ladder.cache.hits, ladder.cache.misses) == (1, 1)
    ladder.add(codec.vectors[0], cache=False)
    assert [a.cached for a in ladder.run().values()] == [False]
    other = Ladder(ScriptedCodec([[Read(GOOD, 0.99, 1)]], decoder_digest="decoder two"))
    assert other.digest != ladder.digest
    assert Ladder(codec, ScriptedWriter({})).digest != ladder.digest


def test_a_cache_of_no_bytes_holds_nothing() -> None:
    codec = ScriptedCodec([[Read(GOOD, 0.99, 1)]])
    ladder = Ladder(codec, settings=LadderSettings(cache_bytes=0))
    ladder.decode(codec.vectors)
    assert [a.cached for a in ladder.decode(codec.vectors)] == [False]


def test_an_extract_says_why_the_decoder_was_not_asked() -> None:
    answer = extracted(None, Nearest("found", 0.4), "breaker open")
    assert (answer.text, answer.source, answer.emergency, answer.attempts) == (
        "found",
        "corpus",
        "breaker open",
        (),
    )


def test_another_codecs_writer_is_refused() -> None:
    with pytest.raises(InputError, match="the writer is for codec"):
        Ladder(ScriptedCodec([BLEND]), ScriptedWriter({}, identity=identity(pooling="cls")))


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


def test_a_missing_keyword_speaks_against_no_text() -> None:
    assert faults("Copper conducts heat and electricity very well.", LadderSettings()) == []


def test_no_vectors_give_no_answers() -> None:
    codec = ScriptedCodec([])
    assert Ladder(codec).decode(np.empty((0, DIM), dtype=np.float32)) == []


def test_wrong_shapes_are_refused_with_what_was_expected() -> None:
    ladder = Ladder(ScriptedCodec([[Read(GOOD, 1.0, 1)]]))
    with pytest.raises(InputError, match=r"shape \(2, 5\), expected \(B, 8\)"):
        ladder.decode(np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(InputError, match=r"shape \(5,\), expected \(8,\)"):
        ladder.add(np.zeros(5, dtype=np.float32))
    with pytest.raises(InputError, match="got 1 contexts for 2 vectors"):
        ladder.decode(np.eye(2, DIM, dtype=np.float32), np.zeros((1, 5, DIM), np.float32))


@pytest.mark.parametrize("steps", [(), (3, 1), (1, 1), (-1, 2)])
def test_unordered_steps_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected ascending numbers"):
        LadderSettings(steps=steps)
