"""Vectors to readable text: read back if the vector encodes a text, written if not, taken from the corpus if both fail.

A vector goes through the attempts in order; the first accepted text is its answer.

1. *exact*: the codec's decoder reads the text back, with 1, 3 and 5 corrector steps. It is accepted if it encodes to
   the vector again.
2. *writer*: a vector that encodes no actual text (a prediction, a blend, a snap) goes to a language model conditioned
   on it (`lvm.codec.writer`). Of several candidates, the best by likelihood, closeness to the vector and novelty beside
   the context is taken. If the decoder's own text encodes nearer, and reads well, it is kept.
3. *corpus*: the nearest chunk's own words, when the text is not language or repeats itself.

Work proceeds in rounds: each round advances every row one step, whatever its attempt; new rows join between rounds.

Letters: B vectors, C candidates per vector, T context chunks, D vector length.
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
"""Where a text comes from: read back, written, or taken from the corpus."""

STAGES = ("read", "write", "judge", "extract")
"""Keys of `Answer.milliseconds`."""


class Read(Protocol):
    """A vector's text as read back; implemented by `lvm.codec.inverter.Inversion`."""

    @property
    def text(self) -> str: ...
    @property
    def cosine(self) -> float: ...
    @property
    def steps_used(self) -> int: ...
    @property
    def no_text(self) -> bool: ...


class Reading(Protocol):
    """Vectors being read back, in rounds."""

    def __len__(self) -> int: ...
    def read(self, vector: NDArray[np.float32], steps: int, leave_blends: bool) -> int:
        """Add a unit vector (D,); returns its ticket."""

    def drop(self, ticket: int) -> object: ...
    def inside(self) -> Mapping[int, Read]:
        """Current result of each unfinished row, by ticket."""

    def run(self) -> Mapping[int, Read]:
        """Run one round; results of the finished rows, by ticket."""


class Decoder(Protocol):
    """The part of a codec that the ladder needs."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def decoder_digest(self) -> str: ...
    @property
    def supported_steps(self) -> tuple[int, ...] | None: ...
    def reading(self) -> Reading: ...
    def encode_chunks(self, texts: list[str]) -> Any: ...


class Draft(Protocol):
    """A text from a writer."""

    @property
    def text(self) -> str: ...
    @property
    def log_prob(self) -> float: ...


class Drafting(Protocol):
    """Texts being written, in rounds."""

    def __len__(self) -> int: ...
    def add(self, vector: NDArray[np.float32], candidates: int) -> int: ...
    def drop(self, ticket: int) -> object: ...
    def run(self) -> Mapping[int, Sequence[Draft]]: ...


class TextWriter(Protocol):
    """The part of a writer that the ladder needs; implemented by `lvm.codec.writer.Writer`."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def digest(self) -> str: ...
    @property
    def centre(self) -> NDArray[np.float32]:
        """(D,) mean of the corpus vectors."""

    @property
    def least_log_prob(self) -> float:
        """Mean log-probability per character, nats, that 98 % of real chunks reach."""

    @property
    def usual_log_prob(self) -> float:
        """The same for 75 % of real chunks."""

    def drafting(self) -> Drafting: ...
    def log_probs(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Nearest:
    """The corpus chunk nearest to a vector."""

    text: str
    cosine: float
    """Cosine of its vector to the query vector."""


NearestText = Callable[[NDArray[np.float32], Sequence[int]], Sequence[Nearest]]
"""(b, D) vectors and their row numbers in the call (0 to B - 1), to the b nearest chunks."""


@dataclass(frozen=True)
class LadderSettings:
    """When a text is accepted, and how drafts are ranked."""

    steps: tuple[int, ...] = (1, 3, 5)
    """Corrector steps of the exact attempts, ascending; those the codec does not support are skipped."""
    exact_cosine: float = 0.85
    """Minimum round-trip cosine of an exact text. At cosine 0.9 from a text's vector `mini` still finds 92 % of its
    tokens, at 0.8 less than half (codec_mini results)."""
    candidates: int = 1
    """Drafts per vector."""
    likeliness: float = 0.15
    """Weight of a draft's log-probability per character (nats), added to its centred cosine to the vector."""
    novelty: float = 0.3
    """Weight of a draft's maximum centred cosine to a context chunk, subtracted."""
    max_bigram_share: float = 0.25
    """Maximum share of all bigrams for one repeated bigram."""
    min_entropy_bits: float = 2.8
    """Minimum Shannon entropy of the characters, bits per character. English prose has about 4.1."""
    cache_bytes: int = 16 * 2**20
    """Size of the answer cache, bytes; an answer takes about 2 KB."""

    def __post_init__(self) -> None:
        if not self.steps or any(s < 0 for s in self.steps) or list(self.steps) != sorted(set(self.steps)):
            raise InputError(f"ladder steps are {self.steps}; expected ascending numbers of 0 or more")
        if self.cache_bytes < 0:
            raise InputError(f"cache_bytes is {self.cache_bytes}; expected 0 (no cache) or more")
        if self.candidates < 1:
            raise InputError(f"candidates is {self.candidates}; expected 1 or more")


@dataclass(frozen=True)
class Attempt:
    """A refused text."""

    text: str
    source: Source
    steps: int
    """Corrector steps of an exact text."""
    cosine: float
    refusals: tuple[str, ...]
    """Why it was refused."""


@dataclass(frozen=True)
class Answer:
    """One vector's text, its source and the attempts before it."""

    text: str
    source: Source
    cosine: float
    """Cosine to the vector: of the re-encoded text, or of the corpus chunk's vector."""
    steps: int = 0
    """Corrector steps of an exact text."""
    log_prob: float | None = None
    """Mean log-probability per character under the language model, nats; None if not scored."""
    refusals: tuple[str, ...] = ()
    """Why this text was refused, when it is returned for lack of a better one."""
    attempts: tuple[Attempt, ...] = ()
    """Texts refused before this one, in order."""
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)
    """Time this vector spent in each of STAGES; vectors of one round share its time."""
    cached: bool = False
    emergency: str | None = None
    """Why the decoder was bypassed; the text is then from the corpus."""

    @property
    def accepted(self) -> bool:
        """Whether the text was not refused."""
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
    """Words of three letters or more, in lower case, without English function words."""
    return {w for w in _WORD.findall(text.casefold()) if len(w) > 2} - _STOP_WORDS


