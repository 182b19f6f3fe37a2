"""TMD codes: what a text is about (domain), asks for (task) and is like (modifier), in 16 bits.

16 domains in bits 15-12, 32 tasks in 11-7, 64 modifiers in 6-1; bit 0 is spare. The labels lie in tmd.json
beside this file, their order is their number; with each, phrases that are typical of it. A text gets the label of each
axis whose phrases lie nearest to it in the codec's space (`Prototypes`), or what a language model says
(`lvm.corpus.tmd_chat`).

With `mini`, over 10,000 chunks of Wikipedia, the codes' entropy is 3.8 of 4 bits for domains, 4.6 of 5 for tasks and
5.4 of 6 for modifiers, so no label swallows the rest. With one reader's labels of 100 chunks of the sample they agree
in 47 % of domains (kappa 0.41), 12 % of tasks (0.08) and 20 % of modifiers (0.16); tests/bench/tmd_codes.py. Domains
are of use, tasks hardly.
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
"""Of the softmax that turns an axis' cosines into shares; with `mini` they spread by 0.07 over the bundled sample."""

_BLOCK = 16_384
"""Vectors compared at once: 48 MB of float32."""

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


@cache
def phrases() -> tuple[tuple[str, int], ...]:
    """Typical phrases of all 112 labels, domains first, each with the number of its label among them. All are short
    enough for a codec of 32 tokens."""
    record: dict[str, dict[str, list[str]]] = json.loads(
        (Path(__file__).parent / "tmd.json").read_text(encoding="utf-8")
    )
    names = [name for axis in labels() for name in axis]
    return tuple((phrase, i) for i, name in enumerate(names) for phrase in record["phrases"][name])


@cache
def coder_name() -> str:
    """Of coding by prototypes, with these phrases: other phrases, another name."""
    return "prototype " + hashlib.sha256(json.dumps(phrases()).encode()).hexdigest()[:12]


def number_of(axis: str, name: str) -> int:
    """Number of a label by its name, in any case. Raises InputError with all of that axis."""
    names = labels()[AXES.index(axis)]
    folded = [n.casefold() for n in names]
    if name.casefold() not in folded:
        raise InputError(f"no {axis} {name!r}; expected one of {', '.join(names)}")
    return folded.index(name.casefold())


def features(codes: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """(N, 16) of N codes: their bits as 0 and 1, the highest first."""
    bits = np.arange(FEATURES - 1, -1, -1)
    return (np.asarray(codes, np.int64)[:, None] >> bits & 1).astype(np.float32)


@dataclass(frozen=True)
class Wanted:
    """What a code must say; None asks for nothing."""

    domain: int | None = None
    """Number of the domain, and so on."""
    task: int | None = None
    modifier: int | None = None

    @classmethod
    def of(cls, domain: str | None = None, task: str | None = None, modifier: str | None = None) -> "Wanted":
        """By names, in any case. Raises InputError with those there are."""
        names = zip(AXES, (domain, task, modifier), strict=True)
        return cls(*(None if name is None else number_of(axis, name) for axis, name in names))

    def __bool__(self) -> bool:
        return (self.domain, self.task, self.modifier) != (None, None, None)

    def matches(self, codes: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """(N,) which of N codes say so."""
        found = np.ones(len(codes), np.bool_)
        for axis, size, shift in zip(AXES, SIZES, SHIFTS, strict=True):
            if (wanted := getattr(self, axis)) is not None:
                found &= codes >> shift & size - 1 == wanted
        return found


ANY_CODE = Wanted()


@dataclass(frozen=True)
class Coded:
    """A text's code and how sure it is."""

    tmd: Tmd
    """What was found."""
    confidences: tuple[float, float, float]
    """Of domain, task and modifier, 0 to 1; by prototypes the label's share among its axis, 1/16, 1/32 and 1/64 where
    nothing speaks for any."""
    cosines: tuple[float, float, float] | None = None
    """Of the text with the three labels' prototypes; None where a language model chose."""

    @property
    def confidence(self) -> float:
        """Geometric mean of the three."""
        return float(np.prod(self.confidences) ** (1 / 3))


class Prototypes:
    """The 112 labels as vectors of one codec."""

    def __init__(self, vectors: NDArray[np.floating[Any]]) -> None:
        """vectors: (P, D), one for each of `phrases()` in order, by the codec whose texts are to be coded."""
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
        """Of the codec that `encode` is of: texts to (texts, D)."""
        return cls(encode([phrase for phrase, _ in phrases()]))

    def codes(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
        """(B,) the codes alone, of (B, D) vectors of any number."""
        return self.code(vectors)[0]

    def code(self, vectors: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(B,) codes, and (B,) how sure each is (`Coded.confidence`), of (B, D) vectors of any number."""
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
                f"got vectors of shape {vectors.shape}, expected (texts, {self.vectors.shape[1]}) of the codec that "
                "made the prototypes"
            )
        cosines: NDArray[np.float32] = np.asarray(vectors, np.float32) @ self.vectors.T
        return cosines

    def nearest(self, vectors: NDArray[np.floating[Any]]) -> list[Coded]:
        """The code of each text. vectors: (B, D) of texts, unit norm, same codec."""
        cosines = self._cosines(vectors)
        best, scores, shares = [], [], []
        for part in np.split(cosines, np.cumsum(SIZES)[:-1], axis=1):
            best.append(part.argmax(axis=1))
            scores.append(part.max(axis=1))
            shares.append(1 / np.exp(SHARPNESS * (part - part.max(axis=1, keepdims=True))).sum(axis=1))
        found = []
        for row in range(len(vectors)):
            d, t, m = (int(b[row]) for b in best)
            sure = (float(shares[0][row]), float(shares[1][row]), float(shares[2][row]))
            near = (float(scores[0][row]), float(scores[1][row]), float(scores[2][row]))
            found.append(Coded(Tmd(d, t, m), sure, near))
        return found


def distribution(codes: Mapping[int, int] | Iterable[int]) -> dict[str, Any]:
    """How codes are spread: for each axis its labels with their counts, and the entropy in bits beside the most there
    could be; for whole codes the entropy and how many differ. A classifier that always says the same has 0 bits.

    codes: each with its count, or one after the other. Raises InputError on what is no code.
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
    """`distribution` as lines of Markdown: each axis with its entropy and its `top` most frequent labels."""
    found = distribution(codes)
    lines = ["| axis | entropy, bits | of | most frequent |", "| --- | --- | --- | --- |"]
    for axis in AXES:
        counts = sorted(found[axis]["counts"].items(), key=lambda c: -c[1])[:top]
        shown = ", ".join(f"{name} {count / max(found['texts'], 1):.0%}" for name, count in counts if count)
        lines.append(f"| {axis} | {found[axis]['entropy']:.2f} | {found[axis]['most']:.0f} | {shown} |")
    return "\n".join(lines)
