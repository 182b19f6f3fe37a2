"""What the jobs do on a cluster of three nodes, one of them with a "GPU": where they run, and what is refused.

    python -m tests.integration.placement FOLDER

A process of its own, as it is the driver of its own cluster. Its last line of stdout is one JSON object.
"""

import functools
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import jobs._ray
from jobs.encode import encode_chunks
from jobs.evaluate import decode_all
from jobs.train import train_models
from lvm.errors import LvmError
from lvm.evaluate.texts import Block, TextPlan
from lvm.models import ORIGINAL
from lvm.predict.record import load_record
from lvm.predict.training import FAST
from lvm.vectors.array import open_vectors
from lvm.vectors.index import build_index
from tests.doubles import Encoded, FakeCodec, fake_articles, fake_codec, write_chunks, write_vectors
from tests.integration.faults.world import World
from tests.sampling import Sampler


def refusal(work: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """What a job said instead of doing its work, and after how many seconds."""
    begun = time.monotonic()
    try:
        work(*arguments, **options)
    except LvmError as err:
        return {"said": str(err), "seconds": round(time.monotonic() - begun, 1)}
    return {"said": "", "seconds": round(time.monotonic() - begun, 1)}


class Watch(Sampler):
    """The placement groups of Ray Train's runs while they live: on which node, how many at once."""

    interval_s = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, set[str]] = {}
        self.resources: dict[str, Any] = {}
        self.most_at_once = 0

    def sample(self) -> None:
        from ray.util import placement_group_table

        alive = {k: g for k, g in placement_group_table().items() if g["state"] == "CREATED"}
        self.most_at_once = max(self.most_at_once, len(alive))
        for key, group in alive.items():
            self.nodes.setdefault(key, set()).update(group["bundles_to_node_id"].values())
            self.resources[key] = group["bundles"][0]


class LoggedCodec(FakeCodec):
    """Takes as long for the tokens of a shard as for its product, and writes down when; the device does one product
    at a time."""

    log: Path
    device: threading.Lock

    def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        self._take("tokens")
        with self.device:
            self._take("product")
        return super().encode_chunks(texts)

    def _take(self, what: str) -> None:
        begun = time.monotonic()
        time.sleep(0.5)
        line = json.dumps([what, threading.get_ident(), begun, time.monotonic()]) + "\n"
        with self.log.open("a") as file:
            file.write(line)


def logged_codec(log: Path) -> LoggedCodec:
    codec = LoggedCodec()
    codec.log, codec.device = log, threading.Lock()
    return codec


def overlaps(log: Path) -> dict[str, int]:
    """How often a shard's tokens were made while another's product was, and how many products at once there were."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    pairs = [
        (a[0], b[0])
        for n, a in enumerate(lines)
        for b in lines[n + 1 :]
        if a[1] != b[1] and a[2] < b[3] and b[2] < a[3]
    ]
    return {
        "tokens and product": sum(set(p) == {"tokens", "product"} for p in pairs),
        "products": sum(p == ("product", "product") for p in pairs),
    }


def main() -> None:
    """As the module's docstring has it."""
    folder = Path(sys.argv[1])
    write_chunks(folder / "chunks", fake_articles(4), 2)
    write_vectors(folder / "data", fake_articles(40))
    write_chunks(folder / "more", fake_articles(40), 4)
    recipe = replace(FAST, epochs=1, patience=None)
    jobs._ray.START_TIMEOUT_S = 2
    world = World(num_workers=0)
    world.connect()
    report: dict[str, Any] = {}
    try:
        encode = (folder / "chunks", folder / "vectors", fake_codec)
        report["no_node"] = refusal(encode_chunks, *encode)
        nodes = [
            world.cluster.add_node(num_cpus=2, num_gpus=gpus, object_store_memory=100 << 20)
            for gpus in (1, 0, 0)
        ]
        report["gpu_node"] = nodes[0].node_id
        world.cluster.wait_for_nodes()
        train = (folder / "data", folder / "models", list(ORIGINAL), recipe)
        report["two_gpus"] = refusal(train_models, *train, gpus=2)
        report["encoded"] = encode_chunks(*encode, gpus=1).manifest.rows
        load = functools.partial(logged_codec, folder / "log")
        encode_chunks(folder / "more", folder / "overlapped", load, gpus=1, max_workers=1)
        report["overlaps"] = overlaps(folder / "log")
        both = [open_vectors(folder / name) for name in ("overlapped", "data")]
        report["same"] = [
            bool((getattr(both[0], name) == getattr(both[1], name)).all())
            for name in ("vectors", "chunk_ids", "norms", "num_tokens")
        ]
        with Watch() as watch:
            result = train_models(*train, gpus=1)
        report["failed"] = result.failed
        report["devices"] = {n: load_record(folder / "models", n).config["device"] for n in result.trained}
        report["placed"] = [sorted(found) for found in watch.nodes.values()]
        report["resources"] = list(watch.resources.values())
        report["most_at_once"] = watch.most_at_once
        array = open_vectors(folder / "data")
        build_index(array, folder / "index")
        vectors = array.vectors[:4].astype(np.float32)
        found = np.zeros(4, bool)
        block = Block(vectors, vectors, vectors, vectors[:, None], array.doc_ids[:4], found)
        plan = TextPlan((("copy-last", "raw"),), block)
        said = decode_all(array, plan, fake_codec, folder / "index", cpus=6, gpus=1, candidates=1)
        report["decoded"] = len(said)
    finally:
        world.close()
    print(json.dumps(report))


if __name__ == "__main__":
    # By its own name, so that workers import what they unpickle.
    from tests.integration.placement import main as report_placement

    report_placement()
