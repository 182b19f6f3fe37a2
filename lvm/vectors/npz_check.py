"""What is wrong with an NPZ file of training sequences, all of it, before anything is trained on it.

Layouts and names are those of `lvm.vectors.npz`. Headers are read first, then the arrays whose headers are right, block
by block. Pickles are never opened.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        "context_vectors",
        "target_vectors",
        "context_texts",
        "target_texts",
        "sequence_ids",
        "article_ids",
    ),
    "documents": ("context_vectors", "target_vectors", "doc_ids", "positions"),
    "split": tuple(f"{s}_{n}" for s in SPLITS for n in ("contexts", "targets", "masks")),
}
"""Arrays each layout must hold."""


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a file from being used."""

    where: str
    """Array, and row where it is one row."""
    expected: str
    got: str
    cure: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}. {self.cure}"


@dataclass
class NpzReport:
    """What a check found."""

    path: Path
    layout: Layout | None = None
    """None where the arrays fit no layout."""
    rows: dict[str, int] = field(default_factory=dict)
    """Sequences, by split; "all" where there are none."""
    context: int | None = None
    """T."""
    dim: int | None = None
    """D."""
    identity: CodecIdentity | None = None
    """Codec the file names."""
    problems: list[Problem] = field(default_factory=list)
    """Every one that was found."""
    notes: list[str] = field(default_factory=list)
    """Worth knowing, but no obstacle."""

    @property
    def ok(self) -> bool:
        """True where the file can be imported."""
        return not self.problems


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


OTHER_NAMES = {
    "context_sequences": "context_vectors",
    "contexts": "context_vectors",
    "targets": "target_vectors",
    "train_context_sequences": "train_contexts",
    "val_context_sequences": "val_contexts",
    "val_target_vectors": "val_targets",
}
"""What other tools call these arrays."""

