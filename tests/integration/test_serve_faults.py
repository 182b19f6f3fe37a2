"""The service while its parts die, hang, are replaced and multiply, under clients that go on sending.

Set LATENT_RESULTS to a folder to keep what was measured, as JSON.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.serving import Service, add_model, make_run, running

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CLIENTS = 16
WORDS = [
    "steam",
    "engine",
    "water",
    "mine",
    "coal",
    "pump",
    "wheel",
    "iron",
    "canal",
    "mill",
    "valve",
    "boiler",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("faults") / "run", num_articles=12, models=("lstm",))


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[Service]:
    settings = [
        "inline=",  # each part a deployment of its own, as on a cluster
        "breaker.max_refused_share=1",  # untrained models: any text may be refused
        "breaker.open_s=1",
        "decode_patience_s=3",
        "decoder.max_replicas=3",
        "decoder.target_ongoing_requests=1",
        "decoder.upscale_delay_s=1",
        "decoder.downscale_delay_s=3",
    ]
    with running(run, *(f"--set={s}" for s in settings)) as service:
        yield service


@dataclass
class Load:
    """Clients that send until told to stop."""

    service: Service
    more: dict[str, Any]
    """Fields of each request beside its chunks."""
    answers: list[tuple[float, float, int, Any]] = field(default_factory=list)
    """When each began, what it took (seconds), its status (0: no answer, or a 503 that does not say when to come back),
    and its body."""
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self, number: int) -> None:
        random = np.random.default_rng(number)
        while not self.stop.is_set():
            chunks = [" ".join(random.choice(WORDS, 8)) for _ in range(5)]
            begun = time.perf_counter()
            try:
                body = {"chunks": chunks, "cache": False, "deadline_s": 90, **self.more}
                reply = self.service.post("/v1/generate", body, timeout_s=100)
                status, said = reply.status, reply.body
                if status == 503 and "retry-after" not in reply.headers:
                    status = 0
            except OSError as err:
                status, said = 0, repr(err).encode()
            self.answers.append((begun, time.perf_counter() - begun, status, said))

    def statuses(self, since: float = 0.0) -> Counter[int]:
        return Counter(status for begun, _, status, _ in self.answers if begun >= since)

    def latest_s(self) -> float:
        """Median of the latest answers, two of each client."""
        return float(np.median([s for _, s, _, _ in self.answers[-2 * CLIENTS :]]))

    def median_s(self, since: float, until: float = float("inf")) -> float:
        return float(
            np.median([s for begun, s, status, _ in self.answers if since <= begun < until and status == 200])
        )


@contextlib.contextmanager
def load(service: Service, clients: int = CLIENTS, **more: Any) -> Iterator[Load]:
    """Clients at work. Without `more` they ask for first texts alone: every stage takes part, and the machine has a
    share left for what is being restarted."""
    made = Load(service, more or {"steps": 0})
    threads = [threading.Thread(target=made.client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.stop.set()
        for thread in threads:
            thread.join(100)


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until the condition held; fails the test when it never did."""
    begun = time.perf_counter()
    while not condition():
        assert time.perf_counter() - begun < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return time.perf_counter() - begun


def keep(name: str, record: Any) -> None:
    if folder := os.environ.get("LATENT_RESULTS"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(record, indent=1))


def test_a_killed_replica_of_each_kind_costs_no_request(service: Service) -> None:
    back: dict[str, float] = {}
    with load(service) as under:
        wait_for("answers before the kills", lambda: len(under.answers) > 2 * CLIENTS, 60)
        before = under.median_s(0)
        first = time.perf_counter()
        victims = {}
        for kind in ("Encoder", "Predictor", "Retriever", "Decoder"):
            victims[kind] = (service.replica_pids(kind)[0], time.perf_counter())
            os.kill(victims[kind][0], signal.SIGKILL)
            time.sleep(0.5)  # so that requests are met in each stage

        def all_back() -> bool:
            running = service.get("/health").json["replicas"]
            for kind, (pid, killed) in victims.items():
                pids = service.replica_pids(kind)
                if kind not in back and pids and pid not in pids and running[kind] >= 1:
                    back[kind] = round(time.perf_counter() - killed, 1)
            return len(back) == len(victims)

        wait_for("new replicas", all_back, 90)
        settled_s = wait_for("latency as before", lambda: under.latest_s() < 2 * before + 0.5, 30)
    slowest = max(s for begun, s, _, _ in under.answers if begun >= first - 1)
    keep(
        "kill_each",
        {
            "statuses": under.statuses(),
            "back_s": back,
            "before_s": before,
            "as_before_after_s": settled_s,
            "slowest_s": slowest,
        },
    )
    assert set(under.statuses()) == {200}, [a for a in under.answers if a[2] != 200][:2]


