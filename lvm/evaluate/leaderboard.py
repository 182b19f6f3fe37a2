"""The evaluation as one record, its promotion gate, and its tables as text and Markdown.

`evaluation.json` is an Evaluation. Everything printed, the Markdown and the HTML page are made from that
record alone, so they can be made again without a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "all. Language: mean log-probability a character under the language model, nats; real text has about -1. The codec "
    "ceiling decodes the true vector: no predictor can be expected to pass it. Off manifold: how much farther from the "
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
    """Mean log-probability a character under the language model; None where none judged."""
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

MIN_VAL_COSINE = 0.40
MIN_OOD_COSINE = 0.15
MAX_INFERENCE_MS = 50.0
"""Cosine, latency and size, by which a promotion is judged."""


def judge(entry: Entry, baselines: Sequence[Entry]) -> Gate:
    """The promotion gate of one model: validation cosine, out-of-domain cosine, speed, every baseline."""
    val = entry["val_cosine"]
    checks: list[Check] = [
        {
            "name": "validation cosine",
            "passed": val > MIN_VAL_COSINE,
            "reason": f"{val:.4f}, needs more than {MIN_VAL_COSINE:.2f}",
        }
    ]
    if entry["ood"]:
        means = {name: found["cosine"]["mean"] for name, found in entry["ood"].items()}
        worst = min(means, key=lambda name: means[name])
        value = means[worst]
        checks.append(
            {
                "name": "out-of-domain cosine",
                "passed": value > MIN_OOD_COSINE,
                "reason": f"{value:.4f} on {worst}, the lowest, needs more than {MIN_OOD_COSINE:.2f}",
            }
        )
    else:
        checks.append({"name": "out-of-domain cosine", "passed": None, "reason": "not measured"})
    ms = entry["latency"][0]["mean_ms"]
    checks.append(
        {
            "name": "inference",
            "passed": ms < MAX_INFERENCE_MS,
            "reason": f"{ms:.2f} ms a query on average, needs less than {MAX_INFERENCE_MS:.0f} ms",
        }
    )
    cosine = entry["cosine"]["mean"]
    ahead = [b for b in baselines if b["cosine"]["mean"] >= cosine]
    if ahead:
        named = ", ".join(f"{b['name']} ({b['cosine']['mean']:.4f})" for b in ahead)
        reason = f"{cosine:.4f} on test articles does not beat {named}"
    else:
        reason = f"{cosine:.4f} on test articles beats all {len(baselines)}"
        gain = entry.get("gain")
        if gain is not None:
            reason += f"; ahead of the best by {gain['mean']:+.4f} {_bounds(gain, signed=True)}"
            if gain["low"] <= 0:
                reason += ", an interval that reaches zero"
    checks.append({"name": "every baseline", "passed": not ahead, "reason": reason})
    return {"passed": all(c["passed"] is not False for c in checks), "checks": checks}


def gate_word(gate: Gate) -> str:
    """The gate in a few words: "pass", "pass (… not measured)" or "fail: …" with the failed checks."""
    failed = [c["name"] for c in gate["checks"] if c["passed"] is False]
    if failed:
        return f"fail: {', '.join(failed)}"
    unmeasured = [c["name"] for c in gate["checks"] if c["passed"] is None]
    return f"pass ({', '.join(unmeasured)} not measured)" if unmeasured else "pass"


# -------------------------------------------------------------------------------------------------- tables


SEED_MEASURES = {
    "val_cosine": "val cosine",
    "cosine": "test cosine",
    "in_article_mrr": "MRR article",
    "in_pool_r10": "R@10 corpus",
}
"""What is measured for each seed, and how it is shown."""

UNKNOWN = "-"
"""The cell of what was not measured."""


@dataclass(frozen=True)
class Table:
    """A table of ready-made cells."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What the columns count, a sentence or two."""
    emphasised: frozenset[int] = frozenset()
    """Rows that are models; the rest are there to be beaten."""


def ranking(evaluation: Evaluation) -> list[Entry]:
    """Entries by test cosine, best first."""
    return sorted(evaluation["entries"], key=lambda e: -e["cosine"]["mean"])


def tables(evaluation: Evaluation) -> list[Table]:
    """Every table of the report, the leaderboard first."""
    made = [leaderboard(evaluation), _vectors(evaluation), _retrieval(evaluation), _texts(evaluation)]
    if any(e["ood"] for e in evaluation["entries"]):
        made.append(_out_of_domain(evaluation))
    made.append(_controls(evaluation))
    if any("seeds" in e for e in evaluation["entries"]):
        made.append(_seeds(evaluation))
    return [*made, _latency(evaluation), _size(evaluation), _gates(evaluation)]


