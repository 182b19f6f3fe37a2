"""The concept store in Postgres: load vector shards into it, export shards and an index from it, search, count, clear.

    python -m jobs.concepts load --input out/vectors --dataset wiki
    ray job submit --working-dir . -- python -m jobs.concepts export --dataset wiki --output /shared/vectors

Without --database-url a Postgres of this machine keeps the data (`lvm/vectors/postgres.py`); the workers of a cluster
need a server that every node reaches. Shards are copied in side by side, a connection each, and become visible all at
once; killed at any moment, the same command goes on. An export reads ranges of articles side by side, all from one
snapshot, and writes the shards that `latent encode` writes, with the store's codes beside them.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import typer

from jobs._ray import (
    Address,
    DatabaseUrl,
    PathOrUrl,
    accepted,
    address_of_cluster,
    connect,
    echo,
    finish,
    guarded,
    load_codec_at,
    nodes_with,
    path_option,
    ray_data,
    run,
    run_stage,
    versions,
)
from lvm.codec.identity import require_same_codec
from lvm.corpus import tmd
from lvm.errors import InputError, OutputError
from lvm.storage import Location
from lvm.vectors.array import write_array
from lvm.vectors.artefact import Artefact
from lvm.vectors.concept_export import article_ranges, begin_snapshot, read_articles
from lvm.vectors.concept_load import Load, copy_shard, loading, merge, staged
from lvm.vectors.concept_search import Filters, ensure_index
from lvm.vectors.concept_search import search as search_store
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.postgres import embedded, server_name
from lvm.vectors.shards import (
    Manifest,
    Shard,
    with_footer,
    write_table,
)

MAX_WORKERS = 8
"""Connections at once unless --workers says more; a server takes 100 as it comes, and others want some."""

DatasetName = Annotated[str, typer.Option(help="Name of the dataset in the store.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Connections at once; none: one a CPU, at most 8.")]


def store_at(url: str | None) -> ConceptStore:
    """The store at this URL, or of this machine; what its server lacks is said once."""
    store = ConceptStore(url or embedded())
    if store.missing:
        echo(f"concepts: vectors are stored as real[] and searched by a scan: {store.missing}")
    return store


def in_parallel(
    task: Callable[[dict[str, Any]], dict[str, Any]],
    items: Sequence[dict[str, Any]],
    workers: int | None,
    address: str | None,
    what: str,
) -> Iterator[dict[str, Any]]:
    """`task` of each item as Ray Data tasks, as they end. items: each with the `rows` it counts for."""
    connect(address)
    cpus = int(sum(n.get("CPU", 0) for n in nodes_with()))
    side_by_side = min(workers or min(max(1, cpus), MAX_WORKERS), len(items))
    done = (
        ray_data()
        .from_items(list(items), override_num_blocks=len(items))
        .map(task, num_cpus=min(1.0, cpus / side_by_side), concurrency=side_by_side)
    )
    with closing(accepted(done.iter_rows(), what, len(items), sum(i["rows"] for i in items), "rows")) as rows:
        yield from rows


# ------------------------------------------------------------------------------------------------------ load


@dataclass(frozen=True)
class CopyShard:
    """Copies one shard into the staging table; pickled on its way to the workers."""

    url: str
    """Of the server."""
    source: Location
    """Folder of the shards."""
    load: Load
    """Where they go."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            with ConceptStore(self.url) as store:
                return {"rows": copy_shard(store, self.load, self.source, Shard(**item))}

        return guarded(work, **item)


def load_shards(
    store: ConceptStore,
    source: Location,
    dataset: str,
    replace: bool = False,
    workers: int | None = None,
    address: str | None = None,
) -> tuple[Dataset, int]:
    """The dataset, brought to hold the shards of a finished encode job, and how many rows were copied for it now.

    Raises as `ConceptStore.loading`, `copy` and `merge` do; what is copied stays in each case.
    """
    manifest = Manifest.load(source, "vectors")
    manifest.verify(source)
    found = store.find(dataset)
    if found is not None and found.loaded == manifest.fingerprint and not replace:
        return found, 0
    with loading(store, dataset, manifest) as load:
        there = staged(store, load)
        pending = [asdict(s) for s in manifest.shards if s.file not in there]
        if there:
            echo(f"load: {len(there)} of {len(manifest.shards)} shards are copied already")
        copied = 0
        if pending:
            task = CopyShard(store.url, source.resolve(), load)
            copied = sum(row["rows"] for row in in_parallel(task, pending, workers, address, "load"))
        return merge(store, load, manifest, replace), copied


