"""Every third-party import is declared where it is used, and what is declared is used: pyproject.toml and the code."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from lvm.cli import SERVE_NEEDS

CHECKOUT = Path(__file__).resolve().parents[2]
OWN = {"lvm", "jobs", "serve", "tests"}

PACKAGE_OF = {
    "backports": "backports.zstd",
    "compression": "backports.zstd",  # the standard library's from Python 3.14 on
    "faiss": "faiss-cpu",
    "mlflow": "mlflow-skinny",
    "pydantic_core": "pydantic",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Module to the package that brings it, where the two differ by more than - and _."""

NOT_IMPORTED = {
    "tensorboard": "torch.utils.tensorboard, which latent train writes curves with, needs it",
    "ruff": "make check",
    "mypy": "make check",
    "pytest-xdist": "make test",
    "langchain-openai": "tests import it by pytest.importorskip",
    "llama-index-embeddings-openai": "tests import it by pytest.importorskip",
    "openai": "tests import it by pytest.importorskip",
    "schemathesis": "tests import it by pytest.importorskip",
}
"""Declared and in no import line: package to who uses it."""


def imports_of(file: Path) -> set[str]:
    """Packages of the third-party modules a file imports, wherever in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
    top = {m.partition(".")[0] for m in modules} - set(sys.stdlib_module_names) - OWN
    return {PACKAGE_OF.get(m, m.replace("_", "-")) for m in top}


def imports_below(*folders: str) -> dict[str, set[str]]:
    """Package to the files below these folders that import it."""
    found: dict[str, set[str]] = {}
    for file in (f for folder in folders for f in (CHECKOUT / folder).rglob("*.py")):
        for package in imports_of(file):
            found.setdefault(package, set()).add(file.relative_to(CHECKOUT).as_posix())
    return found


def names(requirements: Iterable[str]) -> set[str]:
    """Packages of requirement lines, without extras and versions."""
    return {re.split(r"[\[<>=!~; ]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}


PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
MAIN = names(PROJECT["dependencies"])
SERVE = names(PROJECT["optional-dependencies"]["serve"])
MLFLOW = names(PROJECT["optional-dependencies"]["mlflow"])
DEV = names(PROJECT["optional-dependencies"]["dev"])


@pytest.mark.parametrize(
    ("folders", "declared"),
    [(("lvm", "jobs"), MAIN | MLFLOW), (("serve",), MAIN | SERVE), (("tests",), MAIN | SERVE | DEV)],
    ids=["lvm and jobs", "serve", "tests"],
)
def test_every_import_is_declared(folders: tuple[str, ...], declared: set[str]) -> None:
    assert {p: files for p, files in imports_below(*folders).items() if p not in declared} == {}


@pytest.mark.parametrize(
    ("declared", "folders"),
    [(MAIN, ("lvm", "jobs")), (MLFLOW, ("lvm",)), (SERVE, ("serve",)), (DEV, ("tests",))],
    ids=["dependencies", "mlflow", "serve", "dev"],
)
def test_what_is_declared_is_used(declared: set[str], folders: tuple[str, ...]) -> None:
    assert declared - set(imports_below(*folders)) - set(NOT_IMPORTED) == set()


def test_what_only_tests_or_serving_import_is_no_dependency_of_all() -> None:
    assert DEV.isdisjoint(MAIN | SERVE)
    assert {"ray"} == MAIN & SERVE  # Ray Serve is a part of it


def test_the_exceptions_are_declared_and_needed() -> None:
    assert set(NOT_IMPORTED) <= MAIN | DEV
    assert set(NOT_IMPORTED).isdisjoint(imports_below("lvm", "jobs", "serve"))


def test_serving_without_its_extra_is_one_line() -> None:
    assert set(SERVE_NEEDS) == SERVE - {"ray"}
    code = (
        "import lvm.cli; lvm.cli.find_spec = lambda name: None if name == 'uvicorn' else object(); "
        "lvm.cli.app(['serve', '--run', 'nowhere'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: latent serve needs uvicorn, which is not installed; run pip install -e '.[serve]'"
    ]


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os\ndef f():\n    import sklearn.svm\n    from yaml import load\nfrom lvm import fit\n"
    )
    assert imports_of(file) == {"scikit-learn", "pyyaml"}
    assert names(["a_b>=1", "c[x,y]==2", "d ; python_version"]) == {"a-b", "c", "d"}
