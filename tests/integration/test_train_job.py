"""The train job on a real Ray: all at once, resumed after a kill, refused in words, nothing done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import train
from jobs.train import TrainResult, ask, main, plan_resources, prototypes_of, train_models
from lvm.codec.zoo import load_codec
from lvm.corpus.coherence import OVERRIDE
from lvm.corpus.tmd import Prototypes
from lvm.errors import IdentityError, InputError, OutputError, TrainingError
from lvm.models import ORIGINAL, build
from lvm.predict.fitting import check_sequential
from lvm.predict.fitting import fit as library_fit
from lvm.predict.record import load_record, read_aliases, record_folders, series_of
from lvm.predict.training import CLASSIC, FAST, RECIPES, fit
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import WindowSettings, make_windows
from tests.doubles import FakeCodec, fake_articles, write_chunks, write_vectors
from tests.integration.conftest import CHECKOUT

NAMES = (*ORIGINAL, "s4", "lcm-quant")
"""More than are trained at once on two cores; one with a loss of its own."""

BRIEF = replace(FAST, name="brief", epochs=4, patience=None)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished vectors of 40 made-up articles."""
    folder = tmp_path_factory.mktemp("train") / "vectors"
    write_vectors(folder, fake_articles(40))
    return folder


@pytest.fixture(scope="module")
def trained(
    ray_cluster: str, vectors: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainResult]:
    """Six architectures, four epochs each, in a folder of records."""
    models = tmp_path_factory.mktemp("models")
    return models, train_models(vectors, models, list(NAMES), BRIEF)


# ---- a whole run


def test_all_architectures_are_trained_and_their_aliases_point_to_them(
    trained: tuple[Path, TrainResult],
) -> None:
    models, result = trained
    assert result.failed == {}
    assert list(result.trained) == list(NAMES)
    assert set(read_aliases(models)) == set(NAMES)
    for name, made in result.trained.items():
        record = load_record(models, name)
        assert record.folder == made.folder
        assert not made.up_to_date
        assert [row["epoch"] for row in record.metrics["curve"]] == [0, 1, 2, 3, 4]
        assert record.metrics["val_cosine"] == max(row["val_cosine"] for row in record.metrics["curve"])


def test_the_weights_are_those_of_the_best_epoch(trained: tuple[Path, TrainResult], vectors: Path) -> None:
    models, _ = trained
    val = make_windows(open_vectors(vectors), WindowSettings()).split(0)["val"]
    contexts, targets = (torch.from_numpy(a) for a in val.batch(slice(None)))
    for name in NAMES:
        record = load_record(models, name)
        with torch.inference_mode():
            cosine = torch.cosine_similarity(record.model(contexts), targets).mean().item()
        # The run may have scored in bfloat16.
        assert cosine == pytest.approx(record.metrics["val_cosine"], abs=0.003)


@pytest.mark.slow
def test_vectors_of_another_length_train_on_contexts_of_another(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(12), FakeCodec(dim=96))
    main(tmp_path / "vectors", tmp_path / "models", model="amn", epochs=1, context=3)
    record = load_record(tmp_path / "models", "amn")
    assert (record.context, record.config["sizes"]["dim"]) == (3, 96)
    assert record.model(torch.zeros(2, 3, 96)).shape == (2, 96)
    # The library knows the job's run, and trains nothing.
    recipe = replace(FAST, epochs=1)
    array = open_vectors(tmp_path / "vectors")
    assert (
        library_fit(array, tmp_path / "models", "amn", recipe, windows=WindowSettings(context=3)).name
        == record.folder.name
    )


