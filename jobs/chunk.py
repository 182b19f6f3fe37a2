"""Split articles into chunks: reads a corpus, writes Parquet shards of chunks and a manifest last.

    python -m jobs.chunk --input articles.jsonl.gz --output out/chunks --codec mini
    ray job submit --working-dir . -- python -m jobs.chunk --input /shared/d.xml.bz2 --output /shared/chunks

Inputs are read in parallel, one reader each. A reader emits blocks of whole articles, which are parsed and chunked
in parallel. Readers wait when chunking falls behind, so memory holds a few blocks per core whatever the size of
the corpus. On a cluster, --input and --output are on storage that all nodes can reach.

    part-*.parquet   chunks of whole articles, about --rows-per-shard rows, each part from one input
    manifest.json    settings, inputs with their hashes, counts, broken records; written last
    ledger.json      the parts and article numbers assigned to each input
    _work/           blocks of inputs not yet fully read; removed when the job is done

A job that is killed and run again makes only the missing blocks and produces the same rows. When inputs are added,
changed or removed, the parts and article numbers of the others do not change, and new ones get higher numbers, so
later stages redo only what is new.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer

from jobs._ray import (
    Address,
    CodecPath,
    PathOrUrl,
    connect,
    echo,
    echo_broken,
    finish,
    get,
    nodes_with,
    path_option,
    progress_bar,
    run,
    timing,
    versions,
)
from lvm.corpus.blocks import InputEnd, block_table, read_blocks
from lvm.corpus.chunker import Chunker, Tokenizer
from lvm.corpus.inputs import input_root, survey
from lvm.corpus.ledger import ChunkFolder, Entry, Part
from lvm.corpus.parts import duplicates_among, first_chunks, publish_part
from lvm.corpus.records import MAX_WORD, BrokenRecord, Record
from lvm.corpus.stamps import stamp_input
from lvm.corpus.work import ChunkSettings, Work, plan_works
from lvm.errors import InputError
from lvm.storage import Location, local_folder, location
from lvm.vectors.artefact import Artefact
from lvm.vectors.shards import Manifest, Shard, with_footer, write_table

BYTES_PER_TOKEN = 2.5
"""Text bytes of a chunk per token of its limit: 79 for 32 with `mini` on Wikipedia. Determines how many articles make
a block; a codec with longer tokens gets shards with fewer rows."""

BLOCKS_AHEAD = 4
"""Blocks that a reader may have ready before a task takes them."""

TASKS_PER_CPU = 2
"""Blocks in flight per CPU: one being chunked, one queued."""

LETTER_BY_LETTER = 0.5
"""Tokens per letter above which a tokenizer does not suit the language: with `mini` English takes 0.27, German 0.6."""

FILES_PER_CHECK = 64
"""Shards per task of the search for duplicate articles."""


@functools.lru_cache(maxsize=4)
def _chunker(tokenizer_sha256: str, max_tokens: int, language: str) -> list[Chunker]:
    """This worker's chunker, which caches words across blocks. Empty until the first block."""
    return []


def chunk_block(
    records: list[Record],
    tokenizer: Sequence[Any],
    settings: ChunkSettings,
    path: Location,
    footer: Mapping[str, Any],
    first_record: int,
) -> int:
    """Parse and chunk one block and write its shard with block-local article numbers; returns the number of chunks.

    tokenizer: a list with one reference to the tokenizer in Ray's object store, fetched once per worker.
    """
    import os

    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
    held = _chunker(settings.tokenizer_sha256, settings.max_tokens, settings.language)
    if not held:
        held.append(Chunker(ray.get(tokenizer[0]), settings.language))
    table, counts = block_table(records, held[0], first_record, str(footer["input"]))
    write_table(path, with_footer(table, {**footer, "counts": asdict(counts)}))
    return int(table.num_rows)


# ------------------------------------------------------------------------------------------ the corpus


@dataclass
class _Reading:
    """An input being read and chunked."""

    work: Work
    position: int = 0
    """Bytes read."""
    num_blocks: int = 0
    in_flight: int = 0
    """Blocks being chunked."""
    end: InputEnd | None = None
    """Set when the input is fully read."""


