"""Readers: each format gives the same articles; what is broken is counted or named."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.corpus.inputs import SAMPLE, list_inputs
from lvm.corpus.readers import read_articles
from lvm.corpus.records import BROKEN_SHOWN, Article, ReadReport
from lvm.corpus.wikitext import prose_of
from lvm.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROWS = [
    {"id": "a1", "title": "Tides", "text": "The sea rises.\n\nIt falls again.", "source": "essays"},
    {"id": "a2", "title": "Wells", "text": "A well is dug by hand.", "source": "essays"},
    {"id": "a3", "title": "Kilns", "text": "Clay is fired.\n\nIt hardens.", "source": "essays"},
]
ARTICLES = [Article(r["id"], r["title"], r["text"], r["source"]) for r in ROWS]


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def page(page_id: object, title: str, markup: str, ns: int = 0, extra: str = "", revision: str = "") -> str:
    text = markup.replace("&", "&amp;").replace("<", "&lt;")
    return f"""  <page>
    <title>{title}</title>
    <ns>{ns}</ns>
    <id>{page_id}</id>
    {extra}
    <revision>
      <id>{9000}</id>
      <timestamp>2024-05-06T07:08:09Z</timestamp>
      <contributor><username>Someone</username><id>5</id></contributor>
      {revision}
      <model>wikitext</model>
      <format>text/x-wiki</format>
      <text bytes="{len(text)}" sha1="abc" xml:space="preserve">{text}</text>
      <sha1>abc</sha1>
    </revision>
  </page>
"""


def dump(*pages: str) -> bytes:
    return f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>testwiki</dbname>
    <base>https://example.org</base>
    <generator>MediaWiki</generator>
    <case>first-letter</case>
    <namespaces>
      <namespace key="-2" case="first-letter">Media</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Talk</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
{"".join(pages)}</mediawiki>
""".encode()


TIDE = """{{Infobox sea|name={{nested|x}}}}
[[Datei:Tide.jpg|thumb|A [[tide]] at noon]]
The '''tide''' is the [[Sea level|rise and fall]] of the sea.<ref name="a">A [[book]].</ref>

== Causes ==
It follows the [[Moon]].{{citation needed|date=May 2024}} The range is {{convert|12|m|ft}}.
* a list item
{| class="wikitable"
|-
| a cell
|}

=== Neap ===
Neap tides are weak.
[[Kategorie:Sea]] [[Category:Water]]
"""


# ------------------------------------------------------------------------------------ the same articles


PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson"])
def test_json_lines_are_read_in_every_packing(tmp_path: Path, ending: str, packing: str) -> None:
    name = f"a{ending}{packing}"
    (tmp_path / name).write_bytes(PACKINGS[packing](jsonl(*ROWS)))
    assert list(read_articles(tmp_path / name)) == ARTICLES


def test_parquet_gives_the_same_articles_as_json_lines(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{**r, "url": "x"} for r in ROWS]), tmp_path / "a.parquet")
    assert list(read_articles(tmp_path / "a.parquet")) == ARTICLES


def test_text_folder_takes_its_titles_from_the_file_names(tmp_path: Path) -> None:
    folder = tmp_path / "essays"
    folder.mkdir()
    (folder / "Wells.txt").write_text("A well is dug.\n\nIt is deep.")
    (folder / "Kilns.txt").write_bytes(b"\xef\xbb\xbfClay is fired.")
    assert list(read_articles(folder)) == [
        Article("Kilns", "Kilns", "Clay is fired.", "essays"),
        Article("Wells", "Wells", "A well is dug.\n\nIt is deep.", "essays"),
    ]


def test_records_without_source_take_the_file_name(tmp_path: Path) -> None:
    (tmp_path / "my.notes.jsonl.gz").write_bytes(gzip.compress(jsonl({"id": 7, "title": None, "text": "x"})))
    assert list(read_articles(tmp_path / "my.notes.jsonl.gz")) == [Article("7", "", "x", "my.notes")]


