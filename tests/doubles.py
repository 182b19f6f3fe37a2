"""A codec and a tokenizer whose answers can be computed by hand, with the API of the real ones.

A word is a token. A word's vector is fixed by its hash, a text's vector is the sum of its words' scaled to
norm 1: texts that share words lie close, the same text always gives the same vector, in any process.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from lvm.codec.identity import CodecIdentity
from lvm.corpus.tmd import phrases
from lvm.errors import InputError
from lvm.vectors.array import write_array
from lvm.vectors.shards import CHUNK_SCHEMA, Manifest, vectors_to_table, with_footer, write_table

DIM = 768


class FakeTokenizer:
    """One token a word (a run of anything but white space), and one for the end of the text."""

    def __init__(self, max_tokens: int = 32, seed: str = "words") -> None:
        self.max_tokens = max_tokens
        self.num_special = 1
        self.sha256 = hashlib.sha256(f"fake tokenizer {seed}".encode()).hexdigest()

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(t.split()) + 1 for t in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in re.finditer(r"\S+", text)]


@lru_cache(maxsize=65_536)
def word_vector(word: str, seed: str = "", dim: int = DIM) -> np.ndarray:
    """The (dim,) float32 unit vector of one word."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {word}".encode()).digest()[:8])
    vector = np.random.default_rng(number).standard_normal(dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@dataclass(frozen=True)
class Encoded:
    vectors: np.ndarray
    norms: np.ndarray
    num_tokens: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class Decoded:
    texts: list[str]
    cosines: np.ndarray
    steps_used: np.ndarray


@dataclass(frozen=True)
class Read:
    """What became of a vector."""

    text: str
    cosine: float
    steps_used: int
    no_text: bool = False


class FakeReading:
    """Rounds of a codec that only has `decode`: all that waits is decoded at once."""

    def __init__(self, codec: "FakeCodec") -> None:
        self._codec = codec
        self._waiting: dict[int, tuple[np.ndarray, int]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def read(self, vector: np.ndarray, steps: int, leave_blends: bool) -> int:
        self._next += 1
        self._waiting[self._next] = (vector, steps)
        return self._next

    def drop(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)

    def inside(self) -> dict[int, Read]:
        return {}

    def run(self) -> dict[int, Read]:
        left = {}
        for ticket, (vector, steps) in self._waiting.items():
            decoded = self._codec.decode(vector[None], steps)
            left[ticket] = Read(decoded.texts[0], float(decoded.cosines[0]), steps)
        self._waiting.clear()
        return left


class FakeCodec:
    """Sum of word vectors in, "text of 1f3a9c2b" out. Another `seed` is another encoder."""

    decoder_digest = "fake decoder"
    supported_steps = (0, 1, 2, 3, 4, 5)
    writer = None
    no_writer = "the fake codec has no writer"

    def reading(self) -> FakeReading:
        return FakeReading(self)

    def __init__(self, seed: str = "words", max_tokens: int = 32, dim: int = DIM) -> None:
        self.seed = seed
        self.tokenizer = FakeTokenizer(max_tokens)
        self.identity = CodecIdentity(
            name="fake",
            encoder_sha256=hashlib.sha256(f"fake encoder {seed}".encode()).hexdigest(),
            tokenizer_sha256=self.tokenizer.sha256,
            pooling="sum",
            dense=False,
            normalized=False,
            max_tokens=max_tokens,
            dim=dim,
        )

    def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        limit = self.identity.max_tokens - 1
        dim = self.identity.dim
        raw = np.zeros((len(texts), dim), np.float32)
        for row, text in enumerate(texts):
            raw[row] = word_vector("</s>", self.seed, dim) + sum(
                word_vector(w.casefold(), self.seed, dim) for w in text.split()[:limit]
            )
        norms = np.linalg.norm(raw, axis=1)
        counts = np.array(self.tokenizer.count(texts), np.int32)
        return Encoded(raw / norms[:, None], norms, counts, counts > self.identity.max_tokens)

    def decode(self, vectors: np.ndarray, steps: int = 0) -> Decoded:
        # Three decimals, so that a float16 copy of a vector decodes to the same text nearly always.
        texts = [
            "text of " + hashlib.sha256((np.round(v, 3) + 0.0).astype("<f4").tobytes()).hexdigest()[:8]
            for v in np.asarray(vectors, np.float32)
        ]
        cosines = np.einsum("bd,bd->b", self.encode_chunks(texts).vectors, vectors).astype(np.float32)
        return Decoded(texts, cosines, np.full(len(texts), steps, np.int32))


def fake_codec() -> FakeCodec:
    """A codec loader for the jobs' workers."""
    return FakeCodec()


class BrokenCodec(FakeCodec):
    """Returns NaN for every text that holds the word "poison"."""

    def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        encoded = super().encode_chunks(texts)
        for row, text in enumerate(texts):
            if "poison" in text:
                encoded.vectors[row] = np.nan
        return encoded


class PhrasesOnlyCodec(FakeCodec):
    """Encodes the phrases of TMD labels and refuses every other text."""

    def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        known = {phrase for phrase, _ in phrases()}
        if others := [t for t in texts if t not in known]:
            raise InputError(f"{others[0]!r} was to be encoded, expected phrases alone")
        return super().encode_chunks(texts)


def phrases_only_codec() -> FakeCodec:
    """A codec loader with which vectors that are there can be coded and none can be made."""
    return PhrasesOnlyCodec()


def broken_codec() -> FakeCodec:
    """A codec loader whose codec gives NaN for poisoned texts."""
    return BrokenCodec()


def fake_articles(num_articles: int, num_chunks: int = 12, seed: int = 0) -> list[list[str]]:
    """Chunk texts of made-up articles: each draws on 40 words of its own, so its chunks share some."""
    random = np.random.default_rng(seed)
    articles = []
    for article in range(num_articles):
        own = [f"w{article}x{i}" for i in range(40)]
        articles.append([" ".join(random.choice(own, 12)) for _ in range(num_chunks)])
    return articles


def chunk_table(articles: Sequence[Sequence[str]], first_doc: int = 0, source: str = "double") -> pa.Table:
    """Rows of CHUNK_SCHEMA, as the chunk job writes them."""
    count = FakeTokenizer().count
    rows = [
        {
            "chunk_id": hashlib.sha256(f"{source}\0{doc}\0{position}".encode()).hexdigest()[:32],
            "doc_id": doc,
            "position": position,
            "title": f"Article {doc}",
            "text": text,
            "source": source,
            "num_tokens": count([text])[0],
        }
        for doc, chunks in enumerate(articles, first_doc)
        for position, text in enumerate(chunks)
    ]
    return pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA)


def write_chunks(
    directory: Path,
    articles: Sequence[Sequence[str]],
    articles_per_shard: int = 8,
    tokenizer: FakeTokenizer | None = None,
) -> Manifest:
    """A finished chunk job's folder. `tokenizer` may be any with `sha256` and `max_tokens`."""
    tokenizer = tokenizer or FakeTokenizer()
    shards = []
    for number, low in enumerate(range(0, len(articles), articles_per_shard)):
        table = chunk_table(articles[low : low + articles_per_shard], low)
        shards.append(write_table(directory / f"part-{number:05d}.parquet", table))
    manifest = Manifest(
        kind="chunks",
        settings={"tokenizer_sha256": tokenizer.sha256, "max_tokens": tokenizer.max_tokens},
        inputs={"articles": len(articles)},
        shards=tuple(shards),
        rows=sum(s.rows for s in shards),
        source="made up by tests/doubles.py",
        licence="CC0-1.0",
        report={"articles": len(articles)},
    )
    manifest.save(directory)
    return manifest


def write_vectors(
    directory: Path,
    articles: Sequence[Sequence[str]],
    codec: FakeCodec | None = None,
    articles_per_shard: int = 8,
) -> Manifest:
    """A finished encode job's folder, in this process and without Ray."""
    codec = codec or FakeCodec()
    shards = []
    for number, low in enumerate(range(0, len(articles), articles_per_shard)):
        table = chunk_table(articles[low : low + articles_per_shard], low)
        encoded = codec.encode_chunks(table.column("text").to_pylist())
        vectors = vectors_to_table(
            table, encoded.vectors, encoded.norms, encoded.num_tokens, encoded.truncated
        )
        footer = {"codec": codec.identity.to_dict()}
        shards.append(write_table(directory / f"part-{number:05d}.parquet", with_footer(vectors, footer)))
    manifest = Manifest(
        kind="vectors",
        settings={"codec": codec.identity.digest, "dtype": "float16"},
        inputs={"articles": len(articles)},
        shards=tuple(shards),
        rows=sum(s.rows for s in shards),
        codec=codec.identity.to_dict(),
        source="made up by tests/doubles.py",
        licence="CC0-1.0",
    )
    write_array(directory, manifest)
    manifest.save(directory)
    return manifest
