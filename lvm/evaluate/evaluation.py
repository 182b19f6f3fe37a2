"""The evaluation record and the promotion gate.

`evaluation.json` is an Evaluation. The printed tables, the Markdown and the HTML page are made from it alone, so they
can be made again without a model.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

SCHEMA = "latent-evaluation/2"
"""Version of the record; raised when a field changes its meaning or is removed."""

RULES = {
    "split": "only test articles are scored. Articles, not windows, are split 80/10/10; no model and no "
    "baseline was fitted on a test article.",
    "cosine": "mean cosine of prediction and true next vector. The 95 % interval resamples whole articles, "
    "since windows of one article are not independent.",
    "margin": "mean of cos(prediction, truth) - cos(prediction, last context vector). Below zero, predictions are "
    "closer to the last chunk read than to the next one.",
    "in_article": "Candidates are all chunks of the same article except the window's context. A tie counts against "
    "the model. A model with a rank head is ranked by that head's vector; its cosine is the prediction's.",
    "in_pool": "Candidates are a fixed random sample of the corpus' chunks, plus the true next one, minus the "
    "window's context. A tie counts against the model.",
    "controls": "A predictor that only knows its context's topic scores the same when the context is shuffled, or when "
    "the article is read backwards.",
    "mse": "mean squared difference per dimension; all predictors return unit vectors.",
    "text": "All rows use the same sample of test windows. The vector of an actual text is read back exactly, a "
    "prediction is written by a language model conditioned on it, and where the text is rejected the nearest corpus "
    "chunk is the answer; `sources` counts these. BLEU is sacrebleu's, 0 to 100; ROUGE is an F-measure, 0 to 1. "
    "Keyword: share of texts with a content word of the context or the true next text. Distinct-2: distinct bigrams / "
    "all bigrams. Language: mean log-probability per character under the language model, in nats; about -1 for real "
    "text. Codec ceiling: the true vector decoded, which no predictor should exceed. Off manifold: distance of the "
    "re-encoded text to the true next vector, minus that of the decoded vector.",
    "snap": "Snapped: moved towards the nearest corpus vectors before decoding. Found: the corpus chunk nearest to "
    "the prediction, in place of a decoded text. Both exclude the window's own article, whose next chunk "
    "would otherwise be retrieved rather than predicted.",
    "latency": "One process, all its threads, vectors in memory; models were timed one after another.",
    "efficiency": "test cosine / mean milliseconds at batch 1 x 1000.",
}
"""Definition of each measure; saved with the record and shown beside the tables."""


class Check(TypedDict):
    """One condition of the promotion gate."""

    name: str
    passed: bool | None
    """None where it was not measured."""
    reason: str


class Gate(TypedDict):
    """The promotion gate's result for a model."""

    passed: bool
    """True where no check failed."""
    checks: list[Check]


class Entry(TypedDict):
    """One predictor's results; measures as in lvm/evaluate/metrics.py."""

    name: str
    kind: Literal["model", "baseline"]
    cosine: dict[str, Any]
    margin: dict[str, Any]
    """Both the fields of Interval."""
    mse: float
    norm: float
    in_article: dict[str, Any]
    in_pool: dict[str, Any]
    """Both summarise_ranks()."""
    in_article_mrr: dict[str, Any] | None
    """Interval of the reciprocal rank; None where no window has more than one candidate."""
    in_pool_r10: dict[str, Any]
    """Interval of recall at 10."""
    val_cosine: float
    ood: dict[str, dict[str, Any]]
    """Intervals `cosine` and `mrr` (within the article), by name of the out-of-domain set."""
    controls: dict[str, dict[str, Any]]
    """The same by name of the control (`lvm.evaluate.controls`); empty for baselines."""
    histogram: list[int]
    latency: list[dict[str, Any]]
    """The fields of Latency, for each batch size."""
    parameters: int
    weight_bytes: int
    peak_bytes: int | None
    """Working memory of one call at `peak_batch`; None where it was not measured."""
    peak_batch: int
    details: dict[str, Any]
    """A model's folder, recipe and curve; a baseline's fitted settings."""
    seeds: NotRequired[dict[str, dict[str, Any]]]
    """Models trained with several seeds: Spread of each of SEED_MEASURES over all seeds."""
    gain: NotRequired[dict[str, Any]]
    """Models only: Interval of the difference to the best baseline's cosine, window by window."""
    gate: NotRequired[Gate]
    """Models only."""
    attention: NotRequired[list[dict[str, float]]]
    """summarise_attention(), for a model that exposes its attention."""


class TextRow(TypedDict):
    """Decoded text of one predictor over the sample."""

    name: str
    form: Literal["raw", "snap", "found"]
    rouge1: float
    rouge2: float
    rougeL: float
    bleu: float
    vector_cosine: float
    """Mean cosine of the decoded vector with the true next vector."""
    text_cosine: float
    """Mean cosine of the re-encoded text with the true next vector."""
    off_manifold: float
    """Mean distance of the re-encoded text to the truth, minus that of the decoded vector."""
    keyword: float
    """Share of texts that have a keyword in common with the context or the true next text."""
    distinct_2: float
    """Distinct bigrams / all bigrams."""
    log_prob: float | None
    """Mean log-probability per character under the language model; None where no text was scored."""
    sources: dict[str, int]
    """Number of texts by source: exact, writer or corpus."""


