"""How much faster is the service than the same models called one request at a time, and how quickly does it answer?

    python -m tests.bench.serve_latency --quick
    python -m tests.bench.serve_latency --run out/demo --model lstm
    python -m tests.bench.serve_latency --quick --codec-path out/gtr

The comparison calls the same weights the way the original did: one request at a time, float32, first texts through
transformers' own T5 stack, cache and `generate`, then the same ladder with the same corrector steps. With
`--codec-path`, of weights in GTR's layout, it is vec2text itself, and both sides take `--steps` corrector steps and do
not climb; where the folder is not there, seeded weights of `--size` are made in it. The service
is `latent serve` with its defaults but for the caches, which each request turns off, and the breaker, which would
answer without decoding. The load comes from this process, on the same machine: what it costs is part of the
result. Contexts are held-out windows of the run, no two alike.

A table on stderr; the last stdout line is one JSON object.
"""

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lvm.codec.zoo import Codec, load_codec
from lvm.predict.predictor import load_predictor
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import split_articles
from tests.bench.decode_batch import SIZES, sample_texts
from tests.bench.serve_comparison import mini_comparison, one_at_a_time, vec2text_comparison
from tests.checkpoints import make_checkpoints
from tests.integration.serving import Service, make_run, running

CLIENTS = 32


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- the load


class Client:
    """One kept-alive connection; bare, so that the load takes little of the machine it measures."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._service.port, limit=1 << 24)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(headers.split(" ", 2)[1])
        length = int(headers.split("content-length: ", 1)[1].split("\r\n", 1)[0])
        return status, await reader.readexactly(length)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def request(texts: list[str], model: str, cache: bool = False, steps: int | None = None) -> bytes:
    return json.dumps({"chunks": texts, "model": model, "cache": cache, "steps": steps}).encode()


async def closed_loop(service: Service, bodies: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """CLIENTS clients, each sending its next request when it has an answer."""
    place = 0
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    stages: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal place
        connection = Client(service)
        while time.perf_counter() < end:
            body = bodies[place % len(bodies)]
            place += 1
            begun = time.perf_counter()
            status, reply = await connection.post("/v1/generate", body)
            taken.append(time.perf_counter() - begun)
            statuses[status] += 1
            if status == 200:
                step = json.loads(reply)["results"][0]["generated"][0]
                sources[step["source"]] += 1
                for stage, ms in step["milliseconds"].items():
                    stages.setdefault(stage, []).append(ms)
        connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    wall = time.perf_counter() - begun
    return {
        "requests_per_s": statuses[200] / wall,
        "p50_s": float(np.quantile(taken, 0.5)),
        "p95_s": float(np.quantile(taken, 0.95)),
        "statuses": dict(statuses),
        "sources": dict(sources),
        "median_ms": {stage: round(float(np.median(v)), 2) for stage, v in stages.items()},
    }


async def steady(service: Service, bodies: Sequence[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Requests at fixed times, whatever the answers do; a latency counts from when its request was due."""
    idle: list[Client] = []
    taken: list[float] = []
    statuses: Counter[int] = Counter()

    async def one(body: bytes, due: float) -> None:
        client = idle.pop() if idle else Client(service)
        status, _ = await client.post("/v1/generate", body)
        taken.append(time.perf_counter() - due)
        statuses[status] += 1
        idle.append(client)

    tasks = []
    begun = time.perf_counter()
    for number in range(int(rate * seconds)):
        due = begun + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(bodies[number % len(bodies)], due)))
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    p50, p95, p99 = (float(np.quantile(taken, q)) for q in (0.5, 0.95, 0.99))
    return {"rate": rate, "p50_s": p50, "p95_s": p95, "p99_s": p99, "statuses": dict(statuses)}


