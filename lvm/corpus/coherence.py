"""Test whether a corpus is sequential text; taxonomies and lists of facts are refused by their vectors or their name.

Predicting the next chunk only means something where one chunk leads to the next. Models trained on WordNet
chains ("ormer", "abalone", "gastropod", ...) learn the upper levels of the taxonomy, which all chains share, and
nothing about text. Two things are measured on a sample of articles, with vectors of any codec:

- shared steps: the share of steps (a chunk and the next) that also occur in another article, both chunks being
  near copies. Articles differ; chains of a taxonomy converge.
- continuity: how often the next chunk is nearer than a chunk of another article; chance is 0.5. Isolated facts
  under one title do not follow from each other.

                         shared steps          continuity
                         mini     TF-IDF       mini     TF-IDF
    WordNet chains       0.451    0.456        0.62     0.55      refused
    dialogue             0.000    0.001        0.62     0.65
    recipes              0.000    0.000        0.69     0.70
    stories              0.000    0.000        0.70     0.68
    science              0.000    0.000        0.75     0.74
    tutorials            0.000    0.000        0.76     0.76
    Wikipedia (recent)   0.000    0.000        0.83     0.78
    bundled sample       0.000    0.000        0.65     0.54
    any of them shuffled 0.000    0.000        0.50     0.50      refused

(30 articles, means of six draws; first version of `mini`, TF-IDF reduced to 256 dimensions. With 10 articles
WordNet shares 0.27 or more of its steps, with 400 it is 0.61; dialogue with 400 shares 0.008.)
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lvm.errors import InputError

Floats = npt.NDArray[np.floating[Any]]
Float32Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]

OVERRIDE = "I know this text is not sequential"
"""The value that --allow-non-sequential must have."""

NEAR_COPY = 0.97
"""Cosine from which two chunks count as the same text."""

MAX_SHARED_STEPS = 0.10
"""Twelve times what dialogue has with 400 articles, a third of what WordNet has with 10."""

MIN_CONTINUITY = 0.52
"""Sequential text had 0.58 or more with `mini` in every draw, 0.527 with TF-IDF; shuffled over articles it
had 0.50, give or take 0.02."""

MIN_STEPS = 50
"""With fewer steps the measures mean nothing, and only the name counts."""

MAX_ARTICLES = 400
MAX_CHUNKS = 4096
"""Most chunks in the sample; all pairs of them are compared, in under a second."""
CHUNKS_PER_ARTICLE = 32
STRANGERS = 16
"""Chunks of other articles that each step is compared with."""
FAR = 3
"""Chunks of an article at least this far apart count as distant."""

EPISODE_BLOCK = 2
"""Paragraphs compared on each side of a gap; a single one is too short to tell its topic."""

_LABELS = frozenset(
    {
        *("wordnet", "ontology", "ontologies", "taxonomy", "taxonomies", "geneontology", "swo", "dbpedia"),
        *("conceptnet", "factoid", "factoids", "factoidwiki"),
    }
)
_GO_COMPANY = frozenset({"chain", "chains", "obo", "basic", "term", "terms", "plus"})


@dataclass(frozen=True)
class Coherence:
    """How sequential a sample of a corpus is."""

    num_articles: int
    """Articles in the sample."""
    num_steps: int
    """Pairs of a chunk and the next of the same article."""
    shared_steps: float
    """Share of steps that also occur in another article, 0 to 1."""
    continuity: float
    """How often the next chunk is nearer than a chunk of another article, 0 to 1; chance is 0.5."""
    locality: float
    """How often the next chunk is nearer than one of the same article at least FAR away. Reported, never judged: a
    story that stays on its subject has 0.5, a taxonomy more."""

    @property
    def fault(self) -> str | None:
        """Why this is not sequential text; None where it is, or where there are too few steps to judge."""
        if self.num_steps < MIN_STEPS:
            return None
        if self.shared_steps > MAX_SHARED_STEPS:
            return (
                f"{self.shared_steps:.0%} of its steps from chunk to chunk also occur in other articles, "
                f"expected at most {MAX_SHARED_STEPS:.0%}: these are chains of a taxonomy, the same "
                "articles several times, or passages that many articles share (a notice, navigation): remove repeats"
            )
        if self.continuity < MIN_CONTINUITY:
            return (
                f"the next chunk is nearer than one of another article in {self.continuity:.1%} of cases, "
                f"expected at least {MIN_CONTINUITY:.0%} (chance is 50%): its chunks do not follow from each "
                "other"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


def measure_coherence(vectors: Floats, doc_ids: Ints, positions: Ints, seed: int = 0) -> Coherence:
    """Coherence of a random sample of articles.

    vectors: (N, D) unit vectors of any float type, memory-mapped or not; only the sample is read. doc_ids and
    positions: (N,), rows sorted by article and position. Raises InputError when they do not fit together.
    """
    if not len(vectors) == len(doc_ids) == len(positions):
        raise InputError(
            f"{len(vectors)} vectors, {len(doc_ids)} article numbers and {len(positions)} positions; "
            "expected one of each per chunk"
        )
    random = np.random.default_rng(seed)
    rows = _sample(np.asarray(doc_ids), random)
    docs, places = np.asarray(doc_ids)[rows], np.asarray(positions)[rows]
    sample = np.asarray(vectors[rows], np.float32)
    cosines = sample @ sample.T
    steps = np.flatnonzero((docs[1:] == docs[:-1]) & (places[1:] == places[:-1] + 1))
    foreign = docs[:, None] != docs[None, :]
    num_articles = len(np.unique(docs))
    if not len(steps) or num_articles < 2:
        return Coherence(num_articles, len(steps), 0.0, 0.5, 0.5)

    is_step = np.zeros(len(rows) - 1, bool)
    is_step[steps] = True
    copy = (cosines > NEAR_COPY) & foreign
    shared = copy[:-1, :-1] & copy[1:, 1:] & is_step
    nearness = cosines[steps, steps + 1]
    strangers = random.integers(0, len(rows), (len(steps), STRANGERS))
    continuity = _wins(nearness, cosines[steps[:, None], strangers], foreign[steps[:, None], strangers])
    distance = np.abs(places[None, :] - places[steps][:, None])
    distant = ~foreign[steps] & (distance >= FAR)
    return Coherence(
        num_articles=num_articles,
        num_steps=len(steps),
        shared_steps=float(shared[steps].any(axis=1).mean()),
        continuity=continuity,
        locality=_wins(nearness, cosines[steps], distant),
    )


def _sample(doc_ids: Ints, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows of random articles, a run of consecutive chunks from each, in ascending order."""
    if not len(doc_ids):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], doc_ids[1:] != doc_ids[:-1]]))
    ends = np.concatenate([starts[1:], [len(doc_ids)]])
    taken: list[npt.NDArray[np.int64]] = []
    total = 0
    for article in random.permutation(len(starts))[:MAX_ARTICLES]:
        start, end = int(starts[article]), int(ends[article])
        length = min(end - start, CHUNKS_PER_ARTICLE)
        if total + length > MAX_CHUNKS:
            break
        start += int(random.integers(0, end - start - length + 1))
        taken.append(np.arange(start, start + length))
        total += length
    return np.sort(np.concatenate(taken))


