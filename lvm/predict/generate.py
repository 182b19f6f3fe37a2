"""Text in, predicted text out: encode, fill the context, predict, snap, decode, with the time of each.

One object per model, loaded once; a corpus is optional. Letters: B contexts, T context chunks, D vector length.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lvm.codec.identity import require_same_codec
from lvm.codec.ladder import Answer, Ladder, LadderSettings, Nearest
from lvm.codec.zoo import Codec
from lvm.errors import InputError
from lvm.predict.extract import Extractor
from lvm.predict.record import load_record
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH, Context, Fill, build_context, snap
from lvm.storage import Location
from lvm.vectors.index import Index, load_index
from lvm.vectors.sequences import VectorArray, open_vectors

R = TypeVar("R")

SHIPPED = Path(__file__).parent / "weights"
"""Model records that ship with the package, for the codec that does."""

__all__ = ["CONTEXT_CHUNKS", "PASSTHROUGH", "Generator", "Predict", "Prediction", "predictor"]


class Predict(Protocol):
    """A predictor as a function."""

    def __call__(self, contexts: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, T, D) unit vectors to (B, D) unit vectors."""


@dataclass(frozen=True)
class Prediction:
    """A predicted next chunk and how it came about."""

    answer: Answer
    """Text, where it comes from, and its cosine to the vector that was decoded."""
    vector: NDArray[np.float32]
    """(D,) the prediction itself, before any snap."""
    extract: Nearest | None
    """What the corpus has nearest to the prediction, whether or not it answered; None without an index."""
    context: Context
    """What the predictor read."""
    model: str
    """Folder name of the model record, or "passthrough"."""
    snapped_cosine: float
    """Cosine between the raw prediction and what was decoded after the snap; 1 without one."""
    truncated: int
    """Texts longer than the codec's limit, which were cut."""
    milliseconds: dict[str, float]
    """encode, context, predict, snap, extract, decode; of the whole batch."""


def predictor(models: Location, name: str, codec: Codec) -> tuple[str, Predict]:
    """A model record as a function, and its folder name. Raises IdentityError on another codec's model."""
    if name == PASSTHROUGH:
        return PASSTHROUGH, lambda contexts: contexts[:, -1]
    import torch

    record = load_record(models, name)
    require_same_codec(record.identity, codec.identity, f"model {record.folder.name}", "the loaded codec")
    model = record.model.eval()

    def predict(contexts: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(contexts)).float().numpy())

    return record.folder.name, predict


