"""Vectors to text with no more work than the text needs.

The rungs are 1, 3 and 5 corrector steps, then the nearest corpus chunk's own words (marked "extractive",
never a placeholder). A text that fails a check sends its vector, and only that one, to the next rung. Most
end on the first: the system this follows answered 70 % of its requests there.
"""

import hashlib
import math
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError

EXTRACTIVE = "extractive"
"""Name of the last rung."""


class DecodedTexts(Protocol):
    """What the ladder reads of a codec's answer."""

    @property
    def texts(self) -> Sequence[str]:
        """(B,) decoded texts."""

    @property
    def cosines(self) -> NDArray[np.float32]:
        """(B,) cosine of each text's own vector with the vector it was decoded from."""


class Decoder(Protocol):
    """What the ladder needs of a codec. One may also have `supported_steps`, a tuple of the `steps` it can
    do; without it, any number is asked for. And `stops_early`: True promises that a step which brings a text no
    nearer is the last, so that two numbers of steps with one text mean that no more steps change it."""

    @property
    def identity(self) -> CodecIdentity:
        """What the vectors must come from."""

    def decode(self, vectors: NDArray[np.float32], steps: int = 0) -> DecodedTexts:
        """Texts of (B, D) unit vectors after `steps` corrector steps."""


@dataclass(frozen=True)
class Nearest:
    """The corpus chunk nearest to a vector."""

    text: str
    cosine: float
    """Cosine of its vector with the one asked about."""


NearestText = Callable[[NDArray[np.float32]], Sequence[Nearest]]
"""(B, D) vectors to B nearest chunks."""


@dataclass(frozen=True)
class LadderSettings:
    """When a decoded text is good enough, SPEC.md §5."""

    steps: tuple[int, ...] = (1, 3, 5)
    """Corrector steps of the rungs, in order; those the codec cannot do are left out."""
    max_bigram_share: float = 0.25
    """Largest share of all bigrams that one repeated bigram may have."""
    min_entropy_bits: float = 2.8
    """Least Shannon entropy of the characters, bits a character. English prose has about 4.1."""
    cache_entries: int = 10_000
    """Decoded texts kept; one takes about 0.3 KB."""

    def __post_init__(self) -> None:
        if not self.steps or any(s < 0 for s in self.steps) or list(self.steps) != sorted(set(self.steps)):
            raise InputError(f"ladder steps are {self.steps}; expected ascending numbers of 0 or more")
        if self.cache_entries < 0:
            raise InputError(f"cache_entries is {self.cache_entries}; expected 0 (no cache) or more")


@dataclass(frozen=True)
class Answer:
    """One vector's text and how it came about."""

    text: str
    rung: str
    """The rung that answered: "steps=1", "steps=3", "steps=5" or "extractive"."""
    reasons: tuple[str, ...]
    """Why each earlier rung's text was refused, in order; empty on the first rung. The last rung of a ladder
    without an index answers whatever its text is, and then its own faults stand here too."""
    cosine: float
    """Cosine with the vector: of the decoded text encoded again, or of the extracted chunk's vector."""
    milliseconds: dict[str, float] = field(compare=False)
    """What this vector waited for on each rung it met; vectors of one batch wait together."""
    cached: bool = False
    """True when the answering rung's text came from the cache."""
    refused: tuple[str, ...] = ()
    """The texts of the earlier rungs, in order."""


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


def faults(text: str, source: str | None, settings: LadderSettings) -> list[str]:
    """What speaks against a decoded text, in words; empty when nothing does.

    `source` is the text the prediction came from; without one, or when it has no keywords, keywords are
    not compared.
    """
    found = []
    share = bigram_share(text)
    if share > settings.max_bigram_share:
        found.append(f"bigram repetition {share:.0%} > {settings.max_bigram_share:.0%}")
    entropy = character_entropy(text)
    if entropy < settings.min_entropy_bits:
        found.append(f"character entropy {entropy:.1f} < {settings.min_entropy_bits} bits")
    wanted = keywords(source) if source is not None else set()
    if wanted and not wanted & keywords(text):
        found.append("no keyword shared with the source")
    return found


