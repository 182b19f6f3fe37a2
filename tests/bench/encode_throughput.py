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
- the Ray job in its steady state, in turns with the bare job: after a quarter of its shards, without start and end.

On CUDA (`--device`, by itself where there is one) also our encoder in one process on one GPU: chunks a second, and the
share of what one large bfloat16 product reaches there.

What limits the numbers: matrix products at GTR-base size; `mini` is as much tables and passes over memory.
`ray_overhead` is the Ray job's time a chunk over that of `bare job`; `ray_overhead_to_encode_alone` is over that of
`bare`, so it holds reading, checking, compressing and writing as well.

    python -m tests.bench.encode_throughput --quick     # under six minutes on two cores
    python -m tests.bench.encode_throughput             # more texts and trials

The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
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
import psutil
import torch

from jobs._ray import WORKER_ENVIRONMENT
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.corpus.records import Article
from lvm.predict.steer import unit
from tests.checkpoints import EMBEDDER, GTR_BASE, Sizes, make_tokenizer
from tests.doubles import write_chunks

CHECKOUT = Path(__file__).parents[2]
MAX_TOKENS = 32
CHECKED = 128
"""Texts whose vectors are compared."""
BATCHES = (64, 256)
BARE_JOB = "bare job"
"""The job's own function in a loop, as a side."""
TURN = 4.0
"""Seconds the Ray job and the bare loop run in turn: several shards of each, short beside a machine's slow phases."""
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
    """Shards of the jobs; of the texts of `ours`, again and again."""


QUICK = {"mini": Plan(3072, 2048, 16384, 2048, 72), "gtr-base": Plan(192, 32, 640, 128, 36)}
FULL = {"mini": Plan(16384, 8192, 65536, 2048, 144), "gtr-base": Plan(1024, 256, 4096, 128, 96)}


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
        self.encode_chunks = encoder.encode


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


def start_side(
    size: str, root: Path, side: str, texts: list[str], part: int, parts: int
) -> Callable[[], Any]:
    """Loads a side, warms it up, and gives the call that encodes this process's part of `texts`."""
    mine = texts[part::parts]
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
                [codec.encode_chunks(texts[i : i + step]).vectors for i in range(0, len(texts), step)]
            )

    else:
        from jobs.encode import EncodeSettings, encode_shard
        from lvm.vectors.shards import Manifest

        codec = load_ours(size, root)
        settings = EncodeSettings(codec.identity.digest)

        def run_shards(shards: Sequence[Any]) -> None:
            for shard in shards:
                target = root / "bare" / shard.file
                encode_shard(root / "chunks" / shard.file, target, shard, codec, settings)

        shards = Manifest.load(root / "chunks").shards[part::parts]
        run_shards(shards[:1])
        return lambda: run_shards(shards)

    run(mine[:32])
    if part == 0 and (kind == "bare" or side == "sentence-transformers:float32,32"):
        np.save(root / f"{kind}.npy", np.asarray(run(texts[:CHECKED]), np.float32))
    return lambda: run(mine)


