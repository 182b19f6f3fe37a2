"""The HTML page: whole, well-formed, escaped, and without anything to fetch."""

import re
from html.parser import HTMLParser

from lvm.evaluate.evaluation import Evaluation
from lvm.evaluate.leaderboard import headline
from lvm.evaluate.report import html_page

VOID = {"meta", "br", "link", "img", "hr"}


class Outline(HTMLParser):
    """Open tags, ids and every address the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


def test_page_is_well_formed_and_draws_every_plot(evaluation: Evaluation) -> None:
    found = outline(html_page(evaluation))
    assert found.open == []
    assert found.tags.count("svg") == 4  # bars, distribution, curves, attention
    assert found.tags.count("table") == 8
    assert len(found.ids) == len(set(found.ids))


def test_page_refers_to_nothing_outside_itself(evaluation: Evaluation) -> None:
    page = html_page(evaluation)
    found = outline(page)
    assert all(a.startswith("#") for a in found.addresses)
    assert {a[1:] for a in found.addresses} <= set(found.ids)
    assert not {"script", "link", "iframe", "img"} & set(found.tags)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_corpus_text_is_escaped(evaluation: Evaluation) -> None:
    page = html_page(evaluation)
    assert "<b>fords</b>" not in page
    assert "Bridges &amp; &lt;b&gt;fords&lt;/b&gt;" in page
    assert "context chunk 4 &lt;script&gt;" in page
    assert "wikipedia &lt;test&gt;" in page
    assert "said by amn &lt;i&gt;" in page


def test_examples_show_context_truth_and_each_text_with_its_source(evaluation: Evaluation) -> None:
    text = " ".join(" ".join(outline(html_page(evaluation)).text).split())
    assert all(f"context chunk {i}" in text for i in range(5))
    assert "the true next chunk | with a bar" in text
    assert "cosine 0.5812" in text
    assert "lstm, snapped" in text
    assert "amn written cosine" in text
    assert "lstm, snapped found in the corpus cosine" in text
    assert "refused word salad <u> (not language: -3.10 nats per character < -2.60)" in text
    assert "(empty)" in text


def test_page_without_curves_or_attention_leaves_those_plots_out(evaluation: Evaluation) -> None:
    for entry in evaluation["entries"]:
        entry["details"] = {}
        entry.pop("attention", None)
    assert outline(html_page(evaluation)).tags.count("svg") == 2


def test_page_is_the_same_for_the_same_record(evaluation: Evaluation) -> None:
    assert html_page(evaluation) == html_page(evaluation)


def test_headline_says_who_leads_and_whether_the_margin_is_negative(evaluation: Evaluation) -> None:
    said = headline(evaluation)
    assert "The best model is amn: cosine 0.5800" in said
    assert "ahead of the best baseline, ridge, by 0.0300" in said
    assert "Predictions of amn, lstm are closer to the last chunk read" in said


def test_headline_does_not_hide_a_lost_race(evaluation: Evaluation) -> None:
    evaluation["entries"] = [e for e in evaluation["entries"] if e["name"] != "amn"]
    assert "It is behind the best baseline, ridge, by 0.0300" in headline(evaluation)
    evaluation["entries"] = [e for e in evaluation["entries"] if e["kind"] == "baseline"]
    assert headline(evaluation) == "No model was evaluated, only baselines."
