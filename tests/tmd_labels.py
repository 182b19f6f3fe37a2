"""100 chunks of the bundled sample with the domain, task and modifier a reader gave them, and how well codes agree.

One reader, who saw the text alone and no code. Many texts would bear two labels; each has the one that fits best.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvm.corpus.tmd import AXES, SIZES, Tmd, number_of

LABELS = Path(__file__).parent / "data" / "tmd_labels.jsonl"


def read_labels() -> tuple[list[str], list[Tmd]]:
    """The texts and their labels."""
    records = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
    return [r["text"] for r in records], [Tmd(*(number_of(a, r[a]) for a in AXES)) for r in records]


def agreement(found: Sequence[Tmd], wanted: Sequence[Tmd]) -> dict[str, dict[str, Any]]:
    """By axis: the share of texts with the reader's label; what three guessers reach, one that draws any label, one
    that draws from the reader's labels and one that always says the reader's most frequent; and Cohen's kappa.

    Source of kappa: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    report = {}
    for axis, size in zip(AXES, SIZES, strict=True):
        ours, theirs = [getattr(t, axis) for t in found], [getattr(t, axis) for t in wanted]
        total = len(theirs)
        share = sum(a == b for a, b in zip(ours, theirs, strict=True)) / total
        mine, reader = Counter(ours), Counter(theirs)
        expected = sum(mine[label] * reader[label] for label in mine) / total**2
        report[axis] = {
            "agreement": share,
            "any_label": 1 / size,
            "by_frequency": sum(n * n for n in reader.values()) / total**2,
            "most_frequent": max(reader.values()) / total,
            "kappa": (share - expected) / (1 - expected),
        }
    return report


def agreement_table(report: dict[str, dict[str, Any]]) -> str:
    """As lines of Markdown."""
    lines = [
        "| axis | agreement | kappa | any label | drawn by frequency | most frequent |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for axis, r in report.items():
        lines.append(
            f"| {axis} | {r['agreement']:.0%} | {r['kappa']:.2f} | {r['any_label']:.1%} | {r['by_frequency']:.1%} | "
            f"{r['most_frequent']:.0%} |"
        )
    return "\n".join(lines)
