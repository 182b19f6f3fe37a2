"""Decoding with fallbacks: each vector gets the first acceptable text of up to three attempts.

1. *exact*: the codec's decoder inverts the vector, with 1, 3 and 5 corrector steps. The text is accepted if it encodes
   to nearly the same vector.
2. *writer*: a vector that encodes no actual text (a prediction, a blend, a snap) goes to a language model conditioned
   on it (`lvm.codec.writer`). Its drafts are ranked by likelihood, closeness to the vector and difference from the
   context. The decoder's text is preferred if it encodes closer to the vector and the language model finds it likely.
3. *corpus*: the text of the nearest corpus chunk, if all others were refused.

Work proceeds in rounds: a round advances every row by one step of its attempt; new rows join between rounds.

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
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lvm.cache import Cache
from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.inverter import Inversion, Rounds
    from lvm.codec.writing import WritingRounds, Written

Floats = NDArray[np.float32]

Source = Literal["exact", "writer", "corpus"]
"""The attempt that gave a text."""

STAGES = ("read", "write", "judge", "extract")
"""Keys of `Answer.milliseconds`."""


class Decoder(Protocol):
    """The part of a codec that the ladder needs; implemented by `lvm.codec.zoo.Codec`."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def decoder_digest(self) -> str: ...
    @property
    def supported_steps(self) -> tuple[int, ...] | None: ...
    def reading(self) -> "Rounds": ...
    def encode_chunks(self, texts: list[str]) -> Any: ...


class TextWriter(Protocol):
    """The part of a writer that the ladder needs; implemented by `lvm.codec.writer.Writer`."""

    @property
    def identity(self) -> CodecIdentity: ...
    @property
    def digest(self) -> str: ...
    @property
    def centre(self) -> Floats: ...
    @property
    def least_log_prob(self) -> float: ...
    @property
    def usual_log_prob(self) -> float: ...
    def drafting(self) -> "WritingRounds": ...
    def log_probs(self, texts: Sequence[str]) -> Floats: ...


@dataclass(frozen=True)
class Nearest:
    """The corpus chunk nearest to a vector."""

    text: str
    cosine: float
    """Cosine between its vector and the query."""


NearestText = Callable[[Floats, Sequence[int]], Sequence[Nearest]]
"""Called with (N, D) vectors and their N row numbers in the batch (0 to B - 1); returns the nearest chunk of each."""


@dataclass(frozen=True)
class LadderSettings:
    """Acceptance thresholds and the ranking of drafts."""

    steps: tuple[int, ...] = (1, 3, 5)
    """Corrector steps of the exact attempts, ascending; those the codec does not support are skipped."""
    exact_cosine: float = 0.85
    """Minimum round-trip cosine of an exact text. With noise that leaves a cosine of 0.9, `mini` still finds 92 % of
    the tokens; at 0.8, less than half (codec_mini results)."""
    candidates: int = 1
    """Drafts per vector."""
    likeliness: float = 0.15
    """Weight of the log-probability per character (nats), added to the draft's centred cosine to the vector."""
    novelty: float = 0.3
    """Weight of the maximum centred cosine to a context chunk, subtracted."""
    opening: float = 0.1
    """Added if a draft opens a sentence where the context has ended one, or goes on where it has not."""
    max_bigram_share: float = 0.25
    """Maximum share of one bigram among all bigrams."""
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
    """Why this text was refused, if it is returned only because there was no better one."""
    attempts: tuple[Attempt, ...] = ()
    """Texts refused before this one, in order."""
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)
    """Time in each of STAGES; every vector of a round counts the whole round."""
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
    """The corpus chunk as the answer, in place of a refused answer or, with `emergency`, of none."""
    if answer is None:
        return Answer(chunk.text, "corpus", chunk.cosine, emergency=emergency)
    refused = Attempt(answer.text, answer.source, answer.steps, answer.cosine, answer.refusals)
    attempts = (*answer.attempts, refused)
    return Answer(chunk.text, "corpus", chunk.cosine, attempts=attempts, milliseconds=answer.milliseconds)


