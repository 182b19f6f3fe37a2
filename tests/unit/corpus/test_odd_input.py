"""What people find in their corpora: every record is read or counted, and nothing is raised."""

import bz2
import gzip
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lvm.codec.tokenizer import ChunkTokenizer
from lvm.codec.zoo import load_tokenizer
from lvm.corpus import records
from lvm.corpus.blocks import InputEnd, block_table, read_blocks
from lvm.corpus.chunker import Chunker
from lvm.corpus.counts import Counts
from lvm.corpus.inputs import list_inputs, survey
from lvm.corpus.markup import Parser
from lvm.corpus.records import Article, BrokenRecordError
from lvm.corpus.wikitext import prose_of
from tests.unit.corpus.test_readers import dump, jsonl, page

ROW = {"id": "1", "title": "Kilns", "text": "Clay is fired here."}


@pytest.fixture(scope="module")
def tokenizer() -> ChunkTokenizer:
    return load_tokenizer("mini")


@pytest.fixture(scope="module")
def chunker(tokenizer: ChunkTokenizer) -> Chunker:
    return Chunker(tokenizer)


def cut(path: Path, chunker: Chunker) -> tuple[list[dict[str, Any]], Counts]:
    """Rows and counts of all inputs under `path`, through the job's own reading and cutting."""
    rows: list[dict[str, Any]] = []
    counts = Counts()
    for input_file in list_inputs(path):
        for item in read_blocks(input_file, None, 50, 80.0, frozenset()):
            if isinstance(item, InputEnd):
                counts.add(item.counts)
            elif isinstance(item, list):
                table, made = block_table(item, chunker, 0, input_file.name)
                rows += table.to_pylist()
                counts.add(made)
    return rows, counts


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


# ---------------------------------------------------------------------------------------- any record at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
RECORD = st.fixed_dictionaries({}, optional={"id": JSON, "title": JSON, "text": JSON, "source": JSON})
QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutated(data: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for place, new in edits:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + 1 :]
    return data


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=4)


@QUIET
@given(rows=st.lists(RECORD, max_size=4), edits=EDITS, ending=st.sampled_from([".jsonl", ".csv", ".txt"]))
def test_every_mutated_record_is_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory,
    chunker: Chunker,
    rows: list[dict[str, Any]],
    edits: list[tuple[int, bytes]],
    ending: str,
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    data = jsonl(*rows, ROW)
    if ending == ".csv":
        data = b"id,title,text\n" + data
    (folder / f"a{ending}").write_bytes(mutated(data, edits))
    (folder.joinpath("b") if ending == ".txt" else folder).mkdir(exist_ok=True)
    _, counts = cut(folder, chunker)
    if ending == ".jsonl":
        lines = [line for line in (folder / "a.jsonl").read_bytes().split(b"\n") if line.strip()]
        assert counts.articles + counts.num_broken == len(lines)
    else:
        assert counts.articles + counts.num_broken + len(counts.broken_files) > 0
    json.dumps(counts.broken).encode()


@QUIET
@given(
    markup=st.lists(
        st.sampled_from(
            [*"{}[]|'<>=/!-\n*#:;&", "<ref", "</ref>", "{{", "}}", "[[File:", "&#xD800;", "-{", "a"]
        )
    ).map("".join),
    edits=EDITS,
)
def test_every_mutated_page_is_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory, chunker: Chunker, markup: str, edits: list[tuple[int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "a.xml").write_bytes(mutated(dump(page(1, "One", markup), page(2, "Two", "Last.")), edits))
    _, counts = cut(folder, chunker)
    told = counts.articles + counts.num_broken + sum(counts.skipped.values()) + len(counts.broken_files)
    assert told >= 1 if edits else told == 2


@QUIET
@given(rows=st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), min_size=1, max_size=5))
def test_every_parquet_row_is_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory, chunker: Chunker, rows: list[tuple[bytes, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    ids = pa.array([i for i, _ in rows], pa.binary()).view(pa.string())
    bodies = pa.array([b for _, b in rows], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ids, "title": ids, "text": bodies}), folder / "a.parquet")
    _, counts = cut(folder, chunker)
    assert counts.articles + counts.num_broken == len(rows)


# --------------------------------------------------------------------------------------------------- records