def test_folder_is_read_in_order_of_name_and_other_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0]), ("sub/c.jsonl", ROWS[2])):
        (tmp_path / name).write_bytes(jsonl(row))
    (tmp_path / ".hidden.jsonl").write_bytes(jsonl(ROWS[0]))
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "LICENCE.txt").write_text("not an article")
    assert [i.name for i in list_inputs(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert list(read_articles(tmp_path)) == ARTICLES


def test_limit_stops_across_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(*ROWS[:2]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(*ROWS[2:]))
    assert [a.article_id for a in read_articles(tmp_path, limit=2)] == ["a1", "a2"]
    assert [a.article_id for a in read_articles(tmp_path, limit=3)] == ["a1", "a2", "a3"]
    assert list(read_articles(tmp_path, limit=0)) == []


def test_sample_is_found_by_its_name() -> None:
    inputs = list_inputs("sample")
    assert inputs
    assert all(i.path.parent == SAMPLE for i in inputs)
    article = next(read_articles("sample"))
    assert "\n\n" in article.text


# -------------------------------------------------------------------------------------------- Wikipedia


@pytest.mark.parametrize("packing", [".xml", ".xml.bz2", ".xml.gz"])
def test_dump_gives_prose_of_main_namespace_articles(tmp_path: Path, packing: str) -> None:
    data = dump(
        page(12, "Tide", TIDE),
        page(13, "Tides", "Moved.", extra='<redirect title="Tide" />'),
        page(17, "High tide", "#Redirect [[Tide]]"),
        page(14, "Talk:Tide", "Is it so?", ns=1),
        page(15, "Tide (disambiguation)", "'''Tide''' may be:\n* [[Tide]]\n{{Disambiguation|geo}}"),
        page(16, "Well", "A '''well''' is dug. See {{tl|disambiguation needed}}."),
    )
    packed = (
        bz2.compress(data) if packing.endswith("bz2") else gzip.compress(data) if "gz" in packing else data
    )
    file = tmp_path / f"pages-articles{packing}"
    file.write_bytes(packed)
    report = ReadReport()
    articles = list(read_articles(file, report=report))
    assert articles == [
        Article(
            "12",
            "Tide",
            "The tide is the rise and fall of the sea.\n\nIt follows the Moon. The range is 12 m.\n\n"
            "Neap tides are weak.",
            "testwiki",
        ),
        Article("16", "Well", "A well is dug. See.", "testwiki"),
    ]
    assert report.articles == 2
    assert report.num_broken == 0
    assert report.skipped == {"redirect": 2, "other namespace": 1, "disambiguation": 1}


def test_dump_of_several_bz2_streams_is_read_to_its_end(tmp_path: Path) -> None:
    data = dump(page(1, "One", "First."), page(2, "Two", "Second."))
    cut = data.index(b"  <page>\n    <title>Two")
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress(data[:cut]) + bz2.compress(data[cut:]))
    assert [a.text for a in read_articles(tmp_path / "d.xml.bz2")] == ["First.", "Second."]


def test_broken_pages_are_counted_and_the_next_page_is_read(tmp_path: Path) -> None:
    no_title = page(2, "x", "Gone.").replace("<title>x</title>", "")
    no_revision = "<page><title>Bare</title><ns>0</ns><id>4</id></page>"
    broken = [no_title, no_revision, page(5, "Empty", "  "), page(6, "Box", "{{Infobox}}\n* one\n* two")]
    (tmp_path / "d.xml").write_bytes(dump(page(1, "One", "First."), *broken, page(7, "Seven", "Last.")))
    report = ReadReport()
    assert [a.title for a in read_articles(tmp_path / "d.xml", report=report)] == ["One", "Seven"]
    assert report.articles == 2
    reasons = [f"{b.place}: {b.reason}" for b in report.broken]
    for reason, part in zip(reasons, ["with a title", "a revision", "empty", "no prose"], strict=True):
        assert reason.startswith("d.xml, page")
        assert part in reason


def test_metadata_that_nobody_reads_costs_no_page(tmp_path: Path) -> None:
    odd = [
        page(3, "Tag", "A.").replace("<ns>0</ns>", "<ns>0</ns><surprise/>"),
        page("five", "Id", "B."),
        page("", "No id", "C."),
        page(6, "Date", "D.").replace("2024-05-06T07:08:09Z", "6 May"),
        page(7, "User", "E.").replace("<id>5</id>", "<id></id>").replace("<id>9000</id>", "<id/>"),
        page(8, "Old", "F.").replace("<ns>0</ns>", ""),
    ]
    (tmp_path / "d.xml").write_bytes(dump(*odd))
    report = ReadReport()
    read = list(read_articles(tmp_path / "d.xml", report=report))
    assert [a.text for a in read] == ["A.", "B.", "C.", "D.", "E.", "F."]
    assert [a.article_id for a in read] == ["3", "five", "No id", "6", "7", "8"]
    assert not report.broken


def test_full_history_dump_gives_the_last_revision(tmp_path: Path) -> None:
    older = page(1, "One", "Old text.")
    newer = page(1, "One", "New text.")
    revision = newer[newer.index("    <revision>") : newer.index("  </page>")]
    (tmp_path / "d.xml").write_bytes(dump(older.replace("  </page>", revision + "  </page>")))
    assert [a.text for a in read_articles(tmp_path / "d.xml")] == ["New text."]


def test_reading_a_dump_keeps_no_finished_page(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "d.xml").write_bytes(dump(*(page(i, f"P{i}", "A line of text. " * 40) for i in range(1500))))
    articles = read_articles(tmp_path / "d.xml")
    for _ in range(300):
        next(articles)
    tracemalloc.start()
    for _ in articles:
        pass
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 60_000  # 1,200 kept page elements alone would be over 130 kB


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("A <ref>see [[b]]</ref>b<ref name=x/>.", "A b."),
        ("'''Foo''' ({{lang-fr|x}}; born 5 May) is.", "Foo (born 5 May) is."),
        ("It ({{IPA|x}}) covers {{area}}.", "It covers."),
        ("[[File:a.jpg|thumb|A [[cap]] {{x}}]]Text.", "Text."),
        ("A <gallery>\nFile:a.jpg|cap\n</gallery> b", "A\n\nb"),
        ("One.\n{|\n| in a table\n{|\n| nested\n|}\n|}\nTwo.", "One.\n\nTwo."),
        ("# one\n## two\n; term : def\n: indented\nProse\ngoes on.", "Prose goes on."),
        ("== A ==\nOne.\n== B ==\nTwo.", "One.\n\nTwo."),
        ("a&nbsp;b &ndash; c &lt;d&gt;", "a b – c <d>"),
        ("[https://x.org the site] and https://y.org.", "the site and."),
        ("[[:Category:Seas|all seas]], [[fr:Mer]][[x|]]y", "all seas, y"),
        ("E = <math>mc^2</math> holds.<!-- no -->", "E = holds."),
        ("He said:\n{{quote|It is so.|author=A. B.}}\nThen left.", "He said:\n\nIt is so.\n\nThen left."),
        (
            "{{HMS|Victory}}, {{lang|fr|mot}}, {{cvt|5|-|9|km}}, {{circa|1500}}",
            "HMS Victory, mot, 5–9 km, c. 1500",
        ),
        ("__NOTOC__\n----\n{{x}}\n()", ""),
        ("Unclosed {{template and [[link", "Unclosed {{template and [[link"),
    ],
)
def test_markup_becomes_prose(markup: str, prose: str) -> None:
    assert prose_of(markup) == prose


