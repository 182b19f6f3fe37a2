"""Text in, predicted text out: encode, complete the context, predict, snap, decode.

Letters: B contexts, T context chunks, D vector length.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lvm.arguments import whole
from lvm.codec.ladder import Answer, Ladder, LadderSettings, Nearest, Source, ends_sentence
from lvm.codec.tokenizer import require_texts
from lvm.codec.zoo import Codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.records import Article
from lvm.errors import InputError
from lvm.predict.extract import Extractor
from lvm.predict.predictor import TrainedPredictor, load_predictor
from lvm.predict.steer import FILLS, PASSTHROUGH, Context, Fill, build_context, snap
from lvm.storage import Location
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.index import Index, load_index

R = TypeVar("R")

BATCH_TEXTS = 32
"""Texts per batch; larger batches are no faster on two cores."""


@dataclass(frozen=True)
class Prediction:
    """A predicted next chunk, its source, context and timings."""

    answer: Answer
    """Text, its source, and its cosine to the decoded vector."""
    vector: NDArray[np.float32]
    """(D,) the prediction, before any snap."""
    extract: Nearest | None
    """The corpus chunk nearest to the prediction, used as the answer or not; None without an index."""
    context: Context
    """The predictor's input."""
    model: str
    """Folder name of the model record, or "passthrough"."""
    snapped_cosine: float
    """Cosine of the raw prediction to the snapped vector; 1 without a snap."""
    truncated: int
    """Number of texts that exceeded the codec's limit and were truncated."""
    milliseconds: dict[str, float]
    """encode, context, predict, snap, extract, decode; of the whole batch."""

    @property
    def text(self) -> str:
        """The predicted text."""
        return self.answer.text

    @property
    def source(self) -> Source:
        """Where the text comes from: "writer", "corpus", or "exact" if the vector encodes this text."""
        return self.answer.source

    @property
    def cosine(self) -> float:
        """Cosine of the re-encoded text to the decoded vector."""
        return self.answer.cosine


