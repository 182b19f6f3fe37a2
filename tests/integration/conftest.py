"""One real local Ray for the whole run, or for each process of a run in several (`-n 2`)."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.objects import bucket, own_cache, s3_server
from tests.postgres import database, plain, server

__all__ = ["CHECKOUT", "bucket", "database", "own_cache", "plain", "ray_cluster", "s3_server", "server"]

CHECKOUT = Path(__file__).resolve().parents[2]

FIRST = ("test_commands", "test_train_job", "test_chunk_job", "test_generate_job")
"""Long files that a run in several processes begins with, so that none of them is left for the end."""

LAST = ("test_serve_http", "test_serve_faults")
"""Files it ends with: while others are at work, their tests that are `alone` would keep those waiting."""

LEAVES_RAY = "test_cluster_demand"
"""It joins a cluster of its own, after which its process has no shared Ray: nothing comes after it."""

IN_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process is one of those of `pytest -n`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files."""
    place = {LEAVES_RAY: 200}
    if IN_SEVERAL:
        place |= {name: number - 100 for number, name in enumerate(FIRST)}
        place |= {name: number + 100 for number, name in enumerate(LAST)}
    items.sort(key=lambda item: place.get(item.path.stem, 0))


@contextmanager
def locked(file: Path, how: int) -> Iterator[None]:
    with file.open() as lock:
        fcntl.flock(lock, how)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """In a run in several processes, a test marked `alone` runs, with its fixtures, while no other test does."""
    if not IN_SEVERAL:
        return (yield)
    door, room = Path(__file__), Path(__file__).with_name("__init__.py")
    with ExitStack() as held:
        with locked(door, fcntl.LOCK_EX):  # held by who waits to be alone: meanwhile nobody else goes in
            alone = item.get_closest_marker("alone")
            held.enter_context(locked(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a local Ray with 2 CPUs whose workers can import lvm, jobs and tests.doubles."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    context = ray.init(
        address="local",  # else a cluster that some other process left behind is joined, dead or alive
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}},
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
