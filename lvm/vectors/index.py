"""Nearest vectors by inner product: build a faiss index over an array, publish it, search it.

    index/versions/<fingerprint>/index.faiss     one folder a version, made whole and then renamed
    index/versions/<fingerprint>/manifest.json   codec, vectors it was made from, measured recall
    index/CURRENT                                name of the version to load, replaced in one step

A reader that opened a version keeps it: the one before CURRENT stays on disk until the next is published.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import InputError, OutputError
from lvm.storage import Location, fetch, location, new_folder, publish_folder, remove_tree
from lvm.vectors.array import VectorArray
from lvm.vectors.artefact import Artefact
from lvm.vectors.shards import (
    Manifest,
    Shard,
    cannot_write,
    file_sha256,
    fingerprint,
    sweep_temporaries,
    write_bytes,
)

KEPT_VERSIONS = 2
"""Versions left on disk: the published one and the one before it."""


@dataclass(frozen=True)
class IndexSettings:
    """How vectors are grouped and how many groups a search looks into."""

    flat_below: int = 4096
    """Under this many vectors each search compares all of them: exact, and fast enough."""
    max_lists: int = 512
    """Most inverted lists, nlist; the original system's number at 500,000 vectors."""
    probes: int = 16
    """Lists a search looks into, nprobe; the original system's number."""
    coded_from: int = 100_000
    """From this many vectors on, lists hold 4-bit product codes, which are read 16 times faster than the vectors; the
    best are then compared exactly. So a search can look into four times the lists and still takes a third of the time:
    at 506,000 chunks of Wikipedia, recall@16 of 0.95, where 16 lists hold 0.88 at most (tests/bench/results/)."""
    coded_probes: int = 64
    """Lists a search looks into where they hold codes."""
    candidates: int = 8
    """Vectors compared exactly for each one asked for, where lists hold codes."""
    training_per_list: int = 64
    """Vectors per list that k-means sees; faiss warns under 39."""
    seed: int = 0
    """Seed of k-means and of the sample recall is measured on."""

    def coded(self, num_vectors: int) -> bool:
        """Whether an index of this many vectors holds codes."""
        return num_vectors >= self.coded_from and self.num_lists(num_vectors) > 0

    def num_lists(self, num_vectors: int) -> int:
        """nlist for this many vectors: the power of two below their square root, 0 for no lists at all.

        The square root balances the lists against the vectors in one; 500,000 vectors give 512.
        """
        if num_vectors < self.flat_below:
            return 0
        return int(min(self.max_lists, 2 ** int(np.log2(num_vectors**0.5))))


