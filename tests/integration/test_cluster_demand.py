"""What jobs ask of a real cluster, and what they take: free cores, work that waits, a node that is reclaimed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs._training import plan_resources
from tests.integration.conftest import CHECKOUT

WAITS = """
import sys, time
import jobs._ray as shared
shared.START_TIMEOUT_S = 300
shared.connect(sys.argv[1])
shared.nodes_with(gpus=int(sys.argv[2]))
"""


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and a worker of two, joined by this process."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    before = dict(os.environ)
    os.environ.update(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", OMP_NUM_THREADS="1")
    made = Cluster()
    try:
        made.add_node(num_cpus=0, object_store_memory=80 << 20)
        made.add_node(num_cpus=2, object_store_memory=80 << 20)
        environment = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        ray.init(made.address, log_to_driver=False, runtime_env={"env_vars": environment})
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


def test_a_plan_leaves_the_driver_its_cpu(cluster: Any) -> None:
    import ray

    from jobs._ray import nodes_with

    @ray.remote(num_cpus=1)
    class Driver:
        def ready(self) -> None:
            """Holds a CPU, as a job's process does with --driver-cpus 1."""

    driver = Driver.remote()
    ray.get(driver.ready.remote())
    totals = nodes_with(free=False)
    assert sorted(n.get("CPU", 0) for n in totals) == [0, 2]
    free = nodes_with()
    assert sorted(n.get("CPU", 0) for n in free) == [0, 1]
    four, _, _ = plan_resources(free, 4)
    assert 4 * four["CPU"] <= 1  # by the totals each would get half a CPU, and two would wait
    ray.kill(driver)
    assert within(30, lambda: sorted(n.get("CPU", 0) for n in nodes_with()) == [0, 2])


def wanted(address: str) -> list[dict[str, float]]:
    """What waits for nodes, as the autoscaler reads it: bundles of placement groups, and `request_resources`."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply

    reply = GetClusterResourceStateReply.FromString(GcsClient(address).get_cluster_resource_state())
    state = reply.cluster_resource_state
    assert not state.cluster_resource_constraints  # one wish for the whole cluster: the last one counts
    groups = [s.resource_requests for g in state.pending_gang_resource_requests for s in g.bundle_selectors]
    return [dict(r.resources_bundle) for requests in groups for r in requests]


def test_two_jobs_wishes_stand_side_by_side_and_end_with_their_jobs(cluster: Any) -> None:
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, cluster.address, str(gpus)], cwd=CHECKOUT, stderr=subprocess.DEVNULL
        )
        for gpus in (1, 3)
    ]
    try:
        assert within(120, lambda: len(wanted(cluster.address)) == 4)
        assert all(bundle == {"CPU": 1.0, "GPU": 1.0} for bundle in wanted(cluster.address))
        jobs[1].send_signal(signal.SIGKILL)
        jobs[1].wait()
        assert within(60, lambda: len(wanted(cluster.address)) == 1)
        jobs[0].terminate()
        assert within(60, lambda: wanted(cluster.address) == [])
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def test_a_drained_node_that_goes_is_a_preemption(cluster: Any) -> None:
    import ray
    from ray.exceptions import ActorDiedError

    spec = importlib.util.spec_from_file_location("spot", CHECKOUT / "deploy" / "spot.py")
    assert spec is not None
    assert spec.loader is not None
    spot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spot)
    node = cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=80 << 20)

    @ray.remote(num_cpus=1, resources={"spot": 1})
    class Work:
        def where(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    work = Work.remote()
    place = ray.get(work.where.remote(), timeout=120)
    assert spot.drain(120, cluster.address, place) == 0
    cluster.remove_node(node, allow_graceful=False)
    # Its process outlives the node's by a moment.
    answers = (ray.get(work.where.remote(), timeout=120) for _ in range(600) if not time.sleep(0.2))
    with pytest.raises(ActorDiedError) as died:
        list(answers)
    assert died.value.preempted
