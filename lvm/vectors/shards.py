"""Parquet shards and their manifest.

The output folder of a stage, on disk or object storage, contains shards and a manifest, which is written last and so
marks the stage as complete. Shards appear atomically, by a rename or an upload, and each footer records what the shard
was made from, so an interrupted stage resumes without a manifest.

    settings.json      kind and settings of the stage that claimed the folder; written first
    part-*.parquet     zstd, page checksums, one row per chunk, the vector as a plain fixed-size list
    manifest.json      codec identity, settings, inputs, source, licence, counts, size and SHA-256 of each shard
    shards-*.parquet   the list of shards if it is long; manifest.json then refers to it
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError, OutputError
from lvm.storage import (
    Location,
    RemotePath,
    on_arrow,
    sizes_in,
    storage_errors,
    sync_directory,
    temporary_name,
)

DIM = 768
"""Default vector length D."""

NORM_TOLERANCE = 2e-3
"""Maximum deviation of a stored vector's norm from 1. Rounding 768 numbers to float16 changes it by less than 2e-4
(measured on random unit vectors); vectors that were not normalised deviate far more."""

WRITERS = {"chunks": "latent chunk", "vectors": "latent encode", "index": "latent index"}
"""Command that writes each kind of manifest, for error messages."""

VectorType = Literal["float16", "float32"]
_ARROW_TYPES = {"float16": pa.float16(), "float32": pa.float32()}
_FOOTER_KEY = b"latent"

CHUNK_SCHEMA = pa.schema(
    [
        pa.field("chunk_id", pa.string()),  # 32 hex digits: hash of source, article id and position
        pa.field("doc_id", pa.int32()),  # number of the article in this corpus
        pa.field("position", pa.int32()),  # of the chunk in its article, from 0, without gaps
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field("source", pa.string()),
        pa.field("num_tokens", pa.int32()),  # end of sequence included
    ]
)


def vector_schema(dim: int = DIM, dtype: VectorType = "float16") -> pa.Schema:
    """CHUNK_SCHEMA and the columns that encoding adds; `vector` is a plain fixed-size list of `dim` numbers."""
    return pa.schema(
        [
            *CHUNK_SCHEMA,
            pa.field("truncated", pa.bool_()),  # to the codec's max_tokens
            pa.field("norm", pa.float32()),  # of the encoder's output, before normalisation
            pa.field("vector", pa.list_(_ARROW_TYPES[dtype], dim)),
        ]
    )


# --------------------------------------------------------------------------------------- hashes, atomic writes


def fingerprint(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON-able value, independent of the order of mapping keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Location) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep_temporaries(directory: Location) -> list[str]:
    """Delete the temporary files that a killed job left in `directory`; returns their names."""
    # On object storage there are none: an interrupted upload leaves no object.
    left: list[Location] = sorted(directory.glob(".*.tmp"), key=str)
    for path in left:
        path.unlink(missing_ok=True)
    return [p.name for p in left]


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished temporary file to `path` atomically, with fsync before and after."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def cannot_write(path: Location, err: Exception) -> OutputError:
    """The error to raise for a full disk or missing permissions."""
    reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    return OutputError(
        f"{path} cannot be written ({reason}); make room or choose another --output, then run this again: finished "
        "work is kept"
    )


def write_bytes(path: Location, data: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        publish(temporary, path)
    except OSError as err:
        raise cannot_write(path, err) from err
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Location, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


# --------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Shard:
    """A manifest's entry for one file."""

    file: str
    """Name inside the stage's folder."""
    rows: int
    """Number of chunks."""
    bytes: int
    sha256: str
    """Hash of the file, 64 hex digits."""


def with_footer(table: pa.Table, record: Mapping[str, Any]) -> pa.Table:
    """`table` with a JSON-able record that `write_table` stores in the Parquet footer."""
    return table.replace_schema_metadata({_FOOTER_KEY: json.dumps(record, sort_keys=True).encode()})


def read_footer(path: Location) -> dict[str, Any]:
    """The record that `with_footer` stored in this file, or {}. Raises InputError if the file is not valid Parquet."""
    return footer_in(_open(path, whole=False).schema_arrow)


def footer_in(schema: pa.Schema) -> dict[str, Any]:
    """The record that `with_footer` stored in a table with this schema, or {}."""
    record = json.loads((schema.metadata or {}).get(_FOOTER_KEY, b"{}"))
    return record if isinstance(record, dict) else {}


