"""A stage's folder: claimed, found up to date or not, published, cleaned."""

from pathlib import Path

import pyarrow as pa
import pytest

from lvm.errors import OutputError
from lvm.storage import new_folder, publish_folder
from lvm.vectors.artefact import Artefact, finished_result
from lvm.vectors.shards import Manifest, Shard, with_footer, write_json, write_table

FOOTER = {"made": "so"}
INPUTS = {"chunks": "0123"}


def write(folder: Path, name: str = "part-00000.parquet") -> Shard:
    return write_table(folder / name, with_footer(pa.table({"text": ["one", "two"]}), FOOTER))


def manifest_of(*shards: Shard) -> Manifest:
    return Manifest("chunks", {"size": 1}, INPUTS, shards, sum(s.rows for s in shards))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def artefact(tmp_path: Path, said: list[str]) -> Artefact:
    return Artefact(tmp_path / "out", "chunks", {"size": 1}, said.append)


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_was_published_is_current_for_its_inputs_and_settings_alone(artefact: Artefact) -> None:
    artefact.claim()
    assert artefact.current(INPUTS) is None
    artefact.publish(manifest_of(write(artefact.folder)))
    assert artefact.current(INPUTS, deep=True) is not None
    assert artefact.current({"chunks": "other"}) is None
    with pytest.raises(OutputError, match="size was 1, now 2"):
        Artefact(artefact.folder, "chunks", {"size": 2}).current(INPUTS)
    flip_a_bit(artefact.folder / "part-00000.parquet", 10)
    assert artefact.current(INPUTS) is not None
    assert artefact.current(INPUTS, deep=True) is None


def test_begin_takes_the_manifest_and_gives_the_hashes_it_knew(artefact: Artefact) -> None:
    artefact.claim()
    assert artefact.begin() == {}
    shard = write(artefact.folder)
    artefact.publish(manifest_of(shard))
    assert artefact.begin() == {shard.file: shard.sha256}
    assert artefact.manifest() is None


def test_a_finished_shard_is_whole_and_has_its_footer(artefact: Artefact, said: list[str]) -> None:
    assert artefact.finished("part-00000.parquet", FOOTER) is None
    shard = write(artefact.folder)
    assert artefact.finished(shard.file, FOOTER) == shard
    assert artefact.finished(shard.file, {"made": "in another way"}) is None
    assert said == []
    assert artefact.finished(shard.file, FOOTER, sha256="0" * 64) is None
    (artefact.folder / shard.file).write_bytes((artefact.folder / shard.file).read_bytes()[:-8])
    assert artefact.finished(shard.file, FOOTER) is None
    assert said == [f"{artefact.folder / shard.file} is damaged and is written again"] * 2


def test_publishing_removes_what_the_manifest_does_not_list_and_nothing_else(artefact: Artefact) -> None:
    kept, gone = write(artefact.folder), write(artefact.folder, "part-00001.parquet")
    (artefact.folder / "notes.txt").write_text("mine")
    (artefact.folder / ".part-00002.parquet.0a.tmp").write_text("half")
    assert artefact.publish(manifest_of(kept)) == [gone.file]
    assert sorted(p.name for p in artefact.folder.iterdir()) == ["manifest.json", "notes.txt", kept.file]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "version"
    with pytest.raises(ZeroDivisionError), new_folder(target) as temporary:
        (temporary / "a").write_text(f"half {1 / 0}")
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with new_folder(target) as temporary:
            (temporary / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "first"
            publish_folder(temporary, target, last="a")
    assert (target / "a").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_a_result_is_found_with_its_settings_alone(tmp_path: Path) -> None:
    output, wanted = tmp_path / "out", {"seed": 0, "contexts": (5, 10)}
    assert finished_result(output, "sweep.json", wanted) is None
    assert output.is_dir()  # made at once: what cannot be written is not found out after hours of work
    assert finished_result(output, "sweep.json", wanted) is None
    write_json(output / "sweep.json", {"settings": wanted, "best": 1})
    assert finished_result(output, "sweep.json", wanted) == {
        "settings": {"seed": 0, "contexts": [5, 10]},
        "best": 1,
    }
    with pytest.raises(OutputError, match="seed was 0, now 1"):
        finished_result(output, "sweep.json", {**wanted, "seed": 1})
    assert finished_result(output, "sweep.json", {**wanted, "seed": 1}, overwrite=True) is None
    for broken in ("{", "[]", "{}", '{"settings": 3}'):
        (output / "sweep.json").write_text(broken)
        with pytest.raises(OutputError, match="is not readable"):
            finished_result(output, "sweep.json", wanted)
    with pytest.raises(OutputError, match="is a file"):
        finished_result(output / "sweep.json", "sweep.json", wanted)
    with pytest.raises(OutputError, match="cannot be written"):
        finished_result(Path("/proc/evaluation"), "sweep.json", wanted)
    (output / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds manifest\.json, another stage's output"):
        finished_result(output, "sweep.json", wanted)
