"""Output folders of the stages: claim one, decide whether it is up to date, publish it, clean up.

There are three kinds. Stages that write shards update a folder file by file (`Artefact`). Evaluations and sweeps write
their JSON result last, so its presence marks them as complete (`finished_result`). Index versions and model records
are folders that appear under their name when complete and never change (`lvm.storage.new_folder`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lvm.errors import InputError, OutputError
from lvm.storage import Location, remove_tree, storage_errors
from lvm.vectors.shards import (
    Manifest,
    Shard,
    as_json,
    cannot_write,
    read_footer,
    read_table,
    sweep_temporaries,
    write_json,
)


@dataclass(frozen=True)
class Artefact:
    """Shards and a manifest in a stage's folder."""

    folder: Location
    kind: str
    """Kind of the manifest: "chunks", "vectors", …"""
    settings: dict[str, Any]
    """Everything that determines the content, besides the inputs."""
    log: Callable[[str], None] = lambda line: None
    """Shows a line to the user."""

    def claim(self, overwrite: bool = False) -> None:
        """Record kind and settings in the folder, before any shard is written.

        Raises OutputError, without touching anything, if the folder belongs to other settings or another stage. With
        `overwrite`, output of other settings is deleted first, but never that of another stage.
        """
        require_folder(self.folder)
        try:
            self._require_own()
        except OutputError:
            found = self._claimed()
            if not overwrite or found is None or found[0] != self.kind:
                raise
            self._clear()
        sweep_temporaries(self.folder)
        if self._claimed() is None:
            self._write_claim()

    def manifest(self) -> Manifest | None:
        """The folder's manifest, from whatever inputs; None if there is none."""
        exists = (self.folder / "manifest.json").exists()
        return Manifest.load(self.folder, self.kind) if exists else None

    def current(self, inputs: Mapping[str, Any], deep: bool = False) -> Manifest | None:
        """The manifest if the folder is complete and was made from these inputs, else None. deep: check file hashes.

        Raises OutputError if the folder belongs to other settings or another stage.
        """
        self._require_own()
        found = self.manifest()
        if found is None or found.inputs != as_json(inputs) or found.damaged(self.folder, deep):
            return None
        return found

    def begin(self) -> dict[str, str]:
        """Delete the manifest before shards change, so that an interrupted run does not look complete.

        Returns the SHA-256 of each file that it listed, which is recorded nowhere else.
        """
        found = self.manifest()
        self._write_claim()
        (self.folder / "manifest.json").unlink(missing_ok=True)
        return {} if found is None else {s.file: s.sha256 for s in found.shards}

    def finished(self, file: str, footer: Mapping[str, Any], sha256: str | None = None) -> Shard | None:
        """The shard of this name if an earlier run completed it with this footer; None if it has to be written.

        Page checksums detect corrupt data; corruption outside the pages is detected only if `sha256`, the hash from an
        earlier manifest, is given.
        """
        path = self.folder / file
        if not path.exists():
            return None
        try:
            if read_footer(path) != footer:
                return None
            with storage_errors(path):
                contents = path.read_bytes()  # once, for both checks
            rows = read_table(path, contents=pa.py_buffer(contents)).num_rows
            found = hashlib.sha256(contents).hexdigest()
        except (InputError, OSError):
            found = "damaged"
        if found == "damaged" or sha256 not in (None, found):
            self.log(f"{path} is damaged and is written again")
            return None
        return Shard(file, rows, len(contents), found)

    def publish(self, manifest: Manifest) -> list[str]:
        """Write the manifest, then delete shards that it does not list; returns their names."""
        manifest.save(self.folder)
        sweep_temporaries(self.folder)
        listed = {s.file for s in manifest.shards}
        stale = sorted(p.name for p in self.folder.glob("part-*.parquet") if p.name not in listed)
        for name in stale:
            (self.folder / name).unlink(missing_ok=True)
        return stale

    def _write_claim(self) -> None:
        write_json(self.folder / "settings.json", {"kind": self.kind, "settings": self.settings})

    def _clear(self) -> None:
        """Delete what the stage wrote and nothing else, the manifest first."""
        for pattern in ("manifest.json", "part-*.parquet", "shards-*.parquet", "settings.json"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        remove_tree(self.folder / "_array")
        sweep_temporaries(self.folder)

    def _claimed(self) -> tuple[str, dict[str, Any]] | None:
        """Kind and settings that the folder belongs to; None if it is unclaimed."""
        for name in ("manifest.json", "settings.json"):
            try:
                record = json.loads((self.folder / name).read_bytes())
                return str(record["kind"]), dict(record["settings"])
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError) as err:
                raise OutputError(
                    f"{self.folder / name} is not readable ({err}); expected kind and settings of a stage as JSON. "
                    "Delete that file if the folder is this stage's, or choose another --output."
                ) from err
        return None

    def _require_own(self) -> None:
        found = self._claimed()
        if found is None:
            return
        if found[0] != self.kind:
            raise OutputError(
                f"{self.folder} holds {found[0]}, expected {self.kind} or an empty folder. Choose another --output."
            )
        require_same(self.folder, found[1], self.settings)


def require_same(folder: Location, made_with: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise OutputError, naming the differences, unless the folder was made with the settings `asked` for."""
    wanted = as_json(asked)
    names = [n for n in sorted({*wanted, *made_with}) if wanted.get(n) != made_with.get(n)]
    if names:
        differs = "; ".join(f"{n} was {made_with.get(n)!r}, now {wanted.get(n)!r}" for n in names)
        cure = "Choose another --output or pass --overwrite."
        raise OutputError(f"{folder} was made with other settings: {differs}. {cure}")


def finished_result(
    output: Location, file: str, settings: Mapping[str, Any], overwrite: bool = False
) -> dict[str, Any] | None:
    """Content of the JSON `file` that a job writes into `output` last; None if there is none.

    Makes the folder, to find out before the work whether it can be written. Raises OutputError if it cannot, if it is
    another stage's, or if the file is invalid or was made with other `settings`; with `overwrite`, returns None then.
    """
    require_folder(output)
    if (other := next((n for n in ("manifest.json", "CURRENT") if (output / n).exists()), None)) is not None:
        raise OutputError(f"{output} holds {other}, another stage's output; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise cannot_write(output, err) from err
    try:
        found = json.loads((output / file).read_bytes())
        require_same(output, dict(found["settings"]), settings)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OutputError) as err:
        if overwrite:
            return None
        if isinstance(err, OutputError):
            raise
        path = output / file
        raise OutputError(f"{path} is not readable ({err!r}); choose another --output or delete it") from err
    return dict(found)


def require_folder(output: Location) -> None:
    """Raise OutputError if `output` exists and is not a folder."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file, expected a folder; choose another --output")
