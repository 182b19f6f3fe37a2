"""The inputs to chunk, each with a key that changes whenever its chunks would."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvm.corpus.chunker import RULES
from lvm.corpus.inputs import InputFile, printable_name
from lvm.errors import InputError
from lvm.vectors.shards import fingerprint


@dataclass(frozen=True)
class ChunkSettings:
    """Settings that determine the chunks of a given text."""

    tokenizer_sha256: str
    """Hash of the codec's tokenizer, 64 hex digits."""
    max_tokens: int
    """Most tokens of a chunk, end of sequence included."""
    language: str = "en"
    """Language of the sentence splitter, ISO 639-1."""
    rows_per_shard: int = 2048
    """Target rows per shard; shards hold whole articles, so it is met on average."""
    rules: int = RULES
    """Version of the chunker's rules."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise InputError(f"--rows-per-shard is {self.rows_per_shard}, expected 1 or more")


@dataclass(frozen=True)
class Work:
    """The chunking of one input."""

    input: InputFile
    """What to read."""
    key: str
    """16 hex digits over content, name, settings and limit: equal key, equal chunks."""
    size: int
    """Bytes to read."""
    before: tuple[str, ...]
    """Keys of the preceding inputs."""

    def footer(self, block: int) -> dict[str, Any]:
        """A shard's origin, for its footer."""
        return {"work": self.key, "block": block, "input": self.input.name}


def plan_works(
    inputs: Sequence[InputFile],
    stamps: Mapping[str, Mapping[str, Any]],
    settings: ChunkSettings,
    limit: int | None,
) -> list[Work]:
    """One work per input, in order. With a limit, an input's key depends on the inputs before it."""
    works: list[Work] = []
    before: list[str] = []
    for input_file in inputs:
        stamp = stamps[input_file.name]
        decisive = {
            "content": stamp["sha256"],
            "names": [input_file.name, printable_name(input_file.path.resolve().name), input_file.format],
            "settings": asdict(settings),
            "limit": None if limit is None else [limit, *before],
        }
        earlier = tuple(w.key for w in works)
        works.append(Work(input_file, fingerprint(decisive), stamp["size"], earlier))
        before.append(stamp["sha256"])
    return works
