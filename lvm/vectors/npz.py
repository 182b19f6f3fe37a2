"""Import and export of training sequences as NPZ files. Pickles are never loaded; `npz_check` validates a file.

Three layouts, each with float vectors of unit norm; T is the context length, usually 5, D vector length:

    sequences   context_vectors (N, T, D), target_vectors (N, D), context_texts (N, T) and target_texts (N,)
                unicode, sequence_ids (N,), article_ids (N,)
    documents   context_vectors (N, T, D), target_vectors (N, D), doc_ids (N,) int32, positions (N,) int32:
                the target's position in its article
    split       for each of train, val and test: train_contexts (n, T, D), train_targets (n, D), train_masks
                (n, T) bool, False for padding

Each may also contain `codec`, the codec identity as a JSON string; files of other tools lack it. Our split files also
contain train_doc_ids and so on, so that a check finds articles that are in two splits.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError
from lvm.storage import temporary_name
from lvm.vectors.npz_check import BLOCK_ROWS, LAYOUTS, Layout, check_npz
from lvm.vectors.sequences import SPLITS, Windows, split_articles
from lvm.vectors.shards import publish

# --------------------------------------------------------------------------------------------------- export


def export_npz(
    windows: Windows | Mapping[str, Windows], path: Path | str, layout: Layout = "sequences", seed: int = 0
) -> None:
    """Write windows to `path` as float32, streamed in blocks; texts are compressed. The file appears when complete.

    windows: one set, or for layout "split" the three of `Windows.split`; a single set is then split with `seed`.
    Raises InputError on an unknown layout.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise InputError(f"unknown NPZ layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if layout == "split":
        parts = windows.split(seed) if isinstance(windows, Windows) else dict(windows)
        if missing := [s for s in SPLITS if s not in parts]:
            raise InputError(f"layout split needs {', '.join(SPLITS)}; missing: {', '.join(missing)}")
        members = [m for s in SPLITS for m in _split_members(s, parts[s])]
        identity = parts["train"].identity
    else:
        if not isinstance(windows, Windows):
            got = ", ".join(windows)
            raise InputError(f"layout {layout} takes one set of windows, got {got}; export each alone")
        members = _sequence_members(windows) if layout == "sequences" else _document_members(windows)
        identity = windows.identity

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for member in members:
                _write_member(archive, member)
            _write_member(archive, _codec_member(identity))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Member:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[NDArray[Any]]]
    deflate: bool = False


