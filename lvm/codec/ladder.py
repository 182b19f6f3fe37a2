"""Vectors to text that reads: exact where a text is behind the vector, written where none is, found where
neither reads.

A vector goes down a ladder of attempts and leaves at the first that holds.

1. *exact*: the codec's decoder reads the text back, with 1, 3 and 5 corrector steps. The text encodes to the vector
   again, or it is not the text.
2. *writer*: a vector that no text has (a prediction, a blend, a snap) is written by a language model conditioned on it
   (`lvm.codec.writer`). Of several candidates that one is taken which is likeliest, encodes nearest to the vector and
   is no repetition of what was just read. Where the decoder's own text encodes nearer, and reads, it stays.
3. *corpus*: the nearest chunk's own words. A text that is no language, or repeats itself, is refused.

The work goes by rounds: a round takes every row a step, whatever its attempt, and new rows join between two.

Letters: B vectors, C candidates a vector, T context chunks, D vector length.
"""

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lvm.cache import Cache
from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError

Source = Literal["exact", "writer", "corpus"]
"""Where a text comes from: read back, written, or found in the corpus."""

STAGES = ("read", "write", "judge", "extract")
"""Keys of an answer's milliseconds."""


class Read(Protocol):
    """What became of a vector that was read back; `lvm.codec.inverter.Inversion` has it."""

    @property
    def text(self) -> str: ...
    @property
    def cosine(self) -> float: ...
    @property
    def steps_used(self) -> int: ...
    @property
    def no_text(self) -> bool: ...


class Reading(Protocol):
    """Vectors that are being read back, by rounds."""

    def __len__(self) -> int: ...
    def read(self, vector: NDArray[np.float32], steps: int, leave_blends: bool) -> int:
        """Let a unit vector (D,) join; returns its ticket."""

    def drop(self, ticket: int) -> object: ...
    def inside(self) -> Mapping[int, Read]:
        """What each row would leave with now."""

    def run(self) -> Mapping[int, Read]:
        """One round; what left."""


class Decoder(Protocol):
    """What the ladder needs of a codec."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def decoder_digest(self) -> str: ...
    @property
    def supported_steps(self) -> tuple[int, ...] | None: ...
    def reading(self) -> Reading: ...
    def encode_chunks(self, texts: list[str]) -> Any: ...


class Draft(Protocol):
    """A text that a writer wrote."""

    @property
    def text(self) -> str: ...
    @property
    def log_prob(self) -> float: ...


class Drafting(Protocol):
    """Texts that are being written, by rounds."""

    def __len__(self) -> int: ...
    def add(self, vector: NDArray[np.float32], candidates: int) -> int: ...
    def drop(self, ticket: int) -> object: ...
    def run(self) -> Mapping[int, Sequence[Draft]]: ...


class TextWriter(Protocol):
    """What the ladder needs of a writer; `lvm.codec.writer.Writer` has it."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def digest(self) -> str: ...
    @property
    def centre(self) -> NDArray[np.float32]:
        """(D,) mean of the corpus vectors."""

    @property
    def least_log_prob(self) -> float:
        """Mean log-probability a character that 98 % of real chunks have, nats."""

    @property
    def usual_log_prob(self) -> float:
        """The same that 75 % of them have."""

    def drafting(self) -> Drafting: ...
    def log_probs(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Nearest:
    """The corpus chunk nearest to a vector."""

    text: str
    cosine: float
    """Cosine of its vector with the one asked about."""


NearestText = Callable[[NDArray[np.float32], Sequence[int]], Sequence[Nearest]]
"""(b, D) vectors and their numbers in the call (0 to B - 1), to b nearest chunks."""


@dataclass(frozen=True)
class LadderSettings:
    """When a text is good enough, and how one is chosen."""

    steps: tuple[int, ...] = (1, 3, 5)
    """Corrector steps of the exact attempts, in order; those the codec cannot do are left out."""
    exact_cosine: float = 0.85
    """Round-trip cosine from which a text is the vector's own. At cosine 0.9 from a text's vector `mini` still
    finds 92 % of its tokens, at 0.8 less than half (codec_mini results)."""
    candidates: int = 1
    """Texts a writer drafts for a vector."""
    likeliness: float = 0.15
    """Weight of a draft's log-probability a character (nats) beside its centred cosine to the vector."""
    novelty: float = 0.3
    """Weight of a draft's largest centred cosine to a chunk of the context, subtracted."""
    max_bigram_share: float = 0.25
    """Largest share of all bigrams that one repeated bigram may have."""
    min_entropy_bits: float = 2.8
    """Least Shannon entropy of the characters, bits a character. English prose has about 4.1."""
    cache_bytes: int = 16 * 2**20
    """Bytes of answers kept; one takes about 2 KB."""

    def __post_init__(self) -> None:
        if not self.steps or any(s < 0 for s in self.steps) or list(self.steps) != sorted(set(self.steps)):
            raise InputError(f"ladder steps are {self.steps}; expected ascending numbers of 0 or more")
        if self.cache_bytes < 0:
            raise InputError(f"cache_bytes is {self.cache_bytes}; expected 0 (no cache) or more")
        if self.candidates < 1:
            raise InputError(f"candidates is {self.candidates}; expected 1 or more")


@dataclass(frozen=True)
class Attempt:
    """A text that was refused."""

    text: str
    source: Source
    steps: int
    """Corrector steps of an exact text."""
    cosine: float
    refusals: tuple[str, ...]
    """What speaks against it, in words."""


@dataclass(frozen=True)
class Answer:
    """One vector's text and how it came about."""

    text: str
    source: Source
    cosine: float
    """Cosine with the vector: of the text encoded again, or of the extracted chunk's vector."""
    steps: int = 0
    """Corrector steps of an exact text."""
    log_prob: float | None = None
    """Mean log-probability a character under the language model, nats; None where none judged."""
    refusals: tuple[str, ...] = ()
    """What speaks against this text; it was given because there was nothing else."""
    attempts: tuple[Attempt, ...] = ()
    """What was refused before, in order."""
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)
    """What this vector waited for in each of STAGES; vectors of one round wait together."""
    cached: bool = False
    emergency: str | None = None
    """Why the decoder was not asked at all; the text is the corpus' then."""

    @property
    def accepted(self) -> bool:
        """Whether nothing speaks against the text."""
        return not self.refusals


