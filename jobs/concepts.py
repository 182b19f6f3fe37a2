"""The concept store in Postgres: load vector shards, export shards and an index, search, count, clear.

    python -m jobs.concepts load --input out/vectors --dataset wiki
    ray job submit --working-dir . -- python -m jobs.concepts export --dataset wiki --output /shared/vectors

Without --database-url the data is in a local Postgres (`lvm/vectors/postgres.py`); the workers of a cluster need a
server that every node can reach. Shards are copied in parallel, one connection each, and become visible in one
transaction. A killed load, run again, resumes. An export reads ranges of articles in parallel, all from one snapshot,
and writes shards like those of `latent encode`, with the TMD codes of the store.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import typer

from jobs._ray import (
    Address,
    CodecName,
    CodecPath,
    DatabaseUrl,
    PathOrUrl,
    accepted,
    address_of_cluster,
    connect,
    echo,
    finish,
    guarded,
    in_tasks,
    load_codec_at,
    nodes_with,
    path_option,
    ray_data,
    run,
    run_stage,
    timing,
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
from lvm.vectors.shards import Manifest, Shard, with_footer, write_table

MAX_WORKERS = 8
"""Default maximum of connections; a server's default limit is 100, for all its clients."""

DatasetName = Annotated[str, typer.Option(help="Name of the dataset in the store.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Connections; default: one per CPU, at most 8.")]
RowsPerShard = Annotated[int, typer.Option(min=1, help="Target number of rows per shard.")]


def store_at(url: str | None) -> ConceptStore:
    """The store at this URL, or the local one; prints what its server lacks."""
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
    """Results of `task` on each item, run by Ray Data, as they finish. items: each with `rows`, for the progress."""
    connect(address)
    cpus = int(sum(n.get("CPU", 0) for n in nodes_with()))
    at_once = min(workers or min(max(1, cpus), MAX_WORKERS), len(items))
    dataset = ray_data().from_items(list(items), override_num_blocks=len(items))
    done = dataset.map(task, num_cpus=min(1.0, cpus / at_once), concurrency=at_once)
    with closing(accepted(done.iter_rows(), what, len(items), sum(i["rows"] for i in items), "rows")) as rows:
        yield from rows


# ------------------------------------------------------------------------------------------------------ load


@dataclass(frozen=True)
class CopyShard:
    """Ray Data task: copies one shard into the staging table."""

    url: str
    """Of the server."""
    source: Location
    """Folder of the shards."""
    load: Load
    """The load it belongs to."""

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
    """Make `dataset` hold the shards of a finished encode job; returns it, and how many rows this run copied.

    Raises as `loading`, `copy_shard` and `merge` do; copied shards are kept in each case.
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
            echo(f"load: {len(there)} of {len(manifest.shards)} shards are already copied")
        copied = 0
        if pending:
            task = CopyShard(store.url, source.resolve(), load)
            copied = sum(row["rows"] for row in in_parallel(task, pending, workers, address, "load"))
        return merge(store, load, manifest, replace), copied


def load(
    input: Annotated[PathOrUrl, path_option("Folder of `latent encode` or `latent concepts export`.")],
    dataset: DatasetName,
    database_url: DatabaseUrl = None,
    index: Annotated[
        Literal["hnsw", "ivfflat", "none"], typer.Option(help="Vector index to build after the load.")
    ] = "hnsw",
    replace: Annotated[
        bool, typer.Option(help="Delete rows that are not in these shards; default: keep other articles.")
    ] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Load vector shards into a dataset; a second run changes nothing."""
    started = time.perf_counter()
    with store_at(database_url) as store:
        found, copied = load_shards(store, input, dataset, replace, workers, address)
        loaded = timing(started, copied)
        no_index = ensure_index(store, found, index)
        rows = Manifest.load(input).rows
        what = f"{copied:,} rows copied" if copied else "up to date"
        echo(
            f"load: dataset {dataset!r} in {server_name(store.url)}: {rows:,} rows of {found.identity}, {what}"
        )
        echo(f"load: no index ({no_index})" if no_index else f"load: index {store.index_kind(found)}")
        finish(
            "concepts load",
            rows=rows,
            copied=copied,
            **loaded,
            index_seconds=round(time.perf_counter() - started - loaded["seconds"], 3),
            paths=[server_name(store.url)],
            dataset=dataset,
            up_to_date=not copied,
            storage=found.storage,
            index=store.index_kind(found),
            codec=found.identity.to_dict(),
        )


