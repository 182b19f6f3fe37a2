"""TMD codes: a text's topic (domain), use (task) and character (modifier), in 16 bits.

16 domains in bits 15-12, 32 tasks in 11-7, 64 modifiers in 6-1; bit 0 is spare. tmd.json beside this file has the
labels, in order of their numbers, each with typical phrases. On each axis a text gets the label whose phrases are
nearest in the codec's space (`Prototypes`), or the one a language model chooses (`lvm.corpus.tmd_chat`).

With `mini`, over 10,000 chunks of Wikipedia, the entropy is 3.8 of 4 bits for domains, 4.6 of 5 for tasks and 5.4 of 6
for modifiers, so no label dominates. On 100 chunks of the sample labelled by one person the codes agree in 47 % of
domains (kappa 0.41), 12 % of tasks (0.08) and 20 % of modifiers (0.16): domains are useful, tasks hardly. Source:
tests/bench/tmd_codes.py.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
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
SHARPNESS = 20.0
"""Inverse temperature of the softmax over an axis' cosines; with `mini` they spread by 0.07 over the bundled sample."""

_BLOCK = 16_384
"""Vectors compared at once: 48 MB of float32."""


@dataclass(frozen=True)
class Tmd:
    """The three parts of a code, each the index of a label in tmd.json."""

    domain: int
    task: int
    modifier: int

    def __post_init__(self) -> None:
        for axis, size in zip(AXES, SIZES, strict=True):
            if not 0 <= getattr(self, axis) < size:
                raise InputError(f"{axis} is {getattr(self, axis)}; expected 0 to {size - 1}")

    @property
    def code(self) -> int:
        """The three parts packed in 16 bits; even, as bit 0 is spare."""
        return self.domain << SHIFTS[0] | self.task << SHIFTS[1] | self.modifier << SHIFTS[2]

    @property
    def names(self) -> tuple[str, str, str]:
        """The labels of domain, task and modifier."""
        domains, tasks, modifiers = labels()
        return domains[self.domain], tasks[self.task], modifiers[self.modifier]

    def features(self) -> NDArray[np.float32]:
        """(16,) the code's bits as 0 and 1, bit 15 first."""
        return np.array([self.code >> bit & 1 for bit in range(15, -1, -1)], np.float32)


def unpack(code: int) -> Tmd:
    """The parts of a code. Raises InputError for any other number."""
    if not 0 <= code < 1 << 16 or code & 1:
        raise InputError(f"TMD code is {code}; expected an even number from 0 to 65534")
    return Tmd(code >> SHIFTS[0], code >> SHIFTS[1] & SIZES[1] - 1, code >> SHIFTS[2] & SIZES[2] - 1)


@cache
def labels() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of domains, tasks and modifiers, in the order of their numbers."""
    record: dict[str, Any] = json.loads((Path(__file__).parent / "tmd.json").read_text(encoding="utf-8"))
    return tuple(record["domains"]), tuple(record["tasks"]), tuple(record["modifiers"])


@cache
def phrases() -> tuple[tuple[str, int], ...]:
    """Typical phrases, each with the index of its label among all 112, domains first; at most 32 tokens each."""
    record: dict[str, dict[str, list[str]]] = json.loads(
        (Path(__file__).parent / "tmd.json").read_text(encoding="utf-8")
    )
    names = [name for axis in labels() for name in axis]
    return tuple((phrase, i) for i, name in enumerate(names) for phrase in record["phrases"][name])


@cache
def coder_name() -> str:
    """Name of the coding by prototypes, with a hash of the phrases."""
    return "prototype " + hashlib.sha256(json.dumps(phrases()).encode()).hexdigest()[:12]


def number_of(axis: str, name: str) -> int:
    """Index of a label by name, ignoring case. Raises InputError listing the axis' labels."""
    names = labels()[AXES.index(axis)]
    folded = [n.casefold() for n in names]
    if name.casefold() not in folded:
        raise InputError(f"no {axis} {name!r}; expected one of {', '.join(names)}")
    return folded.index(name.casefold())