class BlockChunker:
    """Reads inputs and chunks their blocks on Ray, with a bounded number in flight."""

    def __init__(self, folder: ChunkFolder, tokenizer: Tokenizer, settings: ChunkSettings) -> None:
        import ray

        self._folder, self._settings = folder, settings
        self._read = ray.remote(num_cpus=0)(read_blocks).options(
            num_returns="streaming", _generator_backpressure_num_objects=BLOCKS_AHEAD
        )
        self._chunk = ray.remote(num_cpus=1)(chunk_block)
        self._tokenizer = [ray.put(tokenizer)]
        self._cpus = int(sum(n.get("CPU", 0) for n in nodes_with()))
        self._readers: dict[Any, _Reading] = {}
        self._tasks: dict[Any, _Reading] = {}

    def run(
        self, works: Sequence[tuple[Work, frozenset[int]]], limit: int | None, num_records: dict[str, int]
    ) -> None:
        """Write the missing blocks.

        works: each with the numbers of its finished blocks. num_records: records of each input by key, where known;
        inputs read here are added. Raises the first error of a reader or a block, after blocks in flight are written.
        """
        import ray

        # With a limit, an input's share of articles is only known after the inputs before it are read.
        max_readers = 1 if limit is not None else max(2, self._cpus // 2)
        waiting = list(reversed(works))
        chunks = 0
        with progress_bar("chunk", sum(w.size for w, _ in works) / 1e6, "MB read", places=1) as advance:
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
                        chunks += get(event)
                        moved = 0
                    else:
                        reading = self._readers[event]
                        moved = self._take(event, reading)
                    advance(moved / 1e6, f", {chunks:,} chunks")
                    if reading.end is not None:
                        num_records[reading.work.key] = reading.end.num_records
                        if not reading.in_flight:
                            self._folder.save_end(reading.work, reading.num_blocks, reading.end)
            finally:
                for generator in self._readers:
                    ray.cancel(generator)
                if self._tasks:  # let blocks in flight finish
                    ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=60)

    def _start(self, work: Work, ready: frozenset[int], limit: int | None) -> None:
        bytes_per_row = self._settings.max_tokens * BYTES_PER_TOKEN
        rows = self._settings.rows_per_shard
        generator = self._read.remote(work.input, limit, rows, bytes_per_row, ready)
        self._readers[generator] = _Reading(work)

    def _take(self, generator: Any, reading: _Reading) -> int:
        """Handle a reader's next item: a block to chunk, the input's end, or an error. Returns the bytes it read."""
        got, before = get(next(generator)), reading.position
        if isinstance(got, InputEnd):
            reading.end = got
            reading.position = reading.work.size
            del self._readers[generator]
        else:
            reading.num_blocks = got.number + 1
            reading.position = min(got.position, reading.work.size)
            if not got.ready:
                footer, path = reading.work.footer(got.number), self._folder.staged(reading.work, got.number)
                task = self._chunk.remote(
                    next(generator), self._tokenizer, self._settings, path, footer, got.first_record
                )
                self._tasks[task] = reading
                reading.in_flight += 1
        return reading.position - before


