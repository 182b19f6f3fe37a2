"""Clusters of several nodes: where work is placed, growing and shrinking, and what nobody has."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from jobs.encode import plan
from jobs.evaluate import threads_per_task
from jobs.train import plan_resources
from lvm.models import ORIGINAL
from tests.integration.conftest import CHECKOUT

GPU_NODE, CPU_NODE = {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "shards", "expected"),
    [
        ([{"CPU": 2.0}], 9, (2, {"num_cpus": 1})),
        ([{"CPU": 8.0}], 2, (2, {"num_cpus": 4})),
        ([{"CPU": 1.0}, {"CPU": 1.0}], 1, (1, {"num_cpus": 1})),  # two would wait for ever
        ([{"CPU": 3.0}, {"CPU": 2.0}], 2, (2, {"num_cpus": 2})),
        ([{}, {"CPU": 4.0}], 40, (4, {"num_cpus": 1})),
        ([GPU_NODE, CPU_NODE], 40, (1, {"num_gpus": 1, "num_cpus": 1})),
    ],
)
def test_an_encoding_actor_asks_for_no_more_than_one_node_has(
    nodes: list[dict[str, float]], shards: int, expected: tuple[int, dict[str, Any]]
) -> None:
    assert plan(nodes, shards) == expected


def test_four_models_fit_at_once_beside_the_one_gpu_and_its_cpus() -> None:
    """With a GPU node of two CPUs, a whole CPU a run would let two runs wait for the other two to end."""
    resources, threads, cores = plan_resources([GPU_NODE, CPU_NODE, CPU_NODE], 4)
    assert resources == {"CPU": 0.5, "GPU": 0.25}
    assert (threads, cores) == (1, None)


@pytest.mark.parametrize(
    ("cpus", "largest", "tasks", "expected"),
    [(2, 2, 8, 1), (64, 64, 8, 8), (64, 2, 5, 2), (16, 16, 8, 2)],
)
def test_a_scoring_task_asks_for_no_more_than_one_node_has(
    cpus: int, largest: int, tasks: int, expected: int
) -> None:
    assert threads_per_task(cpus, largest, tasks) == expected


# ---- a real cluster: a head without CPUs, then a node with a "GPU" that torch cannot see, and two with CPUs alone


@pytest.fixture(scope="module")
def placement(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What `placement.py` reports, and what it and the jobs said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.placement", str(tmp_path_factory.mktemp("placement"))],
        cwd=CHECKOUT,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_four_models_are_placed_on_the_gpu_node_all_at_once(placement: tuple[dict[str, Any], str]) -> None:
    report, _ = placement
    assert report["failed"] == {}
    assert report["placed"] == [[report["gpu_node"]]] * len(ORIGINAL)
    assert report["resources"] == [{"CPU": 0.5, "GPU": 0.25}] * len(ORIGINAL)
    assert report["most_at_once"] == len(ORIGINAL)


@pytest.mark.slow
def test_a_gpu_that_torch_cannot_see_is_said_and_the_cpu_does_the_work(
    placement: tuple[dict[str, Any], str],
) -> None:
    report, said = placement
    assert report["devices"] == dict.fromkeys(ORIGINAL, "cpu")
    assert report["encoded"] == 48
    assert report["decoded"] == 4
    for who in ("encode", *(f"train: {name}" for name in ORIGINAL), "evaluate"):
        lines = [line for line in said.splitlines() if line.startswith(f"{who}: Ray assigned a GPU on ")]
        assert len(lines) == (2 if who == "encode" else 1), who  # once a job; two jobs encode
        assert "using the CPU" in lines[0]


@pytest.mark.slow
def test_a_gpu_multiplies_while_the_cpu_tokenises_and_the_vectors_are_the_same(
    placement: tuple[dict[str, Any], str],
) -> None:
    report, _ = placement
    assert report["overlaps"]["tokens and product"] >= 5  # of ten shards
    assert report["overlaps"]["products"] == 0
    assert report["same"] == [True] * 4


@pytest.mark.slow
def test_what_no_node_has_is_an_error_and_not_a_wait(placement: tuple[dict[str, Any], str]) -> None:
    report, said = placement
    for key, wanted in (("no_node", "a CPU"), ("two_gpus", "2 GPUs and a CPU")):
        assert report[key]["said"].startswith(f"expected {wanted} on the cluster, its nodes have "), report[
            key
        ]
        assert 2 <= report[key]["seconds"] < 30
        assert f"waiting up to 2 s for {wanted}; the cluster's nodes have " in said
    assert "0 CPUs, 0 GPUs" in report["no_node"]["said"]
    assert "2 CPUs, 1 GPUs" in report["two_gpus"]["said"]
