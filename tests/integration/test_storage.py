"""Paths on object storage, against a real S3 server on this machine; see tests/objects.py."""

import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lvm.errors import InputError, StorageError
from lvm.storage import (
    RemotePath,
    fetch,
    files_below,
    local_folder,
    local_output,
    location,
    move_tree,
    remove_tree,
    sizes_in,
    upload,
    upload_folder,
)
from lvm.vectors.array import array_folder, open_vectors, write_array
from lvm.vectors.index import build_index, find_index, load_index
from lvm.vectors.sequences import make_windows
from lvm.vectors.shards import Manifest, file_sha256, read_table, write_table
from tests.doubles import fake_articles, write_vectors


def test_files_appear_whole_and_are_found_again(bucket: RemotePath) -> None:
    folder = bucket / "folder"
    assert not folder.exists()
    assert list(folder.iterdir()) == []
    for name in ("part-00000.parquet", "part-00001.parquet", "x/config.json", "x/y/config.json"):
        assert (folder / name).write_bytes(name.encode()) == len(name)
    assert folder.is_dir()
    assert not folder.is_file()
    assert (folder / "part-00001.parquet").is_file()
    assert sorted(p.name for p in folder.glob("part-*.parquet")) == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert [str(p) for p in folder.glob("*/config.json")] == [str(folder / "x/config.json")]
    assert sorted(p.name for p in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet", "x"]
    assert [p.relative_to(folder).as_posix() for p in files_below(folder) if isinstance(p, RemotePath)] == [
        "part-00000.parquet",
        "part-00001.parquet",
        "x/config.json",
        "x/y/config.json",
    ]
    assert sizes_in(folder, ["part-00000.parquet", "none"]) == {"part-00000.parquet": 18}
    (folder / "part-00000.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "part-00000.parquet").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "part-00000.parquet").stat()
    move_tree(folder, bucket / "moved")
    assert not folder.exists()
    assert (bucket / "moved/x/y/config.json").read_text() == "x/y/config.json"
    remove_tree(bucket / "moved")
    assert not (bucket / "moved").exists()


def test_reading_seeks_and_lines_work_over_many_requests(bucket: RemotePath) -> None:
    data = b"".join(b"line %07d\n" % i for i in range(100_000))
    (bucket / "lines").write_bytes(data)
    with (bucket / "lines").open("rb", buffering=1 << 16) as file:
        assert list(file) == data.splitlines(keepends=True)
        file.seek(-13, io.SEEK_END)
        assert file.read() == b"line 0099999\n"[-13:]
        assert file.tell() == len(data)


def test_an_upload_that_breaks_off_leaves_nothing(bucket: RemotePath) -> None:
    class Breaks(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError("the disk is gone")
            return super().read(6_000_000)

    with pytest.raises(OSError, match="the disk is gone"):
        upload(Breaks(b"0" * 20_000_000), bucket / "half")
    assert not (bucket / "half").exists()


def test_a_folders_last_file_comes_last(bucket: RemotePath, tmp_path: Path) -> None:
    for name in ("a.json", "manifest.json", "z.bin", "deep/b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    upload_folder(tmp_path, bucket / "up", last="manifest.json")
    times = {f.name: f.stat().st_mtime_ns for f in files_below(bucket / "up")}
    assert set(times) == {"a.json", "manifest.json", "z.bin", "b.json"}
    assert times["manifest.json"] == max(times.values())
    with local_output(bucket / "made.npz") as file:
        file.write_bytes(b"made")
    assert (bucket / "made.npz").read_bytes() == b"made"


def test_copies_are_fetched_once_for_each_checksum(bucket: RemotePath, own_cache: Path) -> None:
    path = bucket / "index.faiss"
    path.write_bytes(b"first")
    digest = file_sha256(path)
    copy = fetch(path, digest)
    assert copy.read_bytes() == b"first"
    assert own_cache in copy.parents
    path.write_bytes(b"other")
    assert fetch(path, digest) == copy  # what has that checksum is here already
    copy.unlink()
    with pytest.raises(InputError, match=r"index\.faiss has SHA-256 .* expected"):
        fetch(path, digest)
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []


def test_a_folder_is_fetched_again_when_a_file_changed(bucket: RemotePath, own_cache: Path) -> None:
    (bucket / "codec/config.json").write_bytes(b"1")
    first = local_folder(bucket / "codec")
    assert local_folder(bucket / "codec") == first
    assert (first.name, (first / "config.json").read_bytes()) == ("codec", b"1")
    (bucket / "codec/config.json").write_bytes(b"22")
    assert (local_folder(bucket / "codec") / "config.json").read_bytes() == b"22"
    with pytest.raises(InputError, match="is empty or missing"):
        local_folder(bucket / "none")


def test_storage_that_refuses_is_one_line(bucket: RemotePath) -> None:
    nowhere = location("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/x: .*Expected reachable storage"):
        nowhere.write_bytes(b"x")


def test_shards_and_manifests_are_the_same_there(bucket: RemotePath, tmp_path: Path) -> None:
    table = pa.table({"chunk_id": ["a", "b"], "n": [1, 2]})
    here, there = (
        write_table(tmp_path / "part-00000.parquet", table),
        write_table(bucket / "part-00000.parquet", table),
    )
    assert here == there
    assert read_table(bucket / "part-00000.parquet", ["n"]).column("n").to_pylist() == [1, 2]
    Manifest("chunks", {}, {}, (there,), 2).save(bucket)
    manifest = Manifest.load(bucket, "chunks")
    manifest.verify(bucket, deep=True)
    data = bytearray((bucket / "part-00000.parquet").read_bytes())
    data[40] ^= 1
    (bucket / "part-00000.parquet").write_bytes(bytes(data))
    assert manifest.damaged(bucket) == {}
    assert "SHA-256" in manifest.damaged(bucket, deep=True)["part-00000.parquet"]
    (bucket / "part-00000.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00000\.parquet is missing"):
        read_table(bucket / "part-00000.parquet")
    with pytest.raises(InputError, match="is missing"):
        manifest.verify(bucket)
    with pytest.raises(InputError, match="Run `latent chunk`"):
        Manifest.load(bucket / "none", "chunks")


def test_vectors_and_index_from_there_equal_those_from_here(
    bucket: RemotePath, tmp_path: Path, own_cache: Path
) -> None:
    articles = fake_articles(30)
    local, remote = tmp_path / "vectors", bucket / "vectors"
    write_vectors(local, articles)
    upload_folder(local, remote, last="manifest.json")
    here, there = open_vectors(local), open_vectors(remote)
    np.testing.assert_array_equal(here.vectors, there.vectors)
    assert isinstance(there.vectors, np.memmap)
    assert len(make_windows(there)) == len(make_windows(here))
    assert [
        p for p in own_cache.rglob("*.parquet") if p.is_file()
    ] == []  # no shard is fetched for its vectors
    assert there.texts([3, 1]) == here.texts([3, 1])
    assert len(list(own_cache.rglob("*.parquet"))) == 1
    assert pickle.loads(pickle.dumps(there)).fingerprint == here.fingerprint

    first = build_index(there, bucket / "index")
    assert (bucket / "index" / "CURRENT").read_text().strip() == first.directory.name
    assert build_index(there, bucket / "index").directory == first.directory
    again = load_index(bucket / "index")
    np.testing.assert_array_equal(again.search(here.vectors[:4], 3)[1], first.search(here.vectors[:4], 3)[1])
    names = [first.directory.name]
    for seed in (1, 2):  # the one before stays, the one before that goes
        write_vectors(tmp_path / f"v{seed}", fake_articles(30, seed=seed))
        names.append(build_index(open_vectors(tmp_path / f"v{seed}"), bucket / "index").directory.name)
    assert {p.name for p in (bucket / "index/versions").iterdir()} == set(names[1:])
    # A version without its manifest is what a kill in the middle of an upload leaves: it is not the published one.
    (bucket / "index/versions" / names[2] / "manifest.json").unlink()
    assert find_index(open_vectors(tmp_path / "v2"), bucket / "index") is None


READER = """
import sys
from lvm.vectors.array import array_folder, open_vectors, write_array
array = open_vectors(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
print(len(array), float(array.vectors.astype("f4").sum()), hash(tuple(array.texts(range(0, 360, 7)))), flush=True)
"""


@pytest.mark.parametrize("with_array", [True, False], ids=["array", "shards only"])
def test_two_readers_open_the_same_vectors_and_neither_deletes_anything(
    bucket: RemotePath, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, with_array: bool
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    write_vectors(tmp_path / "vectors", fake_articles(30))
    if not with_array:  # as earlier versions left it
        shutil.rmtree(tmp_path / "vectors/_array")
    upload_folder(tmp_path / "vectors", bucket / "vectors", last="manifest.json")
    before = {str(f): f.stat().st_mtime_ns for f in files_below(bucket / "vectors")}
    command = [sys.executable, "-c", READER, str(bucket / "vectors")]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    opened = [r.stdout.readline() for r in readers if r.stdout]  # both are there before either goes on
    kept = {p for p in own_cache.rglob("*") if p.is_file()}
    found = [r.communicate("\n", timeout=60)[0] for r in readers]
    assert opened == ["open\n"] * 2
    assert found[0] == found[1]
    assert found[0].startswith("360 ")
    assert {str(f): f.stat().st_mtime_ns for f in files_below(bucket / "vectors")} == before
    assert kept <= {p for p in own_cache.rglob("*") if p.is_file()}
    assert bool(kept) == with_array


@pytest.mark.parametrize("part_rows", [1000, 40], ids=["one part", "parts"])
def test_an_array_written_there_is_read_there_and_one_of_earlier_vectors_goes(
    bucket: RemotePath, tmp_path: Path, own_cache: Path, part_rows: int
) -> None:
    for seed in (0, 1):
        write_vectors(tmp_path / "vectors", fake_articles(12, 8, seed=seed), articles_per_shard=4)
        local = open_vectors(tmp_path / "vectors")
        shutil.rmtree(tmp_path / "vectors/_array")
        upload_folder(tmp_path / "vectors", bucket / "vectors", last="manifest.json")
        manifest = Manifest.load(bucket / "vectors")
        assert write_array(bucket / "vectors", manifest, part_rows)
        assert not write_array(bucket / "vectors", manifest, part_rows)
        assert [p.name for p in (bucket / "vectors/_array").iterdir()] == [f"{manifest.fingerprint}-2"]
        array = open_vectors(bucket / "vectors")
        files = [array.vectors] if part_rows == 1000 else array.vectors.parts
        assert all(own_cache in Path(str(f.filename)).parents for f in files)
        assert len(files) == (1 if part_rows == 1000 else 3)
        np.testing.assert_array_equal(array.vectors, local.vectors)
        assert array.texts(range(96)) == [t for a in fake_articles(12, 8, seed=seed) for t in a]
    # Half an array, as an upload that broke off leaves it, is none.
    (array_folder(bucket / "vectors", manifest) / "array.json").unlink()
    assert len(open_vectors(bucket / "vectors")) == 96
    assert write_array(bucket / "vectors", manifest)


KILLED = """
import sys
from lvm.storage import location
path = location(sys.argv[1])
stream = path.filesystem.open_output_stream(path.key)
stream.write(b"0" * 12_000_000)
print("sent", flush=True)
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_upload_leaves_nothing(bucket: RemotePath) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(bucket / "half")], capture_output=True, text=True
    )
    assert done.stdout == "sent\n"
    assert done.returncode == -9
    assert not (bucket / "half").exists()
