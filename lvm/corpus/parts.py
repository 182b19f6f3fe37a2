"""Write staged blocks as final shards, without duplicate articles."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lvm.corpus.counts import Counts
from lvm.corpus.records import BROKEN_SHOWN
from lvm.storage import Location
from lvm.vectors.shards import CHUNK_SCHEMA, Shard, read_footer, read_table, with_footer, write_table


def first_chunks(
    files: Sequence[tuple[Location, int]],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """For each article, in file order: 64 bits of its first chunk's id, and its final doc_id; both (N,).

    files: shards, each with the offset to add to its doc_id (0 where it is final).
    """
    ids: list[npt.NDArray[np.uint64]] = []
    docs: list[npt.NDArray[np.int64]] = []
    for path, add in files:
        table = read_table(path, ["chunk_id", "doc_id", "position"])
        first = table.filter(pc.equal(table.column("position"), 0))
        digits = (int(i[:16], 16) for i in first.column("chunk_id").to_pylist())
        ids.append(np.fromiter(digits, np.uint64, first.num_rows))
        docs.append(first.column("doc_id").to_numpy().astype(np.int64) + add)
    none = np.empty(0)
    return np.concatenate([none.astype(np.uint64), *ids]), np.concatenate([none.astype(np.int64), *docs])


def publish_part(
    staged: Location,
    part: Location,
    first_doc_id: int,
    dropped: npt.NDArray[np.int64],
    footer: Mapping[str, Any],
) -> Shard:
    """Write a staged block as `part`, with final article numbers and without the `dropped` ones."""
    table = read_table(staged)
    counts = Counts(**read_footer(staged)["counts"])
    doc_ids = table.column("doc_id").to_numpy().astype(np.int64) + first_doc_id
    keep = ~np.isin(doc_ids, dropped)
    gone = table.filter(pa.array(~keep & (table.column("position").to_numpy() == 0)))
    table, doc_ids = table.filter(pa.array(keep)), doc_ids[keep]
    if gone.num_rows:
        counts.first_duplicates = [
            {"title": row["title"], "place": f"{footer['input']}, {row['place']}"}
            for row in gone.slice(0, BROKEN_SHOWN).select(["title", "place"]).to_pylist()
        ]
        counts.duplicates = gone.num_rows
        counts.articles -= gone.num_rows
        counts.measure(table.column("text").to_pylist(), table.column("num_tokens").to_pylist())
    table = table.set_column(1, "doc_id", pa.array(doc_ids.astype(np.int32))).select(CHUNK_SCHEMA.names)
    return write_table(part, with_footer(table.cast(CHUNK_SCHEMA), {**footer, "counts": asdict(counts)}))


def duplicates_among(ids: npt.NDArray[np.uint64], doc_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """doc_id of every article that has the id of one with a lower doc_id, ascending."""
    order = np.lexsort((doc_ids, ids))
    again = np.zeros(len(ids), bool)
    again[1:] = ids[order][1:] == ids[order][:-1]
    return np.sort(doc_ids[order][again])
