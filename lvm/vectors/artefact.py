"""What a stage makes, from the claim of its folder to the last cleaning; the one answer to whether it is up to date.

Shards of a stage lie in one folder that is brought up to date file by file (`Artefact`); an evaluation and a sweep are
files that one of them, written last, tells whole (`finished_result`); a version of an index and a model record are
folders that appear whole under their name and never change (`lvm.storage.new_folder`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lvm.errors import InputError, OutputError
from lvm.storage import Location, remove_tree
from lvm.vectors.shards import (
    Manifest,
    Shard,
    as_json,
    file_sha256,
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
    """Of the manifest."""
    settings: dict[str, Any]
    """All that decides the content beside the inputs."""
    tell: Callable[[str], None] = lambda line: None
    """Takes a line for the user."""

    def claim(self, overwrite: bool = False) -> None:
        """Make the folder this artefact's, before any shard is written.

        Raises OutputError when other settings made or began what it holds; nothing is touched then. With `overwrite`,
        what the other settings made is removed first; what another stage made never is.
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
        """The manifest there is, whatever it was made from; None where there is none."""
        there = (self.folder / "manifest.json").exists()
        return Manifest.load(self.folder, self.kind) if there else None

    def current(self, inputs: Mapping[str, Any], deep: bool = False) -> Manifest | None:
        """The manifest when all is there and made from these inputs; else None. deep: files are hashed.

        Raises OutputError when other settings made, or began, what the folder holds.
        """
        self._require_own()
        found = self.manifest()
        if found is None or found.inputs != as_json(inputs) or found.damaged(self.folder, deep):
            return None
        return found

    def begin(self) -> dict[str, str]:
        """Take the manifest away before shards change: a kill then leaves none of what is half redone.

        The hash of each file that it listed comes back: nothing else knows that of a whole file.
        """
        found = self.manifest()
        self._write_claim()
        (self.folder / "manifest.json").unlink(missing_ok=True)
        return {} if found is None else {s.file: s.sha256 for s in found.shards}

    def finished(self, file: str, footer: Mapping[str, Any], sha256: str | None = None) -> Shard | None:
        """The shard of this name when an earlier run made it whole and with this footer; None when it has to be made.

        Every page's checksum is read, so a flipped bit in one is found; one between the pages only with `sha256`, what
        a manifest says of the file.
        """
        path = self.folder / file
        if not path.exists():
            return None
        try:
            if read_footer(path) != footer:
                return None
            rows, found = read_table(path).num_rows, file_sha256(path)
        except InputError:
            found = "damaged"
        if found == "damaged" or sha256 not in (None, found):
            self.tell(f"{path} is damaged and is made again")
            return None
        return Shard(file, rows, path.stat().st_size, found)

    def publish(self, manifest: Manifest) -> list[str]:
        """Write the manifest, then remove what it does not list; the names of those shards."""
        manifest.save(self.folder)
        sweep_temporaries(self.folder)
        listed = {s.file for s in manifest.shards}
        gone = sorted(p.name for p in self.folder.glob("part-*.parquet") if p.name not in listed)
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)
        return gone

    def _write_claim(self) -> None:
        write_json(self.folder / "settings.json", {"kind": self.kind, "settings": self.settings})

    def _clear(self) -> None:
        """Remove what the stage wrote and nothing else; the manifest goes first."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for path in [
            *self.folder.glob("part-*.parquet"),
            *self.folder.glob("shards-*.parquet"),
            self.folder / "settings.json",
        ]:
            path.unlink(missing_ok=True)
        remove_tree(self.folder / "_array")
        sweep_temporaries(self.folder)

    def _claimed(self) -> tuple[str, dict[str, Any]] | None:
        """Kind and settings that made or began what the folder holds; None when nobody did."""
        for name in ("manifest.json", "settings.json"):
            try:
                record = json.loads((self.folder / name).read_bytes())
                return str(record["kind"]), dict(record["settings"])
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError) as err:
                raise OutputError(
                    f"{self.folder / name} is not readable ({err}); expected the record of a stage. "
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
    """Return when the folder's settings are those asked for, else raise OutputError naming those that differ."""
    wanted = as_json(asked)
    names = [n for n in sorted({*wanted, *made_with}) if wanted.get(n) != made_with.get(n)]
    if names:
        differs = "; ".join(f"{n} was {made_with.get(n)!r}, now {wanted.get(n)!r}" for n in names)
        raise OutputError(
            f"{folder} was made with other settings: {differs}. Choose another --output or pass --overwrite."
        )


def finished_result(
    output: Location, file: str, settings: Mapping[str, Any], overwrite: bool = False
) -> dict[str, Any] | None:
    """What the JSON `file`, which a job writes into `output` last, says; None where there is none.

    Raises OutputError when it is no record of such a job, or one of other `settings`; with `overwrite` that is None.
    """
    require_folder(output)
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
        raise OutputError(
            f"{output / file} is not readable ({err!r}); choose another --output or delete that file"
        ) from err
    return dict(found)


def require_folder(output: Location) -> None:
    """Return when `output` is a folder or can become one, else raise OutputError."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file, expected a folder; choose another --output")
