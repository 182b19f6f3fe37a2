"""`serve deploy` of the shipped configuration on a cluster of two nodes, again with a new model, and a node killed.

Set LATENT_RESULTS to a folder to keep what was measured, as JSON.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.front import FrontArgs, environment
from tests.integration.serving import CHECKOUT, Service, add_model, free_port, make_run
from tests.integration.test_serve_faults import CLIENTS, keep, load, wait_for

pytestmark = pytest.mark.slow

KEY = "the-key-of-the-cluster-test"
TWICE = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.1}


@contextlib.contextmanager
def two_nodes(keys: Path) -> Iterator[tuple[Any, Any, int]]:
    """A local cluster, its worker node, and the port of its dashboard, where `serve deploy` sends to. keys: of its
    proxies, a file that is read when they start."""
    from ray.cluster_utils import Cluster

    port = free_port()
    # What workers inherit: Ray's niceness for batches would let whatever else runs here starve the replicas.
    before = dict(os.environ)
    os.environ.update(RAY_worker_niceness="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", OMP_NUM_THREADS="1")
    os.environ.update(environment(FrontArgs(api_keys_file=str(keys))), PYTHONPATH=str(CHECKOUT))
    cluster = Cluster()
    try:
        memory = {"object_store_memory": 100 * 2**20}
        head = {"include_dashboard": True, "dashboard_port": port, "resources": {"edge": 1.0}}
        cluster.add_node(num_cpus=2, **head, **memory)
        worker = cluster.add_node(num_cpus=2, **memory)
        yield cluster, worker, port
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def write_config(folder: Path, run: Path, port: int, release: str) -> Path:
    """serve/config.yaml with this machine's paths and sizes: two replicas of what may die, the gateway kept on the
    head, since the requests of a dead gateway cannot be sent again by Ray Serve's proxy."""
    (folder / "keys").write_text(KEY + "\n")
    config = yaml.safe_load((CHECKOUT / "serve" / "config.yaml").read_text())
    config["proxy_location"] = "HeadOnly"
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"]["PYTHONPATH"] = str(CHECKOUT)
    application["args"] |= {
        "run": str(run),
        "release": release,
        "api_keys_file": str(folder / "keys"),
        "inline": ["predictor"],
        "gateway": {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.1, "resources": {"edge": 0.1}},
        "encoder": TWICE,
        "retriever": TWICE,
        "decoder": TWICE,
        "breaker": {"max_refused_share": 1},  # untrained models: any text may be refused
    }
    application["deployments"] = []  # the release is that of the arguments
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def deploy(config: Path, dashboard: int) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.serve.scripts", "deploy", str(config)),
            *("--address", f"http://127.0.0.1:{dashboard}"),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )


def test_deployed_by_config_neither_a_new_release_nor_a_killed_node_costs_a_request(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_articles=12, models=("lstm",))
    port = free_port()
    with two_nodes(tmp_path / "keys") as (cluster, worker, dashboard):
        deploy(write_config(tmp_path, run, port, release="first"), dashboard)
        service = Service(port, headers={"Authorization": f"Bearer {KEY}"})
        deployed = time.perf_counter()

        def replicas() -> dict[str, int]:
            with contextlib.suppress(OSError, KeyError, ValueError):
                return dict(service.get("/health").json["replicas"])
            return {}

        both = {"Gateway": 1, "Encoder": 2, "Retriever": 2, "Decoder": 2}
        wait_for("two replicas of each", lambda: replicas() == both, 200)
        ready_s = time.perf_counter() - deployed
        assert service.ask("GET", "/v1/models", Authorization="Bearer wrong").status == 401

        def folder() -> str:
            return str(
                service.post("/v1/generate", {"text": "Steam.", "cache": False}).json["model"]["folder"]
            )

        with load(service) as under:
            wait_for("answers before the kill", lambda: len(under.answers) > 2 * CLIENTS, 90)
            before = under.median_s(0)
            record = add_model(run, "lstm").name
            assert folder() != record
            deploy(write_config(tmp_path, run, port, release="second"), dashboard)
            release_s = wait_for("the new model answers", lambda: folder() == record, 120)
            wait_for("two replicas of each, of the new release", lambda: replicas() == both, 60)
            cluster.remove_node(worker, allow_graceful=False)
            killed = time.perf_counter()
            wait_for("the loss is seen", lambda: replicas() not in (both, {}), 60)
            wait_for("two of each on what is left", lambda: replicas() == both, 120)
            settled = time.perf_counter()
            back_s = settled - killed
            wait_for("answers after it", lambda: under.statuses(settled)[200] > CLIENTS, 60)
        slowest = max(s for begun, s, _, _ in under.answers if begun >= killed - 5)
        keep(
            "kill_node",
            {
                "statuses": under.statuses(),
                "ready_s": ready_s,
                "release_s": release_s,
                "back_s": back_s,
                "before_s": before,
                "after_s": under.median_s(settled),
                "slowest_s": slowest,
            },
        )
        assert set(under.statuses()) == {200}, [a for a in under.answers if a[2] != 200][:2]