def child(size: str, root: Path, rows: dict[str, int], part: int, parts: int) -> None:
    """One process of the sides that `rows` names: encodes its part for a side at each line with the side's name on
    stdin; seconds to stdout."""
    texts = json.loads((root / "texts.json").read_text())
    runs = {side: start_side(size, root, side, texts[:n], part, parts) for side, n in rows.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        runs[line.strip()]()
        print(time.perf_counter() - begun, flush=True)


# ------------------------------------------------------------------------------------------- measurements


class Workers:
    """Processes that hold several sides, since loading one takes longer than most measurements. All start together;
    while one is measured the others wait for a line, and take no time."""

    def __init__(self, size: str, root: Path, rows: dict[str, int], processes: int = 1) -> None:
        self.size, self.rows, self.processes = size, rows, processes
        self._root = root
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        # Workers of the job have the same environment.
        environment = {
            **os.environ,
            **WORKER_ENVIRONMENT,
            "OMP_NUM_THREADS": threads,
            "RAYON_NUM_THREADS": threads,
        }
        command = [sys.executable, "-m", "tests.bench.encode_throughput", "--child", json.dumps(rows)]
        self._children = [
            subprocess.Popen(
                [*command, "--size", size, "--root", str(root), "--part", f"{i}/{processes}"],
                cwd=CHECKOUT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for i in range(processes)
        ]

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [p.pid for p in self._children]

    def wait(self) -> None:
        """Until every process is ready."""
        for process in self._children:
            while (line := process.stdout.readline()) != "ready\n":  # type: ignore[union-attr]
                if not line:
                    raise RuntimeError(
                        f"{', '.join(self.rows)} at size {self.size} did not start; run with --child to see why"
                    )

    def start(self, side: str) -> None:
        """Let every process encode its part once."""
        for process in self._children:
            process.stdin.write(side + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]

    def measure(self, side: str) -> float:
        """Chunks a second, once."""
        self.start(side)
        seconds = max(float(p.stdout.readline()) for p in self._children)  # type: ignore[union-attr]
        return self.rows[side] / seconds

    def vectors(self, side: str) -> np.ndarray:
        """The side's vectors of the first CHECKED texts, as float32 of norm 1."""
        return unit(np.load(self._root / f"{side.partition(':')[0]}.npy"))

    def kill(self) -> None:
        """End the processes in the middle of their work, stopped ones too."""
        for process in self._children:
            process.kill()

    def close(self) -> None:
        """End the processes when what they do is done."""
        for process in self._children:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


class Turns:
    """Processes that run only in their turns: stopped and let go on by signals."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._turns: list[tuple[float, float]] = []

    def stop(self) -> None:
        """Stop the processes and all they started, parents first."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let all of them run."""
        self._send(signal.SIGCONT)

    def run(self, seconds: float) -> None:
        """One turn; stopped before and after."""
        begun = time.time()
        self.go_on()
        time.sleep(seconds)
        self.stop()
        self._turns.append((begun, time.time()))

    def rate(self, folder: Path) -> float:
        """Files of `folder` a second of these turns, between the first and the last written in them."""
        ends = sorted(p.stat().st_mtime for p in folder.glob("part-*.parquet"))
        inside = [t for t in ends if any(a <= t <= b for a, b in self._turns)]
        clock = [sum(min(b, t) - a for a, b in self._turns if a <= t) for t in (inside[0], inside[-1])]
        return (len(inside) - 1) / (clock[1] - clock[0])

    def _send(self, number: int) -> None:
        for root in self._roots:
            processes = [root, *root.children(recursive=True)] if root.is_running() else []
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def measure_ray(size: str, root: Path, plan: Plan, bare: Workers) -> list[dict[str, Any]]:
    """The Ray job in its steady state and `bare job`, in turns of TURN seconds; a row for each.

    In turns, since a virtual machine's speed changes by a quarter within a minute, which is more than what Ray adds.
    """
    script = (
        "import functools, sys; from pathlib import Path; from jobs.encode import encode_chunks; "
        "from tests.bench.encode_throughput import load_ours; size, root = sys.argv[1], Path(sys.argv[2]); "
        "encode_chunks(root / 'chunks', root / 'vectors', functools.partial(load_ours, size, root))"
    )
    vectors, again = root / "vectors", root / "bare"
    job = subprocess.Popen(
        [sys.executable, "-c", script, size, str(root)],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ray, loop = Turns([job.pid]), Turns(bare.pids)

    def written(folder: Path) -> int:
        return len(list(folder.glob("part-*.parquet")))

    try:
        # Ray starts processes of its own beside the first shards.
        while written(vectors) < plan.shards // 4:
            if job.poll() is not None:
                raise RuntimeError(
                    f"the Ray job at size {size} ended with {job.returncode} before its work began"
                )
            time.sleep(0.2)
        ray.stop()
        bare.start(BARE_JOB)
        in_flight = 2 * bare.processes
        while max(written(vectors), written(again)) < plan.shards - in_flight:
            loop.run(TURN)
            ray.run(TURN)
    finally:
        ray.go_on()
        bare.kill()
    if job.wait() != 0:
        raise RuntimeError(f"the Ray job at size {size} ended with {job.returncode}")
    rows = []
    for side, rate in ((BARE_JOB, loop.rate(again)), ("ray job", ray.rate(vectors))):
        row = {"size": size, "side": side, "processes": bare.processes}
        rows.append({**row, "chunks_per_second": rate * plan.shard_rows})
        _say(rows[-1])
    return rows


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
    codec.encode_chunks(texts[:2048])
    begun = time.perf_counter()
    encoded = codec.encode_chunks(texts)
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
    return unit(np.concatenate(parts)[:CHECKED])


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
    default = f"{theirs}float32,32"
    tuned = [f"{theirs}{t},{b}" for t in ("float32", "bfloat16") for b in batches]
    processes = f"{theirs}float32,{batches[-1]}"
    padded = f"vec2text:{128 if size != 'mini' else MAX_TOKENS}"
    short = padded if size == "mini" or quick else f"vec2text:{MAX_TOKENS}"
    bare = f"bare:{plan.shard_rows}"
    threads = Workers(
        size,
        root,
        dict.fromkeys((default, *tuned), plan.theirs) | dict.fromkeys((padded, short), plan.padded),
    )
    one_a_core = Workers(
        size,
        root,
        {processes: plan.theirs, bare: plan.ours, BARE_JOB: plan.shard_rows * plan.shards},
        cores,
    )
    sides = [(threads, default), *((threads, side) for side in tuned), (one_a_core, processes)]
    sides += [(threads, side) for side in dict.fromkeys((padded, short))] + [(one_a_core, bare)]
    speeds: dict[tuple[Workers, str], list[float]] = {side: [] for side in sides}
    try:
        threads.wait()
        one_a_core.wait()
        # One after the other, then again, so that each has its share of the machine's quick minutes.
        for _ in range(trials):
            for workers, side in sides:
                speeds[workers, side].append(workers.measure(side))
        rows: dict[tuple[Workers, str], dict[str, Any]] = {}
        for (workers, side), trials_of in speeds.items():
            row = {"size": size, "side": side, "processes": workers.processes}
            rows[workers, side] = row | {"chunks_per_second": max(trials_of), "trials": trials_of}
            _say(rows[workers, side])
        theirs_vectors, our_vectors = threads.vectors(default), one_a_core.vectors(bare)
        bare_job, ray = measure_ray(size, root, plan, one_a_core)
    finally:
        threads.close()
        one_a_core.close()
    best = max((row for row in rows.values() if row["side"].startswith(theirs)), key=_speed)
    ours, at_short = rows[one_a_core, bare], rows[threads, short]

    def ratio(row: dict[str, Any]) -> float:
        return round(_speed(ours) / _speed(row), 3)

    def cosine(vectors: np.ndarray) -> float:
        # Theirs are float32 by another library's code.
        return round(float(np.einsum("nd,nd->n", vectors, theirs_vectors).min()), 6)

    summary: dict[str, Any] = {
        "vs_sentence_transformers_default": ratio(rows[threads, default]),
        "vs_sentence_transformers_best": ratio(best),
        "vs_vec2text": ratio(rows[threads, padded]),
        "ray_overhead": round(_speed(bare_job) / _speed(ray), 3),
        "ray_overhead_to_encode_alone": ratio(ray),
        "chunks_per_second": round(_speed(ours), 1),
        "ray_chunks_per_second": round(_speed(ray), 1),
        "best_setting": f"{best['side']} x{best['processes']}",
        "min_cosine_to_float32": cosine(our_vectors),
        "min_cosine_to_float32_stored": cosine(_stored(root / "vectors")),
    }
    if short != padded or size == "mini":
        summary["vs_vec2text_padded_to_32"] = ratio(at_short)
    for name in ("min_cosine_to_float32", "min_cosine_to_float32_stored"):
        if summary[name] < 0.9995:
            raise RuntimeError(f"{size}: {name} is {summary[name]}, expected 0.9995; the speeds mean nothing")
    return summary, [*rows.values(), bare_job, ray]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line a measurement."""
    lines = ["| size | side | processes | chunks/s | trials |", "| --- | --- | ---: | ---: | --- |"]
    for r in rows:
        trials = ", ".join(f"{t:.1f}" for t in r.get("trials", []))
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
    args = parser.parse_args()
    if args.child:
        part, parts = map(int, args.part.split("/"))
        child(args.size, args.root, json.loads(args.child), part, parts)
        return

    begun = time.perf_counter()
    plans = QUICK if args.quick else FULL
    sizes = [args.size] if args.size else ["mini", "gtr-base"]
    texts = chunk_texts(max(plans[s].ours for s in sizes))
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
            # One made-up article a shard: ids do not matter here, lengths and their order do. The texts come round.
            step, given = plan.shard_rows, plan.ours // plan.shard_rows
            shards = [texts[i * step : (i + 1) * step] for i in (n % given for n in range(plan.shards))]
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
