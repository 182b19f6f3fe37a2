"""A service on a cluster takes up another run by `user_config`: `serve deploy`, the same processes, no request lost."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from tests.integration.serving import Service, free_port, make_run
from tests.integration.test_serve_cluster import KEY, TWICE, deploy, two_nodes, write_config
from tests.integration.test_serve_faults import load, wait_for

pytestmark = pytest.mark.slow


def write_release(config: Path, run: Path, word: str) -> Path:
    record = yaml.safe_load(config.read_text())
    (application,) = record["applications"]
    application["args"] |= {
        "inline": [],
        "predictor": TWICE,
        "encoder": {"num_cpus": 0.1},
        "decoder": {"num_cpus": 0.1},
    }
    asked = {"run": str(run), "release": word}
    application["deployments"] = [
        {"name": name, "user_config": asked} for name in ("Gateway", "Predictor", "Retriever")
    ]
    config.write_text(yaml.safe_dump(record))
    return config


def replica_pids(dashboard: int) -> dict[str, set[int]]:
    details = ServeSubmissionClient(f"http://127.0.0.1:{dashboard}").get_serve_details()
    deployments = details["applications"]["latent"]["deployments"]
    return {name: {r["pid"] for r in d["replicas"]} for name, d in deployments.items()}


def log_of(pid: int) -> str:
    files = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists()}
    return "".join(Path(file).read_text() for file in files if "replica_latent_Gateway" in file)


def test_another_run_is_taken_up_by_the_same_replicas_and_a_bad_one_refused(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", num_articles=6, models=("lstm",))
    new = make_run(tmp_path / "new", num_articles=6, first=6, models=("lstm",))
    texts = {name: texts_of(run) for name, run in (("old", old), ("new", new))}
    assert not texts["old"] & texts["new"]
    port = free_port()
    with two_nodes(tmp_path / "keys") as (_, _, dashboard):
        config = write_config(tmp_path, old, port, release="")
        deploy(write_release(config, old, "first"), dashboard)
        service = Service(port, headers={"Authorization": f"Bearer {KEY}"})

        def health() -> dict[str, Any]:
            try:
                return dict(service.get("/health").json)
            except (OSError, ValueError):
                return {}

        each = {"Gateway": 1, "Encoder": 1, "Predictor": 2, "Retriever": 2, "Decoder": 1}
        wait_for("the replicas", lambda: health().get("replicas") == each, 200)
        assert health()["release"] == "first"
        pids = replica_pids(dashboard)

        with load(service, clients=4, steps=0, neighbours=1) as under:
            wait_for("answers of the first run", lambda: len(under.answers) > 8, 90)
            deploy(write_release(config, new, "second"), dashboard)
            wait_for("the second run answers", lambda: health()["release"] == "second", 120)
            switched = time.perf_counter()
            wait_for("answers of the second run", lambda: under.statuses(switched)[200] > 8, 90)

            deploy(write_release(config, tmp_path / "gone", "third"), dashboard)
            wait_for("the third is refused", lambda: "was rejected" in str(health()["reasons"]), 60)
            refused = time.perf_counter()
            wait_for("the second run still answers", lambda: under.statuses(refused)[200] > 8, 90)
            said = health()
            assert said["status"] == "degraded"
            assert said["release"] == "second"
            assert str(tmp_path) not in str(said)  # anybody may ask for health
            assert f"{tmp_path}/gone has no vectors/" in log_of(*pids["Gateway"])

            deploy(write_release(config, new, "fourth"), dashboard)
            wait_for("the reason is gone", lambda: health()["release"] == "fourth", 60)
            assert "was rejected" not in str(health()["reasons"])
        assert replica_pids(dashboard) == pids
        assert set(under.statuses()) == {200}, [a for a in under.answers if a[2] != 200][:2]
        # One run answered each request, from the predictor to the corpus, and after the second none of the first.
        seen: Counter[str] = Counter()
        for begun, _, _, body in under.answers:
            reply = json.loads(body)
            folder = reply["model"]["folder"]
            (name,) = [n for n, run in (("old", old), ("new", new)) if (run / "models" / folder).is_dir()]
            neighbours = [n for g in reply["results"][0]["generated"] for n in g["neighbours"]]
            assert neighbours
            assert {n["text"] for n in neighbours} <= texts[name]
            seen[name] += 1
            assert name == "new" or begun < switched
        assert set(seen) == {"old", "new"}


def texts_of(run: Path) -> set[str]:
    from lvm.vectors.array import open_vectors

    array = open_vectors(run / "vectors")
    return set(array.texts(range(len(array))))