@dataclass(frozen=True)
class Index:
    """One published version, ready to search."""

    directory: Location
    """The version's folder."""
    manifest: Manifest
    """What it was made from and how well it finds."""
    store: Any
    """The faiss index."""

    def __len__(self) -> int:
        return int(self.store.ntotal)

    @property
    def identity(self) -> CodecIdentity:
        """Codec of the vectors."""
        return self.manifest.identity

    def require_array(self, array: VectorArray) -> None:
        """Return when the rows this index answers with are rows of `array`.

        Raises IdentityError when the codecs differ, InputError when the index is of other vectors.
        """
        require_same_codec(self.identity, array.identity, f"index {self.directory}", str(array.directory))
        made_from = self.manifest.inputs.get("vectors")
        if made_from != array.fingerprint:
            raise InputError(
                f"index {self.directory} was made from vectors {made_from}, but {array.directory} now holds "
                f"{array.fingerprint}; run `latent index` again"
            )

    def search(
        self, queries: NDArray[Any], k: int, probes: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Inner products (B, k) float32, best first, and the rows (B, k) int64 of the array they belong to.

        queries: (B, D) float; with unit vectors the scores are cosines. probes: lists to look into; more
        find more and take longer. A query whose lists hold fewer than k vectors is searched again in all
        of them.
        Raises InputError on a wrong shape, NaN, and k outside 1..N.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        dim = self.store.d
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputError(
                f"queries have shape {queries.shape}, expected (B, {dim}); encode them with {self.identity}"
            )
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if len(bad):
            raise InputError(
                f"query {bad[0]} holds NaN or infinity ({len(bad)} such), expected finite numbers"
            )
        if not 1 <= k <= len(self):
            raise InputError(f"k must be between 1 and the {len(self)} vectors of the index, got {k}")
        lists = self._num_lists
        scores, rows = self._search(queries, k, min(probes or self._probes, lists))
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):
            scores[short], rows[short] = self._search(queries[short], k, lists)
        return scores, rows

    def reconstruct(self, rows: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """The stored vectors (B, D) float32 of these rows; float16 vectors come back as they were stored."""
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise InputError(
                f"rows must lie between 0 and {len(self) - 1}, got {wanted.min()} to {wanted.max()}"
            )
        if self._num_lists and not self._coded and self.store.direct_map.no():
            self.store.make_direct_map()
        out = np.empty((len(wanted), self.store.d), np.float32)
        for i, row in enumerate(wanted):
            self.store.reconstruct(int(row), out[i])
        return out

    @property
    def _num_lists(self) -> int:
        return int(self.manifest.settings["nlist"])

    @property
    def _coded(self) -> bool:
        return bool(self.manifest.settings.get("candidates"))

    @property
    def _probes(self) -> int:
        return int(self.manifest.settings["probes"])

    def _search(
        self, queries: NDArray[np.float32], k: int, probes: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        # Parameters go with the call, not into the index: several threads may search one index.
        params: Any = None
        if self._num_lists:
            params = faiss.SearchParametersIVF(nprobe=probes)  # type: ignore[call-arg]
        if self._coded:
            params = faiss.IndexRefineSearchParameters(  # type: ignore[call-arg]
                k_factor=float(self.manifest.settings["candidates"]), base_index_params=params
            )
        scores, rows = self.store.search(queries, k, params=params)
        return scores, rows


def build_index(array: VectorArray, directory: Location, settings: IndexSettings | None = None) -> Index:
    """Index all vectors of `array`, measure its recall, publish it in `directory`, and return it.

    When the version CURRENT names was made from the same vectors with the same settings, it is returned as it
    is. Raises InputError when there is no vector.
    """
    settings = settings or IndexSettings()
    if not len(array):
        raise InputError(
            f"{array.directory} holds no vector, expected at least one; run `latent encode` first"
        )
    current = find_index(array, directory, settings)
    if current is not None:
        return current

    store = _fill(array, settings)
    record = _settings_record(settings, len(array))
    version = directory / "versions" / _version_name(array, record)
    with new_folder(version) as temporary:
        file = temporary / "index.faiss"
        try:
            faiss.write_index(store, str(file))
            with file.open("rb") as written:
                os.fsync(written.fileno())
        except (OSError, RuntimeError) as err:  # faiss raises RuntimeError when a disk is full
            raise cannot_write(file, err) from err
        shard = Shard(file.name, len(array), file.stat().st_size, file_sha256(file))
        manifest = Manifest(
            kind="index",
            settings=record,
            inputs={"vectors": array.fingerprint},
            shards=(shard,),
            rows=len(array),
            codec=array.identity.to_dict(),
        )
        recall = measure_recall(array, Index(temporary, manifest, store), settings.seed)
        manifest.with_report(**recall).save(temporary)
        publish_folder(temporary, version, last="manifest.json")
    write_bytes(directory / "CURRENT", f"{version.name}\n".encode())
    _drop_old_versions(directory)
    return load_index(directory)


def load_index(directory: Location | str) -> Index:
    """The version CURRENT names, memory-mapped: replicas on one machine share its pages. From object storage its file
    is fetched first, once for each version.

    Raises InputError when none is published, or its file is missing or damaged.
    """
    directory = location(directory)
    current = directory / "CURRENT"
    try:
        name = current.read_text().strip()
    except FileNotFoundError as err:
        raise InputError(
            f"no {current}; expected a published index. Run `latent index` with --output {directory}."
        ) from err
    version = directory / "versions" / name
    manifest = Manifest.load(version, "index")
    manifest.verify(version)
    file = version / manifest.shards[0].file
    try:
        store = faiss.read_index(str(fetch(file, manifest.shards[0].sha256)), faiss.IO_FLAG_MMAP)
    except RuntimeError as err:
        raise InputError(
            f"{file} is damaged: {str(err).splitlines()[0]}. Delete {version} and run `latent index` again."
        ) from err
    if store.ntotal != manifest.rows or store.d != manifest.identity.dim:
        raise InputError(
            f"{file} holds {store.ntotal} vectors of {store.d} numbers, its manifest says {manifest.rows} of "
            f"{manifest.identity.dim}; delete {version} and run `latent index` again"
        )
    return Index(version, manifest, store)


def find_index(
    array: VectorArray, directory: Location, settings: IndexSettings | None = None
) -> Index | None:
    """The published version when it was made from `array` with `settings` and is whole; else None."""
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
    array: VectorArray, index: Index, seed: int = 0, num_queries: int = 256, k: int = 16
) -> dict[str, Any]:
    """Share of the true k nearest vectors that a search finds, over a sample of queries.

    Two kinds of queries: stored vectors, which lie where the lists are dense, and means of six consecutive
    vectors, which lie between them, as predictions do. Exact search runs over the whole array in blocks.
    """
    random = np.random.default_rng(seed)
    k = min(k, len(array))
    num_queries = min(num_queries, len(array))
    rows = np.sort(random.choice(len(array), num_queries, replace=False))
    stored = array.vectors[rows].astype(np.float32)
    around = np.clip(rows[:, None] + np.arange(6), 0, len(array) - 1)
    blended = array.vectors[around].astype(np.float32).mean(axis=1)
    blended /= np.maximum(np.linalg.norm(blended, axis=1, keepdims=True), 1e-6)
    report: dict[str, Any] = {"recall_k": k, "recall_queries": num_queries}
    for name, queries in (("recall_stored", stored), ("recall_blended", blended)):
        exact = _exact_search(array, queries, k)
        _, found = index.search(queries, k)
        report[name] = round(
            float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)])), 4
        )
    return report


