"""Paths on local disks and on object storage (s3://, gs://), with one interface for both.

A `Location` is a `pathlib.Path` or a `RemotePath`, which implements the subset of pathlib used here on top of pyarrow's
filesystems. Object storage differs in three ways:

- There is no rename. An object becomes visible when its upload completes, so uploading a file publishes it. The file
  that marks a folder as complete (a manifest, the aliases, CURRENT) is written last, as on disk.
- Objects cannot be memory-mapped. `fetch` downloads them into a local cache, by SHA-256.
- There are no folders: `mkdir` does nothing, and a folder exists while it contains something (pyarrow leaves an empty
  marker object when the last file is deleted).

Credentials are looked up as AWS's and Google's own tools do, never in the URL. AWS_ENDPOINT_URL selects another
S3-compatible server; for one URL, a query does: s3://bucket/key?endpoint_override=127.0.0.1:9000&scheme=http.

Why not universal-pathlib: its S3 backend (s3fs 2026.9) needs an older botocore than boto3 does, and when a write fails
it publishes the part written so far, over pyarrow's filesystems too.
"""

import fnmatch
import functools
import hashlib
import io
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from lvm.errors import InputError, StorageError

SCHEMES = ("s3", "gs")
"""URL schemes of object storage."""

BUFFER_BYTES = 8 << 20
"""Bytes per request when a file is read sequentially; S3 takes about 50 ms per request, however small."""


class RemoteStat(NamedTuple):
    """Size and time of an object, with the field names of `os.stat_result`."""

    st_size: int
    """Bytes."""
    st_mtime_ns: int
    """Upload time."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder on object storage; made by `location`. Can be pickled."""

    scheme: str
    """One of SCHEMES."""
    inside: PurePosixPath
    """Bucket and path."""
    query: str = ""
    """Query string of the URL."""

    # ---- names, as in pathlib

    def __str__(self) -> str:
        return f"{self.scheme}://{self.inside}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, inside: str | PurePosixPath) -> "RemotePath":
        return self._at(self.inside / inside)

    def _at(self, key: PurePosixPath) -> "RemotePath":
        return replace(self, inside=key)

    @property
    def name(self) -> str:
        """The last part of the path; for a bucket, its name."""
        return self.inside.name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.inside.stem

    @property
    def suffix(self) -> str:
        """The suffix with its dot, or ""."""
        return self.inside.suffix

    @property
    def parent(self) -> "RemotePath":
        """The containing folder; a bucket is its own parent."""
        return self if len(self.inside.parts) == 1 else self._at(self.inside.parent)

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        """The path inside `folder`."""
        return self.inside.relative_to(folder.inside)

    def resolve(self) -> "RemotePath":
        """Itself: a URL is always absolute."""
        return self

    absolute = resolve

    # ---- queries

    @property
    def filesystem(self) -> Any:
        """Its pyarrow filesystem; `key` is the path there."""
        with storage_errors(self):
            return _filesystem(self.scheme, self.inside.parts[0], self.query)

    @property
    def key(self) -> str:
        """Bucket and path, for pyarrow."""
        return str(self.inside)

    def _info(self) -> Any:
        with storage_errors(self):
            return self.filesystem.get_file_info(self.key)

    def exists(self) -> bool:
        """True for an object, and for a folder that contains one."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """True for an object."""
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        """True for a folder that contains an object."""
        return str(self._info().type.name) == "Directory"

    def stat(self) -> RemoteStat:
        """Size and upload time. Raises FileNotFoundError if there is no such object."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(2, "no such object", str(self))
        return RemoteStat(int(info.size), int(info.mtime_ns or 0))

    def iterdir(self) -> Iterator["RemotePath"]:
        """Direct children, in any order; none if there is no such folder."""
        return (self._at(PurePosixPath(i.path)) for i in _list(self, deep=False))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Paths inside that match; * does not match a slash, and ** is not supported."""
        wanted = PurePosixPath(pattern).parts
        for info in _list(self, deep=len(wanted) > 1):
            path = PurePosixPath(info.path)
            parts = path.relative_to(self.inside).parts
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield self._at(path)

    # ---- reading and writing

    def open(self, mode: str = "rb", buffering: int = BUFFER_BYTES) -> io.BufferedReader:
        """A binary reader that requests `buffering` bytes at a time."""
        if mode != "rb":
            raise InputError(f"cannot open {self} with mode {mode!r}, expected 'rb'; write with write_bytes")
        with storage_errors(self):
            file = self.filesystem.open_input_file(self.key)
        return io.BufferedReader(_RawObject(self, file), max(buffering, 1 << 16))

    def read_bytes(self) -> bytes:
        """The object's content. Raises FileNotFoundError if there is no such object."""
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object's content as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Write the object atomically; returns the number of bytes."""
        upload(io.BytesIO(data), self)
        return len(data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            with storage_errors(self):
                self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: object storage has no folders."""


Location = Path | RemotePath
"""A path on a local disk or on object storage."""


def location(text: str | Location) -> Location:
    """Parse a path or URL. Raises InputError on an unknown scheme, a missing bucket, or credentials in the URL."""
    if isinstance(text, Path | RemotePath):
        return text
    if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > 4000:
        raise InputError(
            f"got {text!r:.100} as a path; expected a name, such as out/mine (. is the current folder)"
        )
    if "://" not in text:
        return Path(text)
    if text.startswith("file:///"):
        return Path(text.removeprefix("file://"))
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise InputError(f"{text}: expected a path, or {' or '.join(f'{s}://bucket/…' for s in SCHEMES)}")
    if "@" in parts.netloc:
        raise InputError(
            f"{parts.scheme}://…@{parts.netloc.split('@')[-1]}{parts.path} holds credentials, which would end up in "
            "manifests and logs; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
        )
    return RemotePath(parts.scheme, PurePosixPath(parts.netloc) / parts.path.strip("/"), parts.query)


def plain_name(what: str, name: object) -> str:
    """`name`, if a file or folder can have it in any folder. Raises InputError."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+=@-]{0,199}", name):
        raise InputError(
            f"{what} is {name!r:.100}; expected a plain name such as best: letters, digits, . _ -"
        )
    return name


