"""Whether the service meets its targets, over the latest answers of one gateway."""

from collections import deque
from dataclasses import dataclass

import numpy as np

TARGETS = {
    "p50_s": 1.0,
    "p95_s": 1.3,
    "gibberish_share": 0.05,
    "keyword_share": 0.75,
    "error_share": 0.005,
}
"""Targets of the original system. All but keyword_share are upper bounds."""

WINDOW = 1000
"""Requests looked at."""
FEWEST = 20
"""Requests below which nothing is judged: one slow first request is no trend."""


@dataclass(frozen=True)
class Seen:
    """One finished request for text."""

    seconds: float
    failed: bool
    """Our fault: a status of 500 or more."""
    gibberish: bool = False
    keyword_hit: bool = True


class Window:
    """The latest requests."""

    def __init__(self, size: int = WINDOW) -> None:
        self._seen: deque[Seen] = deque(maxlen=size)

    def add(self, seen: Seen) -> None:
        """One more."""
        self._seen.append(seen)

    def figures(self) -> dict[str, float | int]:
        """Of the window: number of requests, and what TARGETS names; {"requests": 0} when it is empty."""
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
        """Targets the window misses, each as a sentence; empty while there is too little to judge."""
        figures = self.figures()
        if figures["requests"] < FEWEST:
            return []
        found = []
        for name, target in TARGETS.items():
            value = figures.get(name)
            if value is None:
                continue
            if name == "keyword_share":
                if value < target:
                    found.append(f"{name} {value:g} is below {target:g}")
            elif value > target:
                found.append(f"{name} {value:g} is above {target:g}")
        return found
