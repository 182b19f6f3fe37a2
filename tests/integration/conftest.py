"""One real local Ray for the whole run."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.objects import bucket, own_cache, s3_server
from tests.postgres import database, plain, server

__all__ = ["CHECKOUT", "bucket", "database", "own_cache", "plain", "ray_cluster", "s3_server", "server"]

CHECKOUT = Path(__file__).resolve().parents[2]


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
