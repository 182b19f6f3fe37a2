"""Texts to vectors: our encoder against sentence-transformers and vec2text, and the Ray job against a bare loop.

The same texts and weights on every side, in the same run: chunks of real articles where LATENT_DATA names a folder that
has them (`wikipedia_recent.jsonl.gz`), else of the bundled sample. Sizes: `mini` with its shipped weights, `gtr-base`
with seeded random ones (speed does not depend on their values). Sides, each in processes of its own:

- sentence-transformers `encode` with its defaults: float32, batch 32, sorted by length, all cores;
- the same at its best of float32 and bfloat16, larger batches (one with --quick), and one process a core in place of
  threads; `mini` is a module of its own there, the same network in their loop;
- vec2text's embedding call as `invert_strings` has it, padded to 128 tokens, and padded to the codec's 32; `mini`,
  which vec2text lacks, is padded to its 32;
- ours without Ray, a process a core: texts in memory to vectors in memory (`bare`), and chunk shards to vector shards
  (`bare job`, the job's own function in a loop);
- the Ray job, in steady state: the rate between its first and its last shards, without start and end.

What limits the numbers: matrix products at GTR-base size; `mini` is as much tables and passes over memory.
`ray_overhead` is the Ray job's time a chunk over that of `bare job`; `ray_overhead_to_encode_alone` is over that of
`bare`, so it holds reading, checking, compressing and writing as well.

    python -m tests.bench.encode_throughput --quick     # under six minutes on two cores
    python -m tests.bench.encode_throughput             # more texts and trials

The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import Article, read_articles
from tests.checkpoints import EMBEDDER, GTR_BASE, Sizes, make_tokenizer
from tests.doubles import write_chunks

CHECKOUT = Path(__file__).parents[2]
MAX_TOKENS = 32
CHECKED = 128
"""Texts whose vectors are compared."""
BATCHES = (64, 256)
TINY = Sizes(d_model=96, vocabulary_size=8192, embedder_layers=1, embedder_d_ff=256)


@dataclass(frozen=True)
class Plan:
    """How much each side encodes; texts, so that a call takes seconds on two cores."""

    theirs: int
    """sentence-transformers."""
    padded: int
    """vec2text."""
    ours: int
    """Ours without Ray."""
    shard_rows: int
    """Chunks a shard of the jobs."""
    shards: int
    """Shards of the jobs."""


QUICK = {"mini": Plan(4096, 2048, 16384, 2048, 40), "gtr-base": Plan(256, 32, 576, 96, 20)}
FULL = {"mini": Plan(16384, 8192, 65536, 2048, 60), "gtr-base": Plan(1024, 256, 4096, 128, 60)}


# --------------------------------------------------------------------------------------- texts and weights


def chunk_texts(most: int) -> list[str]:
    """Chunks of articles in their order, cut by `mini`'s tokenizer; the same ones again where there are too few."""
    from lvm.codec.zoo import load_tokenizer

    data = os.environ.get("LATENT_DATA")
    real = Path(data) / "wikipedia_recent.jsonl.gz" if data else None
    source: Any = real if real is not None and real.is_file() else "sample"
    chunker = Chunker(load_tokenizer("mini"))
    texts: list[str] = []
    for article in read_articles(source):
        if isinstance(article, Article):
            texts += [c.text for c in chunker.chunk([article])[0]]
        if len(texts) >= most:
            return texts[:most]
    return (texts * (most // len(texts) + 1))[:most]


def make_gtr(root: Path, texts: Sequence[str], sizes: Sizes) -> None:
    """A seeded random encoder of this size under `root`, in the layout all three libraries read."""
    from transformers import T5Config, T5EncoderModel

    make_tokenizer(root, texts, sizes.vocabulary_size)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=sizes.vocabulary_size,
        d_model=768,
        num_layers=sizes.embedder_layers,
        num_heads=sizes.embedder_heads,
        d_kv=sizes.embedder_d_kv,
        d_ff=sizes.embedder_d_ff,
        dropout_rate=0.0,
    )
    T5EncoderModel(config).save_pretrained(root / EMBEDDER)


def load_ours(size: str, root: Path) -> Any:
    """The codec's encoder; a top-level function, as workers of the job call it."""
    if size == "mini":
        from lvm.codec.zoo import load_codec

        return load_codec("mini")
    from lvm.codec.gtr import load_gtr_encoder

    return GtrOnly(*load_gtr_encoder("gtr-jxe", root, torch.device("cpu")))


class GtrOnly:
    """A GTR encoder as the encode job wants it, without its decoders, which no checkpoint here has."""

    def __init__(self, encoder: Any, identity: Any) -> None:
        self.identity, self.tokenizer = identity, encoder.tokenizer
        self.precision = encoder.precision
        self.encode = encoder.encode


# ---------------------------------------------------------------------------------------------- the sides


def sentence_transformer(size: str, root: Path, dtype: str) -> Any:
    """sentence-transformers' model around the same weights."""
    from sentence_transformers import SentenceTransformer

    if size != "mini":
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        first = Transformer(str(root / EMBEDDER), max_seq_length=MAX_TOKENS, model_kwargs={"dtype": kind})
        return SentenceTransformer(modules=[first, Pooling(768, "mean")], device="cpu")

    from sentence_transformers.sentence_transformer.modules import InputModule
    from tokenizers import Tokenizer

    from lvm.codec.zoo import CODECS, load_codec

    network: Any = load_codec("mini", precision="float32")._encoder.network
    tokenizer = Tokenizer.from_file(str(CODECS["mini"] / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")

    class Mini(InputModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def preprocess(self, inputs: Any, prompt: str | None = None, **_: Any) -> dict[str, Any]:
            encodings = tokenizer.encode_batch(list(inputs))
            return {
                "input_ids": torch.tensor([e.ids for e in encodings]),
                "attention_mask": torch.tensor([e.attention_mask for e in encodings]),
            }

        def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                features["sentence_embedding"] = self.network(
                    features["input_ids"], features["attention_mask"].bool()
                )
            return features

        def save(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError("the bench saves no model")

    return SentenceTransformer(modules=[Mini()], device="cpu")


def vec2text_call(size: str, root: Path, length: int) -> Callable[[list[str]], np.ndarray]:
    """vec2text's embedding call (`invert_strings`, `get_gtr_embeddings`): padded to `length`, float32, 32 texts."""
    if size == "mini":
        module = sentence_transformer(size, root, "float32")[0]
        from tokenizers import Tokenizer

        from lvm.codec.zoo import CODECS

        tokenizer = Tokenizer.from_file(str(CODECS["mini"] / "tokenizer.json"))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=0, pad_token="<pad>")

        def embed(texts: list[str]) -> Any:
            encodings = tokenizer.encode_batch(texts)
            mask = torch.tensor([e.attention_mask for e in encodings]).bool()
            return module.network(torch.tensor([e.ids for e in encodings]), mask)

    else:
        from transformers import AutoTokenizer, T5EncoderModel
        from vec2text.models.model_utils import mean_pool

        fast = AutoTokenizer.from_pretrained(root / EMBEDDER)
        network = T5EncoderModel.from_pretrained(root / EMBEDDER).eval()

        def embed(texts: list[str]) -> Any:
            batch = fast(texts, return_tensors="pt", max_length=length, truncation=True, padding="max_length")
            states = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return mean_pool(states.last_hidden_state, batch.attention_mask)

    def run(texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            parts = [embed(texts[i : i + 32]).numpy() for i in range(0, len(texts), 32)]
        return np.concatenate(parts)

    return run


def child(size: str, root: Path, side: str, part: int, parts: int, rows: int) -> None:
    """One process of a side: loads, warms up, then encodes its part at each line on stdin; seconds to stdout."""
    texts = json.loads((root / "texts.json").read_text())
    mine = texts[part:rows:parts]
    kind, _, how = side.partition(":")
    run: Callable[[list[str]], Any]
    if kind == "sentence-transformers":
        dtype, batch = how.split(",")
        model = sentence_transformer(size, root, dtype)

        def run(texts: list[str]) -> Any:
            return model.encode(texts, batch_size=int(batch), show_progress_bar=False)

    elif kind == "vec2text":
        run = vec2text_call(size, root, int(how))
    elif kind == "bare":
        codec = load_ours(size, root)

        def run(texts: list[str]) -> Any:
            # As many texts as a shard has: what a call can sort by length.
            step = int(how)
            return np.concatenate(
                [codec.encode(texts[i : i + step]).vectors for i in range(0, len(texts), step)]
            )

    else:
        from jobs.encode import EncodeSettings, encode_shard
        from lvm.vectors.shards import Manifest

        codec = load_ours(size, root)
        settings = EncodeSettings(codec.identity.digest)
        shards = Manifest.load(root / "chunks").shards[part::parts]
        mine = list(shards)

        def run(shards: list[Any]) -> Any:
            for shard in shards:
                target = root / "bare" / shard.file
                encode_shard(root / "chunks" / shard.file, target, shard, codec, settings)

    run(mine[:32] if kind != "bare job" else mine[:1])
    if part == 0 and (kind == "bare" or side == "sentence-transformers:float32,32"):
        np.save(root / "checked.npy", np.asarray(run(texts[:CHECKED]), np.float32))
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        run(mine)
        print(time.perf_counter() - begun, flush=True)


# ------------------------------------------------------------------------------------------- measurements


def measure(size: str, root: Path, side: str, rows: int, trials: int, processes: int = 1) -> dict[str, Any]:
    """Chunks a second of one side over `trials`, and the vectors of the first texts."""
    cores = os.cpu_count() or 1
    threads = str(max(1, cores // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    (root / "checked.npy").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.encode_throughput", "--child", side, "--size", size]
    children = [
        subprocess.Popen(
            [*command, "--root", str(root), "--part", f"{i}/{processes}", "--rows", str(rows)],
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        for process in children:
            while (line := process.stdout.readline()) != "ready\n":  # type: ignore[union-attr]
                if not line:
                    raise RuntimeError(f"{side} at size {size} did not start; run it with --child to see why")
        speeds = []
        for _ in range(trials):
            for process in children:
                process.stdin.write("go\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            seconds = max(float(p.stdout.readline()) for p in children)  # type: ignore[union-attr]
            speeds.append(rows / seconds)
    finally:
        for process in children:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    row = {"size": size, "side": side, "processes": processes, "chunks_per_second": max(speeds)}
    row |= {"trials": [round(s, 1) for s in speeds], "rows": rows}
    checked = root / "checked.npy"
    if checked.exists():
        vectors = np.load(checked).astype(np.float32)
        row["vectors"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    _say(row)
    return row


def measure_ray(size: str, root: Path, plan: Plan) -> dict[str, Any]:
    """The Ray job's steady rate: shards finished between its first and last rounds, by their files' times."""
    script = (
        "import functools, sys; from pathlib import Path; from jobs.encode import encode_chunks; "
        "from tests.bench.encode_throughput import load_ours; size, root = sys.argv[1], Path(sys.argv[2]); "
        "encode_chunks(root / 'chunks', root / 'vectors', functools.partial(load_ours, size, root))"
    )
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", script, size, str(root)],
        cwd=CHECKOUT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall = time.perf_counter() - begun
    ends = sorted(p.stat().st_mtime for p in (root / "vectors").glob("part-*.parquet"))
    round_ = 2 * (os.cpu_count() or 1)  # shards in flight at once
    inside = ends[round_ - 1 : len(ends) - round_]
    speed = (len(inside) - 1) * plan.shard_rows / (inside[-1] - inside[0])
    row = {"size": size, "side": "ray job", "processes": os.cpu_count(), "chunks_per_second": speed}
    row |= {
        "rows": plan.shard_rows * plan.shards,
        "wall_s": round(wall, 1),
        "vectors": _stored(root / "vectors"),
    }
    _say(row)
    return row


def _stored(folder: Path) -> np.ndarray:
    """The first CHECKED stored vectors, as float32 of norm 1."""
    from lvm.vectors.shards import read_table, table_to_vectors

    parts: list[np.ndarray] = []
    for path in sorted(folder.glob("part-*.parquet")):
        parts.append(table_to_vectors(read_table(path, ["vector"])).astype(np.float32))
        if sum(map(len, parts)) >= CHECKED:
            break
    vectors = np.concatenate(parts)[:CHECKED]
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _say(row: dict[str, Any]) -> None:
    print(
        f"{row['size']:9} {row['side']:36} x{row['processes']} {row['chunks_per_second']:9.1f} chunks/s",
        file=sys.stderr,
        flush=True,
    )


def measure_size(
    size: str, root: Path, plan: Plan, trials: int, batches: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every side at one size: the ratios, and a row for each measurement."""
    cores = os.cpu_count() or 1
    rows = []

    def take(side: str, count: int, processes: int = 1, trials: int = trials) -> dict[str, Any]:
        rows.append(measure(size, root, side, count, trials, processes))
        return rows[-1]

    default = take("sentence-transformers:float32,32", plan.theirs)
    settings = [(f"{t},{b}", 1) for t in ("float32", "bfloat16") for b in batches]
    tried = [
        take(f"sentence-transformers:{how}", plan.theirs // 2, processes, 1)
        for how, processes in [*settings, (f"float32,{batches[-1]}", cores)]
    ]
    found = max([default, *tried], key=lambda r: r["chunks_per_second"])
    best = default if found is default else take(found["side"], plan.theirs, found["processes"])
    padded = take(f"vec2text:{128 if size != 'mini' else MAX_TOKENS}", plan.padded)
    short = padded if size == "mini" else take(f"vec2text:{MAX_TOKENS}", plan.padded)
    bare = take(f"bare:{plan.shard_rows}", plan.ours, cores)
    job = take("bare job:", plan.shard_rows * plan.shards, cores, 1)
    rows.append(measure_ray(size, root, plan))
    ray = rows[-1]

    def ratio(row: dict[str, Any]) -> float:
        return round(bare["chunks_per_second"] / row["chunks_per_second"], 3)

    def cosine(row: dict[str, Any]) -> float:
        # `vectors` of the defaults are float32 by another library's code.
        return round(float(np.einsum("nd,nd->n", row["vectors"], default["vectors"]).min()), 6)

    summary = {
        "vs_sentence_transformers_default": ratio(default),
        "vs_sentence_transformers_best": ratio(best),
        "vs_vec2text": ratio(padded),
        "vs_vec2text_padded_to_32": ratio(short),
        "ray_overhead": round(job["chunks_per_second"] / ray["chunks_per_second"], 3),
        "ray_overhead_to_encode_alone": round(bare["chunks_per_second"] / ray["chunks_per_second"], 3),
        "chunks_per_second": round(bare["chunks_per_second"], 1),
        "ray_chunks_per_second": round(ray["chunks_per_second"], 1),
        "best_setting": f"{best['side']} x{best['processes']}",
        "min_cosine_to_float32": cosine(bare),
        "min_cosine_to_float32_stored": cosine(ray),
    }
    for name in ("min_cosine_to_float32", "min_cosine_to_float32_stored"):
        if summary[name] < 0.9995:
            raise RuntimeError(f"{size}: {name} is {summary[name]}, expected 0.9995; the speeds mean nothing")
    return summary, rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line a measurement."""
    lines = ["| size | side | processes | chunks/s | trials |", "| --- | --- | ---: | ---: | --- |"]
    for r in rows:
        trials = ", ".join(map(str, r.get("trials", [])))
        lines.append(
            f"| {r['size']} | {r['side']} | {r['processes']} | {r['chunks_per_second']:.1f} | {trials} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer texts, two trials, one larger batch")
    parser.add_argument("--size", choices=["mini", "gtr-base"], help="one size alone")
    parser.add_argument(
        "--tiny", action="store_true", help="a one-layer encoder at size gtr-base: does it run?"
    )
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        part, parts = map(int, args.part.split("/"))
        child(args.size, args.root, args.child, part, parts, args.rows)
        return

    begun = time.perf_counter()
    plans = QUICK if args.quick else FULL
    sizes = [args.size] if args.size else ["mini", "gtr-base"]
    texts = chunk_texts(max(max(plans[s].ours, plans[s].shard_rows * plans[s].shards) for s in sizes))
    report: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            plan, root = plans[size], Path(scratch) / size
            root.mkdir()
            (root / "texts.json").write_text(json.dumps(texts))
            if size != "mini":
                make_gtr(root, texts[:4000], TINY if args.tiny else GTR_BASE)
            # One made-up article a shard: ids do not matter here, lengths and their order do.
            step = plan.shard_rows
            shards = [texts[i : i + step] for i in range(0, step * plan.shards, step)]
            write_chunks(root / "chunks", shards, 1, load_ours(size, root).tokenizer)
            trials, batches = (2, BATCHES[-1:]) if args.quick else (4, BATCHES)
            summary, new = measure_size(size, root, plan, trials, batches)
            report[size] = summary
            rows += new
    print(table(rows))
    lengths = [len(t) for t in texts]
    names = ("torch", "sentence-transformers", "transformers", "vec2text", "ray", "numpy")
    print(
        json.dumps(
            {
                **report,
                "seconds": round(time.perf_counter() - begun, 1),
                "mean_letters": round(statistics.fmean(lengths), 1),
                "cores": os.cpu_count(),
                "device": "cpu",
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in names},
            }
        )
    )


if __name__ == "__main__":
    main()