@dataclass(frozen=True)
class ChunkResult:
    """Result of `chunk_corpus`."""

    manifest: Manifest
    """Manifest of the chunks."""
    redone: tuple[str, ...]
    """Shards written by this run."""
    up_to_date: bool
    """True if nothing had to be done, not even the manifest."""


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
    """Make `target` hold exactly the chunks of the corpus at `source`.

    A broken file is counted, and its records before the break are used; with `strict` it is an InputError, and `target`
    is unchanged. Raises InputError when there are no articles, OutputError when `target` was made with other settings.
    Finished blocks are kept in each case.
    """
    inputs, unread = survey(source)
    shown = [] if str(source) == "sample" else unread  # its README is not the user's concern
    for one in shown[:5]:
        echo(f"chunk: not read: {one.name}: {one.reason}")
    if len(shown) > 5:
        echo(f"chunk: not read: {len(shown) - 5} more, listed in the manifest's report")
    folder = ChunkFolder(target, lambda line: echo(f"chunk: {line}"))
    folder.require_ours()
    chunks = Artefact(target, "chunks", asdict(settings))
    chunks.claim(overwrite)
    old = chunks.manifest()
    before = {} if old is None else old.report.get("stamps", {})
    stamps = {i.name: stamp_input(i, before.get(i.name)) for i in inputs}
    # Only content counts: a file that was merely copied or touched must not make later stages start over.
    contents = {n: {"sha256": s["sha256"], "size": s["size"], "limit": limit} for n, s in stamps.items()}
    done = chunks.current(contents)
    if done is not None:
        _refuse_broken_files(done.report["broken_files"], strict)
        return ChunkResult(done, (), up_to_date=True)

    works = plan_works(inputs, stamps, settings, limit)
    damaged = {} if old is None else old.damaged(target)
    ledger = folder.ledger()
    taken = {w.key: ledger[w.key] for w in works if w.key in ledger}
    intact = {w.key: folder.intact(w, taken[w.key], damaged) for w in works if w.key in taken}
    todo: list[tuple[Work, frozenset[int]]] = []
    for work in works:
        if work.key in taken:
            ready = intact[work.key] | folder.staged_blocks(work)
            if len(ready) < len(taken[work.key].parts):
                todo.append((work, ready))
        elif not folder.is_read(work):
            todo.append((work, folder.staged_blocks(work)))
    _echo_plan(works, todo, before, taken)

    connect(address)

    if todo:
        num_records = {key: entry.num_records for key, entry in taken.items()}
        for work in works:
            if work.key not in taken and folder.is_read(work):
                num_records[work.key] = folder.read_end(work)["num_records"]
        BlockChunker(folder, tokenizer, settings).run(todo, limit, num_records)

    # The old manifest's parts keep their names until the new one is written, so that a kill does not break it.
    entries = folder.assign(works, taken, () if old is None else [s.file for s in old.shards])
    broken = [file for entry in entries.values() for file in entry.read.get("broken_files", [])]
    _refuse_broken_files(broken, strict)
    folder.save_ledger(entries)
    written = _publish(folder, folder.parts(works, entries, intact))
    report = folder.report(works, entries, source)
    report["unread"] = [asdict(u) for u in unread]
    manifest = Manifest(
        kind="chunks",
        settings=asdict(settings),
        inputs=contents,
        shards=folder.shards(entries, written, old),
        rows=report["chunks"],
        source=f"{input_root(source).name}: {', '.join(report['sources'][:10])}",
        licence=licence or _licence_of(source, works),
        report={**report, "stamps": stamps, "codec": codec},
        versions=versions(),
    )
    gone = chunks.publish(manifest)
    folder.clean(works)
    if gone:
        echo(f"chunk: removed {len(gone)} shards of inputs that changed or are gone")
    return ChunkResult(manifest, tuple(s.file for s in written), up_to_date=False)


def _refuse_broken_files(broken: Sequence[Mapping[str, str]], strict: bool) -> None:
    if strict and broken:
        more = f" (and {len(broken) - 1} more files)" if len(broken) > 1 else ""
        raise InputError(
            f"{broken[0]['file']} is broken{more}: {broken[0]['reason']} (without --strict it is skipped and counted)"
        )


def _echo_plan(
    works: Sequence[Work],
    todo: Sequence[tuple[Work, frozenset[int]]],
    before: Mapping[str, Any],
    taken: Mapping[str, Entry],
) -> None:
    keep = len(works) - len(todo)
    blocks = sum(len(ready) for _, ready in todo)
    if keep or blocks:
        echo(
            f"chunk: keeping {keep} of {len(works)} inputs that are finished, and {blocks} blocks of the others"
        )
    names = {w.input.name for w in works}
    changed = [w.input.name for w, _ in todo if w.input.name in before and w.key not in taken]
    for what, which in (("changed", changed), ("removed", sorted(set(before) - names))):
        if which:
            echo(f"chunk: {what} since the last run: {', '.join(which[:5])}{' …' if len(which) > 5 else ''}")


