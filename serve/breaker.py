"""Circuit breaker for the decoder: while the decoder is overloaded or failing, the corpus answers."""

import time
from collections import deque
from collections.abc import Callable

from serve.settings import BreakerArgs


class Breaker:
    """Closed: decode. Open: do not, but allow one trial decode after `open_s`; the breaker closes if it succeeds."""

    def __init__(self, args: BreakerArgs, clock: Callable[[], float] = time.monotonic) -> None:
        self._args, self._clock = args, clock
        self._failed: deque[bool] = deque(maxlen=args.window)
        self._refused: deque[bool] = deque(maxlen=args.window)
        self._opened: float | None = None
        self._trying = self._for_refusals = False
        self.reason = ""
        """Why it is open; empty while closed."""
        self.times_opened = 0

    @property
    def open(self) -> bool:
        """True while the corpus answers."""
        return self._opened is not None

    def refuses(self, waiting: int) -> str | None:
        """Why a decode must not start now, or None. waiting: vectors queued before it.

        None from an open breaker allows the trial decode; report its outcome with `done` or `unknown`.
        """
        if not self._args.enabled:
            return None
        if self._opened is None:
            if waiting <= self._args.max_waiting:
                return None
            self._open(f"{waiting} vectors are waiting for the decoder, more than {self._args.max_waiting}")
        elif (
            not self._trying
            and waiting <= self._args.max_waiting // 2
            and self._clock() - self._opened >= self._args.open_s
        ):
            self._trying = True
            return None
        return self.reason

    def too_slow(self, seconds: float) -> bool:
        """Whether a decode of this duration counts as a failure."""
        return seconds > self._args.max_decode_s

    def unknown(self) -> None:
        """Record a decode that says nothing about the decoder: the client disconnected, or set a short deadline."""
        self._trying = False

    def done(self, seconds: float | None, refused: bool | None) -> None:
        """Record a decode that took `seconds`, queue included; None if the decoder failed or was too slow.

        refused: whether all its texts were refused; None for clients' vectors, which say nothing about the decoder.
        """
        bad = seconds is None or self.too_slow(seconds)
        if self._opened is not None:
            if self._trying:
                self._trying = False
                if bad or (self._for_refusals and refused is not False):
                    self._opened = self._clock()
                else:
                    self._opened, self.reason = None, ""
                    self._failed.clear()
                    self._refused.clear()
            return
        self._failed.append(bad)
        if refused is not None:
            self._refused.append(refused)
        if not self._args.enabled or len(self._failed) < max(4, self._args.window // 4):
            return
        failed = sum(self._failed) / len(self._failed)
        refused_share = sum(self._refused) / max(1, len(self._refused))
        if failed > self._args.max_failed_share:
            self._open(f"{failed:.0%} of the last {len(self._failed)} decodes failed or were too slow")
        elif refused_share > self._args.max_refused_share and len(self._refused) == self._args.window:
            reason = f"{refused_share:.0%} of the last {len(self._refused)} decodes were refused"
            self._open(reason, for_refusals=True)

    def _open(self, reason: str, for_refusals: bool = False) -> None:
        self._opened, self._trying, self._for_refusals = self._clock(), False, for_refusals
        self.reason = f"breaker open: {reason}"
        self.times_opened += 1