def leaderboard(evaluation: Evaluation) -> Table:
    """The one table that is printed; its lines stay under 110 characters, 115 with seeds.

    Where models were trained with several seeds, their test cosine over the seeds stands in place of R@1.
    """
    rows = []
    ranked = ranking(evaluation)
    seeds = any("seeds" in e for e in ranked)
    for place, entry in enumerate(ranked, 1):
        rows.append(
            (
                str(place),
                entry["name"],
                f"{entry['cosine']['mean']:.4f}",
                _bounds(entry["cosine"]),
                f"{entry['margin']['mean']:+.4f}",
                _over_seeds(entry, "cosine") if seeds else _share(entry["in_article"]["r1"]),
                _share(entry["in_article"]["mrr"]),
                _share(entry["in_pool"]["r10"]),
                _ms(entry["latency"][0]["mean_ms"]),
                ("pass" if entry["gate"]["passed"] else "fail") if "gate" in entry else entry["kind"],
            )
        )
    split = evaluation["split"]
    candidates = ranked[0]["in_pool"]["mean_candidates"]
    measured = "Over seeds: mean and deviation of the cosine. MRR" if seeds else "R@1 and MRR"
    pool = "all chunks" if candidates is None else f"{candidates:,.0f} chunks of the corpus"
    return Table(
        "Leaderboard",
        (
            "#",
            "model",
            "cosine",
            "95 % interval",
            "margin",
            "over seeds" if seeds else "R@1 art.",
            "MRR art.",
            "R@10 all",
            "ms",
            "gate",
        ),
        tuple(rows),
        f"{split['test_windows']:,} windows of {split['test_articles']:,} test articles. {measured}: finding the true "
        f"next chunk in its article; R@10: among {pool}. ms: mean of one query.",
        _models(ranked),
    )


def _models(ranked: Sequence[Entry]) -> frozenset[int]:
    return frozenset(i for i, e in enumerate(ranked) if e["kind"] == "model")


def _vectors(evaluation: Evaluation) -> Table:
    ranked = ranking(evaluation)
    rows = [
        (
            e["name"],
            f"{e['val_cosine']:.4f}",
            f"{e['cosine']['mean']:.4f}",
            f"{e['mse']:.6f}",
            f"{e['norm']:.4f}",
            f"{e['margin']['mean']:+.4f}",
            _bounds(e["margin"], signed=True),
            f"{e['gain']['mean']:+.4f} {_bounds(e['gain'], signed=True)}" if "gain" in e else "",
        )
        for e in ranked
    ]
    rules = evaluation["rules"]
    return Table(
        "Predicted vectors",
        (
            "model",
            "val cosine",
            "test cosine",
            "MSE",
            "norm",
            "margin",
            "its 95 % interval",
            "test cosine above the best baseline's",
        ),
        tuple(rows),
        f"Margin: {rules['margin']} MSE: {rules['mse']}",
        _models(ranked),
    )


def _retrieval(evaluation: Evaluation) -> Table:
    ranked = ranking(evaluation)
    names = ("r1", "r5", "r10", "mrr")

    def bounds(entry: Entry) -> tuple[str, str]:
        pool = entry["in_pool_r10"]
        return _mrr(entry["in_article_mrr"]), f"{pool['mean']:.3f} [{pool['low']:.3f}, {pool['high']:.3f}]"

    def cells(entry: Entry, prefix: str) -> list[str]:
        return [_share(ranks[prefix + n]) for ranks in (entry["in_article"], entry["in_pool"]) for n in names]

    rows = [(e["name"], *cells(e, ""), *bounds(e)) for e in ranked]
    rows.append(("(random order)", *cells(ranked[0], "chance_"), "", ""))
    article = ranked[0]["in_article"]
    mean = article["mean_candidates"]
    return Table(
        "Finding the true next chunk",
        (
            "model",
            *(f"{n} {s}" for s in ("article", "corpus") for n in ("R@1", "R@5", "R@10", "MRR")),
            "MRR article, 95 % interval",
            "R@10 corpus, 95 % interval",
        ),
        tuple(rows),
        f"{evaluation['rules']['in_article']} {article['windows']:,.0f} windows have more than one "
        f"candidate, {'none' if mean is None else f'{mean:.1f}'} on average. "
        f"{evaluation['rules']['in_pool']}",
        _models(ranked),
    )


