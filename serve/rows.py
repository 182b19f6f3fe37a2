"""The batching queues inside a replica: rows of many callers share a batch; abandoned and late rows are dropped.

No timer delays a batch: while one runs, the next one fills, and an idle replica starts a single row at once. Only a
round of a `StreamQueue` waits briefly for rows that callers have announced, if they outnumber the rows present.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
Item_contra = TypeVar("Item_contra", contravariant=True)
Value_co = TypeVar("Value_co", covariant=True)

EXPIRED = "expired"
"""`Outcome.error` of a row that was dropped because its deadline had passed."""


@dataclass
class Outcome(Generic[Value]):
    """Result of one row."""

    value: Value | None = None
    error: str | None = None
    """None, EXPIRED, or this row's error."""
    queue_ms: float = 0.0
    """Time in the replica before its batch started."""
    work_ms: float = 0.0
    """Processing time of its batch."""
    batch_rows: int = 0
    """Number of rows in its batch."""


@dataclass
class _Waiting(Generic[Item, Value]):
    item: Item
    expires: float
    """On `time.monotonic`."""
    since: float = field(default_factory=time.perf_counter)
    done: "asyncio.Future[Outcome[Value]]" = field(default_factory=asyncio.Future)


class Stream(Protocol[Item_contra, Value_co]):
    """Work done in rounds: rows join between rounds and leave when they are done."""

    def add(self, item: Item_contra) -> int:
        """Add a row to the next round; returns its ticket."""

    def drop(self, ticket: int) -> None:
        """Cancel a row."""

    def run(self) -> Mapping[int, Value_co]:
        """Run one round; values of the finished rows, by ticket."""


class _Queue(Generic[Item, Value]):
    """Waiting rows, and a task that processes them until none is left."""

    def __init__(
        self, max_rows: int, measure: Callable[[int, int, int], None] | None, thread_name: str
    ) -> None:
        self._max_rows, self._measure = max_rows, measure
        self._waiting: deque[_Waiting[Item, Value]] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=thread_name)
        self.dropped = 0
        """Rows dropped so far."""

    async def submit(self, items: Sequence[Item], remaining_s: Sequence[float]) -> list[Outcome[Value]]:
        """An Outcome for each row, in order. remaining_s: seconds until each row's deadline."""
        now = time.monotonic()
        rows: list[_Waiting[Item, Value]] = [
            _Waiting(item, now + left) for item, left in zip(items, remaining_s, strict=True)
        ]
        self._waiting.extend(rows)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        try:
            return [await row.done for row in rows]
        except asyncio.CancelledError:
            for row in rows:  # `_next_live` or `_sweep` removes the rows
                row.done.cancel()
            raise

    async def _run(self) -> None:
        """Process rows until none is left."""
        raise NotImplementedError

    def _next_live(self) -> _Waiting[Item, Value] | None:
        """Pop the oldest row; None if it was dropped, as its caller is gone or its deadline passed."""
        row = self._waiting.popleft()
        if row.done.done():
            self.dropped += 1
        elif row.expires <= time.monotonic():
            self.dropped += 1
            row.done.set_result(Outcome(error=EXPIRED, queue_ms=_ms(row.since)))
        else:
            return row
        return None