def load(
    input: Annotated[
        PathOrUrl, path_option("Folder that `latent encode` wrote, or `latent concepts export`.")
    ],
    dataset: DatasetName,
    database_url: DatabaseUrl = None,
    index: Annotated[
        Literal["hnsw", "ivfflat", "none"], typer.Option(help="Index made after the load, for vector search.")
    ] = "hnsw",
    replace: Annotated[
        bool, typer.Option(help="Rows that are not in these shards go; else those of other articles stay.")
    ] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Load vector shards into a dataset; a second run of the same changes nothing."""
    started = time.perf_counter()
    with store_at(database_url) as store:
        found, copied = load_shards(store, input, dataset, replace, workers, address)
        seconds = time.perf_counter() - started
        no_index = ensure_index(store, found, index)
        rows = Manifest.load(input).rows
        what = f"{copied:,} rows copied" if copied else "up to date"
        echo(
            f"load: dataset {dataset!r} in {server_name(store.url)}: {rows:,} rows of {found.identity}, {what}"
        )
        echo(f"load: no index ({no_index})" if no_index else f"load: index {store.index_kind(found)}")
        finish(
            {
                "stage": "concepts load",
                "rows": rows,
                "copied": copied,
                "seconds": round(seconds, 3),
                "rows_per_second": round(copied / max(seconds, 1e-9), 1),
                "index_seconds": round(time.perf_counter() - started - seconds, 3),
                "paths": [server_name(store.url)],
                "dataset": dataset,
                "up_to_date": not copied,
                "storage": found.storage,
                "index": store.index_kind(found),
                "codec": found.identity.to_dict(),
            }
        )


# ---------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class ExportRange:
    """Reads one range of articles and writes it as a shard; pickled on its way to the workers."""

    url: str
    """Of the server."""
    target: Location
    """Folder of the shards."""
    dataset: Dataset
    """What is read."""
    snapshot: str
    """State of the database that all ranges are read from."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            with ConceptStore(self.url) as store:
                table = read_articles(store, self.dataset, item["first"], item["last"], self.snapshot)
            footer = range_footer(self.dataset, item)
            return asdict(write_table(self.target / item["file"], with_footer(table, footer)))

        return guarded(work, **item, bytes=0, sha256="")


def range_footer(dataset: Dataset, item: dict[str, Any]) -> dict[str, Any]:
    """What the footer of a range's shard says: which rows, of which state of the dataset."""
    return {
        "codec": dataset.identity.to_dict(),
        "dataset": dataset.name,
        "version": dataset.version,
        "articles": [item["first"], item["last"]],
    }


def export_dataset(
    store: ConceptStore,
    dataset: str,
    target: Location,
    rows_per_shard: int = 2048,
    overwrite: bool = False,
    workers: int | None = None,
    address: str | None = None,
) -> tuple[Manifest, int]:
    """The manifest of `target`, brought to hold the dataset's rows in order of article and position, and how many
    shards were written for it now. Raises InputError where there is no such dataset or it has no rows."""
    snapshot = begin_snapshot(store)
    found = store.dataset(dataset)
    dtype = "float16" if found.storage == "halfvec" else "float32"
    settings = {
        "codec": found.identity.digest,
        "dtype": dtype,
        "dataset": dataset,
        "rows_per_shard": rows_per_shard,
    }
    inputs = {"version": found.version}
    vectors = Artefact(target, "vectors", settings, lambda line: echo(f"export: {line}"))
    vectors.claim(overwrite)
    done = vectors.current(inputs, deep=True)
    if done is not None:
        write_array(target, done)
        return done, 0
    vectors.begin()
    items = [
        {"file": f"part-{number:05d}.parquet", "first": first, "last": last, "rows": rows}
        for number, (first, last, rows) in enumerate(article_ranges(store, found, rows_per_shard))
    ]
    if not items:
        raise InputError(f"dataset {dataset!r} has no rows; load or ingest something first")
    shards = {
        i["file"]: shard
        for i in items
        if (shard := vectors.finished(i["file"], range_footer(found, i))) is not None
        and shard.rows == i["rows"]
    }
    if pending := [i for i in items if i["file"] not in shards]:
        task = ExportRange(store.url, target.resolve(), found, snapshot)
        for row in in_parallel(task, pending, workers, address, "export"):
            shards[row["file"]] = Shard(row["file"], row["rows"], row["bytes"], row["sha256"])
    store.connection.execute("ROLLBACK")  # lets the snapshot go
    manifest = Manifest(
        kind="vectors",
        settings=settings,
        inputs=inputs,
        shards=tuple(shards[i["file"]] for i in items),
        rows=sum(i["rows"] for i in items),
        codec=found.identity.to_dict(),
        source=found.source,
        licence=found.licence,
        versions=versions(),
    )
    write_array(target, manifest)
    vectors.publish(manifest)
    return manifest, len(pending)


def export(
    dataset: DatasetName,
    output: Annotated[PathOrUrl, path_option("Folder for the vector shards.")],
    database_url: DatabaseUrl = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows a shard is aimed to have.")] = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace shards made with other settings.")] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Write a dataset as vector shards, for `latent index`, `train` and `evaluate`."""
    started = time.perf_counter()
    with store_at(database_url) as store:
        manifest, made = export_dataset(store, dataset, output, rows_per_shard, overwrite, workers, address)
    seconds = time.perf_counter() - started
    echo(f"export: {manifest.rows:,} rows in {len(manifest.shards)} shards in {output}, {made} of them new")
    finish(
        {
            "stage": "concepts export",
            "rows": manifest.rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(manifest.rows / max(seconds, 1e-9), 1),
            "paths": [str(output)],
            "up_to_date": not made,
            "redone": made,
            "shards": len(manifest.shards),
            "codec": manifest.codec,
        }
    )


def publish(
    dataset: DatasetName,
    run: Annotated[
        PathOrUrl, path_option("Folder of the run: vectors/ and index/ in it are brought up to date.")
    ],
    database_url: DatabaseUrl = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows a shard is aimed to have.")] = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace vectors made with other settings.")] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Export a dataset to a run and publish the search index over it; who has the old ones open keeps them."""
    import ray

    started = time.perf_counter()
    vectors, index = run.resolve() / "vectors", run.resolve() / "index"
    with store_at(database_url) as store:
        manifest, made = export_dataset(store, dataset, vectors, rows_per_shard, overwrite, workers, address)
    echo(f"publish: {manifest.rows:,} rows in {len(manifest.shards)} shards in {vectors}, {made} of them new")
    joined = address_of_cluster() if ray.is_initialized() else address
    options = [] if joined is None else ["--address", joined]
    indexed = run_stage("index", ["--vectors", str(vectors), "--output", str(index), *options]).summary
    seconds = time.perf_counter() - started
    finish(
        {
            "stage": "concepts publish",
            "rows": manifest.rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(manifest.rows / max(seconds, 1e-9), 1),
            "paths": [str(vectors), str(index)],
            "up_to_date": not made and indexed["up_to_date"],
            "redone": made,
            "version": indexed["version"],
            "codec": manifest.codec,
        }
    )


