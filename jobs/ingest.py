"""Ingest articles into the concept store: chunk, encode, split into episodes, add TMD codes, store each exactly once.

    python -m jobs.ingest --input articles.jsonl.gz --dataset notes --run out/notes
    ray job submit --working-dir . -- python -m jobs.ingest --input /shared/dump.xml.bz2 --dataset wiki --tmd none

Each article is one transaction: a job that is killed and run again stores only what is missing. An article that is
already stored with the same content is skipped; a changed one replaces the old. A broken record is counted with its
reason, and the job goes on. The driver reads; workers, one per CPU, hold a codec and a connection. The metrics file has
the seconds of each stage, summed over workers, and the seconds per article. With --run the dataset is then published as
the run's vectors and search index, as by `latent concepts publish`.
"""

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs._ray import (
    PROGRESS_LINE_S,
    Address,
    CodecName,
    CodecPath,
    DatabaseUrl,
    PathOrUrl,
    address_of_cluster,
    connect,
    echo,
    finish,
    get,
    load_codec_at,
    nodes_with,
    path_option,
    run,
    run_stage,
    timing,
    versions,
)
from lvm.codec.identity import require_same_codec
from lvm.corpus import tmd
from lvm.corpus.readers import read_articles
from lvm.corpus.records import BROKEN_SHOWN, Article, ReadReport
from lvm.corpus.tmd_chat import ChatCoder, ChatSettings
from lvm.errors import InputError, LvmError
from lvm.storage import Location, cache_folder, location
from lvm.vectors.concept_search import ensure_index
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.ingest import STAGES, Coder, Ingester
from lvm.vectors.postgres import embedded, server_name
from lvm.vectors.shards import write_json

BATCH_ARTICLES = 16
"""Articles per batch: some 500 chunks of Wikipedia, enough to encode at full speed."""

BATCHES_PER_WORKER = 2
"""Batches in flight per worker: one being ingested, one queued."""

BROKEN_PRINTED = 5
"""Maximum number of broken records that are printed."""


@dataclass(frozen=True)
class IngestJob:
    """Everything a worker needs; must be picklable."""

    url: str
    """Of the database server."""
    dataset: Dataset
    codec: str
    codec_path: Location | None
    language: str
    """Of the text, ISO 639-1."""
    tmd: Literal["prototype", "llm", "none"]
    """Source of TMD codes."""
    chat: ChatSettings | None
    """The endpoint, for "llm"."""
    answers: Path
    """Cache of its answers."""


class IngestWorker:
    """Ray actor: holds a codec and a connection, and ingests batches."""

    def __init__(self, job: IngestJob) -> None:
        self._job = job
        self._ingester: Ingester | None = None
        self._chat: ChatCoder | None = None

    def _ready(self) -> Ingester:
        if self._ingester is None:
            job = self._job
            codec = load_codec_at(job.codec, job.codec_path)
            require_same_codec(
                job.dataset.identity, codec.identity, f"dataset {job.dataset.name!r}", "the worker"
            )
            coder: Coder | None = None
            if job.chat is not None:
                self._chat = chat = ChatCoder(job.chat, job.answers)
                coder = lambda texts, _: chat.code(texts)  # noqa: E731
            elif job.tmd == "prototype":
                prototypes = tmd.Prototypes.of(codec.encode)
                coder = lambda _, vectors: prototypes.nearest(vectors)  # noqa: E731
            name = f"llm {job.chat.model}" if job.chat else "none" if coder is None else tmd.coder_name()
            self._ingester = Ingester(ConceptStore(job.url), job.dataset, codec, coder, name, job.language)
        return self._ingester

    def ingest(self, articles: Sequence[Article]) -> dict[str, Any]:
        """The outcome of each article, the seconds of each stage, and the endpoint's last failure as `note`."""
        ingester = self._ready()
        before = dict(ingester.seconds)
        outcomes = [asdict(o) for o in ingester.ingest(articles)]
        seconds = {stage: ingester.seconds[stage] - before[stage] for stage in STAGES}
        failures = self._chat.failures if self._chat else []
        last, failures[:] = failures[-1:], []
        return {"outcomes": outcomes, "seconds": seconds, "note": "".join(last)}