# ----------------------------------------------------------------------------------------------- broken


def test_broken_lines_are_counted_with_file_line_and_reason(tmp_path: Path) -> None:
    lines = [
        jsonl(ROWS[0]),
        b'{"id": "x", "title": \n',
        b'{"id": "x", "title": "t"}\n',
        b'["id"]\n',
        b'{"id": "x", "title": "t", "text": "  "}\n',
        b'{"id": "x", "title": "t", "text": 5}\n',
        b'{"id": null, "title": "t", "text": "a"}\n',
        b'{"id": "x", "title": "t", "text": "\xff"}\n',
        b"\n",
        jsonl(ROWS[1]),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    report = ReadReport()
    assert [a.article_id for a in read_articles(tmp_path / "a.jsonl", report=report)] == ["a1", "a2"]
    assert report.num_broken == 7
    assert [b.place for b in report.broken] == [f"a.jsonl:{n}" for n in range(2, 9)]
    reasons = [b.reason for b in report.broken]
    for reason, part in zip(
        reasons, ["not JSON", "text is missing", "list", "empty", "int", "None", "UTF-8"], strict=True
    ):
        assert part in reason


def test_report_spells_out_the_first_broken_records_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 50 + jsonl(ROWS[0]))
    report = ReadReport()
    assert len(list(read_articles(tmp_path / "a.jsonl", report=report))) == 1
    assert report.num_broken == 50
    assert len(report.broken) == BROKEN_SHOWN


