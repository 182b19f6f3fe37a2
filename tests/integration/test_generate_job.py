"""The generate job as a command on a real Ray: rows, resumption, one file, and what is refused."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.generate import require_own_file
from lvm.errors import OutputError
from tests.integration.test_commands import latent

ARGUMENTS = (
    "--input",
    "sample",
    "--model",
    "amn",
    "--limit",
    "40",
    "--per-article",
    "1",
    "--candidates",
    "1",
)


@pytest.fixture(scope="module")
def made(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "out"
    done = latent("generate", *ARGUMENTS, "--output", str(folder), "--address", ray_cluster)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["rows"], summary["made"]) == (40, 40)
    return folder


def test_a_row_holds_context_truth_text_and_how_near_it_is(made: Path) -> None:
    rows = [row for path in sorted(made.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 40
    assert len({row["article"] for row in rows}) == 40
    for row in rows:
        assert len(row["context"]) == 5
        assert row["next"] not in ("", row["context"][-1])
        assert row["source"] in ("exact", "writer", "corpus")
        assert row["text"]
        assert -1 <= row["cosine_to_next"] <= 1
        assert row["extract"] is None  # without --run there is no corpus


@pytest.mark.slow
def test_a_second_run_makes_nothing_and_a_lost_block_alone_is_made_again(made: Path) -> None:
    again = latent("generate", *ARGUMENTS, "--output", str(made))
    assert json.loads(again.stdout.splitlines()[-1])["up_to_date"]
    whole = {path.name: path.read_bytes() for path in made.glob("part-*.parquet")}
    assert len(whole) == 2
    (made / "part-00001.parquet").unlink()
    (made / "manifest.json").unlink()  # as a job that was killed leaves it
    kept = (made / "part-00000.parquet").stat().st_mtime_ns
    mended = latent("generate", *ARGUMENTS, "--output", str(made))
    assert mended.returncode == 0, mended.stderr[-3000:]
    assert json.loads(mended.stdout.splitlines()[-1])["made"] == 8
    assert (made / "part-00000.parquet").stat().st_mtime_ns == kept
    assert {path.name for path in made.glob("part-*.parquet")} == set(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "sample", "--model", "none", "--output", "OUT/x"), "none"),
        (("--input", "nothing.jsonl", "--output", "OUT/x"), "nothing.jsonl"),
        (("--input", "sample", "--output", "OUT/x", "--run", "nowhere"), "nowhere has no vectors/"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = latent("generate", *(a.replace("OUT", str(tmp_path)) for a in arguments))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_only_predictions_are_overwritten_unasked(tmp_path: Path) -> None:
    output = tmp_path / "keep.jsonl"
    require_own_file(output)  # there is none
    output.write_text('{"source": "writer", "refusals": [], "cosine": 0.5}\n')
    require_own_file(output)
    for foreign in ('{"id": "1", "text": "An article."}\n', "", "no JSON", "[]"):
        output.write_text(foreign)
        with pytest.raises(OutputError, match="exists and holds no predictions"):
            require_own_file(output)
        assert output.read_text() == foreign
