"""Does a backfill on an autoscaling cluster get more nodes while there is work, and give them back after?

A cluster on this machine with a head without CPUs and up to three worker nodes of one CPU, which Ray's own autoscaler
starts and ends; the nodes are processes (provider `fake_multinode`). It is what `ray.cluster_utils.AutoscalingCluster`
starts, without that class: its example.yaml is not in Ray's wheel, and its start runs `ray stop --force`, which ends
every other Ray on the machine. Before, one node is
there; the job is `jobs.encode` with a codec that takes a fixed time over a shard (the machine has fewer cores than the
cluster), then nothing. A line a second: seconds, live worker nodes, shards on disk.

    python -m tests.bench.encode_autoscaling

The last line of stdout is one JSON object.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from tests.doubles import FakeCodec, fake_articles, write_chunks

SECONDS_A_SHARD = 3.0
NUM_SHARDS = 30
CHECKOUT = Path(__file__).parents[2]


class WaitingCodec(FakeCodec):
    """The arithmetic codec, asleep while another machine would multiply."""

    def encode_chunks(self, texts: Any) -> Any:
        if len(texts) > 1:
            time.sleep(SECONDS_A_SHARD)
        return super().encode_chunks(texts)


def waiting_codec() -> WaitingCodec:
    """A codec loader for the job's workers."""
    return WaitingCodec()


class GrowingCluster:
    """A head and its autoscaler in processes of their own; `close` ends those and what they started."""

    def __init__(self) -> None:
        from ray.util import get_node_ip_address

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.address = f"{get_node_ip_address()}:{port}"
        worker = {"resources": {"CPU": 1, "object_store_memory": 100 << 20}, "node_config": {}}
        config = {
            "cluster_name": "growing",
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                # All nodes have one address; without this the autoscaler never learns that one is idle.
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {**worker, "min_workers": 1, "max_workers": 3},
            },
            "max_workers": 3,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 0.2,
            # Nothing is copied to or run on a node that is a process here, but Ray's autoscaler wants the fields.
            "auth": {"ssh_user": "nobody"},
            **{key: {} for key in ("file_mounts", "docker")},
            **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            **{f"{when}_commands": [] for when in ("initialization", "setup", "head_setup", "worker_setup")},
            **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
            "file_mounts_sync_continuously": False,
        }
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name, "growing.json")
        file.write_text(json.dumps(config))
        command = ["ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
        command += ["--include-dashboard=false", f"--autoscaling-config={file}"]
        ray = Path(sys.executable).with_name("ray")
        self._process = subprocess.Popen(
            [str(ray), *command[1:]],
            env={**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"},
            stdout=sys.stderr,
            stderr=sys.stderr,
        )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(self.address.split(":"), 1):  # type: ignore[arg-type]
                time.sleep(
                    60 if os.getloadavg()[0] > 8 else 15
                )  # the port opens before the head's own node is there
                return
            time.sleep(0.5)
        self.close()
        raise RuntimeError(f"no Ray head at {self.address} after a minute")

    def close(self) -> None:
        """End the head, its autoscaler and the nodes that one started."""
        started = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._folder.cleanup()


def main() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Head, nodes and this driver share one token, read when Ray is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    from jobs.encode import encode_chunks

    cluster = GrowingCluster()
    timeline: list[tuple[float, int, int]] = []
    try:
        ray.init(
            cluster.address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}},
        )
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_chunks(folder / "chunks", fake_articles(NUM_SHARDS, 4), 1)

            def look() -> int:
                nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
                shards = len(list((folder / "vectors").glob("part-*.parquet")))
                timeline.append((round(time.monotonic() - begun, 1), len(nodes), shards))
                print("{:7.1f} s  {} nodes  {} shards".format(*timeline[-1]), flush=True)
                return len(nodes)

            def wait_for(count: int, seconds: float) -> None:
                end = time.monotonic() + seconds
                while look() != count and time.monotonic() < end:
                    time.sleep(1)

            wait_for(1, 60)
            load = functools.partial(waiting_codec)
            done: list[Any] = []

            def work() -> None:
                done.append(encode_chunks(folder / "chunks", folder / "vectors", load))

            thread = threading.Thread(target=work)
            started = time.monotonic() - begun
            thread.start()
            while thread.is_alive():
                look()
                time.sleep(1)
            ended = time.monotonic() - begun
            wait_for(1, 120)
            rows = done[0].manifest.rows
    finally:
        ray.shutdown()
        cluster.close()
    nodes = [n for _, n, _ in timeline]
    print(
        json.dumps(
            {
                "nodes_before": nodes[0],
                "nodes_most": max(nodes),
                "nodes_after": nodes[-1],
                "job_from_s": round(started, 1),
                "job_to_s": round(ended, 1),
                "one_node_would_take_s": NUM_SHARDS * SECONDS_A_SHARD,
                "rows": rows,
                "timeline": timeline,
                "processor": platform.processor() or platform.machine(),
                "versions": {"ray": version("ray")},
            }
        )
    )


if __name__ == "__main__":
    from tests.bench.encode_autoscaling import main as bench

    bench()
