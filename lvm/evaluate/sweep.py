"""Report of a sweep: the leaderboard of architectures and an HTML page with plots, from the table of trials alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, TypedDict

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from lvm.evaluate.metrics import Interval
from lvm.evaluate.report import STYLE, figure_card, section, svg_of, table_of, whole_page
from lvm.evaluate.table import Table, table_of_columns

STATES = ("finished", "stopped early", "out of time", "failed")


class Trial(TypedDict):
    """One row of the table of trials."""

    number: int
    model: str
    context: int
    learning_rate: float
    info_nce_share: float
    sizes: str
    """JSON object."""
    parameters: int | None
    val_cosine: float | None
    """Of the best epoch."""
    gain: float | None
    """How much higher it is than that of the model it started from."""
    val_mrr: float | None
    """Mean reciprocal rank in the article, of the same epoch."""
    epochs: int
    seconds: float
    state: str
    """One of STATES."""
    note: str


_SETTINGS: dict[str, Callable[[Trial], str]] = {
    "context": lambda t: str(t["context"]),
    "learning rate": lambda t: f"{t['learning_rate']:.1e}",
    "InfoNCE": lambda t: f"{t['info_nce_share']:g}",
    "sizes": lambda t: ", ".join(f"{k} {v}" for k, v in json.loads(t["sizes"]).items()),
}
"""Columns of a trial's settings."""


def scored(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with a val cosine, best first."""
    return sorted((t for t in trials if t["val_cosine"] is not None), key=lambda t: -(t["val_cosine"] or 0.0))


def best_of_each(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The best trial of each architecture, best first."""
    best: dict[str, Trial] = {}
    for trial in scored(trials):
        best.setdefault(trial["model"], trial)
    return best


def leaderboard(trials: Sequence[Trial], intervals: Mapping[int, Interval]) -> Table:
    """Architectures by their best trial. intervals: of the val cosine, by trial number."""
    best = best_of_each(trials)
    places = {model: str(place) for place, model in enumerate(best, 1)}
    values = {m: [t["val_cosine"] or 0.0 for t in scored(trials) if t["model"] == m] for m in best}

    def interval(trial: Trial) -> str:
        known = intervals.get(trial["number"])
        return "" if known is None else f"[{known.low:.4f}, {known.high:.4f}]"

    columns: dict[str, Callable[[Trial], str]] = {
        "#": lambda t: places[t["model"]],
        "architecture": lambda t: t["model"],
        "val cosine": lambda t: f"{t['val_cosine']:.4f}",
        "95 % interval": interval,
        "gain": lambda t: _known(t["gain"], "+.4f"),
        "MRR": lambda t: _known(t["val_mrr"], ".4f"),
        "median trial": lambda t: f"{np.median(values[t['model']]):.4f}",
        "trials": lambda t: str(len(values[t["model"]])),
        **_SETTINGS,
        "parameters": lambda t: f"{t['parameters']:,}",
        "seconds": lambda t: f"{t['seconds']:.0f}",
    }
    note = (
        "Val cosine: mean over the same validation targets for every trial, at its best epoch; the interval "
        "resamples articles. Gain: over the model that the trial started from. MRR: mean reciprocal rank of the next "
        "chunk in its article, by the predicted vector itself; no trial has a rank head. The best of many trials is "
        "biased upwards: compare it with the test articles, which no trial has seen."
    )
    every = frozenset(range(len(best)))
    return table_of_columns("Architectures by their best trial", list(best.values()), columns, note, every)


def _known(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def compare(trials: Sequence[Trial], key: str, name: str) -> Table:
    """Effect of one setting: mean differences of the val cosine and the MRR to the architecture's means, with normal
    95 % intervals over trials. Learning rates are compared by thirds of the trials."""
    rows: Sequence[Mapping[str, Any]] = scored(trials)
    cuts = np.quantile([row[key] for row in rows], (1 / 3, 2 / 3)) if key == "learning_rate" else ()
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[key]):
        groups.setdefault(int(np.searchsorted(cuts, row[key])) if len(cuts) else row[key], []).append(row)
    columns = [_differences(rows, list(groups.values()), measure) for measure in ("val_cosine", "val_mrr")]
    cells = []
    for number, own in enumerate(groups.values()):
        first, last = (f"{own[at][key]:.2g}" for at in (0, -1))
        label = first if first == last else f"{first} to {last}"
        cells.append((label, str(len(own)), *(column[number] for column in columns)))
    return Table(
        f"By {name}",
        (name, "trials", "val cosine", "MRR"),
        tuple(cells),
        "Mean difference to the architecture's mean, ± 95 %. Includes trials stopped early, so a setting that "
        "converges slowly looks worse than it is; a trial that does not gain has the score of its start.",
    )


def _differences(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Mapping[str, Any]]], measure: str
) -> list[str]:
    """For each group, the mean of the measure less the architecture's mean, with its interval; "" if not measured."""
    by_model: dict[str, list[float]] = {}
    for row in rows:
        if row[measure] is not None:
            by_model.setdefault(row["model"], []).append(row[measure])
    means = {model: float(np.mean(values)) for model, values in by_model.items()}
    cells = []
    for own in groups:
        found = [row[measure] - means[row["model"]] for row in own if row[measure] is not None]
        spread = f" ± {1.96 * np.std(found, ddof=1) / len(found) ** 0.5:.4f}" if len(found) > 1 else ""
        cells.append(f"{np.mean(found):+.4f}{spread}" if found else "")
    return cells