# ------------------------------------------------------------------------------------ search, stats and clear


def search(
    dataset: DatasetName,
    text: Annotated[str | None, typer.Argument(help="What the found texts are to be like.")] = None,
    vector: Annotated[
        PathOrUrl | None, path_option("The same as a vector: a file with a list of numbers in JSON.")
    ] = None,
    database_url: DatabaseUrl = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most rows to show.")] = 10,
    source: Annotated[str | None, typer.Option(help="Only of this source.")] = None,
    contains: Annotated[str | None, typer.Option(help="Only texts that hold these characters.")] = None,
    code: Annotated[int | None, typer.Option(help="Only with this TMD code.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only of this domain, by name.")] = None,
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    modifier: Annotated[str | None, typer.Option(help="Only with this modifier.")] = None,
    codec: Annotated[str, typer.Option(help="Codec that encodes the text.")] = "mini",
    codec_path: Annotated[PathOrUrl | None, path_option("Folder with that codec's weights.")] = None,
) -> None:
    """Find rows near a text or vector, that pass every filter; without either, the first that pass."""
    started = time.perf_counter()
    if text is not None and vector is not None:
        raise InputError("got a text and --vector; expected one of them")
    if code is not None:
        tmd.unpack(code)
    filters = Filters(source, contains, code, tmd.Wanted.of(domain, task, modifier))
    with store_at(database_url) as store:
        found = store.dataset(dataset)
        query = None if vector is None else read_query(vector)
        if text is not None:
            loaded = load_codec_at(codec, codec_path)
            require_same_codec(found.identity, loaded.identity, f"dataset {dataset!r}", f"--codec {codec}")
            query = loaded.encode(text)
        hits = search_store(store, found, query, limit, filters)
    for hit in hits:
        score = "" if hit.score is None else f"{hit.score:+.3f}  "
        names = "" if hit.tmd_code is None else f"  [{', '.join(tmd.unpack(hit.tmd_code).names)}]"
        echo(f"{score}{hit.title} {hit.position}: {hit.text}{names}")
    finish(
        {
            "stage": "concepts search",
            "rows": len(hits),
            "seconds": round(time.perf_counter() - started, 3),
            "dataset": dataset,
            "hits": [asdict(h) for h in hits],
        }
    )