async def repeated(
    service: Service, path: str, body: bytes, times: int, bodies: Sequence[bytes] = ()
) -> list[float]:
    """Milliseconds of the same request (or of `bodies` in turn), one after another on one connection."""
    client = Client(service)
    taken = []
    for number in range(times + 5):
        begun = time.perf_counter()
        status, reply = await client.post(path, bodies[number % len(bodies)] if bodies else body)
        taken.append(1000 * (time.perf_counter() - begun))
        assert status == 200, reply
    client.close()
    return taken[5:]


async def sources_of(service: Service, bodies: Sequence[bytes]) -> dict[str, float]:
    """Shares of the sources that answered these requests, CLIENTS at a time."""
    sources: Counter[str] = Counter()
    waiting = list(bodies)

    async def client() -> None:
        connection = Client(service)
        while waiting:
            status, reply = await connection.post("/v1/generate", waiting.pop())
            assert status == 200, reply
            sources[json.loads(reply)["results"][0]["generated"][0]["source"]] += 1
        connection.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return {source: round(count / len(bodies), 4) for source, count in sorted(sources.items())}


async def predict_overheads(
    service: Service,
    run: Path,
    codec: Codec,
    models: Sequence[str],
    contexts: Sequence[list[str]],
    times: int,
) -> dict[str, dict[str, float]]:
    """p50 of /v1/predict at batch 1 and of the bare model call, milliseconds, by model.

    The bare call again and again finds its weights in the processor's cache; `bare_idle_ms` is the same call 5 ms after
    the last one, which is what any service's model call meets.
    """
    import base64

    import torch

    torch.set_num_threads(1)  # as in a replica
    vectors = codec.encode_chunks(contexts[0]).vectors
    packed = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
    found = {}
    for model in models:
        predict = load_predictor(model, run / "models")
        for _ in range(5):
            predict(vectors[None])
        rows: dict[str, float] = {}
        for name, idle_s in (("bare_ms", 0.0), ("bare_idle_ms", 0.005)):
            bare = []
            for _ in range(times):
                time.sleep(idle_s)
                begun = time.perf_counter()
                predict(vectors[None])
                bare.append(1000 * (time.perf_counter() - begun))
            rows[name] = float(np.median(bare))
        for form, given in (("base64", packed), ("float", vectors.tolist())):
            body = json.dumps({"vectors": given, "model": model, "encoding_format": form}).encode()
            rows[f"{form}_ms"] = float(np.median(await repeated(service, "/v1/predict", body, times)))
        rows["overhead_ms"] = rows["base64_ms"] - rows["bare_ms"]
        rows["overhead_idle_ms"] = rows["base64_ms"] - rows["bare_idle_ms"]
        found[model] = {k: round(v, 2) for k, v in rows.items()}
    return found


