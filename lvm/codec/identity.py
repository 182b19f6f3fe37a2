"""What makes two vectors comparable, and the check that rejects those that are not.

The same model name in two libraries gave vectors with cosine 0.05 to each other, and every model trained
on the wrong ones was useless. So a codec's identity is computed from everything that determines its vectors,
and each artefact (shard, manifest, index, model record, reply) carries it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lvm.errors import IdentityError, InputError


@dataclass(frozen=True)
class CodecIdentity:
    """Everything that determines a text's vector."""

    name: str
    """Codec name as given to --codec; for display, not compared."""
    encoder_sha256: str
    """Hash over the encoder's tensors (names, shapes, dtypes, bytes), 64 hex digits."""
    tokenizer_sha256: str
    """Hash of tokenizer.json, 64 hex digits."""
    pooling: str
    """How token states become one vector: "mean", "bound-sum" and so on."""
    dense: bool
    """True where a Dense layer follows the pooling."""
    normalized: bool
    """True where the encoder itself ends in an L2 normalisation (its norms are all 1)."""
    max_tokens: int
    """Maximum tokens of a text, end of sequence included; the rest is truncated and counted."""
    dim: int
    """Length of a vector."""

    @property
    def digest(self) -> str:
        """16 hex digits over every field but the name; vectors are comparable if their digests are equal."""
        decisive = {k: v for k, v in asdict(self).items() if k != "name"}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.name} ({self.digest})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, plus the digest."""
        return {**asdict(self), "digest": self.digest}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "CodecIdentity":
        """The identity stored in a manifest or record. Raises InputError when a field is missing or altered."""
        names = [f.name for f in fields(cls)]
        missing = [n for n in names if n not in record]
        if missing:
            raise InputError(
                f"codec identity lacks {', '.join(missing)}; expected the fields {', '.join(names)}. "
                "Write the artefact again with this version."
            )
        identity = cls(**{n: record[n] for n in names})
        if "digest" in record and record["digest"] != identity.digest:
            raise InputError(
                f"codec identity says digest {record['digest']} but its fields give {identity.digest}; "
                "the file was edited or damaged. Write it again."
            )
        return identity


def require_same_codec(
    first: CodecIdentity, second: CodecIdentity, first_what: str, second_what: str
) -> None:
    """Return if both identities are equal, else raise IdentityError naming both and what differs."""
    if first.digest == second.digest:
        return
    differs = [
        f.name
        for f in fields(CodecIdentity)
        if f.name != "name" and getattr(first, f.name) != getattr(second, f.name)
    ]
    raise IdentityError(
        f"{first_what} holds vectors of codec {first}, {second_what} of codec {second}; "
        f"they differ in {', '.join(differs)} and cannot be combined. "
        f"Encode both with one codec."
    )
