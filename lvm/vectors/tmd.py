"""TMD codes: what a text is about (domain), asks for (task) and is like (modifier), in 16 bits.

16 domains in bits 15-12, 32 tasks in 11-7, 64 modifiers in 6-1; bit 0 is spare. The labels lie in tmd.json
beside this file, their order is their number.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.errors import InputError

AXES = ("domain", "task", "modifier")
SIZES = (16, 32, 64)
SHIFTS = (12, 7, 1)
FEATURES = 16
"""Length of a code as features: its bits from 15 down to 0, the spare one always 0."""


@dataclass(frozen=True)
class Tmd:
    """A code, taken apart. Each part is a number from 0, as in tmd.json."""

    domain: int
    task: int
    modifier: int

    def __post_init__(self) -> None:
        for axis, size in zip(AXES, SIZES, strict=True):
            if not 0 <= getattr(self, axis) < size:
                raise InputError(f"{axis} is {getattr(self, axis)}; expected 0 to {size - 1}")

    @property
    def code(self) -> int:
        """All three in 16 bits; even, for bit 0 is spare."""
        return self.domain << SHIFTS[0] | self.task << SHIFTS[1] | self.modifier << SHIFTS[2]

    @property
    def names(self) -> tuple[str, str, str]:
        """The labels of domain, task and modifier."""
        domains, tasks, modifiers = labels()
        return domains[self.domain], tasks[self.task], modifiers[self.modifier]

    def features(self) -> NDArray[np.float32]:
        """(16,) the bits as 0 and 1, the highest first."""
        return np.array([self.code >> bit & 1 for bit in range(15, -1, -1)], np.float32)


def unpack(code: int) -> Tmd:
    """The parts of a code. Raises InputError where it is none."""
    if not 0 <= code < 1 << 16 or code & 1:
        raise InputError(f"TMD code is {code}; expected an even number from 0 to 65534")
    return Tmd(code >> SHIFTS[0], code >> SHIFTS[1] & SIZES[1] - 1, code >> SHIFTS[2] & SIZES[2] - 1)


@cache
def labels() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of domains, tasks and modifiers, in the order of their numbers."""
    record: dict[str, Any] = json.loads((Path(__file__).parent / "tmd.json").read_text(encoding="utf-8"))
    return tuple(record["domains"]), tuple(record["tasks"]), tuple(record["modifiers"])


def nearest(
    vectors: NDArray[np.float32], label_vectors: NDArray[np.float32]
) -> list[tuple[Tmd, tuple[float, float, float]]]:
    """The code of each text and the cosines of its three labels.

    vectors: (B, D) of texts; label_vectors: (112, D) of `all_labels()`, of the same codec; unit norm both.
    """
    if label_vectors.shape[0] != sum(SIZES):
        raise InputError(
            f"got {label_vectors.shape[0]} label vectors, expected {sum(SIZES)} as of all_labels()"
        )
    cosines = vectors @ label_vectors.T
    parts = np.split(cosines, np.cumsum(SIZES)[:-1], axis=1)
    best = [part.argmax(axis=1) for part in parts]
    found = []
    for row in range(len(vectors)):
        numbers = [int(b[row]) for b in best]
        scores = [float(part[row, n]) for part, n in zip(parts, numbers, strict=True)]
        found.append((Tmd(*numbers), (scores[0], scores[1], scores[2])))
    return found


def all_labels() -> Sequence[str]:
    """The 112 labels, domains first."""
    domains, tasks, modifiers = labels()
    return [*domains, *tasks, *modifiers]
