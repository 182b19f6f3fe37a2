"""report.html: the evaluation as one self-contained page with SVG plots, made from the Evaluation record alone.

Its content security policy forbids any request.
"""

import io
import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lvm.evaluate.evaluation import Entry, Evaluation, Example, ExampleText, gate_word
from lvm.evaluate.leaderboard import FORMS, SOURCES, headline, ranking, tables
from lvm.evaluate.metrics import HISTOGRAM_EDGES
from lvm.evaluate.table import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#117733")
"""Of models, in order of name. The first six are Okabe and Ito's, safe for colour-blind readers."""
GREY = "#8A8F98"
"""Of baselines."""
WIDTH_IN = 4.8
"""Width of a plot in inches; at this size its text is readable on a phone."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "latent",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9AA0A6",
    "axes.labelcolor": "#3C4043",
    "xtick.color": "#3C4043",
    "ytick.color": "#3C4043",
    "axes.grid": True,
    "grid.color": "#E8EAED",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


# --------------------------------------------------------------------------------------------------- plots


def plot_leaderboard(evaluation: Evaluation) -> str:
    """Test cosine of every entry as a bar from zero, with its 95 % interval."""
    ranked = ranking(evaluation)[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.6 + 0.34 * len(ranked)), layout="constrained")
        axes = figure.add_subplot()
        means = [e["cosine"]["mean"] for e in ranked]
        # The mean may lie slightly outside its resampled interval; error bars must not be negative.
        below = [max(0.0, e["cosine"]["mean"] - e["cosine"]["low"]) for e in ranked]
        above = [max(0.0, e["cosine"]["high"] - e["cosine"]["mean"]) for e in ranked]
        colours = _colours(evaluation)
        axes.barh(
            [e["name"] for e in ranked],
            means,
            xerr=[below, above],
            color=[colours.get(e["name"], GREY) for e in ranked],
            error_kw={"ecolor": "#202124", "capsize": 3, "elinewidth": 1},
            height=0.66,
        )
        for place, entry in enumerate(ranked):
            end = max(entry["cosine"]["high"], 0.0)
            axes.annotate(
                f"{entry['cosine']['mean']:.4f}",
                (end, place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        low, high = min(0.0, *(e["cosine"]["low"] for e in ranked)), max(e["cosine"]["high"] for e in ranked)
        axes.set_xlim(low, max(high, 0.05) * 1.2)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("cosine with the true next vector, 95 % interval")
        return svg_of(figure, "Bars of the test cosine of every model and baseline", "bars")


def plot_distributions(evaluation: Evaluation) -> str:
    """Share of test windows by cosine, one line per entry."""
    centres = (HISTOGRAM_EDGES[:-1] + HISTOGRAM_EDGES[1:]) / 2
    colours = _colours(evaluation)
    shown = [e for e in ranking(evaluation) if e["kind"] == "model" or e["name"] in ("passthrough", "ridge")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for entry in shown:
            total = max(sum(entry["histogram"]), 1)
            baseline = entry["kind"] == "baseline"
            axes.plot(
                centres,
                [100 * n / total for n in entry["histogram"]],
                color=colours.get(entry["name"], GREY),
                linestyle={"passthrough": ":", "ridge": "--"}[entry["name"]] if baseline else "-",
                linewidth=1.6,
                label=entry["name"],
            )
        filled = [
            i for e in shown for i, n in enumerate(e["histogram"]) if n * 1000 >= max(sum(e["histogram"]), 1)
        ]
        if filled:
            axes.set_xlim(HISTOGRAM_EDGES[min(filled)], HISTOGRAM_EDGES[max(filled) + 1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cosine with the true next vector")
        axes.set_ylabel("% of test windows")
        axes.legend(fontsize=9)
        return svg_of(figure, "Distribution of the cosine over test windows", "distribution")


def plot_curves(evaluation: Evaluation) -> str | None:
    """Training and validation loss by epoch, one panel per model; None when no model has a curve."""
    curves = {
        e["name"]: e["details"]["curve"]
        for e in evaluation["entries"]
        if e["kind"] == "model" and e["details"].get("curve")
    }
    if not curves:
        return None
    rows = (len(curves) + 1) // 2
    colours = _colours(evaluation)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.4 + 1.9 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, sharey=True, squeeze=False).flatten()
        for panel, (name, curve) in zip(panels, curves.items(), strict=False):
            epochs = [point["epoch"] for point in curve]
            for key, line, label in (("train_loss", "--", "training"), ("val_loss", "-", "validation")):
                losses = [point.get(key) for point in curve]
                if any(v is not None for v in losses):
                    values = [float("nan") if v is None else v for v in losses]
                    marker = "o" if len(epochs) < 3 else None
                    panel.plot(epochs, values, line, color=colours[name], label=label, marker=marker)
            panel.set_title(name, fontsize=10)
            panel.set_xticks(epochs if len(epochs) < 8 else epochs[:: len(epochs) // 5])
        for panel in panels[len(curves) :]:
            panel.set_visible(False)
        panels[0].legend(fontsize=8)
        figure.supxlabel("epoch", fontsize=10, color="#3C4043")
        figure.supylabel("loss", fontsize=10, color="#3C4043")
        return svg_of(figure, "Training and validation loss by epoch", "curves")


def plot_attention(entry: Entry) -> str:
    """Attention by position in the context: mean as a bar, 10th to 90th percentile as a line."""
    weights = entry.get("attention", [])
    places = range(1, len(weights) + 1)
    labels = [str(p) for p in places]
    if len(labels) > 1:
        labels[0], labels[-1] = "1\noldest", f"{len(labels)}\nlast"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 3.0), layout="constrained")
        axes = figure.add_subplot()
        means = [w["mean"] for w in weights]
        axes.bar(labels, means, color=COLOURS[0], width=0.6)
        axes.vlines(labels, [w["p10"] for w in weights], [w["p90"] for w in weights], color="#202124")
        even = 1 / max(len(weights), 1)
        axes.axhline(even, color=GREY, linestyle="--", linewidth=1, label=f"even: {even:.2f}")
        for label, weight in zip(labels, weights, strict=True):
            axes.annotate(
                f"{weight['mean']:.3f}",
                (label, weight["p90"]),
                (0, 3),
                textcoords="offset points",
                ha="center",
            )
        axes.set_ylim(0, max(w["p90"] for w in weights) * 1.25)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("position in the context")
        axes.set_ylabel("attention")
        axes.legend(fontsize=9, loc="upper left")
        return svg_of(figure, f"Attention of {entry['name']} over the context", f"attention-{entry['name']}")


def _colours(evaluation: Evaluation) -> dict[str, str]:
    models = sorted(e["name"] for e in evaluation["entries"] if e["kind"] == "model")
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(models)}


def svg_of(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an <svg> element whose ids start with `prefix`, to be unique in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # The metadata has the time of drawing; the same record must give the same page.
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="', f'id="{prefix}-', drawn)
    drawn = re.sub(r'href="#', f'href="#{prefix}-', drawn)
    drawn = re.sub(r"url\(#", f"url(#{prefix}-", drawn)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


# ---------------------------------------------------------------------------------------------------- page

_CSS = """
:root { color-scheme: light; --ink: #202124; --soft: #5f6368; --line: #e3e5e8; --paper: #fff; --wash: #f6f7f9;
  --accent: #0b57a4; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 1.2rem; margin: 0 0 10px; }
h3 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 0 0 10px; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
section, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 16px 0 0; }
.lead { font-size: 1.06rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px;
  margin: 16px 0 0; }
