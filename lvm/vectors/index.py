"""Nearest-neighbour search by inner product: build a faiss index over an array, publish it, search it.

    index/versions/<fingerprint>/index.faiss     one folder per version; part-00000.faiss … if it has several parts
    index/versions/<fingerprint>/manifest.json   codec, source vectors, measured recall; written last
    index/CURRENT                                name of the version to load, replaced atomically

Large arrays are split into parts, each an independent index, searched together: building needs memory for one part
only, and parts of an interrupted build are reused. Files are memory-mapped: product codes are read into memory (96
bytes a vector), exact vectors stay on disk in pages that processes share. The version before CURRENT stays on disk
until the next one is published, so open readers keep working.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from lvm.arguments import floats, whole
from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError, OutputError
from lvm.storage import Location, fetch, local_output, location, plain_name, remove_tree, temporary_name
from lvm.vectors.array import Each, VectorArray
from lvm.vectors.artefact import Artefact
from lvm.vectors.shards import (
    Manifest,
    Shard,
    cannot_write,
    file_sha256,
    fingerprint,
    publish,
    sweep_temporaries,
    write_bytes,
)

KEPT_VERSIONS = 2
"""Versions kept on disk: the published one and the one before it."""

SETTLED_LISTS = 512
"""Up to this many lists in a part, a search probes as many as `IndexSettings` says; in twice as many, twice as many."""

LIST_VECTORS = 2048
"""Minimum mean length of a list in a part with more than SETTLED_LISTS lists."""


@dataclass(frozen=True)
class IndexSettings:
    """Type and size of the index, and how many lists a search probes."""

    flat_below: int = 4096
    """Fewer vectors than this are searched exhaustively: exact, and fast enough."""
    max_lists: int = 2048
    """Maximum number of inverted lists per part, nlist."""
    probes: int = 16
    """Lists per search, nprobe, for up to SETTLED_LISTS lists; the original system's."""
    coded_from: int = 100_000
    """From this many vectors, lists store 4-bit product codes, which are scanned 16 times faster than vectors, and the
    best candidates are then compared exactly. Searching four times as many lists then takes a third of the time: at
    506,000 chunks of Wikipedia recall@16 is 0.95, where 16 lists reach 0.88 at most (tests/bench/results/)."""
    coded_probes: int = 64
    """Lists per search if they store codes, for up to SETTLED_LISTS lists."""
    candidates: int = 8
    """Exact comparisons per result if lists store codes."""
    training_per_list: int = 64
    """Training vectors of k-means per list; faiss warns below 39."""
    seed: int = 0
    """Seed of k-means and of the queries that measure recall."""
    part_vectors: int = 4_000_000
    """Maximum vectors per part. Building takes 1.7 KB of memory per 768-d vector: 7 GB."""

    def num_parts(self, num_vectors: int) -> int:
        """Number of parts for this many vectors; their sizes differ by at most one."""
        return -(-num_vectors // self.part_vectors)

    def coded(self, num_vectors: int) -> bool:
        """Whether an index of this many vectors stores codes."""
        return num_vectors >= self.coded_from and self.num_lists(num_vectors) > 0

    def num_lists(self, num_vectors: int) -> int:
        """nlist of a part: the largest power of two up to the square root of its size; 0 for exhaustive search.

        The square root balances the number of lists against their length; 500,000 vectors give SETTLED_LISTS, the
        original system's number. A part has more only if each holds LIST_VECTORS: one of 4 million has 1,024.
        """
        if num_vectors < self.flat_below:
            return 0
        root = 2 ** int(np.log2(num_vectors**0.5))
        return int(
            min(self.max_lists, root, max(SETTLED_LISTS, 2 ** int(np.log2(num_vectors / LIST_VECTORS))))
        )

    def num_probes(self, num_vectors: int) -> int:
        """nprobe of a part. Beyond SETTLED_LISTS it grows with nlist, so that a search scans the same share of the
        vectors and recall does not fall."""
        probes = self.coded_probes if self.coded(num_vectors) else self.probes
        return probes * max(1, self.num_lists(num_vectors) // SETTLED_LISTS)


Nearest = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores (B, k) and rows (B, k), best first."""


@dataclass(frozen=True)
class Index:
    """One published version, ready to search."""

    directory: Location
    """The version's folder."""
    manifest: Manifest
    """Source vectors, settings and measured recall."""
    store: Any
    """The faiss index."""
    first: int = 0
    """The array's row of the first vector: above 0 if only later parts are loaded."""

    def __len__(self) -> int:
        return int(self.store.ntotal)

    @property
    def identity(self) -> CodecIdentity:
        """Codec of the vectors."""
        return self.manifest.identity

    def require_array(self, array: VectorArray) -> None:
        """Raise InputError unless this index was built from `array`, and IdentityError if the codecs differ."""
        require_same_codec(self.identity, array.identity, f"index {self.directory}", str(array.directory))
        made_from = self.manifest.inputs.get("vectors")
        if made_from != array.fingerprint:
            raise InputError(
                f"index {self.directory} was made from vectors {made_from}, but {array.directory} now holds "
                f"{array.fingerprint}; run `latent index` again"
            )

    def search(self, queries: NDArray[Any], k: int, probes: int | None = None) -> Nearest:
        """Inner products (B, k) float32, best first, and their rows (B, k) int64 in the array.

        queries: (B, D) float; for unit vectors the scores are cosines. probes: lists to search; more find more and
        take longer. Queries whose lists hold fewer than k vectors are searched again in all lists.
        Raises InputError on a wrong shape, NaN, and k outside 1..N.
        """
        dim = self.identity.dim
        queries = floats("queries", queries, f"numbers (B, {dim})")
        if queries.ndim != 2 or queries.shape[1] != dim:
            expected = f"(B, {dim}); encode them with {self.identity}"
            raise InputError(f"queries have shape {queries.shape}, expected {expected}")
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if len(bad):
            raise InputError(f"query {bad[0]} holds NaN or infinity ({len(bad)} do), expected finite numbers")
        k = whole("k", k, 1, len(self))
        if probes is not None:
            probes = whole("probes", probes, otherwise=", or None")
        return self._search(queries, k, probes)

    def reconstruct(self, rows: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """The stored vectors (B, D) float32 of these rows, counted from `first`."""
        if (given := np.asarray(rows)).size and given.dtype.kind not in "iu":
            raise InputError(f"rows are {given.dtype}, expected integers")
        wanted = given.astype(np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            low, high = wanted.min(), wanted.max()
            raise InputError(f"rows must be between 0 and {len(self) - 1}, got {low} to {high}")
        parts = self._parts
        if self._num_lists and not self._coded:
            for part in parts:
                if part.direct_map.no():
                    part.make_direct_map()
        ends = np.cumsum([part.ntotal for part in parts])
        out = np.empty((len(wanted), self.store.d), np.float32)
        for i, row in enumerate(wanted):
            number = int(np.searchsorted(ends, row, side="right"))
            parts[number].reconstruct(int(row - ends[number] + parts[number].ntotal), out[i])
        return out

    @property
    def _parts(self) -> list[Any]:
        store: Any = self.store
        if not isinstance(self.store, faiss.IndexShards):
            return [store]
        return [faiss.downcast_index(store.at(number)) for number in range(store.count())]

    @property
    def _num_lists(self) -> int:
        return int(self.manifest.settings["nlist"])

    @property
    def _coded(self) -> bool:
        return bool(self.manifest.settings.get("candidates"))

    def _search(self, queries: NDArray[np.float32], k: int, probes: int | None) -> Nearest:
        lists = self._num_lists
        scores, rows = self._probe(queries, k, min(probes or int(self.manifest.settings["probes"]), lists))
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):
            scores[short], rows[short] = self._probe(queries[short], k, lists)
        return scores, np.where(rows < 0, rows, rows + self.first)

    def _probe(self, queries: NDArray[np.float32], k: int, probes: int) -> Nearest:
        # As arguments, not as state of the index: threads share it.
        params: Any = None
        if self._num_lists:
            params = faiss.SearchParametersIVF(nprobe=probes)  # type: ignore[call-arg]
        if self._coded:
            params = faiss.IndexRefineSearchParameters(  # type: ignore[call-arg]
                k_factor=float(self.manifest.settings["candidates"]), base_index_params=params
            )
        scores, rows = self.store.search(queries, k, params=params)
        return scores, rows


@dataclass(frozen=True)
class DividedIndex(Index):
    """An index whose parts others hold, in this process or elsewhere: they are searched together."""

    searchers: Callable[[NDArray[np.float32], int, int | None], Sequence[Nearest]] = field(kw_only=True)
    """Returns what `Index.search` finds for these arguments in each share of the parts, fewer than k where a share has
    fewer."""

    def __len__(self) -> int:
        return self.manifest.rows

    def _search(self, queries: NDArray[np.float32], k: int, probes: int | None) -> Nearest:
        scores, rows = (
            np.concatenate(found, axis=1) for found in zip(*self.searchers(queries, k, probes), strict=True)
        )
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)


def build_index(
    array: VectorArray,
    directory: Location,
    settings: IndexSettings | None = None,
    each: Each = map,
) -> Index:
    """Index all vectors of `array`, measure recall, publish the index in `directory`, and return it.

    An up-to-date published version is returned unchanged. each: runs the building of the parts, and the comparison with
    all vectors that recall needs. Raises InputError if there are no vectors.
    """
    settings = settings or IndexSettings()
    if not len(array):
        raise InputError(f"{array.directory} has no vector, expected at least one; run `latent encode` first")
    current = find_index(array, directory, settings)
    if current is not None:
        return current

    record = _settings_record(settings, len(array))
    version = directory / "versions" / _version_name(array, record)
    if (version / "manifest.json").exists():
        remove_tree(version)  # it was published, but is damaged
    sweep_temporaries(version)
    shards = tuple(each(partial(build_part, array, version, settings), range(settings.num_parts(len(array)))))
    inputs = {"vectors": array.fingerprint}
    manifest = Manifest("index", record, inputs, shards, len(array), array.identity.to_dict())
    index = Index(version, manifest, _map(version, manifest, shards))
    recall = measure_recall(array, index, settings.seed, parts=len(shards), each=each)
    manifest.with_report(**recall).save(version)
    write_bytes(directory / "CURRENT", f"{version.name}\n".encode())
    _drop_old_versions(directory)
    return load_index(directory)


def build_part(array: VectorArray, version: Location, settings: IndexSettings, number: int) -> Shard:
    """Build one part and write its file into the version's folder, unless an earlier run did."""
    parts = settings.num_parts(len(array))
    path = version / ("index.faiss" if parts == 1 else f"part-{number:05d}.faiss")
    rows = _rows_of(array, parts, number)
    if not path.exists():
        store = _fill(array, rows, settings)
        with local_output(path) as file:
            temporary = temporary_name(file)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                faiss.write_index(store, str(temporary))
                publish(temporary, file)
            except (OSError, RuntimeError) as err:  # faiss raises RuntimeError if the disk is full
                raise cannot_write(path, err) from err
            finally:
                temporary.unlink(missing_ok=True)
    return Shard(path.name, len(rows), path.stat().st_size, file_sha256(path))


def _rows_of(array: VectorArray, parts: int, number: int) -> range:
    """The array's rows in one of `parts` parts."""
    return range(len(array) * number // parts, len(array) * (number + 1) // parts)


def load_index(
    directory: Location | str, share: int = 0, shares: int = 1, version: str | None = None
) -> Index:
    """The published version, or the one of this name, memory-mapped: processes on one machine share its pages. From
    object storage, its files are downloaded into the local cache once.

    share: which of `shares` of its parts to load; rows are those of the array all the same. Raises InputError if none
    is published, it has fewer parts than `shares`, or a file is missing or damaged.
    """
    shares = whole("shares", shares)
    share = whole("share", share, 0, shares - 1)
    folder, manifest = published(location(directory), shares, version)
    parts = len(manifest.shards)
    mine = range(parts * share // shares, parts * (share + 1) // shares)
    first = sum(shard.rows for shard in manifest.shards[: mine.start])
    return Index(folder, manifest, _map(folder, manifest, manifest.shards[mine.start : mine.stop]), first)


def published(directory: Location, shares: int = 1, version: str | None = None) -> tuple[Location, Manifest]:
    """Folder and manifest of the published version, or of the one of this name. Raises InputError as `load_index`."""
    current, cure = directory / "CURRENT", f"Run `latent index` with --output {directory}."
    try:
        name = current.read_text().strip() if version is None else version
        folder = directory / "versions" / plain_name("the version of an index", name)
    except FileNotFoundError as err:
        raise InputError(f"no {current}; expected a published index. {cure}") from err
    except (OSError, ValueError, InputError) as err:
        raise InputError(f"{current} cannot be read ({err}); expected a published index. {cure}") from err
    manifest = Manifest.load(folder, "index")
    manifest.verify(folder)
    if len(manifest.shards) < shares:
        raise InputError(
            f"index {folder} has {len(manifest.shards)} part{'s'[: len(manifest.shards) != 1]}, expected at least "
            f"{shares} to divide it by; divide it by fewer"
        )
    return folder, manifest


def _map(version: Location, manifest: Manifest, shards: Sequence[Shard]) -> Any:
    """The faiss index of some parts of a version; several are combined in one."""
    # IVF_FLAT needs one mmap flag, flat and refined indexes the other; faiss does not accept both.
    flags = faiss.IO_FLAG_MMAP if manifest.settings["type"] == "IVF_FLAT" else faiss.IO_FLAG_MMAP_IFC
    stores = []
    for shard in shards:
        file = version / shard.file
        try:
            store = faiss.read_index(str(fetch(file, shard.sha256)), flags)
        except RuntimeError as err:
            raise InputError(
                f"{file} is damaged: {str(err).splitlines()[0]}. Delete {version} and run `latent index` again."
            ) from err
        if store.ntotal != shard.rows or store.d != manifest.identity.dim:
            raise InputError(
                f"{file} holds {store.ntotal} vectors of {store.d} numbers, its manifest says {shard.rows} of "
                f"{manifest.identity.dim}; delete {version} and run `latent index` again"
            )
        stores.append(store)
    if len(stores) == 1:
        return stores[0]
    combined = faiss.IndexShards(manifest.identity.dim, False, True)  # type: ignore[call-arg]  # threaded, successive_ids
    for store in stores:
        combined.add_shard(store)
    return combined


def find_index(
    array: VectorArray, directory: Location, settings: IndexSettings | None = None
) -> Index | None:
    """The published version if it is intact and was made from `array` with `settings`, else None."""
    record = _settings_record(settings or IndexSettings(), len(array))
    name = _version_name(array, record)
    try:
        if (directory / "CURRENT").read_text().strip() != name:
            return None
        version = Artefact(directory / "versions" / name, "index", record)
        if version.current({"vectors": array.fingerprint}, deep=True) is None:
            return None
        return load_index(directory)
    except (OSError, InputError, OutputError):
        return None


def measure_recall(
    array: VectorArray,
    index: Index,
    seed: int = 0,
    num_queries: int = 256,
    k: int = 16,
    parts: int = 1,
    each: Each = map,
) -> dict[str, Any]:
    """Recall: the share of the true k nearest vectors that a search finds, averaged over a sample of queries.

    Two kinds of queries: stored vectors, and means of six consecutive vectors, which like predictions lie between
    stored ones. The truth comes from comparing each with every vector, in `parts` parts; each: as in `build_index`.
    """
    random = np.random.default_rng(seed)
    k = min(k, len(array))
    num_queries = min(num_queries, len(array))
    rows = np.sort(random.choice(len(array), num_queries, replace=False))
    stored = array.vectors[rows].astype(np.float32)
    around = np.clip(rows[:, None] + np.arange(6), 0, len(array) - 1)
    blended = array.vectors[around].astype(np.float32).mean(axis=1)
    blended /= np.maximum(np.linalg.norm(blended, axis=1, keepdims=True), 1e-6)
    queries = np.concatenate((stored, blended))
    near = list(each(partial(_nearest_in_part, array, queries, k, parts), range(parts)))
    scores, exact = (np.concatenate(found, axis=1) for found in zip(*near, strict=True))
    exact = np.take_along_axis(exact, np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)
    _, found = index.search(queries, k)
    shares = [np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]
    report: dict[str, Any] = {"recall_k": k, "recall_queries": num_queries}
    for name, part in (("recall_stored", shares[:num_queries]), ("recall_blended", shares[num_queries:])):
        report[name] = round(float(np.mean(part)), 4)
    return report


def _nearest_in_part(
    array: VectorArray, queries: NDArray[np.float32], k: int, parts: int, number: int
) -> Nearest:
    """Cosines and rows, (Q, k) each, of the nearest vectors in a part, by comparing all; -inf and -1 beyond its end."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for low, block in _blocks(array, _rows_of(array, parts, number)):
        found = queries @ block.T
        for query in np.flatnonzero((found > scores[:, -1:]).any(axis=1)):  # after the first blocks, few
            hits = np.flatnonzero(found[query] > scores[query, -1])
            known, places = np.append(scores[query], found[query, hits]), np.append(rows[query], low + hits)
            best = np.argsort(-known, kind="stable")[:k]
            scores[query], rows[query] = known[best], places[best]
    return scores, rows


def _blocks(array: VectorArray, rows: range | None = None) -> Any:
    rows = rows or range(len(array))
    for low in rows[::16_384]:
        yield low, np.ascontiguousarray(array.vectors[low : min(low + 16_384, rows.stop)], dtype=np.float32)


def _fill(array: VectorArray, rows: range, settings: IndexSettings) -> Any:
    dim = array.identity.dim
    smallest = len(array) // settings.num_parts(len(array))
    num_lists = settings.num_lists(smallest)
    if not num_lists:
        store: Any = faiss.IndexFlatIP(dim)
    else:
        centres = faiss.IndexFlatIP(dim)
        product = faiss.METRIC_INNER_PRODUCT
        if settings.coded(smallest):
            # 4 bits per 4 dimensions: 96 bytes for a 768-d vector.
            lists: Any = faiss.IndexIVFPQFastScan(centres, dim, num_lists, dim // 4, 4, product)
            lists.pq.cp.seed = settings.seed + 2
            exact = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, product)
            store = faiss.IndexRefine(lists, exact)
        else:
            store = lists = faiss.IndexIVFFlat(centres, dim, num_lists, product)
        lists.cp.seed = settings.seed + 1
        lists.cp.spherical = (
            True  # unit-norm centroids, like the vectors, so inner products rank them correctly
        )
        num_training = min(len(rows), num_lists * settings.training_per_list)
        random = np.random.default_rng(settings.seed)
        sample = rows.start + random.choice(len(rows), num_training, replace=False)
        # Product codes train hundreds of k-means with 16 centroids each. On two busy cores, two threads wait for each
        # other at every step: 76 s, against 4 s with one.
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if settings.coded(smallest) else threads)
        try:
            store.train(np.ascontiguousarray(array.vectors[np.sort(sample)], dtype=np.float32))
        finally:
            faiss.omp_set_num_threads(threads)
    for _, block in _blocks(array, rows):
        store.add(block)
    return store


def _settings_record(settings: IndexSettings, num_vectors: int) -> dict[str, Any]:
    parts = settings.num_parts(num_vectors)
    num_vectors //= parts  # of the smallest
    num_lists = settings.num_lists(num_vectors)
    record = {
        "type": "IVF_FLAT" if num_lists else "FLAT",
        "metric": "inner product",
        "nlist": num_lists,
        "probes": settings.num_probes(num_vectors),
        "training_per_list": settings.training_per_list,
        "seed": settings.seed,
    }
    if settings.coded(num_vectors):
        record |= {"type": "IVF_PQ4_REFINED", "candidates": settings.candidates}
    return record if parts == 1 else {**record, "parts": parts}


def _version_name(array: VectorArray, record: dict[str, Any]) -> str:
    return fingerprint({"vectors": array.fingerprint, "settings": record})


def _drop_old_versions(directory: Location) -> None:
    versions = directory / "versions"
    sweep_temporaries(directory)
    current = (directory / "CURRENT").read_text().strip()
    made = [p for p in versions.iterdir() if p.is_dir() and not p.name.startswith(".")]
    # The current one first, though it need not be the newest: a build can publish an old version again.
    made.sort(key=lambda p: (p.name == current, _made_at(p)), reverse=True)
    for old in made[KEPT_VERSIONS:]:
        remove_tree(old)
    for left in versions.glob(".*.tmp"):
        remove_tree(left)


def _made_at(version: Location) -> int:
    """Publication time of a version in nanoseconds; 0 for an incomplete upload."""
    try:
        # The manifest's time: folders on object storage have none.
        return (version / "manifest.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0