def bigram_share(text: str) -> float:
    """Share of the most frequent word bigram among all bigrams, 0..1.

    0 when none occurs twice: a text of three words has two bigrams, and neither is a repetition.
    """
    words = _WORD.findall(text.casefold())
    counts = Counter(pairwise(words))
    top = max(counts.values(), default=0)
    return top / (len(words) - 1) if top > 1 else 0.0


def character_entropy(text: str) -> float:
    """Shannon entropy of the text's characters, bits per character; 0 for an empty text."""
    counts = Counter(text)
    return sum(n / len(text) * math.log2(len(text) / n) for n in counts.values())


def faults(text: str, settings: LadderSettings) -> list[str]:
    """Reasons to refuse a text by its repetition and character entropy; empty when there are none."""
    found = []
    share = bigram_share(text)
    if share > settings.max_bigram_share:
        found.append(f"bigram repetition {share:.0%} > {settings.max_bigram_share:.0%}")
    entropy = character_entropy(text)
    if entropy < settings.min_entropy_bits:
        found.append(f"character entropy {entropy:.1f} < {settings.min_entropy_bits} bits")
    return found


def extracted(answer: Answer | None, chunk: Nearest, emergency: str | None = None) -> Answer:
    """The corpus chunk as the answer, in place of a refused one or of none."""
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
    fixed_steps: bool
    """True when the caller asked for a number of steps: the decoder's text is then the answer, good or not."""
    key: bytes
    cache: bool
    reading: int | None = None
    drafting: int | None = None
    read: Attempt | None = None
    """The decoder's text when it does not encode to the vector, kept to compare with drafts."""
    attempts: list[Attempt] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def clock(self, stage: str) -> None:
        """Add the time since the last stage to this one."""
        now = time.perf_counter()
        self.waited[stage] = self.waited.get(stage, 0.0) + (now - self.since) * 1000
        self.since = now


class _NoReading:
    """`Reading` of a codec without a decoder."""

    def __len__(self) -> int:
        return 0

    def read(self, vector: NDArray[np.float32], steps: int, leave_blends: bool) -> int:
        raise InputError("this codec has no decoder; leave out steps")

    def drop(self, ticket: int) -> None: ...

    def inside(self) -> dict[int, Read]:
        return {}

    def run(self) -> dict[int, Read]:
        return {}


