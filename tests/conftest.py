"""What unit and integration tests share: the `integration` mark goes by folder."""

import logging
import os
import secrets
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # before torch is imported: each process of a run has a core


def pytest_configure(config: pytest.Config) -> None:
    """One token for all Rays of a run in several processes: each would write one to the home folder at its first
    start, and the last one's would be the only one left."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test under tests/integration, so that `-m "not integration"` is the fast run."""
    folder = Path(__file__).parent / "integration"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.integration)


def pytest_unconfigure() -> None:
    """torch's compiler logs once more when the interpreter ends, to a stream that pytest has closed by then."""
    logging.raiseExceptions = False
