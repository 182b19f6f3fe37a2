"""The promotion gate, and the tables as text and Markdown."""

import copy
import json
from dataclasses import asdict

import pytest

from lvm.evaluate.evaluation import Evaluation, gate_word, judge
from lvm.evaluate.leaderboard import efficiency, example_text, leaderboard, markdown_page, ranking, tables
from lvm.evaluate.metrics import Spread
from lvm.evaluate.table import Table, as_markdown, as_text
from tests.unit.evaluate.conftest import found, made_entry

BASELINES = [
    made_entry("passthrough", 0.40, "baseline", mrr=0.45, r10=0.7),
    made_entry("ridge", 0.55, "baseline", mrr=0.3, r10=0.95),
]
GOOD = {"mrr": 0.5, "r10": 0.96}


def results(cosine: float = 0.58, **changes: object) -> dict[str, bool | None]:
    gate = judge(made_entry("amn", cosine, **{**GOOD, **changes}), BASELINES)
    return {c["name"]: c["passed"] for c in gate["checks"]}


def test_gate_passes_what_meets_all_conditions() -> None:
    gate = judge(made_entry("amn", 0.58, **GOOD, ood={"recipes": found(0.2)}), BASELINES)
    assert gate["passed"]
    assert [c["passed"] for c in gate["checks"]] == [True] * 5
    assert gate_word(gate) == "pass"


def test_gate_does_not_ask_for_a_cosine_that_only_one_codec_reaches() -> None:
    low = [made_entry("ridge", 0.30, "baseline")]
    assert judge(made_entry("amn", 0.31, **GOOD, val_cosine=0.31), low)["passed"]


def test_gate_says_not_measured_where_there_was_no_foreign_text() -> None:
    gate = judge(made_entry("amn", 0.58, **GOOD), BASELINES)
    assert gate["passed"]
    assert gate_word(gate) == "pass (out-of-domain cosine not measured)"


def test_gate_fails_each_condition_by_itself() -> None:
    slow = [{"batch": 1, "mean_ms": 50.0}]
    assert failed() == []
    assert failed(cosine=0.55) == ["cosine"]
    assert failed(mrr=0.45) == ["MRR in its article"]
    assert failed(r10=0.95) == ["R@10 in the pool"]
    assert failed(ood={"recipes": found(0.9), "dialogue": found(0.15)}) == ["out-of-domain cosine"]
    assert failed(latency=slow) == ["inference"]


def failed(**changes: object) -> list[str]:
    return [name for name, passed in results(**changes).items() if passed is False]  # type: ignore[arg-type]


def test_gate_names_the_baselines_that_were_not_beaten() -> None:
    gate = judge(made_entry("lstm", 0.52, **GOOD), BASELINES)
    assert not gate["passed"]
    assert gate_word(gate) == "fail: cosine"
    assert gate["checks"][0]["reason"] == "0.5200 on test articles does not beat ridge (0.5500)"


def test_gate_says_when_the_lead_may_be_chance() -> None:
    entry = made_entry("amn", 0.58, **GOOD, gain={"mean": 0.03, "low": -0.01, "high": 0.07})
    assert judge(entry, BASELINES)["checks"][0]["reason"] == (
        "0.5800 on test articles beats all 2 baselines; ahead of the best by +0.0300 [-0.0100, +0.0700], "
        "an interval that reaches zero"
    )


def test_leaderboard_is_ordered_by_cosine_and_marks_models(evaluation: Evaluation) -> None:
    assert [e["name"] for e in ranking(evaluation)] == ["amn", "ridge", "lstm", "passthrough"]
    board = leaderboard(evaluation)
    assert [row[1] for row in board.rows] == ["amn", "ridge", "lstm", "passthrough"]
    assert [row[-1] for row in board.rows] == ["pass", "baseline", "fail", "baseline"]
    assert board.emphasised == {0, 2}
    assert board.rows[0][2:5] == ("0.5800", "[0.5600, 0.6000]", "-0.0500")


def test_printed_leaderboard_fits_a_terminal(evaluation: Evaluation) -> None:
    evaluation["entries"][0]["name"] = "transformer-optimized"
    table = as_text(leaderboard(evaluation)).splitlines()[1:-1]
    assert max(len(line) for line in table) <= 110


