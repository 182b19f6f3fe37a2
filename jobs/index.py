"""Index vectors for search: reads the shards of `latent encode`, publishes a FAISS index with its recall.

    python -m jobs.index --vectors out/vectors --output out/index
    ray job submit --working-dir . -- python -m jobs.index --vectors /shared/vectors --output /shared/index

Each part of the index (at most --part-vectors) is built in a Ray task on a node with free CPUs, and in another compared
with the queries that measure recall; then the index is published. The previous version stays on disk. If the
published index was made from these vectors, the job changes nothing.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any

import typer

from jobs._ray import (
    Address,
    PathOrUrl,
    connect,
    echo,
    finish,
    get,
    in_tasks,
    nodes_with,
    path_option,
    run,
    timing,
)
from lvm.errors import OutputError, StorageError
from lvm.storage import Location
from lvm.vectors.array import Part, open_vectors, write_array
from lvm.vectors.artefact import require_folder
from lvm.vectors.index import IndexSettings, build_index, find_index
from lvm.vectors.shards import Manifest


def with_threads(part: Part, number: int, threads: int) -> Any:
    """Build or search a part of the index with this many threads."""
    import faiss

    faiss.omp_set_num_threads(threads)
    return part(number)


def build(source: Location, target: Location, settings: IndexSettings, threads: int) -> None:
    """Build and publish the index; several parts are built and searched in Ray tasks."""
    import faiss

    def each(part: Part, numbers: range) -> Iterator[Any]:
        return in_tasks(None, partial(with_threads, part, threads=threads), numbers, threads)

    faiss.omp_set_num_threads(threads)
    build_index(open_vectors(source), target, settings, each)


def build_with_ray(source: Location, target: Location, settings: IndexSettings, address: str | None) -> None:
    """Run `build` in one task on the cluster."""
    import ray

    connect(address)
    # All CPUs of the smallest node: k-means and adding vectors are multi-threaded. While this task waits, its parts'
    # tasks can use its CPUs.
    threads = min(int(n["CPU"]) for n in nodes_with() if n.get("CPU", 0) >= 1)
    task = ray.remote(num_cpus=threads)(build)
    get(task.remote(source.resolve(), target.resolve(), settings, threads))


def main(
    vectors: Annotated[PathOrUrl, path_option("Folder that `latent encode` wrote.", "--vectors", "--input")],
    output: Annotated[PathOrUrl, path_option("Folder for the index and its versions.")],
    probes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Lists to probe per search, doubled in parts of 1,024 lists; default: 16, or 64 with codes.",
        ),
    ] = None,
    codes: Annotated[
        bool | None,
        typer.Option(
            "--codes/--no-codes",
            help="4-bit codes with exact re-ranking of the best, or whole vectors (IVF_FLAT: larger, and slower at the "
            "same number of probes); default: codes from 100,000 vectors.",
        ),
    ] = None,
    part_vectors: Annotated[
        int,
        typer.Option(min=1, help="Most vectors in a part; building one takes 1.7 KB of memory per vector."),
    ] = IndexSettings.part_vectors,
    address: Address = None,
) -> None:
    """Build and publish the search index; a second run on the same vectors changes nothing."""
    started = time.perf_counter()
    require_folder(output)
    if (output / "manifest.json").exists():
        kind = Manifest.load(output).kind
        raise OutputError(
            f"{output} holds {kind}, expected an index or an empty folder; choose another --output"
        )
    settings = IndexSettings(part_vectors=part_vectors)
    if probes is not None:
        settings = replace(settings, probes=probes, coded_probes=probes)
    if codes is not None:
        settings = replace(settings, coded_from=0 if codes else sys.maxsize)
    with suppress(OutputError, StorageError):  # the input may be read-only
        if write_array(vectors, Manifest.load(vectors, "vectors"), each=partial(in_tasks, address)):
            echo(f"index: wrote the missing memory-mapped array of {vectors} from its shards")
    array = open_vectors(vectors)
    index = find_index(array, output, settings)
    up_to_date = index is not None
    if index is None:
        echo(f"index: indexing {len(array):,} vectors of {array.identity}")
        build_with_ray(vectors, output, settings, address)
        index = find_index(array, output, settings)
        if index is None:
            raise OutputError(f"{output} holds no index of {vectors} after building; is it on a shared disk?")
    record: dict[str, Any] = index.manifest.settings
    recall = index.manifest.report
    kind = (
        f"{record['type']}, {record['nlist']} lists, {record['probes']} probed" if record["nlist"] else "FLAT"
    )
    echo(
        f"index: {'up to date' if up_to_date else 'published'} {index.directory.name}: {len(index):,} "
        f"vectors, {kind}; recall@{recall['recall_k']} {recall['recall_stored']:.3f} for stored vectors, "
        f"{recall['recall_blended']:.3f} between them"
    )
    finish(
        "index",
        rows=len(index),
        **timing(started, len(index)),
        paths=[str(output)],
        up_to_date=up_to_date,
        redone=0 if up_to_date else 1,
        version=index.directory.name,
        settings=asdict(settings) | record,
        recall=recall,
        codec=index.identity.to_dict(),
    )


if __name__ == "__main__":
    run(main)
