"""What an input looked like when it was read, to see in a later run whether it changed."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from lvm.corpus.inputs import InputFile, shown, text_files
from lvm.vectors.shards import file_sha256, fingerprint

T = TypeVar("T")

EDGE_BYTES = 1 << 16
"""How much of a file's beginning and end is hashed to see whether it changed."""


def stamp_input(input_file: InputFile, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Size, time, a hash over beginning and end, and one over all of an input, as the manifest keeps them.

    before: the same input's stamp in an earlier run. Where its size, time and ends are the same, so is its
    whole content taken to be, and nothing more is read. A file that cannot be opened has a stamp of its own: it is
    read in the first run that can.
    """
    stamp = _or_reason(partial(_stamp, input_file, before))
    return stamp if isinstance(stamp, dict) else {"size": 0, "mtime_ns": 0, "edges": "", "sha256": stamp}


def _stamp(input_file: InputFile, before: Mapping[str, Any] | None) -> dict[str, Any]:
    files = text_files(input_file.path)
    stats = [f.stat() for f in files]
    stamp: dict[str, Any] = {
        "size": sum(s.st_size for s in stats),
        "mtime_ns": max((s.st_mtime_ns for s in stats), default=0),
    }
    if input_file.format == "text":
        names = [[shown(f.name), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
        stamp["edges"] = fingerprint(names)
    else:
        with input_file.path.open("rb") as file:
            edges = hashlib.sha256(file.read(EDGE_BYTES))
            file.seek(max(0, stamp["size"] - EDGE_BYTES))
            edges.update(file.read(EDGE_BYTES))
        stamp["edges"] = edges.hexdigest()[:16]
    if before is not None and all(before.get(k) == v for k, v in stamp.items()) and "sha256" in before:
        return {**stamp, "sha256": before["sha256"]}
    if input_file.format != "text":
        return {**stamp, "sha256": file_sha256(input_file.path)}
    hashes = [_or_reason(partial(file_sha256, f)) for f in files]
    if any(h.startswith(_UNREADABLE) for h in hashes):
        stamp["edges"] = ""  # a right that is given changes neither size nor time
    return {**stamp, "sha256": fingerprint([[shown(f.name), h] for f, h in zip(files, hashes, strict=True)])}


_UNREADABLE = "unreadable: "


def _or_reason(make: Callable[[], T]) -> T | str:
    """What `make` gives, or why its file cannot be read. Raises StorageError: that is no fault of the file."""
    try:
        return make()
    except OSError as err:
        return f"{_UNREADABLE}{err.strerror}"