def test_half_surrogates_become_replacement_characters_in_every_field(
    tmp_path: Path, chunker: Chunker
) -> None:
    half = r"\ud83d"
    line = f'{{"id": "a{half}", "title": "t{half}", "text": "An old{half} mill.", "source": "s{half}", "k{half}": 1}}\n'
    broken = f'{{"id": {{"x{half}": 1}}, "title": "t", "text": "x"}}\n{{"k{half}": 1}}\n'
    (tmp_path / "a.jsonl").write_text(line + broken)
    (tmp_path / "b.xml").write_bytes(dump(page(1, "One", "A &#xD83D; b.")))
    rows, counts = cut(tmp_path, chunker)
    assert texts(rows) == ["An old\ufffd mill.", "A \ufffd b."]
    assert [row["title"] for row in rows] == ["t\ufffd", "One"]
    assert counts.num_broken == 2
    json.dumps(counts.broken, ensure_ascii=False).encode()


def test_parquet_row_that_is_no_utf8_is_broken_alone(tmp_path: Path, chunker: Chunker) -> None:
    raw = pa.array([b"A mill.", "Café".encode("latin-1"), b"A kiln."]).view(pa.string())
    ids = pa.array(["1", "2", "3"]).dictionary_encode()
    pq.write_table(pa.table({"id": ids, "title": ids, "text": raw}), tmp_path / "a.parquet")
    rows, counts = cut(tmp_path, chunker)
    assert texts(rows) == ["A mill.", "A kiln."]
    assert counts.broken == [{"place": "a.parquet, row 2", "reason": "not UTF-8 at byte 3"}]


def test_text_that_nobody_can_see_is_empty(tmp_path: Path, chunker: Chunker) -> None:
    unseen = "\u200b\u200b\ufeff\u2060\u200d \u00ad\x00"
    (tmp_path / "a.jsonl").write_bytes(jsonl({**ROW, "text": unseen}, ROW))
    rows, counts = cut(tmp_path, chunker)
    assert texts(rows) == [ROW["text"]]
    assert counts.broken[0]["reason"] == "its text is empty"


def test_encoded_data_is_left_out_and_counted(tmp_path: Path, chunker: Chunker) -> None:
    data = "data:image/png;base64," + "iVBORw0KGgo" * 500_000
    (tmp_path / "a.jsonl").write_bytes(
        jsonl({**ROW, "text": f"A mill {data} stands."}, {**ROW, "id": 2, "text": data})
    )
    rows, counts = cut(tmp_path, chunker)
    assert texts(rows) == ["A mill stands."]
    assert counts.long_words == 1
    assert "1 words of more than 1000 characters" in counts.broken[0]["reason"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".txt", ".xml"])
def test_a_record_beyond_the_limit_is_broken(
    tmp_path: Path, chunker: Chunker, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvm.corpus import dump as dumps
    from lvm.corpus import readers

    for module in (records, readers, dumps):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 5000)
    big = {**ROW, "id": "big", "text": "word " * 2000}
    rows = [big, ROW]
    path = tmp_path / f"a{ending}"
    if ending == ".jsonl":
        path.write_bytes(jsonl(*rows))
    elif ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".csv":
        path.write_text("id,title,text\n" + "".join(f"{r['id']},{r['title']},{r['text']}\n" for r in rows))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == ".xml":
        path.write_bytes(dump(*(page(r["id"], r["title"], r["text"]) for r in rows)))
    else:
        path.write_text(big["text"])
        (tmp_path / "b.txt").write_text(ROW["text"])
    found, counts = cut(tmp_path, chunker)
    assert texts(found) == [ROW["text"]]
    assert counts.num_broken == 1
    assert re.search("at most|limit", counts.broken[0]["reason"])


def test_a_json_array_and_objects_over_several_lines_are_read_whole(tmp_path: Path, chunker: Chunker) -> None:
    rows = [{**ROW, "id": i, "text": f"Mill {i} stands."} for i in range(5)]
    wanted = [row["text"] for row in rows]
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    assert texts(cut(tmp_path / "a.json", chunker)[0]) == wanted
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows))
    assert texts(cut(tmp_path / "b.json", chunker)[0]) == wanted
    (tmp_path / "c.json").write_text("\n".join(json.dumps(r, indent=1) for r in rows))
    assert texts(cut(tmp_path / "c.json", chunker)[0]) == wanted
    (tmp_path / "d.json").write_text(json.dumps(rows)[:-30])
    found, counts = cut(tmp_path / "d.json", chunker)
    assert texts(found) == wanted[:4]
    assert "not valid JSON after record 4" in counts.broken_files[0]["reason"]