class _RawObject(io.RawIOBase):
    """Adapter from a pyarrow file to Python's raw file interface."""

    def __init__(self, path: RemotePath, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._path):
            return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def storage_errors(path: Location) -> Iterator[None]:
    """Raise an OSError of object storage as StorageError; FileNotFoundError and errors of local paths pass through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as err:
        if isinstance(path, Path):
            raise
        line = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise StorageError(
            f"{path}: {line}. Expected reachable storage and valid credentials; finished work is kept, so run the "
            "same command again."
        ) from err


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, query: str) -> Any:
    from pyarrow import fs

    if scheme != "s3" or query:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}/" + (f"?{query}" if query else ""))[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint is None:
        return fs.S3FileSystem(region=region or fs.resolve_s3_region(bucket))
    server = urlsplit(endpoint)
    region = region or "us-east-1"
    return fs.S3FileSystem(region=region, endpoint_override=server.netloc, scheme=server.scheme)


def on_arrow(path: Location) -> tuple[Any, str]:
    """A path's pyarrow filesystem, and the path there."""
    from pyarrow import fs

    return (fs.LocalFileSystem(), path.as_posix()) if isinstance(path, Path) else (path.filesystem, path.key)


def _list(folder: Location, deep: bool) -> list[Any]:
    """pyarrow's FileInfo of direct children, with `deep` of all descendants; none if there is no such folder."""
    from pyarrow import fs

    with storage_errors(folder):
        filesystem, key = on_arrow(folder)
        found = filesystem.get_file_info(fs.FileSelector(key, recursive=deep, allow_not_found=True))
    return [i for i in found if i.path.rstrip("/") != key]


# ------------------------------------------------------------------------------------------ whole folders


def files_below(folder: Location) -> list[Location]:
    """All files under `folder`, recursively, sorted by path; symlinks to folders are not followed."""
    if isinstance(folder, Path):
        return sorted(p for p in folder.rglob("*") if p.is_file())
    key = PurePosixPath(on_arrow(folder)[1])
    inside = [PurePosixPath(i.path).relative_to(key) for i in _list(folder, deep=True) if i.is_file]
    return sorted((folder / i for i in inside), key=str)


def sizes_in(folder: Location, names: list[str]) -> dict[str, int]:
    """Bytes of each of these files directly in `folder`, from one listing; missing files are left out."""
    found = {i.base_name: int(i.size) for i in _list(folder, deep=False) if i.is_file}
    return {name: found[name] for name in names if name in found}


def remove_tree(folder: Location) -> None:
    """Delete a folder and its contents, if it exists."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError), storage_errors(folder):
        folder.filesystem.delete_dir(folder.key)


@contextmanager
def new_folder(target: Location) -> Iterator[Path]:
    """A temporary folder to fill and pass to `publish_folder`: beside `target`, or in the cache for object storage.
    Removed when the block ends."""
    temporary = temporary_name(target if isinstance(target, Path) else cache_folder() / target.name)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, target: Location, last: str) -> None:
    """Publish a filled folder as `target`. On disk: an atomic rename that replaces what was there. On object storage:
    an upload that is complete when the file named `last` is."""
    if isinstance(target, Path):
        sync_directory(temporary)
        remove_tree(target)
        temporary.rename(target)
        sync_directory(target.parent)
    else:
        upload_folder(temporary, target, last)


def temporary_name(path: Path) -> Path:
    """A new hidden name beside `path`: the same filesystem, so a rename to `path` is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power loss (POSIX; other systems need no call)."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_tree(folder: Location, target: Location) -> None:
    """Rename a folder. On object storage its files are copied one by one, then deleted."""
    if isinstance(folder, Path) or isinstance(target, Path):
        os.rename(str(folder), str(target))
        return
    for info in _list(folder, deep=True):
        inside = PurePosixPath(info.path).relative_to(folder.key)
        if info.is_file:
            with (folder / inside).open() as opened:
                upload(opened, target / inside)
    remove_tree(folder)


