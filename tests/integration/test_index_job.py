"""The index job as a command on a real Ray: published, measured, left alone, and refused where it must be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lvm.vectors.array import open_vectors
from lvm.vectors.index import load_index
from tests.doubles import FakeCodec, fake_articles, write_chunks, write_vectors
from tests.integration.conftest import CHECKOUT


def run_command(source: Path, target: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the closing line of JSON ({} where there is none), and stderr."""
    command = [
        sys.executable,
        "-m",
        "jobs.index",
        "--vectors",
        str(source),
        "--output",
        str(target),
        *options,
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_an_index_is_published_measured_and_left_alone_by_a_second_run(
    ray_cluster: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "vectors", tmp_path / "index"
    write_vectors(source, fake_articles(250, 20), articles_per_shard=50)
    code, summary, stderr = run_command(source, target, "--address", ray_cluster)
    assert code == 0, stderr
    array, index = open_vectors(source), load_index(target)
    index.require_array(array)
    assert summary["stage"] == "index"
    assert summary["rows"] == len(index) == len(array) == 5000
    assert (summary["up_to_date"], summary["redone"]) == (False, 1)
    assert summary["version"] == index.directory.name == (target / "CURRENT").read_text().strip()
    assert summary["settings"]["nlist"] == 64
    assert summary["recall"] == index.manifest.report
    assert index.identity == FakeCodec().identity
    assert f"published {index.directory.name}: 5,000 vectors, IVF_FLAT, 64 lists, 16 probed" in stderr
    assert index.search(array.vectors[:5], 1)[1][:, 0].tolist() == [0, 1, 2, 3, 4]

    before = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    code, summary, stderr = run_command(source, target)  # no address: it must not even need a cluster
    assert code == 0, stderr
    assert (summary["up_to_date"], summary["redone"]) == (True, 0)
    assert {p: p.stat().st_mtime_ns for p in target.rglob("*")} == before


def test_new_vectors_are_published_beside_the_old_version(ray_cluster: str, tmp_path: Path) -> None:
    source, target = tmp_path / "vectors", tmp_path / "index"
    names = []
    for seed in range(2):
        write_vectors(source, fake_articles(3, seed=seed))
        code, summary, stderr = run_command(source, target, "--address", ray_cluster)
        assert code == 0, stderr
        names.append(summary["version"])
    assert {p.name for p in (target / "versions").iterdir()} == set(names)
    np.testing.assert_array_equal(
        load_index(target).reconstruct(range(36)), np.asarray(open_vectors(source).vectors, np.float32)
    )


def test_parts_are_built_in_tasks_of_their_own(ray_cluster: str, tmp_path: Path) -> None:
    source, target = tmp_path / "vectors", tmp_path / "index"
    write_vectors(source, fake_articles(60, 20), articles_per_shard=50)
    code, summary, stderr = run_command(source, target, "--part-vectors", "500", "--address", ray_cluster)
    assert code == 0, stderr
    assert summary["settings"]["parts"] == 3
    array, index = open_vectors(source), load_index(target)
    assert [s.file for s in index.manifest.shards] == [f"part-0000{n}.faiss" for n in range(3)]
    assert index.search(array.vectors[::100], 1)[1][:, 0].tolist() == list(range(0, 1200, 100))


def test_what_is_no_finished_encode_job_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    code, summary, stderr = run_command(tmp_path / "nothing", tmp_path / "index")
    assert (code, summary) == (1, {})
    assert stderr.splitlines()[-1].startswith("error: no ")
    assert "Run `latent encode`" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "index").exists()


def test_another_stages_folder_is_never_written_into(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(2))
    write_chunks(tmp_path / "chunks", fake_articles(2))
    before = sorted(p.name for p in (tmp_path / "chunks").iterdir())
    code, _, stderr = run_command(tmp_path / "vectors", tmp_path / "chunks")
    assert code == 1
    assert "holds chunks, expected an index or an empty folder; choose another --output" in stderr
    assert sorted(p.name for p in (tmp_path / "chunks").iterdir()) == before