class Generator:
    """Predicts the next chunk's text with one model, with a corpus behind it or without."""

    def __init__(
        self,
        codec: Codec,
        model: str,
        predict: Predict,
        array: VectorArray | None = None,
        index: Index | None = None,
        settings: LadderSettings | None = None,
        snapped: bool = False,
    ) -> None:
        """array and index: a corpus, both or neither; it completes short contexts, answers where no written text reads,
        and, with `snapped`, moves predictions onto itself before they are written. Raises IdentityError and InputError
        where they do not belong together."""
        if (array is None) != (index is None):
            raise InputError("an index without its vectors answers nothing; pass both or neither")
        if array is not None and index is not None:
            array.require_codec(codec.identity, "the loaded codec")
            index.require_array(array)
        if snapped and index is None:
            raise InputError("a snap needs a corpus; pass its vectors and index")
        self.codec, self.model, self._predict, self.array, self.index = codec, model, predict, array, index
        self.ladder = Ladder(codec, codec.writer, settings)
        self._snapped = snapped and model != PASSTHROUGH
        self._extractor = None if array is None or index is None else Extractor(array, index)

    @classmethod
    def load(
        cls,
        run: Location | None,
        model: str,
        codec: Codec,
        settings: LadderSettings | None = None,
        snapped: bool = False,
    ) -> "Generator":
        """From the folder of `latent run`: its vectors, index and models. Without one the predictors that ship with the
        package, and no corpus. Raises InputError where something is missing."""
        if run is None:
            folder, predict = predictor(SHIPPED, model, codec)
            return cls(codec, folder, predict, settings=settings)
        for part, stage in (("vectors", "encode"), ("index", "index"), ("models", "train")):
            if not (run / part).is_dir():
                raise InputError(
                    f"{run} has no {part}/; expected the output of `latent run` or `latent demo` "
                    f"(stage {stage} makes it)"
                )
        folder, predict = predictor(run / "models", model, codec)
        array, index = open_vectors(run / "vectors"), load_index(run / "index")
        return cls(codec, folder, predict, array, index, settings, snapped)

    @property
    def centre(self) -> NDArray[np.float32]:
        """(D,) the corpus mean, from which cosines are told apart best: the corpus', else the writer's; else zeros."""
        if self._extractor is not None:
            return self._extractor.centre
        writer = self.codec.writer
        return writer.centre if writer is not None else np.zeros(self.codec.identity.dim, np.float32)

    def next_chunk(self, texts: Sequence[str], fill: Fill = "retrieve") -> Prediction:
        """The predicted text after these chunks; fewer than five are completed as `fill` says."""
        return self.next_chunks([texts], fill)[0]

    def continue_(self, texts: Sequence[str], length: int, fill: Fill = "retrieve") -> Iterator[Prediction]:
        """`length` chunks, each predicted from all before it; what was written is read again as text."""
        chunks = list(texts)
        for _ in range(length):
            prediction = self.next_chunk(chunks, fill)
            chunks.append(prediction.answer.text)
            yield prediction

    def next_chunks(self, contexts: Sequence[Sequence[str]], fill: Fill = "retrieve") -> list[Prediction]:
        """A Prediction for each of B contexts of one or more chunks."""
        if not contexts:
            return []
        clock: dict[str, float] = {}

        def timed(stage: str, call: Callable[[], R]) -> R:
            begun = time.perf_counter()
            result = call()
            clock[stage] = round((time.perf_counter() - begun) * 1000, 3)
            return result

        flat = [text for texts in contexts for text in texts]
        ends = np.cumsum([len(texts) for texts in contexts])
        encoded = timed("encode", lambda: self.codec.encode(flat))
        parts = np.split(encoded.vectors, ends[:-1])
        cut = [int(part.sum()) for part in np.split(encoded.truncated, ends[:-1])]
        filled = timed(
            "context",
            lambda: [
                build_context(own, texts, CONTEXT_CHUNKS, fill, self.index, self.array)
                for own, texts in zip(parts, contexts, strict=True)
            ],
        )
        # Contexts that were not completed have a length of their own and are predicted one by one.
        given = [c.vectors for c in filled]
        same = len({g.shape for g in given}) == 1
        if same:
            raw = timed("predict", lambda: self._predict(np.stack(given)))
        else:
            raw = timed("predict", lambda: np.concatenate([self._predict(g[None]) for g in given]))
        steered = raw
        if self._snapped and self.index is not None and self.array is not None:
            index, vectors = self.index, self.array.vectors
            last, means = np.stack([g[-1] for g in given]), np.stack([g.mean(0) for g in given])
            steered = timed("snap", lambda: snap(raw, last, means, index, vectors).vectors)
        extracts: list[Nearest] | None = None
        if self._extractor is not None:
            extracts = timed("extract", lambda: self._extract(raw, filled))
        nearest = None if extracts is None else (lambda _, rows: [extracts[i] for i in rows])
        answers = timed(
            "decode", lambda: self.ladder.decode(steered, np.stack(given) if same else None, nearest)
        )
        return [
            Prediction(
                answers[i],
                raw[i],
                None if extracts is None else extracts[i],
                filled[i],
                self.model,
                float((raw[i] * steered[i]).sum()),
                cut[i],
                clock,
            )
            for i in range(len(contexts))
        ]

    def _extract(self, vectors: NDArray[np.float32], contexts: Sequence[Context]) -> list[Nearest]:
        """The nearest chunk for each prediction, the context and what stands beside it left out."""
        assert self._extractor is not None
        assert self.array is not None
        rows, cosines = self._extractor.answers(vectors, [set(c.texts) for c in contexts])
        texts = self.array.texts(np.maximum(rows, 0))
        return [Nearest(t if r >= 0 else "", float(c)) for t, r, c in zip(texts, rows, cosines, strict=True)]
