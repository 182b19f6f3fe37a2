"""Rows of the concept store: conversion from and to Arrow, and validation of text.

Rows are written with COPY in Postgres' binary format; numpy converts the vectors of a whole shard at once.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError
from lvm.vectors.shards import VectorType, require_unit_vectors, table_to_vectors, vector_schema

Storage = Literal["vector", "halfvec", "real"]
"""Column type of the vectors: pgvector's two, or real[] on a server without it."""

MAX_NAME = 200
"""Longest name of a dataset, in characters."""

COLUMNS = {
    "dataset_source": "text",  # the dataset
    "cpe_id": "uuid",  # the chunk_id of the shards, which is 32 hex digits
    "concept_text": "text",
    "concept_vec": "bytea",  # bytes in the binary form of the column's type (`wire_vectors`)
    "tmd_code": "int4",
    "tmd_confidence": "float4",
    "source": "text",
    "doc_id": "int4",
    "position": "int4",
    "title": "text",
    "num_tokens": "int4",
    "truncated": "bool",
    "norm": "float4",
    "episode": "int4",  # a coherent run of paragraphs of the article, from 0
    "coherence": "float4",  # of the episode
    "codec": "text",
}
"""Columns of an entry, with the types in which COPY sends them."""

KEPT = ("tmd_code", "tmd_confidence", "episode", "coherence")
"""Columns that shards may lack; loading the same text again then keeps the stored values."""


def require_text(value: str, what: str) -> str:
    """The text unchanged. Raises InputError if Postgres cannot store it: a NUL character or a lone surrogate."""
    if "\0" in value:
        raise InputError(
            f"{what} holds a NUL character at position {value.index(chr(0))}, which Postgres cannot store; expected "
            "text. Remove it from the source"
        )
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise InputError(
            f"{what} holds a lone surrogate at position {err.start}, which is not valid UTF-8; expected text. Remove "
            "it from the source"
        ) from err
    return value


def require_name(name: str) -> str:
    """The dataset name unchanged. Raises InputError if it is not valid."""
    require_text(name, "the name of the dataset")
    if not name.strip() or len(name) > MAX_NAME or name != name.strip():
        expected = f"1 to {MAX_NAME} characters, no space at its ends"
        raise InputError(f"--dataset is {name[:40]!r}; expected {expected}")
    return name


def wire_vectors(vectors: NDArray[Any], storage: Storage) -> list[bytes]:
    """Each row of (N, D) float vectors in the binary form of the storage type.

    Source: pgvector's src/vector.c and src/halfvec.c, `vector_recv` and `halfvec_recv` (int16 dimensions, int16 unused,
    big-endian numbers); Postgres' src/backend/utils/adt/arrayfuncs.c, `array_recv`.
    """
    rows, dim = vectors.shape
    if storage == "real":
        items = np.empty((rows, dim), [("length", ">i4"), ("value", ">f4")])
        items["length"], items["value"] = 4, vectors
        # One dimension, no nulls, element type float4 (OID 700), length, lower bound 1.
        head = np.array([1, 0, 700, dim, 1], ">i4").tobytes()
        body = items.view(np.uint8).reshape(rows, 8 * dim)
    else:
        head = np.array([dim, 0], ">i2").tobytes()
        numbers = np.ascontiguousarray(vectors, ">f4" if storage == "vector" else ">f2")
        body = numbers.view(np.uint8).reshape(rows, numbers.itemsize * dim)
    return [head + row.tobytes() for row in body]


def read_vectors(values: Sequence[bytes], storage: Storage, dim: int) -> NDArray[Any]:
    """Inverse of `wire_vectors`: (N, D), float16 for halfvec, else float32."""
    data = b"".join(values)
    if storage == "real":
        flat = np.frombuffer(data, np.uint8).reshape(len(values), 20 + 8 * dim)[:, 20:]
        items = np.ascontiguousarray(flat).view([("length", ">i4"), ("value", ">f4")])
        return np.asarray(items["value"], np.float32).reshape(len(values), dim)
    kind, width = (">f4", 4) if storage == "vector" else (">f2", 2)
    flat = np.frombuffer(data, np.uint8).reshape(len(values), 4 + width * dim)[:, 4:]
    out = np.float32 if storage == "vector" else np.float16
    return np.ascontiguousarray(flat).view(kind).astype(out)


def entries_of(
    table: pa.Table, dataset: str, identity: CodecIdentity, storage: Storage, what: str
) -> Iterator[tuple[Any, ...]]:
    """Rows to copy, in the order of `COLUMNS`, from a table in `vector_schema` that may have the columns KEPT too.

    Raises InputError naming `what` and the row: invalid UTF-8, a NUL character, an invalid id, a vector that is NaN
    or not of norm 1.
    """
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as err:
        raise InputError(f"{what} is not a valid table: {str(err).strip()}; encode it again") from err
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "vector"}
    ids = columns["chunk_id"]
    vectors = table_to_vectors(table, what)
    require_unit_vectors(vectors, identity.dim, what, ids)
    for row, chunk_id in enumerate(ids):
        try:
            valid = len(chunk_id) == 32 and bytes.fromhex(chunk_id)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise InputError(f"{what}: the chunk_id of row {row} is {chunk_id!r}; expected 32 hex digits")
    for name in ("text", "title", "source"):
        for row, value in enumerate(columns[name]):
            if value is None:
                raise InputError(f"{what}: row {row} (id {ids[row]}) has no {name}; expected text")
            if "\0" in value:
                require_text(value, f"{what}: {name} of row {row} (id {ids[row]})")
    columns |= {
        "dataset_source": [dataset] * len(ids),
        "cpe_id": [bytes.fromhex(i) for i in ids],
        "concept_text": columns["text"],
        "concept_vec": wire_vectors(vectors, storage),
        "codec": [identity.digest] * len(ids),
    }
    for name in KEPT:
        columns.setdefault(name, [None] * len(ids))
    return zip(*(columns[name] for name in COLUMNS), strict=True)


def export_schema(dim: int, dtype: VectorType) -> pa.Schema:
    """Schema of exported shards: `vector_schema` and the columns that only the store has, which may be null."""
    types = (pa.int32(), pa.float32(), pa.int32(), pa.float32())
    return pa.schema([*vector_schema(dim, dtype), *map(pa.field, KEPT, types)])


def content_hash(record: Mapping[str, Any]) -> str:
    """64 hex digits over everything that determines an article's rows: text, chunking, coding and encoding."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