# ---------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class ExportRange:
    """Ray Data task: reads a range of articles and writes it as a shard."""

    url: str
    """Of the server."""
    target: Location
    """Folder of the shards."""
    dataset: Dataset
    snapshot: str
    """Snapshot of the database that all ranges are read from."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            with ConceptStore(self.url) as store:
                table = read_articles(store, self.dataset, item["first"], item["last"], self.snapshot)
            footer = range_footer(self.dataset, item)
            return asdict(write_table(self.target / item["file"], with_footer(table, footer)))

        return guarded(work, **item, bytes=0, sha256="")


def range_footer(dataset: Dataset, item: dict[str, Any]) -> dict[str, Any]:
    """Footer of a range's shard: its rows, and the dataset's version."""
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
    """Make `target` hold the dataset's rows in order of article and position; returns the manifest, and how many shards
    this run wrote. Raises InputError for an unknown or empty dataset."""
    snapshot = begin_snapshot(store)
    found = store.dataset(dataset)
    settings = {
        "codec": found.identity.digest,
        "dtype": "float16" if found.storage == "halfvec" else "float32",
        "dataset": dataset,
        "rows_per_shard": rows_per_shard,
    }
    inputs = {"version": found.version}
    vectors = Artefact(target, "vectors", settings, lambda line: echo(f"export: {line}"))
    vectors.claim(overwrite)
    done = vectors.current(inputs, deep=True)
    if done is not None:
        write_array(target, done, each=partial(in_tasks, address))
        return done, 0
    vectors.begin()
    items = [
        {"file": f"part-{number:05d}.parquet", "first": first, "last": last, "rows": rows}
        for number, (first, last, rows) in enumerate(article_ranges(store, found, rows_per_shard))
    ]
    if not items:
        raise InputError(f"dataset {dataset!r} has no rows; load or ingest something first")
    kept = ((i, vectors.finished(i["file"], range_footer(found, i))) for i in items)
    shards = {i["file"]: shard for i, shard in kept if shard is not None and shard.rows == i["rows"]}
    if pending := [i for i in items if i["file"] not in shards]:
        task = ExportRange(store.url, target.resolve(), found, snapshot)
        for row in in_parallel(task, pending, workers, address, "export"):
            shards[row["file"]] = Shard(row["file"], row["rows"], row["bytes"], row["sha256"])
    store.connection.execute("ROLLBACK")  # ends the snapshot
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
    write_array(target, manifest, each=partial(in_tasks, address))
    vectors.publish(manifest)
    return manifest, len(pending)


def export(
    dataset: DatasetName,
    output: Annotated[PathOrUrl, path_option("Folder for the vector shards.")],
    database_url: DatabaseUrl = None,
    rows_per_shard: RowsPerShard = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace shards made with other settings.")] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Write a dataset as vector shards, for `latent index`, `train` and `evaluate`."""
    started = time.perf_counter()
    with store_at(database_url) as store:
        manifest, made = export_dataset(store, dataset, output, rows_per_shard, overwrite, workers, address)
    echo(f"export: {manifest.rows:,} rows in {len(manifest.shards)} shards in {output}, {made} of them new")
    finish(
        "concepts export",
        rows=manifest.rows,
        **timing(started, manifest.rows),
        paths=[str(output)],
        up_to_date=not made,
        redone=made,
        shards=len(manifest.shards),
        codec=manifest.codec,
    )


