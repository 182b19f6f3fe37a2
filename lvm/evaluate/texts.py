"""Decode each predictor's vectors to text, in blocks, and measure the texts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.codec.ladder import Answer, Ladder, LadderSettings, Nearest, keywords
from lvm.evaluate.evaluation import Example, ExampleText, TextRow
from lvm.evaluate.metrics import Float32Array, Ints, cosines, text_scores
from lvm.evaluate.scoring import CEILING, CodecLoader, EvaluationData, Form, Scored
from lvm.predict.extract import Extractor
from lvm.predict.steer import snap, unit
from lvm.storage import Location
from lvm.vectors.array import VectorArray
from lvm.vectors.index import Index, load_index


@dataclass(frozen=True)
class Block:
    """Vectors to decode in one task."""

    vectors: Float32Array
    """(B, D) unit vectors."""
    searches: Float32Array
    """(B, D) rank heads' unit vectors, which take part in the search for chunks; `vectors` where there is none."""
    truths: Float32Array
    """(B, D) the true next vectors."""
    contexts: Float32Array
    """(B, T, D) contexts, which a text should not repeat."""
    doc_ids: NDArray[np.int32]
    """(B,) articles that are held out of retrieval."""
    found: NDArray[np.bool_]
    """(B,) True where the nearest corpus chunk is the answer and nothing is decoded."""


@dataclass(frozen=True)
class TextAnswer:
    """One decoded vector."""

    answer: Answer
    """Of the ladder."""
    text_cosine: float
    """Cosine of the re-encoded text with the true next vector."""


def decode_block(
    load: CodecLoader, index_folder: Location, array: VectorArray, number: int, block: Block, candidates: int
) -> tuple[int, list[TextAnswer]]:
    """The block's number and its texts; where all are refused, the nearest chunk of another article."""
    codec, index = load(), load_index(index_folder)
    extractor = Extractor(array, index)

    def nearest(vectors: Float32Array, rows: Sequence[int]) -> list[Nearest]:
        own = list(rows)
        chunks, near = extractor.nearest(vectors, barring(array, block.doc_ids[own]), block.searches[own])
        texts = array.texts(np.maximum(chunks, 0))
        return [Nearest(text, float(cosine)) for text, cosine in zip(texts, near, strict=True)]

    answers: list[Answer | None] = [None] * len(block.vectors)
    written = np.flatnonzero(~block.found)
    ladder = Ladder(codec, codec.writer, LadderSettings(candidates=candidates))
    if len(written):
        decoded = ladder.decode(
            block.vectors[written],
            block.contexts[written],
            lambda vectors, rows: nearest(vectors, written[list(rows)].tolist()),
        )
        for row, answer in zip(written.tolist(), decoded, strict=True):
            answers[row] = answer
    taken = np.flatnonzero(block.found)
    if len(taken):
        for row, chunk in zip(taken.tolist(), nearest(block.vectors[taken], taken.tolist()), strict=True):
            answers[row] = Answer(chunk.text, "corpus", chunk.cosine)
    whole = [answer for answer in answers if answer is not None]
    of_texts = cosines(codec.encode_chunks([a.text or " " for a in whole]).vectors, block.truths)
    return number, [TextAnswer(a, float(c)) for a, c in zip(whole, of_texts, strict=True)]


