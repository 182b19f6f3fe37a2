"""Paths on a disk and on object storage (s3://, gs://), with one interface for both.

A `Location` is a `pathlib.Path` or a `RemotePath`, which has the part of pathlib's interface that the stages use, over
pyarrow's filesystems. Three things differ, and this is where they are dealt with:

- There is no rename. An object appears whole when its upload ends, so publishing a file is the upload itself, and what
  says that a folder is complete (a manifest, an alias, CURRENT) is written last, as on a disk.
- Nothing can be memory-mapped. Such files are fetched into a folder of this machine, by their SHA-256 (`fetch`).
- There are no folders: `mkdir` does nothing, and a folder is there while something lies in it (pyarrow leaves an empty
  mark where the last file was deleted).

Credentials come from where AWS's and Google's own tools have them, never from the URL. AWS_ENDPOINT_URL names another
server that speaks S3; a query does so for one URL: s3://bucket/key?endpoint_override=127.0.0.1:9000&scheme=http.

Why not universal-pathlib: its S3 (s3fs 2026.9) wants a botocore older than boto3's, and its files, over pyarrow's
filesystems too, publish what was written so far when a write breaks off.
"""

import fnmatch
import functools
import hashlib
import io
import os
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
"""Kinds of object storage, as they stand before ://."""

BUFFER_BYTES = 8 << 20
"""Bytes of one request when a file is read through; S3 answers one in about 50 ms however small it is."""


class RemoteStat(NamedTuple):
    """What `stat` knows of an object, named as `os.stat_result` names it."""

    st_size: int
    """Bytes."""
    st_mtime_ns: int
    """Time of the upload."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder on object storage; `location` makes one of a URL. Travels to workers as it is."""

    scheme: str
    """One of SCHEMES."""
    inside: PurePosixPath
    """Bucket and path."""
    query: str = ""
    """Of the URL."""

    # ---- names, as pathlib has them

    def __str__(self) -> str:
        return f"{self.scheme}://{self.inside}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, inside: str | PurePosixPath) -> "RemotePath":
        return self._at(self.inside / inside)

    def _at(self, key: PurePosixPath) -> "RemotePath":
        return replace(self, inside=key)

    @property
    def name(self) -> str:
        """The last part; of a bucket, its name."""
        return self.inside.name

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return self.inside.stem

    @property
    def suffix(self) -> str:
        """The last ending with its dot, "" where there is none."""
        return self.inside.suffix

    @property
    def suffixes(self) -> list[str]:
        """All endings."""
        return self.inside.suffixes

    @property
    def parent(self) -> "RemotePath":
        """The folder it lies in; a bucket's is itself."""
        return self if len(self.inside.parts) == 1 else self._at(self.inside.parent)

    def with_name(self, name: str) -> "RemotePath":
        """Another file of the same folder."""
        return self._at(self.inside.with_name(name))

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        """The path inside `folder`."""
        return self.inside.relative_to(folder.inside)

    def resolve(self) -> "RemotePath":
        """Itself: a URL depends on no current folder."""
        return self

    absolute = resolve

    # ---- what is there

    @property
    def filesystem(self) -> Any:
        """The pyarrow filesystem it lies on; `key` is its path there."""
        with storage_errors(self):
            return _filesystem(self.scheme, self.inside.parts[0], self.query)

    @property
    def key(self) -> str:
        """Bucket and path, as pyarrow's filesystem takes it."""
        return str(self.inside)

    def _info(self) -> Any:
        with storage_errors(self):
            return self.filesystem.get_file_info(self.key)

    def exists(self) -> bool:
        """True for an object, and for a folder with something in it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """True for an object."""
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        """True where objects lie below."""
        return str(self._info().type.name) == "Directory"

    def stat(self) -> RemoteStat:
        """Size and time. Raises FileNotFoundError where there is no object."""
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(2, "no such object", str(self))
        return RemoteStat(int(info.size), int(info.mtime_ns or 0))

    def iterdir(self) -> Iterator["RemotePath"]:
        """What lies right inside, in no order; nothing where there is no such folder."""
        return (self._at(PurePosixPath(i.path)) for i in _list(self, deep=False))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What matches inside; * stands for any part of one name."""
        wanted = PurePosixPath(pattern).parts
        for info in _list(self, deep=len(wanted) > 1):
            path = PurePosixPath(info.path)
            parts = path.relative_to(self.inside).parts
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield self._at(path)

    # ---- contents

    def open(self, mode: str = "rb", buffering: int = BUFFER_BYTES) -> io.BufferedReader:
        """The object's bytes, for reading; each request asks for `buffering` of them."""
        if mode != "rb":
            raise InputError(
                f"{self} was to be opened with mode {mode!r}; an object is written whole, by write_bytes"
            )
        with storage_errors(self):
            file = self.filesystem.open_input_file(self.key)
        return io.BufferedReader(_RawObject(self, file), max(buffering, 1 << 16))

    def read_bytes(self) -> bytes:
        """All of the object. Raises FileNotFoundError where there is none."""
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of the object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Put an object there, whole; readers see the old one until then. The number of bytes."""
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
"""A path on this machine's disks or on object storage."""


