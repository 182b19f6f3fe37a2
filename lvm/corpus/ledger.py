"""The folder of chunks: parts and article numbers assigned to each input, and what remains to be done.

ledger.json                 parts and article numbers of each input
_work/KEY/block-*.parquet   staged blocks of an input that is not yet in the ledger
_work/KEY/done.json         the reader's counts; written when all blocks of the input are staged
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvm.corpus.blocks import InputEnd
from lvm.corpus.counts import Counts
from lvm.corpus.work import Work
from lvm.errors import InputError, OutputError
from lvm.storage import Location, remove_tree
from lvm.vectors.shards import Manifest, Shard, file_sha256, read_footer, write_json

MAX_DOC_ID = 2**31 - 1

_WORK = "_work"


@dataclass(frozen=True)
class Entry:
    """The ledger's entry for one input."""

    name: str
    """Path relative to --input."""
    first_doc_id: int
    """doc_id of its first record."""
    num_records: int
    """Records read; each takes an article number, whether or not it became an article."""
    parts: list[str | None]
    """Shard of each block, in order; None for a block without chunks."""
    read: dict[str, Any]
    """The reader's Counts: records that were skipped or too broken to reach a block."""


@dataclass(frozen=True)
class Part:
    """A shard that a block is written to."""

    work: Work
    block: int
    """Index of the block in its input."""
    file: str
    """Name in the folder."""
    first_doc_id: int
    """doc_id of the input's first record."""
    num_records: int
    """Of the input."""
    there: bool
    """True where it is already written."""


