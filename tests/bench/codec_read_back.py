"""How fast does `mini` encode and read back, and is what it reads right?

    python -m tests.bench.codec_read_back

What limits the numbers: the product with the 8,192 x 512 token table, once a token for the hypothesizer and twice a
place for each of the corrector's four sweeps. A batch shares its reading from memory, so larger ones cost less a text.
Chunks of the bundled sample; the first call of each size is dropped; median, least and most of the trials. BLEU of the
texts is checked in the same run. The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lvm.codec.quality import read_back
from lvm.codec.zoo import load_codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles


def timed(call: Callable[[], Any], trials: int) -> dict[str, float]:
    """Seconds of a call: median, least, most; one call before does not count."""
    call()
    seconds = []
    for _ in range(trials):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Speed of the mini codec.")
    parser.add_argument("--batches", default="1,32,128", help="batch sizes of decoding")
    parser.add_argument("--steps", default="0,1", help="corrector steps")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--precision", default="auto", help="auto, float32, bfloat16 or int8")
    args = parser.parse_args(arguments)
    codec = load_codec("mini", device="cpu", precision=args.precision)
    chunker = Chunker(codec.tokenizer)
    texts = [c.text for a in read_articles("sample", None) for c in chunker.chunk([a])[0]]
    picked = [texts[i] for i in np.unique(np.linspace(0, len(texts) - 1, 1024).astype(int))]
    rows: list[dict[str, Any]] = []

    def add(what: str, batch: int, call: Callable[[], Any], **more: float) -> None:
        row: dict[str, Any] = {"what": what, "batch": batch, **timed(call, args.trials), **more}
        row["per_s"] = batch / row["median_s"]
        rows.append(row)
        print(
            f"{what:10} batch {batch:5}  {row['per_s']:8.1f}/s  median {row['median_s'] * 1000:8.1f} ms "
            f"({row['least_s'] * 1000:.1f} to {row['most_s'] * 1000:.1f})"
            + "".join(f"  {k} {v:.1f}" for k, v in more.items()),
            flush=True,
        )

    add("encode", len(picked), lambda: codec.encode_chunks(picked))
    vectors = codec.encode_chunks(picked).vectors
    for batch in map(int, args.batches.split(",")):
        # Texts from all over the sample, so that the first few are not one article's.
        some = np.linspace(0, len(picked) - 1, batch).astype(int) if batch > 1 else np.array([0])
        given, sources = vectors[some], [picked[i] for i in some]
        for steps in map(int, args.steps.split(",")):
            bleu = read_back(sources, codec.decode(given, steps=steps).texts)["bleu"]
            add(f"steps={steps}", batch, lambda g=given, s=steps: codec.decode(g, steps=s), bleu=bleu)  # type: ignore[misc]
    print(
        json.dumps(
            {
                "codec": str(codec.identity),
                "precision": args.precision,
                "threads": torch.get_num_threads(),
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in ("torch", "numpy", "tokenizers")},
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
