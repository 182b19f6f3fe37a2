"""The corpus chunk that answers for a vector, where nothing that reads could be written.

All vectors share a large part: the corpus mean. A prediction is near that mean, and so are some chunks, which
would be nearest to every prediction. So directions away from the mean are compared, and how near a chunk lies
to predictions at large is taken off its score (Conneau et al. 2018, arXiv:1710.04087, section 2.3:
cross-domain similarity local scaling).

Letters: B vectors, N chunks, K candidates, D vector length.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.predict.steer import Floats, Neighbours, Rows, allowed_neighbours, unit
from lvm.vectors.array import VectorArray

BESIDE = 2
"""Chunks before and after one of the context that do not answer either: they are what was read, or is read next."""

CANDIDATES = 64
"""Nearest chunks by plain cosine that are compared about the mean."""

SAMPLE = 4096
"""Chunks the mean and a chunk's nearness to others are measured on."""

NEAREST_OF_SAMPLE = 10
"""Of them those whose mean cosine is a chunk's nearness to others; the paper's K."""


class Extractor:
    """Finds chunks of one corpus."""

    def __init__(self, corpus: VectorArray, index: Neighbours) -> None:
        vectors = corpus.vectors
        rows = np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).astype(np.int64)
        sample = np.asarray(vectors[rows], np.float32)
        self._corpus, self._index = corpus, index
        self.centre: NDArray[np.float32] = sample.mean(0)
        """(D,) mean of the corpus vectors."""
        self._sample = unit(sample - self.centre)

    def answers(self, vectors: Floats, read: Sequence[Collection[str]]) -> tuple[Rows, NDArray[np.float32]]:
        """`nearest`, with the texts just read for each vector and what stands beside them left out."""

        def barred(rows: Rows) -> NDArray[np.bool_]:
            around = np.clip(rows[..., None] + np.arange(-BESIDE, BESIDE + 1), 0, len(self._corpus) - 1)
            texts = np.array(self._corpus.texts(around.reshape(-1)), object).reshape(around.shape)
            docs = self._corpus.doc_ids
            same = docs[around] == docs[np.maximum(rows, 0)][..., None]
            met = np.array(
                [[[t in own for t in ts] for ts in row] for row, own in zip(texts, read, strict=True)]
            )
            found: NDArray[np.bool_] = (met & same).any(-1)
            return found

        return self.nearest(vectors, barred if any(read) else None)

    def nearest(
        self, vectors: Floats, barred: Callable[[Rows], NDArray[np.bool_]] | None = None
    ) -> tuple[Rows, NDArray[np.float32]]:
        """For each of (B, D) vectors the row of the chunk that answers best, and the plain cosine of the two;
        (B,) each.

        barred: rows (B, k) to True where one may not answer: the context's own, or an article held out. -1
        where none may.
        """
        given = unit(vectors)
        size = len(self._corpus.vectors)
        # Looked for along the direction from the mean: the inner product with it orders chunks as about the mean.
        away = unit(given - self.centre)
        _, rows = allowed_neighbours(away, self._index, min(CANDIDATES, size), size, barred)
        best = np.full(len(given), -1, np.int64)
        cosines = np.zeros(len(given), np.float32)
        for i, found in enumerate(rows):
            found = found[found >= 0]
            if not len(found):
                continue
            plain = np.asarray(self._corpus.vectors[found], np.float32)
            about = unit(plain - self.centre)
            crowd = np.partition(about @ self._sample.T, -NEAREST_OF_SAMPLE, axis=1)[:, -NEAREST_OF_SAMPLE:]
            score: NDArray[Any] = 2 * (about @ away[i]) - crowd.mean(1)
            place = int(score.argmax())
            best[i], cosines[i] = found[place], plain[place] @ given[i]
        return best, cosines
