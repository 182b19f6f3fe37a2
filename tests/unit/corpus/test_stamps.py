"""What says that an input changed since it was read."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from lvm.corpus import stamps
from lvm.corpus.inputs import InputFile
from lvm.corpus.stamps import stamp_input


def test_a_file_is_read_again_only_where_size_time_or_ends_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n')
    first = stamp_input(InputFile(path, "json", "a.jsonl"), None)
    assert first["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(stamps, "file_sha256", lambda path: pytest.fail("read again"))
        assert stamp_input(InputFile(path, "json", "a.jsonl"), first) == first
    path.write_text('{"id": 2}\n')
    assert stamp_input(InputFile(path, "json", "a.jsonl"), first)["sha256"] != first["sha256"]


def test_a_text_file_that_could_not_be_opened_is_read_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right to read it changes neither its size nor its time."""
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.txt").write_text("Two.")
    inputs = InputFile(tmp_path, "text", "*.txt")
    whole = stamp_input(inputs, None)

    def closed(path: Any) -> str:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    with monkeypatch.context() as patch:
        patch.setattr(stamps, "file_sha256", closed)
        closed_stamp = stamp_input(inputs, None)
        assert closed_stamp["sha256"] != whole["sha256"]
        assert stamp_input(inputs, closed_stamp) == closed_stamp
    assert stamp_input(inputs, closed_stamp) == whole


def test_an_input_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    gone = stamp_input(InputFile(tmp_path / "none.jsonl", "json", "none.jsonl"), None)
    assert gone == {
        "size": 0,
        "mtime_ns": 0,
        "edges": "",
        "sha256": "unreadable: No such file or directory",
    }
