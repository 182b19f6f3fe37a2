"""Split an input into blocks of whole articles, and chunk a block into a table with counts of what was left out."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from lvm.corpus.chunker import Chunker
from lvm.corpus.counts import Counts
from lvm.corpus.inputs import InputFile
from lvm.corpus.readers import read_records
from lvm.corpus.records import BROKEN_SHOWN, Article, ReadReport, Record
from lvm.errors import LvmError, OutputError, StorageError
from lvm.vectors.shards import CHUNK_SCHEMA

MARKUP_FACTOR = 2.5
"""Rough ratio of a wiki page's bytes of markup to its bytes of prose."""

STAGED_SCHEMA = CHUNK_SCHEMA.append(pa.field("place", pa.string()))
"""Rows of a block whose articles have no final number yet; `place` is where the article stands in its input."""


def rows_of(record: Record, bytes_per_row: float) -> float:
    """Estimated number of chunks in a record."""
    text = record.article.text
    if record.media_namespaces is not None:
        return max(1.0, len(text) / (bytes_per_row * MARKUP_FACTOR))
    return max(1 + text.count("\n\n"), len(text) / bytes_per_row)


@dataclass(frozen=True)
class NextBlock:
    """Precedes the records of a block."""

    number: int
    """Index of the block in the input, from 0."""
    first_record: int
    """Index of its first record in the input, from 0."""
    position: int
    """Bytes of the input read so far."""
    ready: bool
    """True where the block was chunked by an earlier run; its records do not follow."""


@dataclass(frozen=True)
class InputEnd:
    """Follows the last block of an input."""

    num_records: int
    """Records read; each takes an article number."""
    counts: Counts
    """Records that were skipped or too broken to reach a block."""


def read_blocks(
    input_file: InputFile, limit: int | None, block_rows: int, bytes_per_row: float, staged: frozenset[int]
) -> Iterator[NextBlock | list[Record] | InputEnd]:
    """For each block of whole articles a NextBlock, then its records unless its number is in `staged`; then an
    InputEnd.

    limit: most records to read. A broken file is read up to the damage and counted. Raises only errors that are not the
    file's fault: StorageError, OutputError.
    """
    report = ReadReport()
    position = 0

    def set_position(to: int) -> None:
        nonlocal position
        position = to

    number = first = 0
    rows = 0.0
    block: list[Record] = []

    def close() -> Iterator[NextBlock | list[Record]]:
        nonlocal number, first, rows, block
        yield NextBlock(number, first, position, number in staged)
        if number not in staged:
            yield block
        number, first, rows, block = number + 1, first + len(block), 0.0, []

    try:
        if limit is None or limit > 0:
            for record in read_records(input_file, report, set_position):
                block.append(record)
                rows += rows_of(record, bytes_per_row)
                last = limit is not None and report.articles >= limit
                if rows >= block_rows or last:
                    yield from close()
                if last:
                    break
    except (StorageError, OutputError):
        raise
    except (LvmError, OSError) as err:
        report.add_broken_file(input_file.name, err)
    if block:
        yield from close()
    counts = Counts(num_broken=report.num_broken, skipped=dict(report.skipped))
    counts.broken = [asdict(b) for b in report.broken]
    counts.broken_files = [{"file": f.place, "reason": f.reason} for f in report.broken_files]
    yield InputEnd(report.articles, counts)


def block_table(
    records: Sequence[Record], chunker: Chunker, first_record: int, name: str
) -> tuple[pa.Table, Counts]:
    """A block's chunks, as STAGED_SCHEMA with doc_id counted from the input's first record, and its counts."""
    counts, report = Counts(), ReadReport()
    articles: list[tuple[int, str, Article]] = []
    for number, record in enumerate(records, first_record):
        plain = report.read(f"{name}, {record.place}", record.plain)
        if plain is not None:
            articles.append((number, record.place, plain[0]))
            counts.long_words += plain[1]
    columns: dict[str, list[Any]] = {n: [] for n in STAGED_SCHEMA.names}
    try:
        cut = chunker.chunk([article for _, _, article in articles])
    except Exception:  # one article is at fault: chunk each alone to find it
        alone = [(entry, report.read(f"{name}, {entry[1]}", chunker.chunk, [entry[2]])) for entry in articles]
        articles = [entry for entry, chunks in alone if chunks is not None]
        cut = [chunks[0] for _, chunks in alone if chunks is not None]
    for (number, place, article), chunks in zip(articles, cut, strict=True):
        n = len(chunks)
        columns["chunk_id"] += [c.chunk_id for c in chunks]
        columns["doc_id"] += [number] * n
        columns["position"] += [c.position for c in chunks]
        columns["title"] += [article.title] * n
        columns["text"] += [c.text for c in chunks]
        columns["source"] += [article.source] * n
        columns["num_tokens"] += [c.num_tokens for c in chunks]
        columns["place"] += [place] * n
        counts.articles += n > 0
    counts.measure(columns["text"], columns["num_tokens"])
    counts.num_broken = report.num_broken
    counts.broken = [asdict(b) for b in report.broken]
    counts.sources = list(dict.fromkeys(columns["source"]))[:BROKEN_SHOWN]
    return pa.table(columns, schema=STAGED_SCHEMA), counts
