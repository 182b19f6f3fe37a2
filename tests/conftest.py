"""What unit and integration tests share: the `integration` mark goes by folder."""

import logging
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test under tests/integration, so that `-m "not integration"` is the fast run."""
    folder = Path(__file__).parent / "integration"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.integration)


def pytest_unconfigure() -> None:
    """torch's compiler logs once more when the interpreter ends, to a stream that pytest has closed by then."""
    logging.raiseExceptions = False