def test_with_seeds_the_cosine_over_them_stands_in_the_leaderboard(evaluation: Evaluation) -> None:
    amn = ranking(evaluation)[0]
    amn["name"] = "transformer-optimized"
    spread = asdict(Spread.of([0.58, 0.57, 0.575]))
    amn["seeds"] = {"cosine": spread, "val_cosine": spread, "in_pool_r10": spread}
    board = leaderboard(evaluation)
    assert board.headers[5] == "over seeds"
    assert [row[5] for row in board.rows] == ["0.5750 ±0.0050", "-", "-", "-"]
    assert max(len(line) for line in as_text(board).splitlines()[1:-1]) <= 115
    (seeds,) = [t for t in tables(evaluation) if t.title == "Over seeds"]
    assert seeds.rows == (
        ("transformer-optimized", "3", "0.5750 ±0.0050", "0.5750 ±0.0050", "-", "0.5750 ±0.0050"),
    )


def test_every_table_has_as_many_cells_as_headers(evaluation: Evaluation) -> None:
    for entry in evaluation["entries"]:
        entry["ood"] = {"recipes": found(0.3), "stories": {**found(0.4), "mrr": None}}
    made = tables(evaluation)
    assert [t.title for t in made] == [
        "Leaderboard",
        "Predicted vectors",
        "Finding the true next chunk",
        "Text",
        "Out of domain",
        "Controls",
        "Latency",
        "Size and efficiency",
        "Promotion gate",
    ]
    for table in made:
        assert {len(row) for row in table.rows} == {len(table.headers)}
    assert made[2].rows[-1][:3] == ("(random order)", "0.080", "0.400")


def test_what_was_not_measured_is_a_dash(evaluation: Evaluation) -> None:
    for entry in evaluation["entries"]:
        entry["in_article"] = dict.fromkeys(entry["in_article"]) | {"windows": 0}
        entry["peak_bytes"] = None
    titles = [t.title for t in tables(evaluation)]
    assert "Out of domain" not in titles
    assert leaderboard(evaluation).rows[0][5] == "-"
    assert "0 windows have more than one candidate, none on average" in tables(evaluation)[2].note


def test_models_that_began_as_bundled_ones_are_named(evaluation: Evaluation) -> None:
    assert "bundled" not in leaderboard(evaluation).note
    amn = next(e for e in evaluation["entries"] if e["name"] == "amn")
    amn["details"]["config"] = {"bundled": "amn-20260101-0c"}
    assert leaderboard(evaluation).note.endswith("Started from a bundled model, trained on Wikipedia: amn.")


def test_efficiency_is_cosine_per_millisecond_times_a_thousand() -> None:
    assert efficiency(made_entry("amn", 0.58)) == pytest.approx(0.58 / 0.5 * 1000)


def test_text_table_is_aligned_with_numbers_to_the_right() -> None:
    table = Table("T", ("name", "count"), (("a", "1"), ("long name", "1,000")), "note")
    assert as_text(table).splitlines() == [
        "T",
        "name       count",
        "a              1",
        "long name  1,000",
        "note",
    ]


def test_markdown_table_escapes_bars_and_bolds_models() -> None:
    table = Table("T", ("name", "value"), (("a|b", "1.5"), ("c", "2")), emphasised=frozenset({0}))
    assert as_markdown(table).splitlines() == [
        "## T",
        "",
        "| name | value |",
        "| --- | ---: |",
        "| **a\\|b** | 1.5 |",
        "| c | 2 |",
    ]


def test_markdown_page_holds_every_table_and_survives_json(evaluation: Evaluation) -> None:
    page = markdown_page(json.loads(json.dumps(evaluation)))
    assert page == markdown_page(copy.deepcopy(evaluation))
    assert page.count("\n## ") == len(tables(evaluation))
    assert "codec fake (feedfacefeedface)" in page.casefold()


def test_example_shows_context_truth_and_every_text_with_its_source(evaluation: Evaluation) -> None:
    lines = example_text(evaluation["examples"][0], 1).splitlines()
    assert lines[0] == "Example 1: Bridges & <b>fords</b>"
    assert lines[1:6] == [f"  context {i + 1}: context chunk {i} <script>" for i in range(5)]
    assert lines[6] == "  true next: the true next chunk | with a bar"
    assert lines[7] == "  amn            said by amn <i>"
    assert lines[8].strip() == "written; cosine of the vector to the true next +0.581, of the text +0.444"
    assert lines[9] == "  lstm, snapped  said by lstm"
    assert lines[10].strip().startswith("found in the corpus; ")
    assert lines[11].strip() == "refused: word salad <u> (not language: -3.10 nats per character < -2.60)"
    assert lines[12] == "  passthrough    (empty)"
