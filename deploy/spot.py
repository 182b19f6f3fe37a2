"""Drains this node of a Ray cluster when its cloud announces that it takes it back: `python spot.py aws|gcp|azure`.

A drained node gets no new work, and what dies on it died of preemption: Ray Train counts that apart from a run's
failures and starts the run again elsewhere, and tasks' and actors' retries are not used up. Run on every node by
latent-spot.service; on one that is not reclaimable nothing is ever announced. Standard library only.
"""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

POLL_S = 5.0
"""How often the cloud is asked: AWS says it two minutes before, Google and Azure thirty seconds."""

NOTICE_S = {"aws": 120, "gcp": 30, "azure": 30}
"""Seconds from the announcement to the end, by cloud."""


def get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """The body of an answer of the cloud's metadata service; "" where it has none."""
    try:
        request = urllib.request.Request(url, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=5) as reply:
            return str(reply.read().decode())
    except OSError:  # 404 where nothing is announced; no network for a moment
        return ""


def aws(server: str = "http://169.254.169.254") -> bool:
    """True when EC2 has announced an interruption. (EC2 user guide, "Spot Instance interruption notices", IMDSv2.)"""
    token = get(f"{server}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    return bool(get(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))


def gcp(server: str = "http://169.254.169.254") -> bool:
    """True when Compute Engine preempts this machine."""
    url = f"{server}/computeMetadata/v1/instance/preempted"
    return get(url, {"Metadata-Flavor": "Google"}).strip() == "TRUE"


def azure(server: str = "http://169.254.169.254") -> bool:
    """True when a scheduled event of Azure is the eviction of a spot machine."""
    text = get(f"{server}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    try:
        return any(event["EventType"] == "Preempt" for event in json.loads(text or "{}").get("Events", []))
    except ValueError:
        return False


CLOUDS: dict[str, Callable[..., bool]] = {"aws": aws, "gcp": gcp, "azure": azure}


def drain(seconds: int, address: str = "auto", node: str | None = None) -> int:
    """Tell Ray that a node, this one by default, ends in so many seconds; the exit code of `ray drain-node`."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address]
    command += [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "the cloud takes the node back",
    ]
    command += [] if node is None else ["--node-id", node]
    return subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=False).returncode


def main(cloud: str) -> None:
    while not CLOUDS[cloud]():
        time.sleep(POLL_S)
    begun = time.monotonic()
    while (left := NOTICE_S[cloud] - int(time.monotonic() - begun)) > 0 and drain(left) != 0:
        time.sleep(1)
    time.sleep(max(0, left) + 60)  # announced once is enough


if __name__ == "__main__":
    main(sys.argv[1])
