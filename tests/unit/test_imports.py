"""The arrows between the parts, read from the import lines of every file."""

import ast
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = sorted(p for part in ("lvm", "jobs", "serve") for p in (CHECKOUT / part).rglob("*.py"))
WEB = {"fastapi", "starlette", "uvicorn", "flask", "aiohttp"}

FORBIDDEN = {
    "lvm": {"ray", "jobs", "serve", *WEB},
    "jobs": {"serve", *WEB},
    "serve": {"jobs"},
    "lvm/corpus": {"lvm.codec", "lvm.models", "lvm.predict", "lvm.evaluate"},
    "lvm/models": {"lvm", "numpy", "pyarrow", "faiss"},
    "lvm/vectors": {"lvm.codec", "lvm.models", "lvm.predict", "lvm.evaluate"},
    "lvm/codec": {"lvm.models", "lvm.predict", "lvm.evaluate", "lvm.vectors", "lvm.corpus"},
    "lvm/predict": {"lvm.evaluate"},
}
"""Folder to the modules its files may not import."""

ALLOWED = {"lvm.codec.identity", "lvm.errors", "lvm.models"}
"""The identity is what every part checks, and the errors are everybody's; models import each other's names."""


def imported(file: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file} line {node.lineno}: relative import, expected the full name"
            names.add(node.module)
    return names


def inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def violations(file: Path) -> list[str]:
    folder = file.relative_to(CHECKOUT).parent.as_posix()
    found = []
    for part, modules in FORBIDDEN.items():
        if not inside(folder.replace("/", "."), part.replace("/", ".")):
            continue
        for name in imported(file):
            allowed = any(
                inside(name, a) for a in ALLOWED if not (a == "lvm.models" and folder != "lvm/models")
            )
            if any(inside(name, m) for m in modules) and not allowed:
                found.append(name)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.relative_to(CHECKOUT).as_posix())
def test_imports_follow_the_arrows(file: Path) -> None:
    assert violations(file) == []


SHARED = {"jobs._ray", "jobs._training"}
"""What several jobs are made of; no jobs themselves."""


def test_jobs_do_not_import_jobs() -> None:
    for file in (CHECKOUT / "jobs").glob("*.py"):
        # A job that is run as __main__ may import itself by name, so that its classes pickle by reference.
        assert {n for n in imported(file) if inside(n, "jobs")} <= {*SHARED, f"jobs.{file.stem}"}, file


def test_the_check_finds_a_wrong_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CHECKOUT", tmp_path)
    wrong = tmp_path / "lvm" / "codec" / "wrong.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(
        "def f():\n    import ray.data\n    from lvm.models import MODELS\n    import lvm.codec.identity\n"
    )
    assert sorted(violations(wrong)) == ["lvm.models", "ray.data"]


def test_the_command_line_imports_nothing_heavy() -> None:
    names = imported(CHECKOUT / "lvm" / "cli.py")
    assert {n.split(".")[0] for n in names} <= {
        "os",
        "shlex",
        "signal",
        "subprocess",
        "sys",
        "importlib",
        "pathlib",
        "typing",
        "typer",
    }


def test_no_file_imports_the_folder_that_has_the_name_of_rays_own() -> None:
    for file in FILES:  # `import serve` reads like `from ray import serve` and is another thing
        assert "serve" not in imported(file), file


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "helpers", "common", "base", "manager", "factory"}
    assert not [f for f in FILES if f.stem in drawers]