.grid .card { margin: 0; }
figure { margin: 0; }
svg { width: 100%; height: auto; max-width: 580px; display: block; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; }
.number { text-align: right; }
tr.model td.name { font-weight: 600; color: var(--accent); }
.scroll + p { margin: 10px 0 0; }
.pass { color: #0a6b3d; font-weight: 600; }
.fail { color: #a8201a; font-weight: 600; }
ol.context { margin: 0 0 10px; padding-left: 1.5em; color: var(--soft); }
.truth { border-left: 4px solid #0a6b3d; padding: 4px 12px; margin: 0 0 12px; background: #f1f8f4; }
.decoded { border-top: 1px solid var(--line); padding: 8px 0; overflow-wrap: anywhere; }
.decoded p { margin: 2px 0 0; }
.decoded .meta { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .86rem; color: var(--soft); }
.decoded .meta b { color: var(--accent); }
.source { background: var(--wash); border: 1px solid var(--line); border-radius: 999px; padding: 0 8px; }
.source.refused, .source.corpus { background: #fdf3e1; border-color: #e8cf9f; }
.decoded .extract { color: var(--soft); font-size: .9rem; }
details { margin: 8px 0 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--wash); border: 1px solid var(--line); border-radius: 6px;
  padding: 12px; font-size: .8rem; line-height: 1.4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 12px 10px 40px; }
  section, .card { padding: 14px 12px; }
  h1 { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin: 0 0 8px; }
}
"""


def html_page(evaluation: Evaluation) -> str:
    """The whole page as one string."""
    board, *others = tables(evaluation)
    where = evaluation["provenance"]
    figures = [("Cosine over test windows", plot_distributions(evaluation), "")]
    curves = plot_curves(evaluation)
    if curves is not None:
        figures.append(
            ("Loss while training", curves, "Dashed: training articles. Solid: validation articles.")
        )
    for entry in evaluation["entries"]:
        if entry.get("attention"):
            note = "Bar: mean over test windows. Line: from the 10th to the 90th percentile."
            figures.append((f"Attention of {entry['name']}", plot_attention(entry), note))
    parts = [
        f"<h1>Predicting the next vector: {escape(where['vectors']['source'] or 'evaluation')}</h1>",
        f'<p class="soft">Codec {escape(where["codec"]["name"])} ({escape(where["codec"]["digest"])}), '
        f"{where['vectors']['chunks']:,} chunks of {where['vectors']['articles']:,} articles, "
        f"{escape(evaluation['created'])}</p>",
        section("Result", f'<p class="lead">{escape(headline(evaluation))}</p>' + _gate_lines(evaluation)),
        section(
            board.title,
            f"<figure>{plot_leaderboard(evaluation)}</figure>{table_of(board)}"
            f'<p class="soft">Split: {escape(evaluation["rules"]["split"])} '
            f"Cosine: {escape(evaluation['rules']['cosine'])}</p>",
        ),
        '<div class="grid">' + "".join(figure_card(*figure) for figure in figures) + "</div>",
        *(section(table.title, table_of(table)) for table in others),
        section("Examples", _examples(evaluation)),
        section("Settings and provenance", _provenance(evaluation)),
    ]
    return whole_page("Evaluation of next-vector models", parts)


def whole_page(title: str, parts: Sequence[str]) -> str:
    """A self-contained HTML page; parts: HTML of its body."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _gate_lines(evaluation: Evaluation) -> str:
    lines = []
    for entry in ranking(evaluation):
        if "gate" in entry:
            kind = "pass" if entry["gate"]["passed"] else "fail"
            warning = entry["details"].get("warning")
            line = f'<span class="{kind}">{escape(gate_word(entry["gate"]))}</span>'
            line += f"<br>{escape(warning)}" if warning else ""
            lines.append(f"<dt>{escape(entry['name'])}</dt><dd>{line}</dd>")
    for name, reason in evaluation["split"].get("left_out", {}).items():
        lines.append(f"<dt>{escape(name)}</dt><dd>left out: {escape(reason)}</dd>")
    return f'<p class="soft">Promotion gate</p><dl>{"".join(lines)}</dl>' if lines else ""


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def figure_card(title: str, drawn: str, note: str) -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<div class="card"><h3>{escape(title)}</h3><figure>{drawn}{caption}</figure></div>'


def table_of(table: Table) -> str:
    columns: list[Sequence[str]] = (
        list(zip(*table.rows, strict=True)) if table.rows else [() for _ in table.headers]
    )
    right = [bool(c) and all(re.match(r"[-+<\d\[]|$", cell) for cell in c) for c in columns]
    name = 1 if table.headers[0] == "#" else 0

    def cell(index: int, text: str) -> str:
        kinds = ["number"] if right[index] else ["long"] if len(text) > 40 else []
        kinds += ["name"] if index == name else []
        if table.headers[index] in ("gate", "result") and text in ("pass", "fail"):
            kinds.append(text)
        return f'<td class="{" ".join(kinds)}">{escape(text)}</td>' if kinds else f"<td>{escape(text)}</td>"

    head = "".join(
        f'<th class="number">{escape(h)}</th>' if r else f"<th>{escape(h)}</th>"
        for h, r in zip(table.headers, right, strict=True)
    )
    body = "".join(
        ('<tr class="model">' if i in table.emphasised else "<tr>")
        + "".join(cell(j, text) for j, text in enumerate(row))
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="soft">{escape(table.note)}</p>'
    )


def _examples(evaluation: Evaluation) -> str:
    shown = "".join(_example(e, n) for n, e in enumerate(evaluation["examples"], 1))
    return (
        '<p class="soft">The first windows of the text sample, not picked by hand. "cosine" compares the '
        'decoded vector with the true next one, "of the text" the re-encoded text. Written: by a language '
        "model conditioned on the vector. Found: the chunk of another article nearest to the prediction. "
        "Read back: exactly, from the vector of an actual text. Snapped: moved towards the nearest corpus vectors "
        "before decoding.</p>" + shown
    )


def _example(example: Example, number: int) -> str:
    context = "".join(f"<li>{escape(text)}</li>" for text in example["context"])
    texts = "".join(_decoded_text(d) for d in example["decoded"])
    return (
        f'<div class="card"><h3>{number}. {escape(example["title"])}</h3>'
        f'<p class="soft">Context, oldest first</p><ol class="context">{context}</ol>'
        f'<div class="truth"><span class="soft">True next chunk</span><br>{escape(example["truth"])}</div>'
        f"{texts}</div>"
    )


def _decoded_text(decoded: ExampleText) -> str:
    form = "" if decoded["form"] == "raw" else f", {FORMS[decoded['form']]}"
    refused = "".join(
        f'<p class="extract"><span class="source refused">refused</span> {escape(text)}</p>'
        for text in decoded["refused"]
    )
    why = f"<span>{escape('; '.join(decoded['refusals']))}</span>" if decoded["refusals"] else ""
    return (
        f'<div class="decoded"><div class="meta"><b>{escape(decoded["name"])}{form}</b>'
        f'<span class="source {escape(decoded["source"])}">{escape(SOURCES[decoded["source"]])}</span>'
        f"<span>cosine {decoded['vector_cosine']:.4f}</span>"
        f"<span>of the text {decoded['text_cosine']:.4f}</span>"
        f"{why}</div><p>{escape(decoded['text']) or '<i>(empty)</i>'}</p>{refused}</div>"
    )


def _provenance(evaluation: Evaluation) -> str:
    where, split = evaluation["provenance"], evaluation["split"]
    codec, vectors = where["codec"], where["vectors"]
    models = [e for e in evaluation["entries"] if e["kind"] == "model"]
    windows = ", ".join(f"{name} {n:,}" for name, n in split["windows"].items())
    rows: list[tuple[str, Any]] = [
        ("codec", f"{codec['name']} {codec['digest']}, at most {codec['max_tokens']} tokens per chunk"),
        ("vectors", f"{vectors['directory']}, fingerprint {vectors['fingerprint']}"),
        ("licence of the text", vectors["licence"]),
        ("index", where["index"]["version"]),
        *((f"model {e['name']}", e["details"].get("folder", "")) for e in models),
        ("split", f"seed {split['seed']}; windows {windows}"),
        ("machine", where["machine"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in where["versions"].items())),
        ("evaluation took", ", ".join(f"{k} {v:.1f} s" for k, v in evaluation["seconds"].items())),
    ]
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in rows if v)
    record = {k: evaluation[k] for k in ("schema", "settings", "inputs", "split", "provenance")}
    return (
        f"<dl>{listed}</dl><details><summary>The record (evaluation.json has the rest)</summary>"
        f"<pre>{escape(json.dumps(record, indent=2, ensure_ascii=False))}</pre></details>"
    )
