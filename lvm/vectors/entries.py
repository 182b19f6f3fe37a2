"""Rows of the concept store: what Postgres can hold, and vectors in its binary form.

A COPY in Postgres' binary format takes each value as its type receives it, so vectors go over as bytes that numpy makes
for a whole shard at once.
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
    "concept_vec": "bytea",  # the column's own type; the wire form of it is made here
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
"""Column of an entry to the type it is copied in as."""

KEPT = ("tmd_code", "tmd_confidence", "episode", "coherence")
"""What shards may lack; a load of the same text leaves it as it is."""


def require_text(value: str, what: str) -> str:
    """The text, where Postgres can hold it. Raises InputError on a NUL character or a lone surrogate."""
    if "\0" in value:
        raise InputError(
            f"{what} holds a NUL character at place {value.index(chr(0))}, which no Postgres text can hold; expected "
            "text. Take it out of the source"
        )
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise InputError(
            f"{what} holds a lone surrogate at place {err.start}, which is no UTF-8; expected text. Take it out of "
            "the source"
        ) from err
    return value


def require_name(name: str) -> str:
    """The name of a dataset, where it is one. Raises InputError."""
    require_text(name, "the name of the dataset")
    if not name.strip() or len(name) > MAX_NAME or name != name.strip():
        raise InputError(
            f"--dataset is {name[:40]!r}; expected 1 to {MAX_NAME} characters, no space at its ends"
        )
    return name


def wire_vectors(vectors: NDArray[Any], storage: Storage) -> list[bytes]:
    """Each row of (N, D) float vectors as Postgres' binary form of the storage's type.

    Source: pgvector's src/vector.c and src/halfvec.c, `vector_recv` and `halfvec_recv` (int16 dimensions, int16 unused,
    numbers big-endian); Postgres' src/backend/utils/adt/arrayfuncs.c, `array_recv`.
    """
    rows, dim = vectors.shape
    if storage == "real":
        items = np.empty((rows, dim), [("length", ">i4"), ("value", ">f4")])
        items["length"], items["value"] = 4, vectors
        head = np.array(
            [1, 0, 700, dim, 1], ">i4"
        ).tobytes()  # one dimension, no nulls, float4, its size, from 1
        body = items.view(np.uint8).reshape(rows, 8 * dim)
    else:
        head = np.array([dim, 0], ">i2").tobytes()
        numbers = np.ascontiguousarray(vectors, ">f4" if storage == "vector" else ">f2")
        body = numbers.view(np.uint8).reshape(rows, numbers.itemsize * dim)
    return [head + row.tobytes() for row in body]


def read_vectors(values: Sequence[bytes], storage: Storage, dim: int) -> NDArray[Any]:
    """(N, D) of what `wire_vectors` makes, float16 from halfvec, else float32."""
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
    """Rows to copy, in the order of `COLUMNS`, of a table in `vector_schema`; its optional columns may be there.

    Raises InputError naming `what` and the row: a text that is no UTF-8 or holds NUL, an id that is none, a vector
    that is NaN or not of norm 1.
    """
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as err:
        raise InputError(f"{what} is no sound table: {str(err).strip()}; encode it again") from err
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "vector"}
    ids = columns["chunk_id"]
    vectors = table_to_vectors(table, what)
    require_unit_vectors(vectors, identity.dim, what, ids)
    for row, chunk_id in enumerate(ids):
        try:
            known = len(chunk_id) == 32 and bytes.fromhex(chunk_id)
        except (TypeError, ValueError):
            known = False
        if not known:
            raise InputError(f"{what}: the chunk_id of row {row} is {chunk_id!r}; expected 32 hex digits")
    for name in ("text", "title", "source"):
        for row, value in enumerate(columns[name]):
            if value is None:
                raise InputError(f"{what}: row {row} (id {ids[row]}) has no {name}; expected text")
            if "\0" in value:
                require_text(value, f"{what}: {name} of row {row} (id {ids[row]})")
    nothing = [None] * len(ids)
    given = [columns.get(name, nothing) for name in KEPT]
    return zip(
        [dataset] * len(ids),
        [bytes.fromhex(i) for i in ids],
        columns["text"],
        wire_vectors(vectors, storage),
        given[0],
        given[1],
        columns["source"],
        columns["doc_id"],
        columns["position"],
        columns["title"],
        columns["num_tokens"],
        columns["truncated"],
        columns["norm"],
        given[2],
        given[3],
        [identity.digest] * len(ids),
        strict=True,
    )


def export_schema(dim: int, dtype: VectorType) -> pa.Schema:
    """Of exported shards: `vector_schema`, and after it what only the store knows; null where it does not."""
    extra = [
        pa.field("tmd_code", pa.int32()),
        pa.field("tmd_confidence", pa.float32()),
        pa.field("episode", pa.int32()),
        pa.field("coherence", pa.float32()),
    ]
    return pa.schema([*vector_schema(dim, dtype), *extra])


def content_hash(record: Mapping[str, Any]) -> str:
    """64 hex digits over all that decides an article's rows: its text, how it is cut, coded and encoded."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
