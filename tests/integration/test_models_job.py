"""`latent models` and `latent promote`: what is listed, which gate is asked, and that aliases move alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate import current_records
from jobs.models import described, list_models, promote
from lvm.errors import InputError
from lvm.evaluate.evaluation import SCHEMA
from lvm.models import TOYS, build
from lvm.predict.predictor import SHIPPED
from lvm.predict.record import read_aliases, save_record, set_alias
from lvm.storage import Location
from tests.doubles import FakeCodec


def save(models: Path, name: str, cosine: float) -> Location:
    metrics = {"val_cosine": cosine}
    model = build(name, asdict(TOYS[name]))
    return save_record(models, name, model, FakeCodec().identity, {"windows": {"context": 5}}, metrics, {})


def evaluation(run: Path, verdicts: dict[str, bool], schema: str = SCHEMA) -> None:
    """An evaluation with these records' gates."""
    entries: list[dict[str, Any]] = [{"kind": "baseline", "details": {}}]
    for folder, passed in verdicts.items():
        checks = [{"name": "cosine", "passed": passed, "reason": ""}]
        entries.append(
            {
                "kind": "model",
                "details": {"folder": folder},
                "gate": {"passed": passed, "checks": checks},
            }
        )
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "evaluation.json").write_text(json.dumps({"schema": schema, "entries": entries}))


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Location, Location]:
    """A run with an amn and a gru, each with the alias of its name."""
    models = tmp_path / "models"
    amn, gru = save(models, "amn", 0.4), save(models, "gru", 0.5)
    set_alias(models, "amn", amn)
    set_alias(models, "gru", gru)
    return tmp_path, amn, gru


def test_records_are_listed_with_their_aliases(run: tuple[Path, Location, Location]) -> None:
    folder, amn, gru = run
    old = save(folder / "models", "lstm", 0.3)
    rows = {row["record"]: row for row in described(folder / "models")}
    assert rows.keys() == {amn.name, gru.name, old.name}
    assert rows[gru.name]["aliases"] == ["gru"]
    assert rows[old.name]["aliases"] == []
    assert (rows[amn.name]["val_cosine"], rows[amn.name]["context"]) == (0.4, 5)


def test_a_model_that_passed_is_promoted_and_other_aliases_stay(run: tuple[Path, Location, Location]) -> None:
    folder, amn, gru = run
    evaluation(folder, {amn.name: True, gru.name: True})
    promote("amn", folder)
    promote("gru", folder)
    assert read_aliases(folder / "models") == {"amn": amn.name, "gru": gru.name, "best": gru.name}
    said = [json.loads(line) for line in (folder / "models" / "promotions.jsonl").read_text().splitlines()]
    assert [(s["record"], s["before"], s["gate"]) for s in said] == [
        (amn.name, None, "pass"),
        (gru.name, amn.name, "pass"),
    ]
    # Evaluated once, though two aliases point to it.
    assert {r.folder.name for r in current_records(folder / "models").values()} == {amn.name, gru.name}
    assert len(current_records(folder / "models")) == 2


@pytest.mark.parametrize("verdict", ["failed", "not evaluated", "no evaluation", "older schema"])
def test_what_did_not_pass_is_promoted_by_force_alone(
    verdict: str, run: tuple[Path, Location, Location]
) -> None:
    folder, amn, gru = run
    if verdict != "no evaluation":
        schema = "latent-evaluation/1" if verdict == "older schema" else SCHEMA
        evaluation(folder, {amn.name if verdict == "not evaluated" else gru.name: False}, schema)
    wanted = {
        "failed": "fail: cosine",
        "not evaluated": f"evaluated {amn.name}, not {gru.name}",
        "no evaluation": "run `latent evaluate` first",
        "older schema": "expected 'latent-evaluation/2'",
    }[verdict]
    with pytest.raises(InputError, match=wanted):
        promote("gru", folder)
    assert "best" not in read_aliases(folder / "models")
    with pytest.raises(InputError, match="expected a reason"):
        promote("gru", folder, force=" ")
    promote("gru", folder, force="no other test set yet")
    assert read_aliases(folder / "models")["best"] == gru.name


def test_what_is_no_record_or_no_alias_is_refused(run: tuple[Path, Location, Location]) -> None:
    folder, _, gru = run
    with pytest.raises(InputError, match="no model 'transformer' in"):
        promote("transformer", folder, force="x")
    with pytest.raises(InputError, match="expected a plain name such as best"):
        promote("gru", folder, alias="../gru", force="x")
    (gru / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="SHA-256"):
        promote("gru", folder, force="x")


def test_without_a_run_the_bundled_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    list_models()
    found = capsys.readouterr()
    aliases = {alias for row in json.loads(found.out)["models"] for alias in row["aliases"]}
    assert aliases == set(read_aliases(SHIPPED)) == {"amn", "gru"}
    assert "amn" in found.err


@pytest.mark.parametrize("content", ["{", "[]", '{"codec": null}', '{"parameters": "many"}'])
def test_a_damaged_record_does_not_hide_the_others(
    run: tuple[Path, Location, Location], content: str
) -> None:
    folder, amn, gru = run
    (folder / "models" / gru.name / "config.json").write_text(content)
    rows = {row["record"]: row for row in described(folder / "models")}
    assert "damaged" in rows[gru.name]
    assert rows[amn.name]["val_cosine"] == 0.4
