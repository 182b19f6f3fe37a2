"""The tables of an evaluation, the leaderboard first, and its Markdown page."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from lvm.evaluate.evaluation import Entry, Evaluation, Example, ExampleText, TextRow, bounds
from lvm.evaluate.table import UNKNOWN, Table, as_markdown, table_of_columns

SEED_MEASURES = {
    "val_cosine": "val cosine",
    "cosine": "test cosine",
    "in_article_mrr": "MRR article",
    "in_pool_r10": "R@10 corpus",
}
"""Measures that are taken for each seed, with their column headers."""


FEW_ARTICLES = 10
"""Fewer test articles than these do not say which model is best."""


def ranking(evaluation: Evaluation) -> list[Entry]:
    """Entries by test cosine, best first."""
    return sorted(evaluation["entries"], key=lambda e: -e["cosine"]["mean"])


def tables(evaluation: Evaluation) -> list[Table]:
    """Every table of the report, the leaderboard first."""
    made = [leaderboard(evaluation), _vectors(evaluation), _retrieval(evaluation), _texts(evaluation)]
    if any(e["ood"] for e in evaluation["entries"]):
        note = (
            "Mean cosine, and reciprocal rank within the article with its 95 % interval, on corpora no predictor was "
            "trained on."
        )
        made.append(_by_set(evaluation, "ood", "Out of domain", note))
    made.append(_by_set(evaluation, "controls", "Controls", evaluation["rules"]["controls"]))
    if any("seeds" in e for e in evaluation["entries"]):
        made.append(_seeds(evaluation))
    return [*made, _latency(evaluation), _size(evaluation), _gates(evaluation)]


def leaderboard(evaluation: Evaluation) -> Table:
    """The table that is also printed; its lines have fewer than 110 characters, 115 with seeds.

    Where models were trained with several seeds, the test cosine over seeds replaces R@1.
    """
    ranked = ranking(evaluation)
    places = {e["name"]: str(place) for place, e in enumerate(ranked, 1)}
    seeds = any("seeds" in e for e in ranked)

    def seeds_or_r1(entry: Entry) -> str:
        return _over_seeds(entry, "cosine") if seeds else _share(entry["in_article"]["r1"])

    columns: dict[str, Callable[[Entry], str]] = {
        "#": lambda e: places[e["name"]],
        "model": lambda e: e["name"],
        "cosine": lambda e: f"{e['cosine']['mean']:.4f}",
        "95 % interval": lambda e: bounds(e["cosine"]),
        "margin": lambda e: f"{e['margin']['mean']:+.4f}",
        "over seeds" if seeds else "R@1 art.": seeds_or_r1,
        "MRR art.": lambda e: _share(e["in_article"]["mrr"]),
        "R@10 all": lambda e: _share(e["in_pool"]["r10"]),
        "ms": lambda e: _ms(e["latency"][0]["mean_ms"]),
        "gate": lambda e: ("pass" if e["gate"]["passed"] else "fail") if "gate" in e else e["kind"],
    }
    split = evaluation["split"]
    candidates = ranked[0]["in_pool"]["mean_candidates"]
    measured = "Over seeds: mean and deviation of the cosine. MRR" if seeds else "R@1 and MRR"
    pool = "all chunks" if candidates is None else f"{candidates:,.0f} chunks of the corpus"
    note = (
        f"{split['test_windows']:,} windows of {split['test_articles']:,} test articles. {measured}: rank of the true "
        f"next chunk in its article; R@10: among {pool}. ms: mean time of one query."
    )
    if bundled := [e["name"] for e in ranked if e["details"].get("config", {}).get("bundled")]:
        note += f" Started from a bundled model, trained on Wikipedia: {', '.join(bundled)}."
    return table_of_columns("Leaderboard", ranked, columns, note, _models(ranked))


def _models(ranked: Sequence[Entry]) -> frozenset[int]:
    return frozenset(i for i, e in enumerate(ranked) if e["kind"] == "model")


def _vectors(evaluation: Evaluation) -> Table:
    def gain(entry: Entry) -> str:
        return f"{entry['gain']['mean']:+.4f} {bounds(entry['gain'], signed=True)}" if "gain" in entry else ""

    ranked = ranking(evaluation)
    columns: dict[str, Callable[[Entry], str]] = {
        "model": lambda e: e["name"],
        "val cosine": lambda e: f"{e['val_cosine']:.4f}",
        "test cosine": lambda e: f"{e['cosine']['mean']:.4f}",
        "MSE": lambda e: f"{e['mse']:.6f}",
        "norm": lambda e: f"{e['norm']:.4f}",
        "margin": lambda e: f"{e['margin']['mean']:+.4f}",
        "its 95 % interval": lambda e: bounds(e["margin"], signed=True),
        "test cosine above the best baseline's": gain,
    }
    note = f"Margin: {evaluation['rules']['margin']} MSE: {evaluation['rules']['mse']}"
    return table_of_columns("Predicted vectors", ranked, columns, note, _models(ranked))


def _retrieval(evaluation: Evaluation) -> Table:
    ranked = ranking(evaluation)
    names = ("r1", "r5", "r10", "mrr")

    def cells(entry: Entry, prefix: str) -> list[str]:
        return [_share(ranks[prefix + n]) for ranks in (entry["in_article"], entry["in_pool"]) for n in names]

    rows = [
        (e["name"], *cells(e, ""), _interval(e["in_article_mrr"]), _interval(e["in_pool_r10"]))
        for e in ranked
    ]
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
    columns: dict[str, Callable[[TextRow], str]] = {
        "model": lambda row: row["name"],
        "form": lambda row: FORMS[row["form"]],
        "cosine of vector": lambda row: f"{row['vector_cosine']:.4f}",
        "cosine of text": lambda row: f"{row['text_cosine']:.4f}",
        "off manifold": lambda row: f"{row['off_manifold']:+.3f}",
        "keyword": lambda row: f"{row['keyword']:.0%}",
        "distinct-2": lambda row: f"{row['distinct_2']:.2f}",
        "language": lambda row: "–" if row["log_prob"] is None else f"{row['log_prob']:.2f}",
        "ROUGE-1": lambda row: f"{row['rouge1']:.3f}",
        "ROUGE-2": lambda row: f"{row['rouge2']:.3f}",
        "ROUGE-L": lambda row: f"{row['rougeL']:.3f}",
        "BLEU": lambda row: f"{row['bleu']:.2f}",
        "sources": lambda row: ", ".join(f"{source} {n}" for source, n in row["sources"].items()),
    }
    rules = evaluation["rules"]
    note = f"{evaluation['text_windows']} test windows. {rules['text']} {rules['snap']}"
    return table_of_columns("Text", evaluation["text"], columns, note)


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
    def peak(entry: Entry) -> str:
        return UNKNOWN if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:.2f}"

    ranked = ranking(evaluation)
    columns: dict[str, Callable[[Entry], str]] = {
        "model": lambda e: e["name"],
        "parameters": lambda e: f"{e['parameters']:,}",
        "weights MB": lambda e: f"{e['weight_bytes'] / 1e6:.2f}",
        f"peak MB, batch {ranked[0]['peak_batch']}": peak,
        "efficiency": lambda e: f"{efficiency(e):,.0f}" if e["kind"] == "model" else "",
    }
    note = f"Peak: memory one call needs beyond the weights. Efficiency: {evaluation['rules']['efficiency']}"
    return table_of_columns("Size and efficiency", ranked, columns, note, _models(ranked))


def efficiency(entry: Entry) -> float:
    """Test cosine / mean milliseconds at batch 1 x 1000."""
    return float(entry["cosine"]["mean"] / max(entry["latency"][0]["mean_ms"], 1e-6) * 1000)


def _by_set(evaluation: Evaluation, key: Literal["ood", "controls"], title: str, note: str) -> Table:
    """Mean cosine and MRR of each entry that has `key`, by out-of-domain set or control."""
    ranked = [e for e in ranking(evaluation) if e[key]]
    names = list(ranked[0][key]) if ranked else []
    rows = []
    for entry in ranked:
        cells = ((f"{entry[key][n]['cosine']['mean']:.4f}", _interval(entry[key][n]["mrr"])) for n in names)
        rows.append((entry["name"], *chain.from_iterable(cells)))
    headers = ("model", *(header for n in names for header in (n, f"{n}, MRR")))
    return Table(title, headers, tuple(rows), note, _models(ranked))


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
        "Mean and standard deviation over trainings that differ only in their seed. All other tables show the one that "
        "the alias points to, the best by val cosine.",
        _models(ranked),
    )


def _over_seeds(entry: Entry, measure: str) -> str:
    return spread_text(entry["seeds"][measure]) if measure in entry.get("seeds", {}) else UNKNOWN


def spread_text(spread: Mapping[str, Any]) -> str:
    """The fields of a `Spread` as mean and standard deviation."""
    return f"{spread['mean']:.4f} ±{spread['deviation']:.4f}"


def _interval(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return UNKNOWN
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


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


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else "<0.01"


def markdown_page(evaluation: Evaluation) -> str:
    """leaderboard.md: provenance, scoring rules and every table."""
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
        why = (
            f", refused but the best found ({'; '.join(decoded['refusals'])})" if decoded["refusals"] else ""
        )
        lines.append(
            f"  {'':{width}}    {SOURCES[decoded['source']]}{why}; cosine of the vector to the true next "
            f"{decoded['vector_cosine']:+.3f}, of the text {decoded['text_cosine']:+.3f}"
        )
        lines += [f"  {'':{width}}    refused: {text}" for text in decoded["refused"]]
    return "\n".join(lines)


FORMS = {"raw": "raw", "snap": "snapped", "found": "found"}
"""Displayed names of the forms."""

SOURCES = {"exact": "read back", "writer": "written", "corpus": "found in the corpus"}
"""Displayed names of a text's sources."""


