"""The ladder over the engine's rounds: rows on different rungs share each round, and new ones join between two.

`Ladder.decode` takes a batch to its end, rung by rung, so that a few rows that climb hold the rest and leave the
processor half idle. Here a round takes every row one step, whatever its rung: a row is judged when it has had the
steps of a rung, and leaves with its answer or stays for the next. The answers are the ladder's.
"""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lvm.codec.inverter import Inversion, Request, Rounds
from lvm.codec.ladder import Answer, DecodeCache, Ladder, LadderSettings, faults
from lvm.codec.zoo import Codec


@dataclass
class _Climber:
    vector: NDArray[np.float32]
    source: str | None
    rungs: tuple[int, ...]
    cache: bool
    ticket: int = -1
    """In the rounds; -1 while it is not inside."""
    reasons: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)


class LadderStream:
    """Vectors on their way down the ladder. One thread uses it."""

    def __init__(
        self, codec: Codec, settings: LadderSettings | None = None, cache: DecodeCache | None = None
    ) -> None:
        self.ladder = Ladder(codec, settings=settings, cache=cache)
        """The same rungs and cache, for what they are worth to others."""
        self._codec = codec
        self._rounds = Rounds(codec.inverter)
        self._next = 0
        self._climbers: dict[int, _Climber] = {}
        self._known: dict[int, Answer] = {}  # answered from the cache, and waiting for the next `run`

    def __len__(self) -> int:
        """Rows that have not left."""
        return len(self._climbers) + len(self._known)

    def add(
        self, vector: NDArray[np.float32], source: str | None, steps: int | None = None, cache: bool = True
    ) -> int:
        """Let a unit vector (D,) join at the next round; returns its ticket. steps: exactly so many, and no
        climbing. Raises InputError as `Rounds.add` does."""
        rungs = self.ladder.steps if steps is None else (steps,)
        climber = _Climber(vector, source, rungs, cache)
        ticket = self._next
        self._next += 1
        self._climbers[ticket] = climber
        if not (cache and self._climb_by_cache(ticket, climber)):
            first = vector * np.float32(self._codec.scale)
            climber.ticket = self._rounds.add(Request(first, steps=rungs[-1]))
        return ticket

    def drop(self, ticket: int) -> None:
        """Forget a row that nobody waits for."""
        climber = self._climbers.pop(ticket, None)
        if climber is not None:
            self._rounds.drop(climber.ticket)
        self._known.pop(ticket, None)

    def run(self) -> dict[int, Answer]:
        """One round; the answers of the rows that left, by ticket. An answer whose own rung stands among its
        reasons was refused there too: the ladder without a corpus ends so."""
        answers, self._known = self._known, {}
        if len(self._rounds):
            left = self._rounds.run()
            inside = self._rounds.inside()
            for ticket, climber in list(self._climbers.items()):
                found = left.get(climber.ticket) or inside.get(climber.ticket)
                if found is None:
                    continue
                done = climber.ticket in left
                answer = self._judge(climber, found, done)
                if answer is not None:
                    answers[ticket] = answer
                    del self._climbers[ticket]
                    if not done:
                        self._rounds.drop(climber.ticket)
        return answers

    def _judge(self, climber: _Climber, found: Inversion, done: bool) -> Answer | None:
        """The answer of a row that has come to a rung; None where it goes on."""
        reached = [s for s in climber.rungs if s >= found.steps_used]
        if not reached or (found.steps_used != reached[0] and not done):
            return None
        steps = reached[0]
        rung = f"steps={steps}"
        climber.waited[rung] = (time.perf_counter() - climber.since) * 1000 - sum(climber.waited.values())
        if climber.cache:
            key = DecodeCache.key(self._codec.identity, climber.vector, steps)
            self.ladder.cache.put(key, found.text, found.cosine)
        return self._answer(climber, steps, found.text, found.cosine, done, cached=False)

    def _answer(
        self, climber: _Climber, steps: int, text: str, cosine: float, done: bool, cached: bool
    ) -> Answer | None:
        rung = f"steps={steps}"
        wrong = faults(text, climber.source, self.ladder.settings)
        climber.reasons += [f"{rung}: {fault}" for fault in wrong]
        last = steps == climber.rungs[-1]
        if wrong and not last and not done:
            climber.refused.append(text)
            return None
        if wrong and not last:
            climber.reasons.append(f"{rung}: further steps change nothing")
        return Answer(
            text, rung, tuple(climber.reasons), cosine, climber.waited, cached, tuple(climber.refused)
        )

    def _climb_by_cache(self, ticket: int, climber: _Climber) -> bool:
        """Whether all the way to an answer is in the cache; else the row starts as if nothing was."""
        for steps in climber.rungs:
            held = self.ladder.cache.get(DecodeCache.key(self._codec.identity, climber.vector, steps))
            if held is None:
                break
            climber.waited[f"steps={steps}"] = 0.0
            answer = self._answer(climber, steps, *held, done=False, cached=True)
            if answer is not None:
                self._known[ticket] = answer
                del self._climbers[ticket]
                return True
        climber.reasons, climber.refused, climber.waited = [], [], {}
        return False