_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(
    _WORD.findall("""
    the and for are but not you all any can had her was one our out has him his how its may now two who
    did too she were with that this from they them their have been which when where what will would could
    should there these those then than some such only into over also more most other about after before
    between during through under while each both many much very own same because however does being upon
    among within without against until since though although still yet per via nor off again further once
    here why few him himself herself itself themselves ours yours theirs whose whom""")
)


def keywords(text: str) -> set[str]:
    """Words of three letters or more that are no English function words, in lower case."""
    return {w for w in _WORD.findall(text.casefold()) if len(w) > 2} - _STOP_WORDS


def bigram_share(text: str) -> float:
    """Share of all word bigrams that the most frequent one has, 0..1.

    0 when none occurs twice: a text of three words has two bigrams, and neither is repetition.
    """
    words = _WORD.findall(text.casefold())
    counts = Counter(pairwise(words))
    top = max(counts.values(), default=0)
    return top / (len(words) - 1) if top > 1 else 0.0


def character_entropy(text: str) -> float:
    """Shannon entropy of the text's characters, bits a character; 0 for an empty text."""
    counts = Counter(text)
    return sum(n / len(text) * math.log2(len(text) / n) for n in counts.values())


def faults(text: str, settings: LadderSettings) -> list[str]:
    """What speaks against a text as it stands, in words; empty when nothing does."""
    found = []
    share = bigram_share(text)
    if share > settings.max_bigram_share:
        found.append(f"bigram repetition {share:.0%} > {settings.max_bigram_share:.0%}")
    entropy = character_entropy(text)
    if entropy < settings.min_entropy_bits:
        found.append(f"character entropy {entropy:.1f} < {settings.min_entropy_bits} bits")
    return found


def extracted(answer: Answer | None, chunk: Nearest, emergency: str | None = None) -> Answer:
    """The corpus chunk's own words, in place of an answer that was refused, or of none."""
    if answer is None:
        return Answer(chunk.text, "corpus", chunk.cosine, emergency=emergency)
    refused = Attempt(answer.text, answer.source, answer.steps, answer.cosine, answer.refusals)
    return Answer(
        chunk.text,
        "corpus",
        chunk.cosine,
        attempts=(*answer.attempts, refused),
        milliseconds=answer.milliseconds,
    )


