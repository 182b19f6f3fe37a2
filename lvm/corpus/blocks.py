"""An input as blocks of whole articles, and a block as rows of chunks with the account of what was left out."""

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
"""Bytes of wiki markup to one of the prose inside it, roughly."""

STAGED_SCHEMA = CHUNK_SCHEMA.append(pa.field("place", pa.string()))
"""Of a block that waits for its article numbers; place: where in its input the article was found."""


def rows_of(record: Record, bytes_per_row: float) -> float:
    """About how many chunks a record gives."""
    if record.media_namespaces is not None:
        return max(1.0, len(record.article.text) / (bytes_per_row * MARKUP_FACTOR))
    text = record.article.text
    return max(1 + text.count("\n\n"), len(text) / bytes_per_row)


@dataclass(frozen=True)
class NextBlock:
    """What is known of a block before its records."""

    number: int
    """Its place in the input, from 0."""
    first_record: int
    """Number of its first record in the input."""
    position: int
    """Bytes read so far."""
    ready: bool
    """True where nothing is to be cut; its records do not follow."""


@dataclass(frozen=True)
class InputEnd:
    """What is known when all of an input is read."""

    num_records: int
    """Each takes an article number."""
    counts: Counts
    """What was skipped, and what was too broken to reach a block."""


def read_blocks(
    input_file: InputFile, limit: int | None, block_rows: int, bytes_per_row: float, staged: frozenset[int]
) -> Iterator[NextBlock | list[Record] | InputEnd]:
    """Blocks of whole articles of one input: a NextBlock, then, unless its number is in `staged`, its records; at last
    an InputEnd.

    limit: records to take. A broken file ends where it breaks, and is in the counts. Raises what is no fault of the
    file: StorageError, OutputError.
    """
    report = ReadReport()
    position = 0

    def moved(to: int) -> None:
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
            for record in read_records(input_file, report, moved):
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
    """Chunks of the records, their doc_id counted from the input's first record, and where each was found."""
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
    except Exception:  # one of them; which one shows when each is cut alone
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
