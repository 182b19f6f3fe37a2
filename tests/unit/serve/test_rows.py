"""The queue inside a replica."""

import asyncio
import threading
import time
from collections.abc import Sequence

from serve.rows import EXPIRED, RowQueue, StreamQueue


class Slow:
    """Doubles numbers, remembers its batches, and waits at the first one until told to go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, rows: list[int]) -> Sequence[int]:
        self.batches.append(rows)
        if len(self.batches) == 1:
            assert self.go.wait(10)
        return [2 * row for row in rows]


def test_rows_that_come_during_a_batch_share_the_next() -> None:
    work = Slow()

    async def main() -> list[int | None]:
        queue: RowQueue[int, int] = RowQueue(work, max_rows=8)
        first = asyncio.create_task(queue.submit([1], [10]))
        while not work.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(queue.submit([n, n + 1], [10, 10])) for n in (2, 4, 6)]
        await asyncio.sleep(0.01)
        assert len(queue) == 6
        work.go.set()
        return [o.value for task in (first, *others) for o in await task]

    assert asyncio.run(main()) == [2, 4, 6, 8, 10, 12, 14]
    assert work.batches == [[1], [2, 3, 4, 5, 6, 7]]


def test_a_batch_has_no_more_rows_than_it_may_and_one_group_alone() -> None:
    work = Slow()

    async def main() -> None:
        queue: RowQueue[int, int] = RowQueue(work, max_rows=3, group=lambda row: row % 2)
        first = asyncio.create_task(queue.submit([0], [10]))
        while not work.batches:
            await asyncio.sleep(0.001)
        others = asyncio.create_task(queue.submit([1, 2, 3, 4, 5, 6, 7, 8], [10] * 8))
        await asyncio.sleep(0.01)
        work.go.set()
        await first
        assert [o.value for o in await others] == [2, 4, 6, 8, 10, 12, 14, 16]

    asyncio.run(main())
    assert work.batches == [[0], [1, 3, 5], [2, 4, 6], [7], [8]]


def test_rows_whose_time_is_over_are_dropped_without_work() -> None:
    work = Slow()
    seen: list[tuple[int, int, int]] = []

    async def main() -> list[str | None]:
        queue: RowQueue[int, int] = RowQueue(work, 8, measure=lambda *n: seen.append(n))
        first = asyncio.create_task(queue.submit([1], [10]))
        while not work.batches:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(queue.submit([2, 3], [0.01, 10]))
        await asyncio.sleep(0.05)
        work.go.set()
        await first
        outcomes = await late
        assert queue.dropped == 1
        return [o.error for o in outcomes]

    assert asyncio.run(main()) == [EXPIRED, None]
    assert work.batches == [[1], [3]]
    assert seen == [(1, 2, 0), (1, 0, 1)]


def test_rows_whose_caller_is_gone_are_dropped_without_work() -> None:
    work = Slow()

    async def main() -> None:
        queue: RowQueue[int, int] = RowQueue(work, 8)
        first = asyncio.create_task(queue.submit([1], [10]))
        while not work.batches:
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(queue.submit([2, 4], [10, 10]))
        stays = asyncio.create_task(queue.submit([3], [10]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        work.go.set()
        await first
        assert (await stays)[0].value == 6

    asyncio.run(main())
    assert work.batches == [[1], [3]]


def test_one_bad_row_takes_no_other_with_it() -> None:
    def work(rows: list[int]) -> list[int]:
        if 3 in rows:
            raise ValueError("three")
        return [2 * row for row in rows]

    async def main() -> list[tuple[int | None, str | None]]:
        queue: RowQueue[int, int] = RowQueue(work, 8)
        return [(o.value, o.error) for o in await queue.submit([1, 3, 5], [10] * 3)]

    assert asyncio.run(main()) == [(2, None), (None, "ValueError: three"), (10, None)]


def test_an_outcome_says_how_long_it_waited_and_with_how_many() -> None:
    def work(rows: list[int]) -> list[int]:
        time.sleep(0.05)
        return rows

    async def main() -> None:
        queue: RowQueue[int, int] = RowQueue(work, 1)
        first, second = await queue.submit([1, 2], [10, 10])
        assert (first.batch_rows, second.batch_rows) == (1, 1)
        assert first.queue_ms < 50 <= second.queue_ms
        assert first.work_ms >= 49

    asyncio.run(main())


class Countdown:
    """A stream whose row n stays for n rounds."""

    def __init__(self) -> None:
        self.inside: dict[int, int] = {}
        self.rounds: list[int] = []
        self.go = threading.Event()

    def add(self, item: int) -> int:
        if item < 0:
            raise ValueError("negative")
        ticket = len(self.rounds) * 100 + len(self.inside) + 1
        self.inside[ticket] = item
        return ticket

    def drop(self, ticket: int) -> None:
        del self.inside[ticket]

    def run(self) -> dict[int, int]:
        assert self.go.wait(10)
        self.rounds.append(len(self.inside))
        if 13 in self.inside.values():
            raise RuntimeError("thirteen")
        self.inside = {t: n - 1 for t, n in self.inside.items()}
        left = {t: len(self.rounds) for t, n in self.inside.items() if n == 0}
        self.inside = {t: n for t, n in self.inside.items() if n}
        return left


def test_rows_join_the_rounds_of_others_and_leave_when_they_are_done() -> None:
    stream = Countdown()

    async def main() -> list[int | None]:
        queue: StreamQueue[int, int] = StreamQueue(stream, max_rows=3)
        first = asyncio.create_task(queue.submit([3, 1], [10, 10]))
        await asyncio.sleep(0.02)
        later = asyncio.create_task(queue.submit([1, 1, 1], [10, 10, 10]))
        await asyncio.sleep(0.02)
        stream.go.set()
        return [o.value for o in [*await first, *await later]]

    assert asyncio.run(main()) == [3, 1, 2, 2, 3]
    assert stream.rounds == [2, 3, 2]


def test_a_row_is_taken_out_of_the_rounds_when_its_time_is_over_or_its_caller_gone() -> None:
    stream = Countdown()

    async def main() -> None:
        queue: StreamQueue[int, int] = StreamQueue(stream, max_rows=8)
        late = asyncio.create_task(queue.submit([1000], [0.05]))
        gone = asyncio.create_task(queue.submit([1000], [10]))
        stays = asyncio.create_task(queue.submit([2], [10]))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0.05)
        stream.go.set()
        assert (await late)[0].error == EXPIRED
        assert (await stays)[0].value == 2
        assert queue.dropped == 2

    asyncio.run(main())
    assert stream.rounds == [3, 1]
    assert stream.inside == {}


def test_a_row_that_cannot_join_and_a_round_that_fails_end_in_errors() -> None:
    stream = Countdown()
    stream.go.set()

    async def main() -> list[str | None]:
        queue: StreamQueue[int, int] = StreamQueue(stream, max_rows=8)
        outcomes = await queue.submit([-1, 1], [10, 10])
        outcomes += await queue.submit([13, 5], [10, 10])
        outcomes += await queue.submit([2], [10])
        return [o.error for o in outcomes]

    assert asyncio.run(main()) == [
        "ValueError: negative",
        None,
        "RuntimeError: thirteen",
        "RuntimeError: thirteen",
        None,
    ]
    assert stream.inside == {}


def test_a_row_whose_time_is_over_before_it_joins_never_joins() -> None:
    stream = Countdown()

    async def main() -> None:
        queue: StreamQueue[int, int] = StreamQueue(stream, max_rows=1)
        first = asyncio.create_task(queue.submit([1], [10]))
        await asyncio.sleep(0.01)
        late = asyncio.create_task(queue.submit([1], [0.01]))
        await asyncio.sleep(0.03)
        stream.go.set()
        await first
        assert (await late)[0].error == EXPIRED

    asyncio.run(main())
    assert stream.rounds == [1]


def test_a_round_waits_for_rows_on_their_way_and_a_lone_row_for_nobody() -> None:
    stream = Countdown()
    stream.go.set()

    async def main() -> float:
        queue: StreamQueue[int, int] = StreamQueue(stream, max_rows=8)
        queue._round_s = 20.0  # of the last round: half of it is waited at most
        first = asyncio.create_task(queue.submit([1], [10], coming=2))
        await asyncio.sleep(0.05)
        assert stream.rounds == []
        await queue.submit([1], [10], coming=1)  # as many are here as are to come: no more waiting
        await first
        queue._round_s = 20.0
        begun = time.perf_counter()
        await queue.submit([1], [10])
        alone_s = time.perf_counter() - begun
        queue._round_s = 0.1
        await queue.submit([1], [10], coming=5)  # who never come
        return alone_s

    assert asyncio.run(main()) < 5
    assert stream.rounds == [2, 1, 1]
