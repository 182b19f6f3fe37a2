"""A whole evaluation record, made up, for the tests of what is drawn from one."""

from typing import Any

import numpy as np
import pytest

from lvm.evaluate.evaluation import RULES, SCHEMA, Entry, Evaluation, judge
from lvm.evaluate.metrics import LATENCY_BATCHES, histogram


def found(cosine: float) -> dict[str, Any]:
    """Measures of a set of windows around one cosine."""
    interval = {"mean": cosine, "low": cosine - 0.02, "high": cosine + 0.02, "num_articles": 10}
    return {"cosine": interval, "mrr": {**interval, "mean": 0.2}}


def made_entry(
    name: str, cosine: float, kind: str = "model", mrr: float = 0.4, r10: float = 0.9, **changes: Any
) -> Entry:
    """An entry around one cosine and two ranks; `changes` replace fields."""
    ranks = {"windows": 90, "mean_candidates": 12.5, "r1": 0.21, "r5": 0.6, "r10": r10, "mrr": mrr}
    ranks |= {"chance_r1": 0.08, "chance_r5": 0.4, "chance_r10": 0.8, "chance_mrr": 0.25}
    entry: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "cosine": {"mean": cosine, "low": cosine - 0.02, "high": cosine + 0.02, "num_articles": 10},
        "margin": {"mean": -0.05, "low": -0.06, "high": -0.04, "num_articles": 10},
        "mse": 0.00113,
        "norm": 1.0,
        "in_article": ranks,
        "in_pool": {**ranks, "windows": 100, "mean_candidates": 1000.0},
        "val_cosine": cosine + 0.01,
        "in_article_mrr": {"mean": 0.4, "low": 0.35, "high": 0.45, "num_articles": 10},
        "in_pool_r10": {"mean": 0.9, "low": 0.85, "high": 0.95, "num_articles": 10},
        "ood": {},
        "controls": {n: found(cosine) for n in ("as written", "article backwards")}
        if kind == "model"
        else {},
        "histogram": histogram(np.random.default_rng(0).normal(cosine, 0.1, 500)),
        "latency": [
            {"batch": b, "repeats": 50, "mean_ms": 0.5 * b**0.5, "p50_ms": 0.5, "p95_ms": 0.6, "p99_ms": 0.7}
            | {"vector_ms": 0.5 * b**-0.5}
            for b in LATENCY_BATCHES
        ],
        "parameters": 1_510_912 if kind == "model" else 0,
        "weight_bytes": 6_043_648 if kind == "model" else 0,
        "peak_bytes": 3_000_000,
        "peak_batch": 128,
        "details": {},
    }
    return entry | changes  # type: ignore[return-value]


@pytest.fixture
def evaluation() -> Evaluation:
    """Two models and two baselines, with text that must be escaped."""
    baselines = [
        made_entry("passthrough", 0.40, "baseline", r10=0.8, mrr=0.3),
        made_entry("ridge", 0.55, "baseline", r10=0.8, mrr=0.3, details={"penalty": 0.3}),
    ]
    curve = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e, "val_cosine": 0.5, "seconds": 1.0}
        for e in (1, 2, 3)
    ]
    places = [
        {"mean": 0.1 + 0.05 * t, "p10": 0.05, "p25": 0.1, "p50": 0.2, "p75": 0.3, "p90": 0.4}
        for t in range(5)
    ]
    amn = made_entry("amn", 0.58, details={"folder": "amn-20260102-0a", "curve": curve}, attention=places)
    lstm = made_entry("lstm", 0.52, details={"folder": "lstm-20260102-0b", "curve": curve[:1]})
    amn["gain"] = {"mean": 0.03, "low": 0.01, "high": 0.05, "num_articles": 10}
    lstm["gain"] = {"mean": -0.03, "low": -0.05, "high": -0.01, "num_articles": 10}
    for model in (amn, lstm):
        model["gate"] = judge(model, baselines)
    said: Any = {"form": "raw", "vector_cosine": 0.5812, "text_cosine": 0.4444, "source": "writer"}
    said |= {"refused": [], "refusals": []}
    return {
        "schema": SCHEMA,
        "created": "2026-01-02T03:04:05+00:00",
        "settings": {"seed": 0, "examples": 1},
        "inputs": {"vectors": "0123456789abcdef"},
        "provenance": {
            "codec": {"name": "fake", "digest": "feedfacefeedface", "max_tokens": 32},
            "vectors": {
                "directory": "out/vectors",
                "fingerprint": "0123456789abcdef",
                "chunks": 12345,
                "articles": 100,
                "source": "wikipedia <test>",
                "licence": "CC0-1.0",
            },
            "index": {"version": "89abcdef01234567"},
            "machine": "2 CPUs",
            "versions": {"python": "3.11"},
        },
        "split": {
            "seed": 0,
            "windows": {"train": 800, "val": 100, "test": 100},
            "test_windows": 100,
            "test_articles": 10,
        },
        "rules": dict(RULES),
        "entries": [*baselines, lstm, amn],
        "text_windows": 64,
        "text": [
            {"name": "amn", "form": "snap", "rouge1": 0.112, "rouge2": 0.02, "rougeL": 0.089, "bleu": 0.7}
            | {
                "vector_cosine": 0.58,
                "text_cosine": 0.44,
                "off_manifold": 0.14,
                "sources": {"writer": 60, "corpus": 4},
            }
            | {"keyword": 0.75, "distinct_2": 0.81, "log_prob": None},
        ],
        "examples": [
            {
                "title": "Bridges & <b>fords</b>",
                "chunk_id": "c0ffee",
                "context": [f"context chunk {i} <script>" for i in range(5)],
                "truth": "the true next chunk | with a bar",
                "decoded": [
                    {"name": "amn", "text": "said by amn <i>", **said},
                    {"name": "lstm", "text": "said by lstm", **said}
                    | {
                        "form": "snap",
                        "source": "corpus",
                        "refused": ["word salad <u> (not language: -3.10 nats per character < -2.60)"],
                    },
                    {"name": "passthrough", "text": "", **said},
                ],
            }
        ],
        "seconds": {"score": 1.5, "decode": 2.0},
    }
