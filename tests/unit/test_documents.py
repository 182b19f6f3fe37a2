"""Commands in documents and in the comments of shipped files exist with their options, and figures are the model's."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lvm
from tests.bench import scaling_model
from tests.commands import commands_in, unknown_options

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
DOCUMENTS = [
    *PAGES,
    CHECKOUT / "cluster.yaml",
    *sorted((CHECKOUT / "deploy").rglob("*.yaml")),
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
    assert found["README.md"] >= 3
    assert found["jobs.md"] >= 12
    assert found["codecs.md"] >= 7
    assert found["decoding.md"] >= 2
    assert found["serving.md"] >= 2
    assert found["operations.md"] >= 4
    assert found["scaling.md"] >= 1
    jobs = [CHECKOUT / f"deploy/base/{work}/rayjob.yaml" for work in ("backfill", "train")]
    assert [len(commands_in(p.read_text())) for p in jobs] == [1, 1]
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


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", path.read_text()):
        page = path.parent / target if target else path
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles], anchor


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda p: p.name)
def test_a_page_begins_with_who_needs_it_and_the_readme_leads_to_it(path: Path) -> None:
    title, empty, first = path.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert empty == ""
    assert re.match(r"For (those|users|readers) (who|of|with) ", first)
    assert f"](docs/{path.name})" in README


# ---- README.md


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 100
    assert len(README.split()) <= 900  # three minutes at 300 words a minute


def test_every_figure_of_the_readme_stands_in_its_results_file() -> None:
    table = README.partition("## Three figures")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| (?!what|---)[^|]+\| ([^|]+) \| \[\w+\]\((tests/bench/results/[^)]+)\) \|$", table, re.M
    )
    assert len(rows) == 3
    for measured, source in rows:
        numbers = re.findall(r"\d[\d.,]*\d%?", measured)
        assert numbers, measured
        assert [n for n in numbers if n not in (CHECKOUT / source).read_text()] == [], source


def test_no_figure_of_the_readme_stands_outside_that_table() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.S).replace(
        README.partition("## Three figures")[2].partition("\n## ")[0], ""
    )
    said = re.findall(r"\d[\d.,]*\s?(?:%|times|s\b|ms\b|GiB|MB)", prose)
    assert said == []


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_readme_shows_the_lines_of_the_quickstart() -> None:
    (shown,) = python_blocks(README)
    lines = (CHECKOUT / "docs" / "quickstart.py").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in shown.splitlines() if line] == code
    assert 8 <= len(code) <= 14


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_python_in_a_page_names_what_the_library_has(path: Path) -> None:
    for block in python_blocks(path.read_text()):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "lvm"
            ):
                assert node.attr in lvm.__all__
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "lvm":
                    signature = inspect.signature(getattr(lvm, node.func.attr))
                    signature.bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})


def test_every_name_of_the_library_is_on_its_page() -> None:
    page = (CHECKOUT / "docs" / "python.md").read_text() + README
    named = {
        "load_codec",
        "chunk",
        "load_predictor",
        "Generator",
        "open_vectors",
        "fit",
        "load_index",
        "IdentityError",
    }
    assert [n for n in sorted(named) if f"lvm.{n}" not in page] == []


def test_the_quickstart_runs_as_it_stands() -> None:
    done = subprocess.run(
        [sys.executable, "docs/quickstart.py"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    back, *predictions = done.stdout.splitlines()
    assert " ".join(ast.literal_eval(back)).startswith(
        "The steam engine was first used to pump water out of mines."
    )
    assert " ".join(ast.literal_eval(back)).endswith("that older ones burned.")
    assert len(predictions) == 2
    for line in predictions:
        assert re.fullmatch(r"(writer|exact) -?\d\.\d\d \S.+", line)


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
    assert scaling_model.CODE_BYTES == 768 // 4 * 4 // 8 + 8
    assert scaling_model.VECTOR_BYTES > 768 * 2
    assert scaling_model.hours(1000, scaling_model.Rate(2000, 1, 10, ""), 1) == pytest.approx(1 / 8 / 3600)
    assert scaling_model.hours(1000, scaling_model.Rate(2000, 1, 1000, ""), 9) == pytest.approx(1 / 8 / 3600)