def _write_member(archive: zipfile.ZipFile, member: _Member) -> None:
    info = zipfile.ZipInfo(f"{member.name}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # fixed: reproducible files
    info.compress_type = zipfile.ZIP_DEFLATED if member.deflate else zipfile.ZIP_STORED
    descr = np.lib.format.dtype_to_descr(member.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": member.shape}
    with archive.open(info, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for block in member.blocks():
            file.write(np.ascontiguousarray(block, member.dtype).tobytes())


def _vector_members(windows: Windows, contexts: str, targets: str) -> list[_Member]:
    num, dim, float32 = len(windows), windows.identity.dim, np.dtype("<f4")
    shape = (num, windows.context, dim)
    return [
        _Member(contexts, shape, float32, lambda: (c for c, _ in windows.batches(BLOCK_ROWS))),
        _Member(targets, (num, dim), float32, lambda: (t for _, t in windows.batches(BLOCK_ROWS))),
    ]


def _array_member(name: str, values: NDArray[Any], deflate: bool = False) -> _Member:
    return _Member(name, values.shape, values.dtype, lambda: iter([values]), deflate)


def _codec_member(identity: CodecIdentity) -> _Member:
    return _array_member("codec", np.array(json.dumps(identity.to_dict())))


def _text_member(windows: Windows, name: str, rows: NDArray[np.int64]) -> _Member:
    """Texts of `rows` as a fixed-width unicode array, since reading an object array needs pickle."""
    flat = rows.reshape(-1)

    def texts() -> Iterator[list[str]]:
        for low in range(0, len(flat), BLOCK_ROWS):
            yield windows.array.texts(flat[low : low + BLOCK_ROWS])

    dtype = np.dtype(f"<U{max((len(t) for block in texts() for t in block), default=1) or 1}")
    return _Member(name, rows.shape, dtype, lambda: (np.array(b, dtype) for b in texts()), deflate=True)


def _sequence_members(windows: Windows) -> list[_Member]:
    return [
        *_vector_members(windows, "context_vectors", "target_vectors"),
        _text_member(windows, "context_texts", windows.rows_of_context),
        _text_member(windows, "target_texts", windows.rows_of_target),
        # The id of a sequence is that of its target chunk: stable, and found in the shards.
        _array_member(
            "sequence_ids", np.asarray(windows.array.chunk_ids[windows.rows_of_target]), deflate=True
        ),
        _array_member("article_ids", np.asarray(windows.doc_ids, np.int32)),
    ]


def _document_members(windows: Windows) -> list[_Member]:
    return [
        *_vector_members(windows, "context_vectors", "target_vectors"),
        _array_member("doc_ids", np.asarray(windows.doc_ids, np.int32)),
        _array_member("positions", np.asarray(windows.array.positions[windows.rows_of_target], np.int32)),
    ]


def _split_members(split: str, windows: Windows) -> list[_Member]:
    return [
        *_vector_members(windows, f"{split}_contexts", f"{split}_targets"),
        _array_member(f"{split}_masks", np.ones((len(windows), windows.context), np.bool_)),
        _array_member(f"{split}_doc_ids", np.asarray(windows.doc_ids, np.int32)),
    ]


# --------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class Sequences:
    """Sequences of an NPZ file; `batch`, `batches`, `subset`, `split` and `doc_ids` work as in `Windows`."""

    contexts: NDArray[np.float32]
    """(N, T, D)."""
    targets: NDArray[np.float32]
    """(N, D)."""
    masks: NDArray[np.bool_]
    """(N, T) False for padding."""
    doc_ids: NDArray[Any] | None
    """(N,) article of each sequence; None if the file has none."""
    identity: CodecIdentity | None
    """Codec of the vectors; None if unknown."""
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Other arrays of the layout: texts, ids, positions."""

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Contexts (B, T, D) and targets (B, D) of these sequences, float32."""
        return self.contexts[indices], self.targets[indices]

    def batches(self, batch_rows: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """All sequences in order, `batch_rows` at a time."""
        for low in range(0, len(self), batch_rows):
            yield self.batch(slice(low, low + batch_rows))

    def subset(self, indices: Any) -> "Sequences":
        """These sequences only: integers, or a mask of N booleans."""
        return Sequences(
            self.contexts[indices],
            self.targets[indices],
            self.masks[indices],
            None if self.doc_ids is None else self.doc_ids[indices],
            self.identity,
            {k: v[indices] for k, v in self.extras.items()},
        )

    def split(self, seed: int = 0) -> dict[str, "Sequences"]:
        """Train, val and test by article. Raises InputError if the file has no article ids, or too few articles."""
        if self.doc_ids is None:
            raise InputError(
                "these sequences name no articles, so they cannot be split by article; expected article_ids "
                "or doc_ids in the file, or the layout split"
            )
        # Article ids may be any integers or strings, so their ranks are split.
        names, ranks = np.unique(self.doc_ids, return_inverse=True)
        parts = split_articles(np.arange(len(names)), seed)
        return {split: self.subset(np.isin(ranks, chosen)) for split, chosen in parts.items()}


def import_npz(path: Path | str, identity: CodecIdentity | None = None) -> dict[str, Sequences]:
    """Sequences of an NPZ file in any of the three layouts: {"all": …}, or train, val and test.

    identity: expected codec. Raises InputError listing all problems that `check_npz` finds, and IdentityError if the
    file has another codec.
    """
    path = Path(path)
    report = check_npz(path)
    if not report.ok:
        raise InputError(f"{path} cannot be imported:\n" + "\n".join(f"  {p}" for p in report.problems))
    found = report.identity
    if found is not None and identity is not None:
        require_same_codec(identity, found, "the codec asked for", str(path))
    with np.load(path, allow_pickle=False) as arrays:
        if report.layout == "split":
            return {s: _read_split(arrays, s, found or identity) for s in SPLITS}
        contexts = arrays["context_vectors"].astype(np.float32, copy=False)
        targets = arrays["target_vectors"].astype(np.float32, copy=False)
        names = ("context_texts", "target_texts", "sequence_ids", "positions")
        extras = {k: arrays[k] for k in names if k in arrays.files}
        ids = next((arrays[k] for k in ("article_ids", "doc_ids") if k in arrays.files), None)
        masks = np.ones(contexts.shape[:2], np.bool_)
        return {"all": Sequences(contexts, targets, masks, ids, found or identity, extras)}


def _read_split(arrays: Any, split: str, identity: CodecIdentity | None) -> Sequences:
    ids = f"{split}_doc_ids"
    return Sequences(
        arrays[f"{split}_contexts"].astype(np.float32, copy=False),
        arrays[f"{split}_targets"].astype(np.float32, copy=False),
        arrays[f"{split}_masks"].astype(np.bool_, copy=False),
        arrays[ids] if ids in arrays.files else None,
        identity,
    )
