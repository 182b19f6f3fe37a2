"""The vectors of one encode job as memory-mapped arrays, sorted by article and position.

`latent encode` writes them beside its shards, before the manifest that marks the job as complete; opening them writes
nothing. Titles, texts and sources are only in the shards, and are read from there.

    _array/<fingerprint>-2/vectors.npy …     one file per column, named as the fields of `VectorArray`; of each part,
                                             vectors-00000.npy …, if there are more than PART_ROWS chunks
    _array/<fingerprint>-2/array.json        size and SHA-256 of each; written last

Letters: N chunks, D vector length.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
from cachetools import LRUCache
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError, OutputError
from lvm.storage import (
    Location,
    fetch,
    local_output,
    location,
    new_folder,
    publish_folder,
    remove_tree,
    temporary_name,
    upload_folder,
)
from lvm.vectors.parted import Parted
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

PART_ROWS = 4_000_000
"""Maximum rows of a part: 6 GB of float16 vectors. Parts are written in parallel, and read as one."""

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
Part = Callable[[int], Any]
"""A picklable function of a part's number."""
Each = Callable[[Part, range], Iterable[Any]]
"""Maps a `Part` over numbers, in parallel or not; returns the results in order."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class VectorArray:
    """The chunks of one encode job, sorted by article and position.

    Every array is memory-mapped and read-only; those of several parts are `Parted`, which are indexed in the same way.
    """

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
            made = _lay_out(directory, manifest, Path(name), PART_ROWS, map)
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
        parts = max(1, len(files) // len(_ARRAYS))
        if {f.file for f in files} != {_file(name, i, parts) for name in _ARRAYS for i in range(parts)}:
            raise ValueError("unexpected list of files")
        return files
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as err:
        raise _unusable(path, f"is damaged ({err})") from err


def _unusable(file: Location, why: str) -> InputError:
    return InputError(f"{file} {why}; delete {file.parent} and run `latent encode` again, which rebuilds it")


def _file(column: str, number: int, parts: int) -> str:
    """Name of a column's file in one of `parts` parts."""
    return f"{column}.npy" if parts == 1 else f"{column}-{number:05d}.npy"


def _map(directory: Location, manifest: Manifest, files: dict[str, Path]) -> VectorArray:
    parts = len(files) // len(_ARRAYS)
    arrays: dict[str, Any] = {}
    for name in _ARRAYS:
        mapped = [_mapped_array(files[_file(name, i, parts)]) for i in range(parts)]
        if len({(m.shape[1:], m.dtype.kind) for m in mapped}) > 1:
            raise _unusable(
                files[_file(name, 0, parts)], "and the files of other parts differ in shape or type"
            )
        arrays[name] = _joined(mapped)
        if len(arrays[name]) != manifest.rows:
            last, rows = files[_file(name, parts - 1, parts)], len(arrays[name])
            raise _unusable(last, f"has {rows} rows, expected {manifest.rows} as its manifest says")
    shape, expected = arrays["vectors"].shape, (manifest.rows, manifest.identity.dim)
    if shape != expected:
        path = files[_file("vectors", 0, parts)]
        raise _unusable(path, f"has shape {shape}, expected {expected} as its manifest says")
    texts = TextShards(directory, manifest.shards)
    return VectorArray(directory, manifest.fingerprint, manifest.identity, **arrays, shards=texts)


