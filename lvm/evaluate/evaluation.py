"""The evaluation as one record, and its promotion gate.

`evaluation.json` is an Evaluation. Everything printed, the Markdown and the HTML page are made from that record alone,
so they can be made again without a model.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

SCHEMA = "latent-evaluation/2"
"""Version of the record; raised when a field changes its meaning or goes."""

RULES = {
    "split": "only test articles are scored. Articles, not windows, are split 80/10/10; no model and no "
    "baseline was fitted on a test article.",
    "cosine": "mean cosine of prediction and true next vector. The 95 % interval resamples whole articles, "
    "since windows of one article are no independent draws.",
    "margin": "cos(prediction, truth) - cos(prediction, last context vector), mean. Below zero the "
    "prediction lies nearer to what was just read than to what comes.",
    "in_article": "Candidates are all chunks of the same article, earlier ones too, without the context chunks "
    "of the window. A tie counts against the model. A model with a rank head searches with that head's vector; its "
    "cosine is the prediction's.",
    "in_pool": "Candidates are a fixed random sample of all chunks of the corpus, always with the true next "
    "one and never with the window's own context. A tie counts against the model.",
    "controls": "A predictor that knows its context's topic alone scores the same with the context's vectors in any "
    "order (shuffled), and reading the article from its end (backwards).",
    "mse": "mean over the vector's numbers of the squared difference; all rows give unit vectors.",
    "text": "From the same sample of test windows for every row. A text's own vector is read back exactly, a "
    "prediction is written by a language model that reads the vector, and what does not read is answered by the "
    "nearest corpus chunk; `sources` counts which. BLEU is sacrebleu's, 0 to 100; ROUGE is an F-measure, 0 to 1. "
    "Keyword: shares a content word with the context or the true next text. Distinct-2: different word pairs among "
    "all. Language: mean log-probability per character under the language model, nats; about -1 for real text. Codec "
    "ceiling decodes the true vector: no predictor should exceed it. Off manifold: how much farther from the "
    "true next vector the text lies, encoded again, than the vector it was made from.",
    "snap": "Snapped: moved onto the neighbours in the corpus before it is written. Found: the corpus chunk nearest to "
    "the prediction, in place of a written text. Neither may use the article held out, whose next chunk "
    "would otherwise be found rather than predicted.",
    "latency": "One process, all its threads, vectors in memory; models were timed one after another.",
    "efficiency": "test cosine / mean milliseconds at batch 1 x 1000.",
}
"""What each measure counts, in words; saved with the record and shown beside the tables."""


class Check(TypedDict):
    """One condition of the promotion gate."""

    name: str
    passed: bool | None
    """None where it was not measured."""
    reason: str


class Gate(TypedDict):
    """Whether a model may be promoted."""

    passed: bool
    """No check failed."""
    checks: list[Check]


class Entry(TypedDict):
    """One predictor's results; measures as in lvm/evaluate/metrics.py."""

    name: str
    kind: Literal["model", "baseline"]
    cosine: dict[str, Any]
    margin: dict[str, Any]
    """Both Interval.to_dict()."""
    mse: float
    norm: float
    in_article: dict[str, Any]
    in_pool: dict[str, Any]
    """Both summarise_ranks()."""
    in_article_mrr: dict[str, Any] | None
    """Interval of the reciprocal rank; None where no window has a choice."""
    in_pool_r10: dict[str, Any]
    """Interval of the share found among the ten best."""
    val_cosine: float
    ood: dict[str, dict[str, Any]]
    """Intervals `cosine` and `mrr` (within the article) by name of the out-of-domain set; empty when none was given."""
    controls: dict[str, dict[str, Any]]
    """The same by name of the control (`lvm.evaluate.controls`); empty for baselines."""
    histogram: list[int]
    latency: list[dict[str, Any]]
    """Latency.to_dict() for each batch size."""
    parameters: int
    weight_bytes: int
    peak_bytes: int | None
    """Working memory of one call at `peak_batch`; None where it was not measured."""
    peak_batch: int
    details: dict[str, Any]
    """A model's folder, recipe and curve; a baseline's choices."""
    seeds: NotRequired[dict[str, dict[str, Any]]]
    """Models trained with several seeds: Spread.to_dict() of SEED_MEASURES, this record's and the others'."""
    gain: NotRequired[dict[str, Any]]
    """Models only: Interval of the cosine minus the best baseline's, window by window."""
    gate: NotRequired[Gate]
    """Models only."""
    attention: NotRequired[list[dict[str, float]]]
    """summarise_attention(), for a model that shows its attention."""


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
    """The same of the text, encoded again."""
    off_manifold: float
    """Mean distance of the text, encoded again, to the truth, less the vector's own."""
    keyword: float
    """Share of texts that have a keyword in common with the context or the true next text."""
    distinct_2: float
    """Different word pairs among all word pairs."""
    log_prob: float | None
    """Mean log-probability per character under the language model; None where none judged."""
    sources: dict[str, int]
    """Texts that were read back ("exact"), written ("writer") and found ("corpus")."""


class ExampleText(TypedDict):
    """What one predictor says in an example."""

    name: str
    form: Literal["raw", "snap", "found"]
    text: str
    vector_cosine: float
    """Cosine of the decoded vector with the true next vector."""
    text_cosine: float
    """The same of the text, encoded again."""
    source: str
    """exact, writer or corpus."""
    refused: list[str]
    """Earlier texts, each with what spoke against it."""
    refusals: list[str]
    """What speaks against the text itself, given for want of a better one."""


class Example(TypedDict):
    """One held-out window with everything decoded from it."""

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
    """Fingerprints of all that was read; the same inputs and settings need no second run."""
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
        means = {name: found["cosine"]["mean"] for name, found in entry["ood"].items()}
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
    """The gate in a few words: "pass", "pass (… not measured)" or "fail: …" with the failed checks."""
    failed = [c["name"] for c in gate["checks"] if c["passed"] is False]
    if failed:
        return f"fail: {', '.join(failed)}"
    unmeasured = [c["name"] for c in gate["checks"] if c["passed"] is None]
    return f"pass ({', '.join(unmeasured)} not measured)" if unmeasured else "pass"


def bounds(interval: dict[str, Any], signed: bool = False) -> str:
    """The two ends of an interval, as tables show them."""
    sign = "+" if signed else ""
    return f"[{interval['low']:{sign}.4f}, {interval['high']:{sign}.4f}]"
