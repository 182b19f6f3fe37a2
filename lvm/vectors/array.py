"""The vectors of one encode job as one memory-mapped array, sorted by article and position.

`latent encode` writes it beside its shards, before the manifest that marks the job as complete; opening it writes
nothing. Titles, texts and sources are only in the shards, and are read from there.

    _array/<fingerprint>-2/vectors.npy …     one file per column, named as the fields of `VectorArray`
    _array/<fingerprint>-2/array.json        size and SHA-256 of each; written last

Letters: N chunks, D = 768.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
from cachetools import LRUCache
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError, OutputError
from lvm.storage import Location, fetch, location, new_folder, publish_folder, remove_tree
from lvm.vectors.shards import (
    Manifest,
    Shard,
    cannot_write,
    damaged_files,
    file_sha256,
    footer_in,
    read_table,
    require_unit_vectors,
    shards_at_once,
    table_to_vectors,
    write_json,
)

BLOCK_ROWS = 4_096
"""Rows processed at a time while the array is written: 12 MiB of float32 vectors."""

READERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that read while the array is written; fewer if shards are large."""

TEXT_BYTES = 256 << 20
"""Size of a reader's text cache; a chunk takes 100 to 150 bytes."""

_TEXT_COLUMNS = ["title", "text", "source"]
_ARRAYS = (
    *("vectors", "doc_ids", "positions", "chunk_ids", "num_tokens", "truncated", "norms"),
    *("neighbour_cosines", "text_keys", "shard_rows"),
)
_STORED = tuple(name for name in _ARRAYS if name != "neighbour_cosines")
_LAYOUT = 2
"""Version of the file layout; arrays of another version are ignored."""