def test_a_killed_gateway_costs_what_it_held_and_that_is_told_when_to_come_back(service: Service) -> None:
    with load(service) as under:
        wait_for("answers before the kill", lambda: len(under.answers) > CLIENTS, 60)
        (victim,) = service.replica_pids("Gateway")
        killed = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        wait_for("answers of a new gateway", lambda: under.statuses(killed + 1)[200] > CLIENTS, 60)
    slowest = max(s for begun, s, _, _ in under.answers if begun >= killed - 2)
    keep("kill_gateway", {"statuses": under.statuses(), "slowest_s": slowest})
    # Ray Serve's proxy does not send again what the dead gateway held: one request of each client at most.
    lost = [a for a in under.answers if a[2] != 200]
    assert {a[2] for a in lost} <= {503}, lost[:2]
    assert len(lost) <= CLIENTS, lost[:2]
    assert all("send it again" in json.loads(a[3])["error"]["message"] for a in lost), lost[:2]


def test_a_decoder_that_hangs_leaves_answers_of_the_corpus_that_say_so(service: Service) -> None:
    wait_for("a decoder", lambda: bool(service.replica_pids("Decoder")), 60)
    stopped: set[int] = set()

    def opens() -> bool:
        """Whether the breaker is open, with every decoder stopped: those too that autoscaling starts in their stead."""
        for pid in set(service.replica_pids("Decoder")) - stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.add(pid)
        return bool(service.get("/health").json["breaker"]["open"])

    with load(service, 8) as under:
        wait_for("answers before", lambda: len(under.answers) > 16, 60)
        begun = time.perf_counter()
        try:
            wait_for("the breaker opens", opens, 30)
            opened = time.perf_counter()
            health = service.get("/health").json
            wait_for("answers while it is open", lambda: under.statuses(opened)[200] > 40, 30)
            quick = under.median_s(opened, time.perf_counter())
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        wait_for("the breaker closes", lambda: not service.get("/health").json["breaker"]["open"], 30)
    assert set(under.statuses()) == {200}
    assert health["status"] == "degraded"
    assert any("breaker open" in reason for reason in health["reasons"])
    assert quick < 2.0  # and not the three seconds each waited before it opened
    steps = [
        json.loads(body)["results"][0]["generated"][0] for at, _, _, body in under.answers if at >= begun
    ]
    said = [s for s in steps if s["emergency"]]
    assert said
    assert all(s["source"] == "corpus" and s["text"] for s in said)
    keep(
        "hang_decoder",
        {"median_open_s": quick, "opened_after_s": opened - begun, "from_the_corpus": len(said)},
    )


def test_a_new_model_version_rolls_out_without_a_failed_request(service: Service, run: Path) -> None:
    before = service.post("/v1/generate", {"text": "Steam."}).json["model"]["folder"]
    time.sleep(1.1)  # a record's name has its second
    record = add_model(run, "lstm")

    def folder() -> str:
        return service.post("/v1/generate", {"text": "Steam.", "cache": False}).json["model"]["folder"]

    with load(service, 4) as under:
        wait_for("answers before", lambda: len(under.answers) > 4, 60)
        os.kill(service.launcher, signal.SIGUSR1)
        took = wait_for("the new version answers", lambda: folder() == record.name, 180)
    keep("rollout", {"statuses": under.statuses(), "seconds": took})
    assert before != record.name
    assert set(under.statuses()) == {200}, [a for a in under.answers if a[2] != 200][:2]


def test_decoder_replicas_go_up_with_load_and_down_again(service: Service) -> None:
    timeline: list[tuple[float, int]] = []
    begun = time.perf_counter()

    def replicas() -> int:
        count = int(service.get("/health").json["replicas"]["Decoder"])
        if not timeline or timeline[-1][1] != count:
            timeline.append((round(time.perf_counter() - begun, 1), count))
        return count

    wait_for("one replica at rest", lambda: replicas() == 1, 60)
    # Sixteen texts to write take longer than the patience set here: the breaker would keep the load from the decoder.
    with load(service, steps=3) as under:
        wait_for("more replicas under load", lambda: replicas() >= 2, 60)
    wait_for("one replica again", lambda: replicas() == 1, 60)
    keep("autoscaling", {"seconds_and_replicas": timeline, "statuses": under.statuses()})
    assert set(under.statuses()) == {200}
    assert max(count for _, count in timeline) >= 2
    assert timeline[-1][1] == 1