def _texts(evaluation: Evaluation) -> Table:
    rows = [
        (
            row["name"],
            FORMS[row["form"]],
            f"{row['vector_cosine']:.4f}",
            f"{row['text_cosine']:.4f}",
            f"{row['off_manifold']:+.3f}",
            f"{row['keyword']:.0%}",
            f"{row['distinct_2']:.2f}",
            "–" if row["log_prob"] is None else f"{row['log_prob']:.2f}",
            f"{row['rouge1']:.3f}",
            f"{row['rouge2']:.3f}",
            f"{row['rougeL']:.3f}",
            f"{row['bleu']:.2f}",
            ", ".join(f"{source} {n}" for source, n in row["sources"].items()),
        )
        for row in evaluation["text"]
    ]
    return Table(
        "Text",
        (
            "model",
            "form",
            "cosine of vector",
            "cosine of text",
            "off manifold",
            "keyword",
            "distinct-2",
            "language",
            "ROUGE-1",
            "ROUGE-2",
            "ROUGE-L",
            "BLEU",
            "sources",
        ),
        tuple(rows),
        f"{evaluation['text_windows']} test windows. {evaluation['rules']['text']} "
        f"{evaluation['rules']['snap']}",
    )


def _latency(evaluation: Evaluation) -> Table:
    ranked = ranking(evaluation)
    timed = [(i, e, at) for i, e in enumerate(ranked) for at in e["latency"]]
    rows = [
        (
            e["name"],
            str(at["batch"]),
            *(_ms(at[k]) for k in ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "vector_ms")),
            f"{e['latency'][0]['vector_ms'] / max(at['vector_ms'], 1e-9):.1f}x",
        )
        for _, e, at in timed
    ]
    models = _models(ranked)
    return Table(
        "Latency",
        ("model", "batch", "mean ms", "p50", "p95", "p99", "ms a vector", "batch speed-up"),
        tuple(rows),
        f"{evaluation['rules']['latency']} They hold for the machine named under provenance.",
        frozenset(row for row, (i, _, _) in enumerate(timed) if i in models),
    )


def _size(evaluation: Evaluation) -> Table:
    ranked = ranking(evaluation)
    rows = [
        (
            e["name"],
            f"{e['parameters']:,}",
            f"{e['weight_bytes'] / 1e6:.2f}",
            UNKNOWN if e["peak_bytes"] is None else f"{e['peak_bytes'] / 1e6:.2f}",
            f"{efficiency(e):,.0f}" if e["kind"] == "model" else "",
        )
        for e in ranked
    ]
    return Table(
        "Size and efficiency",
        (
            "model",
            "parameters",
            "weights MB",
            f"peak MB, batch {ranked[0]['peak_batch']}",
            "efficiency",
        ),
        tuple(rows),
        f"Peak: memory one call needs beyond the weights. Efficiency: {evaluation['rules']['efficiency']}",
        _models(ranked),
    )


def efficiency(entry: Entry) -> float:
    """Test cosine / mean milliseconds at batch 1 x 1000."""
    return float(entry["cosine"]["mean"] / max(entry["latency"][0]["mean_ms"], 1e-6) * 1000)


def _out_of_domain(evaluation: Evaluation) -> Table:
    ranked = ranking(evaluation)
    names = list(ranked[0]["ood"])
    rows = [
        (
            e["name"],
            *(c for n in names for c in (f"{e['ood'][n]['cosine']['mean']:.4f}", _mrr(e["ood"][n]["mrr"]))),
        )
        for e in ranked
    ]
    return Table(
        "Out of domain",
        ("model", *(header for n in names for header in (n, f"{n}, MRR"))),
        tuple(rows),
        "Mean cosine, and reciprocal rank within the article with its 95 % interval, on corpora no predictor was "
        "trained on.",
        _models(ranked),
    )


def _controls(evaluation: Evaluation) -> Table:
    ranked = [e for e in ranking(evaluation) if e["controls"]]
    names = list(ranked[0]["controls"]) if ranked else []
    rows = [
        (
            e["name"],
            *(
                c
                for n in names
                for c in (f"{e['controls'][n]['cosine']['mean']:.4f}", _mrr(e["controls"][n]["mrr"]))
            ),
        )
        for e in ranked
    ]
    return Table(
        "Controls",
        ("model", *(header for n in names for header in (n, f"{n}, MRR"))),
        tuple(rows),
        evaluation["rules"]["controls"],
        frozenset(range(len(rows))),
    )


def _seeds(evaluation: Evaluation) -> Table:
    ranked = [e for e in ranking(evaluation) if "seeds" in e]
    rows = [
        (
            e["name"],
            str(len(e["seeds"]["cosine"]["values"])),
            *(_over_seeds(e, measure) for measure in SEED_MEASURES),
        )
        for e in ranked
    ]
    return Table(
        "Over seeds",
        ("model", "seeds", *SEED_MEASURES.values()),
        tuple(rows),
        "Mean and standard deviation over trainings on the same split that differ in their seed alone. All other "
        "tables show the one that the alias points to, the best by val cosine.",
        frozenset(range(len(rows))),
    )


