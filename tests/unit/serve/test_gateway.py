"""What a call's error in a deployment means to the gateway."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from serve.gateway import _call
from serve.stage import StageError


class Handle:
    """A deployment whose method raises."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause

    def options(self, method_name: str) -> "Handle":
        return self

    async def remote(self, *arguments: Any) -> None:
        raise RayTaskError("near", "Traceback …", self.cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("cause", "raised"), [(ActorDiedError(), ActorDiedError), (ValueError("no such row"), StageError)]
)
def test_a_replica_lost_behind_a_deployment_is_a_lost_call(cause: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised) as caught:
        asyncio.run(_call(Handle(cause), "near")([], []))  # type: ignore[arg-type]
    assert not isinstance(caught.value, RayTaskError)