class DecodeCache:
    """Bounded map from (codec, vector, steps) to decoded text; the least recently used entry goes first.

    Safe to share between threads.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        """Most texts held."""
        self.hits = 0
        self.misses = 0
        self._held: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(identity: CodecIdentity, vector: NDArray[np.float32], steps: int) -> bytes:
        """The same for vectors that agree to three decimals."""
        rounded = np.rint(vector * 1000).astype(np.int32).tobytes()
        return hashlib.blake2b(f"{identity.digest}/{steps}/".encode() + rounded, digest_size=16).digest()

    def get(self, key: bytes) -> tuple[str, float] | None:
        """The text and its cosine, or None; counts as a hit or a miss."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._held.move_to_end(key)
            return found

    def put(self, key: bytes, text: str, cosine: float) -> None:
        """Keep a text, dropping the least recently used beyond the bound."""
        with self._lock:
            self._held[key] = (text, cosine)
            self._held.move_to_end(key)
            while len(self._held) > self.entries:
                self._held.popitem(last=False)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def hit_rate(self) -> float:
        """Hits over all look-ups, 0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class Ladder:
    """Decodes batches of vectors, rung by rung."""

    def __init__(
        self,
        codec: Decoder,
        nearest: NearestText | None = None,
        settings: LadderSettings | None = None,
        cache: DecodeCache | None = None,
    ) -> None:
        """Without `nearest` the ladder ends at its last decoding rung. A cache may be shared."""
        self.settings = settings or LadderSettings()
        self.cache = cache if cache is not None else DecodeCache(self.settings.cache_entries)
        self._codec = codec
        self._nearest = nearest
        supported: Any = getattr(codec, "supported_steps", None)
        steps = tuple(s for s in self.settings.steps if supported is None or s in supported)
        # A codec without a corrector has one decoding rung: its first text.
        self.steps: tuple[int, ...] = steps or (0,)
        """Corrector steps of the decoding rungs this codec can do."""
        self._stops_early = bool(getattr(codec, "stops_early", False))

    def decode(self, vectors: NDArray[np.float32], sources: Sequence[str] | None = None) -> list[Answer]:
        """One Answer a row of (B, D) unit vectors, in order.

        `sources` (B,) are the texts whose keywords a good text shares, the context's own as a rule. Raises
        InputError when their number is not B or the vectors' length is not the codec's.
        """
        dim = self._codec.identity.dim
        if vectors.ndim != 2 or vectors.shape[1] != dim:
            raise InputError(
                f"vectors to decode have shape {vectors.shape}, expected (B, {dim}) for codec "
                f"{self._codec.identity}; encode the text with that codec"
            )
        if sources is not None and len(sources) != len(vectors):
            raise InputError(f"got {len(sources)} source texts for {len(vectors)} vectors; expected as many")
        answers: list[Answer | None] = [None] * len(vectors)
        reasons: list[list[str]] = [[] for _ in range(len(vectors))]
        refused: list[list[str]] = [[] for _ in range(len(vectors))]
        waited: list[dict[str, float]] = [{} for _ in range(len(vectors))]
        open_rows = list(range(len(vectors)))
        before: dict[int, str] = {}  # a row's text after fewer steps
        stuck_rows: list[int] = []  # rows no further step changes
        for steps in self.steps:
            if not open_rows:
                break
            rung = f"steps={steps}"
            last = steps == self.steps[-1] and self._nearest is None
            began = time.perf_counter()
            decoded = self._decode_rung(vectors[open_rows], steps)
            elapsed_ms = (time.perf_counter() - began) * 1000
            failed: list[int] = []
            judged = [
                faults(text, sources[row] if sources is not None else None, self.settings)
                for row, (text, _, _) in zip(open_rows, decoded, strict=True)
            ]
            if self._stops_early and steps != self.steps[-1]:
                self._look_before(vectors, steps, open_rows, judged, before)
            for row, (text, cosine, cached), found in zip(open_rows, decoded, judged, strict=True):
                waited[row][rung] = elapsed_ms
                reasons[row] += [f"{rung}: {fault}" for fault in found]
                stuck = (
                    self._stops_early and bool(found) and before.get(row) == text and steps != self.steps[-1]
                )
                before[row] = text
                if stuck:
                    reasons[row].append(f"{rung}: further steps change nothing")
                if found and not last and not (stuck and self._nearest is None):
                    (stuck_rows if stuck else failed).append(row)
                    refused[row].append(text)
                else:
                    answers[row] = Answer(
                        text, rung, tuple(reasons[row]), cosine, waited[row], cached, tuple(refused[row])
                    )
            open_rows = failed
        open_rows = sorted(open_rows + stuck_rows)
        if open_rows and self._nearest is not None:
            began = time.perf_counter()
            chunks = self._nearest(vectors[open_rows])
            elapsed_ms = (time.perf_counter() - began) * 1000
            for row, chunk in zip(open_rows, chunks, strict=True):
                waited[row][EXTRACTIVE] = elapsed_ms
                answers[row] = Answer(
                    chunk.text,
                    EXTRACTIVE,
                    tuple(reasons[row]),
                    chunk.cosine,
                    waited[row],
                    refused=tuple(refused[row]),
                )
        return [answer for answer in answers if answer is not None]

    def _look_before(
        self,
        vectors: NDArray[np.float32],
        steps: int,
        rows: Sequence[int],
        judged: Sequence[Sequence[str]],
        before: dict[int, str],
    ) -> None:
        """Note the first text, of no step, of the rows that the first rung refused. Writing it again costs a
        fraction of the next rung, which would only repeat this one for a row that a step does not change."""
        asked = [row for row, found in zip(rows, judged, strict=True) if found and row not in before]
        if asked and steps > 0:
            for row, (text, _, _) in zip(asked, self._decode_rung(vectors[asked], 0), strict=True):
                before[row] = text

    def _decode_rung(self, vectors: NDArray[np.float32], steps: int) -> list[tuple[str, float, bool]]:
        """Text, cosine and whether it was cached for each row; equal rows are decoded once."""
        keys = [DecodeCache.key(self._codec.identity, v, steps) for v in vectors]
        first_row = {key: row for row, key in reversed(list(enumerate(keys)))}
        found = {key: self.cache.get(key) for key in first_row}
        missing = [key for key, entry in found.items() if entry is None]
        if missing:
            decoded = self._codec.decode(vectors[[first_row[key] for key in missing]], steps=steps)
            for key, text, cosine in zip(missing, decoded.texts, decoded.cosines, strict=True):
                found[key] = (text, float(cosine))
                self.cache.put(key, text, float(cosine))
        fresh = set(missing)
        results = []
        for key in keys:
            entry = found[key]
            assert entry is not None
            results.append((entry[0], entry[1], key not in fresh))
        return results
