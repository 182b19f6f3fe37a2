"""What do 500k, 50M, 350M and 5G chunks take, from the rates that were measured on two cores?

    python -m tests.bench.scaling_model

Prints the tables of docs/scaling.md; a test holds the two together. Every rate names the results file it was measured
in; nothing here was measured at the larger sizes. What one node does alone is not divided by their number. The last
line is JSON.
"""

import json
from dataclasses import dataclass

from lvm.vectors.array import PART_ROWS
from lvm.vectors.index import IndexSettings
from lvm.vectors.shards import MOST_IN_JSON

SIZES = {"500 k": 500_000, "50 M": 50_000_000, "350 M": 350_000_000, "5 G": 5_000_000_000}
NODES = {"500 k": 1, "50 M": 24, "350 M": 24, "5 G": 200}
"""Worker nodes taken for each size: of cluster.yaml's machine type, which allows 28 of them."""

CORES_PER_NODE = 8
"""vCPUs of cluster.yaml's cpu_spot, an m7i.2xlarge."""

DOLLARS_PER_NODE_HOUR = 0.40
"""About the list price of an m7i.2xlarge on demand; spot is often a third of it. Look it up before you plan on it."""

SHARD_ROWS = 2_048
"""Default of --rows-per-shard."""

BACKFILL = "backfill_mini_intel-xeon-2core_2026-11.md"
SCALE = "scale_amd-epyc-2core_2026-11.md"


@dataclass(frozen=True)
class Rate:
    """A measured rate and where it stands."""

    chunks: int
    """Chunks of that run."""
    seconds: int
    """Wall time of the stage, on two cores."""
    piece: int
    """Chunks of what one node does alone."""
    source: str
    """File in tests/bench/results."""
    cores: int | None = None
    """Cores that a piece uses; None for all of a node's."""

    @property
    def per_core(self) -> float:
        """Chunks a second on one core."""
        return self.chunks / self.seconds / 2


RATES = {
    "chunk": Rate(505_986, 48, SHARD_ROWS, BACKFILL),
    "encode": Rate(505_986, 154, SHARD_ROWS, BACKFILL),
    "array": Rate(5_000_000, 51, PART_ROWS, SCALE, cores=2),
    "index": Rate(5_000_000, 132, IndexSettings().part_vectors, SCALE),
    "recall": Rate(1_497_499, 11, IndexSettings().part_vectors, SCALE),
}

CHUNK_BYTES = 61
"""A chunk in a shard of chunks, zstd: 61.3 bytes for the bundled sample's 3,899 (`latent chunk`)."""
VECTOR_BYTES = 1_544
"""A chunk in a shard of vectors, float16, zstd: 1,544 for 1,413 chunks of the sample (`latent encode`)."""
ARRAY_BYTES = 2 * 768 + 4 * 32 + 37
"""A chunk in the array that training maps: float16 numbers, an id of 32 characters of 4 bytes, and what is numbers and
one mark in `lvm.vectors.array.VectorArray`. Texts are in the shards alone."""
INDEX_BYTES = 96 + 2 * 768 + 8
"""A vector in an index that holds codes: 192 of 4 bits, float16 numbers to compare the best with, and its row."""
CODE_BYTES = 96 + 8
"""Of it what a search goes through, in memory. The rest is mapped: eight vectors of it are read for each answer."""
ID_BYTES = 8
"""A chunk id while the encode job's own process makes the array: 64 bits of it, to see that none comes twice."""
MANIFEST_BYTES = {True: 190, False: 37}
"""A shard's entry in manifest.json, which lists up to MOST_IN_JSON; in Parquet."""


def hours(size: int, rate: Rate, nodes: int) -> float:
    """Hours of a stage at this many chunks."""
    each = rate.cores or CORES_PER_NODE
    cores = min(CORES_PER_NODE * nodes, each * -(-size // rate.piece))
    return size / (rate.per_core * cores) / 3600


def time_of(value: float) -> str:
    """Hours as people say them."""
    return f"{value:.2g} h" if value >= 1 else f"{value * 60:.2g} min"


def shown(value: float, unit: str) -> str:
    """A size as people write it."""
    for step, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= step:
            return f"{value / step:.3g} {letter}{unit}"
    return f"{value:.0f} {unit}"


def tables() -> str:
    """Time and space at each size, in Markdown."""
    lines = ["| | " + " | ".join(SIZES) + " |", "| --- |" + " ---: |" * len(SIZES)]
    lines.append("| worker nodes of 8 vCPUs | " + " | ".join(str(NODES[s]) for s in SIZES) + " |")
    for stage, rate in RATES.items():
        cells = [time_of(hours(n, rate, NODES[s])) for s, n in SIZES.items()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    spent = [hours(n, RATES["encode"], NODES[s]) * NODES[s] for s, n in SIZES.items()]
    lines.append("| encode, node-hours | " + " | ".join(f"{h:.2g}" for h in spent) + " |")
    lines.append(
        "| encode, dollars | " + " | ".join(f"{h * DOLLARS_PER_NODE_HOUR:.2g}" for h in spent) + " |"
    )
    sizes = {
        "shards of chunks": CHUNK_BYTES,
        "shards of vectors": VECTOR_BYTES,
        "array that training maps": ARRAY_BYTES,
        "index, 4-bit codes and float16": INDEX_BYTES,
        "of it in each retriever's memory": CODE_BYTES,
        "ids in the encode job's own process": ID_BYTES,
    }
    for what, each in sizes.items():
        lines.append(f"| {what} | " + " | ".join(shown(each * n, "B") for n in SIZES.values()) + " |")
    shards = [-(-n // SHARD_ROWS) for n in SIZES.values()]
    parts = [IndexSettings().num_parts(n) for n in SIZES.values()]
    lines.append("| parts of the index | " + " | ".join(f"{n:,}" for n in parts) + " |")
    lines.append("| shards of 2,048 rows | " + " | ".join(f"{n:,}" for n in shards) + " |")
    lists = [shown(MANIFEST_BYTES[n <= MOST_IN_JSON] * n, "B") for n in shards]
    lines.append("| list of shards | " + " | ".join(lists) + " |")
    return "\n".join(lines)


def sources() -> str:
    """The rates and where they stand, in Markdown."""
    lines = [
        "| stage | chunks | seconds on 2 cores | chunks/s a core | source |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for stage, rate in RATES.items():
        link = f"[{rate.source}](../tests/bench/results/{rate.source})"
        lines.append(f"| {stage} | {rate.chunks:,} | {rate.seconds} | {rate.per_core:,.0f} | {link} |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables and one line of JSON."""
    print(sources(), tables(), sep="\n\n")
    record = {
        size: {stage: round(hours(n, rate, NODES[size]), 3) for stage, rate in RATES.items()}
        for size, n in SIZES.items()
    }
    print(json.dumps({"hours": record, "nodes": NODES}))


if __name__ == "__main__":
    main()
