"""deploy/spot.py: each cloud's announcement, from a real HTTP server that answers as its metadata service does."""

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("spot", CHECKOUT / "deploy" / "spot.py")
assert _spec is not None
assert _spec.loader is not None
spot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(spot)

TOKEN = "a-token-of-the-second-version"


class Metadata(BaseHTTPRequestHandler):
    """The three services, each strict about the header that it asks for."""

    announced = False

    def do_PUT(self) -> None:
        ok = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "60"
        self.answer(TOKEN if ok else None)

    def do_GET(self) -> None:
        announced = type(self).announced
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == TOKEN
            notice = {"action": "terminate", "time": "2026-11-28T12:00:00Z"}
            self.answer(json.dumps(notice) if announced else None)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer("TRUE" if announced else "FALSE")
        elif self.path == "/metadata/scheduledevents?api-version=2020-07-01":
            assert self.headers["Metadata"] == "true"
            events = [{"EventType": "Reboot"}] + [{"EventType": "Preempt"}] * announced
            self.answer(json.dumps({"DocumentIncarnation": 1, "Events": events}))
        else:
            self.answer(None)

    def answer(self, body: str | None) -> None:
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
    Metadata.announced = False


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_an_announcement_is_heard_and_nothing_else_is_one(cloud: str, server: str) -> None:
    assert not spot.CLOUDS[cloud](server)
    Metadata.announced = True
    assert spot.CLOUDS[cloud](server)


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_without_an_answer_nothing_is_announced(cloud: str) -> None:
    assert not spot.CLOUDS[cloud]("http://127.0.0.1:9")


def test_the_command_is_one_that_ray_has() -> None:
    """Ray hides `drain-node` from its help; its options are those of the installed version."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.scripts.scripts import drain_node

    options = {o for parameter in drain_node.params for o in parameter.opts}
    source = (CHECKOUT / "deploy" / "spot.py").read_text()
    used = set(re.findall(r'"(--[a-z-]+)"', source))
    assert used == {"--address", "--reason", "--reason-message", "--deadline-remaining-seconds", "--node-id"}
    assert used <= options
    assert "DRAIN_NODE_REASON_PREEMPTION" in [name for name, _ in DrainNodeReason.items()]


def test_a_reclaimed_node_does_not_use_up_a_runs_restarts() -> None:
    """Ray Train's own policy, with the settings of jobs/train.py: as many reclaimed nodes as there are."""
    from ray.exceptions import ActorDiedError
    from ray.train import FailureConfig, WorkerGroupError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy

    from jobs.train import RESTARTS, STARTS

    policy = create_failure_policy(FailureConfig(max_failures=RESTARTS, controller_failure_limit=STARTS))
    reclaimed = ActorDiedError()
    reclaimed._preempted = True
    assert reclaimed.preempted
    for _ in range(3 * RESTARTS):
        decided = policy.make_decision(training_failed_error=WorkerGroupError("gone", {0: reclaimed}))
        assert decided == FailureDecision.RETRY
    for _ in range(RESTARTS):
        decided = policy.make_decision(training_failed_error=WorkerGroupError("broken", {0: ValueError()}))
        assert decided == FailureDecision.RETRY
    decided = policy.make_decision(training_failed_error=WorkerGroupError("broken", {0: ValueError()}))
    assert decided == FailureDecision.RAISE