def _exact_search(array: VectorArray, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    best_scores = np.full((len(queries), k), -np.inf, np.float32)
    best_rows = np.full((len(queries), k), -1, np.int64)
    for low, block in _blocks(array):
        scores = np.concatenate([best_scores, queries @ block.T], axis=1)
        candidates = np.broadcast_to(np.arange(low, low + len(block)), (len(queries), len(block)))
        rows = np.concatenate([best_rows, candidates], axis=1)
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best_scores = np.take_along_axis(scores, top, axis=1)
        best_rows = np.take_along_axis(rows, top, axis=1)
    return best_rows


def _blocks(array: VectorArray, rows: int = 16_384) -> Any:
    for low in range(0, len(array), rows):
        yield low, np.ascontiguousarray(array.vectors[low : low + rows], dtype=np.float32)


def _fill(array: VectorArray, settings: IndexSettings) -> Any:
    dim = array.identity.dim
    num_lists = settings.num_lists(len(array))
    if not num_lists:
        store: Any = faiss.IndexFlatIP(dim)
    else:
        centres = faiss.IndexFlatIP(dim)
        product = faiss.METRIC_INNER_PRODUCT
        if settings.coded(len(array)):
            # Four numbers in four bits: 96 bytes a vector at 768 numbers.
            lists: Any = faiss.IndexIVFPQFastScan(centres, dim, num_lists, dim // 4, 4, product)
            lists.pq.cp.seed = settings.seed + 2
            exact = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, product)
            store = faiss.IndexRefine(lists, exact)
        else:
            store = lists = faiss.IndexIVFFlat(centres, dim, num_lists, product)
        lists.cp.seed = settings.seed + 1
        lists.cp.spherical = True  # centroids of unit norm, as the vectors: inner product ranks them rightly
        num_training = min(len(array), num_lists * settings.training_per_list)
        sample = np.random.default_rng(settings.seed).choice(len(array), num_training, replace=False)
        # Hundreds of k-means of 16 centroids: two threads on two busy cores wait for each other at every step, and took
        # 76 s where one takes 4.
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if settings.coded(len(array)) else threads)
        try:
            store.train(np.ascontiguousarray(array.vectors[np.sort(sample)], dtype=np.float32))
        finally:
            faiss.omp_set_num_threads(threads)
    for _, block in _blocks(array):
        store.add(block)
    return store


def _settings_record(settings: IndexSettings, num_vectors: int) -> dict[str, Any]:
    num_lists = settings.num_lists(num_vectors)
    record = {
        "type": "IVF_FLAT" if num_lists else "FLAT",
        "metric": "inner product",
        "nlist": num_lists,
        "probes": settings.probes,
        "training_per_list": settings.training_per_list,
        "seed": settings.seed,
    }
    if settings.coded(num_vectors):
        record |= {
            "type": "IVF_PQ4_REFINED",
            "probes": settings.coded_probes,
            "candidates": settings.candidates,
        }
    return record


def _version_name(array: VectorArray, record: dict[str, Any]) -> str:
    return fingerprint({"vectors": array.fingerprint, "settings": record})


def _drop_old_versions(directory: Location) -> None:
    versions = directory / "versions"
    sweep_temporaries(directory)
    current = (directory / "CURRENT").read_text().strip()
    made = [p for p in versions.iterdir() if p.is_dir() and not p.name.startswith(".")]
    # CURRENT first, then the newest: a version taken up again after an older one still comes first.
    made.sort(key=lambda p: (p.name == current, _made_at(p)), reverse=True)
    for old in made[KEPT_VERSIONS:]:
        remove_tree(old)
    for left in versions.glob(".*.tmp"):
        remove_tree(left)


def _made_at(version: Location) -> int:
    """When a version was published, nanoseconds; 0 for what an upload that broke off left."""
    try:
        # Its manifest came last; on object storage a folder has no time of its own.
        return (version / "manifest.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0
