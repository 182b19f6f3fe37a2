"""The commands around NPZ files: export writes a sound one; check names every problem, with exit code 1."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvm.vectors.array import open_vectors
from lvm.vectors.npz import export_npz
from lvm.vectors.sequences import make_windows
from tests.doubles import fake_articles, write_vectors
from tests.integration.conftest import CHECKOUT


def run_command(*arguments: str, job: str = "check") -> tuple[int, dict[str, Any], str]:
    """Exit code, the closing line of JSON ({} where there is none), and stderr."""
    command = [sys.executable, "-m", f"jobs.{job}", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npz")
    write_vectors(folder / "vectors", fake_articles(12, 8))
    export_npz(make_windows(open_vectors(folder / "vectors")), folder / "good.npz", "documents")
    return folder / "good.npz"


def test_a_good_file_passes(exported: Path) -> None:
    code, summary, stderr = run_command(str(exported))
    assert code == 0, stderr
    assert (summary["ok"], summary["layout"], summary["rows"], summary["problems"]) == (
        True,
        "documents",
        36,
        [],
    )
    assert "no problems found" in stderr


def test_a_bad_file_names_every_problem_with_what_was_expected_what_came_and_the_cure(exported: Path) -> None:
    with np.load(exported) as arrays:
        bad = {k: arrays[k] for k in arrays.files}
    bad["target_vectors"][3, 0] = np.nan
    bad["doc_ids"] = bad["doc_ids"].astype(object)
    np.savez(exported.with_name("bad.npz"), **bad)
    code, summary, stderr = run_command(str(exported.with_name("bad.npz")))
    assert code == 1
    assert summary["ok"] is False
    assert {p["where"] for p in summary["problems"]} == {"target_vectors", "doc_ids"}
    assert all(p["expected"] and p["got"] and p["cure"] for p in summary["problems"])
    assert "the first in row 3" in stderr
    assert "which is a pickle" in stderr
    assert "problems found: 2" in stderr
    assert "Traceback" not in stderr


def test_a_missing_file_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    code, summary, stderr = run_command(str(tmp_path / "none.npz"))
    assert (code, summary) == (1, {})
    assert stderr.startswith("error: no file ")


def test_an_exported_file_passes_the_check_and_is_never_replaced_unasked(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(12, 8))
    file = tmp_path / "split.npz"
    arguments = ("--vectors", str(tmp_path / "vectors"), "--output", str(file), "--layout", "split")
    code, summary, stderr = run_command(*arguments, job="export")
    assert code == 0, stderr
    assert (summary["rows"], summary["layout"], summary["bytes"]) == (36, "split", file.stat().st_size)
    assert run_command(str(file))[1]["codec"] == summary["codec"]
    before = file.stat().st_mtime_ns
    code, _, stderr = run_command(*arguments, job="export")
    assert code == 1
    assert "already exists; choose another name or pass --overwrite" in stderr
    assert file.stat().st_mtime_ns == before
    assert run_command(*arguments, "--overwrite", job="export")[0] == 0
