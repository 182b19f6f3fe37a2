"""Windows over one memory-mapped array of vectors: five neighbours of an article, and the chunk that follows.

`open_vectors` lays the shards of an encode job out once as one array, sorted by article and position, beside
the shards. A window is a row number in that array; contexts and targets are cut from it batch by batch, so no
vector is stored twice (six times in the usual training file).

    _array/<fingerprint>/vectors.npy ...   one folder, made whole under another name and then renamed
    _array/<fingerprint>/texts.arrow       chunk_id, title, text, source in the same order, Arrow IPC

Letters: N chunks, M windows, B batch, T context length, D = 768.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError
from lvm.storage import Location, RemotePath, cache_folder, fetch, fetched, location
from lvm.vectors.shards import (
    Manifest,
    fingerprint,
    read_footer,
    read_table,
    require_unit_vectors,
    sync_directory,
    table_to_vectors,
    temporary_name,
)

BLOCK_ROWS = 16_384
"""Rows worked on at a time while the array is made: 48 MiB of float32 vectors."""

SPLITS = ("train", "val", "test")
VAL_SHARE = TEST_SHARE = 0.1
"""Shares of the articles; the rest trains."""
MIN_ARTICLES = 10
"""Fewest articles of which a tenth is one."""

_TEXT_COLUMNS = ("chunk_id", "title", "text", "source")
_ARRAY_LAYOUT = 1
"""Raised when the files of an array change, so that arrays of older versions are made again."""

Rows = Sequence[int] | NDArray[Any]


# ---------------------------------------------------------------------------------------------------- array


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
    table: pa.Table = field(repr=False)
    """N rows of chunk_id, title, text and source; opened with the rest, so that an array which is made again
    meanwhile takes nothing away."""

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
        values: list[str] = self.table.column(name).take(pa.array(np.asarray(rows, np.int64))).to_pylist()
        return values


def open_vectors(directory: Location | str) -> VectorArray:
    """The vectors of a finished encode job; the array is made on the first call, in about a second for
    300,000 chunks. That of an encode job on object storage is made in this machine's cache folder.

    Raises InputError when the job is not finished, a shard is damaged, a chunk comes twice, or a vector is
    NaN, not of norm 1 or of the wrong dimension; IdentityError when the shards come from two codecs.
    """
    directory = location(directory)
    manifest = Manifest.load(directory, "vectors")
    folder = _array_folder(directory, manifest.fingerprint)
    if not folder.exists():
        _make_array(directory, manifest, folder)
    array = _map_array(directory, manifest, folder)
    if len(array) != manifest.rows or array.vectors.shape != (manifest.rows, manifest.identity.dim):
        raise InputError(
            f"{folder} holds vectors {array.vectors.shape}, expected "
            f"({manifest.rows}, {manifest.identity.dim}) as the manifest says; "
            "delete that folder, it is made again from the shards"
        )
    return array


def _reopen(directory: Location, expected: str) -> VectorArray:
    array = open_vectors(directory)
    if array.fingerprint != expected:
        raise InputError(
            f"the vectors in {directory} changed while they were in use (fingerprint {expected}, now "
            f"{array.fingerprint}); start this job again"
        )
    return array


def _array_folder(directory: Location, manifest_fingerprint: str) -> Path:
    name = f"{manifest_fingerprint}-{_ARRAY_LAYOUT}"
    if isinstance(directory, RemotePath):
        return cache_folder() / "arrays" / fingerprint(str(directory)) / name
    return directory / "_array" / name


def _map_array(directory: Location, manifest: Manifest, folder: Path) -> VectorArray:
    def load(name: str) -> NDArray[Any]:
        path = folder / f"{name}.npy"
        try:
            # numpy cannot map a file without data.
            mapped: NDArray[Any] = np.load(path, mmap_mode="r" if manifest.rows else None, allow_pickle=False)
        except (OSError, ValueError) as err:
            raise InputError(f"{path} is damaged ({err}); delete {folder}, it is made again") from err
        return mapped

    names = ("vectors", "doc_ids", "positions", "chunk_ids", "num_tokens", "truncated", "norms")
    arrays = {n: load(n) for n in (*names, "neighbour_cosines", "text_keys")}
    try:
        with pa.memory_map(str(folder / "texts.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError) as err:
        raise InputError(
            f"{folder / 'texts.arrow'} is damaged ({err}); delete {folder}, it is made again"
        ) from err
    return VectorArray(directory, manifest.fingerprint, manifest.identity, **arrays, table=table)


def _make_array(directory: Location, manifest: Manifest, folder: Path) -> None:
    """Lay the shards out under a temporary name, then rename. Two processes may do so at once: one wins."""
    manifest.verify(directory)
    temporary = temporary_name(folder)
    temporary.mkdir(parents=True)
    try:
        _fill_array(directory, manifest, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(directory, RemotePath):
            for shard in manifest.shards:  # their copies; all that is in them is in the array now
                fetched(shard.sha256, ".parquet").unlink(missing_ok=True)
    for other in folder.parent.iterdir():
        # Arrays of vectors that were redone since; the shards hold all that is in them.
        if other != folder and not other.name.startswith("."):
            shutil.rmtree(other, ignore_errors=True)


def _fill_array(directory: Location, manifest: Manifest, folder: Path) -> None:
    identity = manifest.identity
    paths = [fetch(directory / s.file, s.sha256) for s in manifest.shards]
    if not paths:
        raise InputError(f"{directory} holds no shard, expected one or more; run `latent chunk` on some text")
    for path in paths:
        record = read_footer(path)
        if "codec" in record:
            found = CodecIdentity.from_dict(record["codec"])
            require_same_codec(identity, found, f"manifest of {directory}", f"shard {path.name}")

    columns = ["chunk_id", "doc_id", "position", "num_tokens", "truncated", "norm"]
    keys = pa.concat_tables([read_table(p, columns) for p in paths])
    if keys.num_rows != manifest.rows:
        raise InputError(
            f"the shards of {directory} hold {keys.num_rows} rows, its manifest says {manifest.rows}; "
            "run `latent encode` again"
        )
    doc_ids = _numbers(keys, "doc_id", np.int32, directory)
    positions = _numbers(keys, "position", np.int32, directory)
    chunk_ids = np.asarray(keys.column("chunk_id").to_pylist(), dtype=np.str_)
    _require_unique(chunk_ids, doc_ids, positions, directory)

    order = np.lexsort((positions, doc_ids))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))  # the row of the array that holds shard row i

    def save(name: str, values: NDArray[Any]) -> None:
        np.save(folder / f"{name}.npy", values[order], allow_pickle=False)

    save("doc_ids", doc_ids)
    save("positions", positions)
    save("chunk_ids", chunk_ids)
    save("num_tokens", _numbers(keys, "num_tokens", np.int32, directory))
    save("truncated", _numbers(keys, "truncated", np.bool_, directory))
    save("norms", _numbers(keys, "norm", np.float32, directory))

    vectors: Any = None
    texts: list[pa.Table] = []
    start = 0
    for path in paths:
        table = read_table(path, [*_TEXT_COLUMNS, "vector"])
        part = table_to_vectors(table, f"shard {path}")
        require_unit_vectors(part, identity.dim, f"shard {path}", table.column("chunk_id").to_pylist())
        if vectors is None:
            shape = (manifest.rows, identity.dim)
            vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", part.dtype, shape)
        if part.dtype != vectors.dtype:
            raise InputError(
                f"shard {path} stores {part.dtype}, those before it {vectors.dtype}; encode again"
            )
        vectors[place[start : start + len(part)]] = part
        texts.append(table.select(_TEXT_COLUMNS))
        start += len(part)
    vectors.flush()

    table = pa.concat_tables(texts)
    in_order = bool((order == np.arange(len(order))).all())
    text_keys = np.empty(len(order), np.uint64)
    with pa.ipc.new_file(folder / "texts.arrow", table.schema) as writer:
        for low in range(0, len(order), BLOCK_ROWS):
            rows = order[low : low + BLOCK_ROWS]
            block = table.slice(low, len(rows)) if in_order else table.take(pa.array(rows))
            block = block.combine_chunks()
            writer.write_table(block)
            for i, text in enumerate(block.column("text").to_pylist(), low):
                text_keys[i] = _text_key(text)
    np.save(folder / "text_keys.npy", text_keys, allow_pickle=False)

    cosines = np.zeros(len(order), np.float32)
    for low in range(0, len(order) - 1, BLOCK_ROWS):
        block = vectors[low : low + BLOCK_ROWS + 1].astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)  # of float16, so not quite 1
        cosines[low : low + len(block) - 1] = np.einsum("nd,nd->n", block[:-1], block[1:])
    np.save(folder / "neighbour_cosines.npy", cosines, allow_pickle=False)


def _numbers(table: pa.Table, name: str, dtype: Any, directory: Location) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise InputError(
            f"{directory}: {column.null_count} rows have no {name}, expected one for each; encode again"
        )
    values: NDArray[Any] = column.to_numpy()
    return values.astype(dtype, copy=False)


def _require_unique(
    chunk_ids: NDArray[np.str_], doc_ids: NDArray[np.int32], positions: NDArray[np.int32], directory: Location
) -> None:
    names, counts = np.unique(chunk_ids, return_counts=True)
    if (counts > 1).any():
        twice = names[counts > 1]
        raise InputError(
            f"{directory}: chunk {twice[0]} comes {counts[counts > 1][0]} times ({len(twice)} chunks "
            "come more than once), expected each once. The input holds an article twice: remove it, "
            "then chunk and encode again."
        )
    places = doc_ids.astype(np.int64) << 32 | positions
    values, counts = np.unique(places, return_counts=True)
    if (counts > 1).any():
        place = int(values[counts > 1][0])
        raise InputError(
            f"{directory}: article {place >> 32} has two chunks at position {place & 0xFFFFFFFF}, "
            "expected one; chunk and encode again"
        )


def _text_key(text: str) -> int:
    plain = "".join(text.split()).casefold()
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


# -------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class WindowSettings:
    """Which windows are worth training on."""

    context: int = 5
    """Vectors the predictor sees, T."""
    min_neighbour_cosine: float = 0.0
    """Least mean cosine of the T pairs of neighbours in a window, target included; below it the text only
    jumps. A mean, as single pairs of one article often lie as far apart as strangers: with the `mini` codec
    on Wikipedia 4 % of the pairs are below 0, and 20 % of the windows hold one."""
    max_neighbour_cosine: float = 0.95
    """Most cosine of any two neighbours in a window; above it a chunk repeats the one before it but for a
    number or a full stop (three in 80,000 chunks of Wikipedia)."""
    min_tokens: int = 5
    """Fewest tokens of any chunk in a window, end of sequence included."""
    min_chunks: int = 0
    """Fewest chunks of an article; T + 1 are needed in any case."""
    allow_truncated: bool = False
    """Whether a chunk the codec had to cut may take part."""
    allow_repeated: bool = False
    """Whether a window may come again word for word (an article copied under another title)."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise InputError(f"context must be at least 1, got {self.context}")
        if not -1.0 <= self.min_neighbour_cosine < self.max_neighbour_cosine <= 1.01:
            raise InputError(
                "expected -1 <= min_neighbour_cosine < max_neighbour_cosine <= 1.01, got "
                f"{self.min_neighbour_cosine} and {self.max_neighbour_cosine}"
            )


