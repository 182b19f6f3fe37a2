"""Commands in documents and in the comments of shipped files exist with their options, and figures are the model's."""

import re
from pathlib import Path

import pytest

from tests.bench import scaling_model
from tests.commands import commands_in, unknown_options

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    CHECKOUT / "README.md",
    CHECKOUT / "cluster.yaml",
    *sorted((CHECKOUT / "docs").glob("*.md")),
    *sorted((CHECKOUT / "deploy").glob("*.yaml")),
    CHECKOUT / "deploy" / "Dockerfile",
    CHECKOUT / "serve" / "config.yaml",
    *sorted((CHECKOUT / "jobs").glob("*.py")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(CHECKOUT).as_posix())
def test_every_command_in_it_exists_with_its_options(path: Path) -> None:
    wrong = {
        command: found for command in commands_in(path.read_text()) if (found := unknown_options(command))
    }
    assert wrong == {}


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    for path in (CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")):
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(), re.MULTILINE)) <= targets, path


def test_commands_are_found_in_the_documents_that_have_some() -> None:
    found = {p.name: len(commands_in(p.read_text())) for p in DOCUMENTS}
    assert found["README.md"] >= 15
    assert found["operations.md"] >= 4
    assert found["scaling.md"] >= 1
    assert found["backfill.yaml"] == found["train.yaml"] == 1
    assert found["encode.py"] >= 2


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("latent encode --inptu x", ["--inptu"]),
        ("python -m jobs.train --vectors a --recipes b", ["--recipes"]),
        ("latent submit --adress x encode --input y", ["--adress"]),
        ("latent submit --no-wait encode --codek y", ["--codek"]),
        ("ray job submit --working-dir . -- python -m jobs.index --imput x", ["--imput"]),
        ("LATENT_API_KEYS=a latent serve --hots 1", ["--hots"]),
        ("latent codec eval --json --limt 3", ["--limt"]),
        ("latent codec eval --json --limit 3", []),
    ],
)
def test_a_wrong_option_is_found(command: str, wrong: list[str]) -> None:
    assert unknown_options(commands_in(command)[0]) == wrong


def test_a_command_that_is_none_is_found() -> None:
    with pytest.raises(KeyError):
        unknown_options("latent encoed --input x")
    with pytest.raises(ModuleNotFoundError):
        unknown_options("python -m jobs.encoed --input x")


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in (CHECKOUT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


# ---- docs/scaling.md


def test_the_tables_are_those_the_model_prints() -> None:
    page = (CHECKOUT / "docs" / "scaling.md").read_text()
    assert scaling_model.tables() in page
    assert scaling_model.sources() in page


def test_every_rate_stands_in_its_results_file() -> None:
    for stage, rate in scaling_model.RATES.items():
        text = (CHECKOUT / "tests" / "bench" / "results" / rate.source).read_text()
        assert f"{rate.chunks:,} chunks" in text
        assert f"{stage} {rate.seconds}," in text


def test_sizes_are_those_of_the_formats() -> None:
    assert scaling_model.INDEX_BYTES == 768 // 4 * 4 // 8 + 768 * 2 + 8
    assert scaling_model.VECTOR_BYTES > 768 * 2
    assert scaling_model.hours(1000, scaling_model.Rate(2000, 1, True, ""), 1) == pytest.approx(1 / 8 / 3600)
    assert scaling_model.hours(1000, scaling_model.Rate(2000, 1, False, ""), 9) == pytest.approx(1 / 8 / 3600)