def _publish(folder: ChunkFolder, parts: Sequence[Part]) -> list[Shard]:
    """Write the missing parts, without duplicate articles."""
    import ray

    missing = [part for part in parts if not part.there]
    if not missing:
        return []
    files = [
        (folder.path / p.file, 0) if p.there else (folder.staged(p.work, p.block), p.first_doc_id)
        for p in parts
    ]
    read = ray.remote(num_cpus=1)(first_chunks)
    groups = [files[i : i + FILES_PER_CHECK] for i in range(0, len(files), FILES_PER_CHECK)]
    ids = get([read.remote(group) for group in groups])
    dropped = duplicates_among(*(np.concatenate(arrays) for arrays in zip(*ids, strict=True)))
    publish = ray.remote(num_cpus=1)(publish_part)
    refs = []
    for p in missing:
        low, high = np.searchsorted(dropped, [p.first_doc_id, p.first_doc_id + p.num_records])
        staged, part = folder.staged(p.work, p.block), folder.path / p.file
        refs.append(publish.remote(staged, part, p.first_doc_id, dropped[low:high], p.work.footer(p.block)))
    return [get(ref) for ref in refs]


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
        str, typer.Option(help="Dump, JSON, CSV, Parquet, a folder of these or of .txt files, or sample.")
    ] = "sample",
    codec: Annotated[str, typer.Option(help="Codec whose tokenizer limits the chunks' length.")] = "mini",
    codec_path: CodecPath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N articles.")] = None,
    language: Annotated[str, typer.Option(help="Language (ISO 639-1), for sentence splitting.")] = "en",
    licence: Annotated[str | None, typer.Option(help="Licence of the text, stored in the manifest.")] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Target number of rows per shard.")] = 2048,
    overwrite: Annotated[bool, typer.Option(help="Replace chunks made with other settings.")] = False,
    strict: Annotated[bool, typer.Option(help="Fail if a file is broken.")] = False,
    address: Address = None,
) -> None:
    """Split articles into chunks; a second run redoes only what is missing or changed."""
    from lvm.codec.zoo import load_tokenizer

    started = time.perf_counter()
    tokenizer = load_tokenizer(codec, None if codec_path is None else local_folder(codec_path))
    settings = ChunkSettings(tokenizer.sha256, tokenizer.max_tokens, language, rows_per_shard)
    source = input if input == "sample" else location(input).absolute()
    result = chunk_corpus(
        source, output.absolute(), tokenizer, settings, limit, licence, codec, overwrite, address, strict
    )
    manifest, report = result.manifest, result.manifest.report
    made = sum(s.rows for s in manifest.shards if s.file in result.redone)
    if result.up_to_date:
        echo(f"chunk: {output} is up to date ({manifest.rows:,} chunks of {report['articles']:,} articles)")
    else:
        echo(
            f"chunk: {manifest.rows:,} chunks of {report['articles']:,} articles in {len(manifest.shards)} "
            f"shards, {len(result.redone)} of them new; skipped {report['broken_records']:,} broken records and "
            f"{report['duplicates']:,} duplicates"
        )
        for one in report["first_duplicates"][:1]:
            echo(f"  duplicate: {one['title']} ({one['place']})")
    broken = [] if result.up_to_date else [BrokenRecord(**b) for b in report["broken"]]
    echo_broken(broken, [BrokenRecord(f["file"], f["reason"]) for f in report["broken_files"]])
    if report["long_words"]:
        echo(f"  skipped {report['long_words']:,} words of more than {MAX_WORD:,} characters (encoded data)")
    echo(f"chunk: {report['tokens_per_word']} tokens per word with {codec}'s tokenizer")
    if report["tokens_per_letter"] > LETTER_BY_LETTER:
        echo(
            f"chunk: WARNING: {codec}'s tokenizer does not support this language: it splits the text almost letter by "
            f"letter ({report['tokens_per_letter']} tokens per letter, English takes 0.27), so a chunk holds "
            f"only {report['words'] / report['chunks']:.0f} words. Use a codec for the language (--codec-path)."
        )
    finish(
        "chunk",
        rows=manifest.rows,
        **timing(started, made),
        paths=[str(output)],
        up_to_date=result.up_to_date,
        redone=len(result.redone),
        shards=len(manifest.shards),
        articles=report["articles"],
        words=report["words"],
        mean_tokens=report["mean_tokens"],
        broken_records=report["broken_records"],
        broken_files=len(report["broken_files"]),
        unread=len(report["unread"]),
        tokens_per_word=report["tokens_per_word"],
        duplicates=report["duplicates"],
    )


if __name__ == "__main__":
    # Imported by name, so that Ray's workers import this module too and keep their chunkers between tasks.
    from jobs.chunk import main as command

    run(command)