@dataclass
class _Row:
    vector: NDArray[np.float32]
    context: NDArray[np.float32] | None
    steps: tuple[int, ...]
    exactly: bool
    key: bytes
    cache: bool
    reading: int | None = None
    drafting: int | None = None
    read: Attempt | None = None
    """The decoder's own text where it is not the vector's, kept to compare."""
    attempts: list[Attempt] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def clock(self, stage: str) -> None:
        """Count the time since the last stage to this one."""
        now = time.perf_counter()
        self.waited[stage] = self.waited.get(stage, 0.0) + (now - self.since) * 1000
        self.since = now


class _NoReading:
    """Of a codec that reads nothing back."""

    def __len__(self) -> int:
        return 0

    def read(self, vector: NDArray[np.float32], steps: int, leave_blends: bool) -> int:
        raise InputError("this codec reads no text back; ask for no steps")

    def drop(self, ticket: int) -> None: ...

    def inside(self) -> dict[int, Read]:
        return {}

    def run(self) -> dict[int, Read]:
        return {}


class Ladder:
    """Vectors on their way to texts. One thread uses it."""

    def __init__(
        self,
        codec: Decoder,
        writer: TextWriter | None = None,
        settings: LadderSettings | None = None,
    ) -> None:
        """Without a writer a vector that no text has leaves with a refusal. Raises InputError on another
        codec's writer."""
        if writer is not None and writer.identity.digest != codec.identity.digest:
            raise InputError(f"the writer is for codec {writer.identity}, got {codec.identity}")
        self.settings = settings or LadderSettings()
        self.cache = Cache[Answer](self.settings.cache_bytes)
        self.digest = decoder_digest(codec, writer)
        """What decides the texts beside the vectors: 16 hex digits."""
        supported = codec.supported_steps
        steps = tuple(s for s in self.settings.steps if supported is None or s in supported)
        # A codec without a corrector has one exact attempt: its first text. One without a decoder has none.
        self.steps: tuple[int, ...] = steps or ((0,) if supported is None or 0 in supported else ())
        """Corrector steps of the exact attempts this codec can do."""
        self._codec, self._writer = codec, writer
        self._reading: Reading = codec.reading() if self.steps else _NoReading()
        self._drafting = writer.drafting() if writer is not None else None
        self._rows: dict[int, _Row] = {}
        self._next = 0
        self._known: dict[int, Answer] = {}  # answered from the cache, and waiting for the next `run`

    def __len__(self) -> int:
        """Rows that have not left."""
        return len(self._rows) + len(self._known)

    def add(
        self,
        vector: NDArray[np.float32],
        context: NDArray[np.float32] | None = None,
        steps: int | None = None,
        cache: bool = True,
    ) -> int:
        """Let a unit vector (D,) join at the next round; returns its ticket.

        context: (T, D) vectors of what was just read, which the text should not repeat. steps: the decoder's own text
        after exactly so many, whatever it is. Raises InputError on a wrong length or steps the codec lacks.
        """
        dim = self._codec.identity.dim
        if vector.shape != (dim,):
            raise InputError(
                f"a vector to decode has shape {vector.shape}, expected ({dim},) for codec {self._codec.identity}; "
                "encode the text with that codec"
            )
        ticket = self._next
        self._next += 1
        row = _Row(vector, context, self.steps if steps is None else (steps,), steps is not None, b"", cache)
        row.key = self._key(row)
        held = self.cache.find(row.key) if cache else None
        if held is not None:
            self._known[ticket] = replace(
                held, cached=True, milliseconds=dict.fromkeys(held.milliseconds, 0.0)
            )
            return ticket
        if row.steps:
            # Without a writer a blend is read as well as may be: words of it are more than nothing.
            leaves = steps is None and self._drafting is not None
            row.reading = self._reading.read(vector, row.steps[-1], leaves)
        else:
            self._draft(row)
        self._rows[ticket] = row
        return ticket

    def drop(self, ticket: int) -> None:
        """Forget a row that nobody waits for."""
        self._known.pop(ticket, None)
        row = self._rows.pop(ticket, None)
        if row is not None and row.reading is not None:
            self._reading.drop(row.reading)
        if row is not None and row.drafting is not None and self._drafting is not None:
            self._drafting.drop(row.drafting)

    def run(self) -> dict[int, Answer]:
        """One round; the answers of the rows that left, by ticket."""
        answers, self._known = self._known, {}
        if len(self._reading):
            left = self._reading.run()
            inside = self._reading.inside()
            for ticket, row in list(self._rows.items()):
                if row.reading is None:
                    continue
                done = row.reading in left
                found = left.get(row.reading) or inside.get(row.reading)
                answer = None if found is None else self._read(row, found, done)
                if answer is not None:
                    answers[ticket] = answer
        if self._drafting is not None and len(self._drafting):
            answers |= self._judge(self._drafting.run())
        for ticket, answer in answers.items():
            gone = self._rows.pop(ticket, None)
            if gone is not None and gone.cache:
                self.cache.put(gone.key, answer)
        return answers

    def decode(
        self,
        vectors: NDArray[np.float32],
        contexts: NDArray[np.float32] | None = None,
        nearest: NearestText | None = None,
    ) -> list[Answer]:
        """One Answer a row of (B, D) unit vectors, in order.

        contexts: (B, T, D), as `add` has it. nearest: gives a chunk for what was refused; without it the refused text
        itself is the answer. Raises InputError when shapes do not fit.
        """
        dim = self._codec.identity.dim
        if vectors.ndim != 2 or vectors.shape[1] != dim:
            raise InputError(
                f"vectors to decode have shape {vectors.shape}, expected (B, {dim}) for codec {self._codec.identity}; "
                "encode the text with that codec"
            )
        if contexts is not None and len(contexts) != len(vectors):
            raise InputError(f"got {len(contexts)} contexts for {len(vectors)} vectors; expected as many")
        # Equal rows are decoded once.
        first: dict[bytes, int] = {}
        tickets: list[int] = []
        for i, vector in enumerate(vectors):
            context = None if contexts is None else contexts[i]
            key = vector.tobytes() + (b"" if context is None else context.tobytes())
            if key not in first:
                first[key] = self.add(vector, context)
            tickets.append(first[key])
        done: dict[int, Answer] = {}
        while len(self):
            done |= self.run()
        answers = [done[ticket] for ticket in tickets]
        refused = [i for i, a in enumerate(answers) if not a.accepted]
        if refused and nearest is not None:
            begun = time.perf_counter()
            chunks = nearest(vectors[refused], refused)
            took = (time.perf_counter() - begun) * 1000
            for i, chunk in zip(refused, chunks, strict=True):
                answer = extracted(answers[i], chunk)
                answers[i] = replace(answer, milliseconds={**answer.milliseconds, "extract": took})
        return answers

    # ------------------------------------------------------------------------------------------------ attempts

    def _read(self, row: _Row, found: Read, done: bool) -> Answer | None:
        """The answer of a row that has come to an exact attempt; None where it goes on."""
        reached = [s for s in row.steps if s >= found.steps_used]
        if not done and not found.no_text and (not reached or found.steps_used != reached[0]):
            return None
        steps = found.steps_used if row.exactly or not reached else reached[0]
        row.clock("read")
        wrong = tuple(faults(found.text, self.settings))
        if row.exactly:
            row.reading = None
            return self._leave(row, Answer(found.text, "exact", found.cosine, steps))
        if not found.no_text and found.cosine >= self.settings.exact_cosine:
            # It encodes to the vector again: it is the text, odd as it may read.
            self._stop_reading(row)
            return self._leave(row, Answer(found.text, "exact", found.cosine, steps))
        why = (
            "no text encodes to this vector"
            if found.no_text
            else f"encodes at cosine {found.cosine:.2f} only"
        )
        if found.text and not found.no_text:
            row.read = Attempt(found.text, "exact", steps, found.cosine, (why, *wrong))
        if self._drafting is not None:
            self._stop_reading(row)
            self._draft(row)
            return None
        if not done and not found.no_text:
            if row.read is not None:
                row.attempts.append(row.read)
            return None
        self._stop_reading(row)
        return self._leave(row, Answer(found.text, "exact", found.cosine, steps, refusals=(why, *wrong)))

    def _stop_reading(self, row: _Row) -> None:
        if row.reading is not None:
            self._reading.drop(row.reading)
            row.reading = None

    def _draft(self, row: _Row) -> None:
        if self._drafting is None:
            raise InputError(
                f"codec {self._codec.identity} has no decoder and there is no writer for it; fit one with "
                "`latent train-writer`"
            )
        row.drafting = self._drafting.add(row.vector, self.settings.candidates)

    def _judge(self, finished: Mapping[int, Sequence[Draft]]) -> dict[int, Answer]:
        """Answers of the rows whose drafts are finished, by ticket."""
        assert self._writer is not None
        ours = [(t, r) for t, r in self._rows.items() if r.drafting in finished]
        if not ours:
            return {}
        centre, settings = self._writer.centre, self.settings
        for _, row in ours:
            row.clock("write")
        drafts = [list(finished[row.drafting]) for _, row in ours if row.drafting is not None]
        texts = [d.text for some in drafts for d in some]
        vectors = _unit(np.asarray(self._codec.encode_chunks([t or " " for t in texts]).vectors, np.float32))
        ranked: list[list[Attempt]] = []
        at = 0
        for (_, row), some in zip(ours, drafts, strict=True):
            own = vectors[at : at + len(some)]
            at += len(some)
            plain = own @ row.vector
            centred = _unit(own - centre)
            score = centred @ _unit(row.vector - centre)
            score = score + settings.likeliness * np.array([d.log_prob for d in some], np.float32)
            if row.context is not None:
                score = score - settings.novelty * (centred @ _unit(row.context - centre).T).max(1)
            order = np.argsort(-score, kind="stable")
            found = [
                Attempt(some[i].text, "writer", 0, float(plain[i]), tuple(faults(some[i].text, settings)))
                for i in order
            ]
            if row.read is not None and row.read.cosine > found[0].cosine:
                found.insert(0, row.read)  # in between: whichever encodes nearer, if it reads
            ranked.append(found)
        chosen: list[Answer | None] = [None] * len(ours)
        for place in range(max(len(found) for found in ranked)):
            # One text a row at a time: nearly always the first one holds.
            asked = [i for i, found in enumerate(ranked) if chosen[i] is None and place < len(found)]
            logs = self._writer.log_probs([ranked[i][place].text for i in asked]).tolist() if asked else []
            for i, log in zip(asked, logs, strict=True):
                attempt, row = ranked[i][place], ours[i][1]
                least, wrong = self._writer.least_log_prob, list(attempt.refusals)
                if attempt.source == "exact":
                    least, wrong = self._writer.usual_log_prob, wrong[1:]
                if log < least:
                    wrong.append(f"no language: {log:.2f} nats a character < {least:.2f}")
                answer = Answer(
                    attempt.text, attempt.source, attempt.cosine, attempt.steps, log, tuple(wrong)
                )
                if not wrong or place + 1 == len(ranked[i]):
                    chosen[i] = answer
                elif (
                    attempt.source == "writer"
                ):  # the decoder's words for a blend were there to compare, no answer
                    row.attempts.append(replace(attempt, refusals=tuple(wrong)))
        answers: dict[int, Answer] = {}
        for (ticket, row), best in zip(ours, chosen, strict=True):
            assert best is not None
            row.clock("judge")
            answers[ticket] = self._leave(row, best)
        return answers

    def _leave(self, row: _Row, answer: Answer) -> Answer:
        return replace(answer, attempts=tuple(row.attempts), milliseconds=row.waited)

    def _key(self, row: _Row) -> bytes:
        """The same for vectors that agree to three decimals, under one decoder and one wish."""
        rounded = np.rint(row.vector * 1000).astype(np.int32).tobytes()
        wish = f"{self.digest}/{row.steps if row.exactly else None}/{self.settings}/".encode()
        if row.context is not None and self.settings.candidates > 1 and not row.exactly:
            rounded += np.rint(row.context * 1000).astype(np.int32).tobytes()
        return hashlib.blake2b(wish + rounded, digest_size=16).digest()


def decoder_digest(codec: Decoder, writer: TextWriter | None) -> str:
    """16 hex digits over all that decides a vector's text: encoder, decoder, writer and language model."""
    parts = [
        codec.identity.digest,
        codec.decoder_digest,
        writer.digest if writer is not None else "no writer",
    ]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)
