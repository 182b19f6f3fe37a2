"""Paths on object storage by name; what is on a server is in tests/integration/test_storage.py."""

import pickle
from pathlib import Path

import pytest

from lvm.errors import InputError, StorageError
from lvm.storage import RemotePath, files_below, location, new_folder, publish_folder, sizes_in


@pytest.mark.parametrize("text", ["out/x", "/shared/x", "file:///shared/x", "a:b"])
def test_a_path_stays_a_path(text: str) -> None:
    assert location(text) == Path(text.removeprefix("file://"))


@pytest.mark.parametrize("text", ["http://host/x", "hdfs://x/y", "s3://", "s3:///x", "S4://bucket/x"])
def test_other_urls_are_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(InputError, match=r"expected a path, or s3://bucket/… or gs://bucket/…"):
        location(text)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="holds credentials") as refusal:
        location("s3://AKIA123:topsecret@bucket/x")
    assert "topsecret" not in str(refusal.value)
    assert "AKIA123" not in str(refusal.value)


def test_names_are_pathlibs() -> None:
    path = location("s3://corpus/a//b/part-00001.jsonl.gz?region=eu-west-1")
    assert isinstance(path, RemotePath)
    assert str(path) == "s3://corpus/a/b/part-00001.jsonl.gz?region=eu-west-1"
    assert (path.name, path.stem, path.suffix) == ("part-00001.jsonl.gz", "part-00001.jsonl", ".gz")
    assert str(path.parent / "x" / "y") == "s3://corpus/a/b/x/y?region=eu-west-1"
    assert path.relative_to(path.parent.parent).as_posix() == "b/part-00001.jsonl.gz"
    assert pickle.loads(pickle.dumps(path)) == path
    assert len({path, location(str(path))}) == 1


def test_google_storage_goes_through_its_own_filesystem() -> None:
    path = location("gs://corpus/a/b")
    assert isinstance(path, RemotePath)
    assert path.filesystem.type_name == "gcs"
    assert path.key == "corpus/a/b"


def test_an_error_of_storage_is_none_of_a_disk() -> None:
    """What reads files may take OSError for a damaged file; storage that does not answer is not that."""
    assert not issubclass(StorageError, OSError)


def test_a_published_folder_takes_the_place_of_another_and_a_file_in_the_way_stays_its_own(
    tmp_path: Path,
) -> None:
    target = tmp_path / "versions" / "one"
    for content in ("old", "new"):
        with new_folder(target) as made:
            assert made.parent == target.parent
            (made / "x").write_text(content)
            publish_folder(made, target, last="x")
    assert [p.name for p in target.parent.iterdir()] == ["one"]
    assert (target / "x").read_text() == "new"
    (target / "deep").mkdir()
    (target / "deep/y").write_text("yy")
    assert files_below(target) == [target / "deep/y", target / "x"]
    assert sizes_in(target, ["x", "deep", "none"]) == {"x": 3}
    assert sizes_in(tmp_path / "none", ["x"]) == {}


def test_files_below_a_folder_on_a_disk_come_once_whatever_links_there_are(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    assert files_below(tmp_path) == [tmp_path / "a"]
