"""List the files of an input that can be read, and those that cannot with the reason; open compressed files.

    .xml                        MediaWiki export, such as pages-articles of dumps.wikimedia.org, whole or in parts
    .jsonl .json .ndjson        one object per line, or one array: id, title, text, optionally source
    .csv .tsv                   with a header row of the same names
    .parquet                    with columns of the same names
    a folder's .txt files       one article per file, titled by the file's name; ignored in a folder that
                                has files of the other formats
    sample                      the articles that come with this project

All but Parquet and .txt also as .gz, .bz2, .xz or .zst.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from lvm.errors import InputError
from lvm.storage import Location, files_below, location

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
"""Folder of the bundled articles, in a checkout."""

Format = Literal["wikipedia", "json", "csv", "parquet", "text"]
_SUFFIXES: dict[str, Format] = {
    ".xml": "wikipedia",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_PACKINGS = frozenset({".gz", ".bz2", ".xz", ".zst"})
_PAGES = re.compile(r"\.xml-p\d+p\d+[-\w]*$")
"""Ending of a part of a Wikimedia dump: the ids of its first and last page."""
_EXPECTED = (
    "a Wikipedia dump (.xml), JSON (.jsonl, .json, .ndjson), CSV (.csv, .tsv), each also as .gz, .bz2, .xz or .zst, "
    "Parquet (.parquet), a folder of these or of .txt files, or the word sample"
)

PACKING_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""Raised on truncated or damaged compressed data."""


@dataclass(frozen=True)
class InputFile:
    """What one pass of a reader takes: a file, or all text files of a folder."""

    path: Location
    """The file, or the folder of .txt files."""
    format: Format
    name: str
    """Path relative to --input: the same wherever the corpus is stored."""


@dataclass(frozen=True)
class Unread:
    """A file or folder that is not read."""

    name: str
    """Path relative to --input."""
    reason: str


def input_root(path: str | Location) -> Location:
    """The file or folder given as --input, "sample" being the bundled one. Raises InputError when it does not exist."""
    if str(path) == "sample":
        if not SAMPLE.is_dir():
            raise InputError(
                f"no bundled sample at {SAMPLE}; it comes with a checkout of the repository, not with the "
                "installed library. Run from a checkout, or give --input a corpus of your own."
            )
        return SAMPLE
    root = location(path)
    if not root.exists():
        raise InputError(f"--input {root} does not exist; expected {_EXPECTED}")
    return root


def list_inputs(path: str | Location) -> list[InputFile]:
    """Files of `path` that can be read, in order of name. Raises InputError when there are none."""
    return survey(path)[0]


def survey(path: str | Location) -> tuple[list[InputFile], list[Unread]]:
    """Files of `path` that can be read, in order of name, and those that cannot.

    Links are followed. Raises InputError when nothing can be read, naming what was found.
    """
    root = input_root(path)
    if root.is_file():
        kind = format_of(root)
        if kind is None:
            raise InputError(f"--input {root} has no known extension; expected {_EXPECTED}")
        return [InputFile(root, kind, printable_name(root.name))], []
    inputs: list[InputFile] = []
    unread: list[Unread] = []
    texts: dict[Location, str] = {}
    for file in _files(root, unread):
        inside = PurePosixPath(file.relative_to(root))  # type: ignore[arg-type]  # both of one kind
        name = printable_name(inside.as_posix())
        kind = format_of(file)
        if any(part.startswith((".", "_")) for part in inside.parts):
            if kind is not None:
                unread.append(Unread(name, "its name begins with . or _"))
        elif kind == "text":
            texts[file.parent] = printable_name((inside.parent / "*.txt").as_posix())
        elif kind is not None:
            inputs.append(InputFile(file, kind, name))
        elif "multistream-index" in inside.name:
            unread.append(Unread(name, "the index of a multistream dump"))
        else:
            unread.append(Unread(name, "its extension is not that of a supported format"))
    # Text files beside other formats are a README or licence, not a corpus.
    beside = {i.path.parent for i in inputs}
    for folder, name in texts.items():
        if folder in beside:
            unread.append(Unread(name, "text beside files of other formats"))
        else:
            inputs.append(InputFile(folder, "text", name))
    inputs.sort(key=lambda i: i.name)
    if not inputs:
        names = ", ".join(f"{u.name} ({u.reason})" for u in unread[:5])
        found = f"only {names}{' …' if len(unread) > 5 else ''}" if unread else "no files"
        raise InputError(f"--input {root} holds {found}; expected {_EXPECTED}")
    return inputs, unread