def in_batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
    """Articles in lists of BATCH_ARTICLES."""
    iterator = iter(articles)
    while batch := list(itertools.islice(iterator, BATCH_ARTICLES)):
        yield batch


def ingest_articles(
    job: IngestJob, articles: Iterable[Article], workers: int | None, address: str | None
) -> Iterator[tuple[list[Article], dict[str, Any]]]:
    """Each batch with its worker's result, as they finish. Reading waits while all workers have enough batches.

    Raises the first LvmError of a worker, after batches in flight are finished.
    """
    import ray

    connect(address)
    cpus = int(sum(n.get("CPU", 0) for n in nodes_with()))
    actor = ray.remote(num_cpus=1)(IngestWorker)
    actors = [actor.remote(job) for _ in range(min(workers or cpus, cpus))]
    free = actors * BATCHES_PER_WORKER
    in_flight: dict[Any, tuple[Any, list[Article]]] = {}
    failure: LvmError | None = None
    batches = in_batches(articles)
    while True:
        while free and failure is None and (batch := next(batches, None)) is not None:
            worker = free.pop(0)
            in_flight[worker.ingest.remote(batch)] = (worker, batch)
        if not in_flight:
            break
        (ref,), _ = ray.wait(list(in_flight), num_returns=1)
        worker, batch = in_flight.pop(ref)
        free.append(worker)
        try:
            result = get(ref)
        except LvmError as err:
            failure = failure or err
            continue
        yield batch, result
    if failure is not None:
        raise failure


