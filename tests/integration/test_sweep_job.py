"""A sweep of a handful of trials on a real Ray: table, page, records, nothing twice, on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.sweep import SweepSettings, draw_trials, read_trials, run_of, sweep, val_windows
from lvm.errors import InputError, OutputError
from lvm.evaluate.controls import as_written
from lvm.evaluate.metrics import summarise_ranks
from lvm.evaluate.scoring import score_in_article
from lvm.evaluate.sweep import Trial
from lvm.predict.predictor import TrainedPredictor
from lvm.predict.record import load_record, read_aliases
from lvm.vectors.array import open_vectors
from tests.doubles import fake_articles, write_vectors
from tests.integration.conftest import CHECKOUT

pytestmark = pytest.mark.slow

SETTINGS = SweepSettings(4, ("amn", "lcm-quant"), (2, 3), "fast", 2, 100, 0)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "vectors"
    write_vectors(folder, fake_articles(40))
    return folder


@pytest.fixture(scope="module")
def swept(
    ray_cluster: str, vectors: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Trial], dict[str, Any]]:
    output = tmp_path_factory.mktemp("swept") / "out"
    rows, record, up_to_date = sweep(vectors, output, SETTINGS)
    assert not up_to_date
    return output, rows, record


def test_every_trial_has_a_row(swept: tuple[Path, list[Trial], dict[str, Any]]) -> None:
    output, rows, record = swept
    assert record["complete"]
    drawn = draw_trials(SETTINGS)
    assert len(rows) == 4
    for row, trial in zip(rows, drawn, strict=True):
        for key in ("number", "model", "context", "learning_rate", "info_nce_share"):
            assert row[key] == trial[key]  # type: ignore[literal-required]
        assert json.loads(row["sizes"]) == trial["sizes"]
        assert row["state"] in ("finished", "stopped early")
        assert row["epochs"] == 2 or row["state"] == "stopped early"
        assert row["parameters"] is not None
        assert row["seconds"] > 0
    assert pq.read_table(output / "trials.parquet").to_pylist() == rows == read_trials(output)
    lines = (output / "trials.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].replace('"', "").startswith("number,model,context,learning_rate")
    assert "Architectures by their best trial" in (output / "sweep.html").read_text()


def test_the_best_trials_are_records_of_what_was_reported(
    swept: tuple[Path, list[Trial], dict[str, Any]], vectors: Path
) -> None:
    output, _, record = swept
    aliases = read_aliases(output / "models")
    assert set(aliases) == {"amn", "lcm-quant", "ensemble"}
    for name, best in record["best"].items():
        made = load_record(output / "models", name)
        assert made.metrics["val_cosine"] == pytest.approx(best["val_cosine"], abs=1e-6)
        assert made.context == best["context"]
        val = val_windows(run_of(best, SETTINGS, open_vectors(vectors)))
        scores = score_in_article(TrainedPredictor(made), None, val.array, as_written(val))
        assert best["val_mrr"] == pytest.approx(summarise_ranks(scores.in_article)["mrr"], abs=0.02)
        assert best["gain"] == pytest.approx(
            best["val_cosine"] - made.metrics["curve"][0]["val_cosine"], abs=1e-6
        )
        assert {k: made.config["sizes"][k] for k in best["sizes"]} == best["sizes"]
        interval = record["intervals"][str(best["number"])]
        # The interval comes from the record's own weights, in float32; the trial may have scored in bfloat16.
        assert interval["mean"] == pytest.approx(best["val_cosine"], abs=0.003)
        assert interval["low"] <= interval["mean"] <= interval["high"]
    assert record["ensemble"]["val_cosine"] > 0
    assert not list((output / "tune").glob("*/*/checkpoint_*"))


def test_tensorboard_has_curves_and_settings(swept: tuple[Path, list[Trial], dict[str, Any]]) -> None:
    output, _, _ = swept
    folders = sorted(p.parent for p in (output / "tune").glob("*/*/events.out.*"))
    assert len(folders) == 4
    found = EventAccumulator(str(folders[0])).Reload()
    scalars = [t for t in found.Tags()["scalars"] if t.endswith("val_cosine")]
    assert scalars
    assert any("hparams" in name for name in found.summary_metadata) or list(folders[0].glob("params.json"))


def test_a_second_run_trains_nothing(swept: tuple[Path, list[Trial], dict[str, Any]], vectors: Path) -> None:
    output, rows, record = swept
    before = sorted(p.name for p in output.rglob("*"))
    again, said, up_to_date = sweep(vectors, output, SETTINGS)
    assert up_to_date
    assert again == rows
    assert said == json.loads(json.dumps(record))
    assert sorted(p.name for p in output.rglob("*")) == before


def test_another_sweep_in_the_same_folder_is_refused(
    swept: tuple[Path, list[Trial], dict[str, Any]], vectors: Path
) -> None:
    from dataclasses import replace

    with pytest.raises(OutputError, match="seed was 0, now 1"):
        sweep(vectors, swept[0], replace(SETTINGS, seed=1))


def test_a_context_longer_than_the_articles_is_said_before_any_trial(vectors: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=r"61 consecutive chunks|60 \+ 1"):
        sweep(vectors, tmp_path / "out", replace(SETTINGS, contexts=(60,)))
    assert not list((tmp_path / "out").iterdir())


def test_it_counts_the_trials_that_training_improved(
    swept: tuple[Path, list[Trial], dict[str, Any]],
) -> None:
    gained = 0
    for file in swept[0].glob("tune/*/*/result.json"):
        curve = [json.loads(line) for line in file.read_text().splitlines()]
        curve = [row["val_cosine"] for row in curve if "val_loss" in row]
        gained += max(curve) > curve[0]
    assert swept[2]["improved"] == gained
    assert "trials that training improved" in (swept[0] / "sweep.html").read_text()


def four_trials(vectors: Path, output: Path) -> list[str]:
    options = ["--trials", "4", "--model", "amn", "--contexts", "2", "--epochs", "3"]
    return [sys.executable, "-m", "jobs.sweep", "--vectors", str(vectors), "--output", str(output), *options]


def outside_of_ray() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def run_to_its_end(command: list[str], output: Path) -> None:
    done = subprocess.run(
        command, cwd=CHECKOUT, env=outside_of_ray(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sweep: resuming" in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["complete"]
    assert summary["rows"] == 4
    assert set(summary["states"]) <= {"finished", "stopped early"}
    assert len(list((output / "tune").glob("*/*-amn"))) == 4
    # The record is of the best trial as it ended, not as an earlier run left it.
    record = load_record(output / "models", read_aliases(output / "models")["amn"])
    assert record.metrics["val_cosine"] == summary["best"]["val_cosine"]


def test_out_of_hours_and_run_again_it_does_what_is_missing(vectors: Path, tmp_path: Path) -> None:
    command = four_trials(vectors, tmp_path / "out")
    done = subprocess.run(
        [*command, "--hours", "0.001"],
        cwd=CHECKOUT,
        env=outside_of_ray(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "the same command resumes" in done.stderr, done.stderr[-3000:]
    assert "incomplete" not in done.stderr
    run_to_its_end(command, tmp_path / "out")


def test_killed_and_run_again_it_does_what_is_missing(vectors: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = four_trials(vectors, output)
    child = subprocess.Popen(
        command, cwd=CHECKOUT, env=outside_of_ray(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if line.startswith("sweep: ") and " of 4: " in line:
            break
    assert " of 4: " in said[-1], "".join(said)
    time.sleep(1.0)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stderr.close()
    assert not (output / "sweep.json").exists()
    run_to_its_end(command, output)