def held_out(run: Path, count: int) -> list[list[str]]:
    """Windows of five chunks from the test articles, which no model trained on, no two alike; from all of them where
    those are too few."""
    array = open_vectors(run / "vectors")
    starts = np.flatnonzero(array.doc_ids[4:] == array.doc_ids[:-4])
    random = np.random.default_rng(0)
    test = starts[np.isin(array.doc_ids[starts], split_articles(np.unique(array.doc_ids))["test"])]
    chosen = random.permutation(test)
    if len(chosen) < count:
        chosen = np.concatenate([chosen, random.permutation(np.setdiff1d(starts, test))])
    return [array.texts(list(range(s, s + 5))) for s in chosen[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=None, help="folder of latent run; none makes a small one")
    parser.add_argument("--model", default="lstm")
    parser.add_argument("--codec-path", type=Path, help="weights in GTR's layout, read as gtr-jxe")
    parser.add_argument(
        "--size", choices=list(SIZES), default="small", help="of seeded weights in --codec-path"
    )
    parser.add_argument(
        "--steps", type=int, default=1, help="corrector steps of both sides with --codec-path"
    )
    parser.add_argument("--quick", action="store_true", help="shorter trials; ends within five minutes")
    parser.add_argument("--set", action="append", default=[], help="more settings of the service")
    options = parser.parse_args()
    seconds, trials = (8.0, 2) if options.quick else (20.0, 5)
    with ExitStack() as stack:
        root, steps = options.codec_path, None
        if root is not None:
            steps = options.steps
            if not root.exists():
                say(
                    f"no folder {root}: making seeded weights of size {options.size} in it; texts mean nothing"
                )
                make_checkpoints(root, sample_texts(), SIZES[options.size])
        codec = load_codec("mini") if root is None else load_codec("gtr-jxe", root)
        run = options.run
        if run is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            run = make_run(folder / "run", 60, ("amn", "lstm", "gru", "transformer"), codec)
            say("no --run: untrained models on the bundled sample; sources mean nothing")
        contexts = held_out(run, 4000)
        models = [m for m in json.loads((run / "models" / "aliases.json").read_text()) if m != "best"]
        side = (
            mini_comparison(run, options.model)
            if root is None
            else vec2text_comparison(run, options.model, root, options.steps)
        )
        baselines = [one_at_a_time(side, contexts, seconds) for _ in range(trials)]
        del side
        base = float(np.median([b["requests_per_s"] for b in baselines]))
        first = baselines[0]
        say(
            f"one at a time   {base:8.2f} requests/s  {first['median_ms']:.0f} ms  same texts {first['same_texts']}"
        )
        settings = [f"--set={s}" for s in ("breaker.enabled=false", *options.set)]
        if root is not None:
            settings.append(f"--codec-path={root}")
        service = stack.enter_context(running(run, *settings))
        bodies = [request(c, options.model, steps=steps) for c in contexts]
        asyncio.run(closed_loop(service, bodies, 5))  # warm-up, dropped
        closed = [
            asyncio.run(closed_loop(service, bodies[200 * i :] + bodies[: 200 * i], seconds))
            for i in range(trials)
        ]
        rate = float(np.median([c["requests_per_s"] for c in closed]))
        for c in closed:
            say(
                f"{CLIENTS} clients      {c['requests_per_s']:8.2f} requests/s  p50 {c['p50_s']:.3f} s  "
                f"p95 {c['p95_s']:.3f} s  {c['statuses']}  {c['sources']}  {c['median_ms']}"
            )
        half = asyncio.run(steady(service, bodies, rate / 2, 2 * seconds))
        say(
            f"steady {half['rate']:.1f}/s    p50 {half['p50_s']:.3f} s  p95 {half['p95_s']:.3f} s  {half['statuses']}"
        )
        times = 50 if options.quick else 200
        hit = asyncio.run(
            repeated(service, "/v1/generate", request(contexts[0], options.model, True, steps), times)
        )
        alone = asyncio.run(repeated(service, "/v1/generate", b"", times, bodies))
        say(f"cache hit       {np.median(hit):8.2f} ms   alone, cache off {np.median(alone):.1f} ms")
        predicts = asyncio.run(predict_overheads(service, run, codec, models, contexts, times))
        for name, row in predicts.items():
            say(f"predict {name:12s} {row}")
        count = 64 if options.quick else 400
        sources = {}
        for model in (*models, "passthrough"):
            asked = [request(c, model, steps=steps) for c in contexts[:count]]
            sources[model] = asyncio.run(sources_of(service, asked))
            say(f"sources {model:14s} {sources[model]} of {count}")
    ratios = [c["requests_per_s"] / base for c in closed]
    print(
        json.dumps(
            {
                "throughput_ratio": round(rate / base, 2),
                "p95_s": round(half["p95_s"], 3),
                "cache_hit_ms": round(float(np.median(hit)), 2),
                "predict_overhead_ms": max(row["overhead_ms"] for row in predicts.values()),
                "requests_per_s": round(rate, 2),
                "one_at_a_time_per_s": round(base, 2),
                "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
                "same_texts": baselines[0]["same_texts"],
                "alone_ms": round(float(np.median(alone)), 1),
                "predict": predicts,
                "sources": sources,
                "failed": sum(n for c in (*closed, half) for s, n in c["statuses"].items() if s != 200),
                "clients": CLIENTS,
                "model": options.model,
                "codec": str(codec.identity),
                "steps": steps,
                "cpu": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
