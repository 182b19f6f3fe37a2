"""The identity of a codec, and the check that rejects vectors of different codecs.

The same model name in two libraries gave vectors with cosine 0.05 to each other, and models trained on the wrong ones
were useless. So the identity is computed from everything that determines a vector, and each artefact (shard, manifest,
index, model record, reply) carries it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lvm.errors import IdentityError, InputError


@dataclass(frozen=True)
class CodecIdentity:
    """Everything that determines the vector of a text."""

    name: str
    """Codec name as given to --codec; for display, not compared."""
    encoder_sha256: str
    """Hash over the encoder's tensors (names, shapes, dtypes, bytes), 64 hex digits."""
    tokenizer_sha256: str
    """Hash of tokenizer.json, 64 hex digits."""
    pooling: str
    """How token states become one vector, such as "mean"."""
    dense: bool
    """Whether a Dense layer follows the pooling."""
    normalized: bool
    """Whether the encoder ends with L2 normalisation, so that all its norms are 1."""
    max_tokens: int
    """Maximum tokens of a text, end of sequence included; longer texts are truncated."""
    dim: int
    """Length of a vector."""

    @property
    def digest(self) -> str:
        """Hash of every field but the name, 16 hex digits; vectors are comparable if their digests are equal."""
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
    """Raise IdentityError, naming both and what differs, unless the identities have the same digest.

    first_what, second_what: what carries them, for the message.
    """
    if first.digest == second.digest:
        return
    names = [f.name for f in fields(CodecIdentity) if f.name != "name"]
    differs = [name for name in names if getattr(first, name) != getattr(second, name)]
    raise IdentityError(
        f"{first_what} holds vectors of codec {first}, {second_what} of codec {second}; they differ in "
        f"{', '.join(differs)} and cannot be combined. Encode both with one codec."
    )