def test_text_file_that_is_not_utf8_is_counted_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("Fine.")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    report = ReadReport()
    assert [a.title for a in read_articles(tmp_path, report=report)] == ["good"]
    assert "latin.txt" in report.broken[0].place
    assert "byte 3" in report.broken[0].reason


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_cut_json_lines_name_file_and_position(tmp_path: Path, ending: str) -> None:
    import random

    letters = random.Random(0)
    rows = [{**ROWS[0], "text": letters.randbytes(300).hex()} for _ in range(6000)]
    packed = (gzip if ending == ".gz" else bz2).compress(jsonl(*rows))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    read: list[Article] = []
    with pytest.raises(InputError, match=r"a\.jsonl\.\w+ is truncated.*byte [\d,]+ of .*line \d+") as caught:
        read.extend(read_articles(path))
    seen = len(read)
    assert 0 < seen < 6000
    assert f"line {seen}" in str(caught.value)


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_file_that_is_not_packed_at_all_is_an_error(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(jsonl(*ROWS))
    with pytest.raises(InputError, match="cannot be decompressed"):
        list(read_articles(tmp_path / f"a.jsonl{ending}"))


def test_cut_dump_names_file_and_position(tmp_path: Path) -> None:
    import random

    noise = random.Random(0)
    pages = [page(i, f"P{i}", noise.randbytes(3000).hex()) for i in range(400)]
    packed = bz2.compress(dump(*pages))
    (tmp_path / "d.xml.bz2").write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(InputError, match=r"d\.xml\.bz2 is truncated.*byte [\d,]+ of .*page \d+ \(P\d+\)"):
        list(read_articles(tmp_path / "d.xml.bz2"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (dump(page(1, "One", "First."), page(2, "Two", "Second."))[:-40], r"line \d+.*page 1 \(One\)"),
        (dump(page(1, "One", "First.")).replace(b"</revision>", b"</oops>"), r"line 30.*mismatched tag"),
        (b"<html><body/></html>", "<html>, expected a MediaWiki export"),
        (b"", "is empty"),
    ],
)
def test_malformed_dump_names_file_and_place(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "d.xml").write_bytes(data)
    with pytest.raises(InputError, match=rf"d\.xml.*{says}"):
        list(read_articles(tmp_path / "d.xml"))


def test_parquet_without_a_column_lists_expected_and_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"a\.parquet has no column title, text: expected id, title, text.*got id, body"
    ):
        list(read_articles(tmp_path / "a.parquet"))


def test_parquet_rows_without_text_are_counted_by_row(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "text": None}, ROWS[2]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = ReadReport()
    assert [a.article_id for a in read_articles(tmp_path / "a.parquet", report=report)] == ["a1", "a3"]
    assert report.broken[0].place == "a.parquet, row 2"


def test_cut_parquet_names_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a\.parquet is not a valid Parquet file.*row 0"):
        list(read_articles(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no files"),
        (
            {"a.pdf": b"x", "b.docx": b"x"},
            r"only a.pdf \(its extension.*b.docx.*expected a Wikipedia",
        ),
    ],
)
def test_folder_with_nothing_to_read_says_what_it_holds(
    tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says):
        list_inputs(tmp_path)


def test_missing_input_and_unknown_ending_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a Wikipedia dump"):
        list_inputs(tmp_path / "none.jsonl")
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.pdf has no known extension; expected"):
        list_inputs(tmp_path / "a.pdf")


def test_lone_surrogates_do_not_reach_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "1", "title": "t", "text": "a \\ud83d b"}\n')
    (article,) = read_articles(tmp_path / "a.jsonl")
    assert article.text.encode()
