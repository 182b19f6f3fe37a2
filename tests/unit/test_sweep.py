"""The sweep without Ray: what is drawn, and what is made of a table of trials."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.sweep import INFO_NCE_SHARES, RATES, SEARCHED, SweepSettings, draw_trials, parse_contexts, rows_of
from lvm.errors import InputError
from lvm.evaluate.metrics import Interval
from lvm.evaluate.sweep import Trial, best_of_each, compare, html_page, leaderboard
from lvm.models import MODELS, SPACES, build
from lvm.predict.runs import TrainRun
from lvm.predict.training import FAST
from lvm.vectors.sequences import WindowSettings

SETTINGS = SweepSettings(60, SEARCHED, (5, 10), "fast", 4, 1000, 0)


def trial(number: int, model: str, cosine: float | None, **changes: Any) -> Trial:
    row: Any = {
        "number": number,
        "model": model,
        "context": 5,
        "learning_rate": 1e-3,
        "info_nce_share": 0.0,
        "sizes": json.dumps({"width": 256}),
        "parameters": 1000 * (number + 1),
        "val_cosine": cosine,
        "gain": None if cosine is None else 0.01,
        "val_mrr": None if cosine is None else cosine / 2,
        "epochs": 3,
        "seconds": 10.0 + number,
        "state": "finished" if cosine is not None else "failed",
        "note": "" if cosine is not None else "out of <memory>",
    }
    return {**row, **changes}


TRIALS = [
    trial(0, "gru", 0.30, context=5),
    trial(1, "s4", 0.35, context=10),
    trial(2, "gru", 0.40, context=10),
    trial(3, "s4", None),
    trial(4, "s4", 0.25, context=5),
]


# ---- what is drawn


def test_architectures_take_turns_and_draw_from_their_space() -> None:
    trials = draw_trials(SETTINGS)
    assert Counter(t["model"] for t in trials) == dict.fromkeys(SEARCHED, 4)
    assert [t["model"] for t in trials[: len(SEARCHED)]] == list(SEARCHED)
    for drawn in trials:
        assert set(drawn["sizes"]) == set(SPACES[drawn["model"]])
        assert all(v in SPACES[drawn["model"]][k] for k, v in drawn["sizes"].items())
        assert RATES[0] <= drawn["learning_rate"] <= RATES[1]
        assert drawn["context"] in (5, 10)
        assert drawn["info_nce_share"] in INFO_NCE_SHARES
        if hasattr(MODELS[drawn["model"]], "loss"):
            assert drawn["info_nce_share"] == 0.0
    assert len({json.dumps(t) for t in trials}) == 60


def test_the_seed_alone_decides() -> None:
    from dataclasses import replace

    assert draw_trials(SETTINGS) == draw_trials(SETTINGS)
    assert draw_trials(replace(SETTINGS, seed=1)) != draw_trials(SETTINGS)
    # A longer sweep begins with the same trials.
    assert draw_trials(replace(SETTINGS, trials=90))[:60] == draw_trials(SETTINGS)


@pytest.mark.parametrize("name", MODELS)
def test_every_size_of_a_space_can_be_built(name: str) -> None:
    import itertools

    import torch

    assert SPACES[name]
    with torch.device("meta"):
        for values in itertools.product(*SPACES[name].values()):
            build(name, dict(zip(SPACES[name], values, strict=True)))


def test_a_trial_that_the_scheduler_ended_did_not_run_out_of_time() -> None:
    ends = {
        "finished": {"best_val_cosine": 0.3, "epoch": 3, "done": False},
        "stopped early": {"best_val_cosine": 0.2, "epoch": 1, "done": True},
        "out of time": {"best_val_cosine": 0.2, "epoch": 1, "done": False},
    }
    settings = {"model": "amn", "context": 5, "learning_rate": 1e-3, "info_nce_share": 0.0, "sizes": {}}
    trials = [{"number": n, **settings} for n in range(len(ends) + 1)]
    run = TrainRun("amn", Path("vectors"), "0", WindowSettings(), FAST, 0, {"dim": 96})
    results = [
        SimpleNamespace(config={"trial": {"number": n}}, metrics=metrics, error=None)
        for n, metrics in enumerate(ends.values())
    ]
    rows = rows_of(results, trials, [run] * len(trials), epochs=3)
    # The last never began.
    assert [r["state"] for r in rows] == [*ends, "out of time"]


def test_contexts_are_numbers_by_comma() -> None:
    assert parse_contexts("20, 5,5") == (5, 20)
    with pytest.raises(InputError, match="'5,x': expected comma-separated integers"):
        parse_contexts("5,x")
    with pytest.raises(InputError, match="1 to 64, got 0"):
        parse_contexts("0,5")


# ---- what is made of the trials


def test_the_leaderboard_has_each_architectures_best_trial_first() -> None:
    assert [(m, t["number"]) for m, t in best_of_each(TRIALS).items()] == [("gru", 2), ("s4", 1)]
    board = leaderboard(TRIALS, {2: Interval(0.4, 0.39, 0.41, 7)})
    first, second = board.rows
    assert first[:9] == ("1", "gru", "0.4000", "[0.3900, 0.4100]", "+0.0100", "0.2000", "0.3500", "2", "10")
    assert second[:9] == ("2", "s4", "0.3500", "", "+0.0100", "0.1750", "0.3000", "2", "10")


def test_a_setting_is_compared_within_its_architecture() -> None:
    table = compare(TRIALS, "context", "context")
    assert table.rows == (
        ("5", "2", "-0.0500 ± 0.0000", "-0.0250 ± 0.0000"),
        ("10", "2", "+0.0500 ± 0.0000", "+0.0250 ± 0.0000"),
    )


def test_learning_rates_are_compared_by_thirds() -> None:
    rates = (1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4)
    trials = [trial(n, "gru", 0.3 + 0.01 * (n // 2), learning_rate=rate) for n, rate in enumerate(rates)]
    trials[5]["val_mrr"] = None  # of a sweep before ranks were measured
    rows = compare(trials, "learning_rate", "learning rate").rows
    assert [row[:2] for row in rows] == [
        ("0.0001 to 0.0002", "2"),
        ("0.0003 to 0.0004", "2"),
        ("0.0005 to 0.0006", "2"),
    ]
    assert [row[2][:7] for row in rows] == ["-0.0100", "+0.0000", "+0.0100"]
    assert rows[2][3] == "+0.0060"


def test_the_page_shows_every_trial_and_asks_nothing_of_a_network() -> None:
    page = html_page(TRIALS, {2: Interval(0.4, 0.39, 0.41, 7)}, "A <sweep>", {"seed": "0"})
    assert "A &lt;sweep&gt;" in page
    assert "5 trials: 4 finished, 1 failed" in page
    assert "out of &lt;memory&gt;" in page
    for title in ("Architectures by their best trial", "Every trial across its settings", "Quality and time"):
        assert title in page
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#)', page.replace('xmlns:xlink="http', ""))
    assert "default-src 'none'" in page
    assert len(re.findall(r'id="parallel-line2d_\d+"', page)) >= 4


def test_the_page_of_a_sweep_without_a_score_says_so() -> None:
    page = html_page([trial(0, "gru", None)], {}, "Sweep", {})
    assert "No trial has a score yet" in page
