"""Which fault hits which stage, when: all from one seed."""

import random
from dataclasses import dataclass

FAULTS = {
    "encode": (
        "kill actor",
        "kill raylet",
        "kill driver",
        "kill driver at a file step",
        "disk full",
        "corrupt input",
        "corrupt shard",
        "partial shard",
    ),
    "index": (
        "kill at a file step",
        "kill worker",
        "kill raylet",
        "kill driver",
        "disk full",
        "corrupt input",
        "corrupt version",
    ),
    "train": (
        "kill worker",
        "kill raylet",
        "kill driver",
        "disk full",
        "corrupt checkpoint",
        "partial checkpoint list",
    ),
    "evaluate": (
        "kill worker",
        "kill raylet",
        "kill driver",
        "kill driver at a file step",
        "disk full",
        "corrupt model",
        "corrupt report",
    ),
}
"""Stage to what may befall it."""

WEIGHTS = {"encode": 42, "index": 30, "train": 15, "evaluate": 13}
"""How often each stage's turn comes, by the number of its faults and by how long it takes."""


@dataclass(frozen=True)
class Schedule:
    """One fault."""

    number: int
    """From 0; with the seed it says all."""
    stage: str
    """Key of FAULTS."""
    fault: str
    """One of the stage's."""
    moment: float
    """When, as a share of the stage's work, from 0 to 1."""
    pick: int
    """Which of several processes, shards or bytes is hit."""


def schedules(count: int, seed: int, stages: tuple[str, ...] = tuple(FAULTS)) -> list[Schedule]:
    """`count` schedules; the first ones of a longer list are those of a shorter."""
    draw = random.Random(seed)
    turn = dict.fromkeys(FAULTS, draw.randrange(100))
    weights = [WEIGHTS[s] for s in stages]
    made = []
    for number in range(count):
        stage = draw.choices(stages, weights)[0]
        # Faults take turns, so that a short list holds different ones.
        fault = FAULTS[stage][turn[stage] % len(FAULTS[stage])]
        turn[stage] += 1
        made.append(Schedule(number, stage, fault, draw.random(), draw.randrange(1 << 30)))
    return made
