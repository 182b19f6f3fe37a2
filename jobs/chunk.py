"""Cut articles into chunks: reads a corpus, writes Parquet shards of chunks and a manifest last.

    python -m jobs.chunk --input articles.jsonl.gz --output out/chunks --codec mini
    ray job submit --working-dir . -- python -m jobs.chunk --input /shared/d.xml.bz2 --output /shared/chunks

Inputs are read side by side, one reader each; a reader hands on blocks of whole articles, and blocks are
parsed and cut in parallel. Readers wait when cutting falls behind, so memory holds a few blocks a core,
whatever the corpus weighs. On a cluster, --input and --output lie on storage all nodes see.

    part-*.parquet   chunks, whole articles, about --rows-per-shard rows, never from two inputs
    manifest.json    settings, inputs with their hashes, counts, what was broken; written last
    ledger.json      which parts and article numbers each input was given
    _work/           blocks of inputs not yet read to their end; gone when the job is done

Killed at any moment and run again, the job cuts only the blocks that are not there and ends with the very
same rows. When inputs were added, changed or removed, the others' parts and article numbers stay as they are,
and new ones come after the highest, so the stages after this one redo only what is new.
"""

import functools
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jobs._ray import (
    Address,
    PathOrUrl,
    ProgressLines,
    connect,
    echo,
    finish,
    nodes_with,
    path_option,
    run,
    versions,
)
from lvm.corpus.chunker import RULES, Chunker, Tokenizer
from lvm.corpus.inputs import InputFile, Unread, input_root, shown, survey, text_files
from lvm.corpus.readers import read_records
from lvm.corpus.records import BROKEN_SHOWN, MAX_WORD, Article, ReadReport, Record
from lvm.errors import InputError, LvmError, OutputError, StorageError
from lvm.storage import Location, local_folder, location, remove_tree
from lvm.vectors.shards import (
    CHUNK_SCHEMA,
    Manifest,
    Shard,
    claim,
    file_sha256,
    find,
    fingerprint,
    read_footer,
    read_table,
    with_footer,
    write_json,
    write_table,
)

BYTES_PER_TOKEN = 2.5
"""Text bytes a chunk holds for each token it may have: 79 of 32 with `mini` on Wikipedia. Decides how many
articles make a block; a codec with longer tokens gets shards with fewer rows."""

MARKUP_FACTOR = 2.5
"""Bytes of wiki markup to one of the prose inside it, roughly."""

EDGE_BYTES = 1 << 16
"""How much of a file's beginning and end is hashed to see whether it changed."""

BLOCKS_AHEAD = 4
"""Blocks a reader may have ready that no task has taken yet."""

TASKS_PER_CPU = 2
"""Blocks in flight for each CPU: one being cut, one on its way."""

LETTER_BY_LETTER = 0.5
"""Tokens a letter from which a tokenizer does not fit the language: English takes 0.27 with `mini`, German 0.6."""

_IDEOGRAPH = re.compile("[\u2e80-\U0010ffff]")

FILES_PER_CHECK = 64
"""Shards whose article ids one task reads when duplicates are looked for."""

MAX_DOC_ID = 2**31 - 1
_STAGED_SCHEMA = CHUNK_SCHEMA.append(pa.field("place", pa.string()))
_WORK = "_work"


