"""Validation of NPZ files of training sequences: a report of all problems.

Layouts and names are those of `lvm.vectors.npz`. Headers are read first, then, in blocks, the arrays whose headers are
valid. Pickles are never loaded.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError
from lvm.vectors.sequences import SPLITS
from lvm.vectors.shards import DIM, NORM_TOLERANCE

Layout = Literal["sequences", "documents", "split"]
LAYOUTS: tuple[Layout, ...] = ("sequences", "documents", "split")

BLOCK_ROWS = 2048
"""Sequences written or checked at a time: 36 MiB at T = 5."""

KEYS: dict[Layout, tuple[str, ...]] = {
    "sequences": (
        *("context_vectors", "target_vectors", "context_texts", "target_texts"),
        *("sequence_ids", "article_ids"),
    ),
    "documents": ("context_vectors", "target_vectors", "doc_ids", "positions"),
    "split": tuple(f"{s}_{n}" for s in SPLITS for n in ("contexts", "targets", "masks")),
}
"""Required arrays of each layout."""


@dataclass(frozen=True)
class Problem:
    """A reason why a file cannot be used."""

    where: str
    """Name of the array."""
    expected: str
    got: str
    cure: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}. {self.cure}"


@dataclass
class NpzReport:
    """Result of a check."""

    path: Path
    layout: Layout | None = None
    """None if the arrays match no layout."""
    rows: dict[str, int] = field(default_factory=dict)
    """Number of sequences by split; the key is "all" in layouts without splits."""
    context: int | None = None
    """T."""
    dim: int | None = None
    """D."""
    identity: CodecIdentity | None = None
    """Codec stored in the file."""
    problems: list[Problem] = field(default_factory=list)
    """Reasons why the file cannot be imported."""
    notes: list[str] = field(default_factory=list)
    """Remarks that do not prevent an import."""

    @property
    def ok(self) -> bool:
        """Whether the file can be imported."""
        return not self.problems


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


OTHER_NAMES = {
    "context_sequences": "context_vectors",
    "contexts": "context_vectors",
    "targets": "target_vectors",
    "train_context_sequences": "train_contexts",
    "val_context_sequences": "val_contexts",
    "val_target_vectors": "val_targets",
}
"""Names that other tools use for these arrays."""

_UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Errors of zipfile and numpy for damaged or encrypted members and unknown compression (NotImplementedError is a
RuntimeError)."""

UNICODE = 'Store text as a unicode array, np.array(texts, dtype="U"), and save again.'


def check_npz(path: Path | str, dim: int = DIM) -> NpzReport:
    """Check an NPZ file of sequences in blocks, without loading pickles.

    dim: expected vector length. Raises InputError only if there is no such file.
    """
    report = NpzReport(Path(path))
    if not report.path.is_file():
        raise InputError(f"no file {report.path}; expected an NPZ file of training sequences")
    try:
        archive = zipfile.ZipFile(report.path)
    except (zipfile.BadZipFile, OSError) as err:
        cure = "It is not an NPZ file, or is truncated: copy or write it again."
        report.problems.append(Problem("file", "a zip archive of .npy arrays", str(err), cure))
        return report
    with archive:
        _Check(report, archive, dim).run()
    return report


