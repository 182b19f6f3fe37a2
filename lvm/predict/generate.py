"""Text in, predicted text out: encode, fill the context, predict, snap, decode, with the time of each.

One object per model and corpus, loaded once. Letters: T context chunks, D = 768.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lvm.codec.identity import require_same_codec
from lvm.codec.ladder import Answer, Ladder, Nearest
from lvm.codec.zoo import Codec
from lvm.errors import InputError
from lvm.predict.record import load_record
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH, Context, Fill, build_context, snap
from lvm.storage import Location
from lvm.vectors.index import Index, load_index
from lvm.vectors.sequences import VectorArray, open_vectors

R = TypeVar("R")

__all__ = ["CONTEXT_CHUNKS", "PASSTHROUGH", "Generator", "Predict", "Prediction", "predictor"]


class Predict(Protocol):
    """A predictor as a function."""

    def __call__(self, contexts: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, T, D) unit vectors to (B, D) unit vectors."""


@dataclass(frozen=True)
class Prediction:
    """A predicted next chunk and how it came about."""

    answer: Answer
    """Text, rung, reasons and cosine to the snapped prediction."""
    context: Context
    """What the predictor read."""
    model: str
    """Folder name of the model record, or "passthrough"."""
    snapped_cosine: float
    """Cosine between the raw prediction and what was decoded after the snap."""
    truncated: int
    """Texts longer than the codec's limit, which were cut."""
    milliseconds: dict[str, float]
    """encode, context, predict, snap, decode."""


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
    """Predicts the next chunk's text with one model over one corpus."""

    def __init__(self, codec: Codec, model: str, predict: Predict, array: VectorArray, index: Index) -> None:
        array.require_codec(codec.identity, "the loaded codec")
        index.require_array(array)
        self.codec, self.model, self._predict, self.array, self.index = codec, model, predict, array, index
        self.ladder = Ladder(codec, nearest=self._nearest)

    @classmethod
    def load(cls, run: Location, model: str, codec: Codec) -> "Generator":
        """From the folder of `latent run`: its vectors, index and models."""
        for part, stage in (("vectors", "encode"), ("index", "index"), ("models", "train")):
            if not (run / part).is_dir():
                raise InputError(
                    f"{run} has no {part}/; expected the output of `latent run` or `latent demo` "
                    f"(stage {stage} makes it)"
                )
        folder, predict = predictor(run / "models", model, codec)
        return cls(codec, folder, predict, open_vectors(run / "vectors"), load_index(run / "index"))

    def _nearest(self, vectors: NDArray[np.float32]) -> list[Nearest]:
        scores, rows = self.index.search(vectors, 1)
        texts = self.array.texts(rows[:, 0].tolist())
        return [Nearest(t, float(s)) for t, s in zip(texts, scores[:, 0], strict=True)]

    def next_chunk(self, texts: Sequence[str], fill: Fill = "retrieve") -> Prediction:
        """The predicted text after these chunks; fewer than five are completed as `fill` says."""
        clock: dict[str, float] = {}

        def timed(stage: str, call: Callable[[], R]) -> R:
            begun = time.perf_counter()
            result = call()
            clock[stage] = round((time.perf_counter() - begun) * 1000, 3)
            return result

        encoded = timed("encode", lambda: self.codec.encode(list(texts)))
        context = timed(
            "context",
            lambda: build_context(encoded.vectors, texts, CONTEXT_CHUNKS, fill, self.index, self.array),
        )
        contexts = context.vectors[None]
        raw = timed("predict", lambda: self._predict(contexts))
        if self.model == PASSTHROUGH:  # the point is to see the codec alone
            steered = raw
        else:
            steered = timed(
                "snap",
                lambda: snap(raw, contexts[:, -1], contexts.mean(1), self.index, self.array.vectors).vectors,
            )
        source = " ".join(context.texts)
        (answer,) = timed("decode", lambda: self.ladder.decode(steered, [source]))
        return Prediction(
            answer,
            context,
            self.model,
            float((raw[0] * steered[0]).sum()),
            int(encoded.truncated.sum()),
            clock,
        )