def _over_seeds(entry: Entry, measure: str) -> str:
    return spread_text(entry["seeds"][measure]) if measure in entry.get("seeds", {}) else UNKNOWN


def spread_text(spread: Mapping[str, Any]) -> str:
    """Mean and deviation of a `Spread.to_dict`."""
    return f"{spread['mean']:.4f} ±{spread['deviation']:.4f}"


def _mrr(interval: dict[str, Any] | None) -> str:
    return (
        UNKNOWN
        if interval is None
        else f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
    )


def _gates(evaluation: Evaluation) -> Table:
    words = {True: "pass", False: "fail", None: UNKNOWN}
    rows = [
        (entry["name"], check["name"], words[check["passed"]], check["reason"])
        for entry in ranking(evaluation)
        if "gate" in entry
        for check in entry["gate"]["checks"]
    ]
    return Table(
        "Promotion gate",
        ("model", "check", "result", "reason"),
        tuple(rows),
        "A model may be promoted when no check fails.",
    )


def _bounds(interval: dict[str, Any], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"[{interval['low']:{sign}.4f}, {interval['high']:{sign}.4f}]"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else "<0.01"


# ------------------------------------------------------------------------------------------------- writing


def as_text(table: Table) -> str:
    """The table for a terminal: columns aligned, numbers to the right."""
    columns = list(zip(table.headers, *table.rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [_numeric(column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(
        [table.title, line(table.headers), *(line(row) for row in table.rows), table.note]
    ).rstrip()


def as_markdown(table: Table) -> str:
    """The table with its heading and note; models in bold."""
    columns = list(zip(table.headers, *table.rows, strict=True))
    rule = ["---:" if _numeric(column[1:]) else "---" for column in columns]
    lines = [f"## {table.title}", "", _pipes(table.headers), _pipes(rule)]
    for number, row in enumerate(table.rows):
        # The name stands in the first column, or behind the place in the second.
        name = 1 if table.headers[0] == "#" else 0
        bold = number in table.emphasised
        lines.append(_pipes([f"**{c}**" if bold and i == name else c for i, c in enumerate(row)]))
    return "\n".join([*lines, "", table.note]).rstrip() + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _numeric(cells: Sequence[str]) -> bool:
    filled = [c for c in cells if c and c != UNKNOWN]
    return bool(filled) and all(c[0].isdigit() or (c[0] in "+-<" and c[1:2].isdigit()) for c in filled)


def markdown_page(evaluation: Evaluation) -> str:
    """leaderboard.md: every table, the rules of what is scored, and where the numbers come from."""
    where, rules = evaluation["provenance"], evaluation["rules"]
    head = [
        "# Evaluation",
        "",
        f"Codec {where['codec']['name']} ({where['codec']['digest']}), vectors "
        f"{where['vectors']['fingerprint']}, {evaluation['created']}, {where['machine']}.",
        "",
        f"- Split: {rules['split']}",
        f"- Cosine: {rules['cosine']}",
        f"- Margin: {rules['margin']}",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(as_markdown(t) for t in tables(evaluation))


def example_text(example: Example, number: int) -> str:
    """One example for a terminal: the context chunks, the true next chunk, then each decoded text."""
    lines = [f"Example {number}: {example['title']}"]
    width = max((len(_label(d)) for d in example["decoded"]), default=0)
    lines += [f"  context {i}: {text}" for i, text in enumerate(example["context"], 1)]
    lines.append(f"  true next: {example['truth']}")
    for decoded in example["decoded"]:
        lines.append(f"  {_label(decoded):{width}}  {decoded['text'] or '(empty)'}")
        why = f", for want of a better one ({'; '.join(decoded['refusals'])})" if decoded["refusals"] else ""
        lines.append(
            f"  {'':{width}}    {SOURCES[decoded['source']]}{why}; cosine of the vector to the true next "
            f"{decoded['vector_cosine']:+.3f}, of the text {decoded['text_cosine']:+.3f}"
        )
        lines += [f"  {'':{width}}    refused: {text}" for text in decoded["refused"]]
    return "\n".join(lines)


FORMS = {"raw": "raw", "snap": "snapped", "found": "found"}
"""How a form is shown."""

SOURCES = {"exact": "read back", "writer": "written", "corpus": "found in the corpus"}
"""What a text's source is called for a reader."""


def _label(decoded: ExampleText) -> str:
    return decoded["name"] if decoded["form"] == "raw" else f"{decoded['name']}, {FORMS[decoded['form']]}"
