"""The writer's engine against transformers' own generation loop, on the same weights in the same run.

    python -m tests.bench.writer_throughput

Both get the same prefixes (of vectors that the shipped `gru` predicts from contexts of the bundled sample) and write
one greedy text for each, no 3-gram twice, up to 48 tokens: ours at the precision it takes by itself on this machine,
transformers in bfloat16 and in float32, of which the faster counts, with adapter and language model merged into one
LlamaForCausalLM and the output cut to nothing. The evidence bonus, which transformers has not, is off on both sides.

What limits the numbers: one text alone reads every weight once a token, so bytes decide; 32 at once are bound by
arithmetic, of which the output table over 49,152 ids is a third where it is not cut to the ids that occur.

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from lvm.codec.writer import Writer
from lvm.codec.zoo import load_codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.predict.predictor import load_predictor


def predicted_vectors(codec: Any, num: int) -> np.ndarray:
    """(num, D) vectors that `gru` predicts, one an article or more."""
    chunker = Chunker(codec.tokenizer)
    contexts = []
    for article in read_articles("sample"):
        texts = [c.text for c in chunker.chunk([article])[0]]
        contexts += [texts[i : i + 5] for i in range(0, len(texts) - 5, 5)]
    vectors = codec.encode([t for c in contexts[:num] for t in c]).reshape(num, 5, -1)
    return load_predictor("gru")(vectors)


def peer(writer: Writer, dtype: torch.dtype) -> Callable[[np.ndarray], list[str]]:
    """transformers' LlamaForCausalLM with the adapter merged in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = writer._base.model
    parts = Writer.parts(writer.folder, writer._base, writer.identity)
    config = LlamaConfig(**vars(base.config), tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    merged = parts.adapter.merged(base.weights)
    model.load_state_dict({f"model.{k}": v.float() for k, v in merged.items()}, strict=False)
    model.tie_weights()
    model = model.to(dtype).eval()

    @torch.inference_mode()
    def write(vectors: np.ndarray) -> list[str]:
        prefix = writer.prefix(torch.from_numpy(vectors)).to(dtype)
        out = model.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.int64),
            max_new_tokens=writer.settings.max_tokens,
            do_sample=False,
            no_repeat_ngram_size=3,
            eos_token_id=writer._base.end_id,
            pad_token_id=writer._base.end_id,
        )
        return [
            " ".join(t.split()) for t in base.tokenizer.decode_batch(out.tolist(), skip_special_tokens=True)
        ]

    return write


def seconds(call: Callable[[], Any], budget_s: float) -> float:
    """Median seconds of a call, after one to warm up."""
    call()
    times: list[float] = []
    while sum(times) < budget_s or len(times) < 3:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def main() -> None:
    """As the module's docstring has it."""
    parser = argparse.ArgumentParser(description="Our writing rounds against transformers' loop.")
    parser.add_argument("--batches", default="1,32", help="texts at once, with commas between")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each figure")
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    codec = load_codec("mini")
    if codec.writer is None:
        raise SystemExit(f"no writer: {codec.no_writer}")
    writer = codec.writer
    writer.settings = replace(writer.settings, bonus=0.0)
    vectors = predicted_vectors(codec, max(batches))
    peers = {"bfloat16": peer(writer, torch.bfloat16), "float32": peer(writer, torch.float32)}
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "precision": writer.precision,
    }
    for batch in batches:
        some = vectors[:batch]
        ours = [drafts[0].text for drafts in writer.write(some)]
        row: dict[str, Any] = {"ours_s": round(seconds(lambda some=some: writer.write(some), args.budget), 3)}
        for name, write in peers.items():
            row[f"transformers_{name}_s"] = round(seconds(lambda w=write, s=some: w(s), args.budget), 3)
            row[f"equal_{name}"] = sum(a == b for a, b in zip(ours, write(some), strict=True))
        row["texts_per_s"] = round(batch / row["ours_s"], 2)
        row["ratio"] = round(min(row[f"transformers_{n}_s"] for n in peers) / row["ours_s"], 2)
        result[f"batch_{batch}"] = row
        print(json.dumps({batch: row}), flush=True)
        for a, b in zip(ours[:3], peers["float32"](some)[:3], strict=True):
            print(f"  ours          {a}\n  transformers  {b}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
