"""Which files of an input are read, how they are unpacked, and which are not read and why.

    .xml                        MediaWiki export, as pages-articles of dumps.wikimedia.org, whole or in parts
    .jsonl .json .ndjson        one object per line, or one array: id, title, text, and source if there is one
    .csv .tsv                   with a head of the same names
    .parquet                    columns of the same names
    a folder's .txt files       one article a file, its title the file's name; in a folder with
                                files of the other kinds they are left alone
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
"""How Wikimedia ends the name of a part: the numbers of its first and last page."""
_EXPECTED = (
    "a Wikipedia dump (.xml), JSON (.jsonl, .json, .ndjson), CSV (.csv, .tsv), each also as .gz, .bz2, .xz or .zst, "
    "Parquet (.parquet), a folder of these or of .txt files, or the word sample"
)

PACKING_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""What is raised on cut or damaged packed data."""


@dataclass(frozen=True)
class InputFile:
    """One thing to read in one pass: a file, or all text files of a folder."""

    path: Location
    """The file, or the folder of .txt files."""
    format: Format
    """Which reader takes it."""
    name: str
    """Its path inside the input the user named; equal for the same corpus in another place."""


@dataclass(frozen=True)
class Unread:
    """Something in a folder that is not read."""

    name: str
    """Its path inside the input."""
    reason: str
    """Why."""


def input_root(path: str | Location) -> Location:
    """The file or folder an --input names, "sample" the bundled one. Raises InputError when it is absent."""
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
    """What `path` holds that can be read, in order of name. Raises InputError when that is nothing."""
    return survey(path)[0]


def survey(path: str | Location) -> tuple[list[InputFile], list[Unread]]:
    """What `path` holds that can be read, in order of name, and what is not read.

    Links are followed. Raises InputError when nothing can be read, saying what was found instead.
    """
    root = input_root(path)
    if root.is_file():
        kind = format_of(root)
        if kind is None:
            raise InputError(f"--input {root} has no known ending; expected {_EXPECTED}")
        return [InputFile(root, kind, shown(root.name))], []
    inputs: list[InputFile] = []
    unread: list[Unread] = []
    texts: dict[Location, str] = {}
    for file in _files(root, unread):
        inside = PurePosixPath(file.relative_to(root))  # type: ignore[arg-type]  # both of one kind
        name = shown(inside.as_posix())
        kind = format_of(file)
        if any(part.startswith((".", "_")) for part in inside.parts):
            if kind is not None:
                unread.append(Unread(name, "its name begins with . or _"))
        elif kind == "text":
            texts[file.parent] = shown((inside.parent / "*.txt").as_posix())
        elif kind is not None:
            inputs.append(InputFile(file, kind, name))
        elif "multistream-index" in inside.name:
            unread.append(Unread(name, "the index of a multistream dump"))
        else:
            unread.append(Unread(name, "its ending is of no format that is read"))
    # Text beside other formats is their README or licence, not a corpus.
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
    """All files under `root`, in order of path; links that lead nowhere and folders that do not open are named."""
    if not isinstance(root, Path):
        return files_below(root)
    found: list[Location] = []
    seen: set[str] = set()

    def closed(err: OSError) -> None:
        unread.append(Unread(shown(os.path.relpath(err.filename, root)), f"cannot be opened: {err.strerror}"))

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
                why = "a link that leads nowhere" if path.is_symlink() else "no regular file"
                unread.append(Unread(shown(path.relative_to(root).as_posix()), why))
        for name in folders:
            path = Path(folder, name)
            if format_of(path) is not None and not any(p.is_file() for p in path.rglob("*")):
                unread.append(Unread(shown(path.relative_to(root).as_posix()), "an empty folder"))
    return sorted(found, key=str)


def text_files(folder: Location) -> list[Location]:
    """The .txt files right inside `folder`, in order of name."""
    if folder.is_file():
        return [folder]
    return sorted(
        (p for p in folder.iterdir() if p.suffix.lower() == ".txt" and p.name[0] not in "._" and p.is_file()),
        key=lambda p: p.name,
    )


def shown(name: str) -> str:
    r"""A file's name as a message and JSON can hold it: bytes that are no UTF-8 as \xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def format_of(path: Location) -> Format | None:
    """The format that a file's name says; None where it is none that is read."""
    stem, ending = os.path.splitext(path.name)
    packed = ending.lower() in _PACKINGS
    if packed:
        stem, ending = os.path.splitext(stem)
    kind = _SUFFIXES.get(_PAGES.sub(".xml", ending.lower()))
    return None if packed and kind in ("parquet", "text") else kind


def stem_of(path: Location) -> str:
    """The file's name without the endings that say its format."""
    stem, ending = os.path.splitext(path.name)
    if ending.lower() in _PACKINGS:
        stem, ending = os.path.splitext(stem)
    known = _PAGES.sub(".xml", ending.lower()) in _SUFFIXES
    return shown(stem if known else path.name) or shown(path.name)


@contextmanager
def opened(path: Location) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's unpacked bytes, and a function for how many of its own bytes were read."""
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
    """The error of a packed file that breaks at byte `size`."""
    cut = isinstance(err, EOFError)
    what = "ends too early" if cut else f"cannot be unpacked ({err})"
    return InputError(
        f"{shown(str(path))} {what}: expected a whole {path.suffix} file, it breaks at byte {size:,} of "
        f"{path.stat().st_size:,}, last read: {place}. Fetch the file again; finished work is kept."
    )