def location(text: str | Location) -> Location:
    """The place that a path or URL names. Raises InputError on another scheme, no bucket, or credentials in the URL."""
    if isinstance(text, Path | RemotePath):
        return text
    if "://" not in text:
        return Path(text)
    if text.startswith("file:///"):
        return Path(text.removeprefix("file://"))
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise InputError(f"{text}: expected a path, or {' or '.join(f'{s}://bucket/…' for s in SCHEMES)}")
    if "@" in parts.netloc:
        raise InputError(
            f"{parts.scheme}://…@{parts.netloc.split('@')[-1]}{parts.path} holds credentials, which would stand in "
            "manifests and logs; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
        )
    return RemotePath(parts.scheme, PurePosixPath(parts.netloc) / parts.path.strip("/"), parts.query)


class _RawObject(io.RawIOBase):
    """A pyarrow file as Python's buffered readers want it."""

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
    """What goes wrong on the way to object storage, as StorageError in one line; an absent object stays one, and what
    goes wrong on a disk is passed on."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as err:
        if isinstance(path, Path):
            raise
        line = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise StorageError(
            f"{path}: {line}. Expected storage that answers and credentials it takes; what is finished is kept, "
            "run the same command again."
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
    return fs.S3FileSystem(
        region=region or "us-east-1", endpoint_override=server.netloc, scheme=server.scheme
    )


def on_arrow(path: Location) -> tuple[Any, str]:
    """The pyarrow filesystem a path lies on, and its path there."""
    from pyarrow import fs

    return (fs.LocalFileSystem(), path.as_posix()) if isinstance(path, Path) else (path.filesystem, path.key)


def _list(folder: Location, deep: bool) -> list[Any]:
    """pyarrow's FileInfo of what is right inside, or `deep`er too; nothing where there is no such folder."""
    from pyarrow import fs

    with storage_errors(folder):
        filesystem, key = on_arrow(folder)
        found = filesystem.get_file_info(fs.FileSelector(key, recursive=deep, allow_not_found=True))
    return [i for i in found if i.path.rstrip("/") != key]


# ------------------------------------------------------------------------------------------ whole folders


def files_below(folder: Location) -> list[Location]:
    """All files under `folder`, however deep, in order of path; links to folders are not followed."""
    if isinstance(folder, Path):
        return sorted(p for p in folder.rglob("*") if p.is_file())
    key = PurePosixPath(on_arrow(folder)[1])
    inside = [PurePosixPath(i.path).relative_to(key) for i in _list(folder, deep=True) if i.is_file]
    return sorted((folder / i for i in inside), key=str)


def sizes_in(folder: Location, names: list[str]) -> dict[str, int]:
    """Bytes of these files right inside `folder`, without those that are absent; from one listing."""
    found = {i.base_name: int(i.size) for i in _list(folder, deep=False) if i.is_file}
    return {name: found[name] for name in names if name in found}


