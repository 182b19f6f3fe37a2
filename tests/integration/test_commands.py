"""The command line as a person uses it: real processes, a real local Ray, the bundled sample."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

CHECKOUT = Path(__file__).resolve().parents[2]


def latent(
    *arguments: str, stdin: str | None = None, timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [sys.executable, "-m", "lvm.cli", *arguments],
        cwd=CHECKOUT,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@dataclass(frozen=True)
class FinishedRun:
    output: Path
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])


ARGUMENTS = ("--input", "sample", "--limit", "50", "--max-minutes", "0.2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A whole run of the pipeline on part of the sample, with its training cut short."""
    output = tmp_path_factory.mktemp("run") / "out"
    done = latent("run", "--output", str(output), *ARGUMENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return FinishedRun(output, done.stdout, done.stderr)


def test_a_run_prints_leaderboard_examples_report_and_json(finished: FinishedRun) -> None:
    assert ".cc:" not in finished.stderr  # Ray's own log, where nothing is wrong
    out = finished.stdout
    for name in ("amn", "lstm", "gru", "transformer", "passthrough", "ridge"):
        assert re.search(rf"\b{name}\b", out), name
    assert len(re.findall(r"true next", out, re.IGNORECASE)) >= 3
    report = Path(finished.summary["paths"]["report"])
    assert report.is_file()
    assert set(finished.summary["seconds"]) >= {"chunk", "encode", "index", "train", "evaluate"}
    assert finished.summary["rows"]["chunk"] == finished.summary["rows"]["encode"] > 1000
    assert finished.summary["versions"]["ray"]


@pytest.mark.slow
def test_the_demo_takes_the_whole_sample_to_its_end(tmp_path: Path) -> None:
    done = latent("run", "--demo", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["rows"]["chunk"] == summary["rows"]["encode"] > 3500
    assert "gru: starts from the bundled gru-" in done.stderr
    ranks = {
        line.split()[1]: int(line.split()[0])
        for line in done.stdout.splitlines()
        if re.match(r" ?\d+  \w", line)
    }
    assert ranks["gru"] < ranks["ridge"]
    assert len(re.findall(r"true next", done.stdout)) >= 3


def test_the_report_needs_no_network(finished: FinishedRun) -> None:
    html = (finished.output / "evaluation" / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//", html)
    assert html.count("<svg") + html.count("data:image/png") >= 4


def test_the_codec_is_measured_on_what_the_run_predicts(finished: FinishedRun) -> None:
    small = ("--input", "sample", "--limit", "12", "--decoded", "20", "--candidates", "300", "--json")
    done = latent("codec", "eval", *small, "--run", str(finished.output))
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert set(figures["predicted"]) == {"amn", "lstm", "gru", "transformer"}
    for made in figures["predicted"].values():
        assert 0 < made["to_truth"] < 0.9
        assert made["bleu"]["1"] < figures["bleu"]["1"]
        assert 0 < made["cosine"]["0"] < figures["cosine"]["0"]


def test_a_folder_without_models_is_no_run_to_measure(tmp_path: Path) -> None:
    done = latent(
        "codec", "eval", "--input", "sample", "--limit", "3", "--decoded", "1", "--run", str(tmp_path)
    )
    assert done.returncode == 1
    assert "has no model; expected the folder of `latent run`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_run_redoes_nothing_and_says_so(finished: FinishedRun, ray_cluster: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.output.rglob("*.parquet")}
    again = latent("run", "--output", str(finished.output), *ARGUMENTS, "--address", ray_cluster)
    assert again.returncode == 0, again.stderr[-3000:]
    summary = json.loads(again.stdout.splitlines()[-1])
    assert all(summary["up_to_date"].values()), summary["up_to_date"]
    assert again.stderr.count("up to date") >= 5
    assert {p: p.stat().st_mtime_ns for p in finished.output.rglob("*.parquet")} == before


FIVE = (
    "The steam engine was first used to pump water out of mines.",
    "Thomas Newcomen built one in 1712 at a colliery near Dudley.",
    "James Watt saw that most of its heat was wasted in the cylinder.",
    "In 1769 he patented a separate condenser that stayed cold.",
    "With Matthew Boulton he then sold engines to mills and mines.",
)


@pytest.mark.parametrize("model", ["lstm", "amn", "passthrough"])
def test_predict_takes_five_texts(finished: FinishedRun, model: str) -> None:
    done = latent("predict", "--model", model, "--run", str(finished.output), *FIVE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10
    for word in ("cosine to it", f"model {model}"):
        assert word in done.stderr
    if model == "passthrough":  # it reads the last text back
        shared = set(done.stdout.lower().split()) & set(FIVE[-1].lower().split())
        assert len(shared) >= 5


def test_predict_takes_one_text_on_standard_input_and_gives_json(finished: FinishedRun) -> None:
    done = latent(
        "predict", "--model", "gru", "--run", str(finished.output), "--json", stdin="\n\n".join(FIVE[:2])
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["context_mode"] in ("mixed", "ann")
    assert answer["text"]
    assert answer["codec"]["name"] == "mini"
    assert set(answer["milliseconds"]) >= {"encode", "predict", "extract", "decode"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--run", "nowhere", "a"], "Try `latent demo` first"),
        (["run", "--input", "nothing.jsonl", "--output", "OUT/x"], "nothing.jsonl"),
        (["run", "--output", "OUT/x"], "expected --input PATH and --output DIR"),
        (
            ["run", "--input", "sample", "--output", "OUT/x", "--codec", "gtr"],
            "unknown codec 'gtr'; expected one of gtr-ielab, gtr-jxe, mini, sentence-transformers",
        ),
        (["encode", "--inptu", "x"], "--inptu"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)  # `run` starts its stages, which refuse, on a cluster
    done = latent(*[a.replace("OUT", str(tmp_path)) for a in arguments])
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_lists_the_known_ones(finished: FinishedRun) -> None:
    done = latent("predict", "--model", "lstn", "--run", str(finished.output), "a text")
    assert done.returncode != 0
    assert "lstm" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_of_every_command_come_from_its_job() -> None:
    for command in (
        "chunk",
        "encode",
        "index",
        "train",
        "evaluate",
        "predict",
        "run",
        "train-codec",
        "codec eval",
        "codec check",
    ):
        done = latent(*command.split(), "--help")
        assert done.returncode == 0, done.stderr
        assert "--" in done.stdout
