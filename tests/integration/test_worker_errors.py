"""Errors of ours come out of Ray's workers as they were raised: same class, one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs._ray import accepted, get, guarded, ray_data, refusal_in
from lvm.errors import InputError, LvmError, OutputError, StorageError, TrainingError

pytestmark = pytest.mark.usefixtures("ray_cluster")

LINE = "expected a whole file, got half of one. Fetch it again."
KINDS = LvmError.__subclasses__()


def fail(kind: type[LvmError]) -> int:
    raise kind(LINE)


def after(found: int) -> int:
    return found + 1


def two_and_an_error() -> Iterator[int]:
    yield 1
    yield 2
    raise StorageError(LINE)


class Actor:
    def fail(self) -> None:
        raise TrainingError(LINE)


def refuse_odd(row: dict[str, Any]) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        if row["kind"]:
            raise {"InputError": InputError, "OutputError": OutputError}[row["kind"]](LINE)
        return {"made": row["rows"] * 10}

    return guarded(work, **row, made=0, note="a note")


def run(*kinds: str) -> tuple[list[int], LvmError | None]:
    items = [{"rows": n, "kind": kind} for n, kind in enumerate(kinds, 1)]
    rows = ray_data().from_items(items, override_num_blocks=len(items)).map(refuse_odd, concurrency=1)
    made: list[int] = []
    with contextlib.closing(accepted(rows.iter_rows(), "test", len(items), 10, "rows")) as found:
        try:
            for row in found:
                made.append(row["made"])
        except LvmError as err:
            return made, err
    return made, None


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_task_and_of_one_that_waits_for_it(kind: type[LvmError]) -> None:
    import ray

    first = ray.remote(fail).remote(kind)
    for ref in (first, ray.remote(after).remote(first)):
        with pytest.raises(kind) as found:
            get(ref)
        assert type(found.value) is kind
        assert str(found.value) == LINE


def test_of_an_actor_and_of_a_generator() -> None:
    import ray

    with pytest.raises(TrainingError) as found:
        get(ray.remote(Actor).remote().fail.remote())
    assert str(found.value) == LINE
    generator = ray.remote(two_and_an_error).options(num_returns="streaming").remote()
    assert [get(next(generator)), get(next(generator))] == [1, 2]
    with pytest.raises(StorageError) as stored:
        get(next(generator))
    assert str(stored.value) == LINE


def test_what_is_no_error_of_ours_stays_rays() -> None:
    import ray

    def divide() -> float:
        return 1 / 0

    with pytest.raises(ray.exceptions.RayTaskError, match="division by zero"):
        get(ray.remote(divide).remote())


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_value_it_is_the_same_error(kind: type[LvmError]) -> None:
    row = guarded(lambda: {"made": fail(kind)}, made=0)
    assert row["made"] == 0
    error = refusal_in(row)
    assert type(error) is kind
    assert str(error) == LINE
    assert refusal_in(guarded(lambda: {"made": 1})) is None


def test_a_refusal_of_an_older_version_is_one_too() -> None:
    assert str(refusal_in({"refusal": "out of memory: 3 GB"})) == "out of memory: 3 GB"
    assert refusal_in({}) is None


def test_one_refused_row_keeps_no_other_from_being_made(capsys: pytest.CaptureFixture[str]) -> None:
    made, error = run("", "InputError", "")
    assert made == [10, 30]
    assert type(error) is InputError
    assert str(error) == LINE
    said = capsys.readouterr().err
    assert said.count("test: a note") == 1
    assert "test: 1 of 3 parts failed; the others are finished and kept" in said


def test_where_nothing_can_be_written_the_rest_is_not_made(tmp_path: Path) -> None:
    made, error = run("", "OutputError", *[""] * 20)
    assert type(error) is OutputError
    assert len(made) < 21