def _label(decoded: ExampleText) -> str:
    return decoded["name"] if decoded["form"] == "raw" else f"{decoded['name']}, {FORMS[decoded['form']]}"


def headline(evaluation: Evaluation) -> str:
    """The result in two or three sentences."""
    ranked = ranking(evaluation)
    models = [e for e in ranked if e["kind"] == "model"]
    baselines = [e for e in ranked if e["kind"] == "baseline"]
    if not models:
        return "No model was evaluated, only baselines."
    best, rival, articles = models[0], baselines[0], evaluation["split"]["test_articles"]
    text = (
        f"The best model is {best['name']}: cosine {best['cosine']['mean']:.4f} with the true next vector on "
        f"{articles:,} articles it never saw{'' if articles >= FEW_ARTICLES else ', too few to trust the order'}. "
    )
    gain = best.get("gain")
    if gain is not None:
        side = "ahead of" if gain["mean"] > 0 else "behind"
        text += (
            f"It is {side} the best baseline, {rival['name']}, by {abs(gain['mean']):.4f} "
            f"(95 % interval of the difference {gain['low']:+.4f} to {gain['high']:+.4f}). "
        )
    closer = ", ".join(e["name"] for e in models if e["margin"]["mean"] < 0)
    if closer:
        last = f"Predictions of {closer} are closer to the last chunk read than to the next one (margin below zero)."
    else:
        last = "Predictions are closer to the true next chunk than to the last one read (margin above zero)."
    return text + last
