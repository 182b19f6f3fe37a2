"""A deployment as the gateway sees it, with calls made in this process."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve.rows import EXPIRED, Outcome
from serve.stage import DeadlineError, FullError, Stage, StageError, UnavailableError


class LostError(Exception):
    """As when a replica dies."""


class Replica:
    """Doubles numbers; loses the first `losses` calls; waits for `gate` where there is one."""

    def __init__(self, losses: int = 0) -> None:
        self.calls: list[list[int]] = []
        self.remaining: list[float] = []
        self.losses = losses
        self.gate: asyncio.Event | None = None

    async def __call__(self, rows: list[Any], remaining_s: list[float]) -> list[Outcome[Any]]:
        self.calls.append(rows)
        self.remaining += remaining_s
        if self.gate is not None:
            await self.gate.wait()
        if self.losses:
            self.losses -= 1
            raise LostError
        return [Outcome(2 * row, None, 0.0, 1.0, len(rows)) for row in rows]


def stage(
    call: Callable[..., Awaitable[Any]], max_calls: int = 2, max_rows: int = 4, attempts: int = 3
) -> Stage:
    return Stage("test", call, (LostError,), max_calls, max_rows, attempts=attempts)


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


def test_alone_a_row_is_sent_at_once_and_a_crowd_shares_calls() -> None:
    replica = Replica()

    async def main() -> None:
        replica.gate = asyncio.Event()
        s = stage(replica)
        tasks = [asyncio.create_task(s.run([n], soon())) for n in range(8)]
        await asyncio.sleep(0.01)
        assert replica.calls == [[0], [1]]
        assert s.depth == 8
        replica.gate.set()
        values = [(await task)[0] for task in tasks]
        assert values == [[2 * n] for n in range(8)]
        assert s.depth == 0

    asyncio.run(main())
    assert replica.calls == [[0], [1], [2, 3, 4, 5], [6, 7]]


def test_a_lost_call_is_sent_again_and_the_reply_says_so() -> None:
    replica = Replica(losses=2)

    async def main() -> None:
        values, timing = await stage(replica).run([1, 2], soon())
        assert values == [2, 4]
        assert timing.retries == 2
        assert timing.queue_ms > 50  # the waits between

    asyncio.run(main())
    assert replica.calls == [[1, 2]] * 3


def test_too_many_lost_calls_end_in_an_error_that_says_so() -> None:
    with pytest.raises(UnavailableError, match="stage test lost 3 calls in a row"):
        asyncio.run(stage(Replica(losses=3)).run([1], soon()))


def test_an_error_that_is_no_loss_is_not_tried_again() -> None:
    calls = []

    async def call(rows: list[Any], remaining_s: list[float]) -> list[Outcome[Any]]:
        calls.append(rows)
        raise FullError("full")

    with pytest.raises(FullError):
        asyncio.run(stage(call).run([1], soon()))
    assert len(calls) == 1


def test_the_deadline_ends_the_wait_and_rows_not_sent_are_never_sent() -> None:
    replica = Replica()

    async def main() -> None:
        replica.gate = asyncio.Event()
        s = stage(replica, max_calls=1)
        first = asyncio.create_task(s.run([1], soon()))
        await asyncio.sleep(0)
        begun = time.monotonic()
        with pytest.raises(DeadlineError, match="stage test"):
            await s.run([2], soon(0.05))
        assert time.monotonic() - begun < 1
        replica.gate.set()
        assert (await first)[0] == [2]
        assert (await s.run([3], soon()))[0] == [6]

    asyncio.run(main())
    assert replica.calls == [[1], [3]]
    assert all(0 < left <= 10 for left in replica.remaining)


def test_what_a_cancelled_request_had_not_sent_is_never_sent() -> None:
    replica = Replica()

    async def main() -> None:
        replica.gate = asyncio.Event()
        s = stage(replica, max_calls=1)
        first = asyncio.create_task(s.run([1], soon()))
        gone = asyncio.create_task(s.run([2], soon()))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        replica.gate.set()
        await first

    asyncio.run(main())
    assert replica.calls == [[1]]


def test_a_lost_call_is_sent_again_without_the_rows_whose_request_has_ended() -> None:
    replica = Replica()

    async def main() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        replica.gate = first
        s = stage(replica, max_calls=1)
        tasks = [asyncio.create_task(s.run([n], soon())) for n in range(4)]
        await asyncio.sleep(0.01)  # row 0 is under way, the others share the next call
        replica.gate = second
        first.set()
        while len(replica.calls) < 2:
            await asyncio.sleep(0.001)
        replica.losses = 1
        tasks[2].cancel()
        second.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert replica.calls == [[0], [1, 2, 3], [1, 3]]


def test_what_became_of_a_row_is_told_to_its_request_alone() -> None:
    async def call(rows: list[Any], remaining_s: list[float]) -> list[Outcome[Any]]:
        return [Outcome(error={1: EXPIRED, 2: "ValueError: two"}.get(row), value=row) for row in rows]

    async def main() -> list[Any]:
        s = stage(call, max_calls=1, max_rows=8)
        tasks = [s.run([row], soon()) for row in (0, 1, 2, 3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, expired, broken, last = asyncio.run(main())
    assert (first[0], last[0]) == ([0], [3])
    assert isinstance(expired, DeadlineError)
    assert isinstance(broken, StageError)
    assert "ValueError: two" in str(broken)


def test_no_rows_are_no_call() -> None:
    replica = Replica()
    assert asyncio.run(stage(replica).run([], soon()))[0] == []
    assert replica.calls == []
