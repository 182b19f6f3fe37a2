"""What a stage makes, from the claim of its folder to the last cleaning; the one answer to whether it is up to date.

Shards of a stage lie in one folder that is brought up to date file by file (`Artefact`); a version of an index and a
model record are folders that appear whole under their name and never change (`lvm.storage.new_folder`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lvm.errors import InputError, OutputError
from lvm.storage import Location
from lvm.vectors import shards
from lvm.vectors.shards import (
    Manifest,
    Shard,
    file_sha256,
    read_footer,
    read_table,
    sweep_temporaries,
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
        """Make the folder this artefact's, before any shard is written. Raises OutputError as `shards.claim` does."""
        shards.claim(self.folder, self.kind, self.settings, overwrite)

    def manifest(self) -> Manifest | None:
        """The manifest there is, whatever it was made from; None where there is none."""
        there = (self.folder / "manifest.json").exists()
        return Manifest.load(self.folder, self.kind) if there else None

    def current(self, inputs: Mapping[str, Any], deep: bool = False) -> Manifest | None:
        """The manifest when all is there and made from these inputs; else None. deep: files are hashed.

        Raises OutputError when other settings made, or began, what the folder holds.
        """
        found = shards.find(self.folder, self.kind, self.settings, inputs)
        return None if found is None or (deep and found.damaged(self.folder, deep=True)) else found

    def begin(self) -> dict[str, str]:
        """Take the manifest away before shards change: a kill then leaves none of what is half redone.

        The hash of each file that it listed comes back: nothing else knows that of a whole file.
        """
        found = self.manifest()
        shards.begin(self.folder, self.kind, self.settings)
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


def require_folder(output: Location) -> None:
    """Return when `output` is a folder or can become one, else raise OutputError."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file, expected a folder; choose another --output")
