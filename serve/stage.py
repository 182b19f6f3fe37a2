"""The gateway's client of a deployment: rows of concurrent requests share calls, and lost calls are resent.

A Ray call costs about as much CPU as a prediction, whatever its size. So a row is sent at once while few calls are in
flight, and joins the next call when many are: no delay at low load, shared calls at high load. Every operation is a
pure function of its row, so a call lost with a dead replica is simply resent.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from serve.rows import EXPIRED, Outcome

LOST = (RayActorError, DeploymentUnavailableError)
"""Errors that mean a call was lost. It is resent, as every operation is a pure function of its input."""


class DeadlineError(Exception):
    """The request's deadline passed before this stage answered."""


class StageError(Exception):
    """A row failed in its replica (a server error)."""


class UnavailableError(Exception):
    """No replica handled the call, after repeated attempts."""


class FullError(Exception):
    """The service is at capacity; the client should retry later."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


Call = Callable[[list[Any], list[float]], Awaitable[list[Outcome[Any]]]]
"""Takes rows and the seconds until each one's deadline; returns one outcome per row."""


@dataclass
class Timing:
    """Time that one request's rows spent in a stage, milliseconds."""

    queue_ms: float = 0.0
    """Waiting in the gateway and the replica, and in transit."""
    work_ms: float = 0.0
    """Processing time of the batch."""
    retries: int = 0


@dataclass
class _Row:
    item: Any
    expires: float
    since: float
    done: "asyncio.Future[Outcome[Any]]" = field(default_factory=asyncio.Future)
    retries: int = 0


class Measure(Protocol):
    """Callback for each finished call."""

    def __call__(self, stage: str, *, rows: int, waiting: int, retries: int) -> None: ...


class Stage:
    """Sends rows to one deployment."""

    def __init__(
        self,
        name: str,
        call: Call,
        lost: tuple[type[BaseException], ...],
        max_calls: int,
        max_rows: int,
        measure: Measure | None = None,
        attempts: int = 8,
    ) -> None:
        """lost: errors that mean the call was lost, so that it may be resent."""
        self.name, self._call, self._lost, self._measure = name, call, lost, measure
        self._max_calls, self._max_rows, self._attempts = max_calls, max_rows, attempts
        self._waiting: deque[_Row] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        """Rows sent and not yet answered."""

    @property
    def depth(self) -> int:
        """Rows waiting or in flight."""
        return len(self._waiting) + self._in_flight

    async def run(self, items: Sequence[Any], deadline: float) -> tuple[list[Any], Timing]:
        """The value of each row, in order, and the timing of the slowest.

        deadline: on `time.monotonic`. Raises DeadlineError when it passes, StageError when a row failed,
        UnavailableError when there is no replica. Cancelling the caller removes rows that are not yet sent.
        """
        if not items:
            return [], Timing()
        begun = time.perf_counter()
        rows = [_Row(item, deadline, begun) for item in items]
        self._waiting.extend(rows)
        self._pump()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                outcomes = [await row.done for row in rows]
        except TimeoutError as err:
            raise DeadlineError(f"the deadline passed in stage {self.name}") from err
        finally:
            for row in rows:
                row.done.cancel()
        wall_ms = (time.perf_counter() - begun) * 1000
        for outcome in outcomes:
            if outcome.error == EXPIRED:
                raise DeadlineError(f"the deadline passed in the queue of stage {self.name}")
            if outcome.error is not None:
                raise StageError(f"stage {self.name}: {outcome.error}")
        work_ms = max(o.work_ms for o in outcomes)
        timing = Timing(max(0.0, wall_ms - work_ms), work_ms, max(r.retries for r in rows))
        return [o.value for o in outcomes], timing

    def _pump(self) -> None:
        while self._waiting and len(self._calls) < self._max_calls:
            batch: list[_Row] = []
            while self._waiting and len(batch) < self._max_rows:
                row = self._waiting.popleft()
                if not row.done.done():
                    batch.append(row)
            if batch:
                task = asyncio.create_task(self._send(batch))
                self._calls.add(task)
                task.add_done_callback(self._sent)

    def _sent(self, task: "asyncio.Task[None]") -> None:
        self._calls.discard(task)
        self._pump()

    async def _send(self, batch: list[_Row]) -> None:
        size = len(batch)
        self._in_flight += size
        retries = 0
        try:
            for attempt in range(self._attempts):
                batch = [r for r in batch if not r.done.done()]
                if not batch:
                    return
                now = time.monotonic()
                try:
                    outcomes = await self._call([r.item for r in batch], [r.expires - now for r in batch])
                except self._lost as err:
                    retries += 1
                    for row in batch:
                        row.retries += 1
                    if attempt + 1 == self._attempts:
                        raise UnavailableError(
                            f"stage {self.name} lost {self._attempts} calls in a row ({type(err).__name__}); "
                            "its replicas are being restarted, try again in a few seconds"
                        ) from err
                    # The router may pick a dead replica again. Doubling from 50 ms, 8 attempts span 6 s, about the time
                    # a new replica takes to load.
                    await asyncio.sleep(0.05 * 2**attempt)
                    continue
                for row, outcome in zip(batch, outcomes, strict=True):
                    if not row.done.done():
                        row.done.set_result(outcome)
                return
        except Exception as err:
            for row in batch:
                if not row.done.done():
                    row.done.set_exception(err)
        finally:
            self._in_flight -= size
            if self._measure is not None:
                self._measure(self.name, rows=size, waiting=len(self._waiting), retries=retries)