def upload(source: IO[bytes], target: RemotePath) -> None:
    """Upload all of `source` as one object; no object appears if reading or sending fails."""
    with storage_errors(target):
        stream = target.filesystem.open_output_stream(target.key)
    try:
        while block := source.read(BUFFER_BYTES):
            with storage_errors(target):
                stream.write(block)
    except BaseException:
        # pyarrow cannot abort an upload: closing it publishes the bytes sent so far.
        with suppress(OSError, StorageError):
            stream.close()
            target.unlink(missing_ok=True)
        raise
    with storage_errors(target):
        stream.close()


def upload_folder(source: Path, target: RemotePath, last: str) -> None:
    """Upload a folder's files; the one named `last` comes last and marks the folder as complete."""
    files = [p for p in source.rglob("*") if p.is_file()]
    for file in sorted(files, key=lambda f: (f.name == last, f)):
        with file.open("rb") as opened:
            upload(opened, target / file.relative_to(source).as_posix())


# ------------------------------------------------------------------------------------------- local copies


def cache_folder() -> Path:
    """Local cache of remote files: LATENT_CACHE, else ~/.cache/latent. Safe to delete."""
    named = os.environ.get("LATENT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "latent"


def fetch(path: Location, sha256: str) -> Path:
    """A local copy of this object, downloaded once per checksum; local paths are returned unchanged.

    Raises InputError if the object's content has another checksum.
    """
    if isinstance(path, Path):
        return path
    target = fetched(sha256, path.suffix)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    digest = hashlib.sha256()
    try:
        with path.open() as source, temporary.open("wb") as copy:
            while block := source.read(BUFFER_BYTES):
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"{path} has SHA-256 {digest.hexdigest()[:16]}…, expected {sha256[:16]}…: it changed or is damaged. "
                "Run the stage that writes it again."
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def fetched(sha256: str, suffix: str) -> Path:
    """Where `fetch` keeps an object with this checksum and suffix."""
    return cache_folder() / "files" / sha256[:2] / f"{sha256}{suffix}"


def local_folder(folder: Location) -> Path:
    """A local copy of a folder, for libraries that open files by name; local folders are returned unchanged.

    Downloaded again when the size or time of a file has changed. Raises InputError if there is no file in it.
    """
    if isinstance(folder, Path):
        return folder
    found = [i for i in _list(folder, deep=True) if i.is_file]
    if not found:
        raise InputError(f"{folder} is empty or missing; expected a folder with files")
    state = "\n".join(f"{i.path} {i.size} {i.mtime_ns}" for i in sorted(found, key=lambda i: i.path))
    key = hashlib.sha256(f"{folder}\n{state}".encode()).hexdigest()[:32]
    target = cache_folder() / "folders" / key / folder.name
    if target.exists():
        return target
    temporary = temporary_name(target)
    try:
        for info in found:
            source = folder._at(PurePosixPath(info.path))
            copy = temporary / source.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _download(source, copy)
        with suppress(OSError):  # another process was faster: use its copy
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _download(source: RemotePath, target: Path) -> None:
    with source.open() as opened, target.open("wb") as file:
        shutil.copyfileobj(opened, file, BUFFER_BYTES)


@contextmanager
def local_input(path: Location) -> Iterator[Path]:
    """A local copy of a file, for libraries that open files by name; removed when the block ends."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="latent-") as folder:
        copy = Path(folder, path.name)
        _download(path, copy)
        yield copy


@contextmanager
def local_folder_for(folder: Location) -> Iterator[Path]:
    """A local folder to write to in place of `folder`; uploaded when the block ends, even if it raises."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="latent-") as temporary:
        try:
            yield Path(temporary)
        finally:
            upload_folder(Path(temporary), folder, last="")


@contextmanager
def local_output(path: Location) -> Iterator[Path]:
    """A local file to write in place of `path`; uploaded when the block ends without an error."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="latent-") as folder:
        yield Path(folder, path.name)
        with Path(folder, path.name).open("rb") as file:
            upload(file, path)
