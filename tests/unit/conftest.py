"""Unit means no cluster: a test here that starts Ray fails at once."""

from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def disallow_ray_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `ray.init` raise."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("a unit test called ray.init; move it to tests/integration")

    monkeypatch.setattr("ray.init", refuse)
