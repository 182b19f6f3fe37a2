"""Texts to vectors: our encoder against sentence-transformers and vec2text, and the Ray job against a bare loop.

The same texts and weights on every side, in the same run: chunks of real articles where LATENT_DATA names a folder that
has them (`wikipedia_recent.jsonl.gz`), else of the bundled sample. Sizes: `mini` with its shipped weights, `gtr-base`
with seeded random ones (speed does not depend on their values). Sides, each in processes of its own:

- sentence-transformers `encode` with its defaults: float32, batch 32, sorted by length, all cores;
- the same at its best of float32 and bfloat16, larger batches (one with --quick), and one process a core in place of
  threads; `mini` is a module of its own there, the same network in their loop;
- vec2text's embedding call as `invert_strings` has it, padded to 128 tokens, and, without --quick, to the codec's 32;
  `mini`, which vec2text lacks, is padded to its 32;
- ours without Ray, a process a core: texts in memory to vectors in memory (`bare`), and chunk shards to vector shards
  (`bare job`, the job's own function in a loop);
- the Ray job, in steady state: the rate between the first third of its shards and its last, without start and end.

On CUDA (`--device`, by itself where there is one) also our encoder in one process on one GPU: chunks a second, and the
share of what one large bfloat16 product reaches there.

What limits the numbers: matrix products at GTR-base size; `mini` is as much tables and passes over memory.
`ray_overhead` is the Ray job's time a chunk over that of `bare job`, measured before and after it;
`ray_overhead_to_encode_alone` is over that of `bare`, so it holds reading, checking, compressing and writing as well.

    python -m tests.bench.encode_throughput --quick     # meant for six minutes on two cores; took nearly seven
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
from importlib.util import find_spec
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


QUICK = {"mini": Plan(4096, 2048, 16384, 2048, 60), "gtr-base": Plan(192, 32, 576, 96, 24)}
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


def load_ours(size: str, root: Path, device: str = "cpu") -> Any:
    """The codec's encoder; a top-level function, as workers of the job call it."""
    if size == "mini":
        from lvm.codec.zoo import load_codec

        return load_codec("mini", device=device)
    from lvm.codec.gtr import load_gtr_encoder

    return GtrOnly(*load_gtr_encoder("gtr-jxe", root, torch.device(device)))


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
        np.save(root / f"{kind}.npy", np.asarray(run(texts[:CHECKED]), np.float32))
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        run(mine)
        print(time.perf_counter() - begun, flush=True)


# ------------------------------------------------------------------------------------------- measurements