def write_table(path: Location, table: pa.Table) -> Shard:
    """Write a table as Parquet, atomically; returns its manifest entry."""
    # Dictionaries only where values repeat: with one for vectors, 2,048 rows take 0.09 s instead of 0.03 and the file
    # is larger.
    repetitive: Any = [n for n in ("title", "source", "doc_id") if n in table.column_names]
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=repetitive, write_page_checksum=True)
    data = buffer.getvalue()
    write_bytes(path, data)
    return Shard(path.name, table.num_rows, len(data), hashlib.sha256(data).hexdigest())


def read_table(
    path: Location, columns: Sequence[str] | None = None, contents: pa.Buffer | None = None
) -> pa.Table:
    """A shard's rows in file order, of all columns or these. contents: the file's bytes, if loaded already.

    Raises InputError naming the shard if it is missing, truncated, or fails a page checksum.
    """
    try:
        file = _open(path, whole=columns is None, contents=contents)
        with storage_errors(path):
            return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as err:
        raise _damaged(path, err) from err


def _open(path: Location, whole: bool, contents: pa.Buffer | None = None) -> pq.ParquetFile:
    try:
        with storage_errors(path):
            # One request reads all of a shard, a few megabytes. For single columns Arrow requests only their ranges;
            # without the vectors that is a thirtieth.
            if whole and contents is None:
                contents = pa.py_buffer(path.read_bytes())
            filesystem, key = on_arrow(path)
            source = filesystem.open_input_file(key) if contents is None else pa.BufferReader(contents)
        return pq.ParquetFile(source, page_checksum_verification=True)
    except FileNotFoundError as err:
        raise InputError(f"shard {path} is missing; run the stage that writes it again") from err
    except (pa.ArrowException, OSError) as err:
        raise _damaged(path, err) from err


def _damaged(path: Location, err: Exception) -> InputError:
    return InputError(
        f"shard {path} is damaged: expected a complete Parquet file, got {str(err).strip()}. "
        "Delete it and run the stage that writes it again; only this shard is redone."
    )


def damaged_files(directory: Location, files: Sequence[Shard], deep: bool = False) -> dict[str, str]:
    """Missing files and files of a wrong size (deep: or hash), each with a description of the fault."""
    sizes = sizes_in(directory, [f.file for f in files])

    def fault(file: Shard) -> str:
        size = sizes.get(file.file)
        if size is None:
            return "is missing"
        if size != file.bytes:
            return f"has {size:,} bytes, expected {file.bytes:,}"
        if deep and (got := file_sha256(directory / file.file)) != file.sha256:
            return f"has SHA-256 {got[:16]}…, expected {file.sha256[:16]}…"
        return ""

    with ThreadPoolExecutor(
        16
    ) as threads:  # reads have high latency on object storage; hashing releases the GIL
        return {f.file: wrong for f, wrong in zip(files, threads.map(fault, files), strict=True) if wrong}


HELD_BYTES = 256 << 20
"""Memory for the shards that a job's own process reads in parallel, as float32 vectors."""