def main(
    dataset: Annotated[str, typer.Option(help="Name of the dataset in the store; created if missing.")],
    input: Annotated[
        str, typer.Option(help="Dump, JSON, CSV or Parquet, a folder of these or of .txt files, or sample.")
    ] = "sample",
    database_url: DatabaseUrl = None,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Storage type of a new dataset's vectors.")
    ] = "float16",
    tmd_by: Annotated[
        Literal["prototype", "llm", "none"],
        typer.Option("--tmd", help="Source of TMD codes: the nearest label, a language model, or none."),
    ] = "prototype",
    llm_url: Annotated[
        str, typer.Option(envvar="LATENT_LLM_URL", help="Chat endpoint, http://HOST/v1.")
    ] = "",
    llm_model: Annotated[str, typer.Option(help="Model at that endpoint; key in LATENT_LLM_API_KEY.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N articles.")] = None,
    language: Annotated[str, typer.Option(help="Language (ISO 639-1), for sentence splitting.")] = "en",
    licence: Annotated[str, typer.Option(help="Licence of the text, stored with a new dataset.")] = "",
    index: Annotated[
        Literal["hnsw", "ivfflat", "none"], typer.Option(help="Vector index of a large dataset.")
    ] = "hnsw",
    metrics: Annotated[PathOrUrl, path_option("File for counts and the seconds of each stage.")] = Path(
        "out/ingest-metrics.json"
    ),
    workers: Annotated[int | None, typer.Option(min=1, help="Workers; default: one per CPU.")] = None,
    run: Annotated[PathOrUrl | None, path_option("Publish vectors and index to this run's folder.")] = None,
    address: Address = None,
) -> None:
    """Ingest articles into the concept store, each exactly once."""
    started = time.perf_counter()
    chat = None
    if tmd_by == "llm":
        chat = ChatSettings(llm_url, llm_model, os.environ.get("LATENT_LLM_API_KEY", ""))
    identity = load_codec_at(codec, codec_path).identity
    report = ReadReport()
    counts: Counter[str] = Counter()
    seconds = Counter(dict.fromkeys(STAGES, 0.0))
    refused: list[dict[str, str]] = []
    note = ""
    with ConceptStore(database_url or embedded()) as store:
        if store.missing:
            echo(f"ingest: vectors are stored as real[] and searched by a scan: {store.missing}")
        root = input if input == "sample" else location(input)
        found = store.ensure(dataset, identity, dtype, source=str(input), licence=licence)
        path = None if codec_path is None else codec_path.resolve()
        answers = cache_folder() / "tmd-answers.db"
        job = IngestJob(store.url, found, codec, path, language, tmd_by, chat, answers)
        ready = printed = time.perf_counter()
        for batch, result in ingest_articles(job, read_articles(root, limit, report), workers, address):
            note = result["note"] or note
            seconds.update(result["seconds"])
            for article, outcome in zip(batch, result["outcomes"], strict=True):
                counts[outcome["status"]] += 1
                for name in ("chunks", "episodes", "coded"):
                    counts[name] += outcome[name]
                if outcome["status"] == "refused" and len(refused) < BROKEN_SHOWN:
                    refused.append({"article": article.article_id, "reason": outcome["reason"]})
            if time.perf_counter() - printed > PROGRESS_LINE_S:
                printed = time.perf_counter()
                done = counts["stored"] + counts["known"] + counts["refused"]
                echo(f"ingest: {done:,} articles, {counts['chunks']:,} new chunks")
        ingested = time.perf_counter() - ready
        begun = time.perf_counter()
        no_index = ensure_index(store, found, index)
        seconds["index"] = time.perf_counter() - begun
        codes = store.codes(found)
    num_refused = counts["refused"] + report.num_broken
    if num_refused and not counts["stored"] + counts["known"]:
        reason = refused[0]["reason"] if refused else report.broken[0].reason
        raise InputError(
            f"none of the {num_refused:,} articles of {input} can be stored; the first: {reason}"
        )
    published: dict[str, Any] = {}
    if run is not None:
        if database_url is not None:  # not an argument of the child process, as every user can read those
            os.environ["LATENT_DATABASE_URL"] = database_url
        options = ["--dataset", dataset, "--run", str(run.resolve()), "--address", address_of_cluster()]
        published = run_stage("concepts", ["publish", *options]).summary
        seconds["publish"] = published["seconds"]
    record = {
        "articles": {name: counts[name] for name in ("stored", "known", "refused")},
        "broken_records": report.num_broken,
        "chunks": counts["chunks"],
        "episodes": counts["episodes"],
        "coded": counts["coded"],
        "stage_seconds": {stage: round(s, 4) for stage, s in seconds.items()},
        "seconds_an_article": round(ingested / max(counts["stored"], 1), 5),
    }
    write_json(
        metrics,
        {
            **record,
            "dataset": dataset,
            "codec": identity.to_dict(),
            "coded_by": tmd_by,
            "tmd": tmd.distribution(codes),
            "refused": refused,
            "broken": [asdict(b) for b in report.broken],
            "versions": versions(),
        },
    )
    echo(
        f"ingest: {counts['stored']:,} articles stored, {counts['chunks']:,} chunks, {counts['episodes']:,} episodes; "
        f"{counts['known']:,} known, {num_refused:,} refused; dataset {dataset!r} in {server_name(store.url)}"
    )
    for one in refused:
        echo(f"  refused: {one['article']}: {one['reason']}")
    for broken in report.broken[:BROKEN_PRINTED]:
        echo(f"  refused: {broken.place}: {broken.reason}")
    if note:
        echo(f"ingest: {counts['chunks'] - counts['coded']:,} chunks have no code; the last failure: {note}")
    if codes:
        echo(tmd.distribution_table(codes))
    echo(f"ingest: no index ({no_index})" if no_index else f"ingest: index {index}")
    finish(
        "ingest",
        rows=counts["chunks"],
        **timing(started, counts["chunks"]),
        paths=[server_name(store.url), str(metrics), *published.get("paths", [])],
        **record,
    )


if __name__ == "__main__":
    from jobs.ingest import main as command  # by name: workers cannot unpickle classes of __main__

    run(command)