class Side:
    """The processes of one side. All sides start together, since loading takes longer than most measurements; while one
    is measured the others wait for a line, and take no time."""

    def __init__(self, size: str, root: Path, side: str, rows: int, processes: int = 1) -> None:
        self.size, self.side, self.rows, self.processes = size, side, rows, processes
        self._root = root
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-m", "tests.bench.encode_throughput", "--child", side, "--size", size]
        self._children = [
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

    def wait(self) -> None:
        """Until every process is ready."""
        for process in self._children:
            while (line := process.stdout.readline()) != "ready\n":  # type: ignore[union-attr]
                if not line:
                    raise RuntimeError(
                        f"{self.side} at size {self.size} did not start; run it with --child to see why"
                    )

    def measure(self, trials: int) -> dict[str, Any]:
        """Chunks a second over `trials`, and the vectors of the first texts."""
        speeds = []
        for _ in range(trials):
            for process in self._children:
                process.stdin.write("go\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            seconds = max(float(p.stdout.readline()) for p in self._children)  # type: ignore[union-attr]
            speeds.append(self.rows / seconds)
        row = {"size": self.size, "side": self.side, "processes": self.processes}
        row |= {"chunks_per_second": max(speeds), "trials": [round(s, 1) for s in speeds], "rows": self.rows}
        checked = self._root / f"{self.side.partition(':')[0]}.npy"
        if checked.exists():
            vectors = np.load(checked).astype(np.float32)
            row["vectors"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        _say(row)
        return row

    def close(self) -> None:
        """End the processes."""
        for process in self._children:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


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
    # Ray starts processes of its own beside the first shards: a third of them is left out.
    inside = ends[max(round_, len(ends) // 3) - 1 : len(ends) - round_]
    speed = (len(inside) - 1) * plan.shard_rows / (inside[-1] - inside[0])
    row = {"size": size, "side": "ray job", "processes": os.cpu_count(), "chunks_per_second": speed}
    row |= {
        "rows": plan.shard_rows * plan.shards,
        "wall_s": round(wall, 1),
        "vectors": _stored(root / "vectors"),
    }
    _say(row)
    return row


def token_flops(size: str, sizes: Sizes) -> int:
    """Floating-point operations of the matrix products one token passes, 2 for each weight; attention, under 1 % of it
    for texts this short, and tables left out."""
    if size == "mini":
        from lvm.codec.mini import MiniConfig

        c = MiniConfig()
        L = c.lexical_dim
        return 2 * (L * L + c.encoder_layers * (4 * L * L + 2 * L * c.d_ff))
    inner = sizes.embedder_heads * sizes.embedder_d_kv
    return 2 * sizes.embedder_layers * (4 * 768 * inner + 2 * 768 * sizes.embedder_d_ff)


def matrix_peak(device: str) -> float:
    """Operations a second of one large bfloat16 product on this device, the best of five. On a CPU in float32: ours is
    int8 there, so a share above 1 is no error; it only shows that this part runs."""
    side = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    taken = []
    for _ in range(6):
        begun = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for the device
        taken.append(time.perf_counter() - begun)
    return 2 * side**3 / min(taken[1:])


def measure_device(size: str, root: Path, texts: Sequence[str], device: str, sizes: Sizes) -> dict[str, Any]:
    """Our encoder alone in one process on one device: chunks a second, and the share of what `matrix_peak` reaches."""
    codec = load_ours(size, root, device)
    codec.encode(texts[:2048])
    begun = time.perf_counter()
    encoded = codec.encode(texts)
    seconds = time.perf_counter() - begun
    speed = int(encoded.num_tokens.sum()) * token_flops(size, sizes) / seconds
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "chunks_per_second_per_device": round(len(texts) / seconds, 1),
        "tflops": round(speed / 1e12, 3),
        "share_of_peak": round(speed / matrix_peak(device), 3),
    }


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


def _speed(row: dict[str, Any]) -> float:
    return float(row["chunks_per_second"])


def measure_size(
    size: str, root: Path, plan: Plan, trials: int, batches: Sequence[int], quick: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every side at one size: the ratios, and a row for each measurement."""
    cores = os.cpu_count() or 1
    theirs = "sentence-transformers:"
    how = [f"{t},{b}" for t in ("float32", "bfloat16") for b in batches]
    job_rows = plan.shard_rows * plan.shards
    sides = {
        "default": Side(size, root, f"{theirs}float32,32", plan.theirs),
        **{h: Side(size, root, f"{theirs}{h}", plan.theirs) for h in how},
        "processes": Side(size, root, f"{theirs}float32,{batches[-1]}", plan.theirs, cores),
        "padded": Side(size, root, f"vec2text:{128 if size != 'mini' else MAX_TOKENS}", plan.padded),
        "bare": Side(size, root, f"bare:{plan.shard_rows}", plan.ours, cores),
        "job": Side(size, root, "bare job:", job_rows, cores),
    }
    if size != "mini" and not quick:
        sides["short"] = Side(size, root, f"vec2text:{MAX_TOKENS}", plan.padded)
    rows = []
    try:
        for side in sides.values():
            side.wait()

        def take(name: str, trials: int = trials) -> dict[str, Any]:
            rows.append(sides[name].measure(trials))
            return rows[-1]

        default = take("default")
        best = max([default, *(take(name) for name in [*how, "processes"])], key=_speed)
        padded = take("padded")
        short = take("short") if "short" in sides else padded
        bare = take("bare")
        before = take("job", 1)
        rows.append(measure_ray(size, root, plan))
        ray = rows[-1]
        # Before and after, since a virtual machine's speed changes within a minute.
        job_speed = statistics.fmean([_speed(before), _speed(take("job", 1))])
    finally:
        for side in sides.values():
            side.close()

    def ratio(row: dict[str, Any]) -> float:
        return round(bare["chunks_per_second"] / row["chunks_per_second"], 3)

    def cosine(row: dict[str, Any]) -> float:
        # `vectors` of the defaults are float32 by another library's code.
        return round(float(np.einsum("nd,nd->n", row["vectors"], default["vectors"]).min()), 6)

    summary: dict[str, Any] = {
        "vs_sentence_transformers_default": ratio(default),
        "vs_sentence_transformers_best": ratio(best),
        "vs_vec2text": ratio(padded),
        "ray_overhead": round(job_speed / ray["chunks_per_second"], 3),
        "ray_overhead_to_encode_alone": round(bare["chunks_per_second"] / ray["chunks_per_second"], 3),
        "chunks_per_second": round(bare["chunks_per_second"], 1),
        "ray_chunks_per_second": round(ray["chunks_per_second"], 1),
        "best_setting": f"{best['side']} x{best['processes']}",
        "min_cosine_to_float32": cosine(bare),
        "min_cosine_to_float32_stored": cosine(ray),
    }
    if "short" in sides or size == "mini":
        summary["vs_vec2text_padded_to_32"] = ratio(short)
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
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else None,
        help="measure our encoder on one such device as well, against its peak; cuda where there is one",
    )
    parser.add_argument(
        "--only-device", action="store_true", help="that alone, without peers: needs torch and tokenizers"
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
            sizes_of = TINY if args.tiny else GTR_BASE
            (root / "texts.json").write_text(json.dumps(texts))
            if size != "mini":
                make_gtr(root, texts[:4000], sizes_of)
            if args.device:
                report[size] = measure_device(size, root, texts[: plan.ours], args.device, sizes_of)
            if args.only_device:
                continue
            # One made-up article a shard: ids do not matter here, lengths and their order do.
            step = plan.shard_rows
            shards = [texts[i : i + step] for i in range(0, step * plan.shards, step)]
            write_chunks(root / "chunks", shards, 1, load_ours(size, root).tokenizer)
            trials, batches = (2, BATCHES[-1:]) if args.quick else (4, BATCHES)
            summary, new = measure_size(size, root, plan, trials, batches, args.quick)
            report[size] = {**report.get(size, {}), **summary}
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
                "processor": platform.processor() or platform.machine(),
                "versions": {n: version(n) for n in names if find_spec(n.replace("-", "_"))},
            }
        )
    )


if __name__ == "__main__":
    main()
