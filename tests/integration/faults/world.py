"""A real cluster of several nodes on this machine, and the means to break it."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).resolve().parents[3]


class World:
    """A head without CPUs and two workers with one each; what is killed is replaced by `mend`."""

    def __init__(self, num_workers: int = 2) -> None:
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # A dead worker node is missed after this long instead of 30 s.
        os.environ.setdefault("RAY_health_check_period_ms", "500")
        os.environ.setdefault("RAY_health_check_failure_threshold", "4")
        # A worker process takes seconds to import what it needs; the second run of a stage may have the first one's.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        os.environ.setdefault("RAY_num_workers_soft_limit", "4")
        # A thread of a disturbed run that is still there at the end must not start a Ray of its own.
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        self.num_workers = num_workers
        self.cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20},
        )
        self.nodes: list[Any] = []
        self.mend()
        self.address = str(self.cluster.address)

    def free_leftovers(self) -> int:
        """Remove placement groups of drivers that are gone; how many there were.

        Ray Train's controller may make one in the very moment its driver is killed. Nobody takes it away then, and a
        CPU of this small cluster would be missing in all that follows.
        """
        import ray
        from ray.util import placement_group_table, remove_placement_group
        from ray.util.placement_group import PlacementGroup

        gone = {j["JobID"] for j in ray._private.state.jobs() if j["IsDead"]}
        # An id ends in its job's.
        left = [i for i, g in placement_group_table().items() if g["state"] != "REMOVED" and i[-8:] in gone]
        for found in left:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(found))))
        return len(left)

    def mend(self) -> None:
        """Bring the number of workers back."""
        while len(self.nodes) < self.num_workers:
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20))

    def connect(self) -> None:
        """Make this process a driver of the cluster."""
        import ray

        if not ray.is_initialized():
            ray.init(
                address=self.address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}},
            )

    def kill_raylet(self, pick: int) -> None:
        """SIGKILL one worker node's raylet, and give the cluster another node."""
        node = self.nodes.pop(pick % len(self.nodes))
        for info in node.all_processes["raylet"]:
            os.kill(info.process.pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)
        self.mend()

    def workers(self, name: str) -> list[psutil.Process]:
        """Processes of this cluster's workers whose title holds `name`, as Ray names them."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and name in title:
                    found.append(process)
        return found

    def kill_worker(self, name: str, pick: int, wait_s: float = 20.0) -> bool:
        """SIGKILL one such process as soon as there is one; False when there was none in time."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            if found := self.workers(name):
                with contextlib.suppress(psutil.Error):
                    found[pick % len(found)].kill()
                    return True
            time.sleep(0.01)
        return False

    def close(self) -> None:
        """End the cluster."""
        import ray

        ray.shutdown()
        self.cluster.shutdown()


def start_driver(stage: str, folder: Path, address: str, step: int | None = None) -> "subprocess.Popen[str]":
    """`driver.py` as a process."""
    command = [sys.executable, "-m", "tests.integration.faults.driver", stage, str(folder), address]
    return subprocess.Popen(
        command + ([] if step is None else [str(step)]),
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: Callable[[], bool], alive: Callable[[], bool], timeout_s: float = 90.0) -> None:
    """Return once `what()` holds, or what might bring it about has ended."""
    end = time.monotonic() + timeout_s
    while not what() and alive() and time.monotonic() < end:
        time.sleep(0.01)


@contextlib.contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[Callable[[], None]]:
    """`path` lies on a file system of this size until the function that comes back is called.

    A tmpfs of its own. Raises PermissionError where this process may not mount one.
    """
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={num_bytes // 4096 * 4096}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PermissionError(f"no tmpfs could be mounted ({done.stderr.strip()}); run as root")

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=256m", str(path)], check=True)

    try:
        yield grow
    finally:
        # The results are kept: the folder without its mount would be empty.
        with tempfile.TemporaryDirectory() as keep:
            shutil.copytree(path, Path(keep, "copy"), symlinks=True)
            subprocess.run(["umount", "-l", str(path)], check=True)
            shutil.copytree(Path(keep, "copy"), path, dirs_exist_ok=True)


def can_mount() -> bool:
    """True where `small_disk` works."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder, "disk"), 1 << 20):
                return True
        except (PermissionError, FileNotFoundError):
            return False
