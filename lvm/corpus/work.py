"""What there is to chunk: each input, and a key that says whether its chunks would come out the same."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvm.corpus.chunker import RULES
from lvm.corpus.inputs import InputFile, shown
from lvm.errors import InputError
from lvm.vectors.shards import fingerprint


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

    def footer(self, block: int) -> dict[str, Any]:
        """What a shard's footer says of its origin."""
        return {"work": self.key, "block": block, "input": self.input.name}


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