class ChunkFolder:
    """The output folder of `latent chunk`. log: prints a line for the user."""

    def __init__(self, path: Location, log: Callable[[str], None]) -> None:
        self.path, self._log = path, log

    def require_ours(self) -> None:
        """Raise OutputError where the folder holds shards that `latent chunk` did not write."""
        known = ("manifest.json", "settings.json", "ledger.json")
        foreign = sorted(p.name for p in self.path.glob("part-*.parquet"))
        if foreign and not any((self.path / n).exists() for n in known):
            raise OutputError(
                f"{self.path} holds {foreign[0]} but no record of this job; expected an empty folder "
                "or one of `latent chunk`. Choose another --output."
            )

    def ledger(self) -> dict[str, Entry]:
        """Entries by key of their work; empty where there is no ledger or it cannot be read."""
        try:
            record = json.loads((self.path / "ledger.json").read_bytes())
            return {key: Entry(**entry) for key, entry in record.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as err:
            self._log(f"{self.path / 'ledger.json'} cannot be read ({err}); all inputs are chunked again")
            return {}

    def save_ledger(self, entries: Mapping[str, Entry]) -> None:
        """Write the ledger atomically."""
        write_json(self.path / "ledger.json", {key: asdict(entry) for key, entry in entries.items()})

    # ------------------------------------------------------------------------------------ staged blocks

    def staged(self, work: Work, block: int) -> Location:
        """File of a block until all inputs are read."""
        return self.path / _WORK / work.key / f"block-{block:05d}.parquet"

    def staged_blocks(self, work: Work) -> frozenset[int]:
        """Indices of the input's staged blocks."""
        files = (self.path / _WORK / work.key).glob("block-*.parquet")
        return frozenset(int(p.stem.removeprefix("block-")) for p in files)

    def _done_file(self, work: Work) -> Location:
        return self.path / _WORK / work.key / "done.json"

    def is_read(self, work: Work) -> bool:
        """True when all blocks of the input are staged."""
        return self._done_file(work).exists()

    def save_end(self, work: Work, num_blocks: int, end: InputEnd) -> None:
        """Record that all blocks of the input are staged."""
        read = {"num_records": end.num_records, "num_blocks": num_blocks, "read": asdict(end.counts)}
        write_json(self._done_file(work), read)

    def read_end(self, work: Work) -> dict[str, Any]:
        """The record that `save_end` wrote."""
        record: dict[str, Any] = json.loads(self._done_file(work).read_bytes())
        return record

    # ------------------------------------------------------------------------------------- parts

    def intact(self, work: Work, entry: Entry, damaged: Mapping[str, str]) -> frozenset[int]:
        """Blocks of a ledger entry that need no work: their part exists, is undamaged and was made by this work."""
        good = set()
        for block, part in enumerate(entry.parts):
            if part is None:
                good.add(block)
            elif part not in damaged and (self.path / part).exists():
                try:
                    footer = read_footer(self.path / part)
                except InputError as err:
                    self._log(str(err))
                    continue
                if (footer.get("work"), footer.get("block")) == (work.key, block):
                    good.add(block)
        return frozenset(good)

    def assign(
        self, works: Sequence[Work], taken: Mapping[str, Entry], names: Sequence[str]
    ) -> dict[str, Entry]:
        """`taken`, and for each other work, in order, an entry with the next free article numbers and part names.

        names: parts that must not be overwritten. Raises InputError when the article numbers run out.
        """
        next_doc = max((e.first_doc_id + e.num_records for e in taken.values()), default=0)
        used = [*names, *(p for e in taken.values() for p in e.parts if p is not None)]
        next_part = max((int(p.removeprefix("part-").removesuffix(".parquet")) for p in used), default=-1) + 1
        entries = dict(taken)
        for work in works:
            if work.key in taken:
                continue
            end = self.read_end(work)
            parts: list[str | None] = []
            for block in range(end["num_blocks"]):
                rows = read_footer(self.staged(work, block))["counts"]["chunks"]
                parts.append(f"part-{next_part:05d}.parquet" if rows else None)
                next_part += bool(rows)
            entries[work.key] = Entry(work.input.name, next_doc, end["num_records"], parts, end["read"])
            next_doc += end["num_records"]
        if next_doc - 1 > MAX_DOC_ID:
            raise InputError(
                f"the inputs hold {next_doc:,} records, expected article numbers up to {MAX_DOC_ID:,}; "
                "split the corpus and chunk it into several folders"
            )
        return entries

    def parts(
        self, works: Sequence[Work], entries: Mapping[str, Entry], intact: Mapping[str, frozenset[int]]
    ) -> list[Part]:
        """The folder's parts, in order of inputs and blocks. intact: by key of a work, its blocks that are written."""
        return [
            Part(work, block, part, entry.first_doc_id, entry.num_records, block in intact.get(work.key, ()))
            for work in works
            for entry in [entries[work.key]]
            for block, part in enumerate(entry.parts)
            if part is not None
        ]

    def shards(
        self, entries: Mapping[str, Entry], written: Sequence[Shard], old: Manifest | None
    ) -> tuple[Shard, ...]:
        """The shards with rows, in order of name and thereby of article numbers."""
        known = {s.file: s for s in [*(old.shards if old else ()), *written]}
        shards = []
        for part in sorted(p for e in entries.values() for p in e.parts if p is not None):
            path = self.path / part
            rows = self._counts(part).chunks
            if rows:  # all articles of a block may be duplicates
                shards.append(known.get(part) or Shard(part, rows, path.stat().st_size, file_sha256(path)))
        return tuple(shards)

    def _counts(self, part: str) -> Counts:
        return Counts(**read_footer(self.path / part)["counts"])

    def report(self, works: Sequence[Work], entries: Mapping[str, Entry], source: object) -> dict[str, Any]:
        """Counts in all and by input. Raises InputError when `source` held no article."""
        total = Counts()
        inputs: dict[str, Any] = {}
        for work in works:
            entry = entries[work.key]
            counts = Counts(**entry.read)
            for part in entry.parts:
                if part is not None:
                    counts.add(self._counts(part))
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
                f"broken, {sum(total.skipped.values())} records are not articles{first}. Expected at least one article "
                "with text."
            )
        return {**total.to_report(), "inputs": inputs}

    def clean(self, works: Sequence[Work]) -> None:
        """After the manifest is published, remove staged blocks and the entries of inputs that no longer exist."""
        keys = {w.key for w in works}
        self.save_ledger({k: e for k, e in self.ledger().items() if k in keys})
        remove_tree(self.path / _WORK)
