"""Curves in MLflow: the real package where it is installed, and one line of advice where it is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvm.errors import InputError
from lvm.predict import tracking
from lvm.predict.runs import TrainRun, train_run
from lvm.predict.tracking import EXPERIMENT, prepare_mlflow
from lvm.predict.training import FAST
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import WindowSettings
from tests.doubles import FakeCodec, fake_articles, write_vectors

BRIEF = replace(FAST, epochs=3, patience=None, bfloat16=False, rank=None)


@pytest.fixture
def run(tmp_path: Path) -> TrainRun:
    write_vectors(tmp_path / "vectors", fake_articles(40), FakeCodec(dim=96))
    return TrainRun.of(open_vectors(tmp_path / "vectors"), "amn", WindowSettings(), BRIEF)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install 'latent-vector-models\[mlflow\]'"):
        prepare_mlflow("somewhere")


def test_a_run_that_was_cut_off_goes_on_in_its_entry(run: TrainRun, tmp_path: Path) -> None:
    client_of = pytest.importorskip(
        "mlflow.tracking", reason="the extra mlflow is not installed"
    ).MlflowClient
    uri = prepare_mlflow(str(tmp_path / "curves"))
    rows: list[dict[str, Any]] = []

    class CutOffError(Exception):
        pass

    def keep_then_end(folder: Path | None, row: dict[str, Any]) -> None:
        assert folder is not None
        if row["epoch"] == 1:
            folder.rename(tmp_path / "checkpoint")
            folder.mkdir()
            raise CutOffError

    with pytest.raises(CutOffError):
        train_run(run, None, keep_then_end, rows.append, tmp_path / "events", mlflow=uri)
    client = client_of(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FAILED"
    assert found.info.run_name == run.name
    assert found.data.params["recipe"] == "fast"

    outcome = train_run(
        run, tmp_path / "checkpoint", lambda *_: None, rows.append, tmp_path / "events", mlflow=uri
    )
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "val_cosine")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (row["epoch"], row["val_cosine"]) for row in outcome.progress.curve
    ]


def test_a_server_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
    with pytest.raises(
        InputError, match=r"--mlflow nonsense://x cannot be used .*expected a folder or the URI"
    ):
        prepare_mlflow("nonsense://x")