def read_query(path: Location) -> Any:
    """(D,) float32 of a file with a list of numbers. Raises InputError."""
    try:
        values = json.loads(path.read_text())
        return np.asarray(values, np.float32).reshape(len(values))
    except (OSError, ValueError, TypeError) as err:
        raise InputError(
            f"--vector {path} is no list of numbers in JSON ({err}); expected [0.1, -0.2, …]"
        ) from err


def stats(
    dataset: Annotated[str | None, typer.Option(help="Only this one; none: all.")] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Count datasets: rows, articles, codec, size, index, and how their TMD codes are distributed."""
    with store_at(database_url) as store:
        found = store.datasets() if dataset is None else [store.dataset(dataset)]
        records = []
        for one in found:
            record = store.stats(one)
            codes = store.codes(one)
            echo(
                f"{one.name}: {record['rows']:,} rows of {record['articles']:,} articles, {one.identity}, "
                f"{record['storage']}({record['dim']}), {record['bytes'] / 1e6:,.1f} MB, index {record['index']}"
            )
            if record["unfinished_loads"]:
                echo("  a load is under way or was killed; the same `latent concepts load` ends it")
            if codes:
                echo(tmd.distribution_table(codes))
            records.append(record | {"tmd": tmd.distribution(codes)})
        if not records:
            echo(f"no dataset in {server_name(store.url)}")
    finish({"stage": "concepts stats", "rows": sum(r["rows"] for r in records), "datasets": records})


def clear(
    dataset: DatasetName,
    database_url: DatabaseUrl = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove one dataset with its rows, index and unfinished loads."""
    with store_at(database_url) as store:
        found = store.dataset(dataset)
        rows = store.stats(found)["rows"]
        question = f"remove dataset {dataset!r} with {rows:,} rows from {server_name(store.url)}?"
        if not yes:
            echo(f"{question} [y/N]")
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise OutputError(f"dataset {dataset!r} stays; pass --yes to remove it without being asked")
        rows = store.clear(dataset)
    echo(f"clear: dataset {dataset!r} and its {rows:,} rows are gone")
    finish({"stage": "concepts clear", "rows": rows, "dataset": dataset})


COMMANDS = {
    "load": load,
    "export": export,
    "publish": publish,
    "search": search,
    "stats": stats,
    "clear": clear,
}

if __name__ == "__main__":
    from jobs.concepts import (
        COMMANDS as commands,  # by name, so that what travels to workers is not of __main__
    )

    run(commands)