class Ladder:
    """Decodes a stream of vectors. Not thread-safe."""

    def __init__(
        self,
        codec: Decoder,
        writer: TextWriter | None = None,
        settings: LadderSettings | None = None,
    ) -> None:
        """Without a writer, a vector that encodes no actual text gets a refused answer. Raises InputError on a writer
        for another codec."""
        if writer is not None and writer.identity.digest != codec.identity.digest:
            raise InputError(f"the writer is for codec {writer.identity}, got {codec.identity}")
        self.settings = settings or LadderSettings()
        self.cache = Cache[Answer](self.settings.cache_bytes)
        self.digest = decoder_digest(codec, writer)
        """Hash of everything but the vector that determines its text, 16 hex digits."""
        supported = codec.supported_steps
        steps = tuple(s for s in self.settings.steps if supported is None or s in supported)
        # Without a corrector the only exact attempt is the hypothesizer's text; without a decoder there is none.
        self.steps: tuple[int, ...] = steps or ((0,) if supported is None or 0 in supported else ())
        """Corrector steps of the exact attempts that this codec supports."""
        self._codec, self._writer = codec, writer
        self._reading: Reading = codec.reading() if self.steps else _NoReading()
        self._drafting = writer.drafting() if writer is not None else None
        self._rows: dict[int, _Row] = {}
        self._next = 0
        self._known: dict[int, Answer] = {}  # answered from the cache, returned by the next `run`

    def __len__(self) -> int:
        """Unfinished rows."""
        return len(self._rows) + len(self._known)

    def add(
        self,
        vector: NDArray[np.float32],
        context: NDArray[np.float32] | None = None,
        steps: int | None = None,
        cache: bool = True,
    ) -> int:
        """Add a unit vector (D,) to the next round; returns its ticket.

        context: (T, D) vectors of the preceding chunks, which the text should not repeat. steps: return the decoder's
        text after exactly this many corrector steps, good or not. Raises InputError on a wrong length or on steps the
        codec does not support.
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
            # Without a writer, a blend takes all steps too: some of its words are better than none.
            leaves = steps is None and self._drafting is not None
            row.reading = self._reading.read(vector, row.steps[-1], leaves)
        else:
            self._draft(row)
        self._rows[ticket] = row
        return ticket

    def drop(self, ticket: int) -> None:
        """Cancel a row."""
        self._known.pop(ticket, None)
        row = self._rows.pop(ticket, None)
        if row is not None and row.reading is not None:
            self._reading.drop(row.reading)
        if row is not None and row.drafting is not None and self._drafting is not None:
            self._drafting.drop(row.drafting)

    def run(self) -> dict[int, Answer]:
        """Run one round; the answers of the finished rows, by ticket."""
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
        """One Answer per row of (B, D) unit vectors, in order.

        contexts: (B, T, D), as in `add`. nearest: finds a chunk for each refused text; without it the refused text is
        the answer. Raises InputError on mismatched shapes.
        """
        dim = self._codec.identity.dim
        if vectors.ndim != 2 or vectors.shape[1] != dim:
            raise InputError(
                f"vectors to decode have shape {vectors.shape}, expected (B, {dim}) for codec {self._codec.identity}; "
                "encode the text with that codec"
            )
        if contexts is not None and len(contexts) != len(vectors):
            raise InputError(
                f"got {len(contexts)} contexts for {len(vectors)} vectors; expected one for each"
            )
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
        """The answer of a row at the end of an exact attempt; None if it continues."""
        reached = [s for s in row.steps if s >= found.steps_used]
        if not done and not found.no_text and (not reached or found.steps_used != reached[0]):
            return None
        steps = found.steps_used if row.fixed_steps or not reached else reached[0]
        row.clock("read")
        wrong = tuple(faults(found.text, self.settings))
        if row.fixed_steps:
            row.reading = None
            return self._leave(row, Answer(found.text, "exact", found.cosine, steps))
        if not found.no_text and found.cosine >= self.settings.exact_cosine:
            # It encodes to the vector again, so it is the text, however odd.
            self._stop_reading(row)
            return self._leave(row, Answer(found.text, "exact", found.cosine, steps))
        why = (
            "no text encodes to this vector"
            if found.no_text
            else f"round-trip cosine {found.cosine:.2f} < {self.settings.exact_cosine}"
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
                f"codec {self._codec.identity} has neither a decoder nor a writer; fit a writer with "
                "`latent train-writer`"
            )
        row.drafting = self._drafting.add(row.vector, self.settings.candidates)

    def _judge(self, finished: Mapping[int, Sequence[Draft]]) -> dict[int, Answer]:
        """Answers of the rows with finished drafts, by ticket."""
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
                found.insert(0, row.read)  # encodes nearer than the best draft: tried first
            ranked.append(found)
        chosen: list[Answer | None] = [None] * len(ours)
        for place in range(max(len(found) for found in ranked)):
            # One text per row at a time: the first is nearly always accepted.
            asked = [i for i, found in enumerate(ranked) if chosen[i] is None and place < len(found)]
            logs = self._writer.log_probs([ranked[i][place].text for i in asked]).tolist() if asked else []
            for i, log in zip(asked, logs, strict=True):
                attempt, row = ranked[i][place], ours[i][1]
                least, wrong = self._writer.least_log_prob, list(attempt.refusals)
                if attempt.source == "exact":
                    least, wrong = self._writer.usual_log_prob, wrong[1:]
                if log < least:
                    wrong.append(f"not language: {log:.2f} nats per character < {least:.2f}")
                answer = Answer(
                    attempt.text, attempt.source, attempt.cosine, attempt.steps, log, tuple(wrong)
                )
                if not wrong or place + 1 == len(ranked[i]):
                    chosen[i] = answer
                elif attempt.source == "writer":  # the decoder's text for a blend was only compared
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
        """Cache key: equal for vectors that agree to three decimals under the same decoder, steps and settings."""
        rounded = np.rint(row.vector * 1000).astype(np.int32).tobytes()
        options = f"{self.digest}/{row.steps if row.fixed_steps else None}/{self.settings}/".encode()
        if row.context is not None and self.settings.candidates > 1 and not row.fixed_steps:
            rounded += np.rint(row.context * 1000).astype(np.int32).tobytes()
        return hashlib.blake2b(options + rounded, digest_size=16).digest()


def decoder_digest(codec: Decoder, writer: TextWriter | None) -> str:
    """Hash of everything that determines a vector's text: encoder, decoder, writer, language model; 16 hex digits."""
    parts = [
        codec.identity.digest,
        codec.decoder_digest,
        writer.digest if writer is not None else "no writer",
    ]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)