def shards_at_once(shards: Sequence[Shard], dim: int, most: int) -> int:
    """How many of these shards, at most `most`, fit HELD_BYTES at a time; at least 1. dim: D of their vectors."""
    largest = max((s.rows for s in shards), default=0) * dim * 4
    return max(1, min(most, HELD_BYTES // max(1, largest)))


# ------------------------------------------------------------------------------------------------- manifest

MOST_IN_JSON = 4096
"""Maximum number of shards listed in manifest.json, at 190 bytes each; longer lists go to Parquet, at 37 bytes each."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Manifest:
    """Contents and origin of a stage's output folder. Saved last, so its presence marks the stage as complete."""

    kind: str
    """"chunks", "vectors" or "index"."""
    settings: dict[str, Any]
    """Every setting that determines the content; other values need another folder."""
    inputs: dict[str, Any]
    """Identifies the input: a file's size and time, or the fingerprint of the previous stage's manifest."""
    shards: tuple[Shard, ...]
    """The files, in corpus order."""
    rows: int
    codec: dict[str, Any] | None = None
    """CodecIdentity.to_dict() of the vectors; None if there are none yet."""
    source: str = ""
    """Where the text comes from."""
    licence: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    """Counts: articles, broken records, truncated chunks and so on."""
    created: str = field(default_factory=_now)
    """UTC, ISO 8601."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package versions."""

    def __post_init__(self) -> None:
        total = sum(s.rows for s in self.shards)
        if self.shards and total != self.rows:
            raise InputError(f"manifest of {self.kind} says {self.rows} rows but its shards hold {total}")

    @property
    def fingerprint(self) -> str:
        """16 hex digits over content and origin, independent of time and package versions."""
        return fingerprint(
            {
                "kind": self.kind,
                "settings": self.settings,
                "inputs": self.inputs,
                "shards": [s.sha256 for s in self.shards],
                "codec": self.identity.digest if self.codec else None,
            }
        )

    @property
    def identity(self) -> CodecIdentity:
        """Codec of the vectors. Raises InputError if the manifest has none."""
        if self.codec is None:
            raise InputError(f"a manifest of {self.kind} has no codec; expected one of `latent encode`")
        return CodecIdentity.from_dict(self.codec)

    def save(self, directory: Location) -> None:
        """Write manifest.json into `directory` atomically, after a separate list of shards if there are many."""
        listed: Any = [asdict(s) for s in self.shards]
        if len(listed) > MOST_IN_JSON:
            path = directory / f"shards-{self.fingerprint}.parquet"
            listed = asdict(write_table(path, pa.Table.from_pylist(listed)))
        fields = asdict(replace(self, shards=())) | {"shards": listed, "fingerprint": self.fingerprint}
        write_json(directory / "manifest.json", fields)
        for other in directory.glob("shards-*.parquet"):
            if not isinstance(listed, dict) or other.name != listed["file"]:
                other.unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: Location, kind: str | None = None) -> Self:
        """The manifest of a finished stage, of any kind unless `kind` is given.

        Raises InputError if it is missing, unreadable, edited, or of another kind.
        """
        path = directory / "manifest.json"
        command = f"`{WRITERS[kind]}`" if kind in WRITERS else "the stage that writes it"
        try:
            record = json.loads(path.read_bytes())
            listed = record.pop("shards")
            if isinstance(listed, dict):
                try:
                    listed = read_table(directory / listed["file"]).to_pylist()
                except InputError as err:
                    raise ValueError(f"its list of shards: {err}") from err
            shards = tuple(Shard(**s) for s in listed)
            claimed = record.pop("fingerprint")
            manifest = cls(**record, shards=shards)
        except FileNotFoundError as err:
            raise InputError(
                f"no {path}; expected a finished folder of {kind or 'some stage'}. "
                f"Run {command} with --output {directory} to its end."
            ) from err
        except NotADirectoryError as err:
            raise InputError(
                f"{directory} is a file, expected a folder; name the one that {command} wrote"
            ) from err
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
            raise InputError(
                f"{path} is not a manifest of this project ({type(err).__name__}: {err}). "
                f"Delete it and run {command} again; finished shards are kept."
            ) from err
        if claimed != manifest.fingerprint:
            raise InputError(
                f"{path} says fingerprint {claimed} but its fields give {manifest.fingerprint}: it was "
                f"edited or damaged. Delete it and run {command} again; finished shards are kept."
            )
        if kind is not None and manifest.kind != kind:
            expected = f"{kind}; name the folder that {command} wrote"
            raise InputError(f"{directory} holds {manifest.kind}, expected {expected}")
        return manifest

    def damaged(self, directory: Location, deep: bool = False) -> dict[str, str]:
        """`damaged_files` of its shards."""
        return damaged_files(directory, self.shards, deep)

    def verify(self, directory: Location, deep: bool = False) -> None:
        """Raise InputError, naming the first, if shards are missing or have a wrong size (deep: or SHA-256)."""
        wrong = self.damaged(directory, deep)
        if not wrong:
            return
        name, what = next(iter(wrong.items()))
        others = f" ({len(wrong) - 1} more shards are damaged)" if len(wrong) > 1 else ""
        raise InputError(
            f"shard {directory / name} {what}{others}. "
            f"Run `{WRITERS.get(self.kind, self.kind)}` into {directory} again; only these shards are redone."
        )

    def with_report(self, **counts: Any) -> Self:
        """A copy with these counts added to its report."""
        return replace(self, report={**self.report, **counts})


def as_json(value: Any) -> Any:
    """The value after a round trip through JSON (tuples become lists), to compare it with saved values."""
    return json.loads(json.dumps(value))


# -------------------------------------------------------------------------------------------------- vectors


def require_unit_vectors(vectors: np.ndarray, dim: int, what: str, ids: Sequence[Any] | None = None) -> None:
    """Raise InputError, naming the first bad row and its id, unless all rows are finite with norm 1 (NORM_TOLERANCE).

    vectors: (N, dim) float16, float32 or float64. what: the array, for the message.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise InputError(
            f"{what} has vectors of shape {tuple(vectors.shape)}, expected (rows, {dim}); "
            f"it was made by an encoder of another size. Encode again with the {dim}-d codec."
        )
    if vectors.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{what} has vectors of type {vectors.dtype}, expected float16 or float32")

    def name(row: int) -> str:
        return f"row {row}" if ids is None else f"row {row} (id {ids[row]})"

    # In blocks, so a memory-mapped array is not copied as a whole.
    block = 16_384
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block].astype(np.float32, copy=False)
        squares = np.einsum("nd,nd->n", part, part)
        bad = np.flatnonzero(~np.isfinite(squares))
        if len(bad):
            raise InputError(
                f"{what}: the vector of {name(start + int(bad[0]))} holds NaN or infinity "
                f"({len(bad)} such rows from there on), expected finite numbers. Encode that text again; if this "
                "persists, the encoder's weights are damaged."
            )
        norms = np.sqrt(squares)
        off = np.flatnonzero(np.abs(norms - 1.0) > NORM_TOLERANCE)
        if len(off):
            raise InputError(
                f"{what}: the vector of {name(start + int(off[0]))} has norm {norms[off[0]]:.4f}, expected 1 "
                f"({len(off)} such rows from there on). Divide each vector by its norm, and store the norm."
            )


def vectors_to_table(
    chunks: pa.Table,
    vectors: np.ndarray,
    norms: np.ndarray,
    num_tokens: np.ndarray,
    truncated: np.ndarray,
    dtype: VectorType = "float16",
) -> pa.Table:
    """The rows of a vector shard, in the order of `chunks`, in `vector_schema(D, dtype)`.

    chunks: N rows of CHUNK_SCHEMA; vectors: (N, D) float32 of unit norm; norms: (N,) float32, of the encoder's output
    before normalisation; num_tokens: (N,) int, before truncation; truncated: (N,) bool.
    Raises InputError, naming the chunk, on a wrong number of rows, NaN, infinity, or a norm other than 1.
    """
    rows = chunks.num_rows
    dim = DIM if vectors.ndim != 2 else vectors.shape[1]
    arrays = {"vectors": vectors, "norms": norms, "num_tokens": num_tokens, "truncated": truncated}
    if wrong := {n: len(a) for n, a in arrays.items() if len(a) != rows}:
        raise InputError(f"the encoder returned {wrong} for {rows} chunks, expected {rows} of each")
    ids = chunks.column("chunk_id").to_pylist()
    require_unit_vectors(vectors, dim, "the encoder's output", ids)
    if not np.isfinite(norms).all() or (np.asarray(norms) <= 0).any():
        row = int(np.flatnonzero(~(np.isfinite(norms) & (np.asarray(norms) > 0)))[0])
        raise InputError(
            f"the encoder's output: the norm of row {row} (id {ids[row]}) is {norms[row]}, "
            "expected a number > 0; the encoder's weights are damaged"
        )
    flat = np.ascontiguousarray(vectors, dtype=np.dtype(dtype)).reshape(-1)
    columns = [
        *(chunks.column(n) for n in CHUNK_SCHEMA.names[:-1]),
        pa.array(np.asarray(num_tokens, dtype=np.int32)),
        pa.array(np.asarray(truncated, dtype=bool)),
        pa.array(np.asarray(norms, dtype=np.float32)),
        pa.FixedSizeListArray.from_arrays(pa.array(flat), dim),
    ]
    return pa.Table.from_arrays(columns, schema=vector_schema(dim, dtype))


def table_to_vectors(table: pa.Table, what: str = "table") -> np.ndarray:
    """The `vector` column as (N, D), in its stored type; a view of Arrow's memory if possible.

    Raises InputError if the column is missing or not a fixed-size list of floats, or a vector is null.
    """
    if "vector" not in table.column_names:
        raise InputError(
            f"{what} has no column `vector`, only {', '.join(table.column_names)}; expected a vector shard. "
            "Run `latent encode` first."
        )
    kind = table.schema.field("vector").type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        raise InputError(
            f"{what} stores `vector` as {kind}, expected a fixed-size list of float16 or float32; "
            "write it again with `latent encode`"
        )
    column = table.column("vector").combine_chunks()
    values = column.flatten()
    if column.null_count or values.null_count or len(values) != len(column) * kind.list_size:
        raise InputError(f"{what} has rows without a vector; expected one each. Encode it again.")
    array: np.ndarray = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(column), kind.list_size)