def _wins(nearness: Float32Array, others: Float32Array, counted: npt.NDArray[np.bool_]) -> float:
    """How often nearness (S,) exceeds others (S, K) where `counted`; a tie counts half, and no pair gives 0.5."""
    if not counted.any():
        return 0.5
    won = (nearness[:, None] > others) + 0.5 * (nearness[:, None] == others)
    return float(won[counted].mean())


def find_episodes(vectors: Floats, paragraphs: Ints) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """Index of each chunk's episode, from 0, and that episode's coherence, for one article; both (N,).

    vectors: (N, D) unit vectors in reading order; paragraphs: (N,) index of each chunk's paragraph, ascending. An
    episode is a run of whole paragraphs. It ends at a gap whose similarity is a local minimum and whose depth (the rise
    to the nearest peak on the left plus that on the right) exceeds the article's mean depth minus half a standard
    deviation. Coherence is the mean cosine of neighbouring chunks in the episode, 1 for a single chunk.
    Source: Hearst 1997, TextTiling (Computational Linguistics 23:1), sections 5.2 and 5.3, with paragraph vectors in
    place of word counts.
    """
    if len(vectors) != len(paragraphs):
        raise InputError(
            f"{len(vectors)} vectors and {len(paragraphs)} paragraph numbers; expected one of each"
        )
    vectors = np.asarray(vectors, np.float32)
    _, of_paragraph = np.unique(paragraphs, return_inverse=True)
    count = int(of_paragraph.max()) + 1 if len(of_paragraph) else 0
    sums = np.zeros((count, vectors.shape[1]), np.float32)
    np.add.at(sums, of_paragraph, vectors)
    before = [_direction(sums[max(0, i + 1 - EPISODE_BLOCK) : i + 1]) for i in range(count - 1)]
    after = [_direction(sums[i + 1 : i + 1 + EPISODE_BLOCK]) for i in range(count - 1)]
    gaps = np.array([float(b @ a) for b, a in zip(before, after, strict=True)], np.float32)
    ends = np.zeros(count, bool)
    if len(gaps) > 1:
        depths = np.array([_peak(gaps[i::-1]) + _peak(gaps[i:]) - 2 * gaps[i] for i in range(len(gaps))])
        padded = np.concatenate([[np.inf], gaps, [np.inf]])
        lowest = (gaps < padded[:-2]) & (gaps < padded[2:])
        ends[:-1] = lowest & (depths > depths.mean() - depths.std() / 2)
    episodes = np.concatenate([[0], np.cumsum(ends)[:-1]]) if count else np.zeros(0)
    of_chunk = episodes[of_paragraph].astype(np.int32) if count else np.zeros(0, np.int32)
    coherence = np.ones(len(vectors), np.float32)
    for episode in range(int(of_chunk.max()) + 1 if count else 0):
        rows = np.flatnonzero(of_chunk == episode)
        if len(rows) > 1:
            coherence[rows] = np.einsum("nd,nd->n", vectors[rows[:-1]], vectors[rows[1:]]).mean()
    return of_chunk, coherence


