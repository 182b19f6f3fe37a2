"""When answers go extractive, and when they come back."""

from serve.breaker import Breaker
from serve.settings import BreakerArgs


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(**settings: float) -> tuple[Breaker, Time]:
    clock = Time()
    args = {"max_waiting": 10, "max_decode_s": 1.0, "window": 8, "open_s": 5.0, **settings}
    return Breaker(BreakerArgs.model_validate(args), clock), clock


def test_a_long_queue_opens_it_and_a_good_trial_closes_it() -> None:
    breaker, clock = make()
    assert breaker.refuses(10) is None
    reason = breaker.refuses(11)
    assert reason is not None
    assert "11 vectors are waiting for the decoder, more than 10" in reason
    assert breaker.open
    assert breaker.refuses(0) == reason  # not before open_s
    clock.now = 5.0
    assert breaker.refuses(8) == reason  # nor while the queue is still half full
    assert breaker.refuses(0) is None  # the one trial
    assert breaker.refuses(0) == reason  # and no other beside it
    breaker.done(0.1, refused=False)
    assert not breaker.open
    assert breaker.refuses(0) is None


def test_a_bad_trial_keeps_it_open() -> None:
    breaker, clock = make()
    breaker.refuses(11)
    for outcome in (None, 2.0):  # failed, too slow
        clock.now += 5
        assert breaker.refuses(0) is None
        breaker.done(outcome, refused=False)
        assert breaker.open
        assert breaker.refuses(0) is not None


def test_failed_and_slow_decodes_open_it() -> None:
    breaker, _ = make()
    for seconds in (0.1, 0.1, 0.1, None, 3.0, None):
        breaker.done(seconds, refused=False)
    assert not breaker.open
    breaker.done(None, refused=False)
    assert breaker.open
    assert "57% of the last 7 decodes failed or were too slow" in breaker.reason


def test_what_says_nothing_of_the_decoder_is_not_counted_and_gives_up_the_trial() -> None:
    breaker, clock = make()
    for _ in range(20):
        breaker.unknown()
        breaker.done(0.1, refused=None)
    assert not breaker.open
    breaker.refuses(11)
    clock.now = 5
    assert breaker.refuses(0) is None
    breaker.unknown()
    assert breaker.open
    assert breaker.refuses(0) is None  # the next one is the trial
    breaker.done(0.1, refused=None)
    assert not breaker.open


def test_vectors_of_a_client_do_not_show_that_predictions_are_better() -> None:
    breaker, clock = make(max_refused_share=0.8)
    for _ in range(8):
        breaker.done(0.1, refused=True)
    clock.now = 5
    assert breaker.refuses(0) is None
    breaker.done(0.1, refused=None)
    assert breaker.open


def test_a_full_window_of_refused_texts_opens_it_until_one_does_better() -> None:
    breaker, clock = make(max_refused_share=0.8)
    for _ in range(7):
        breaker.done(0.1, refused=True)
    assert not breaker.open
    breaker.done(0.1, refused=True)
    assert breaker.open
    assert "were refused" in breaker.reason
    clock.now = 5
    assert breaker.refuses(0) is None
    breaker.done(0.1, refused=True)
    assert breaker.open
    clock.now = 10
    assert breaker.refuses(0) is None
    breaker.done(0.1, refused=False)
    assert not breaker.open


def test_disabled_it_never_opens() -> None:
    breaker, _ = make(enabled=False)
    for _ in range(20):
        breaker.done(None, refused=True)
    assert breaker.refuses(1000) is None
