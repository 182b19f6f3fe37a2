"""Controls: the test windows with the order of the text disturbed.

A predictor that only knows its context's topic scores the same when the context's vectors are shuffled, or when the
article is read backwards. Both controls keep windows, candidates and targets as comparable as possible.

Letters: B windows in a batch, T chunks in a context, D vector length.
"""

from collections.abc import Iterator

import numpy as np

from lvm.evaluate.metrics import Float32Array, Ints
from lvm.vectors.sequences import Windows

RowBatch = tuple[Float32Array, Float32Array, Ints, Ints]
"""Contexts (B, T, D), targets (B, D), rows of the contexts (B, T) and of the targets (B,)."""

BATCH_WINDOWS = 1024
"""Windows scored at a time: 16 MB of contexts, and 40 MB of cosines with a pool of 10,000."""


def as_written(windows: Windows) -> Iterator[RowBatch]:
    """The windows unchanged."""
    context_rows, target_rows = windows.rows_of_context, windows.rows_of_target
    for low in range(0, len(windows), BATCH_WINDOWS):
        part = slice(low, low + BATCH_WINDOWS)
        yield (*windows.batch(part), context_rows[part], target_rows[part])


def shuffled(windows: Windows, seed: int = 0) -> Iterator[RowBatch]:
    """The windows with each context's vectors in random order."""
    rng = np.random.default_rng(seed)
    for contexts, targets, context_rows, target_rows in as_written(windows):
        order = rng.permuted(np.broadcast_to(np.arange(windows.context), context_rows.shape), axis=1)
        yield (
            np.take_along_axis(contexts, order[:, :, None], axis=1),
            targets,
            np.take_along_axis(context_rows, order, axis=1),
            target_rows,
        )


def backwards(windows: Windows) -> Iterator[RowBatch]:
    """The windows reversed: the first chunk is predicted from the others, last one first."""
    for contexts, targets, context_rows, target_rows in as_written(windows):
        chunks = np.concatenate([contexts, targets[:, None]], axis=1)[:, ::-1]
        rows = np.concatenate([context_rows, target_rows[:, None]], axis=1)[:, ::-1]
        yield np.ascontiguousarray(chunks[:, :-1]), chunks[:, -1], rows[:, :-1], rows[:, -1]


CONTROLS = {"as written": as_written, "context shuffled": shuffled, "article backwards": backwards}