def remove_tree(folder: Location) -> None:
    """Delete a folder with all in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError), storage_errors(folder):
        folder.filesystem.delete_dir(folder.key)


@contextmanager
def new_folder(target: Location) -> Iterator[Path]:
    """A folder of another name to fill for `publish_folder`: beside it, or for object storage in the cache folder; gone
    at the end."""
    temporary = temporary_name(target if isinstance(target, Path) else cache_folder() / target.name)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, target: Location, last: str) -> None:
    """Make a filled folder `target`, in one step: renamed on a disk, where it takes the place of what is there; on
    object storage uploaded, and complete with the file named `last`."""
    if isinstance(target, Path):
        sync_directory(temporary)
        remove_tree(target)
        temporary.rename(target)
        sync_directory(target.parent)
    else:
        upload_folder(temporary, target, last)


def temporary_name(path: Path) -> Path:
    """A fresh hidden name beside `path`, on the same file system so that a rename onto `path` is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut (POSIX; other systems sync on their own)."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_tree(folder: Location, target: Location) -> None:
    """Give a folder another name. On object storage its files are copied and then deleted, one by one."""
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
    """Put all of `source` there as one object; nothing appears when reading or sending breaks off."""
    with storage_errors(target):
        stream = target.filesystem.open_output_stream(target.key)
    try:
        while block := source.read(BUFFER_BYTES):
            with storage_errors(target):
                stream.write(block)
    except BaseException:
        # pyarrow has no way to give an upload up: closing it publishes what was sent so far.
        with suppress(OSError, StorageError):
            stream.close()
            target.unlink(missing_ok=True)
        raise
    with storage_errors(target):
        stream.close()


def upload_folder(source: Path, target: RemotePath, last: str) -> None:
    """Put a folder's files there; the one named `last` comes last, and with it the folder counts as complete."""
    files = sorted(p for p in source.rglob("*") if p.is_file())
    for file in sorted(files, key=lambda f: f.name == last):
        with file.open("rb") as opened:
            upload(opened, target / file.relative_to(source).as_posix())


# ------------------------------------------------------------------------------------- copies on this machine


def cache_folder() -> Path:
    """Where this machine keeps copies of remote files: LATENT_CACHE, else ~/.cache/latent. Safe to delete."""
    named = os.environ.get("LATENT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "latent"


def fetch(path: Location, sha256: str) -> Path:
    """A local file with this object's bytes, fetched once for each checksum; a local path comes back as it is.

    Raises InputError when the object's bytes have another checksum.
    """
    if isinstance(path, Path):
        return path
    target = fetched(sha256, path.suffix)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    digest = hashlib.sha256()
    try:
        with path.open() as source, temporary.open("wb") as copy:
            while block := source.read(BUFFER_BYTES):
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"{path} has SHA-256 {digest.hexdigest()[:16]}…, expected {sha256[:16]}…: it changed or was damaged. "
                "Run the stage that writes it again."
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def fetched(sha256: str, suffix: str) -> Path:
    """Where `fetch` keeps an object with this checksum and ending."""
    return cache_folder() / "files" / sha256[:2] / f"{sha256}{suffix}"


def local_folder(folder: Location) -> Path:
    """A local folder with the same files; a local one comes back as it is. For what opens files by name itself.

    Fetched again when a file's size or time has changed. Raises InputError where there is nothing.
    """
    if isinstance(folder, Path):
        return folder
    found = [i for i in _list(folder, deep=True) if i.is_file]
    if not found:
        raise InputError(f"nothing lies in {folder}; expected a folder with files")
    state = "\n".join(f"{i.path} {i.size} {i.mtime_ns}" for i in sorted(found, key=lambda i: i.path))
    target = (
        cache_folder()
        / "folders"
        / hashlib.sha256(f"{folder}\n{state}".encode()).hexdigest()[:32]
        / folder.name
    )
    if target.exists():
        return target
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        for info in found:
            source = folder._at(PurePosixPath(info.path))
            copy = temporary / source.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _download(source, copy)
        with suppress(OSError):  # another process was first: its copy is as good
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _download(source: RemotePath, target: Path) -> None:
    with source.open() as opened, target.open("wb") as file:
        shutil.copyfileobj(opened, file, BUFFER_BYTES)


@contextmanager
def local_input(path: Location) -> Iterator[Path]:
    """A local file with the bytes of `path`, for what opens files itself; a copy goes when the block ends."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="latent-") as folder:
        copy = Path(folder, path.name)
        _download(path, copy)
        yield copy


@contextmanager
def local_folder_for(folder: Location) -> Iterator[Path]:
    """A local folder to write into for `folder`; its files go to object storage when the block ends, however."""
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
    """A local file to write for `path`; where that is on object storage, it is put there when the block ends well."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="latent-") as folder:
        yield Path(folder, path.name)
        with Path(folder, path.name).open("rb") as file:
            upload(file, path)
