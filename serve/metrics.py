"""Prometheus metrics. Ray's agents export them, so every replica on every node is included.

Ray prefixes each name with `ray_` and adds the labels `application`, `deployment` and `replica`. Scrape Ray's
agents, or the service's `/metrics` for one node's; deploy/grafana/latent.json is a dashboard.
"""

from functools import cache

from ray.serve.metrics import Counter, Gauge, Histogram
from ray.util import metrics as plain

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.3, 2.5, 5.0, 10.0, 30.0]
"""Bounds of latency histograms; 1.0 and 1.3 are the targets of p50 and p95."""
ROWS = [1, 2, 4, 8, 16, 32, 64, 128]
COSINES = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]

REQUESTS = ("latent_http_requests_total", "Requests by route and status.", ("route", "status"))
REFUSED = ("latent_refused_total", "Requests refused at once, by reason.", ("reason",))


class FrontMetrics:
    """Metrics of requests that no gateway answered. A proxy is not a replica, so they lack a replica's labels."""

    def __init__(self) -> None:
        """Needs a connected Ray."""
        self._requests, self._refused = plain.Counter(*REQUESTS), plain.Counter(*REFUSED)

    def count(self, status: int, reason: str) -> None:
        """The `Count` of `Front`."""
        self._requests.inc(1, {"route": "none", "status": str(status)})
        self._refused.inc(1, {"reason": reason})


class GatewayMetrics:
    """Metrics of requests and answers. One instance per gateway replica."""

    def __init__(self) -> None:
        self.requests = Counter(*REQUESTS)
        self.duration = Histogram(
            "latent_http_request_duration_seconds", "Whole request.", SECONDS, ("route",)
        )
        self.stage = Histogram(
            "latent_stage_duration_seconds",
            "Time of one answer by stage: queue, encode, context, predict, snap, decode.",
            SECONDS,
            ("stage",),
        )
        self.calls = Histogram(
            "latent_stage_call_rows", "Rows in one call to a deployment.", ROWS, ("stage",)
        )
        self.waiting = Gauge("latent_stage_waiting_rows", "Rows waiting in the gateway.", ("stage",))
        self.retries = Counter(
            "latent_stage_retries_total", "Calls resent after a replica was lost.", ("stage",)
        )
        self.pending = Gauge("latent_pending_inputs", "Inputs being processed in the gateway.")
        self.refused = Counter(*REFUSED)
        self.cache = Counter("latent_cache_lookups_total", "Cache look-ups.", ("cache", "result"))
        self.answers = Counter("latent_answers_total", "Answers by model and source.", ("model", "source"))
        self.gibberish = Counter(
            "latent_gibberish_total",
            "Answers that are not language, repeat themselves or use too few different characters.",
            ("model",),
        )
        self.keyword_hits = Counter(
            "latent_keyword_hits_total", "Answers that share a keyword with their context.", ("model",)
        )
        self.entity_hits = Counter(
            "latent_entity_hits_total",
            "Answers that share a capitalised name with their context.",
            ("model",),
        )
        self.cosine = Histogram(
            "latent_answer_cosine", "Cosine of an answer's text to the decoded vector.", COSINES, ("model",)
        )
        self.breaker = Gauge("latent_breaker_open", "1 while the breaker is open and the corpus answers.")
        self.deadline = Counter(
            "latent_deadline_exceeded_total", "Requests that exceeded their deadline.", ("route",)
        )

    def measure_call(self, stage: str, *, rows: int, waiting: int, retries: int) -> None:
        """The `Measure` of `Stage`."""
        labels = {"stage": stage}
        self.calls.observe(rows, labels)
        self.waiting.set(waiting, labels)
        if retries:
            self.retries.inc(retries, labels)


class ReplicaMetrics:
    """Metrics of the batches in one replica of encoder, predictor or decoder."""

    def __init__(self) -> None:
        self.rows = Histogram("latent_batch_rows", "Rows in one batch.", ROWS)
        self.waiting = Gauge("latent_queue_depth_rows", "Rows waiting in the replica after a batch.")
        self.dropped = Counter("latent_dropped_rows_total", "Rows dropped: deadline passed or caller gone.")

    def measure(self, rows: int, waiting: int, dropped: int) -> None:
        """The `measure` of `RowQueue` and `StreamQueue`."""
        if rows:
            self.rows.observe(rows)
        self.waiting.set(waiting)
        if dropped:
            self.dropped.inc(dropped)


@cache
def replica_metrics() -> ReplicaMetrics:
    """The metrics of this process."""
    return ReplicaMetrics()
