"""All vectors of one encode job as one array that readers map, in order of article and position.

`latent encode` writes it beside its shards, before the manifest that says that all is there; opening writes nothing.
Titles, texts and sources are in the shards alone, and are read from there.

    _array/<fingerprint>-2/vectors.npy …     a file per column, named as the fields of `VectorArray`
    _array/<fingerprint>-2/array.json        size and SHA-256 of each; on object storage it comes last

Letters: N chunks, D = 768.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

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
    table_to_vectors,
    write_json,
)

BLOCK_ROWS = 16_384
"""Rows worked on at a time while the array is made: 48 MiB of float32 vectors."""

TEXT_BYTES = 256 << 20
"""Most bytes of texts that a reader keeps in memory, those read last; 100 to 150 are a chunk's."""

_TEXT_COLUMNS = ["title", "text", "source"]
_ARRAYS = (
    *("vectors", "doc_ids", "positions", "chunk_ids", "num_tokens", "truncated", "norms"),
    *("neighbour_cosines", "text_keys", "shard_rows"),
)
_STORED = tuple(name for name in _ARRAYS if name != "neighbour_cosines")
_LAYOUT = 2
"""Raised when the files of an array change; one of another layout is as good as none."""

Rows = Sequence[int] | NDArray[Any]


@dataclass(frozen=True, eq=False)
class VectorArray:
    """All chunks of one encode job by article and position. Every array is memory-mapped and read-only."""

    directory: Location
    """The encode job's folder."""
    fingerprint: str
    """Fingerprint of its manifest: another array, another fingerprint."""
    identity: CodecIdentity
    """Codec of the vectors."""
    vectors: NDArray[Any] = field(repr=False)
    """(N, D) float16 or float32, as stored; norm 1."""
    doc_ids: NDArray[np.int32] = field(repr=False)
    """(N,) the chunk's article, ascending."""
    positions: NDArray[np.int32] = field(repr=False)
    """(N,) its place in the article, ascending within one."""
    chunk_ids: NDArray[np.str_] = field(repr=False)
    """(N,) unicode."""
    num_tokens: NDArray[np.int32] = field(repr=False)
    """(N,) before any cut, end of sequence included."""
    truncated: NDArray[np.bool_] = field(repr=False)
    """(N,) True where the codec cut the text."""
    norms: NDArray[np.float32] = field(repr=False)
    """(N,) norm of the encoder's output."""
    neighbour_cosines: NDArray[np.float32] = field(repr=False)
    """(N,) cosine of row i and row i + 1, of whatever articles; the last is 0."""
    text_keys: NDArray[np.uint64] = field(repr=False)
    """(N,) hash of the text without case and white space: equal key, equal text."""
    shard_rows: NDArray[np.int64] = field(repr=False)
    """(N,) the chunk's row in the shards, counted through all of them."""
    shards: "TextShards" = field(repr=False)
    """Where the texts are."""

    def __len__(self) -> int:
        return len(self.doc_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the same files; no vector travels.
        return (_reopen, (self.directory, self.fingerprint))

    def texts(self, rows: Rows) -> list[str]:
        """Texts of these rows, in their order."""
        return self._column("text", rows)

    def titles(self, rows: Rows) -> list[str]:
        """Titles of the articles of these rows, in their order."""
        return self._column("title", rows)

    def sources(self, rows: Rows) -> list[str]:
        """Sources of these rows, in their order."""
        return self._column("source", rows)

    def require_codec(self, identity: CodecIdentity, what: str) -> None:
        """Return when `what`, of this identity, may be used with these vectors; else raise IdentityError."""
        require_same_codec(self.identity, identity, str(self.directory), what)

    def _column(self, name: str, rows: Rows) -> list[str]:
        return self.shards.column(name, self.shard_rows[np.asarray(rows, np.int64)])


class TextShards:
    """Titles, texts and sources, read shard by shard as they are asked for, and kept up to TEXT_BYTES.

    Shards on a disk are mapped from the beginning, so that those a later encode job puts in their place take nothing
    away; those on object storage are fetched by checksum. Threads may share it.
    """

    def __init__(self, directory: Location, shards: Sequence[Shard]) -> None:
        self._directory, self._shards = directory, shards
        self._ends = np.cumsum([s.rows for s in shards], dtype=np.int64)
        self._mapped = [_mapped(directory / s.file) for s in shards] if isinstance(directory, Path) else None
        self._kept: LRUCache[int, pa.Table] = LRUCache(TEXT_BYTES, getsizeof=lambda table: table.nbytes)
        self._lock = threading.Lock()

    def column(self, name: str, rows: NDArray[np.int64]) -> list[str]:
        """Values of a column in these rows, counted through all shards; in their order."""
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

    @property
    def kept_bytes(self) -> int:
        """Of the texts in memory."""
        return int(self._kept.currsize)

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
    """A file's bytes; the mapping outlives the file's name, and takes no descriptor."""
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


# --------------------------------------------------------------------------------------------------- reading


def open_vectors(directory: Location | str) -> VectorArray:
    """The vectors of a finished encode job. Nothing is written beside them; from object storage the array's files are
    fetched into this machine's cache, once for each checksum.

    Shards without an array, which earlier versions left, are laid out in a temporary folder of this process, in about
    a second for 300,000 chunks; `latent encode` or `latent index`, run again, writes the array for all.

    Raises InputError when the job is not finished or a shard is missing or cut off; without an array also as
    `write_array` does, and OutputError when the temporary folder has no room.
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
            # What is mapped outlives the names.
            return _map(directory, manifest, {f.file: Path(name, f.file) for f in made})
    except OSError as err:
        raise OutputError(
            f"{directory} has no array, and none can be laid out in the temporary folder ({err}); set TMPDIR to a "
            "folder with room, or run `latent encode` again where that folder can be written, which makes it for all"
        ) from err


def array_folder(directory: Location, manifest: Manifest) -> Location:
    """Where the array of these shards is, if it is there."""
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
    """What an array consists of; None where there is none."""
    path = folder / "array.json"
    try:
        files = [Shard(**record) for record in json.loads(path.read_bytes())]
        if {f.file for f in files} != {f"{name}.npy" for name in _ARRAYS}:
            raise ValueError("it does not list the files of an array")
        return files
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as err:
        raise InputError(
            f"{path} is damaged ({err}); delete {folder} and run `latent encode` again, which makes it from the shards"
        ) from err


def _map(directory: Location, manifest: Manifest, files: dict[str, Path]) -> VectorArray:
    arrays: dict[str, NDArray[Any]] = {}
    for name in _ARRAYS:
        path = files[f"{name}.npy"]
        try:
            # numpy cannot map a file without data.
            arrays[name] = np.load(path, mmap_mode="r" if manifest.rows else None, allow_pickle=False)
        except (OSError, ValueError) as err:
            raise InputError(
                f"{path} is damaged ({err}); delete {path.parent} and run `latent encode` again, which makes it from "
                "the shards"
            ) from err
    shape = arrays["vectors"].shape
    if shape != (manifest.rows, manifest.identity.dim):
        raise InputError(
            f"{files['vectors.npy']} holds vectors {shape}, expected ({manifest.rows}, {manifest.identity.dim}) as the "
            "manifest says; delete its folder and run `latent encode` again, which makes it from the shards"
        )
    for name, values in arrays.items():
        if len(values) != manifest.rows:
            raise InputError(
                f"{files[f'{name}.npy']} has {len(values)} rows, expected {manifest.rows} as the manifest says; delete "
                "its folder and run `latent encode` again, which makes it from the shards"
            )
    texts = TextShards(directory, manifest.shards)
    return VectorArray(directory, manifest.fingerprint, manifest.identity, **arrays, shards=texts)


# --------------------------------------------------------------------------------------------------- writing


def write_array(directory: Location, manifest: Manifest) -> bool:
    """Write the array of these shards beside them; arrays of what was there before go. False where it is there.

    A job that writes shards calls it before it saves their manifest, so that who finds a manifest finds the array.

    Raises InputError when a shard is damaged, a chunk comes twice, or a vector is NaN, not of norm 1 or of the wrong
    dimension; IdentityError when the shards come from two codecs; OutputError when the folder cannot be written.
    """
    folder = array_folder(directory, manifest)
    files = _files(folder)
    if not manifest.shards or (files is not None and not damaged_files(folder, files)):
        return False
    try:
        with new_folder(folder) as temporary:
            write_json(
                temporary / "array.json", [asdict(f) for f in _lay_out(directory, manifest, temporary)]
            )
            publish_folder(temporary, folder, last="array.json")
    except OSError as err:
        raise cannot_write(folder, err) from err
    for other in folder.parent.iterdir():
        if other.name != folder.name:
            remove_tree(other)
    return True


def _lay_out(directory: Location, manifest: Manifest, folder: Path) -> list[Shard]:
    """Write the array's files, synced, into `folder`. Shard by shard: of a chunk, 8 bytes stay in memory, some 100
    where the shards are not in order of article and position."""
    if not manifest.shards:
        raise InputError(f"{directory} holds no shard, expected one or more; run `latent chunk` on some text")
    # Ids of `latent chunk` have 32 characters. Where others are longer, all is written once more.
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
    """Write the columns of _STORED, rows as the shards have them, and return `width`; the length of a longer id as soon
    as there is one. Raises InputError where an id comes twice."""
    hashes = np.empty(manifest.rows, np.uint64)
    row, dtype = 0, None
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in _STORED}
        for number, shard in enumerate(manifest.shards):
            path = directory / shard.file
            table = read_table(path)
            if "codec" in (record := footer_in(table.schema)):
                found = CodecIdentity.from_dict(record["codec"])
                require_same_codec(manifest.identity, found, f"manifest of {directory}", f"shard {path.name}")
            vectors = table_to_vectors(table, f"shard {path}")
            ids = table.column("chunk_id").to_pylist()
            require_unit_vectors(vectors, manifest.identity.dim, f"shard {path}", ids)
            if vectors.dtype != (dtype := dtype or vectors.dtype):
                raise InputError(
                    f"shard {path} stores {vectors.dtype}, those before it {dtype}; encode again"
                )
            if (longest := max(map(len, ids), default=0)) > width:
                return longest
            texts = table.column("text").to_pylist()
            end = row + len(ids)
            block = {
                "vectors": vectors,
                "doc_ids": _numbers(table, "doc_id", np.int32, directory),
                "positions": _numbers(table, "position", np.int32, directory),
                "chunk_ids": np.asarray(ids, dtype=f"<U{width}"),
                "num_tokens": _numbers(table, "num_tokens", np.int32, directory),
                "truncated": _numbers(table, "truncated", np.bool_, directory),
                "norms": _numbers(table, "norm", np.float32, directory),
                "text_keys": np.fromiter(map(_text_key, texts), np.uint64, len(texts)),
                "shard_rows": np.arange(row, end, dtype=np.int64),
            }
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


def _append(file: IO[bytes], values: NDArray[Any], shape: tuple[int, ...] | None) -> None:
    """Write rows of an array at the end of its file; the first ones with its shape. Not mapped: a full disk is an error
    then, and no signal that ends the process."""
    if shape is not None:
        header = {
            "descr": np.lib.format.dtype_to_descr(values.dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
    file.write(np.ascontiguousarray(values).data)


def _save(path: Path, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> None:
    """Write an array of this shape whose rows come in blocks."""
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
    for rows in _blocks(len(vectors)):
        block = vectors[rows.start : rows.stop + 1].astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)  # of float16, so not quite 1
        cosines = np.zeros(min(BLOCK_ROWS, len(vectors) - rows.start), np.float32)
        cosines[: len(block) - 1] = np.einsum("nd,nd->n", block[:-1], block[1:])
        yield cosines


def _numbers(table: pa.Table, name: str, dtype: Any, directory: Location) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise InputError(
            f"{directory}: {column.null_count} rows have no {name}, expected one for each; encode again"
        )
    values: NDArray[Any] = column.to_numpy()
    return values.astype(dtype, copy=False)


def _hashes(ids: NDArray[np.str_]) -> NDArray[np.uint64]:
    """64 bits of each id (N,)."""
    hashes = np.zeros(len(ids), np.uint64)
    for column in ids.view(np.uint32).reshape(len(ids), -1).T:
        hashes = hashes * np.uint64(0x100000001B3) + column  # modulo 2^64; FNV's factor
    return hashes


def _require_unique(hashes: NDArray[np.uint64], path: Path, directory: Location) -> None:
    """Return when no id comes twice. hashes: `_hashes` of them, (N,), which is sorted. path: where the ids are: equal
    hashes are a reason to look, no more."""
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
            f"{directory}: chunk {again[0]} comes {counts[counts > 1][0]} times ({len(again)} chunks "
            "come more than once), expected each once. The input holds an article twice: remove it, "
            "then chunk and encode again."
        )


def _places(doc_ids: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
    places: NDArray[np.int64] = doc_ids.astype(np.int64) << 32 | positions
    return places


def _ascending(doc_ids: NDArray[np.int32], positions: NDArray[np.int32]) -> bool:
    """True where rows are in order of article and position, and no place comes twice."""
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