# --------------------------------------------------------------------------------------------------- plots


def colours_of(trials: Sequence[Trial]) -> dict[str, Any]:
    """A colour for each architecture, by name."""
    models = sorted({t["model"] for t in trials})
    palette = matplotlib.colormaps["tab20"]
    return {model: palette(i % 20) for i, model in enumerate(models)}


def plot_leaderboard(trials: Sequence[Trial], intervals: Mapping[int, Interval]) -> str:
    """Every trial as a dot, the best of each architecture with its interval."""
    best, colours = best_of_each(trials), colours_of(trials)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 0.8 + 0.3 * len(best)), layout="constrained")
        axes = figure.add_subplot()
        for place, (model, top) in enumerate(reversed(best.items())):
            values = [t["val_cosine"] or 0.0 for t in scored(trials) if t["model"] == model]
            axes.plot(values, [place] * len(values), "o", color=colours[model], alpha=0.4, markersize=4)
            interval = intervals.get(top["number"])
            if interval is not None:
                axes.plot([interval.low, interval.high], [place, place], color="#202124", linewidth=1.2)
        axes.set_yticks(range(len(best)), list(reversed(best)))
        axes.set_xlabel("val cosine; line: 95 % interval of the best")
        return svg_of(figure, "Val cosine of every trial by architecture", "board")


def plot_parallel(trials: Sequence[Trial]) -> str:
    """Parallel coordinates: one line per trial across its settings to its val cosine."""
    rows, colours = scored(trials), colours_of(trials)
    models = list(reversed(best_of_each(trials)))
    axes_of: list[tuple[str, list[float], list[tuple[float, str]]]] = [
        (
            "architecture",
            [float(models.index(t["model"])) for t in rows],
            [(float(i), m) for i, m in enumerate(models)],
        ),
        ("context", [float(t["context"]) for t in rows], []),
        ("log10 learning rate", [float(np.log10(t["learning_rate"])) for t in rows], []),
        ("InfoNCE share", [t["info_nce_share"] for t in rows], []),
        ("log10 parameters", [float(np.log10(t["parameters"] or 1)) for t in rows], []),
        ("val cosine", [float(t["val_cosine"] or 0.0) for t in rows], []),
        ("MRR", [float(t["val_mrr"] or 0.0) for t in rows], []),
    ]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        scaled = []
        for place, (name, values, ticks) in enumerate(axes_of):
            low, high = (min(values), max(values)) if values else (0.0, 1.0)
            span = (high - low) or 1.0
            scaled.append([(v - low) / span if high > low else 0.5 for v in values])
            axes.axvline(place, color="#9AA0A6", linewidth=0.8)
            marks = ticks or [(low, f"{low:.3g}"), (high, f"{high:.3g}")]
            for value, text in marks:
                height = (value - low) / span if high > low else 0.5
                axes.annotate(
                    text, (place, height), (4, 0), textcoords="offset points", fontsize=8, va="center"
                )
            axes.annotate(name, (place, 1.06), ha="center", fontsize=9, annotation_clip=False)
        # The best on top.
        for number in range(len(rows) - 1, -1, -1):
            axes.plot(
                range(len(scaled)),
                [column[number] for column in scaled],
                color=colours[rows[number]["model"]],
                alpha=0.9 if number < 5 else 0.35,
                linewidth=2.0 if number < 5 else 1.0,
            )
        axes.set_ylim(-0.05, 1.12)
        axes.set_xlim(-0.1, len(axes_of) - 0.6)
        axes.axis("off")
        drawn = svg_of(figure, "Settings and val cosine of every trial", "parallel")
        return drawn.replace("<svg", '<svg style="max-width: 100%"', 1)