def test_csv_rows_are_read_or_counted(tmp_path: Path, chunker: Chunker) -> None:
    lines = [
        b"\xef\xbb\xbfid,title,text,source",
        b'1,Mills,"A mill, by the ""river"".\n\nIt turns.",essays',
        b"2,Kilns",
        b"3,Caf\xe9s,Coffee.,x",
        b"4,Wells,A well is dug.,",
        b'5,Open,"never closed',
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    rows, counts = cut(tmp_path, chunker)
    assert texts(rows) == ['A mill, by the "river".', "It turns.", "A well is dug."]
    assert [b["place"] for b in counts.broken] == ["a.csv, row 2", "a.csv, row 3", "a.csv, row 5"]
    (tmp_path / "a.csv").unlink()
    (tmp_path / "b.tsv").write_text("id\ttitle\ttext\n1\tMills\tA mill, by the river.\n")
    assert texts(cut(tmp_path, chunker)[0]) == ["A mill, by the river."]


# ----------------------------------------------------------------------------------------------------- files


def test_a_broken_file_gives_what_was_before_the_break_and_is_named(tmp_path: Path, chunker: Chunker) -> None:
    whole = gzip.compress(jsonl(*({**ROW, "id": i, "text": os.urandom(400).hex()[:900]} for i in range(300))))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "d.jsonl").write_bytes(jsonl(ROW))
    rows, counts = cut(tmp_path, chunker)
    assert 0 < counts.articles < 300
    assert rows[-1]["text"] == ROW["text"]
    assert [f["file"] for f in counts.broken_files] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]


def test_what_is_not_read_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROW))
    os.symlink("nowhere", tmp_path / "gone.jsonl")
    (tmp_path / "drafts.txt").mkdir()
    (tmp_path / "b.zip").write_bytes(b"x")
    (tmp_path / "enwiki-20260901-pages-articles-multistream-index1.txt-p1p41242.bz2").write_bytes(b"x")
    (tmp_path / "README.txt").write_text("About.")
    (tmp_path / "_part.parquet").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    inputs, unread = survey(tmp_path)
    assert [i.name for i in inputs] == ["a.jsonl"]
    found = {u.name: u.reason for u in unread}
    assert found["gone.jsonl"] == "a broken link"
    assert found["drafts.txt"] == "an empty folder"
    assert found["pipe.jsonl"] == "not a regular file"
    assert "multistream" in found["enwiki-20260901-pages-articles-multistream-index1.txt-p1p41242.bz2"]
    assert {"b.zip", "*.txt", "_part.parquet"} <= set(found)


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_bytes(jsonl(ROW))
    os.symlink(tmp_path, tmp_path / "real" / "up")
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert len(list_inputs(tmp_path)) == 1


def test_a_file_name_that_is_no_utf8_is_read(tmp_path: Path, chunker: Chunker) -> None:
    for ending in (b".jsonl", b".txt"):
        folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9" + ending[1:])
        os.mkdir(folder)
        with open(os.path.join(folder, b"caf\xe9" + ending), "wb") as file:
            file.write(jsonl(ROW) if ending == b".jsonl" else b"A mill.")
    rows, counts = cut(tmp_path, chunker)
    assert sorted(texts(rows)) == ["A mill.", "Clay is fired here."]
    assert not counts.broken
    json.dumps([i.name for i in list_inputs(tmp_path)], ensure_ascii=False).encode()


def test_an_article_is_its_file_and_its_id(tmp_path: Path, chunker: Chunker) -> None:
    for folder in ("eo", "simple"):
        (tmp_path / folder).mkdir()
        rows = [{"id": str(i), "title": "t", "text": f"Mill {i} in {folder}."} for i in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / folder / "train-00000.parquet")
    for split in ("train", "test"):
        (tmp_path / split / "pos").mkdir(parents=True)
        (tmp_path / split / "pos" / "0.txt").write_text(f"A review in {split}.")
    (tmp_path / "simple" / "again.jsonl").write_bytes(jsonl(ROW, ROW))
    rows, _ = cut(tmp_path, chunker)
    ids = Counter(row["chunk_id"] for row in rows)
    assert len(ids) == 6 + 2 + 1
    assert sorted(ids.values()) == [1] * 8 + [2]


# ------------------------------------------------------------------------------------------------- Wikipedia