def _files(root: Location, unread: list[Unread]) -> list[Location]:
    """All files under `root`, in order of path; broken links and folders that cannot be opened go to `unread`."""
    if not isinstance(root, Path):
        return files_below(root)
    found: list[Location] = []
    seen: set[str] = set()

    def closed(err: OSError) -> None:
        unread.append(
            Unread(printable_name(os.path.relpath(err.filename, root)), f"cannot be opened: {err.strerror}")
        )

    for folder, folders, files in os.walk(root, onerror=closed, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            path = Path(folder, name)
            if path.is_file():
                found.append(path)
            else:
                why = "a broken link" if path.is_symlink() else "not a regular file"
                unread.append(Unread(printable_name(path.relative_to(root).as_posix()), why))
        for name in folders:
            path = Path(folder, name)
            if format_of(path) is not None and not any(p.is_file() for p in path.rglob("*")):
                unread.append(Unread(printable_name(path.relative_to(root).as_posix()), "an empty folder"))
    return sorted(found, key=str)


def text_files(folder: Location) -> list[Location]:
    """The .txt files directly in `folder`, in order of name."""
    if folder.is_file():
        return [folder]
    return sorted(
        (p for p in folder.iterdir() if p.suffix.lower() == ".txt" and p.name[0] not in "._" and p.is_file()),
        key=lambda p: p.name,
    )


def printable_name(name: str) -> str:
    r"""A file's name for messages and JSON, with bytes that are not UTF-8 escaped as \xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def format_of(path: Location) -> Format | None:
    """The format by a file's extension; None where it is not supported."""
    stem, ending = os.path.splitext(path.name)
    packed = ending.lower() in _PACKINGS
    if packed:
        stem, ending = os.path.splitext(stem)
    kind = _SUFFIXES.get(_PAGES.sub(".xml", ending.lower()))
    return None if packed and kind in ("parquet", "text") else kind


def stem_of(path: Location) -> str:
    """The file's name without the extensions of format and compression."""
    stem, ending = os.path.splitext(path.name)
    if ending.lower() in _PACKINGS:
        stem, ending = os.path.splitext(stem)
    known = _PAGES.sub(".xml", ending.lower()) in _SUFFIXES
    return printable_name(stem if known else path.name) or printable_name(path.name)


@contextmanager
def opened(path: Location) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's decompressed bytes, and a function that returns how many of its stored bytes were read."""
    with path.open("rb", buffering=1 << 20) as raw:
        match path.suffix.lower():
            case ".gz":
                unpacked: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
            case ".bz2":
                unpacked = cast(IO[bytes], bz2.BZ2File(raw))
            case ".xz":
                unpacked = lzma.LZMAFile(raw)  # noqa: SIM115 - closed below, as the others
            case ".zst":
                unpacked = cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, zstd.ZstdFile(raw)), 1 << 20))
            case _:
                unpacked = raw
        with unpacked:
            yield unpacked, raw.tell


def damaged(path: Location, size: int, place: str, err: Exception) -> InputError:
    """The error for a compressed file that is damaged at byte `size`."""
    what = "is truncated" if isinstance(err, EOFError) else f"cannot be decompressed ({err})"
    return InputError(
        f"{printable_name(str(path))} {what}: expected a complete {path.suffix} file, damaged at byte {size:,} of "
        f"{path.stat().st_size:,}, last read: {place}. Download the file again; finished work is kept."
    )