class _Check:
    """One pass over an archive: headers first, then the arrays whose headers are valid."""

    def __init__(self, report: NpzReport, archive: zipfile.ZipFile, dim: int) -> None:
        self.report = report
        self.archive = archive
        self.dim = dim
        self.headers: dict[str, _Header] = {}
        self.unreadable: set[str] = set()
        self.verified: set[str] = set()
        """Arrays read to their end, where zipfile compares the checksum."""

    def run(self) -> None:
        self.read_headers()
        self.verify(n for n in list(self.headers) if not n.endswith(("vectors", "contexts", "targets")))
        self.choose_layout()
        self.read_codec()
        if self.report.layout == "split":
            for split in SPLITS:
                self.check_sequences(split, f"{split}_contexts", f"{split}_targets")
                self.check_masks(split)
            self.check_context_lengths()
            self.check_articles()
        elif self.report.layout is not None:
            self.check_sequences("all", "context_vectors", "target_vectors")
            if self.report.layout == "sequences":
                self.check_texts()
                self.check_ids()
            else:
                self.check_documents()
        self.verify(list(self.headers))

    def verify(self, names: Iterable[str]) -> None:
        """Read arrays to their end, once each; damaged ones are reported and not checked further."""
        for name in names:
            if name in self.verified:
                continue
            self.verified.add(name)
            try:
                with self.archive.open(f"{name}.npy") as file:
                    while file.read(1 << 20):
                        pass
            except _UNREADABLE as err:
                self.damaged(name, err)

    def damaged(self, name: str, err: Exception) -> None:
        self.unreadable.add(name)
        del self.headers[name]
        cure = "The file is damaged: copy or write it again."
        self.problem(name, "readable data to its end", f"damaged data ({err})", cure)

    def problem(self, where: str, expected: str, got: str, cure: str) -> None:
        self.report.problems.append(Problem(where, expected, got, cure))

    def expect_shape(self, name: str, shape: tuple[int, ...], what: str) -> bool:
        """Report a problem unless the array has this shape: one `what`."""
        if (got := self.headers[name].shape) == shape:
            return True
        self.problem(name, f"shape {shape}", f"shape {got}", f"One {what}.")
        return False

    # ---- headers

    def read_headers(self) -> None:
        for info in self.archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                self.report.notes.append(f"{info.filename} is not an .npy array and is ignored")
                continue
            try:
                with self.archive.open(info) as file:
                    header = _read_header(file)
            except _UNREADABLE as err:
                self.unreadable.add(name)
                cure = "Write the file again with numpy.savez."
                self.problem(name, "an .npy array", f"unreadable data ({err})", cure)
                continue
            if header.dtype.hasobject:
                self.unreadable.add(name)
                got = f"an object array {header.shape}, which is a pickle and could run code when loaded"
                self.problem(name, "numbers or unicode text", got, UNICODE)
                continue
            self.headers[name] = header

    def choose_layout(self) -> None:
        present = {*self.headers, *self.unreadable}

        def share(layout: Layout) -> tuple[float, int]:
            return sum(k in present for k in KEYS[layout]) / len(KEYS[layout]), len(KEYS[layout])

        # Two layouts share context_vectors and target_vectors; the other arrays decide.
        layout = max(LAYOUTS, key=share)
        if not any(k in present for k in KEYS[layout]):
            known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
            got = ", ".join(sorted(present)) or "no array"
            self.problem("file", f"the arrays of one layout ({known})", got, "Rename the arrays.")
            return
        self.report.layout = layout
        for key in KEYS[layout]:
            if key not in present:
                others = ", ".join(sorted(present))
                alias = next((a for a, ours in OTHER_NAMES.items() if ours == key and a in present), None)
                cure = f"Rename {alias} to {key}." if alias else "Add it and save again."
                self.problem(key, f"this array in layout {layout}", f"only {others}", cure)
        known_keys = {*KEYS[layout], "codec", *(f"{s}_doc_ids" for s in SPLITS)}
        if extra := sorted(present - known_keys):
            self.report.notes.append(f"not part of layout {layout}, ignored: {', '.join(extra)}")

    def read_codec(self) -> None:
        if "codec" not in self.headers:
            if "codec" not in self.unreadable:
                note = "names no codec: make sure its vectors come from the codec you use them with"
                self.report.notes.append(note)
            return
        try:
            self.report.identity = CodecIdentity.from_dict(json.loads(str(self.array("codec"))))
        except (ValueError, TypeError, InputError) as err:
            self.problem("codec", "a codec identity as JSON", str(err), "Remove the array or export again.")
            return
        if (dim := self.report.identity.dim) != self.dim:
            self.problem("codec", f"a codec of {self.dim} dimensions", str(dim), "Use that codec's size.")

    # ---- vectors

    def check_sequences(self, split: str, contexts: str, targets: str) -> None:
        shapes = {}
        for name, axes in ((contexts, 3), (targets, 2)):
            header = self.headers.get(name)
            if header is None:
                continue
            wanted = "(N, T, D)" if axes == 3 else "(N, D)"
            if len(header.shape) != axes:
                cure = f"Reshape it to {wanted.replace('D', str(self.dim))}."
                self.problem(name, f"shape {wanted}", f"shape {header.shape}", cure)
                continue
            shapes[name] = header.shape
            if header.shape[-1] != self.dim:
                cure = f"They come from another encoder: encode the texts with a {self.dim}-d codec."
                self.problem(name, f"vectors of {self.dim} numbers", f"{header.shape[-1]}", cure)
            if header.dtype.kind != "f":
                cure = "Convert with .astype(np.float32)."
                self.problem(name, "float16, float32 or float64", str(header.dtype), cure)
            elif header.shape[-1] == self.dim:
                self.check_values(name)
        if contexts in shapes:
            self.report.context = shapes[contexts][1]
            self.report.dim = shapes[contexts][2]
            if shapes[contexts][1] < 1:
                self.problem(contexts, "at least one context vector", "T = 0", "Export with a context of 5.")
        if contexts in shapes and targets in shapes and shapes[contexts][0] != shapes[targets][0]:
            cure = "Each sequence needs one context and one target, in the same order."
            expected = f"{shapes[contexts][0]} rows, as {contexts} has"
            self.problem(targets, expected, f"{shapes[targets][0]}", cure)
        rows = next((shapes[n][0] for n in (contexts, targets) if n in shapes), None)
        if rows is not None:
            self.report.rows[split] = rows
            if rows == 0:
                cure = "Export from more, or longer, articles."
                self.problem(contexts, "at least one sequence", "none", cure)

    def check_values(self, name: str) -> None:
        """Check that every vector is finite and of unit norm; padding may be zero."""
        mask_name = name.removesuffix("_contexts") + "_masks" if name.endswith("_contexts") else ""
        masks = None
        if mask_name in self.headers and self.headers[mask_name].shape == self.headers[name].shape[:2]:
            masks = self.array(mask_name)
        not_finite, off, first_bad, first_off, row = 0, 0, "", "", 0
        try:
            for block in self.blocks(name):
                norms = np.linalg.norm(block.astype(np.float32, copy=False), axis=-1)
                finite = np.isfinite(norms)
                wrong = finite & (np.abs(norms - 1.0) > NORM_TOLERANCE)
                if masks is not None:
                    wrong &= masks[row : row + len(block)].astype(bool)
                if not finite.all():
                    first_bad = first_bad or _place(np.argwhere(~finite)[0], row)
                    not_finite += int((~finite).sum())
                if wrong.any():
                    at = np.argwhere(wrong)[0]
                    first_off = first_off or f"norm {norms[tuple(at)]:.4f} in {_place(at, row)}"
                    off += int(wrong.sum())
                row += len(block)
        except _UNREADABLE as err:
            self.damaged(name, err)
            return
        finally:
            self.verified.add(name)
        if not_finite:
            got = f"NaN or infinity in {not_finite} vectors, the first in {first_bad}"
            self.problem(name, "finite numbers", got, "Remove those sequences, or encode their texts again.")
        if off:
            cure = "Divide each vector by its norm: v / np.linalg.norm(v, axis=-1, keepdims=True)."
            self.problem(name, "vectors of norm 1", f"{off} of another norm, the first: {first_off}", cure)

    def check_masks(self, split: str) -> None:
        name = f"{split}_masks"
        header, contexts = self.headers.get(name), self.headers.get(f"{split}_contexts")
        if header is None:
            return
        shape = contexts.shape[:2] if contexts is not None and len(contexts.shape) == 3 else header.shape
        if not self.expect_shape(name, shape, "flag per context vector"):
            return
        values = self.array(name)
        if header.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
            self.problem(name, "bool, or 0 and 1", f"{header.dtype}", "Convert with .astype(bool).")
        elif values.ndim == 2 and len(values) and not values.astype(bool).any(axis=1).all():
            row = int(np.flatnonzero(~values.astype(bool).any(axis=1))[0])
            got = f"only padding in row {row}"
            self.problem(name, "a context vector in each row", got, "Remove that sequence.")

    def check_context_lengths(self) -> None:
        headers = {s: self.headers.get(f"{s}_contexts") for s in SPLITS}
        lengths = {s: h.shape[1] for s, h in headers.items() if h is not None and len(h.shape) == 3}
        if len(set(lengths.values())) > 1:
            got = ", ".join(f"{s} {n}" for s, n in lengths.items())
            self.problem("contexts", "one context length in all splits", got, "Pad or cut to one length.")

    def check_articles(self) -> None:
        ids = {s: self.array(f"{s}_doc_ids") for s in SPLITS if f"{s}_doc_ids" in self.headers}
        for split in ids:
            if (rows := self.report.rows.get(split)) is not None:
                self.expect_shape(f"{split}_doc_ids", (rows,), "id per sequence")
        for first, second in combinations(ids, 2):
            shared = np.intersect1d(ids[first], ids[second])
            if len(shared):
                got = f"{len(shared)} in both, the first {shared[0]}"
                cure = "Split by article, not by sequence: a model would be tested on text it has seen."
                self.problem(f"{first}_doc_ids and {second}_doc_ids", "no article in two splits", got, cure)
        if not ids:
            self.report.notes.append("names no articles: whether one is in two splits cannot be checked")

    # ---- texts and ids

    def check_texts(self) -> None:
        for name in ("context", "target"):
            header, vectors = self.headers.get(f"{name}_texts"), self.headers.get(f"{name}_vectors")
            if header is None:
                continue
            if header.dtype.kind != "U":
                self.problem(f"{name}_texts", "unicode text", str(header.dtype), UNICODE)
            if vectors is not None:
                self.expect_shape(f"{name}_texts", vectors.shape[:-1], "text per vector")

    def check_ids(self) -> None:
        rows = self.report.rows.get("all")
        for name in ("sequence_ids", "article_ids"):
            header = self.headers.get(name)
            if header is None:
                continue
            if rows is not None:
                self.expect_shape(name, (rows,), "id per sequence")
            if header.dtype.kind not in "iuU":
                cure = "Convert with .astype(str)."
                self.problem(name, "integers or unicode text", str(header.dtype), cure)
            elif name == "sequence_ids":
                values, counts = np.unique(self.array(name), return_counts=True)
                if (counts > 1).any():
                    twice = values[counts > 1]
                    got = f"{twice[0]} {counts[counts > 1][0]} times ({len(twice)} such ids)"
                    self.problem(name, "each id once", got, "Remove the repeated sequences.")

    def check_documents(self) -> None:
        rows = self.report.rows.get("all")
        valid = True
        for name in ("doc_ids", "positions"):
            header = self.headers.get(name)
            if header is None:
                valid = False
                continue
            valid &= header.dtype.kind in "iu"
            if header.dtype != np.dtype("int32"):
                self.problem(name, "int32", str(header.dtype), "Convert with .astype(np.int32).")
            if rows is not None and not self.expect_shape(name, (rows,), "number per sequence"):
                valid = False
            elif header.dtype.kind in "iu" and (self.array(name) < 0).any():
                row = int(np.flatnonzero(self.array(name) < 0)[0])
                self.problem(name, "numbers from 0", f"{self.array(name)[row]} in row {row}", "Count from 0.")
        if not valid:
            return
        places = np.stack([self.array(n).astype(np.int64) for n in ("doc_ids", "positions")], axis=1)
        values, counts = np.unique(places, axis=0, return_counts=True)
        if (counts > 1).any():
            doc, position = values[counts > 1][0]
            got = f"article {doc}, position {position}, {counts[counts > 1][0]} times"
            self.problem("positions", "each target once", got, "Remove the repeated sequences.")

    # ---- reading

    def array(self, name: str) -> NDArray[Any]:
        with self.archive.open(f"{name}.npy") as file:
            values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return values

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        header = self.headers[name]
        with self.archive.open(f"{name}.npy") as file:
            if _read_header(file).fortran:  # column-major: rows cannot be read in blocks
                yield self.array(name)
                return
            row_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
            for low in range(0, header.shape[0], BLOCK_ROWS):
                num = min(BLOCK_ROWS, header.shape[0] - low)
                data = file.read(num * row_bytes)
                if len(data) != num * row_bytes:
                    raise EOFError(f"the data end in row {low + len(data) // max(row_bytes, 1)}")
                yield np.frombuffer(data, header.dtype).reshape(num, *header.shape[1:])
            file.read(1)  # zipfile compares the checksum at the member's end


def _read_header(file: Any) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return _Header(*read(file))


def _place(at: NDArray[np.int64], first_row: int) -> str:
    row = f"row {first_row + int(at[0])}"
    return row if len(at) == 1 else f"{row}, position {int(at[1])}"