class Generator:
    """Predicts the next chunk's text with one model, with or without a corpus."""

    def __init__(
        self,
        codec: Codec,
        predictor: TrainedPredictor,
        index: Index | None = None,
        vectors: VectorArray | None = None,
        settings: LadderSettings | None = None,
        snapped: bool = False,
    ) -> None:
        """index and vectors: a corpus, both or neither. It completes short contexts, replaces refused texts and, with
        `snapped`, snaps predictions before decoding. Raises IdentityError or InputError when the parts do not match."""
        if not isinstance(predictor, TrainedPredictor):
            raise InputError(
                f"the predictor is {type(predictor).__name__}; expected what lvm.load_predictor or lvm.fit returns"
            )
        if (vectors is None) != (index is None):
            raise InputError("a corpus needs both index and vectors; pass both or neither")
        predictor.require_codec(codec.identity, "the loaded codec")
        if vectors is not None and index is not None:
            vectors.require_codec(codec.identity, "the loaded codec")
            index.require_array(vectors)
        if snapped and index is None:
            raise InputError("a snap needs a corpus; pass its vectors and index")
        self.codec, self.predictor, self.index, self.array = codec, predictor, index, vectors
        self.ladder = Ladder(codec, codec.writer, settings)
        self._chunker = Chunker(codec.tokenizer)
        self._snapped = snapped and predictor.name != PASSTHROUGH
        self._extractor = None if vectors is None or index is None else Extractor(vectors, index)

    @classmethod
    def load(
        cls,
        run: Location | None,
        model: str,
        codec: Codec,
        settings: LadderSettings | None = None,
        snapped: bool = False,
    ) -> "Generator":
        """Load vectors, index and models from the folder of `latent run`; if None, a bundled predictor only.
        Raises InputError when something is missing."""
        if run is None:
            return cls(codec, load_predictor(model), settings=settings)
        for part, stage in (("vectors", "encode"), ("index", "index"), ("models", "train")):
            if not (run / part).is_dir():
                raise InputError(
                    f"{run} has no {part}/; expected the output of `latent run` or `latent demo` "
                    f"(stage {stage} makes it)"
                )
        predictor = load_predictor(model, run / "models")
        index, vectors = load_index(run / "index"), open_vectors(run / "vectors")
        return cls(codec, predictor, index, vectors, settings, snapped)

    @property
    def centre(self) -> NDArray[np.float32]:
        """(D,) mean vector to subtract before comparing cosines: the corpus', else the writer's, else zeros."""
        if self._extractor is not None:
            return self._extractor.centre
        writer = self.codec.writer
        return writer.centre if writer is not None else np.zeros(self.codec.identity.dim, np.float32)

    def generate(
        self, texts: Sequence[str], length: int = 1, fill: Fill = "retrieve"
    ) -> list[list[Prediction]]:
        """`length` predictions for each of N texts, each from all chunks before it.

        Texts are cut into chunks, and the predictor reads the last ones, as many as it was trained on; shorter contexts
        are completed as `fill` says. Raises InputError on anything but a list of str, naming the index, on a text
        without words, and on a length below 1. Warns if texts are refused because the codec has no writer.
        """
        if isinstance(texts, str):
            raise InputError("expected a list of texts, got one str; write generate([text])")
        length = whole("length", length)
        if fill not in FILLS:
            raise InputError(f"fill is {fill!r}; expected one of {', '.join(FILLS)}")
        articles = [Article("", "", text, "") for text in require_texts(texts)]
        contexts = [[c.text for c in chunks] for chunks in self._chunker.chunk(articles)] if articles else []
        for place, context in enumerate(contexts):
            if not context:
                raise InputError(f"text {place} of {len(contexts)} has no words; leave it out")
        made: list[list[Prediction]] = []
        for low in range(0, len(contexts), BATCH_TEXTS):
            steps = list(self.continue_all(contexts[low : low + BATCH_TEXTS], length, fill))
            made += [list(own) for own in zip(*steps, strict=True)]
        if self.codec.no_writer is not None and not all(p.answer.accepted for own in made for p in own):
            warnings.warn(f"the predicted texts are not fluent: {self.codec.no_writer}", stacklevel=2)
        return made

    def continue_all(
        self, contexts: Sequence[Sequence[str]], length: int, fill: Fill = "retrieve"
    ) -> Iterator[list[Prediction]]:
        """Predict the next chunk of all B contexts, `length` times; each predicted text is appended to its context."""
        chunks = [list(texts) for texts in contexts]
        for _ in range(length):
            predictions = self.next_chunks(chunks, fill)
            for own, prediction in zip(chunks, predictions, strict=True):
                own.append(prediction.text)
            yield predictions

    def next_chunks(self, contexts: Sequence[Sequence[str]], fill: Fill = "retrieve") -> list[Prediction]:
        """A Prediction for each of B contexts of one or more chunks, oldest first; short ones are completed as `fill`
        says."""
        if isinstance(contexts, str) or any(isinstance(texts, str) for texts in contexts):
            raise InputError(
                'contexts hold a str; expected lists of chunks: next_chunks([["chunk", "chunk"]])'
            )
        if not contexts:
            return []
        contexts = [texts[-self.predictor.context :] for texts in contexts]
        clock: dict[str, float] = {}

        def timed(stage: str, call: Callable[[], R]) -> R:
            begun = time.perf_counter()
            result = call()
            clock[stage] = round(clock.get(stage, 0.0) + (time.perf_counter() - begun) * 1000, 3)
            return result

        flat = [text for texts in contexts for text in texts]
        ends = np.cumsum([len(texts) for texts in contexts])
        encoded = timed("encode", lambda: self.codec.encode_chunks(flat))
        parts = np.split(encoded.vectors, ends[:-1])
        cut = [int(part.sum()) for part in np.split(encoded.truncated, ends[:-1])]
        places, corpus = self.predictor.context, (self.index, self.array)
        pairs = list(zip(parts, contexts, strict=True))
        filled = timed("context", lambda: [build_context(v, t, places, fill, *corpus) for v, t in pairs])
        given = [c.vectors for c in filled]
        same = len({g.shape for g in given}) == 1

        def predict(network: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> NDArray[np.float32]:
            # Contexts that were not completed differ in length and are predicted one by one.
            return network(np.stack(given)) if same else np.concatenate([network(g[None]) for g in given])

        raw = timed("predict", lambda: predict(self.predictor))
        sought = raw if self._extractor is None else timed("predict", lambda: predict(self.predictor.search))
        steered = raw
        if self._snapped and self.index is not None and self.array is not None:
            index, vectors = self.index, self.array.vectors
            last, means = np.stack([g[-1] for g in given]), np.stack([g.mean(0) for g in given])
            steered = timed("snap", lambda: snap(sought, last, means, index, vectors).vectors)
        extracts: list[Nearest] | None = None
        if self._extractor is not None:
            extracts = timed("extract", lambda: self._extract(raw, sought, filled))
        nearest = None if extracts is None else (lambda _, rows: [extracts[i] for i in rows])
        stacked = np.stack(given) if same else None
        opens = [ends_sentence(texts[-1]) for texts in contexts]
        answers = timed("decode", lambda: self.ladder.decode(steered, stacked, nearest, opens))
        cosines = (raw * steered).sum(axis=1).tolist()
        found: list[Nearest | None] = [None] * len(raw) if extracts is None else [*extracts]
        rows = zip(answers, raw, found, filled, cosines, cut, strict=True)
        return [
            Prediction(answer, vector, extract, context, self.predictor.name, cosine, truncated, clock)
            for answer, vector, extract, context, cosine, truncated in rows
        ]

    def _extract(
        self, vectors: NDArray[np.float32], searches: NDArray[np.float32], contexts: Sequence[Context]
    ) -> list[Nearest]:
        """The best matching corpus chunk for each prediction, without its context and the chunks beside it."""
        assert self._extractor is not None
        assert self.array is not None
        rows, cosines = self._extractor.answers(vectors, [set(c.texts) for c in contexts], searches)
        texts = self.array.texts(np.maximum(rows, 0))
        return [Nearest(t if r >= 0 else "", float(c)) for t, r, c in zip(texts, rows, cosines, strict=True)]