def test_parts_of_a_dump_are_read_under_wikimedias_names(tmp_path: Path, chunker: Chunker) -> None:
    for number, span in ((1, "p1p41242"), (2, "p41243p151573")):
        name = f"enwiki-20260901-pages-articles{number}.xml-{span}.bz2"
        (tmp_path / name).write_bytes(bz2.compress(dump(page(number, f"P{number}", f"Mill {number}."))))
    (tmp_path / "enwiki-20260901-pages-articles3.xml-p9p10").write_bytes(dump(page(9, "P9", "Mill 9.")))
    assert texts(cut(tmp_path, chunker)[0]) == ["Mill 1.", "Mill 2.", "Mill 9."]


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("[[Bild:A.jpg|mini|hochkant|Cap [[x]]]]Text.[[Fichier:b.png]] [[ファイル:c.png|thumb|d]]", "Text."),
        ("[[commons:Category:Mills]]Text. [[:Category:Mills|mills]]", "Text. mills"),
        ('It ran.<ref name="a/b">P. 4\n\nIt</br>went<br/ >by.</small></div>', "It ran. P. 4\n\nIt went by."),
        ("</noinclude>A canal.<noinclude>\n\nBarges. <includeonly>[[Category:X]]</includeonly>", "A canal.\n\nBarges."),
        ("The '''quarry is deep.''' ''It is grey.", "The quarry is deep. It is grey."),
        ("<nowiki><br></nowiki> breaks; a < b and c > d", "<br> breaks; a < b and c > d"),
        ("-{zh-hans:计算机; zh-hant:電腦}- -{H|zh:x}- -{A|b}-", "计算机 b"),
        ("a&#xD800;b &#99999999999; c &nope; d&nbsp;e", "a\ufffdb &#99999999999; c &nope; d e"),
    ],
)  # fmt: skip
def test_soup_gives_sentences_without_markup(markup: str, prose: str) -> None:
    assert prose_of(markup) == prose


@pytest.mark.parametrize("flood", [" ", ",", ", ", "(", "\n", "( ", ";)"])
def test_a_flood_of_one_character_takes_no_time(flood: str) -> None:
    begun = time.perf_counter()
    prose_of(f"A mill.{flood * 100_000}b")
    assert time.perf_counter() - begun < 5  # its square would take minutes


def test_a_page_that_holds_the_parser_is_given_up_and_the_next_is_read() -> None:
    parser = Parser(limit_s=1.0)
    begun = time.monotonic()
    with pytest.raises(BrokenRecordError, match="longer than 1 s"):
        parser.prose('<ref name="' * 20_000, [])
    assert time.monotonic() - begun < 10
    assert parser.prose("'''A''' mill.", []) == "A mill."
    assert parser._process is not None
    parser._process.kill()
    parser._process.wait()
    assert parser.prose("A kiln.", []) == "A kiln."
    parser.close()


# ------------------------------------------------------------------------------------- characters and tokens

CONTROLS = [
    "</s>",
    "<pad>",
    "The tag <s> strikes out, and </s> ends it.",
    "Filled with <pad> up to one length, <unk> in others",
    "<</s>>",
    "a </s></s> b",
    "byte <0x41> here",
]


@pytest.mark.parametrize("text", CONTROLS)
def test_control_tokens_in_a_text_are_text(text: str, tokenizer: ChunkTokenizer, chunker: Chunker) -> None:
    (ids,), (length,) = tokenizer.encode([text])
    assert ids.count(tokenizer.end_id) == 1
    assert ids[-1] == tokenizer.end_id
    assert tokenizer.decode([ids]) == [text]
    assert tokenizer.count([text]) == [length]
    spans = tokenizer.offsets(text)
    assert len(spans) == length - 1
    assert spans[-1][1] == len(text)
    (chunks,) = chunker.chunk([Article("1", "", text, "s")])
    assert "".join(c.text for c in chunks) == text


LINE_ENDS = ["\r\r", "\r\n\r\n", "\u2029", "\n\n", "\u2028\u2028", "\x0b\n"]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_no_chunk_goes_across_a_paragraph(end: str, chunker: Chunker) -> None:
    (chunks,) = chunker.chunk([Article("1", "", f"One mill.{end}Two kilns.", "s")])
    assert [c.text for c in chunks] == ["One mill.", "Two kilns."]


@QUIET
@given(
    st.lists(
        st.sampled_from([*"ab ", "e\u0301", "👨\u200d👩\u200d👧", "नि", "ก็", "각", "🇪🇺", "\r\n"]),
        max_size=120,
    ).map("".join)
)
def test_characters_are_cut_nowhere_and_nothing_is_lost(chunker: Chunker, text: str) -> None:
    (chunks,) = chunker.chunk([Article("1", "", text, "s")])
    seen = "".join(text.split())
    assert "".join("".join(c.text.split()) for c in chunks) == seen
    ends, at = set(), 0
    for cluster in regex.findall(r"\X", seen):
        at += len(cluster)
        ends.add(at)
    at = 0
    for chunk in chunks:
        at += len("".join(chunk.text.split()))
        assert at in ends