@dataclass(frozen=True)
class ChunkSettings:
    """What decides the chunks of a given text."""

    tokenizer_sha256: str
    """Hash of the codec's tokenizer, 64 hex digits."""
    max_tokens: int
    """Tokens a chunk may have, end of sequence included."""
    language: str = "en"
    """Language whose abbreviations the sentence splitter knows, ISO 639-1."""
    rows_per_shard: int = 2048
    """Rows a shard is aimed to have; shards hold whole articles, so it is met on average."""
    rules: int = RULES
    """Version of the chunker's rules."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise InputError(f"--rows-per-shard is {self.rows_per_shard}, expected 1 or more")


@dataclass(frozen=True)
class Work:
    """One input and what identifies the work on it."""

    input: InputFile
    """What to read."""
    key: str
    """16 hex digits over content, name, settings and limit: equal key, equal chunks."""
    size: int
    """Bytes to read."""
    before: tuple[str, ...]
    """Keys of the inputs before this one."""


@dataclass
class Counts:
    """What became of the records of an input or a block; adds up."""

    articles: int = 0
    """Articles with at least one chunk."""
    chunks: int = 0
    words: int = 0
    """Runs of anything but white space in the chunks."""
    tokens: int = 0
    """End of sequence included."""
    letters: int = 0
    """Characters of the chunks, as `letters_of` counts them."""
    long_words: int = 0
    """Words longer than `lvm.corpus.records.MAX_WORD` characters that were left out."""
    num_broken: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)
    """Place and reason of the first BROKEN_SHOWN."""
    broken_files: list[dict[str, str]] = field(default_factory=list)
    """Files that broke, and why; their records before that place were taken."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Sound records that are no articles, by kind."""
    duplicates: int = 0
    """Articles left out because one with the same id came before in the same file or wiki."""
    first_duplicates: list[dict[str, str]] = field(default_factory=list)
    """Title and place of the first BROKEN_SHOWN."""
    sources: list[str] = field(default_factory=list)
    """Names the records give as their source; the first BROKEN_SHOWN."""

    def add(self, other: "Counts") -> None:
        """Add another's counts and append its examples."""
        sums = ("articles", "chunks", "words", "tokens", "letters", "long_words", "num_broken", "duplicates")
        for name in (*sums, "broken_files"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped = dict(Counter(self.skipped) + Counter(other.skipped))
        self.broken = [*self.broken, *other.broken][:BROKEN_SHOWN]
        self.first_duplicates = [*self.first_duplicates, *other.first_duplicates][:BROKEN_SHOWN]
        self.sources = list(dict.fromkeys([*self.sources, *other.sources]))[:BROKEN_SHOWN]


@dataclass(frozen=True)
class Entry:
    """What an input was given in this folder, as the ledger keeps it."""

    name: str
    """The input's path inside --input."""
    first_doc_id: int
    """doc_id of its first record."""
    num_records: int
    """Records read; each took a number, whether or not it became an article."""
    parts: list[str | None]
    """Shard of each block in order; None where a block had no chunk to write."""
    read: dict[str, Any]
    """Counts of the reader: what it skipped, and what was too broken to reach a block."""


# ------------------------------------------------------------------------------------------ what to read


def stamp_input(input_file: InputFile, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Size, time, a hash over beginning and end, and one over all of an input, as the manifest keeps them.

    before: the same input's stamp in an earlier run. Where its size, time and ends are the same, so is its
    whole content taken to be, and nothing more is read. A file that cannot be opened has a stamp of its own: it is
    read in the first run that can.
    """
    try:
        return _stamp(input_file, before)
    except StorageError:
        raise
    except OSError as err:
        return {"size": 0, "mtime_ns": 0, "edges": "", "sha256": f"unreadable: {err.strerror}"}


def _stamp(input_file: InputFile, before: Mapping[str, Any] | None) -> dict[str, Any]:
    if input_file.format == "text":
        files = text_files(input_file.path)
        stats = [f.stat() for f in files]
        names = [[shown(f.name), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
        stamp = {
            "size": sum(s.st_size for s in stats),
            "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
            "edges": fingerprint(names),
        }
    else:
        path, stat = input_file.path, input_file.path.stat()
        with path.open("rb") as file:
            edges = hashlib.sha256(file.read(EDGE_BYTES))
            file.seek(max(0, stat.st_size - EDGE_BYTES))
            edges.update(file.read(EDGE_BYTES))
        stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "edges": edges.hexdigest()[:16]}
    if before is not None and all(before.get(k) == v for k, v in stamp.items()) and "sha256" in before:
        return {**stamp, "sha256": before["sha256"]}
    if input_file.format == "text":
        content = fingerprint([[shown(f.name), _sha256_if_open(f)] for f in text_files(input_file.path)])
    else:
        content = file_sha256(input_file.path)
    return {**stamp, "sha256": content}


def _sha256_if_open(file: Location) -> str:
    try:
        return file_sha256(file)
    except StorageError:
        raise
    except OSError as err:
        return f"unreadable: {err.strerror}"


def plan_works(
    inputs: Sequence[InputFile],
    stamps: Mapping[str, Mapping[str, Any]],
    settings: ChunkSettings,
    limit: int | None,
) -> list[Work]:
    """One work for each input, in order. Under a limit, an input's share depends on those before it."""
    works: list[Work] = []
    before: list[str] = []
    for input_file in inputs:
        stamp = stamps[input_file.name]
        decisive = {
            "content": stamp["sha256"],
            "names": [input_file.name, shown(input_file.path.resolve().name), input_file.format],
            "settings": asdict(settings),
            "limit": None if limit is None else [limit, *before],
        }
        earlier = tuple(w.key for w in works)
        works.append(Work(input_file, fingerprint(decisive), stamp["size"], earlier))
        before.append(stamp["sha256"])
    return works


# ------------------------------------------------------------------------------------- on Ray's workers


def rows_of(record: Record, bytes_per_row: float) -> float:
    """About how many chunks a record gives."""
    if record.media_namespaces is not None:
        return max(1.0, len(record.article.text) / (bytes_per_row * MARKUP_FACTOR))
    text = record.article.text
    return max(1 + text.count("\n\n"), len(text) / bytes_per_row)


def read_blocks(
    input_file: InputFile, limit: int | None, block_rows: int, bytes_per_row: float, staged: frozenset[int]
) -> Iterator[tuple[Any, ...]]:
    """Blocks of whole articles of one input: before each, a line about it.

    Yields ("block", number, first record's number, bytes read so far, ready), then, unless its number is in
    `staged` (ready), the list of its records; at last ("end", number of records, Counts as a dict). A broken file
    ends where it breaks, and is in its Counts. What is no fault of the file (object storage does not answer) yields
    ("error", type, message), as an exception's one line would not survive the way.
    """
    report = ReadReport()
    position = 0

    def moved(to: int) -> None:
        nonlocal position
        position = to

    number = first = 0
    rows = 0.0
    block: list[Record] = []
    try:
        if limit is None or limit > 0:
            for record in read_records(input_file, report, moved):
                block.append(record)
                rows += rows_of(record, bytes_per_row)
                last = limit is not None and report.articles >= limit
                if rows >= block_rows or last:
                    yield "block", number, first, position, number in staged
                    if number not in staged:
                        yield (block,)
                    number, first = number + 1, first + len(block)
                    block, rows = [], 0.0
                if last:
                    break
    except (StorageError, OutputError) as err:
        yield "error", type(err).__name__, str(err)
        return
    except (LvmError, OSError) as err:
        report.add_broken_file(input_file.name, err)
    if block:
        yield "block", number, first, position, number in staged
        if number not in staged:
            yield (block,)
    counts = Counts(num_broken=report.num_broken, skipped=dict(report.skipped))
    counts.broken = [asdict(b) for b in report.broken]
    counts.broken_files = [{"file": f.place, "reason": f.reason} for f in report.broken_files]
    yield "end", report.articles, asdict(counts)


@functools.lru_cache(maxsize=4)
def _chunker(tokenizer_sha256: str, max_tokens: int, language: str) -> list[Chunker]:
    """This worker's chunker; it remembers words from block to block. Empty until the first block fills it."""
    return []


def cut_block(
    records: tuple[list[Record]],
    tokenizer: Sequence[Any],
    settings: ChunkSettings,
    path: Location,
    footer: Mapping[str, Any],
    first_record: int,
) -> int:
    """Parse and cut one block and write its shard with local article numbers; the number of its chunks.

    tokenizer: one reference to the tokenizer in Ray's store, fetched once a worker.
    """
    import os

    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    held = _chunker(settings.tokenizer_sha256, settings.max_tokens, settings.language)
    if not held:
        held.append(Chunker(ray.get(tokenizer[0]), settings.language))
    table, counts = block_table(records[0], held[0], first_record, str(footer["input"]))
    write_table(path, with_footer(table, {**footer, "counts": asdict(counts)}))
    return int(table.num_rows)


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
    columns: dict[str, list[Any]] = {n: [] for n in _STAGED_SCHEMA.names}
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
    counts.chunks = len(columns["text"])
    counts.words = sum(len(text.split()) for text in columns["text"])
    counts.tokens = sum(columns["num_tokens"])
    counts.letters = sum(letters_of(text) for text in columns["text"])
    counts.num_broken = report.num_broken
    counts.broken = [asdict(b) for b in report.broken]
    counts.sources = list(dict.fromkeys(columns["source"]))[:BROKEN_SHOWN]
    return pa.table(columns, schema=_STAGED_SCHEMA), counts


def letters_of(text: str) -> int:
    """Characters of a text; one of East Asian writing says as much as three letters (and takes as many bytes)."""
    return len(text) if text.isascii() else len(text) + 2 * len(_IDEOGRAPH.findall(text))


def first_chunks(
    files: Sequence[tuple[Location, int]],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Of each article in the shards, 64 bits of its first chunk's id, and its doc_id with the shard's added.

    files: shards and what to add to their doc_id (0 where it is final). Articles come in file order.
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
    """Write a staged block under its final name: final article numbers, without the dropped articles."""
    table = read_table(staged)
    counts = Counts(**read_footer(staged)["counts"])
    doc_ids = table.column("doc_id").to_numpy().astype(np.int64) + first_doc_id
    keep = ~np.isin(doc_ids, dropped)
    gone = table.filter(pa.array(~keep & (table.column("position").to_numpy() == 0)))
    table, doc_ids = table.filter(pa.array(keep)), doc_ids[keep]
    if gone.num_rows:
        for title, place in zip(
            gone.column("title").to_pylist(), gone.column("place").to_pylist(), strict=True
        ):
            counts.first_duplicates.append({"title": title, "place": f"{footer['input']}, {place}"})
        counts.first_duplicates = counts.first_duplicates[:BROKEN_SHOWN]
        counts.duplicates = gone.num_rows
        counts.articles -= gone.num_rows
        counts.chunks = table.num_rows
        counts.words = sum(len(text.split()) for text in table.column("text").to_pylist())
        counts.tokens = int(np.sum(table.column("num_tokens").to_numpy()))
        counts.letters = sum(letters_of(text) for text in table.column("text").to_pylist())
    table = table.set_column(1, "doc_id", pa.array(doc_ids.astype(np.int32))).select(CHUNK_SCHEMA.names)
    return write_table(part, with_footer(table.cast(CHUNK_SCHEMA), {**footer, "counts": asdict(counts)}))


# ------------------------------------------------------------------------------------------- the folder


class Folder:
    """A chunk job's output folder: what is finished in it, and where the rest goes."""

    def __init__(self, path: Location) -> None:
        self.path = path

    def require_ours(self) -> None:
        """Raise OutputError where the folder holds shards of somebody else."""
        known = ("manifest.json", "settings.json", "ledger.json")
        if self.path.is_dir() and not any((self.path / n).exists() for n in known):
            foreign = next(iter(sorted(self.path.glob("part-*.parquet"), key=str)), None)
            if foreign is not None:
                raise OutputError(
                    f"{self.path} holds {foreign.name} but no record of this job; expected an empty folder "
                    "or one of `latent chunk`. Choose another --output."
                )

    def ledger(self) -> dict[str, Entry]:
        """Entry of each input by its work's key; empty where there is none or it cannot be read."""
        try:
            record = json.loads((self.path / "ledger.json").read_bytes())
            return {key: Entry(**entry) for key, entry in record.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as err:
            echo(f"chunk: {self.path / 'ledger.json'} cannot be read ({err}); all inputs are cut again")
            return {}

    def save_ledger(self, entries: Mapping[str, Entry]) -> None:
        """Write it in one step."""
        write_json(self.path / "ledger.json", {key: asdict(entry) for key, entry in entries.items()})

    def staged(self, work: Work, block: int) -> Location:
        """Where a block waits until all inputs are read."""
        return self.path / _WORK / work.key / f"block-{block:05d}.parquet"

    def staged_blocks(self, work: Work) -> frozenset[int]:
        """Numbers of the blocks that wait there."""
        found = (self.path / _WORK / work.key).glob("block-*.parquet")
        return frozenset(int(p.stem.removeprefix("block-")) for p in found)

    def done_file(self, work: Work) -> Location:
        """Written when all of an input's blocks wait there."""
        return self.path / _WORK / work.key / "done.json"

    def intact(self, work: Work, entry: Entry, damaged: Mapping[str, str]) -> frozenset[int]:
        """Blocks of a ledger entry that need no work: their part is there, whole, and made by this work."""
        good = set()
        for block, part in enumerate(entry.parts):
            if part is None:
                good.add(block)
            elif part not in damaged and (self.path / part).exists():
                try:
                    footer = read_footer(self.path / part)
                except InputError as err:
                    echo(f"chunk: {err}")
                    continue
                if (footer.get("work"), footer.get("block")) == (work.key, block):
                    good.add(block)
        return frozenset(good)

    def clean(self, works: Sequence[Work], manifest: Manifest) -> list[str]:
        """Remove what the manifest does not list: waiting blocks, and parts of inputs that are gone."""
        keys = {w.key for w in works}
        self.save_ledger({k: e for k, e in self.ledger().items() if k in keys})
        listed = {s.file for s in manifest.shards}
        gone = [p.name for p in sorted(self.path.glob("part-*.parquet"), key=str) if p.name not in listed]
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        remove_tree(self.path / _WORK)
        return gone


# ------------------------------------------------------------------------------------------ all of it


@dataclass
class _Reading:
    """An input being read and cut."""

    work: Work
    position: int = 0
    """Bytes read."""
    num_blocks: int = 0
    in_flight: int = 0
    """Blocks being cut."""
    ended: dict[str, Any] | None = None
    """What done.json will echo, once all is read."""


def _get(ref: Any) -> Any:
    """ray.get, with our own errors as they were raised and not wrapped in a remote traceback."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as err:
        if isinstance(err.cause, LvmError):
            raise err.cause from None
        raise


class BlockCutter:
    """Reads inputs and cuts their blocks on Ray, a bounded number at a time."""

    def __init__(self, folder: Folder, tokenizer: Tokenizer, settings: ChunkSettings) -> None:
        import ray

        self._folder, self._settings = folder, settings
        self._read = ray.remote(num_cpus=0)(read_blocks).options(
            num_returns="streaming", _generator_backpressure_num_objects=BLOCKS_AHEAD
        )
        self._cut = ray.remote(num_cpus=1)(cut_block)
        self._tokenizer = [ray.put(tokenizer)]
        self._cpus = int(sum(n.get("CPU", 0) for n in nodes_with()))
        self._readers: dict[Any, _Reading] = {}
        self._tasks: dict[Any, _Reading] = {}

    def run(
        self, works: Sequence[tuple[Work, frozenset[int]]], limit: int | None, num_records: dict[str, int]
    ) -> None:
        """Write the blocks of the works that are missing.

        works: with the numbers of blocks that need no cutting. num_records: records of each input by key,
        where known; those of the inputs read here are added. Raises the first error of a reader or a block;
        blocks in flight are written first.
        """
        import ray

        # Under a limit, how many articles an input may give is known when those before it are read.
        max_readers = 1 if limit is not None else max(2, self._cpus // 2)
        waiting = list(reversed(works))
        with _progress(sum(w.size for w, _ in works)) as show:
            try:
                while waiting or self._readers or self._tasks:
                    while waiting and len(self._readers) < max_readers:
                        work, ready = waiting.pop()
                        earlier = 0 if limit is None else sum(num_records[key] for key in work.before)
                        self._start(work, ready, None if limit is None else max(0, limit - earlier))
                    full = len(self._tasks) >= TASKS_PER_CPU * self._cpus
                    (event,), _ = ray.wait([*self._tasks, *([] if full else self._readers)], num_returns=1)
                    if event in self._tasks:
                        reading = self._tasks.pop(event)
                        reading.in_flight -= 1
                        show(reading, _get(event))
                    else:
                        reading = self._readers[event]
                        self._take(event, reading)
                        show(reading, 0)
                    if reading.ended is not None:
                        num_records[reading.work.key] = reading.ended["num_records"]
                        if not reading.in_flight:
                            write_json(self._folder.done_file(reading.work), reading.ended)
            finally:
                for generator in self._readers:
                    ray.cancel(generator)
                if self._tasks:  # what is being written is worth a moment
                    ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=60)

    def _start(self, work: Work, ready: frozenset[int], limit: int | None) -> None:
        bytes_per_row = self._settings.max_tokens * BYTES_PER_TOKEN
        rows = self._settings.rows_per_shard
        generator = self._read.remote(work.input, limit, rows, bytes_per_row, ready)
        self._readers[generator] = _Reading(work)

    def _take(self, generator: Any, reading: _Reading) -> None:
        """Take what a reader has: a block to cut, its end, or its error."""
        what, *rest = _get(next(generator))
        if what == "error":
            raise {"OutputError": OutputError}.get(rest[0], InputError)(rest[1])
        if what == "end":
            reading.ended = {"num_records": rest[0], "num_blocks": reading.num_blocks, "read": rest[1]}
            reading.position = reading.work.size
            del self._readers[generator]
            return
        block, first_record, reading.position, ready = rest
        reading.num_blocks = block + 1
        if not ready:
            footer = _footer(reading.work, block)
            path = self._folder.staged(reading.work, block)
            task = self._cut.remote(
                next(generator), self._tokenizer, self._settings, path, footer, first_record
            )
            self._tasks[task] = reading
            reading.in_flight += 1


def _footer(work: Work, block: int) -> dict[str, Any]:
    """What a shard's footer says of its origin."""
    return {"work": work.key, "block": block, "input": work.input.name}


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[_Reading, int], None]]:
    """A bar on stderr over the bytes read; it is told of every step, and of new chunks."""
    columns = (
        TextColumn("chunk:"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % of {task.fields[size]} read, {task.fields[chunks]:,} chunks"),
        TimeRemainingColumn(),
    )
    size = f"{total_bytes / 1e6:,.1f} MB"
    positions: dict[str, int] = {}
    chunks = 0
    console = Console(stderr=True)
    lines = None if console.is_terminal else ProgressLines("chunk", total_bytes)
    with Progress(*columns, console=console, disable=lines is not None) as progress:
        task = progress.add_task("chunk", total=max(1, total_bytes), size=size, chunks=0)

        def show(reading: _Reading, new_chunks: int) -> None:
            nonlocal chunks
            chunks += new_chunks
            positions[reading.work.key] = min(reading.position, reading.work.size)
            read = sum(positions.values())
            progress.update(task, completed=read, chunks=chunks)
            if lines is not None:
                lines.show(read, f"{read / 1e6:,.1f} of {size} read, {chunks:,} chunks")

        yield show


def assign(
    works: Sequence[tuple[Work, Mapping[str, Any]]], taken: Mapping[str, Entry], names: Sequence[str]
) -> dict[str, Entry]:
    """An entry for each newly read work, in order: article numbers after all in `taken`, new part names.

    works: with what done.json says; names: parts that must not be written over.
    Raises InputError when the article numbers run out.
    """
    next_doc = max((e.first_doc_id + e.num_records for e in taken.values()), default=0)
    used = [*names, *(p for e in taken.values() for p in e.parts if p is not None)]
    next_part = max((int(p.removeprefix("part-").removesuffix(".parquet")) for p in used), default=-1) + 1
    entries: dict[str, Entry] = {}
    for work, done in works:
        parts: list[str | None] = []
        for rows in done["block_rows"]:
            parts.append(f"part-{next_part:05d}.parquet" if rows else None)
            next_part += bool(rows)
        entries[work.key] = Entry(work.input.name, next_doc, done["num_records"], parts, done["read"])
        next_doc += done["num_records"]
    if next_doc - 1 > MAX_DOC_ID:
        raise InputError(
            f"the inputs hold {next_doc:,} records, article numbers end at {MAX_DOC_ID:,}; "
            "split the corpus and chunk it into several folders"
        )
    return entries


def duplicates_among(ids: npt.NDArray[np.uint64], doc_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """doc_id of every article whose id an article with a lower doc_id has, ascending."""
    order = np.lexsort((doc_ids, ids))
    again = np.zeros(len(ids), bool)
    again[1:] = ids[order][1:] == ids[order][:-1]
    return np.sort(doc_ids[order][again])


@dataclass(frozen=True)
class ChunkResult:
    """What `chunk_corpus` did."""

    manifest: Manifest
    """Of the chunks."""
    redone: tuple[str, ...]
    """Shards this run wrote."""
    up_to_date: bool
    """True when nothing had to be done, not even the manifest."""


def chunk_corpus(
    source: str | Location,
    target: Location,
    tokenizer: Tokenizer,
    settings: ChunkSettings,
    limit: int | None = None,
    licence: str | None = None,
    codec: str = "",
    overwrite: bool = False,
    address: str | None = None,
    strict: bool = False,
) -> ChunkResult:
    """Bring `target` to hold the chunks of the corpus at `source`, and nothing else.

    A broken file is counted, and its records before the break are taken; with `strict` it is an InputError, and
    `target` stays as it was. Raises InputError when no article is found, OutputError when `target` was made with
    other settings. Blocks that are finished stay in each case.
    """
    inputs, unread = survey(source)
    for one in unread[:5]:
        echo(f"chunk: not read: {one.name}: {one.reason}")
    if len(unread) > 5:
        echo(f"chunk: not read: {len(unread) - 5} more; all are in the manifest's report")
    folder = Folder(target)
    folder.require_ours()
    claim(target, "chunks", asdict(settings), overwrite)
    old = _old_manifest(target)
    before = {} if old is None else old.report.get("stamps", {})
    stamps = {i.name: stamp_input(i, before.get(i.name)) for i in inputs}
    # Content alone: a file that was only copied or touched must not make later stages begin again.
    contents = {n: {"sha256": s["sha256"], "size": s["size"], "limit": limit} for n, s in stamps.items()}
    done = find(target, "chunks", asdict(settings), contents)
    if done is not None:
        _refuse_broken_files(done.report["broken_files"], strict)
        return ChunkResult(done, (), up_to_date=True)

    works = plan_works(inputs, stamps, settings, limit)
    damaged = {} if old is None else old.damaged(target)
    ledger = folder.ledger()
    taken = {w.key: ledger[w.key] for w in works if w.key in ledger}
    intact = {key: folder.intact(w, taken[key], damaged) for w in works if (key := w.key) in taken}
    todo: list[tuple[Work, frozenset[int]]] = []
    for work in works:
        if work.key in taken:
            ready = intact[work.key] | folder.staged_blocks(work)
            if len(ready) < len(taken[work.key].parts):
                todo.append((work, ready))
        elif not folder.done_file(work).exists():
            todo.append((work, folder.staged_blocks(work)))
    _say_plan(works, todo, before, taken)

    connect(address)

    if todo:
        num_records = {key: entry.num_records for key, entry in taken.items()}
        for work in works:
            if work.key not in taken and folder.done_file(work).exists():
                num_records[work.key] = _done(folder, work)["num_records"]
        BlockCutter(folder, tokenizer, settings).run(todo, limit, num_records)

    new = [(w, _done(folder, w)) for w in works if w.key not in taken]
    reads = [*(d["read"] for _, d in new), *(e.read for e in taken.values())]
    _refuse_broken_files([file for read in reads for file in read.get("broken_files", [])], strict)
    # The old manifest's parts keep their names until the new one is there, so that a kill leaves it whole.
    entries = {**taken, **assign(new, taken, () if old is None else [s.file for s in old.shards])}
    folder.save_ledger(entries)
    written = _publish(folder, works, entries, intact)
    report = _report(folder, source, works, entries, unread)
    manifest = Manifest(
        kind="chunks",
        settings=asdict(settings),
        inputs=contents,
        shards=_shards(folder, entries, written, old),
        rows=report["chunks"],
        source=f"{input_root(source).name}: {', '.join(report['sources'][:10])}",
        licence=licence or _licence_of(source, works),
        report={**report, "stamps": stamps, "codec": codec},
        versions=versions(),
    )
    manifest.save(target)
    gone = folder.clean(works, manifest)
    if gone:
        echo(f"chunk: removed {len(gone)} shards of inputs that changed or are gone")
    return ChunkResult(manifest, tuple(s.file for s in written), up_to_date=False)


def _refuse_broken_files(broken: Sequence[Mapping[str, str]], strict: bool) -> None:
    if strict and broken:
        more = f" (and {len(broken) - 1} more files)" if len(broken) > 1 else ""
        raise InputError(
            f"{broken[0]['file']} is broken{more}: {broken[0]['reason']} (without --strict it is counted)"
        )


def _old_manifest(target: Location) -> Manifest | None:
    return Manifest.load(target, "chunks") if (target / "manifest.json").exists() else None


def _done(folder: Folder, work: Work) -> dict[str, Any]:
    """What done.json says of a read input, and the rows of its waiting blocks."""
    record: dict[str, Any] = json.loads(folder.done_file(work).read_bytes())
    blocks = range(record["num_blocks"])
    record["block_rows"] = [read_footer(folder.staged(work, b))["counts"]["chunks"] for b in blocks]
    return record


def _say_plan(
    works: Sequence[Work],
    todo: Sequence[tuple[Work, frozenset[int]]],
    before: Mapping[str, Any],
    taken: Mapping[str, Entry],
) -> None:
    keep = len(works) - len(todo)
    blocks = sum(len(ready) for _, ready in todo)
    if keep or blocks:
        echo(
            f"chunk: {keep} of {len(works)} inputs are finished and stay as they are, "
            f"and {blocks} blocks of the others"
        )
    names = {w.input.name for w in works}
    changed = [w.input.name for w, _ in todo if w.input.name in before and w.key not in taken]
    for what, which in (("changed", changed), ("gone", sorted(set(before) - names))):
        if which:
            echo(f"chunk: {what} since the last run: {', '.join(which[:5])}{' …' if len(which) > 5 else ''}")


def _publish(
    folder: Folder,
    works: Sequence[Work],
    entries: Mapping[str, Entry],
    intact: Mapping[str, frozenset[int]],
) -> list[Shard]:
    """Write the parts that are missing, without articles that came before."""
    import ray

    missing: list[tuple[Work, int, str]] = []
    files: list[tuple[Location, int]] = []
    for work in works:
        entry = entries[work.key]
        for block, part in enumerate(entry.parts):
            if part is None:
                continue
            if block in intact.get(work.key, ()):
                files.append((folder.path / part, 0))
            else:
                missing.append((work, block, part))
                files.append((folder.staged(work, block), entry.first_doc_id))
    if not missing:
        return []
    look = ray.remote(num_cpus=1)(first_chunks)
    groups = [files[i : i + FILES_PER_CHECK] for i in range(0, len(files), FILES_PER_CHECK)]
    found = _get([look.remote(group) for group in groups])
    dropped = duplicates_among(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    publish = ray.remote(num_cpus=1)(publish_part)
    refs = []
    for work, block, part in missing:
        entry = entries[work.key]
        low, high = np.searchsorted(dropped, [entry.first_doc_id, entry.first_doc_id + entry.num_records])
        footer = _footer(work, block)
        staged = folder.staged(work, block)
        refs.append(publish.remote(staged, folder.path / part, entry.first_doc_id, dropped[low:high], footer))
    return [_get(ref) for ref in refs]


def _shards(
    folder: Folder, entries: Mapping[str, Entry], written: Sequence[Shard], old: Manifest | None
) -> tuple[Shard, ...]:
    """The folder's shards with rows, in the order of their names, which is that of article numbers."""
    known = {s.file: s for s in [*(old.shards if old else ()), *written]}
    shards = []
    for part in sorted(p for e in entries.values() for p in e.parts if p is not None):
        path = folder.path / part
        rows = Counts(**read_footer(path)["counts"]).chunks
        if rows:  # all articles of a block may be duplicates
            shards.append(known.get(part) or Shard(part, rows, path.stat().st_size, file_sha256(path)))
    return tuple(shards)


def _report(
    folder: Folder,
    source: str | Location,
    works: Sequence[Work],
    entries: Mapping[str, Entry],
    unread: Sequence[Unread],
) -> dict[str, Any]:
    """Counts over all inputs and for each. Raises InputError when no article was found."""
    total = Counts()
    inputs: dict[str, Any] = {}
    for work in works:
        entry = entries[work.key]
        counts = Counts(**entry.read)
        for part in entry.parts:
            if part is not None:
                counts.add(Counts(**read_footer(folder.path / part)["counts"]))
        inputs[work.input.name] = {
            "articles": counts.articles,
            "chunks": counts.chunks,
            "broken_records": counts.num_broken,
            "first_doc_id": entry.first_doc_id,
        }
        total.add(counts)
    if not total.chunks:
        reasons = [f"{b['place']}: {b['reason']}" for b in total.broken]
        reasons += [f["reason"] for f in total.broken_files]
        first = f"; the first: {reasons[0]}" if reasons else ""
        raise InputError(
            f"no article was found in {source}: {len(total.broken_files)} files and {total.num_broken} records are "
            f"broken, {sum(total.skipped.values())} records are no articles{first}. Expected at least one article "
            "with text."
        )
    return {
        "articles": total.articles,
        "chunks": total.chunks,
        "words": total.words,
        "mean_tokens": round(total.tokens / total.chunks, 2),
        "tokens_per_word": round(total.tokens / max(1, total.words), 2),
        "tokens_per_letter": round(total.tokens / max(1, total.letters), 3),
        "long_words": total.long_words,
        "broken_files": total.broken_files,
        "unread": [asdict(u) for u in unread],
        "broken_records": total.num_broken,
        "broken": total.broken,
        "skipped": dict(total.skipped),
        "duplicates": total.duplicates,
        "first_duplicates": total.first_duplicates,
        "sources": total.sources,
        "inputs": inputs,
    }


def _licence_of(source: str | Location, works: Sequence[Work]) -> str:
    if str(source) == "sample":
        return "CC0-1.0"
    if all(w.input.format == "wikipedia" for w in works):
        return "CC BY-SA 4.0"
    return "not stated (--licence)"


# --------------------------------------------------------------------------------------------------- command


def main(
    output: Annotated[PathOrUrl, path_option("Folder for the chunk shards.")],
    input: Annotated[
        str, typer.Option(help="Dump, JSON, CSV, Parquet, a folder of them or of .txt files, or sample.")
    ] = "sample",
    codec: Annotated[str, typer.Option(help="Codec whose tokenizer sets the chunks' length.")] = "mini",
    codec_path: Annotated[PathOrUrl | None, path_option("Folder of a codec of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Articles to take, from the first.")] = None,
    language: Annotated[str, typer.Option(help="Language of the text, ISO 639-1, for its sentences.")] = "en",
    licence: Annotated[str | None, typer.Option(help="Licence of the text, kept in the manifest.")] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows a shard is aimed to have.")] = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace chunks made with other settings.")] = False,
    strict: Annotated[bool, typer.Option(help="End with an error where a file is broken.")] = False,
    address: Address = None,
) -> None:
    """Cut articles into chunks; a second run cuts only what is missing or changed."""
    from lvm.codec.zoo import load_tokenizer

    started = time.perf_counter()
    tokenizer = load_tokenizer(codec, None if codec_path is None else local_folder(codec_path))
    settings = ChunkSettings(tokenizer.sha256, tokenizer.max_tokens, language, rows_per_shard)
    source = input if input == "sample" else location(input).absolute()
    result = chunk_corpus(
        source, output.absolute(), tokenizer, settings, limit, licence, codec, overwrite, address, strict
    )
    seconds = time.perf_counter() - started
    manifest, report = result.manifest, result.manifest.report
    made = sum(s.rows for s in manifest.shards if s.file in result.redone)
    if result.up_to_date:
        echo(f"chunk: {output} is up to date ({manifest.rows:,} chunks of {report['articles']:,} articles)")
    else:
        echo(
            f"chunk: {manifest.rows:,} chunks of {report['articles']:,} articles in {len(manifest.shards)} "
            f"shards, {len(result.redone)} of them new; {report['broken_records']:,} broken records, "
            f"{report['duplicates']:,} duplicates left out"
        )
        for record in report["broken"][:5]:
            echo(f"  broken: {record['place']}: {record['reason']}")
        for one in report["first_duplicates"][:1]:
            echo(f"  duplicate: {one['title']} ({one['place']})")
    for file in report["broken_files"][:5]:
        echo(f"  broken file: {file['reason']}")
    if report["long_words"]:
        echo(
            f"  {report['long_words']:,} words of more than {MAX_WORD:,} characters were left out (encoded data)"
        )
    echo(f"chunk: a word takes {report['tokens_per_word']} tokens of {codec}'s tokenizer")
    if report["tokens_per_letter"] > LETTER_BY_LETTER:
        echo(
            f"chunk: WARNING: {codec}'s tokenizer does not know this language: it spells the text nearly letter by "
            f"letter ({report['tokens_per_letter']} tokens a letter, English takes 0.27), so a chunk holds "
            f"{report['words'] / report['chunks']:.0f} words. Use a codec made for the language (--codec-path)."
        )
    finish(
        {
            "stage": "chunk",
            "rows": manifest.rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(made / max(seconds, 1e-9), 1),
            "paths": [str(output)],
            "up_to_date": result.up_to_date,
            "redone": len(result.redone),
            "shards": len(manifest.shards),
            "articles": report["articles"],
            "words": report["words"],
            "mean_tokens": report["mean_tokens"],
            "broken_records": report["broken_records"],
            "broken_files": len(report["broken_files"]),
            "unread": len(report["unread"]),
            "tokens_per_word": report["tokens_per_word"],
            "duplicates": report["duplicates"],
        }
    )


if __name__ == "__main__":
    # By its own name, so that Ray's workers import it instead of unpickling a copy; their chunkers remember.
    from jobs.chunk import main as command

    run(command)