_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile and numpy raise on damaged, encrypted or strangely compressed members."""

REWRITE = "Write the file again with numpy.savez"
UNICODE = 'Store text as a unicode array, np.array(texts, dtype="U"), and save again.'


def check_npz(path: Path | str, dim: int = DIM) -> NpzReport:
    """All that is wrong with an NPZ file of sequences. Reads it block by block and opens no pickle.

    dim: length the vectors must have. Raises InputError only where there is no such file.
    """
    report = NpzReport(Path(path))
    if not report.path.is_file():
        raise InputError(f"no file {report.path}; expected an NPZ file of training sequences")
    try:
        archive = zipfile.ZipFile(report.path)
    except (zipfile.BadZipFile, OSError) as err:
        report.problems.append(
            Problem(
                "file",
                "a zip archive of .npy arrays",
                str(err),
                "It is no NPZ, or cut off: copy or write it again.",
            )
        )
        return report
    with archive:
        _Check(report, archive, dim).run()
    return report


class _Check:
    """One pass over an archive: headers first, then the arrays whose headers are right."""

    def __init__(self, report: NpzReport, archive: zipfile.ZipFile, dim: int) -> None:
        self.report = report
        self.archive = archive
        self.dim = dim
        self.headers: dict[str, _Header] = {}
        self.unreadable: set[str] = set()
        self.proven: set[str] = set()
        """Arrays read to their end, where zipfile compares the checksum."""

    def run(self) -> None:
        self.read_headers()
        self.prove(n for n in list(self.headers) if not n.endswith(("vectors", "contexts", "targets")))
        self.choose_layout()
        self.read_codec()
        if self.report.layout == "split":
            for split in SPLITS:
                self.check_sequences(split, f"{split}_contexts", f"{split}_targets")
                self.check_masks(split)
            self.check_same("contexts")
            self.check_articles()
        elif self.report.layout is not None:
            self.check_sequences("all", "context_vectors", "target_vectors")
            if self.report.layout == "sequences":
                self.check_texts()
                self.check_ids()
            else:
                self.check_documents()
        self.prove(list(self.headers))

    def prove(self, names: Iterable[str]) -> None:
        """Read arrays to their end once; a damaged one is a problem, and nothing else is checked of it."""
        for name in names:
            if name in self.proven:
                continue
            self.proven.add(name)
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

    # ---- headers

    def read_headers(self) -> None:
        for info in self.archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                self.report.notes.append(f"{info.filename} is no .npy array and is ignored")
                continue
            try:
                with self.archive.open(info) as file:
                    header = _read_header(file)
            except _UNREADABLE as err:
                self.unreadable.add(name)
                self.problem(name, "a .npy array", f"something unreadable ({err})", f"{REWRITE}.")
                continue
            if header.dtype.hasobject:
                self.unreadable.add(name)
                self.problem(
                    name,
                    "numbers or unicode text",
                    f"an object array {header.shape}, which is a pickle and could run code when opened",
                    UNICODE,
                )
                continue
            self.headers[name] = header

    def choose_layout(self) -> None:
        present = {*self.headers, *self.unreadable}

        def share(layout: Layout) -> tuple[float, int]:
            return sum(k in present for k in KEYS[layout]) / len(KEYS[layout]), len(KEYS[layout])

        # Both layouts with context_vectors share two arrays; what lies beside them decides.
        layout = max(LAYOUTS, key=share)
        if not any(k in present for k in KEYS[layout]):
            known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
            self.problem(
                "file",
                f"the arrays of one layout ({known})",
                ", ".join(sorted(present)) or "no array",
                "Rename the arrays.",
            )
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
                self.report.notes.append(
                    "names no codec: make sure its vectors come from the codec you use them with"
                )
            return
        try:
            self.report.identity = CodecIdentity.from_dict(json.loads(str(self.array("codec"))))
        except (ValueError, TypeError, InputError) as err:
            self.problem("codec", "a codec identity as JSON", str(err), "Remove the array or export again.")
            return
        if self.report.identity.dim != self.dim:
            self.problem(
                "codec",
                f"a codec of {self.dim} dimensions",
                str(self.report.identity.dim),
                "Use that codec's size.",
            )

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
                self.problem(
                    name,
                    f"vectors of {self.dim} numbers",
                    f"{header.shape[-1]}",
                    f"They come from another encoder: encode the texts with a {self.dim}-d codec.",
                )
            if header.dtype.kind != "f":
                self.problem(
                    name,
                    "float16, float32 or float64",
                    str(header.dtype),
                    "Convert with .astype(np.float32).",
                )
            elif header.shape[-1] == self.dim:
                self.check_values(name)
        if contexts in shapes:
            self.report.context = shapes[contexts][1]
            self.report.dim = shapes[contexts][2]
            if shapes[contexts][1] < 1:
                self.problem(contexts, "at least one context vector", "T = 0", "Export with a context of 5.")
        if contexts in shapes and targets in shapes and shapes[contexts][0] != shapes[targets][0]:
            self.problem(
                targets,
                f"{shapes[contexts][0]} rows as {contexts} has",
                f"{shapes[targets][0]}",
                "Each sequence needs one context and one target, in the same order.",
            )
        rows = next((shapes[n][0] for n in (contexts, targets) if n in shapes), None)
        if rows is not None:
            self.report.rows[split] = rows
            if rows == 0:
                self.problem(
                    contexts, "at least one sequence", "none", "Export from more, or longer, articles."
                )

    def check_values(self, name: str) -> None:
        """Finite and of unit norm, every vector; padded context vectors may be zero."""
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
            self.proven.add(name)
        except _UNREADABLE as err:
            self.proven.add(name)
            self.damaged(name, err)
            return
        if not_finite:
            self.problem(
                name,
                "finite numbers",
                f"NaN or infinity in {not_finite} vectors, the first in {first_bad}",
                "Remove those sequences, or encode their texts again.",
            )
        if off:
            self.problem(
                name,
                "vectors of norm 1",
                f"{off} of another norm, the first: {first_off}",
                "Divide each vector by its norm: v / np.linalg.norm(v, axis=-1, keepdims=True).",
            )

    def check_masks(self, split: str) -> None:
        name = f"{split}_masks"
        header, contexts = self.headers.get(name), self.headers.get(f"{split}_contexts")
        if header is None:
            return
        if contexts is not None and len(contexts.shape) == 3 and header.shape != contexts.shape[:2]:
            self.problem(
                name, f"shape {contexts.shape[:2]}", f"shape {header.shape}", "One flag a context vector."
            )
            return
        values = self.array(name)
        if header.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
            self.problem(name, "bool, or 0 and 1", f"{header.dtype}", "Convert with .astype(bool).")
        elif values.ndim == 2 and len(values) and not values.astype(bool).any(axis=1).all():
            row = int(np.flatnonzero(~values.astype(bool).any(axis=1))[0])
            self.problem(
                name, "a real context vector in each row", f"none in row {row}", "Remove that sequence."
            )

    def check_same(self, what: str) -> None:
        lengths = {
            s: self.headers[f"{s}_{what}"].shape[1]
            for s in SPLITS
            if len(self.headers.get(f"{s}_{what}", _Header((), np.dtype("f4"))).shape) == 3
        }
        if len(set(lengths.values())) > 1:
            got = ", ".join(f"{s} {n}" for s, n in lengths.items())
            self.problem(what, "one context length in all splits", got, "Pad or cut them to one length.")

    def check_articles(self) -> None:
        ids = {s: self.array(f"{s}_doc_ids") for s in SPLITS if f"{s}_doc_ids" in self.headers}
        for split, values in ids.items():
            if split in self.report.rows and values.shape != (self.report.rows[split],):
                self.problem(
                    f"{split}_doc_ids",
                    f"shape ({self.report.rows[split]},)",
                    f"{values.shape}",
                    "One a sequence.",
                )
        for i, first in enumerate(ids):
            for second in list(ids)[i + 1 :]:
                shared = np.intersect1d(ids[first], ids[second])
                if len(shared):
                    self.problem(
                        f"{first}_doc_ids and {second}_doc_ids",
                        "no article in two splits",
                        f"{len(shared)} in both, the first {shared[0]}",
                        "Split by article, not by sequence: a model would be tested on text it has seen.",
                    )
        if not ids:
            self.report.notes.append("names no articles: whether one is in two splits cannot be checked")

    # ---- texts and ids

    def check_texts(self) -> None:
        contexts = self.headers.get("context_vectors")
        targets = self.headers.get("target_vectors")
        for name, vectors in (("context_texts", contexts), ("target_texts", targets)):
            header = self.headers.get(name)
            if header is None:
                continue
            if header.dtype.kind != "U":
                self.problem(name, "unicode text", str(header.dtype), UNICODE)
            if vectors is not None and header.shape != vectors.shape[:-1]:
                self.problem(
                    name, f"shape {vectors.shape[:-1]}", f"shape {header.shape}", "One text per vector."
                )

    def check_ids(self) -> None:
        rows = self.report.rows.get("all")
        for name in ("sequence_ids", "article_ids"):
            header = self.headers.get(name)
            if header is None:
                continue
            if rows is not None and header.shape != (rows,):
                self.problem(name, f"shape ({rows},)", f"shape {header.shape}", "One id a sequence.")
            if header.dtype.kind not in "iuU":
                self.problem(
                    name, "integers or unicode text", str(header.dtype), "Convert with .astype(str)."
                )
            elif name == "sequence_ids":
                values, counts = np.unique(self.array(name), return_counts=True)
                if (counts > 1).any():
                    twice = values[counts > 1]
                    got = f"{twice[0]} {counts[counts > 1][0]} times ({len(twice)} such ids)"
                    self.problem(name, "each id once", got, "Remove the repeated sequences.")

    def check_documents(self) -> None:
        rows = self.report.rows.get("all")
        right = True
        for name in ("doc_ids", "positions"):
            header = self.headers.get(name)
            if header is None:
                right = False
                continue
            if header.dtype != np.dtype("int32"):
                self.problem(name, "int32", str(header.dtype), "Convert with .astype(np.int32).")
            if rows is not None and header.shape != (rows,):
                right = False
                self.problem(name, f"shape ({rows},)", f"shape {header.shape}", "One number a sequence.")
            elif header.dtype.kind in "iu" and (self.array(name) < 0).any():
                row = int(np.flatnonzero(self.array(name) < 0)[0])
                self.problem(name, "numbers from 0", f"{self.array(name)[row]} in row {row}", "Count from 0.")
        if not right or any(self.headers[n].dtype.kind not in "iu" for n in ("doc_ids", "positions")):
            return
        places = np.stack(
            [self.array("doc_ids").astype(np.int64), self.array("positions").astype(np.int64)], axis=1
        )
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
            fortran = _read_header_fields(file)[1]
            if fortran:  # columns first: no rows to read block by block
                yield self.array(name)
                return
            row_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
            for low in range(0, header.shape[0], BLOCK_ROWS):
                num = min(BLOCK_ROWS, header.shape[0] - low)
                data = file.read(num * row_bytes)
                if len(data) != num * row_bytes:
                    raise EOFError(f"the data end in row {low + len(data) // max(row_bytes, 1)}")
                yield np.frombuffer(data, header.dtype).reshape(num, *header.shape[1:])
            file.read(1)  # the end of the member is where zipfile compares its checksum


def _read_header_fields(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _read_header(file: Any) -> _Header:
    shape, _, dtype = _read_header_fields(file)
    return _Header(shape, dtype)


def _place(at: NDArray[np.int64], first_row: int) -> str:
    row = f"row {first_row + int(at[0])}"
    return row if len(at) == 1 else f"{row}, position {int(at[1])}"
