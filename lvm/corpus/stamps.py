"""Stamp an input's size, time and content, so that a later run can tell whether it changed."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from lvm.corpus.inputs import InputFile, printable_name, text_files
from lvm.vectors.shards import file_sha256, fingerprint

T = TypeVar("T")

EDGE_BYTES = 1 << 16
"""Bytes at each end of a file that are hashed to tell whether it changed."""


def stamp_input(input_file: InputFile, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """An input's size, modification time, hash of both ends and hash of all its content, for the manifest.

    before: its stamp of an earlier run. Where size, time and ends are equal, the content is taken to be equal and is
    not read. A file that cannot be opened gets a stamp of its own, so that a later run that can open it reads it.
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
        names = [
            [printable_name(f.name), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)
        ]
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
        stamp["edges"] = ""  # granting permission changes neither size nor time
    return {
        **stamp,
        "sha256": fingerprint([[printable_name(f.name), h] for f, h in zip(files, hashes, strict=True)]),
    }


_UNREADABLE = "unreadable: "


def _or_reason(make: Callable[[], T]) -> T | str:
    """The result of `make`, or why its file cannot be read. StorageError, not the file's fault, is raised."""
    try:
        return make()
    except OSError as err:
        return f"{_UNREADABLE}{err.strerror}"
