"""Which targets are missed."""

import pytest

from serve.health import MIN_REQUESTS, Seen, Window


def window(count: int = 100, **fields: float | bool) -> Window:
    made = Window()
    for _ in range(count):
        made.add(Seen(**{"seconds": 0.2, "failed": False, **fields}))  # type: ignore[arg-type]
    return made


def test_good_requests_miss_nothing() -> None:
    assert window().missed() == []
    assert window().figures()["p95_s"] == 0.2


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"seconds": 1.2}, ["p50_s"]),
        ({"seconds": 1.4}, ["p50_s", "p95_s"]),
        ({"gibberish": True}, ["gibberish_share"]),
        ({"keyword_hit": False}, ["keyword_share"]),
        ({"failed": True}, ["error_share"]),
    ],
)
def test_each_target_is_judged(fields: dict[str, bool | float], names: list[str]) -> None:
    assert [m.split()[0] for m in window(**fields).missed()] == names


def test_shares_are_of_the_window() -> None:
    made = window(95)
    for _ in range(5):
        made.add(Seen(0.2, False, gibberish=True))
    assert made.missed() == []
    made.add(Seen(0.2, False, gibberish=True))
    assert [m.split()[0] for m in made.missed()] == ["gibberish_share"]


def test_too_few_requests_are_not_judged() -> None:
    assert window(MIN_REQUESTS - 1, seconds=9.0).missed() == []
    assert window(MIN_REQUESTS, seconds=9.0).missed() != []
    assert Window().figures() == {"requests": 0}
