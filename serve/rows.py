"""The queue inside a replica: rows of many callers share a batch, and rows nobody waits for are dropped.

No timer holds a batch back. While one is at work the next gathers; when the replica is idle a lone row starts
at once. Rounds wait for rows that callers say are on their way, while these are more than are here. A row whose
deadline has passed before its batch starts is dropped without work.
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
    """What became of one row."""

    value: Value | None = None
    error: str | None = None
    """None, "expired", or what went wrong with this row alone."""
    queue_ms: float = 0.0
    """Waited in the replica before its batch started."""
    work_ms: float = 0.0
    """What its batch took; the rows of a batch wait together."""
    batch_rows: int = 0
    """Rows of that batch."""


@dataclass
class _Waiting(Generic[Item, Value]):
    item: Item
    expires: float
    """On `time.monotonic`."""
    since: float = field(default_factory=time.perf_counter)
    done: "asyncio.Future[Outcome[Value]]" = field(default_factory=asyncio.Future)


class Stream(Protocol[Item_contra, Value_co]):
    """Work that goes by rounds: rows join between two, and leave when they are done."""

    def add(self, item: Item_contra) -> int:
        """Join at the next round; returns a ticket."""

    def drop(self, ticket: int) -> None:
        """Forget a row."""

    def run(self) -> Mapping[int, Value_co]:
        """One round; what left, by ticket."""


class _Queue(Generic[Item, Value]):
    """Rows that wait, and the task that takes them for as long as there are any."""

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
        """An Outcome for each row, in order. remaining_s: what each row's caller will still wait."""
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
            for row in rows:  # the caller is gone: their rows are taken out by `_live` or the rounds
                row.done.cancel()
            raise

    async def _run(self) -> None:
        """Take rows until none is left."""
        raise NotImplementedError

    def _live(self) -> _Waiting[Item, Value] | None:
        """The oldest row if somebody still waits for it; else None, and the row is dropped."""
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
    """Rows for a `Stream`, one round after another in a thread of its own while there are any."""

    def __init__(
        self,
        stream: Stream[Item, Value],
        max_rows: int,
        measure: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """max_rows: most in the rounds at once. measure: as of `RowQueue`, called after each round."""
        super().__init__(max_rows, measure, "rounds")
        self._stream = stream
        self._inside: dict[int, tuple[_Waiting[Item, Value], float]] = {}
        self._coming = 0
        self._arrived = asyncio.Event()
        self._round_s = 0.0

    async def submit(
        self, items: Sequence[Item], remaining_s: Sequence[float], coming: int = 0
    ) -> list[Outcome[Value]]:
        """As of any queue. coming: rows the caller has on their way here besides these."""
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
        """Let rows arrive while more are on their way than are here, for at most half of what the last round took.

        A round of two rows takes half the time of one of thirty (tests/bench/results/LOG.md), and who comes just too
        late waits for all of it.
        """
        until = time.perf_counter() + self._round_s / 2
        while self._coming > len(self._inside) + len(self._waiting):
            self._arrived.clear()
            try:
                async with asyncio.timeout(max(0.0, until - time.perf_counter())):
                    await self._arrived.wait()
            except TimeoutError:
                self._coming = 0  # they went elsewhere, or are slow: not waited for again
                break

    def _sweep(self) -> None:
        """Take out of the rounds what nobody waits for any more."""
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
            if (row := self._live()) is None:
                continue
            try:
                ticket = self._stream.add(row.item)
            except Exception as err:
                row.done.set_result(Outcome(error=_words(err)))
            else:
                self._inside[ticket] = (row, time.perf_counter())

    def _fail(self, err: Exception) -> None:
        """A round that failed ends every row in it: which of them was the cause, it does not say."""
        for ticket, (row, _) in self._inside.items():
            self._stream.drop(ticket)
            if not row.done.done():
                row.done.set_result(Outcome(error=_words(err)))
        self._inside.clear()


class RowQueue(_Queue[Item, Value]):
    """Batches rows for one `work` function, which runs in a thread of its own, one batch at a time."""

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Value]],
        max_rows: int,
        group: Callable[[Item], Any] | None = None,
        measure: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """work: rows to as many values, in order. group: rows of one batch have one group (as many steps).
        measure: called after each batch with its rows, the rows still waiting, and rows dropped before it."""
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
        """Up to `max_rows` live rows of the oldest row's group; the others keep their order."""
        batch: list[_Waiting[Item, Value]] = []
        kept: list[_Waiting[Item, Value]] = []
        group: Any = None
        while self._waiting and len(batch) < self._max_rows:
            if (row := self._live()) is None:
                continue
            if not batch or self._group is None or self._group(row.item) == group:
                if not batch and self._group is not None:
                    group = self._group(row.item)
                batch.append(row)
            else:
                kept.append(row)
        self._waiting.extendleft(reversed(kept))
        return batch

    async def _do(self, batch: list[_Waiting[Item, Value]]) -> None:
        begun = time.perf_counter()
        queued = [(begun - row.since) * 1000 for row in batch]
        loop = asyncio.get_running_loop()
        values: Sequence[Value | None]
        errors: list[str | None] = [None] * len(batch)
        try:
            values = await loop.run_in_executor(self._thread, self._work, [row.item for row in batch])
        except Exception as err:
            # One bad row must not take the others with it: each is tried alone.
            values, errors = [None] * len(batch), [_words(err)] * len(batch)
            if len(batch) > 1:
                singles: list[Value | None] = []
                for i, row in enumerate(batch):
                    try:
                        (value,) = await loop.run_in_executor(self._thread, self._work, [row.item])
                        singles.append(value)
                        errors[i] = None
                    except Exception as one:
                        singles.append(None)
                        errors[i] = _words(one)
                values = singles
        took = _ms(begun)
        for row, value, error, waited in zip(batch, values, errors, queued, strict=True):
            if not row.done.done():
                row.done.set_result(Outcome(value, error, waited, took, len(batch)))


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1000


def _words(err: Exception) -> str:
    return f"{type(err).__name__}: {err}"