def _mapped_array(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            empty = 0 in np.lib.format.read_array_header_1_0(file)[0]
        # numpy cannot map an empty file.
        mapped: NDArray[Any] = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
        return mapped
    except (OSError, ValueError) as err:
        raise _unusable(path, f"is damaged ({err})") from err


def _joined(parts: Sequence[NDArray[Any]]) -> Any:
    return parts[0] if len(parts) == 1 else Parted(parts)


# --------------------------------------------------------------------------------------------------- writing


def write_array(
    directory: Location,
    manifest: Manifest,
    part_rows: int = PART_ROWS,
    each: Each = map,
) -> bool:
    """Write the array beside its shards and delete those of earlier shards; False if it already exists.

    Call it before saving the manifest: a folder with a manifest then always has its array. part_rows: maximum rows of
    a part. each: runs the writing of the parts.

    Raises InputError if a shard is damaged, a chunk id repeats, or a vector is NaN, not of norm 1 or of the wrong
    dimension; IdentityError if shards come from different codecs; OutputError if the folder cannot be written.
    """
    directory = directory.resolve()  # other processes write parts
    folder = array_folder(directory, manifest)
    files = _files(folder)
    if not manifest.shards or (files is not None and not damaged_files(folder, files)):
        return False
    try:
        with ExitStack() as stack:
            target = folder  # on object storage, where other nodes write parts and files appear whole
            if isinstance(folder, Path):
                target = stack.enter_context(new_folder(folder))
            written = _lay_out(directory, manifest, target, part_rows, each)
            write_json(target / "array.json", [asdict(f) for f in written])
            if isinstance(target, Path):
                publish_folder(target, folder, last="array.json")
    except OSError as err:
        raise cannot_write(folder, err) from err
    for other in folder.parent.iterdir():
        if other.name != folder.name:
            remove_tree(other)
    return True


@dataclass(frozen=True)
class _Part:
    """What is known of a part once it is written."""

    files: list[Shard]
    hashes: NDArray[np.uint64]
    """Of its chunk ids."""
    dtype: str
    """Of its vectors."""
    ascending: bool
    """Whether its rows are sorted by article and position, without repeats."""
    first: int
    """`_places` of its first row; -1 if it has none."""
    last: int
    """That of its last row."""


def _lay_out(
    directory: Location,
    manifest: Manifest,
    target: Location,
    part_rows: int,
    each: Each,
) -> list[Shard]:
    """Write the array's files into `target`, with fsync. Shards are streamed: memory use is 8 bytes per chunk, about
    100 if the shards are not sorted by article and position."""
    if not manifest.shards:
        raise InputError(f"{directory} holds no shard, expected one or more; run `latent chunk` on some text")
    spans = _spans(manifest.shards, part_rows)
    parts: list[_Part] = []
    hashes, row = np.empty(manifest.rows if len(spans) > 1 else 0, np.uint64), 0
    for made in each(partial(_write_part, directory, manifest, target, spans), range(len(spans))):
        if len(spans) == 1:
            hashes = made.hashes  # not a second time in memory
        else:
            hashes[row : row + len(made.hashes)] = made.hashes
        row += len(made.hashes)
        parts.append(replace(made, hashes=made.hashes[:0]))
    files = [f for part in parts for f in part.files]
    if len({part.dtype for part in parts}) > 1:
        kinds = ", ".join(sorted({part.dtype for part in parts}))
        raise InputError(f"the shards of {directory} store {kinds}, expected one type; encode again")

    names = partial(_file, parts=len(spans))

    def column(name: str, files: Sequence[Shard]) -> Any:
        found = {f.file: f.sha256 for f in files}
        of_parts = [names(name, i) for i in range(len(spans))]
        return _joined([_mapped_array(fetch(target / file, found[file])) for file in of_parts])

    _require_unique(hashes, lambda: column("chunk_ids", files), directory)
    full = [p for p in parts if p.last >= 0]
    if all(p.ascending for p in parts) and all(a.last < b.first for a, b in pairwise(full)):
        return files
    doc_ids, positions = np.asarray(column("doc_ids", files)), np.asarray(column("positions", files))
    order = np.lexsort((positions, doc_ids))
    _require_own_places(doc_ids, positions, order, directory)
    rows = [_rows_of(manifest, span) for span in spans]
    ordered: list[Shard] = []
    for name in _STORED:
        given = column(name, files)  # stays mapped while its files are replaced
        for number, part in enumerate(rows):
            shape = (len(part), *given.shape[1:])
            blocks = (given[order[block]] for block in _blocks(part))
            ordered.append(_save(target / names(name, number), shape, given.dtype, blocks))
    vectors = column("vectors", ordered)
    for number, part in enumerate(rows):
        path = target / names("neighbour_cosines", number)
        ordered.append(_save(path, (len(part),), np.float32, _neighbour_cosines(vectors, part)))
    return ordered


def _spans(shards: Sequence[Shard], part_rows: int) -> list[range]:
    """The numbers of the shards of each part."""
    starts, rows = [0], 0
    for number, shard in enumerate(shards):
        if rows and rows + shard.rows > part_rows:
            starts.append(number)
            rows = 0
        rows += shard.rows
    return [range(low, high) for low, high in pairwise([*starts, len(shards)])]


def _rows_of(manifest: Manifest, span: range) -> range:
    """The rows of these shards, in the order of the shards."""
    start = sum(s.rows for s in manifest.shards[: span.start])
    return range(start, start + sum(s.rows for s in manifest.shards[span.start : span.stop]))


def _write_part(
    directory: Location, manifest: Manifest, target: Location, spans: Sequence[range], number: int
) -> _Part:
    """Write a part's files into `target`, in the order of its shards."""
    rows = _rows_of(manifest, spans[number])
    with ExitStack() as stack:
        folder = target if isinstance(target, Path) else stack.enter_context(new_folder(target))
        paths = {name: folder / _file(name, number, len(spans)) for name in _ARRAYS}
        # Ids of `latent chunk` have 32 characters. If one is longer, the columns are written again, wider.
        width = 32
        hashes = np.empty(len(rows), np.uint64)
        while (longest := _write_columns(directory, manifest, spans[number], paths, width, hashes)) > width:
            width = longest
        vectors, doc_ids, positions = (
            _mapped_array(paths[name]) for name in ("vectors", "doc_ids", "positions")
        )
        following = next((s for s in manifest.shards[spans[number].stop :] if s.rows), None)
        after = (
            [] if following is None else [_read_columns(manifest, directory / following.file)["vectors"][:1]]
        )
        near = _neighbour_cosines(_joined([vectors, *after]), range(len(rows)))
        _save(paths["neighbour_cosines"], (len(rows),), np.float32, near)
        files = [_listed(path, len(rows)) for path in paths.values()]
        if not isinstance(target, Path):
            upload_folder(folder, target, last=files[-1].file)
    ends = _places(doc_ids[[0, -1]], positions[[0, -1]]).tolist() if len(rows) else (-1, -1)
    return _Part(files, hashes, str(vectors.dtype), _ascending(doc_ids, positions), *ends)


def _write_columns(
    directory: Location,
    manifest: Manifest,
    span: range,
    files_of: Mapping[str, Path],
    width: int,
    hashes: NDArray[np.uint64],
) -> int:
    """Write the columns of _STORED of these shards, ids as `width` characters, their hashes into `hashes`, and return
    `width`. On a longer id, stop and return its length."""
    shards, rows = manifest.shards[span.start : span.stop], _rows_of(manifest, span)
    row, dtype = 0, None
    with ExitStack() as stack:
        files = {name: stack.enter_context(files_of[name].open("wb")) for name in _STORED}
        paths = [directory / shard.file for shard in shards]
        threads = shards_at_once(shards, manifest.identity.dim, READERS)
        blocks = stack.enter_context(closing(_in_threads(partial(_read_columns, manifest), paths, threads)))
        for number, (path, block) in enumerate(zip(paths, blocks, strict=True)):
            found, ids = block["vectors"].dtype, block["chunk_ids"]
            if found != (dtype := dtype or found):
                raise InputError(f"shard {path} stores {found}, earlier shards {dtype}; encode again")
            if (longest := ids.dtype.itemsize // 4) > width:
                return longest
            end = row + len(ids)
            block["chunk_ids"] = ids.astype(f"<U{width}")
            block["shard_rows"] = np.arange(rows.start + row, rows.start + end, dtype=np.int64)
            for name, values in block.items():
                _append(files[name], values, None if number else (len(rows), *values.shape[1:]))
            if end <= len(rows):
                hashes[row:end] = _hashes(block["chunk_ids"])
            row = end
    if row != len(rows):
        raise InputError(
            f"the shards {paths[0].name} to {paths[-1].name} of {directory} hold {row} rows, its manifest says "
            f"{len(rows)}; run `latent encode` again"
        )
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


def _save(path: Location, shape: tuple[int, ...], dtype: Any, blocks: Iterable[NDArray[Any]]) -> Shard:
    """Write an .npy file of this shape from blocks of rows; a file of that name is replaced, and stays readable where
    it is mapped."""
    with local_output(path) as local:
        temporary = temporary_name(local)
        with temporary.open("wb") as file:
            _append(file, np.empty((0, *shape[1:]), dtype), shape)
            for block in blocks:
                _append(file, block, None)
        temporary.replace(local)
        return _listed(local, shape[0])


def _listed(path: Path, rows: int) -> Shard:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Shard(path.name, rows, path.stat().st_size, file_sha256(path))


def _blocks(rows: range) -> Iterator[slice]:
    return (slice(low, min(low + BLOCK_ROWS, rows.stop)) for low in rows[::BLOCK_ROWS])


def _neighbour_cosines(vectors: Any, rows: range) -> Iterator[NDArray[np.float32]]:
    """Cosines of these rows with the next; of the last row of all, 0."""

    def work(rows: slice) -> NDArray[np.float32]:
        block = vectors[rows.start : rows.stop + 1].astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)  # float16 rounding moved them off 1
        cosines = np.zeros(rows.stop - rows.start, np.float32)
        cosines[: len(block) - 1] = np.einsum("nd,nd->n", block[:-1], block[1:])
        return cosines

    return _in_threads(work, _blocks(rows), READERS)


def _numbers(table: pa.Table, name: str, dtype: Any, path: Location) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise InputError(
            f"shard {path}: {column.null_count} rows have no {name}, expected none; encode again"
        )
    values: NDArray[Any] = column.to_numpy()
    return values.astype(dtype, copy=False)


def _hashes(ids: NDArray[np.str_]) -> NDArray[np.uint64]:
    """(N,) FNV-style hash of each id, whatever the width of the array."""
    hashes = np.zeros(len(ids), np.uint64)
    for column in ids.view(np.uint32).reshape(len(ids), ids.dtype.itemsize // 4).T:
        hashes = np.where(column, hashes * np.uint64(0x100000001B3) + column, hashes)  # modulo 2^64
    return hashes


def _require_unique(hashes: NDArray[np.uint64], read: Callable[[], Any], directory: Location) -> None:
    """Raise InputError if an id repeats. hashes: (N,) of the ids, sorted in place. read: returns the ids; those with
    equal hashes are compared themselves."""
    hashes.sort()
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(twice):
        return
    ids = read()
    blocks = (np.array(ids[rows]) for rows in _blocks(range(len(ids))))
    suspects = [block[np.isin(_hashes(block), twice)] for block in blocks]
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
    for rows in _blocks(range(len(doc_ids))):
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