def publish(
    dataset: DatasetName,
    run: Annotated[PathOrUrl, path_option("Folder of the run whose vectors/ and index/ to update.")],
    database_url: DatabaseUrl = None,
    rows_per_shard: RowsPerShard = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace vectors made with other settings.")] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Export a dataset to a run and publish its search index; readers that have the old files open keep them."""
    import ray

    started = time.perf_counter()
    vectors, index = run.resolve() / "vectors", run.resolve() / "index"
    with store_at(database_url) as store:
        manifest, made = export_dataset(store, dataset, vectors, rows_per_shard, overwrite, workers, address)
    echo(f"publish: {manifest.rows:,} rows in {len(manifest.shards)} shards in {vectors}, {made} of them new")
    joined = address_of_cluster() if ray.is_initialized() else address
    options = [] if joined is None else ["--address", joined]
    indexed = run_stage("index", ["--vectors", str(vectors), "--output", str(index), *options]).summary
    finish(
        "concepts publish",
        rows=manifest.rows,
        **timing(started, manifest.rows),
        paths=[str(vectors), str(index)],
        up_to_date=not made and indexed["up_to_date"],
        redone=made,
        version=indexed["version"],
        codec=manifest.codec,
    )


# ------------------------------------------------------------------------------------ search, stats and clear


def search(
    dataset: DatasetName,
    text: Annotated[str | None, typer.Argument(help="Text to search for.")] = None,
    vector: Annotated[
        PathOrUrl | None, path_option("JSON file of numbers to search with instead of a text.")
    ] = None,
    database_url: DatabaseUrl = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of rows.")] = 10,
    source: Annotated[str | None, typer.Option(help="Only rows of this source.")] = None,
    contains: Annotated[str | None, typer.Option(help="Only texts that contain this string.")] = None,
    code: Annotated[int | None, typer.Option(help="Only rows with this TMD code.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only rows of this domain, by name.")] = None,
    task: Annotated[str | None, typer.Option(help="Only rows of this task.")] = None,
    modifier: Annotated[str | None, typer.Option(help="Only rows with this modifier.")] = None,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
) -> None:
    """List the rows that pass all filters, nearest to a text or vector first."""
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
        "concepts search",
        rows=len(hits),
        seconds=round(time.perf_counter() - started, 3),
        dataset=dataset,
        hits=[asdict(h) for h in hits],
    )


def read_query(path: Location) -> Any:
    """(D,) float32 vector from a JSON file. Raises InputError unless it holds a list of numbers."""
    try:
        values = json.loads(path.read_text())
        return np.asarray(values, np.float32).reshape(len(values))
    except (OSError, ValueError, TypeError) as err:
        raise InputError(
            f"--vector {path} is not a list of numbers in JSON ({err}); expected [0.1, -0.2, …]"
        ) from err


def stats(
    dataset: Annotated[str | None, typer.Option(help="Only this dataset; default: all.")] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Show rows, articles, codec, size, index and TMD codes of each dataset."""
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
                echo("  a load is running or was killed; the same `latent concepts load` resumes it")
            if codes:
                echo(tmd.distribution_table(codes))
            records.append(record | {"tmd": tmd.distribution(codes)})
        if not records:
            echo(f"no dataset in {server_name(store.url)}")
    finish("concepts stats", rows=sum(r["rows"] for r in records), datasets=records)


def clear(
    dataset: DatasetName,
    database_url: DatabaseUrl = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a dataset with its rows, index and unfinished loads."""
    with store_at(database_url) as store:
        found = store.dataset(dataset)
        rows = store.stats(found)["rows"]
        if not yes:
            echo(f"delete dataset {dataset!r} with {rows:,} rows from {server_name(store.url)}? [y/N]")
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise OutputError(f"dataset {dataset!r} is kept; pass --yes to delete it unasked")
        rows = store.clear(dataset)
    echo(f"clear: deleted dataset {dataset!r} and its {rows:,} rows")
    finish("concepts clear", rows=rows, dataset=dataset)


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (load, export, publish, search, stats, clear)
}

if __name__ == "__main__":
    from jobs.concepts import COMMANDS as commands  # by name: workers cannot unpickle classes of __main__

    run(commands)