def plot_cost(trials: Sequence[Trial], key: str, label: str) -> str:
    """Val cosine against a trial's cost, `seconds` or `parameters`, with the Pareto front."""
    rows, colours = scored(trials), colours_of(trials)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.8), layout="constrained")
        axes = figure.add_subplot()
        points = []
        for model in sorted({t["model"] for t in rows}):
            own: list[Mapping[str, Any]] = [t for t in rows if t["model"] == model]
            x, y = [max(float(t[key]), 1e-3) for t in own], [float(t["val_cosine"]) for t in own]
            axes.plot(x, y, "o", color=colours[model], markersize=4, label=model)
            points += list(zip(x, y, strict=True))
        front: list[tuple[float, float]] = []
        for x_value, y_value in sorted(points, key=lambda p: (p[0], -p[1])):
            if not front or y_value > front[-1][1]:
                front.append((x_value, y_value))
        axes.plot(*zip(*front, strict=True), color="#202124", linewidth=1.0, drawstyle="steps-post")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("val cosine")
        axes.legend(fontsize=7, ncols=2)
        return svg_of(figure, f"Val cosine against {label}", f"cost-{key}")


# ---------------------------------------------------------------------------------------------------- page


def html_page(
    trials: Sequence[Trial], intervals: Mapping[int, Interval], title: str, lines: Mapping[str, str]
) -> str:
    """The report page. lines: settings and provenance, by name."""
    states = ", ".join(
        f"{sum(t['state'] == s for t in trials)} {s}" for s in STATES if any(t["state"] == s for t in trials)
    )
    heading = f'<h1>{escape(title)}</h1><p class="soft">{len(trials)} trials: {escape(states)}</p>'
    if not scored(trials):
        return whole_page(title, [heading, section("Result", "<p>No trial has a score yet.</p>")])
    board = leaderboard(trials, intervals)
    failed = [t for t in trials if t["state"] == "failed"]
    parts = [
        heading,
        section(board.title, f"<figure>{plot_leaderboard(trials, intervals)}</figure>{table_of(board)}"),
        section("Every trial across its settings", f"<figure>{plot_parallel(trials)}</figure>"),
        '<div class="grid">'
        + figure_card(
            "Quality and time", plot_cost(trials, "seconds", "seconds of training"), "Line: Pareto front."
        )
        + figure_card(
            "Quality and size", plot_cost(trials, "parameters", "parameters"), "Line: Pareto front."
        )
        + "</div>",
        *(
            section(table.title, table_of(table))
            for table in (
                compare(trials, "context", "context"),
                compare(trials, "learning_rate", "learning rate"),
                compare(trials, "info_nce_share", "InfoNCE share"),
                *([_failures(failed)] if failed else []),
                _all(trials),
            )
        ),
        section(
            "Settings",
            "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in lines.items()) + "</dl>",
        ),
    ]
    return whole_page(title, parts)


def _failures(failed: Sequence[Trial]) -> Table:
    columns: dict[str, Callable[[Trial], str]] = {
        "trial": lambda t: str(t["number"]),
        "architecture": lambda t: t["model"],
        "sizes": lambda t: t["sizes"],
        "why": lambda t: t["note"],
    }
    return table_of_columns("Failed", failed, columns)


def _all(trials: Sequence[Trial]) -> Table:
    columns: dict[str, Callable[[Trial], str]] = {
        "trial": lambda t: str(t["number"]),
        "architecture": lambda t: t["model"],
        "val cosine": lambda t: f"{t['val_cosine']:.4f}",
        "gain": lambda t: _known(t["gain"], "+.4f"),
        "MRR": lambda t: _known(t["val_mrr"], ".4f"),
        **_SETTINGS,
        "parameters": lambda t: f"{t['parameters'] or 0:,}",
        "epochs": lambda t: str(t["epochs"]),
        "seconds": lambda t: f"{t['seconds']:.0f}",
        "state": lambda t: t["state"],
    }
    return table_of_columns("All trials, best first", scored(trials), columns)
