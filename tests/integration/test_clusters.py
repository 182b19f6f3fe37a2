"""Clusters of several nodes: where work is placed, growing and shrinking, and what nobody has."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.encode import plan
from jobs.train import plan_resources
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


NOTHING_THERE = """
import sys
import subprocess
import sys
from pathlib import Path
import jobs.encode, jobs._ray
from lvm.errors import LvmError
from tests.doubles import fake_articles, fake_codec, write_chunks
from tests.integration.faults.world import World

jobs.encode.START_TIMEOUT_S = 3
world = World(num_workers=0)
world.connect()
folder = Path(sys.argv[1])
write_chunks(folder / "chunks", fake_articles(2))
try:
    jobs.encode.encode_chunks(folder / "chunks", folder / "vectors", fake_codec)
except LvmError as err:
    print("refused:", err, flush=True)
world.close()
"""


def test_what_no_node_has_is_an_error_and_not_a_wait(tmp_path: Path) -> None:

    done = subprocess.run(
        [sys.executable, "-c", NOTHING_THERE, str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "refused: no worker with {'num_cpus': 1} started within 3 s" in done.stdout, done.stderr[-2000:]