@dataclass
class _Row:
    vector: Floats
    context: Floats | None
    opens: bool | None
    steps: tuple[int, ...]
    fixed_steps: bool
    """True if the caller set the number of steps: the decoder's text is then the answer, however bad."""
    key: bytes
    cache: bool
    reading: int | None = None
    """Ticket in the decoder's rounds."""
    drafting: int | None = None
    """Ticket in the writer's rounds."""
    decoded: Attempt | None = None
    """The decoder's text if its round-trip cosine is too low, to compare with drafts."""
    attempts: list[Attempt] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def clock(self, stage: str) -> None:
        """Count the time since the last call, or the start, for this stage."""
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + (now - self.since) * 1000
        self.since = now


class Ladder:
    """Decodes a stream of vectors. Not thread-safe."""

    def __init__(
        self, codec: Decoder, writer: TextWriter | None = None, settings: LadderSettings | None = None
    ) -> None:
        """Without a writer, the answer for a vector that encodes no actual text is a refused one. Raises InputError on
        a writer for another codec."""
        if writer is not None and writer.identity.digest != codec.identity.digest:
            raise InputError(f"the writer is for codec {writer.identity}, got {codec.identity}")
        self.settings = settings or LadderSettings()
        self.cache = Cache[Answer](self.settings.cache_bytes)
        self.digest = decoder_digest(codec, writer)
        """`decoder_digest` of codec and writer."""
        supported = codec.supported_steps
        steps = tuple(s for s in self.settings.steps if supported is None or s in supported)
        # Without a corrector there is one exact attempt, the hypothesizer's text; without a decoder there is none.
        self.steps: tuple[int, ...] = steps or ((0,) if supported is None or 0 in supported else ())
        """Corrector steps of the exact attempts that this codec supports."""
        self._codec, self._writer = codec, writer
        self._reading = codec.reading() if self.steps else None
        self._drafting = writer.drafting() if writer is not None else None
        self._rows: dict[int, _Row] = {}
        self._next = 0
        self._cached: dict[int, Answer] = {}  # to be returned by the next `run`

    def __len__(self) -> int:
        """Unfinished rows."""
        return len(self._rows) + len(self._cached)

    def add(
        self,
        vector: Floats,
        context: Floats | None = None,
        steps: int | None = None,
        cache: bool = True,
        opens: bool | None = None,
    ) -> int:
        """Add a unit vector (D,) to the next round; returns its ticket.

        context: (T, D) vectors of the preceding chunks, which the text should not repeat. steps: return the decoder's
        text after this many corrector steps, however bad. cache: look up and store the answer in the cache. opens: if
        known, whether the text should open a sentence (`ends_sentence` of the chunk before). Raises InputError on a
        wrong length or on steps the codec does not support.
        """
        dim = self._codec.identity.dim
        if vector.shape != (dim,):
            raise InputError(
                f"a vector to decode has shape {vector.shape}, expected ({dim},) for codec {self._codec.identity}; "
                "encode the text with that codec"
            )
        ticket = self._next
        self._next += 1
        row = _Row(
            vector, context, opens, self.steps if steps is None else (steps,), steps is not None, b"", cache
        )
        row.key = self._key(row)
        known = self.cache.find(row.key) if cache else None
        if known is not None:
            no_time = dict.fromkeys(known.milliseconds, 0.0)
            self._cached[ticket] = replace(known, cached=True, milliseconds=no_time)
            return ticket
        if not row.steps:
            self._draft(row)
        elif self._reading is None:
            raise InputError("this codec has no decoder; leave out steps")
        else:
            # Without a writer, even a blend takes all steps: some of its words are better than none.
            leave_blends = steps is None and self._drafting is not None
            row.reading = self._reading.read(vector, row.steps[-1], leave_blends)
        self._rows[ticket] = row
        return ticket

    def drop(self, ticket: int) -> None:
        """Cancel a row."""
        self._cached.pop(ticket, None)
        row = self._rows.pop(ticket, None)
        if row is not None:
            self._stop_reading(row)
            if row.drafting is not None and self._drafting is not None:
                self._drafting.drop(row.drafting)

    def run(self) -> dict[int, Answer]:
        """Run one round; returns the answers of the finished rows, by ticket."""
        answers, self._cached = self._cached, {}
        if self._reading:
            finished = self._reading.run()
            unfinished = self._reading.inside()
            for ticket, row in list(self._rows.items()):
                if row.reading is None:
                    continue
                result = finished.get(row.reading) or unfinished.get(row.reading)
                done = row.reading in finished
                if result is not None and (answer := self._check_decoded(row, result, done)) is not None:
                    answers[ticket] = answer
        if self._drafting:
            answers |= self._judge(self._drafting.run())
        for ticket, answer in answers.items():
            finished_row = self._rows.pop(ticket, None)
            if finished_row is not None and finished_row.cache:
                self.cache.put(finished_row.key, answer)
        return answers

    def decode(
        self,
        vectors: Floats,
        contexts: Floats | None = None,
        nearest: NearestText | None = None,
        opens: Sequence[bool] | None = None,
    ) -> list[Answer]:
        """One Answer per row of (B, D) unit vectors, in order.

        contexts: (B, T, D), as in `add`. nearest: finds the corpus chunks that replace refused texts; None to return
        those. opens: as in `add`. Raises InputError on mismatched shapes.
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
            opened = None if opens is None else opens[i]
            key = vector.tobytes() + (b"" if context is None else context.tobytes()) + str(opened).encode()
            if key not in first:
                first[key] = self.add(vector, context, opens=opened)
            tickets.append(first[key])
        done: dict[int, Answer] = {}
        while len(self):
            done |= self.run()
        answers = [done[ticket] for ticket in tickets]
        refused = [i for i, a in enumerate(answers) if not a.accepted]
        if refused and nearest is not None:
            started = time.perf_counter()
            chunks = nearest(vectors[refused], refused)
            took = (time.perf_counter() - started) * 1000
            for i, chunk in zip(refused, chunks, strict=True):
                answer = extracted(answers[i], chunk)
                answers[i] = replace(answer, milliseconds={**answer.milliseconds, "extract": took})
        return answers

    def _check_decoded(self, row: _Row, result: "Inversion", done: bool) -> Answer | None:
        """The answer of a row if its exact attempt ends with this result; None if the row continues or goes to the
        writer.

        done: whether the decoder has finished the row.
        """
        not_passed = [s for s in row.steps if s >= result.steps_used]
        if not done and not result.no_text and (not not_passed or result.steps_used != not_passed[0]):
            return None
        steps = result.steps_used if row.fixed_steps or not not_passed else not_passed[0]
        row.clock("read")
        # A text that encodes to the vector again is the text, however odd.
        exact = not result.no_text and result.cosine >= self.settings.exact_cosine
        if row.fixed_steps or exact:
            self._stop_reading(row)
            return self._finish(row, Answer(result.text, "exact", result.cosine, steps))
        why = f"round-trip cosine {result.cosine:.2f} < {self.settings.exact_cosine}"
        if result.no_text:
            why = "no text encodes to this vector"
        refusals = (why, *faults(result.text, self.settings))
        if result.text and not result.no_text:
            row.decoded = Attempt(result.text, "exact", steps, result.cosine, refusals)
        if self._drafting is not None:
            self._stop_reading(row)
            self._draft(row)
            return None
        if not done and not result.no_text:
            if row.decoded is not None:
                row.attempts.append(row.decoded)
            return None
        self._stop_reading(row)
        return self._finish(row, Answer(result.text, "exact", result.cosine, steps, refusals=refusals))

    def _stop_reading(self, row: _Row) -> None:
        if self._reading is not None and row.reading is not None:
            self._reading.drop(row.reading)
            row.reading = None

    def _draft(self, row: _Row) -> None:
        if self._drafting is None:
            raise InputError(
                f"codec {self._codec.identity} has neither a decoder nor a writer; fit a writer with "
                "`latent train-writer`"
            )
        row.drafting = self._drafting.add(row.vector, self.settings.candidates)

    def _judge(self, finished: Mapping[int, Sequence["Written"]]) -> dict[int, Answer]:
        """Answers of the rows with finished drafts, by ticket."""
        assert self._writer is not None
        rows = {t: row for t, row in self._rows.items() if row.drafting in finished}
        if not rows:
            return {}
        for row in rows.values():
            row.clock("write")
        ranked = self._rank({t: finished[r.drafting] for t, r in rows.items() if r.drafting is not None})
        chosen: dict[int, Answer] = {}
        for rank in range(max(map(len, ranked.values()))):
            # One text per row at a time: the first is nearly always accepted.
            undecided = [t for t, texts in ranked.items() if t not in chosen and rank < len(texts)]
            if not undecided:
                break
            logs = self._writer.log_probs([ranked[t][rank].text for t in undecided]).tolist()
            for ticket, log in zip(undecided, logs, strict=True):
                attempt = ranked[ticket][rank]
                minimum, wrong = self._writer.least_log_prob, list(attempt.refusals)
                if attempt.source == "exact":  # stricter, but its low round-trip cosine no longer counts
                    minimum, wrong = self._writer.usual_log_prob, wrong[1:]
                if log < minimum:
                    wrong.append(f"not language: {log:.2f} nats per character < {minimum:.2f}")
                if not wrong or rank + 1 == len(ranked[ticket]):
                    chosen[ticket] = Answer(
                        attempt.text, attempt.source, attempt.cosine, attempt.steps, log, tuple(wrong)
                    )
                elif attempt.source == "writer":  # the decoder's text for a blend is no attempt of its own
                    rows[ticket].attempts.append(replace(attempt, refusals=tuple(wrong)))
        for row in rows.values():
            row.clock("judge")
        return {ticket: self._finish(row, chosen[ticket]) for ticket, row in rows.items()}

    def _rank(self, drafts: Mapping[int, Sequence["Written"]]) -> dict[int, list[Attempt]]:
        """The texts of each ticket's drafts, best first."""
        assert self._writer is not None
        centre, settings = self._writer.centre, self.settings
        texts = [draft.text or " " for some in drafts.values() for draft in some]
        vectors = _unit(np.asarray(self._codec.encode_chunks(texts).vectors, np.float32))
        ranked: dict[int, list[Attempt]] = {}
        for ticket, some in drafts.items():
            row = self._rows[ticket]
            own, vectors = vectors[: len(some)], vectors[len(some) :]
            cosines = own @ row.vector
            centred = _unit(own - centre)
            score = centred @ _unit(row.vector - centre)
            score = score + settings.likeliness * np.array([d.log_prob for d in some], np.float32)
            if row.context is not None:
                score = score - settings.novelty * (centred @ _unit(row.context - centre).T).max(1)
            if row.opens is not None:
                score = score + settings.opening * np.array(
                    [opens_sentence(d.text) == row.opens for d in some]
                )
            ranked[ticket] = [
                Attempt(some[i].text, "writer", 0, float(cosines[i]), tuple(faults(some[i].text, settings)))
                for i in np.argsort(-score, kind="stable")
            ]
            if row.decoded is not None and row.decoded.cosine > ranked[ticket][0].cosine:
                ranked[ticket].insert(0, row.decoded)
        return ranked

    def _finish(self, row: _Row, answer: Answer) -> Answer:
        return replace(answer, attempts=tuple(row.attempts), milliseconds=row.milliseconds)

    def _key(self, row: _Row) -> bytes:
        """Cache key: equal for vectors that agree to three decimals, with the same decoder, steps and settings."""
        rounded = np.rint(row.vector * 1000).astype(np.int32).tobytes()
        options = f"{self.digest}/{row.steps if row.fixed_steps else None}/{self.settings}/".encode()
        if self.settings.candidates > 1 and not row.fixed_steps:  # else there is nothing to choose by them
            rounded += str(row.opens).encode()
            if row.context is not None:
                rounded += np.rint(row.context * 1000).astype(np.int32).tobytes()
        return hashlib.blake2b(options + rounded, digest_size=16).digest()


def ends_sentence(text: str) -> bool:
    """Whether a chunk ends its sentence: with a full stop or the like, and perhaps quotes and brackets after it."""
    return re.search(r"""[.!?…。！？]["'”’»)\]]*\s*$""", text) is not None


def opens_sentence(text: str) -> bool:
    """Whether a text can begin a sentence: its first letter or digit is no small letter."""
    first = next((c for c in text if c.isalnum()), "")
    return first != "" and not first.islower()


def decoder_digest(codec: Decoder, writer: TextWriter | None) -> str:
    """Hash of all that determines a vector's text: encoder, decoder, writer, language model; 16 hex digits."""
    written_by = "no writer" if writer is None else writer.digest
    parts = (codec.identity.digest, codec.decoder_digest, written_by)
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-9), np.float32)
