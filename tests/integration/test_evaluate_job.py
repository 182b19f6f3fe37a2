"""The evaluate job on a real Ray, over vectors, index and model records made in a temporary folder."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.evaluate import FILES, Paths, evaluate, print_result, write
from lvm.errors import IdentityError, InputError, OutputError
from lvm.evaluate.baselines import RidgeSettings
from lvm.evaluate.evaluation import SCHEMA, Evaluation
from lvm.evaluate.leaderboard import ranking
from lvm.evaluate.metrics import cosines
from lvm.evaluate.scoring import CEILING, EvaluateSettings
from lvm.models import TOYS, build
from lvm.predict.record import load_record, save_record, set_alias
from lvm.vectors.array import open_vectors
from lvm.vectors.index import build_index
from lvm.vectors.sequences import WindowSettings, make_windows
from tests.doubles import FakeCodec, fake_articles, fake_codec, write_vectors

CHECKOUT = Path(__file__).resolve().parents[2]
SETTINGS = EvaluateSettings(
    examples=2,
    text_windows=6,
    pool_chunks=100,
    resamples=200,
    latency_budget_s=0.0,
    ridge=RidgeSettings(max_train_windows=60, max_val_windows=20, penalties=(1.0, 10.0)),
)


def save_toy(
    run: Path,
    name: str,
    seed: int = 0,
    split_seed: int = 0,
    codec: FakeCodec | None = None,
    context: int = 5,
    **more: object,
) -> Path:
    """An untrained toy model with the record a training on these vectors would leave, and its alias."""
    array = open_vectors(run / "vectors")
    torch.manual_seed(seed)
    config = {
        "seed": split_seed,
        "windows": asdict(WindowSettings(context=context)),
        "vectors": {"fingerprint": array.fingerprint},
        **more,
    }
    curve = [{"epoch": 1, "train_loss": 1.5, "val_loss": 1.4, "val_cosine": 0.3, "seconds": 1.0}]
    identity = array.identity if codec is None else codec.identity
    model = build(name, asdict(TOYS[name]))
    folder = save_record(run / "models", name, model, identity, config, {"curve": curve}, {})
    set_alias(run / "models", name, folder)
    return folder


def make_run(run: Path, seed: int = 0) -> Paths:
    """Vectors, index and two toy models in `run`."""
    write_vectors(run / "vectors", fake_articles(24, 12, seed=seed))
    build_index(open_vectors(run / "vectors"), run / "index")
    save_toy(run, "amn")
    save_toy(run, "lstm")
    return paths_of(run)


def paths_of(run: Path) -> Paths:
    return Paths(run / "vectors", run / "index", run / "models", run / "evaluation")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Paths:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def evaluation(paths: Paths) -> Evaluation:
    made, up_to_date = evaluate(paths, fake_codec, SETTINGS)
    assert not up_to_date
    return made


def test_record_page_and_table_are_written_and_agree(paths: Paths, evaluation: Evaluation) -> None:
    assert sorted(p.name for p in paths.output.iterdir()) == sorted(FILES)
    assert json.loads((paths.output / "evaluation.json").read_text()) == evaluation
    assert evaluation["schema"] == SCHEMA
    page = (paths.output / "report.html").read_text()
    table = (paths.output / "leaderboard.md").read_text()
    for entry in evaluation["entries"]:
        assert f"{entry['cosine']['mean']:.4f}" in page
        assert f"{entry['cosine']['mean']:.4f}" in table
    assert evaluation["provenance"]["codec"] == fake_codec().identity.to_dict()
    assert "NaN" not in (paths.output / "evaluation.json").read_text()


def test_models_and_all_baselines_are_scored_on_test_articles_alone(
    paths: Paths, evaluation: Evaluation
) -> None:
    kinds = {e["name"]: e["kind"] for e in evaluation["entries"]}
    assert kinds == {"amn": "model", "lstm": "model"} | dict.fromkeys(
        ("passthrough", "context mean", "weighted mean", "corpus mean", "nearest neighbour", "ridge"),
        "baseline",
    )
    test = make_windows(open_vectors(paths.vectors)).split(0)["test"]
    assert evaluation["split"]["test_windows"] == len(test)
    contexts, targets = test.batch(slice(None))
    with torch.inference_mode():
        predicted = load_record(paths.models, "lstm").model(torch.from_numpy(contexts)).numpy()
    expected = {
        "lstm": cosines(predicted, targets),
        "passthrough": cosines(contexts[:, -1], targets),
        "context mean": cosines(contexts.mean(axis=1), targets),
    }
    for entry in evaluation["entries"]:
        if entry["name"] in expected:
            assert entry["cosine"]["mean"] == pytest.approx(float(expected[entry["name"]].mean()), abs=1e-5)
    ridge = next(e for e in evaluation["entries"] if e["name"] == "ridge")
    assert ridge["details"]["train_windows"] == 60
    for entry in evaluation["entries"]:
        mrr, r10 = entry["in_article_mrr"], entry["in_pool_r10"]
        assert mrr is not None
        assert mrr["mean"] == pytest.approx(entry["in_article"]["mrr"])
        assert r10["mean"] == pytest.approx(entry["in_pool"]["r10"])
        assert mrr["low"] <= mrr["mean"] <= mrr["high"]
        assert bool(entry["controls"]) == (entry["kind"] == "model")
    lstm = next(e for e in evaluation["entries"] if e["name"] == "lstm")
    assert lstm["controls"]["as written"]["cosine"]["mean"] == pytest.approx(lstm["cosine"]["mean"])
    assert lstm["controls"]["article backwards"]["cosine"] != lstm["controls"]["as written"]["cosine"]


def test_every_model_has_a_gate_a_curve_and_latency_at_three_batch_sizes(evaluation: Evaluation) -> None:
    models = [e for e in evaluation["entries"] if e["kind"] == "model"]
    for entry in models:
        assert [at["batch"] for at in entry["latency"]] == [1, 32, 128]
        assert entry["details"]["curve"][0]["epoch"] == 1
        assert entry["peak_bytes"] is not None
        assert entry["peak_bytes"] > 0
        checks = {c["name"]: c["passed"] for c in entry["gate"]["checks"]}
        assert checks["out-of-domain cosine"] is None
        assert checks["inference"] is True
    assert [bool(e.get("attention")) for e in models] == [True, False]


def test_texts_are_decoded_raw_and_snapped_and_the_examples_show_them(evaluation: Evaluation) -> None:
    rows = [(t["name"], t["form"]) for t in evaluation["text"]]
    assert rows == [
        ("amn", "raw"),
        ("amn", "snap"),
        ("amn", "found"),
        ("lstm", "raw"),
        ("lstm", "snap"),
        ("lstm", "found"),
        ("passthrough", "raw"),
        (CEILING, "raw"),
    ]
    assert len(evaluation["examples"]) == 2
    for example in evaluation["examples"]:
        assert len(example["context"]) == 5
        assert example["truth"] not in example["context"]
        for said in example["decoded"]:
            # The double's texts do not encode to the vector, so the corpus answers.
            assert said["source"] == "corpus"
            assert said["text"] not in ("", example["truth"])
            assert bool(said["refused"]) == (said["form"] != "found")
            assert all(
                text.startswith("text of ") and "round-trip cosine" in text for text in said["refused"]
            )


def test_result_is_printed_as_table_and_examples(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(evaluation)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "Leaderboard"
    assert [line.split()[1] for line in lines[2:10]] == [e["name"].split()[0] for e in ranking(evaluation)]
    assert printed.count("true next: ") == 2
    assert len(re.findall(r"^  context [1-5]: ", printed, re.MULTILINE)) == 10


def test_second_run_computes_nothing_and_changes_no_file(paths: Paths, evaluation: Evaluation) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths.output.iterdir()}
    again, up_to_date = evaluate(paths, fake_codec, SETTINGS)
    assert up_to_date
    assert again == evaluation
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths.output.iterdir()} == before


def test_what_a_killed_run_left_half_written_goes(
    paths: Paths, evaluation: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / ".report.html.0123456789ab.tmp").write_text("half a p")
    write(tmp_path, evaluation)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths.output.iterdir())


def test_other_settings_are_refused_and_keep_what_is_there(paths: Paths, evaluation: Evaluation) -> None:
    before = (paths.output / "evaluation.json").read_bytes()
    other = EvaluateSettings(**{**vars(SETTINGS), "examples": 1})
    with pytest.raises(OutputError, match=r"examples was 2, now 1.*pass --overwrite"):
        evaluate(paths, fake_codec, other)
    assert (paths.output / "evaluation.json").read_bytes() == before


def test_vectors_of_another_codec_are_refused_naming_both(paths: Paths) -> None:
    with pytest.raises(IdentityError, match=r"codec fake .*the loaded codec of codec fake"):
        evaluate(paths, other_codec, SETTINGS)


def other_codec() -> FakeCodec:
    return FakeCodec("other words")


def test_a_new_model_is_evaluated_and_one_of_another_split_is_left_out_by_name(
    tmp_path: Path, ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_run(tmp_path)
    evaluate(paths, fake_codec, SETTINGS)
    newer = save_toy(tmp_path, "amn", seed=1)
    record = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(
        json.dumps(record | {"seed": 7, "created": "2099-01-01T00:00:00+00:00"})
    )
    capsys.readouterr()
    made, up_to_date = evaluate(paths, fake_codec, SETTINGS)
    assert not up_to_date
    assert made["split"]["seed"] == 7
    assert [e["name"] for e in made["entries"] if e["kind"] == "model"] == ["amn"]
    assert made["entries"][0]["details"]["folder"] == newer.name
    assert "lstm" in made["split"]["left_out"]
    assert "lstm is left out" in capsys.readouterr().err
    assert "trained with another split: seed 0" in (paths.output / "report.html").read_text()


def test_models_of_different_context_lengths_meet_on_the_same_targets(
    tmp_path: Path, ray_cluster: str
) -> None:
    paths = make_run(tmp_path)
    save_toy(tmp_path, "s4", context=7)
    made, _ = evaluate(paths, fake_codec, SETTINGS)
    assert made["split"]["left_out"] == {}
    array = open_vectors(paths.vectors)
    test = make_windows(array, WindowSettings(context=7)).split(0)["test"]
    assert made["split"]["test_windows"] == len(test)
    contexts, targets = test.batch(slice(None))
    found = {e["name"]: e["cosine"]["mean"] for e in made["entries"]}
    for name, own in (("amn", 5), ("lstm", 5), ("s4", 7)):
        with torch.inference_mode():
            predicted = load_record(paths.models, name).model(torch.from_numpy(contexts[:, -own:])).numpy()
        assert found[name] == pytest.approx(cosines(predicted, targets).mean(), abs=1e-5)

    shorter, up_to_date = evaluate(paths, fake_codec, SETTINGS, context=6)
    assert not up_to_date
    longer_test = make_windows(array, WindowSettings(context=6)).split(0)["test"]
    assert shorter["split"]["test_windows"] == len(longer_test) > len(test)


def test_models_of_other_vectors_are_refused_when_none_is_left(tmp_path: Path, ray_cluster: str) -> None:
    paths, other = make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1)
    mixed = Paths(paths.vectors, paths.index, other.models, paths.output)
    with pytest.raises(
        InputError, match=r"no model was trained on the vectors .* Run `latent train` on these vectors"
    ):
        evaluate(mixed, fake_codec, SETTINGS)
    foreign_index = Paths(paths.vectors, other.index, paths.models, paths.output)
    with pytest.raises(InputError, match="was made from vectors"):
        evaluate(foreign_index, fake_codec, SETTINGS)
    assert not paths.output.exists()


def test_a_model_of_another_codec_is_refused(tmp_path: Path, ray_cluster: str) -> None:
    paths = make_run(tmp_path)
    save_toy(tmp_path, "lstm", codec=other_codec())
    with pytest.raises(IdentityError, match="model lstm-"):
        evaluate(paths, fake_codec, SETTINGS)


def test_a_model_that_predicts_nan_ends_the_job_with_one_plain_message(
    tmp_path: Path, ray_cluster: str
) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(24, 12))
    build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index")
    array = open_vectors(tmp_path / "vectors")
    model = build("amn", asdict(TOYS["amn"]))
    with torch.no_grad():
        # Finite weights, so the record loads; the sum overflows on the way.
        model.residual_net[0].weight.fill_(3e38)  # type: ignore[union-attr]
    config = {"seed": 0, "windows": asdict(WindowSettings()), "vectors": {"fingerprint": array.fingerprint}}
    folder = save_record(tmp_path / "models", "amn", model, array.identity, config, {}, {})
    set_alias(tmp_path / "models", "amn", folder)
    with pytest.raises(InputError, match="holds NaN or infinity, expected finite numbers") as raised:
        evaluate(paths_of(tmp_path), fake_codec, SETTINGS)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "evaluation").iterdir())


def test_foreign_text_decides_the_gate_by_its_lowest_cosine(tmp_path: Path, ray_cluster: str) -> None:
    paths = make_run(tmp_path / "home")
    for name in ("recipes", "dialogue"):
        write_vectors(tmp_path / name / "vectors", fake_articles(12, 10, seed=len(name)))
    foreign = tuple(tmp_path / name / "vectors" for name in ("recipes", "dialogue"))
    made, _ = evaluate(
        Paths(paths.vectors, paths.index, paths.models, paths.output, foreign), fake_codec, SETTINGS
    )
    amn = made["entries"][0]
    assert set(amn["ood"]) == {"recipes", "dialogue"}
    lowest = min(amn["ood"], key=lambda n: amn["ood"][n]["cosine"]["mean"])
    check = next(c for c in amn["gate"]["checks"] if c["name"] == "out-of-domain cosine")
    assert check["passed"] is (amn["ood"][lowest]["cosine"]["mean"] > 0.15)
    assert f"on {lowest}, the lowest" in check["reason"]
    windows = make_windows(open_vectors(foreign[0]))
    contexts, targets = windows.batch(slice(None))
    passthrough = next(e for e in made["entries"] if e["name"] == "passthrough")
    expected = float(np.mean(cosines(contexts[:, -1], targets)))
    assert passthrough["ood"]["recipes"]["cosine"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert "Out of domain" in (paths.output / "leaderboard.md").read_text()


def test_command_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    arguments = [f"--{name}={tmp_path / name}" for name in ("vectors", "index", "models", "output")]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "latent encode" in done.stderr
    assert done.stderr.count("\n") == 1


def test_seeds_of_one_training_are_a_mean_and_a_deviation(tmp_path: Path, ray_cluster: str) -> None:
    paths = make_run(tmp_path)
    folders = [
        save_toy(tmp_path, "amn", 1, series="s", training_seed=1),
        save_toy(tmp_path, "amn", 2, series="s", training_seed=2),
        save_toy(tmp_path, "amn", 4, series="s"),
    ]
    made, _ = evaluate(paths, fake_codec, SETTINGS)
    amn, lstm = (next(e for e in made["entries"] if e["name"] == n) for n in ("amn", "lstm"))
    assert "seeds" not in lstm
    contexts, targets = make_windows(open_vectors(paths.vectors)).split(0)["test"].batch(slice(None))
    with torch.inference_mode():
        models = [load_record(paths.models, f.name).model for f in folders]
        each = [float(cosines(m(torch.from_numpy(contexts)).numpy(), targets).mean()) for m in models]
    assert amn["seeds"]["cosine"]["mean"] == pytest.approx(np.mean(each), abs=1e-5)
    assert amn["seeds"]["cosine"]["deviation"] == pytest.approx(np.std(each, ddof=1), abs=1e-5)
    assert amn["cosine"]["mean"] == pytest.approx(each[2], abs=1e-5)
    shown = f"{np.mean(each):.4f} ±{np.std(each, ddof=1):.4f}"
    assert (paths.output / "leaderboard.md").read_text().count(shown) == 2
    assert shown in (paths.output / "report.html").read_text()
    # Another seed beside the model is another evaluation.
    assert evaluate(paths, fake_codec, SETTINGS)[1]
    save_toy(tmp_path, "amn", 3, series="s", training_seed=3)
    set_alias(paths.models, "amn", folders[2])
    again, up_to_date = evaluate(paths, fake_codec, SETTINGS)
    assert not up_to_date
    assert [len(e["seeds"]["cosine"]["values"]) for e in again["entries"] if "seeds" in e] == [4]
