"""Whether one gateway meets the service's targets, over its most recent requests."""

from collections import deque
from dataclasses import dataclass

import numpy as np

TARGETS = {"p50_s": 1.0, "p95_s": 1.3, "gibberish_share": 0.05, "keyword_share": 0.75, "error_share": 0.005}
"""Targets of the original system. All but keyword_share are upper bounds."""

WINDOW = 1000
"""Number of recent requests considered."""
MIN_REQUESTS = 20
"""With fewer requests no target counts as missed: one slow first request is not a trend."""


@dataclass(frozen=True)
class Seen:
    """A finished request for text."""

    seconds: float
    failed: bool
    """By a server error: a status of 500 or more."""
    gibberish: bool = False
    keyword_hit: bool = True


class Window:
    """The most recent requests."""

    def __init__(self, size: int = WINDOW) -> None:
        self._seen: deque[Seen] = deque(maxlen=size)

    def add(self, seen: Seen) -> None:
        """Add a finished request."""
        self._seen.append(seen)

    def figures(self) -> dict[str, float | int]:
        """Number of requests in the window, and a value for each of TARGETS; {"requests": 0} when empty."""
        if not self._seen:
            return {"requests": 0}
        good = [s for s in self._seen if not s.failed]
        figures: dict[str, float | int] = {
            "requests": len(self._seen),
            "error_share": round(1 - len(good) / len(self._seen), 4),
        }
        if good:
            p50, p95 = np.quantile([s.seconds for s in good], [0.5, 0.95])
            figures |= {
                "p50_s": round(float(p50), 4),
                "p95_s": round(float(p95), 4),
                "gibberish_share": round(sum(s.gibberish for s in good) / len(good), 4),
                "keyword_share": round(sum(s.keyword_hit for s in good) / len(good), 4),
            }
        return figures

    def missed(self) -> list[str]:
        """Missed targets, each as a sentence; empty while there are too few requests."""
        figures = self.figures()
        if figures["requests"] < MIN_REQUESTS:
            return []
        missed = []
        for name, target in TARGETS.items():
            value = figures.get(name, target)
            if name == "keyword_share" and value < target:
                missed.append(f"{name} {value:g} is below {target:g}")
            elif name != "keyword_share" and value > target:
                missed.append(f"{name} {value:g} is above {target:g}")
        return missed