@dataclass(frozen=True)
class Wanted:
    """A filter on codes: the index that each axis must have, None for any."""

    domain: int | None = None
    task: int | None = None
    modifier: int | None = None

    @classmethod
    def of(cls, domain: str | None = None, task: str | None = None, modifier: str | None = None) -> "Wanted":
        """The filter by label names, ignoring case. Raises InputError listing the valid ones."""
        names = zip(AXES, (domain, task, modifier), strict=True)
        return cls(*(None if name is None else number_of(axis, name) for axis, name in names))

    def __bool__(self) -> bool:
        return (self.domain, self.task, self.modifier) != (None, None, None)

    def matches(self, codes: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """(N,) bool, True for the codes that match."""
        matching = np.ones(len(codes), np.bool_)
        for axis, size, shift in zip(AXES, SIZES, SHIFTS, strict=True):
            if (wanted := getattr(self, axis)) is not None:
                matching &= codes >> shift & size - 1 == wanted
        return matching


ANY_CODE = Wanted()


@dataclass(frozen=True)
class Coded:
    """A text's code and its confidence."""

    tmd: Tmd
    confidences: tuple[float, float, float]
    """Of domain, task and modifier, 0 to 1. By prototypes: the label's softmax share, at least 1/16, 1/32 and 1/64."""
    cosines: tuple[float, float, float] | None = None
    """Between the text and the three labels' prototypes; None where a language model chose."""

    @property
    def confidence(self) -> float:
        """Geometric mean of the three."""
        return float(np.prod(self.confidences) ** (1 / 3))


class Prototypes:
    """The 112 labels as vectors of one codec."""

    def __init__(self, vectors: NDArray[np.floating[Any]]) -> None:
        """vectors: (P, D), one for each of `phrases()` in order, from the codec of the texts."""
        if len(vectors) != len(phrases()):
            raise InputError(
                f"got {len(vectors)} vectors, expected {len(phrases())}, one for each of phrases()"
            )
        sums = np.zeros((sum(SIZES), vectors.shape[1]), np.float32)
        np.add.at(sums, [label for _, label in phrases()], vectors)
        self.vectors = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        """(112, D) float32, unit norm: the mean of each label's phrases."""

    @classmethod
    def of(cls, encode: Callable[[list[str]], NDArray[np.floating[Any]]]) -> "Prototypes":
        """The prototypes of a codec, given its `encode`: N texts to (N, D) vectors."""
        return cls(encode([phrase for phrase, _ in phrases()]))

    def codes(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
        """(B,) codes of vectors (B, D), in blocks, so that B may be large."""
        return self.code(vectors)[0]

    def code(self, vectors: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(B,) codes of vectors (B, D) and (B,) their `Coded.confidence`, in blocks, so that B may be large."""
        codes, logs = np.zeros(len(vectors), np.int32), np.zeros(len(vectors), np.float32)
        for low in range(0, len(vectors), _BLOCK):
            rows = slice(low, low + _BLOCK)
            cosines = self._cosines(vectors[rows])
            for part, shift in zip(np.split(cosines, np.cumsum(SIZES)[:-1], axis=1), SHIFTS, strict=True):
                codes[rows] |= part.argmax(axis=1).astype(np.int32) << shift
                logs[rows] -= np.log(np.exp(SHARPNESS * (part - part.max(axis=1, keepdims=True))).sum(axis=1))
        return codes, np.exp(logs / len(AXES))

    def _cosines(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """(B, 112)."""
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise InputError(
                f"got vectors of shape {vectors.shape}, expected (texts, {self.vectors.shape[1]}) from the codec of "
                "the prototypes"
            )
        cosines: NDArray[np.float32] = np.asarray(vectors, np.float32) @ self.vectors.T
        return cosines

    def nearest(self, vectors: NDArray[np.floating[Any]]) -> list[Coded]:
        """The code of each text with its confidences and cosines. vectors: (B, D) unit norm."""
        cosines = self._cosines(vectors)
        parts = np.split(cosines, np.cumsum(SIZES)[:-1], axis=1)
        best = np.stack([part.argmax(axis=1) for part in parts], axis=1)
        tops = np.stack([part.max(axis=1) for part in parts], axis=1)
        exponentials = [np.exp(SHARPNESS * (part - part.max(axis=1, keepdims=True))) for part in parts]
        shares = np.stack([1 / e.sum(axis=1) for e in exponentials], axis=1)
        rows = zip(best.tolist(), shares.tolist(), tops.tolist(), strict=True)
        return [Coded(Tmd(*numbers), (a, b, c), (x, y, z)) for numbers, (a, b, c), (x, y, z) in rows]


def distribution(codes: Mapping[int, int] | Iterable[int]) -> dict[str, Any]:
    """Distribution of codes: per axis the counts by label, the entropy and its maximum in bits; for whole codes the
    entropy and the number of distinct ones.

    codes: a count by code, or the codes themselves. Raises InputError for a number that is not a code.
    """
    counts: dict[int, int] = {}
    for code, count in codes.items() if isinstance(codes, Mapping) else ((c, 1) for c in codes):
        counts[code] = counts.get(code, 0) + count
    parts = {code: unpack(code) for code in counts}
    record: dict[str, Any] = {"texts": sum(counts.values()), "different": len(counts)}
    record["entropy"] = _entropy(counts.values())
    for axis, size, names in zip(AXES, SIZES, labels(), strict=True):
        of_axis = [0] * size
        for code, count in counts.items():
            of_axis[getattr(parts[code], axis)] += count
        record[axis] = {
            "entropy": _entropy(of_axis),
            "most": float(np.log2(size)),
            "counts": dict(zip(names, of_axis, strict=True)),
        }
    return record


def _entropy(counts: Iterable[int]) -> float:
    shares = np.array([c for c in counts if c], np.float64)
    shares /= max(shares.sum(), 1.0)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def distribution_table(codes: Mapping[int, int] | Iterable[int], top: int = 5) -> str:
    """`distribution` as a Markdown table: each axis with its entropy and its `top` most frequent labels."""
    found = distribution(codes)
    lines = ["| axis | entropy, bits | of | most frequent |", "| --- | --- | --- | --- |"]
    for axis in AXES:
        counts = sorted(found[axis]["counts"].items(), key=lambda c: -c[1])[:top]
        shown = ", ".join(f"{name} {count / max(found['texts'], 1):.0%}" for name, count in counts if count)
        lines.append(f"| {axis} | {found[axis]['entropy']:.2f} | {found[axis]['most']:.0f} | {shown} |")
    return "\n".join(lines)