@dataclass(frozen=True, eq=False)
class Windows:
    """M pairs of T context vectors and the next one, as row numbers into one array."""

    array: VectorArray
    starts: NDArray[np.int64]
    """(M,) row of the first context vector; the others and the target follow it in the array."""
    context: int
    """T."""
    report: dict[str, Any] = field(default_factory=dict)
    """What each filter of `make_windows` dropped."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def identity(self) -> CodecIdentity:
        """Codec of the vectors."""
        return self.array.identity

    @property
    def rows_of_context(self) -> NDArray[np.int64]:
        """(M, T) rows of the context vectors."""
        rows: NDArray[np.int64] = self.starts[:, None] + np.arange(self.context)
        return rows

    @property
    def rows_of_target(self) -> NDArray[np.int64]:
        """(M,) rows of the targets."""
        return self.starts + self.context

    @property
    def doc_ids(self) -> NDArray[np.int32]:
        """(M,) article of each window."""
        return self.array.doc_ids[self.starts]

    def batch(self, indices: Rows | slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Contexts (B, T, D) and targets (B, D) of these windows, float32, fresh copies."""
        rows = self.starts[indices][:, None] + np.arange(self.context + 1)
        vectors = self.array.vectors[rows].astype(np.float32)
        return vectors[:, :-1], vectors[:, -1]

    def batches(self, batch_rows: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """All windows in order, `batch_rows` at a time."""
        for low in range(0, len(self), batch_rows):
            yield self.batch(slice(low, low + batch_rows))

    def subset(self, indices: Rows) -> "Windows":
        """These windows only: integers, or a mask of M booleans."""
        return Windows(self.array, self.starts[np.asarray(indices)], self.context, self.report)

    def last(self, context: int) -> "Windows":
        """The same targets, each with the last `context` of its context vectors; a view like this one.

        Raises InputError when there are not as many.
        """
        if not 1 <= context <= self.context:
            raise InputError(f"expected 1 to {self.context} of {self.context} context vectors, got {context}")
        return Windows(self.array, self.starts + (self.context - context), context, self.report)

    def split(self, seed: int = 0) -> dict[str, "Windows"]:
        """Windows of the train, val and test articles. No article is in two of them.

        The articles of the whole array are split, so that other filters or another context length move no
        article from one to another. Raises InputError when a split would have no window.
        """
        with_window = len(np.unique(self.doc_ids))
        if with_window < MIN_ARTICLES:
            raise InputError(
                f"expected at least {MIN_ARTICLES} articles with a window of {self.context} + 1 chunks for a "
                f"split of 80/10/10, got {with_window} in {self.array.directory}; add articles or longer ones"
            )
        parts = {}
        for name, articles in split_articles(np.unique(self.array.doc_ids), seed).items():
            parts[name] = self.subset(np.isin(self.doc_ids, articles))
            if not len(parts[name]):
                raise InputError(
                    f"none of the {len(articles)} {name} articles has a window of {self.context} + 1 chunks "
                    f"({with_window} articles have one); add articles, or longer ones"
                )
        return parts


def split_articles(doc_ids: Rows, seed: int = 0) -> dict[str, NDArray[Any]]:
    """The distinct doc ids of the train (80 %), val (10 %) and test (10 %) articles, each ascending.

    Depends on the set of ids and the seed alone: not on their order, the machine, or numpy's version. When
    articles are added, few of the others change their split. Raises InputError under MIN_ARTICLES articles.
    """
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    articles = np.unique(np.asarray(doc_ids))
    if len(articles) < MIN_ARTICLES:
        raise InputError(
            f"expected at least {MIN_ARTICLES} articles with a window for a split of 80/10/10, "
            f"got {len(articles)}; add articles"
        )
    order = np.lexsort((articles, _hash(articles, seed)))
    num_test, num_val = round(len(articles) * TEST_SHARE), round(len(articles) * VAL_SHARE)
    return {
        "train": np.sort(articles[order[num_test + num_val :]]),
        "val": np.sort(articles[order[num_test : num_test + num_val]]),
        "test": np.sort(articles[order[:num_test]]),
    }


def _hash(values: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014) of value and seed."""
    mixed = values.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def make_windows(array: VectorArray, settings: WindowSettings | None = None) -> Windows:
    """Every window of T + 1 consecutive chunks of one article that passes the filters, in corpus order.

    `report` counts the candidates, what each filter dropped (a window counts for the first that drops it),
    what is kept, and the settings. Raises InputError when nothing is left.
    """
    settings = settings or WindowSettings()
    length = settings.context + 1
    doc_ids = np.asarray(array.doc_ids)
    positions = np.asarray(array.positions)
    num_candidates = max(len(array) - length + 1, 0)
    last = slice(length - 1, length - 1 + num_candidates)
    # Rows are sorted and a position comes once, so equal ends and a distance of T mean no gap between them.
    whole = (doc_ids[:num_candidates] == doc_ids[last]) & (
        positions[last] - positions[:num_candidates] == settings.context
    )
    starts = np.flatnonzero(whole)
    report: dict[str, Any] = {"settings": asdict(settings), "chunks": len(array), "candidates": len(starts)}

    def keep(reason: str, bad: NDArray[np.bool_], width: int) -> None:
        """Drop the windows with any of their first `width` rows marked bad."""
        nonlocal starts
        before = np.concatenate(([0], np.cumsum(bad)))
        stay = before[starts + width] == before[starts]
        report[reason] = int(len(starts) - stay.sum())
        starts = starts[stay]

    cosines = np.asarray(array.neighbour_cosines)
    articles, inverse, counts = np.unique(doc_ids, return_inverse=True, return_counts=True)
    keep("dropped_short_article", counts[inverse] < settings.min_chunks, length)
    keep("dropped_short_chunk", np.asarray(array.num_tokens) < settings.min_tokens, length)
    keep("dropped_truncated", np.asarray(array.truncated) & (not settings.allow_truncated), length)
    # One pair fewer than rows: pair i joins rows i and i + 1.
    summed = np.concatenate(([0.0], np.cumsum(cosines, dtype=np.float64)))
    coheres = summed[starts + settings.context] - summed[starts] >= (
        settings.min_neighbour_cosine * settings.context - 1e-9
    )
    report["dropped_jump"] = int(len(starts) - coheres.sum())
    starts = starts[coheres]
    keep("dropped_near_duplicate", cosines > settings.max_neighbour_cosine, length - 1)
    if settings.allow_repeated:
        report["dropped_repeated"] = 0
    else:
        first = _first_of_each(np.asarray(array.text_keys), starts, length)
        report["dropped_repeated"] = int(len(starts) - len(first))
        starts = starts[first]
    report["kept"] = len(starts)
    report["articles"] = len(articles)
    report["articles_with_window"] = len(np.unique(doc_ids[starts]))
    if not len(starts):
        dropped = ", ".join(f"{k} {v}" for k, v in report.items() if k.startswith("dropped_") and v)
        raise InputError(
            f"no window of {settings.context} + 1 consecutive chunks in {array.directory} "
            f"({len(array)} chunks of {len(articles)} articles, {report['candidates']} candidates; "
            f"{dropped or 'articles are too short'}); expected at least one. "
            "Take longer articles, or loosen WindowSettings."
        )
    return Windows(array, starts.astype(np.int64), settings.context, report)


def _first_of_each(text_keys: NDArray[np.uint64], starts: NDArray[Any], length: int) -> NDArray[Any]:
    """Indices, ascending, of the first window of each wording."""
    wording = np.zeros(len(starts), np.uint64)
    for offset in range(length):
        wording = wording * np.uint64(0x100000001B3) + text_keys[starts + offset]
    _, first = np.unique(wording, return_index=True)
    return np.sort(first)


def settings_fingerprint(settings: WindowSettings, seed: int) -> str:
    """16 hex digits that name a choice of windows and split, for model records."""
    return fingerprint({**asdict(settings), "seed": seed})