def test_the_record_says_where_it_comes_from(trained: tuple[Path, TrainResult], vectors: Path) -> None:
    models, result = trained
    record = load_record(models, "gru")
    assert record.identity == FakeCodec().identity
    assert record.config["vectors"]["fingerprint"] == open_vectors(vectors).fingerprint
    assert record.config["seed"] == 0
    assert WindowSettings(**record.config["windows"]) == WindowSettings()
    assert record.config["recipe"]["epochs"] == 4
    card = (record.folder / "MODEL_CARD.md").read_text()
    expected = (
        "made up by tests/doubles.py",
        f"{result.windows['train']:,} train",
        "MSE",
        "adamw",
        "all 4 epochs are done",
        "| Seed | 0 |",
        "| Device | cpu |",
        "Known issues",
    )
    for part in expected:
        assert part in card


def test_the_best_three_checkpoints_are_kept_and_the_latest(trained: tuple[Path, TrainResult]) -> None:
    models, _ = trained
    for name in NAMES:
        (run,) = (models / "runs").glob(f"{name}-*")
        kept = {json.loads((c / "progress.json").read_text())["epoch"]: c for c in run.glob("checkpoint_2*")}
        curve = load_record(models, name).metrics["curve"]
        best = sorted(curve, key=lambda row: row["val_cosine"])[-3:]
        assert set(kept) == {row["epoch"] for row in best} | {4}
        # What only going on needs went when the record was there.
        assert not list(run.glob("*/optimiser.pt"))


def test_tensorboard_has_the_curve(trained: tuple[Path, TrainResult]) -> None:
    models, _ = trained
    (run,) = (models / "runs").glob("lstm-*")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curve = load_record(models, "lstm").metrics["curve"]
    for key in ("train_loss", "val_cosine", "learning_rate"):
        found = [(e.step, e.value) for e in events.Scalars(key)]
        assert found == [(row["epoch"], pytest.approx(row[key], rel=1e-5)) for row in curve if key in row]


def test_runs_were_in_flight_at_the_same_time(trained: tuple[Path, TrainResult]) -> None:
    models, _ = trained
    spans = []
    for name in ("lstm", "gru", "transformer"):
        (run,) = (models / "runs").glob(f"{name}-*")
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        times = [e.wall_time for e in events.Scalars("val_cosine")]
        seconds = load_record(models, name).metrics["curve"][0]["seconds"]
        spans.append((times[0] - seconds, times[-1]))
    # Each began before the first of them ended.
    assert max(begin for begin, _ in spans) < max(end for _, end in spans)
    assert sum(b < spans[-1][1] and e > spans[-1][0] for b, e in spans) >= 2


# ---- several workers a model

TOLERANCE = 2e-3
"""Of val cosines, between one worker and two: the order of sums in bfloat16, and what dropout draws."""


@pytest.mark.slow
def test_two_workers_train_the_model_that_one_would(
    trained: tuple[Path, TrainResult], vectors: Path, tmp_path: Path
) -> None:
    names = ["amn", "lstm", "lcm-quant"]  # the last with a loss of its own
    together = train_models(vectors, tmp_path, names, BRIEF, workers=2)
    assert together.failed == {}
    alone = trained[1]
    for name in names:
        found, expected = (r.trained[name].metrics["curve"] for r in (together, alone))
        assert [row["epoch"] for row in found] == [0, 1, 2, 3, 4]
        for row, wanted in zip(found, expected, strict=True):
            assert row["val_cosine"] == pytest.approx(wanted["val_cosine"], abs=TOLERANCE)
            assert row.get("train_loss", 0) == pytest.approx(wanted.get("train_loss", 0), rel=0.02)
        assert load_record(tmp_path, name).config["device"] == "2 x cpu"
    # The number of workers is no setting of the model: with one, nothing is left to train.
    again = train_models(vectors, tmp_path, names, BRIEF)
    assert all(t.up_to_date for t in again.trained.values())


@pytest.mark.slow
def test_a_run_of_two_workers_goes_on_with_one(vectors: Path, tmp_path: Path, ray_cluster: str) -> None:
    first = train_models(vectors, tmp_path, ["amn"], BRIEF, workers=2).trained["amn"]
    first.folder.rename(tmp_path / "moved-away")
    (tmp_path / "aliases.json").unlink()
    again = train_models(vectors, tmp_path, ["amn"], BRIEF).trained["amn"]
    assert again.metrics["curve"] == first.metrics["curve"]