def _direction(sums: Float32Array) -> Float32Array:
    """Direction of the mean, (D,) unit norm."""
    total = sums.sum(axis=0)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)


def _peak(gaps: Float32Array) -> float:
    """Similarity at the first peak, starting from gaps[0]."""
    falls = np.flatnonzero(gaps[1:] < gaps[:-1])
    return float(gaps[falls[0]] if len(falls) else gaps[-1])


def non_sequential_label(names: Iterable[str]) -> str | None:
    """The first of the names (sources, input files) that denotes a taxonomy or list of facts, or None."""
    for name in names:
        words = [w for w in re.split(r"[^a-z]+", name.lower()) if w]
        stem = set(words) - {"jsonl", "json", "gz", "bz", "parquet", "txt"}
        if stem & _LABELS or stem == {"go"} or ("go" in stem and stem & _GO_COMPANY):
            return name
    return None


def require_sequential(
    vectors: Floats,
    doc_ids: Ints,
    positions: Ints,
    names: Iterable[str],
    override: str | None = None,
    seed: int = 0,
) -> Coherence:
    """The coherence of a text that is sequential, or that the user asked to accept anyway; else raises InputError.

    vectors, doc_ids, positions: as in `measure_coherence`. names: of sources and input files. override: the value of
    --allow-non-sequential.
    """
    coherence = measure_coherence(vectors, doc_ids, positions, seed)
    label = non_sequential_label(names)
    fault = (
        coherence.fault if label is None else f"its source is named {label!r}, a taxonomy or list of facts"
    )
    if fault is None or (override is not None and _plain(override) == _plain(OVERRIDE)):
        return coherence
    wrong = "" if override is None else f" (got {override!r})"
    raise InputError(
        f"this text is not sequential: {fault}. Predictors need articles, stories, tutorials or papers whose "
        f"chunks follow each other. To train anyway, pass "
        f'--allow-non-sequential "{OVERRIDE}" (allow_non_sequential in Python){wrong}.'
    )


def _plain(sentence: str) -> str:
    return " ".join(sentence.lower().split()).rstrip(".")