Rows = Sequence[int] | NDArray[Any]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class VectorArray:
    """The chunks of one encode job, sorted by article and position. Every array is memory-mapped and read-only."""

    directory: Location
    """The encode job's folder."""
    fingerprint: str
    """Fingerprint of its manifest; identifies the content."""
    identity: CodecIdentity
    vectors: NDArray[Any] = field(repr=False)
    """(N, D) float16 or float32, as stored; norm 1."""
    doc_ids: NDArray[np.int32] = field(repr=False)
    """(N,) article number, ascending."""
    positions: NDArray[np.int32] = field(repr=False)
    """(N,) position in the article, ascending within it."""
    chunk_ids: NDArray[np.str_] = field(repr=False)
    """(N,) unicode."""
    num_tokens: NDArray[np.int32] = field(repr=False)
    """(N,) before truncation, end of sequence included."""
    truncated: NDArray[np.bool_] = field(repr=False)
    """(N,) True if the codec truncated the text."""
    norms: NDArray[np.float32] = field(repr=False)
    """(N,) norm of the encoder's output."""
    neighbour_cosines: NDArray[np.float32] = field(repr=False)
    """(N,) cosine of rows i and i + 1, even across articles; the last is 0."""
    text_keys: NDArray[np.uint64] = field(repr=False)
    """(N,) hash of the text, ignoring case and white space."""
    shard_rows: NDArray[np.int64] = field(repr=False)
    """(N,) the chunk's row in the concatenated shards."""
    shards: "TextShards" = field(repr=False)
    """Reader of the texts."""

    def __len__(self) -> int:
        return len(self.doc_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        # The worker maps the same files, so no vector is copied.
        return (_reopen, (self.directory, self.fingerprint))

    def texts(self, rows: Rows) -> list[str]:
        """Texts of these rows, in their order."""
        return self._column("text", rows)

    def titles(self, rows: Rows) -> list[str]:
        """Article titles of these rows, in their order."""
        return self._column("title", rows)

    def sources(self, rows: Rows) -> list[str]:
        """Sources of these rows, in their order."""
        return self._column("source", rows)

    def require_codec(self, identity: CodecIdentity, what: str) -> None:
        """Raise IdentityError unless `identity`, the codec of `what`, is that of these vectors."""
        require_same_codec(self.identity, identity, str(self.directory), what)

    def _column(self, name: str, rows: Rows) -> list[str]:
        return self.shards.column(name, self.shard_rows[np.asarray(rows, np.int64)])


class TextShards:
    """Titles, texts and sources, read lazily by shard and kept in an LRU cache of TEXT_BYTES. Thread-safe.

    Shards on disk are memory-mapped at once, so they stay readable if a later encode job replaces the files; those on
    object storage are fetched by checksum.
    """

    def __init__(self, directory: Location, shards: Sequence[Shard]) -> None:
        self._directory, self._shards = directory, shards
        self._ends = np.cumsum([s.rows for s in shards], dtype=np.int64)
        self._mapped = [_mapped(directory / s.file) for s in shards] if isinstance(directory, Path) else None
        self._kept: LRUCache[int, pa.Table] = LRUCache(TEXT_BYTES, getsizeof=lambda table: table.nbytes)
        self._lock = threading.Lock()

    def column(self, name: str, rows: NDArray[np.int64]) -> list[str]:
        """Values of a column in these rows of the concatenated shards, in their order."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        values = np.empty(len(rows), object)
        by_shard = np.argsort(numbers, kind="stable")
        for places in np.split(by_shard, np.flatnonzero(np.diff(numbers[by_shard])) + 1):
            if len(places):
                number = int(numbers[places[0]])
                inside = rows[places] - (self._ends[number] - self._shards[number].rows)
                values[places] = self._table(number).column(name).take(pa.array(inside)).to_pylist()
        found: list[str] = values.tolist()
        return found

    def _table(self, number: int) -> pa.Table:
        with self._lock:
            if (table := self._kept.get(number)) is not None:
                return table
        path, sha256 = self._directory / self._shards[number].file, self._shards[number].sha256
        if self._mapped is None:
            table = read_table(fetch(path, sha256), _TEXT_COLUMNS)
        else:
            table = read_table(path, _TEXT_COLUMNS, self._mapped[number])
        if table.nbytes <= TEXT_BYTES:
            with self._lock:
                self._kept[number] = table
        return table


def _mapped(path: Path) -> pa.Buffer:
    """A file's bytes; the mapping survives the file's deletion and holds no file descriptor."""
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


# --------------------------------------------------------------------------------------------------- reading


def open_vectors(directory: Location | str) -> VectorArray:
    """The vectors of a finished encode job. Read-only; from object storage, array files are downloaded into the local
    cache once per checksum.

    If there is no array (earlier versions wrote none), it is built in a temporary folder, about a second per 300,000
    chunks; running `latent encode` or `latent index` again stores it.

    Raises InputError if the job is unfinished or a shard is missing or truncated; without an array also the errors of
    `write_array`, and OutputError if the temporary folder cannot be written.
    """
    directory = location(directory)
    manifest = Manifest.load(directory, "vectors")
    manifest.verify(directory)
    folder = array_folder(directory, manifest)
    files = _files(folder)
    if files is not None:
        return _map(directory, manifest, {f.file: fetch(folder / f.file, f.sha256) for f in files})
    try:
        with tempfile.TemporaryDirectory(prefix="latent-") as name:
            made = _lay_out(directory, manifest, Path(name))
            # The mappings survive the deletion of the folder.
            return _map(directory, manifest, {f.file: Path(name, f.file) for f in made})
    except OSError as err:
        raise OutputError(
            f"{directory} has no array, and it cannot be built in the temporary folder ({err}); set TMPDIR to a folder "
            "with free space, or run `latent encode` again with write access to that folder, which stores the array"
        ) from err


def array_folder(directory: Location, manifest: Manifest) -> Location:
    """Folder of these shards' array, whether or not it exists."""
    return directory / "_array" / f"{manifest.fingerprint}-{_LAYOUT}"


def _reopen(directory: Location, expected: str) -> VectorArray:
    array = open_vectors(directory)
    if array.fingerprint != expected:
        raise InputError(
            f"the vectors in {directory} changed while they were in use (fingerprint {expected}, now "
            f"{array.fingerprint}); start this job again"
        )
    return array


def _files(folder: Location) -> list[Shard] | None:
    """Files of an array; None if there is none."""
    path = folder / "array.json"
    try:
        files = [Shard(**record) for record in json.loads(path.read_bytes())]
        if {f.file for f in files} != {f"{name}.npy" for name in _ARRAYS}:
            raise ValueError("unexpected list of files")
        return files
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as err:
        raise _unusable(path, f"is damaged ({err})") from err


def _unusable(file: Location, why: str) -> InputError:
    return InputError(f"{file} {why}; delete {file.parent} and run `latent encode` again, which rebuilds it")


def _map(directory: Location, manifest: Manifest, files: dict[str, Path]) -> VectorArray:
    arrays: dict[str, NDArray[Any]] = {}
    for name in _ARRAYS:
        path = files[f"{name}.npy"]
        try:
            # numpy cannot map an empty file.
            arrays[name] = np.load(path, mmap_mode="r" if manifest.rows else None, allow_pickle=False)
        except (OSError, ValueError) as err:
            raise _unusable(path, f"is damaged ({err})") from err
    shape, expected = arrays["vectors"].shape, (manifest.rows, manifest.identity.dim)
    if shape != expected:
        raise _unusable(files["vectors.npy"], f"has shape {shape}, expected {expected} as its manifest says")
    for name, values in arrays.items():
        if len(values) != manifest.rows:
            why = f"has {len(values)} rows, expected {manifest.rows} as its manifest says"
            raise _unusable(files[f"{name}.npy"], why)
    texts = TextShards(directory, manifest.shards)
    return VectorArray(directory, manifest.fingerprint, manifest.identity, **arrays, shards=texts)


# --------------------------------------------------------------------------------------------------- writing


def write_array(directory: Location, manifest: Manifest) -> bool:
    """Write the array beside its shards and delete those of earlier shards; False if it already exists.

    Call it before saving the manifest: a folder with a manifest then always has its array.

    Raises InputError if a shard is damaged, a chunk id repeats, or a vector is NaN, not of norm 1 or of the wrong
    dimension; IdentityError if shards come from different codecs; OutputError if the folder cannot be written.
    """
    folder = array_folder(directory, manifest)
    files = _files(folder)
    if not manifest.shards or (files is not None and not damaged_files(folder, files)):
        return False
    try:
        with new_folder(folder) as temporary:
            written = _lay_out(directory, manifest, temporary)
            write_json(temporary / "array.json", [asdict(f) for f in written])
            publish_folder(temporary, folder, last="array.json")
    except OSError as err:
        raise cannot_write(folder, err) from err
    for other in folder.parent.iterdir():
        if other.name != folder.name:
            remove_tree(other)
    return True


def _lay_out(directory: Location, manifest: Manifest, folder: Path) -> list[Shard]:
    """Write the array's files into `folder`, with fsync. Shards are streamed: memory use is 8 bytes per chunk, about
    100 if the shards are not sorted by article and position."""
    if not manifest.shards:
        raise InputError(f"{directory} holds no shard, expected one or more; run `latent chunk` on some text")
    # Ids of `latent chunk` have 32 characters. If one is longer, the columns are written again, wider.
    width = 32
    while (longest := _write_columns(directory, manifest, folder, width)) > width:
        width = longest

    def written(name: str) -> NDArray[Any]:
        loaded: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r" if manifest.rows else None)
        return loaded

    doc_ids, positions = written("doc_ids"), written("positions")
    if not _ascending(doc_ids, positions):
        order = np.lexsort((positions, doc_ids))
        _require_own_places(doc_ids, positions, order, directory)
        for name in _STORED:
            given, path = written(name), folder / f"{name}.npy"
            path.rename(folder / "unordered.npy")
            _save(path, given.shape, (given[order[rows]] for rows in _blocks(len(order))))
            (folder / "unordered.npy").unlink()
    _save(folder / "neighbour_cosines.npy", (manifest.rows,), _neighbour_cosines(written("vectors")))
    return [_listed(folder / f"{name}.npy", manifest.rows) for name in _ARRAYS]


def _write_columns(directory: Location, manifest: Manifest, folder: Path, width: int) -> int:
    """Write the columns of _STORED in shard order, ids as `width` characters, and return `width`. On a longer id, stop
    and return its length. Raises InputError if an id repeats."""
    hashes = np.empty(manifest.rows, np.uint64)
    row, dtype = 0, None
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in _STORED}
        paths = [directory / shard.file for shard in manifest.shards]
        threads = shards_at_once(manifest.shards, manifest.identity.dim, READERS)
        blocks = stack.enter_context(closing(_in_threads(partial(_read_columns, manifest), paths, threads)))
        for number, (path, block) in enumerate(zip(paths, blocks, strict=True)):
            found, ids = block["vectors"].dtype, block["chunk_ids"]
            if found != (dtype := dtype or found):
                raise InputError(f"shard {path} stores {found}, earlier shards {dtype}; encode again")
            if (longest := ids.dtype.itemsize // 4) > width:
                return longest
            end = row + len(ids)
            block["chunk_ids"] = ids.astype(f"<U{width}")
            block["shard_rows"] = np.arange(row, end, dtype=np.int64)
            for name, values in block.items():
                _append(files[name], values, None if number else (manifest.rows, *values.shape[1:]))
            if end <= manifest.rows:
                hashes[row:end] = _hashes(block["chunk_ids"])
            row = end
    if row != manifest.rows:
        raise InputError(
            f"the shards of {directory} hold {row} rows, its manifest says {manifest.rows}; run `latent encode` again"
        )
    _require_unique(hashes, folder / "chunk_ids.npy", directory)
    return width


def _in_threads(
    work: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int
) -> Generator[_Result, None, None]:
    """Results in the order of `items`; as many threads work ahead, each on one item."""
    with ThreadPoolExecutor(num_threads) as threads:
        ahead: deque[Future[_Result]] = deque()
        for item in items:
            ahead.append(threads.submit(work, item))
            if len(ahead) > num_threads:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def _read_columns(manifest: Manifest, path: Location) -> dict[str, NDArray[Any]]:
    """A shard's columns of _STORED, but for `shard_rows`. Raises InputError or IdentityError if it is not as its
    manifest says."""
    table = read_table(path)
    if "codec" in (record := footer_in(table.schema)):
        found = CodecIdentity.from_dict(record["codec"])
        require_same_codec(manifest.identity, found, f"manifest of {path.parent}", f"shard {path.name}")
    vectors = table_to_vectors(table, f"shard {path}")
    ids = table.column("chunk_id").to_pylist()
    require_unit_vectors(vectors, manifest.identity.dim, f"shard {path}", ids)
    texts = table.column("text").to_pylist()
    return {
        "vectors": vectors,
        "doc_ids": _numbers(table, "doc_id", np.int32, path),
        "positions": _numbers(table, "position", np.int32, path),
        "chunk_ids": np.asarray(ids, dtype=np.str_),
        "num_tokens": _numbers(table, "num_tokens", np.int32, path),
        "truncated": _numbers(table, "truncated", np.bool_, path),
        "norms": _numbers(table, "norm", np.float32, path),
        "text_keys": np.fromiter(map(_text_key, texts), np.uint64, len(texts)),
    }


def _append(file: IO[bytes], values: NDArray[Any], shape: tuple[int, ...] | None) -> None:
    """Append rows to an .npy file; with `shape`, write its header first. Not memory-mapped: a full disk then raises
    OSError, where a mapped write would end the process with SIGBUS."""
    if shape is not None:
        descr = np.lib.format.dtype_to_descr(values.dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    file.write(np.ascontiguousarray(values).data)


def _save(path: Path, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> None:
    """Write an .npy file of this shape from blocks of rows."""
    with path.open("wb") as file:
        for number, block in enumerate(blocks):
            _append(file, block, None if number else shape)


def _listed(path: Path, rows: int) -> Shard:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Shard(path.name, rows, path.stat().st_size, file_sha256(path))


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(low, low + BLOCK_ROWS) for low in range(0, rows, BLOCK_ROWS))


def _neighbour_cosines(vectors: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    def work(rows: slice) -> NDArray[np.float32]:
        block = vectors[rows.start : rows.stop + 1].astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)  # float16 rounding moved them off 1
        cosines = np.zeros(min(BLOCK_ROWS, len(vectors) - rows.start), np.float32)
        cosines[: len(block) - 1] = np.einsum("nd,nd->n", block[:-1], block[1:])
        return cosines

    return _in_threads(work, _blocks(len(vectors)), READERS)


def _numbers(table: pa.Table, name: str, dtype: Any, path: Location) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise InputError(
            f"shard {path}: {column.null_count} rows have no {name}, expected none; encode again"
        )
    values: NDArray[Any] = column.to_numpy()
    return values.astype(dtype, copy=False)


def _hashes(ids: NDArray[np.str_]) -> NDArray[np.uint64]:
    """(N,) FNV-style hash of each id."""
    hashes = np.zeros(len(ids), np.uint64)
    for column in ids.view(np.uint32).reshape(len(ids), -1).T:
        hashes = hashes * np.uint64(0x100000001B3) + column  # modulo 2^64
    return hashes


def _require_unique(hashes: NDArray[np.uint64], path: Path, directory: Location) -> None:
    """Raise InputError if an id repeats. hashes: (N,) of the ids in file `path`; sorted in place. Ids with equal hashes
    are compared themselves."""
    hashes.sort()
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(twice):
        return
    ids = np.load(path, mmap_mode="r")
    suspects = [ids[rows][np.isin(_hashes(np.array(ids[rows])), twice)] for rows in _blocks(len(ids))]
    names, counts = np.unique(np.concatenate(suspects), return_counts=True)
    if (counts > 1).any():
        again = names[counts > 1]
        raise InputError(
            f"{directory}: chunk {again[0]} comes {counts[counts > 1][0]} times ({len(again)} chunks come more than "
            "once), expected each once. The input has an article twice: remove one, then chunk and encode again."
        )


def _places(doc_ids: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
    places: NDArray[np.int64] = doc_ids.astype(np.int64) << 32 | positions
    return places


def _ascending(doc_ids: NDArray[np.int32], positions: NDArray[np.int32]) -> bool:
    """Whether rows are sorted by article and position, without repeats."""
    last = np.empty(0, np.int64)
    for rows in _blocks(len(doc_ids)):
        places = np.concatenate((last, _places(doc_ids[rows], positions[rows])))
        if (np.diff(places) <= 0).any():
            return False
        last = places[-1:]
    return True


def _require_own_places(
    doc_ids: NDArray[np.int32], positions: NDArray[np.int32], order: NDArray[np.int64], directory: Location
) -> None:
    places = _places(doc_ids, positions)[order]
    twice = np.flatnonzero(places[1:] == places[:-1])
    if len(twice):
        place = int(places[twice[0]])
        raise InputError(
            f"{directory}: article {place >> 32} has two chunks at position {place & 0xFFFFFFFF}, "
            "expected one; chunk and encode again"
        )


def _text_key(text: str) -> int:
    plain = "".join(text.split()).casefold()
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")