class ExampleText(TypedDict):
    """One predictor's text in an example."""

    name: str
    form: Literal["raw", "snap", "found"]
    text: str
    vector_cosine: float
    """Cosine of the decoded vector with the true next vector."""
    text_cosine: float
    """Cosine of the re-encoded text with the true next vector."""
    source: str
    """exact, writer or corpus."""
    refused: list[str]
    """Texts that were refused before, each with its reasons."""
    refusals: list[str]
    """Reasons against this text, where no attempt was accepted."""


class Example(TypedDict):
    """One test window with all texts decoded for it."""

    title: str
    chunk_id: str
    """Of the true next chunk."""
    context: list[str]
    truth: str
    decoded: list[ExampleText]


class Evaluation(TypedDict):
    """The whole record."""

    schema: str
    created: str
    """UTC, ISO 8601."""
    settings: dict[str, Any]
    inputs: dict[str, Any]
    """Fingerprints of all inputs; with the same inputs and settings the evaluation is up to date."""
    provenance: dict[str, Any]
    split: dict[str, Any]
    rules: dict[str, str]
    entries: list[Entry]
    text_windows: int
    text: list[TextRow]
    examples: list[Example]
    seconds: dict[str, float]
    """Wall time by step."""


# ------------------------------------------------------------------------------------------ promotion gate

MIN_OOD_COSINE = 0.15
MAX_INFERENCE_MS = 50.0
"""The original system's limits. It also asked for a validation cosine above 0.40, which only its own codec's vectors
reach (their mean alone has 0.55): cosines of different codecs do not compare, a lead over the baselines does."""


def judge(entry: Entry, baselines: Sequence[Entry]) -> Gate:
    """The promotion gate of one model: every baseline in cosine and both ranks, out-of-domain cosine, speed."""
    leads = [
        _lead("cosine", entry, baselines, lambda e: e["cosine"]["mean"]),
        _lead("MRR in its article", entry, baselines, lambda e: e["in_article"]["mrr"]),
        _lead("R@10 in the pool", entry, baselines, lambda e: e["in_pool"]["r10"]),
    ]
    gain = entry.get("gain")
    if gain is not None and leads[0]["passed"]:
        leads[0]["reason"] += f"; ahead of the best by {gain['mean']:+.4f} {bounds(gain, signed=True)}"
        if gain["low"] <= 0:
            leads[0]["reason"] += ", an interval that reaches zero"
    outside: Check = {"name": "out-of-domain cosine", "passed": None, "reason": "not measured"}
    if entry["ood"]:
        means = {name: scores["cosine"]["mean"] for name, scores in entry["ood"].items()}
        worst = min(means, key=lambda name: means[name])
        outside["passed"] = means[worst] > MIN_OOD_COSINE
        outside["reason"] = f"{means[worst]:.4f} on {worst}, the lowest, needs more than {MIN_OOD_COSINE:.2f}"
    ms = entry["latency"][0]["mean_ms"]
    speed: Check = {
        "name": "inference",
        "passed": ms < MAX_INFERENCE_MS,
        "reason": f"{ms:.2f} ms a query on average, needs less than {MAX_INFERENCE_MS:.0f} ms",
    }
    checks = [*leads, outside, speed]
    return {"passed": all(c["passed"] is not False for c in checks), "checks": checks}


def _lead(
    name: str, entry: Entry, baselines: Sequence[Entry], measure: Callable[[Entry], float | None]
) -> Check:
    """Whether the model is above every baseline in a measure."""
    own, rivals = measure(entry), {b["name"]: measure(b) for b in baselines}
    if own is None:
        return {"name": name, "passed": None, "reason": "not measured"}
    ahead = [
        f"{rival} ({value:.4f})" for rival, value in rivals.items() if value is not None and value >= own
    ]
    verdict = f"does not beat {', '.join(ahead)}" if ahead else f"beats all {len(baselines)} baselines"
    return {"name": name, "passed": not ahead, "reason": f"{own:.4f} on test articles {verdict}"}


def gate_word(gate: Gate) -> str:
    """The gate's result in a few words: "pass", "pass (… not measured)" or "fail: …" with the failed checks."""
    failed = [c["name"] for c in gate["checks"] if c["passed"] is False]
    if failed:
        return f"fail: {', '.join(failed)}"
    unmeasured = [c["name"] for c in gate["checks"] if c["passed"] is None]
    return f"pass ({', '.join(unmeasured)} not measured)" if unmeasured else "pass"


def bounds(interval: dict[str, Any], signed: bool = False) -> str:
    """The bounds of an interval, for tables."""
    sign = "+" if signed else ""
    return f"[{interval['low']:{sign}.4f}, {interval['high']:{sign}.4f}]"