def barring(array: VectorArray, doc_ids: Ints) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
    """A function that marks which of the rows (B, k) belong to the held-out article, doc_ids (B,)."""

    def barred(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        own: NDArray[np.bool_] = array.doc_ids[np.maximum(rows, 0)] == doc_ids[:, None]
        return own

    return barred


def part_of(block: Block, rows: NDArray[Any]) -> Block:
    """These rows of a block."""
    return Block(*(getattr(block, f.name)[rows] for f in fields(Block)))


@dataclass(frozen=True)
class TextPlan:
    """The vectors to decode for the sample: S for each predictor and form."""

    names: tuple[tuple[str, Form], ...]
    block: Block
    """len(names) * S vectors, in order of names."""


def plan_texts(data: EvaluationData, scored: Sequence[Scored], index: Index) -> TextPlan:
    """For each model: predictions, snapped predictions (as in `latent generate`) and nearest corpus chunks; then the
    last context vectors, and the true next ones."""
    sample, array = data.sample, data.sample.array
    contexts, targets = sample.batch(slice(None))
    truths, held_out = unit(targets), barring(array, sample.doc_ids)
    wanted: list[tuple[tuple[str, Form], Float32Array, Float32Array]] = []
    for one in scored:
        if one.kind == "model":
            means = contexts.mean(axis=1)
            moved = snap(one.sample_search, contexts[:, -1], means, index, array.vectors, barred=held_out)
            wanted += [
                ((one.name, "raw"), one.sample, one.sample_search),
                ((one.name, "snap"), moved.vectors, one.sample_search),
                ((one.name, "found"), one.sample, one.sample_search),
            ]
    last = unit(contexts[:, -1])
    wanted += [(("passthrough", "raw"), last, last), ((CEILING, "raw"), truths, truths)]
    return TextPlan(
        tuple(name for name, _, _ in wanted),
        Block(
            np.concatenate([vectors for _, vectors, _ in wanted]),
            np.concatenate([searches for _, _, searches in wanted]),
            np.tile(truths, (len(wanted), 1)),
            np.tile(contexts, (len(wanted), 1, 1)),
            np.tile(sample.doc_ids, len(wanted)),
            np.repeat([form == "found" for (_, form), _, _ in wanted], len(sample)),
        ),
    )


def _distance(cosine: float) -> float:
    """Euclidean distance of two unit vectors with this cosine."""
    return float(np.sqrt(max(0.0, 2.0 - 2.0 * cosine)))


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct bigrams / all bigrams of the texts (Li et al. 2016, arXiv:1510.03055); 0 where there are none."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def measure_texts(
    data: EvaluationData, plan: TextPlan, texts: Sequence[TextAnswer]
) -> tuple[list[TextRow], list[Example]]:
    """Text measures for each name of the plan, and the first windows of the sample as examples.

    texts: one per vector of the plan's block, in order.
    """
    sample, array = data.sample, data.sample.array
    size = len(sample)
    true_texts, titles = array.texts(sample.rows_of_target), array.titles(sample.rows_of_target)
    contexts = [array.texts(rows) for rows in sample.rows_of_context]
    known = [keywords(" ".join([*c, t])) for c, t in zip(contexts, true_texts, strict=True)]
    exact = cosines(plan.block.vectors, plan.block.truths)
    rows: list[TextRow] = []
    for number, (name, form) in enumerate(plan.names):
        part = slice(number * size, (number + 1) * size)
        own, vector_cosines = texts[part], exact[part]
        answers = [t.answer for t in own]
        measured = text_scores([a.text for a in answers], true_texts)
        log_probs = [a.log_prob for a in answers if a.log_prob is not None]
        excess = [_distance(t.text_cosine) - _distance(c) for t, c in zip(own, vector_cosines, strict=True)]
        shared = [bool(k & keywords(a.text)) for k, a in zip(known, answers, strict=True)]
        rows.append(
            {
                "name": name,
                "form": form,
                "rouge1": measured["rouge1"],
                "rouge2": measured["rouge2"],
                "rougeL": measured["rougeL"],
                "bleu": measured["bleu"],
                "vector_cosine": float(vector_cosines.mean()),
                "text_cosine": float(np.mean([t.text_cosine for t in own])),
                "off_manifold": float(np.mean(excess)),
                "keyword": float(np.mean(shared)),
                "distinct_2": distinct_2([a.text for a in answers]),
                "log_prob": float(np.mean(log_probs)) if log_probs else None,
                "sources": dict(Counter(a.source for a in answers).most_common()),
            }
        )
    examples: list[Example] = []
    for i in range(min(data.settings.examples, size)):
        decoded: list[ExampleText] = []
        for number, (name, form) in enumerate(plan.names):
            one = texts[number * size + i]
            decoded.append(
                {
                    "name": name,
                    "form": form,
                    "text": one.answer.text,
                    "vector_cosine": float(exact[number * size + i]),
                    "text_cosine": one.text_cosine,
                    "source": one.answer.source,
                    "refused": [f"{a.text} ({'; '.join(a.refusals)})" for a in one.answer.attempts],
                    "refusals": list(one.answer.refusals),
                }
            )
        examples.append(
            {
                "title": titles[i],
                "chunk_id": str(array.chunk_ids[sample.rows_of_target[i]]),
                "context": contexts[i],
                "truth": true_texts[i],
                "decoded": decoded,
            }
        )
    return rows, examples
