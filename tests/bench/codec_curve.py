"""How does a codec's read-back rise with training? Its `curve.jsonl` as a plot.

    python -m tests.bench.codec_curve --curve lvm/codec/weights/mini/curve.jsonl --output OUT.png

BLEU and token F1 of the first hypothesis, written without foreseeing as training does, over minutes and
over chunks seen. Where a run was stopped and continued, points that a later part repeats are left out.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Lines of the curve in order of steps; of lines at or after a repeated step the last ones count."""
    kept: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        point = json.loads(line)
        while kept and kept[-1]["step"] >= point["step"]:
            kept.pop()
        kept.append(point)
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Plot a codec's training curve.")
    parser.add_argument("--curve", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(arguments)
    points = read_curve(args.curve)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for axis, key, label in zip(
        axes, ("minutes", "chunks_seen"), ("minutes of training", "chunks decoded"), strict=True
    ):
        axis.plot([p[key] for p in points], [p["bleu"] for p in points], marker=".", label="BLEU")
        axis.plot(
            [p[key] for p in points], [100 * p["token_f1"] for p in points], marker=".", label="token F1, %"
        )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("first hypothesis, held-out articles")
    axes[0].legend()
    figure.savefig(args.output, dpi=110)
    last = points[-1]
    print(
        json.dumps(
            {"points": len(points), **{k: last[k] for k in ("minutes", "chunks_seen", "bleu", "token_f1")}}
        )
    )


if __name__ == "__main__":
    main()