class StreamQueue(_Queue[Item, Value]):
    """Runs rounds of a `Stream` in a thread while there are rows."""

    def __init__(
        self,
        stream: Stream[Item, Value],
        max_rows: int,
        measure: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """max_rows: maximum rows per round. measure: as in `RowQueue`, called after each round."""
        super().__init__(max_rows, measure, "rounds")
        self._stream = stream
        self._inside: dict[int, tuple[_Waiting[Item, Value], float]] = {}
        self._coming = 0
        self._arrived = asyncio.Event()
        self._round_s = 0.0

    async def submit(
        self, items: Sequence[Item], remaining_s: Sequence[float], coming: int = 0
    ) -> list[Outcome[Value]]:
        """As in the base class. coming: rows that the caller announces, to be sent soon."""
        self._coming = coming
        self._arrived.set()
        return await super().submit(items, remaining_s)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or self._inside:
            await self._gather()
            dropped_before = self.dropped
            self._sweep()
            self._join()
            rows = len(self._inside)
            if rows:
                begun = time.perf_counter()
                try:
                    left = await loop.run_in_executor(self._thread, self._stream.run)
                except Exception as err:
                    self._fail(err)
                    continue
                self._round_s = time.perf_counter() - begun
                for ticket, value in left.items():
                    row, joined = self._inside.pop(ticket)
                    if not row.done.done():
                        queued = (joined - row.since) * 1000
                        row.done.set_result(Outcome(value, None, queued, _ms(joined), rows))
            if self._measure is not None:
                self._measure(rows, len(self._waiting), self.dropped - dropped_before)

    async def _gather(self) -> None:
        """Wait for announced rows while they outnumber those present, for at most half the last round's duration.

        A round of two rows takes half as long as one of thirty (tests/bench/results/LOG.md), and a row that misses it
        waits until it ends.
        """
        until = time.perf_counter() + self._round_s / 2
        while self._coming > len(self._inside) + len(self._waiting):
            self._arrived.clear()
            try:
                async with asyncio.timeout(max(0.0, until - time.perf_counter())):
                    await self._arrived.wait()
            except TimeoutError:
                self._coming = 0  # late, or sent to another replica: do not wait again
                break

    def _sweep(self) -> None:
        """Cancel rows whose caller is gone or whose deadline passed."""
        now = time.monotonic()
        for ticket, (row, begun) in list(self._inside.items()):
            if row.done.done() or row.expires <= now:
                self._stream.drop(ticket)
                del self._inside[ticket]
                self.dropped += 1
                if not row.done.done():
                    row.done.set_result(Outcome(error=EXPIRED, queue_ms=(begun - row.since) * 1000))

    def _join(self) -> None:
        while self._waiting and len(self._inside) < self._max_rows:
            if (row := self._next_live()) is None:
                continue
            try:
                ticket = self._stream.add(row.item)
            except Exception as err:
                row.done.set_result(Outcome(error=_describe(err)))
            else:
                self._inside[ticket] = (row, time.perf_counter())

    def _fail(self, err: Exception) -> None:
        """Fail every row of a failed round, as the cause may be any of them."""
        for ticket, (row, _) in self._inside.items():
            self._stream.drop(ticket)
            if not row.done.done():
                row.done.set_result(Outcome(error=_describe(err)))
        self._inside.clear()


class RowQueue(_Queue[Item, Value]):
    """Batches rows for a function, which runs in a thread, one batch at a time."""

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Value]],
        max_rows: int,
        group: Callable[[Item], Any] | None = None,
        measure: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """work: rows to one value each, in order. group: key that all rows of a batch must share. measure: called after
        each batch with the numbers of its rows, of rows still waiting, and of rows dropped before it."""
        super().__init__(max_rows, measure, "rows")
        self._work, self._group = work, group

    def __len__(self) -> int:
        return len(self._waiting)

    async def _run(self) -> None:
        while self._waiting:
            dropped_before = self.dropped
            batch = self._next()
            if batch:
                await self._do(batch)
            if self._measure is not None:
                self._measure(len(batch), len(self._waiting), self.dropped - dropped_before)

    def _next(self) -> list[_Waiting[Item, Value]]:
        """Pop up to `max_rows` live rows of the oldest row's group; the others keep their order."""
        batch: list[_Waiting[Item, Value]] = []
        kept: list[_Waiting[Item, Value]] = []
        while self._waiting and len(batch) < self._max_rows:
            if (row := self._next_live()) is None:
                continue
            same = not batch or self._group is None or self._group(row.item) == self._group(batch[0].item)
            (batch if same else kept).append(row)
        self._waiting.extendleft(reversed(kept))
        return batch

    async def _do(self, batch: list[_Waiting[Item, Value]]) -> None:
        begun = time.perf_counter()
        queued = [(begun - row.since) * 1000 for row in batch]
        loop = asyncio.get_running_loop()
        values: list[Value | None] = [None] * len(batch)
        errors: list[str | None] = [None] * len(batch)
        try:
            values = list(await loop.run_in_executor(self._thread, self._work, [row.item for row in batch]))
        except Exception as err:
            if len(batch) == 1:
                errors = [_describe(err)]
            else:  # one bad row must not fail the others: retry each by itself
                for i, row in enumerate(batch):
                    try:
                        (values[i],) = await loop.run_in_executor(self._thread, self._work, [row.item])
                    except Exception as own:
                        errors[i] = _describe(own)
        took = _ms(begun)
        for row, value, error, waited in zip(batch, values, errors, queued, strict=True):
            if not row.done.done():
                row.done.set_result(Outcome(value, error, waited, took, len(batch)))


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1000


def _describe(err: Exception) -> str:
    return f"{type(err).__name__}: {err}"
