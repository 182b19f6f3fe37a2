"""Corrector steps saved by starting from a near neighbour's text, at equal cosine.

Rows start from the hypothesizer's text alone, or from whichever is nearer: that, or the text of the nearest other
chunk of the corpus. Two kinds of vectors: chunks' own, and blends of three neighbours, which stand for predictions.
A row takes steps until it reaches the cosine asked for, gains nothing more, or has taken five.

    python -m tests.bench.decode_warm_start --run out/demo      # about a minute

The last line of stdout is one JSON object.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lvm.codec.inverter import Inversion
from lvm.codec.zoo import load_codec

TARGETS = (0.5, 0.8, 0.95)
NUM_ROWS = 192


def summarise(rows: list[Inversion], target: float) -> dict[str, float]:
    """Means over the rows."""
    return {
        "steps": float(np.mean([row.steps_used for row in rows])),
        "reached": float(np.mean([row.cosine >= target for row in rows])),
        "cosine": float(np.mean([row.cosine for row in rows])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=Path("out/demo"), help="folder of `latent demo` or `latent run`"
    )
    args = parser.parse_args()
    codec = load_codec("mini")
    texts = [
        str(text)
        for shard in sorted((args.run / "chunks").glob("*.parquet"))
        for text in pq.read_table(shard, columns=["text"])["text"].to_pylist()
    ]
    rng = np.random.default_rng(5)
    rows = rng.choice(len(texts), min(NUM_ROWS, len(texts)), replace=False)
    everything = codec.encode_chunks(texts).vectors
    cosines = everything[rows] @ everything.T
    cosines[np.arange(len(rows)), rows] = -1.0
    near = np.argsort(-cosines, axis=1)[:, :3]
    blends = everything[near].sum(1)
    blends /= np.linalg.norm(blends, axis=1, keepdims=True)
    starts = [texts[i] for i in near[:, 0]]
    lines = [
        "| vectors | target cosine | start | steps | reached | cosine |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    results = []
    for kind, vectors in (("chunks", everything[rows]), ("blends of three", blends)):
        for target in TARGETS:
            for name, given in (("hypothesizer", None), ("nearer of both", starts)):
                got = summarise(codec.inverter.invert(vectors, 5, target, given), target)
                results.append({"vectors": kind, "target": target, "start": name, **got})
                lines.append(
                    f"| {kind} | {target} | {name} | {got['steps']:.2f} | {got['reached']:.2f} | {got['cosine']:.3f} |"
                )
    print("\n".join(lines))
    print(json.dumps({"rows": len(rows), "codec": str(codec.identity), "results": results}))


if __name__ == "__main__":
    main()