# ---- the monitor is lost


@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True])
def test_runs_end_well_without_their_monitor(
    for_good: bool,
    vectors: Path,
    tmp_path: Path,
    ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed: list[Any] = []

    def ask_then_kill(monitor: Any, method: str, *arguments: Any) -> Any:
        answer = ask(monitor, method, *arguments)
        if method == "take" and not killed and any(row.get("epoch") == 0 for _, row in answer or ()):
            killed.append(monitor)
            ray.kill(monitor, no_restart=for_good)
        return answer

    monkeypatch.setattr(train, "ask", ask_then_kill)
    result = train_models(vectors, tmp_path, ["amn", "gru"], replace(BRIEF, epochs=12))
    assert killed
    assert result.failed == {}
    assert {n: t.metrics["epochs"] for n, t in result.trained.items()} == {"amn": 12, "gru": 12}
    # Ray starts another one, which has the lines that come after.
    assert ("epoch 12" in capsys.readouterr().err) == (not for_good)


# ---- a second run


def test_a_second_run_trains_nothing(
    trained: tuple[Path, TrainResult], vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, first = trained
    before = sorted(p.name for p in models.rglob("*"))
    again = train_models(vectors, models, list(NAMES), BRIEF)
    assert all(t.up_to_date for t in again.trained.values())
    assert {n: t.folder for n, t in again.trained.items()} == {n: t.folder for n, t in first.trained.items()}
    assert sorted(p.name for p in models.rglob("*")) == before
    assert "lstm is up to date" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_makes_a_new_record_and_the_old_one_stays(
    trained: tuple[Path, TrainResult], vectors: Path
) -> None:
    models, first = trained
    second = train_models(vectors, models, ["amn"], BRIEF, seed=1)
    assert not second.trained["amn"].up_to_date
    assert read_aliases(models)["amn"] == second.trained["amn"].folder.name
    assert first.trained["amn"].folder.is_dir()
    # Asked for the first settings again, the alias goes back; nothing is trained.
    third = train_models(vectors, models, ["amn"], BRIEF)
    assert third.trained["amn"].up_to_date
    assert read_aliases(models)["amn"] == first.trained["amn"].folder.name


@pytest.mark.slow
def test_seeds_are_trained_side_by_side_and_the_best_gets_the_alias(
    ray_cluster: str, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(vectors, tmp_path, model="lstm,amn", epochs=1, seeds=3)
    *table, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert said["redone"] == 6
    assert len(record_folders(tmp_path)) == 6
    for name in ("lstm", "amn"):
        best = load_record(tmp_path, name)
        alike = [load_record(tmp_path, f.name) for f in series_of(tmp_path, best)]
        assert [r.config.get("training_seed", 0) for r in alike] == [0, 1, 2]
        assert {r.config["seed"] for r in alike} == {0}
        values = [r.metrics["val_cosine"] for r in alike]
        assert len(set(values)) == 3
        assert best.metrics["val_cosine"] == max(values)
        assert said["models"][name]["seeds"]["val_cosine"]["values"] == values
        row = next(line for line in table if line.split()[:1] == [name])
        assert f"{np.mean(values):.4f} ±{np.std(values, ddof=1):.4f}" in row
        assert best.folder.name in row
    before = read_aliases(tmp_path)
    main(vectors, tmp_path, model="lstm,amn", epochs=1, seeds=3)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["up_to_date"]
    assert read_aliases(tmp_path) == before


@pytest.mark.slow
def test_models_that_read_codes_are_trained_beside_those_that_do_not(
    vectors: Path, tmp_path: Path, ray_cluster: str
) -> None:
    prototypes = Prototypes.of(lambda texts: FakeCodec().encode_chunks(texts).vectors)
    once = replace(BRIEF, epochs=1)
    result = train_models(vectors, tmp_path, ["amn", "lcm-quant"], once, prototypes=prototypes)
    assert result.failed == {}
    assert list(result.trained) == list(read_aliases(tmp_path)) == ["amn-tmd", "lcm-quant-tmd"]
    contexts, targets = make_windows(open_vectors(vectors)).split(0)["val"].batch(slice(None))
    for alias in result.trained:
        record = load_record(tmp_path, alias)
        assert record.name == alias.removesuffix("-tmd")
        predicted = record.model(torch.from_numpy(contexts)).detach().numpy()
        assert (predicted * targets).sum(1).mean() == pytest.approx(record.metrics["val_cosine"], abs=1e-3)
    assert load_record(tmp_path, "amn-tmd").config["parameters"] == 1_510_912 + 16 * (256 + 256 + 2 * 512)
    again = train_models(vectors, tmp_path, ["amn", "lcm-quant"], once, prototypes=prototypes)
    assert all(t.up_to_date for t in again.trained.values())


def test_labels_come_from_the_codec_of_the_vectors(tmp_path: Path) -> None:
    codec = load_codec("mini", device="cpu")
    write_vectors(tmp_path / "mini", fake_articles(1, 2), codec)  # type: ignore[arg-type]
    found = prototypes_of(tmp_path / "mini", None)
    np.testing.assert_allclose(found.vectors, Prototypes.of(codec.encode).vectors, atol=1e-3)
    write_vectors(tmp_path / "fake", fake_articles(1, 2))
    with pytest.raises(InputError, match="unknown codec 'fake'"):
        prototypes_of(tmp_path / "fake", None)


@pytest.mark.slow
def test_the_optimized_transformer_is_a_model_of_its_own(
    ray_cluster: str, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(vectors, tmp_path, model="transformer-optimized,amn", epochs=1)
    record = load_record(tmp_path, "transformer-optimized")
    assert record.folder.name.startswith("transformer-optimized-")
    assert (record.name, record.config["parameters"]) == ("transformer-optimized", 17_867_520)
    assert (record.config["recipe"]["name"], record.config["recipe"]["epochs"]) == ("long", 1)
    assert record.ranker is not None
    assert load_record(tmp_path, "amn").config["recipe"]["name"] == "fast"
    assert "recipe long and fast" in capsys.readouterr().err


# ---- failures


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe whose learning rate is fine for AMN and far too high for the LSTM."""
    rates = {**FAST.learning_rates, "lstm": 1e30}
    recipe = replace(BRIEF, name="wild", learning_rates=rates, max_gradient_norm=None, epochs=2)
    monkeypatch.setitem(RECIPES, "wild", recipe)
    return "wild"


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_that_run_alone(
    ray_cluster: str, vectors: Path, tmp_path: Path, wild: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match=r"1 of 2 models failed.*: lstm\. Saved and ready: amn"):
        main(vectors, tmp_path, model="amn,lstm", recipe=wild)
    said = capsys.readouterr().err
    assert "lstm: the loss is nan at epoch 1, batch" in said or "lstm: the validation loss is nan" in said
    assert read_aliases(tmp_path).keys() == {"amn"}
    assert load_record(tmp_path, "amn").metrics["epochs"] == 2


# ---- killed and run again


def train_command(vectors: Path, models: Path, *more: str) -> list[str]:
    options = ["--model", "lstm", "--recipe", "classic", "--epochs", "6"]
    paths = ["--vectors", str(vectors), "--output", str(models)]
    return [sys.executable, "-m", "jobs.train", *paths, *options, *more]


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(ray_cluster: str, vectors: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    log = tmp_path / "first.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stderr:
        # Its own Ray, which dies with it.
        job = subprocess.Popen(
            train_command(vectors, models),
            cwd=CHECKOUT,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while "epoch  2" not in log.read_text():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        started = psutil.Process(job.pid).children(recursive=True)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert read_aliases(models) == {}
    assert psutil.wait_procs(started, timeout=60)[1] == []  # its workers notice that their cluster is gone

    done = subprocess.run(
        train_command(vectors, models, "--address", ray_cluster),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    went_on = [line for line in done.stderr.splitlines() if "resuming after epoch" in line]
    assert len(went_on) == 1, done.stderr
    start = int(went_on[0].split()[-1])
    assert 1 <= start <= 6  # a line comes before its checkpoint
    assert f"epoch {start:>2}  " not in done.stderr  # not trained again
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["stage"] == "train"
    assert summary["redone"] == 1
    assert not summary["up_to_date"]

    # The same as a run nobody killed.
    record = load_record(models, "lstm")
    parts = make_windows(open_vectors(vectors), WindowSettings()).split(0)
    torch.manual_seed(0)
    whole = fit(build("lstm"), "lstm", parts["train"], parts["val"], replace(CLASSIC, epochs=6), seed=0)
    assert [r["epoch"] for r in record.metrics["curve"]] == [0, 1, 2, 3, 4, 5, 6]
    for expected, found in zip(whole.curve, record.metrics["curve"], strict=True):
        assert found.get("train_loss", 0) == pytest.approx(expected.get("train_loss", 0), rel=1e-3)
        assert found["val_cosine"] == pytest.approx(expected["val_cosine"], abs=1e-3)


@pytest.mark.slow
def test_a_run_whose_record_was_lost_is_not_trained_again(
    ray_cluster: str, vectors: Path, tmp_path: Path
) -> None:
    train_models(vectors, tmp_path, ["amn"], BRIEF)
    before = load_record(tmp_path, "amn")
    before.folder.rename(tmp_path.parent / "moved-away")
    (tmp_path / "aliases.json").unlink()
    train_models(vectors, tmp_path, ["amn"], BRIEF)
    after = load_record(tmp_path, "amn")
    assert after.metrics["curve"] == before.metrics["curve"]
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name])

    # Half a list of checkpoints, as a kill in the wrong moment leaves it: set aside, trained anew.
    after.folder.rename(tmp_path.parent / "moved-away-too")
    (snapshot,) = tmp_path.glob("runs/amn-*/checkpoint_manager_snapshot.json")
    snapshot.write_text(snapshot.read_text()[:100])
    (tmp_path / "aliases.json").unlink()
    result = train_models(vectors, tmp_path, ["amn"], BRIEF)
    assert not result.failed
    assert len(list(tmp_path.glob("runs/amn-*.broken-*"))) == 1
    assert load_record(tmp_path, "amn").metrics["epochs"] == 4


# ---- import


def test_an_original_checkpoint_becomes_a_record_with_a_score(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without a correction an AMN is the context's mean.
    model = build("amn")
    torch.nn.init.zeros_(model.output_layer.weight)
    torch.nn.init.zeros_(model.output_layer.bias)
    torch.save({"model_state_dict": model.state_dict(), "epoch": 19}, tmp_path / "best_model.pt")
    main(vectors, tmp_path / "models", import_checkpoint=tmp_path / "best_model.pt")
    record = load_record(tmp_path / "models", "amn")
    assert record.metrics["original_epoch"] == 19
    assert record.metrics["val_cosine"] == pytest.approx(record.metrics["context_mean_val_cosine"], abs=1e-4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["amn"]["up_to_date"] is False


# ---- refusals, before anything is trained


def refuse(vectors: Path, models: Path, names: list[str] | None = None, **more: Any) -> None:
    train_models(vectors, models, names or ["amn"], BRIEF, **more)


def test_an_unknown_model_is_refused(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="unknown model 'mamba'; expected one of amn, lstm, gru, transformer, transformer-optimized, mamba2",
    ):
        refuse(vectors, tmp_path / "models", ["amn", "mamba"])
    assert not (tmp_path / "models").exists()


def test_an_unknown_recipe_is_refused(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe 'slow'; expected one of fast, classic"):
        main(vectors, tmp_path / "models", recipe="slow")


def test_too_few_articles_are_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(6))
    with pytest.raises(InputError, match="expected at least 10 articles"):
        refuse(tmp_path / "vectors", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_unfinished_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="latent encode"):
        refuse(tmp_path / "vectors", tmp_path / "models")
    write_chunks(tmp_path / "chunks", fake_articles(12))
    with pytest.raises(InputError, match="expected"):
        refuse(tmp_path / "chunks", tmp_path / "models")


def test_models_of_another_codec_are_refused(
    trained: tuple[Path, TrainResult], vectors: Path, tmp_path: Path
) -> None:
    models, _ = trained
    write_vectors(tmp_path / "vectors", fake_articles(12), FakeCodec(seed="other"))
    before = read_aliases(models)
    with pytest.raises(IdentityError, match=r"encoder_sha256"):
        refuse(tmp_path / "vectors", models)
    assert read_aliases(models) == before


def test_a_folder_of_another_stage_is_refused(vectors: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds vectors, expected models or an empty folder"):
        refuse(vectors, vectors)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        refuse(vectors, tmp_path / "file")


def test_chains_of_a_taxonomy_are_refused_unless_the_user_insists(tmp_path: Path) -> None:
    top = [f"kind{i} thing entity level number" for i in range(8)]
    chains = [[f"leaf{a} of this chain alone", *top] for a in range(30)]
    write_vectors(tmp_path / "vectors", chains)
    with pytest.raises(InputError, match=r"not sequential.*--allow-non-sequential"):
        refuse(tmp_path / "vectors", tmp_path / "models")
    with pytest.raises(InputError, match="got 'yes'"):
        refuse(tmp_path / "vectors", tmp_path / "models", allow_non_sequential="yes")
    assert not (tmp_path / "models").exists()
    found = check_sequential(open_vectors(tmp_path / "vectors"), "chains", OVERRIDE)
    assert found.fault is not None


def test_a_taxonomy_is_refused_by_its_label(vectors: Path) -> None:
    array = open_vectors(vectors)
    assert check_sequential(array, "my articles", None).fault is None
    with pytest.raises(InputError, match="wordnet_chains"):
        check_sequential(array, "wordnet_chains.jsonl", None)


# ---- resources


@pytest.mark.parametrize(
    ("nodes", "runs", "expected"),
    [
        ([{"CPU": 2.0}], 4, ({"CPU": 0.5}, 1, 2)),
        ([{"CPU": 2.0}], 1, ({"CPU": 2.0}, 2, 2)),
        ([{"CPU": 16.0}], 4, ({"CPU": 4.0}, 4, 16)),
        ([{"CPU": 16.0, "GPU": 1.0}], 4, ({"CPU": 4.0, "GPU": 0.25}, 4, 16)),
        ([{"CPU": 16.0, "GPU": 3.0}], 4, ({"CPU": 4.0, "GPU": 0.5}, 4, 16)),
        ([{"CPU": 64.0, "GPU": 8.0}], 4, ({"CPU": 16.0, "GPU": 1.0}, 16, 64)),
        ([{"CPU": 1.0}, {"CPU": 5.0}], 2, ({"CPU": 2.0}, 2, None)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 4, ({"CPU": 4.0}, 4, None)),
        ([{"CPU": 1.0}], 3, ({"CPU": 0.3333}, 1, 1)),
    ],
)
def test_all_runs_fit_on_the_cluster_at_once(
    nodes: list[dict[str, float]], runs: int, expected: tuple[dict[str, float], int, int | None]
) -> None:
    assert plan_resources(nodes, runs) == expected
    resources = expected[0]
    for key, part in resources.items():
        room = sum(np.floor(n.get(key, 0.0) / part + 1e-3) for n in nodes)
        assert room >= runs
