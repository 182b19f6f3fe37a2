"""The lock files, what is installed from them, and the workflow that runs CI: deploy/requirements/, .github/."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

CHECKOUT = Path(__file__).resolve().parents[2]
LOCKS = CHECKOUT / "deploy" / "requirements"
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def locked(file: str) -> dict[str, str]:
    """Version by package; every one with at least one hash."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (LOCKS / file).read_text().strip()):
        head, *hashes = entry.split(" \\\n")
        requirement = Requirement(head)
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert hashes
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}", h) for h in hashes), head
        found[requirement.name.lower().replace("_", "-").replace(".", "-")] = pin.version
    return found


def name_of(requirement: Requirement) -> str:
    return requirement.name.lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("gpu.txt", PROJECT["dependencies"] + OPTIONAL["serve"]),
        ("cpu.txt", PROJECT["dependencies"] + OPTIONAL["serve"]),
        ("dev.txt", PROJECT["dependencies"] + OPTIONAL["serve"] + OPTIONAL["dev"]),
    ],
)
def test_what_the_project_asks_for_is_locked_at_a_version_it_takes(file: str, wanted: list[str]) -> None:
    versions = locked(file)
    in_file = [line for line in (LOCKS / "nodes.in").read_text().splitlines() if not line.startswith("#")]
    for text in [*wanted, *in_file]:
        requirement = Requirement(text)
        name = name_of(requirement)
        if name == "torch" and file != "gpu.txt":
            assert name not in versions  # deploy/install.sh: which build depends on the device
            continue
        assert name in versions, f"{name}: run `make lock`"
        assert requirement.specifier.contains(Version(versions[name])), f"{text}: run `make lock`"


def test_one_version_of_each_package_in_all_three() -> None:
    gpu, cpu, dev = (locked(f"{d}.txt") for d in ("gpu", "cpu", "dev"))
    assert cpu.items() <= gpu.items()
    assert {k: v for k, v in dev.items() if k in gpu} == {k: gpu[k] for k in dev.keys() & gpu.keys()}
    cuda = gpu.keys() - cpu.keys()
    assert "torch" in cuda
    assert {c.split("-")[0] for c in cuda} == {"torch", "triton", "cuda", "nvidia"}
    assert gpu["ray"] == ray.__version__  # what the other tests hold the manifests against


def test_files_name_no_index() -> None:
    for file in LOCKS.iterdir():
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", file.read_text()), file


def test_azures_clients_are_those_ray_asks_for() -> None:
    defaults = (Path(ray.__file__).parent / "autoscaler/azure/defaults.yaml").read_text()
    (line,) = [line for line in yaml.safe_load(defaults)["head_setup_commands"] if "azure" in line]
    asked = {r.split("==")[0]: r.split("==")[1] for r in line.split() if "==" in r}
    versions = locked("gpu.txt")
    assert {name: versions.get(name) for name in asked} == asked


def test_the_pages_name_the_driver_of_the_cuda_that_is_locked() -> None:
    """CUDA 13 runs with drivers from 580 on. Source: CUDA Toolkit release notes, table "CUDA Toolkit and Corresponding
    Driver Versions"."""
    cuda = Version(locked("gpu.txt")["cuda-toolkit"])
    assert (cuda.major, cuda.minor) == (13, 0)
    for file in ("docs/operations.md", "deploy/Dockerfile.gpu", "deploy/components/gpu/kustomization.yaml"):
        assert re.search(r"CUDA 13\.0.*580", (CHECKOUT / file).read_text().replace("\n", " ")), file


def test_ci_installs_from_the_lock() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    assert re.search(r"--no-deps --require-hashes -r deploy/requirements/dev\.txt", makefile)
    assert "make test" in (CHECKOUT / ".ci" / "run").read_text()


def test_the_workflow_runs_ci_builds_both_images_and_publishes_on_a_tag_alone() -> None:
    workflow: dict[Any, Any] = yaml.safe_load((CHECKOUT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML 1.1 reads `on` as true
    assert triggers["push"]["tags"] == ["v*"]
    test, image = workflow["jobs"]["test"], workflow["jobs"]["image"]
    assert {"run": "bash .ci/run"} in test["steps"]
    assert image["needs"] == "test"
    assert {m["file"] for m in image["strategy"]["matrix"]["include"]} == {
        "deploy/Dockerfile",
        "deploy/Dockerfile.gpu",
    }
    (build,) = [s["run"] for s in image["steps"] if "docker buildx build" in s.get("run", "")]
    assert "${{ startsWith(github.ref, 'refs/tags/v') && '--push' || '' }}" in build
    assert build.count("--push") == 1
    (login,) = [s for s in image["steps"] if "docker login" in s.get("run", "")]
    assert login["if"] == "startsWith(github.ref, 'refs/tags/v')"
