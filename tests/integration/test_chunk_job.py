"""The chunk job on a real local Ray: every format, damage, kills, and runs after the first."""

import bz2
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.chunk import ChunkResult, chunk_corpus
from lvm.corpus.chunker import chunk_article
from lvm.corpus.readers import read_articles
from lvm.corpus.work import ChunkSettings
from lvm.errors import InputError, OutputError
from lvm.vectors.shards import CHUNK_SCHEMA, Manifest, read_table
from tests.doubles import FakeTokenizer

CHECKOUT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("ray_cluster")


def rows(prefix: str, num: int, sentences: int = 4, seed: int = 0) -> list[dict[str, str]]:
    """Made-up articles of two paragraphs each."""
    words = random.Random(f"{prefix}{seed}")

    def paragraph() -> str:
        made = (" ".join(f"w{words.randrange(500)}" for _ in range(9)) for _ in range(sentences))
        return " ".join(f"{s.capitalize()}." for s in made)

    return [
        {"id": f"{prefix}{i}", "title": f"{prefix} {i}", "text": f"{paragraph()}\n\n{paragraph()}"}
        for i in range(num)
    ]


def write_jsonl(path: Path, records: Sequence[dict[str, str]]) -> Path:
    data = b"".join(json.dumps(r).encode() + b"\n" for r in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_dump(path: Path, records: Sequence[dict[str, str]], extra: str = "") -> Path:
    pages = "".join(
        f"<page><title>{r['title']}</title><ns>0</ns><id>{i}</id><revision><id>1</id>"
        f"<model>wikitext</model><text sha1='x'>{{{{Box}}}}{r['text']}</text><sha1>x</sha1></revision></page>"
        for i, r in enumerate(records, 1)
    )
    head = "<siteinfo><dbname>testwiki</dbname><namespaces></namespaces></siteinfo>"
    path.write_bytes(bz2.compress(f"<mediawiki>{head}{pages}{extra}</mediawiki>".encode()))
    return path


def run(source: Path | str, target: Path, rows_per_shard: int = 40, **options: Any) -> ChunkResult:
    tokenizer = FakeTokenizer(options.pop("max_tokens", 16))
    settings = ChunkSettings(tokenizer.sha256, tokenizer.max_tokens, rows_per_shard=rows_per_shard)
    return chunk_corpus(source, target, tokenizer, settings, **options)


def chunks_in(target: Path) -> list[dict[str, Any]]:
    """All rows in the order of the manifest, whose checks they pass."""
    manifest = Manifest.load(target, "chunks")
    manifest.verify(target, deep=True)
    tables = [read_table(target / s.file) for s in manifest.shards]
    assert [t.num_rows for t in tables] == [s.rows for s in manifest.shards]
    assert sorted(p.name for p in target.glob("part-*.parquet")) == [s.file for s in manifest.shards]
    assert not (target / "_work").exists()
    found: list[dict[str, Any]] = pa.concat_tables(tables).cast(CHUNK_SCHEMA).to_pylist()
    ids = [r["chunk_id"] for r in found]
    assert len(set(ids)) == len(ids)
    keys = [(r["doc_id"], r["position"]) for r in found]
    assert len(set(keys)) == len(keys)
    # An article lies in one shard, so a shard is a corpus of its own.
    docs = [set(t.column("doc_id").to_pylist()) for t in tables]
    assert sum(map(len, docs)) == len(set().union(*docs))
    return found


def bytes_of(target: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(target.glob("part-*.parquet"))}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for name, num in (("a", 20), ("b", 30), ("c", 10)):
        write_jsonl(folder / f"{name}.jsonl.gz", rows(name, num))
    return folder


# ------------------------------------------------------------------------------------------- what comes out


def test_every_format_gives_the_chunks_its_articles_have(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write_jsonl(folder / "a.jsonl.gz", rows("a", 12))
    pq.write_table(pa.Table.from_pylist(rows("b", 12)), folder / "b.parquet")
    write_dump(folder / "c.xml.bz2", rows("c", 12))
    (folder / "essays").mkdir()
    for row in rows("d", 12):
        (folder / "essays" / f"{row['title']}.txt").write_text(row["text"])
    result = run(folder, tmp_path / "out")
    expected = [
        (doc, article.title, article.source, c.chunk_id, c.position, c.text, c.num_tokens)
        for doc, article in enumerate(read_articles(folder))
        for c in chunk_article(article, FakeTokenizer(16))
    ]
    names = ("doc_id", "title", "source", "chunk_id", "position", "text", "num_tokens")
    assert [tuple(row[n] for n in names) for row in chunks_in(tmp_path / "out")] == expected
    report = result.manifest.report
    assert report["articles"] == 48
    assert report["chunks"] == result.manifest.rows == len(expected)
    assert report["words"] == sum(len(text.split()) for *_, text, _ in expected)
    assert report["mean_tokens"] == pytest.approx(sum(e[-1] for e in expected) / len(expected), abs=0.01)
    assert set(report["sources"]) == {"a", "b", "testwiki", "essays"}
    assert len(result.manifest.shards) > 4


def test_broken_records_are_in_the_manifest_with_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    good = write_jsonl(folder / "a.jsonl", rows("a", 5))
    good.write_bytes(good.read_bytes() + b'{"id": 1}\nnot json\n')
    revision = "<revision><id>1</id><text>{{Box}}</text></revision>"
    box = f"<page><title>Box</title><ns>0</ns><id>99</id>{revision}</page>"
    redirect = "<page><title>R</title><ns>0</ns><id>98</id><redirect title='Box'/></page>"
    write_dump(folder / "b.xml.bz2", rows("b", 5), extra=box + redirect)
    report = run(folder, tmp_path / "out").manifest.report
    assert report["broken_records"] == 3
    assert {b["place"] for b in report["broken"]} == {"a.jsonl:6", "a.jsonl:7", "b.xml.bz2, page 99"}
    assert all(b["reason"] for b in report["broken"])
    assert report["skipped"] == {"redirect": 1}
    assert report["articles"] == 10


def test_an_article_met_twice_is_kept_once_and_reported(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    own = rows("a", 6)
    other = {**rows("x", 1)[0], "id": "a2", "title": "other a2"}
    write_jsonl(folder / "a.jsonl", [*own, other])
    # Ids of another file are its own: shards of two languages have the same names and numbers.
    write_jsonl(folder / "b.jsonl", [own[4], {**own[5], "source": "letters"}])
    report = run(folder, tmp_path / "out").manifest.report
    titles = [r["title"] for r in chunks_in(tmp_path / "out") if r["position"] == 0]
    assert titles == ["a 0", "a 1", "a 2", "a 3", "a 4", "a 5", "a 4", "a 5"]
    assert report["articles"] == 8
    assert report["duplicates"] == 1
    assert report["first_duplicates"] == [{"title": "other a2", "place": "a.jsonl, line 7"}]


@pytest.mark.parametrize(
    ("limit", "expected"), [(7, {"a": 7}), (25, {"a": 20, "b": 5}), (500, {"a": 20, "b": 30, "c": 10})]
)
def test_limit_takes_the_first_articles_of_all_inputs(
    corpus: Path, tmp_path: Path, limit: int, expected: dict[str, int]
) -> None:
    run(corpus, tmp_path / "out", limit=limit)
    titles = [r["title"] for r in chunks_in(tmp_path / "out") if r["position"] == 0]
    assert titles == [f"{name} {i}" for name, num in expected.items() for i in range(num)]


# ----------------------------------------------------------------------------------------------- later runs


def test_second_run_is_up_to_date_and_touches_nothing(corpus: Path, tmp_path: Path) -> None:
    first = run(corpus, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    for file in corpus.iterdir():
        os.utime(file)  # a copy of the same content is no change
    second = run(corpus, tmp_path / "out")
    assert second.up_to_date
    assert second.redone == ()
    assert bytes_of(tmp_path / "out") == before
    assert second.manifest.fingerprint == first.manifest.fingerprint


def test_an_added_input_leaves_the_other_shards_alone(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    write_jsonl(corpus / "aa.jsonl.gz", rows("new", 8))
    result = run(corpus, tmp_path / "out")
    after = bytes_of(tmp_path / "out")
    assert set(result.redone) == set(after) - set(before)
    assert {n: after[n] for n in before} == before
    new = {r["title"]: r["doc_id"] for r in chunks_in(tmp_path / "out") if r["title"].startswith("new")}
    assert list(new.values()) == list(range(60, 68))


def test_a_changed_input_is_redone_and_its_old_shards_go(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    write_jsonl(corpus / "b.jsonl.gz", rows("b", 31, seed=1))
    result = run(corpus, tmp_path / "out")
    assert "changed since the last run: b.jsonl.gz" in capsys.readouterr().err
    after = bytes_of(tmp_path / "out")
    texts = {r["text"] for r in chunks_in(tmp_path / "out")}
    expected = {
        c.text for article in read_articles(corpus) for c in chunk_article(article, FakeTokenizer(16))
    }
    assert texts == expected
    assert set(result.redone) == set(after) - set(before)
    kept = set(before) & set(after)
    assert kept
    assert all(before[n] == after[n] for n in kept)
    (corpus / "a.jsonl.gz").unlink()
    assert run(corpus, tmp_path / "out").redone == ()
    assert {r["source"] for r in chunks_in(tmp_path / "out")} == {"b", "c"}


@pytest.mark.parametrize("damage", ["missing", "cut", "manifest gone"])
def test_only_what_is_damaged_is_redone(corpus: Path, tmp_path: Path, damage: str) -> None:
    run(corpus, tmp_path / "out")
    before = {name: data for name, (data, _) in bytes_of(tmp_path / "out").items()}
    victim = tmp_path / "out" / "part-00002.parquet"
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        (tmp_path / "out" / "manifest.json").unlink()
    result = run(corpus, tmp_path / "out")
    assert result.redone == (() if damage == "manifest gone" else ("part-00002.parquet",))
    assert {name: data for name, (data, _) in bytes_of(tmp_path / "out").items()} == before
    assert run(corpus, tmp_path / "out").up_to_date


@pytest.mark.slow
def test_a_killed_job_run_again_gives_the_rows_of_an_uninterrupted_one(
    ray_cluster: str, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    for name in "abc":
        write_jsonl(folder / f"{name}.jsonl.gz", rows(name, 400, sentences=6))
    target = tmp_path / "killed"
    command = [sys.executable, "-m", "jobs.chunk", "--input", str(folder), "--output", str(target)]
    command += ["--rows-per-shard", "64", "--address", ray_cluster]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(target.glob("_work/*/block-*.parquet"))) < 5:
        assert child.poll() is None, "the job ended before it could be killed; give it more articles"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (target / "manifest.json").exists()
    left = {p: p.stat().st_mtime_ns for p in target.glob("_work/*/block-*.parquet")}
    assert left

    seen = {}
    again = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while again.poll() is None:  # the blocks that were there are used as they are
        for path, written in left.items():
            if path.exists():
                seen[path] = path.stat().st_mtime_ns == written
        time.sleep(0.01)
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert seen
    assert all(seen.values())
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["stage"] == "chunk"
    assert summary["up_to_date"] is False
    assert "blocks of the others" in stderr

    whole = tmp_path / "whole"
    command[command.index(str(target))] = str(whole)
    subprocess.run(command, cwd=CHECKOUT, env=environment, check=True, capture_output=True)
    assert chunks_in(target) == chunks_in(whole)
    shards = [Manifest.load(t, "chunks").shards for t in (target, whole)]
    assert shards[0] == shards[1]
    assert summary["rows"] == len(chunks_in(whole)) > 3000


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_kill_between_shards_and_manifest_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "out")
    written = bytes_of(tmp_path / "out")
    assert run(corpus, tmp_path / "out").redone == ()
    assert bytes_of(tmp_path / "out") == written
    assert chunks_in(tmp_path / "out") == chunks_in(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- refusals


def test_a_broken_file_is_counted_and_the_others_are_read(
    ray_cluster: str, corpus: Path, tmp_path: Path
) -> None:
    whole = (corpus / "c.jsonl.gz").read_bytes()
    (corpus / "c.jsonl.gz").write_bytes(whole[:-200])
    (corpus / "d.parquet").write_bytes(b"")
    (corpus / "e.zip").write_bytes(b"PK")
    command = [sys.executable, "-m", "jobs.chunk", "--input", str(corpus), "--output", str(tmp_path / "out")]
    command += ["--address", ray_cluster]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["broken_files"], last["unread"]) == (2, 1)
    assert 50 < last["articles"] < 60
    assert "c.jsonl.gz is truncated" in done.stderr
    assert "d.parquet is empty" in done.stderr
    assert "not read: e.zip" in done.stderr
    strict = subprocess.run([*command, "--strict"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert strict.returncode == 1
    assert "error: c.jsonl.gz is broken (and 1 more files)" in strict.stderr
    (corpus / "c.jsonl.gz").write_bytes(whole)
    (corpus / "d.parquet").unlink()
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["articles"], last["broken_files"]) == (60, 0)


def test_a_corpus_in_another_language_is_said_not_to_fit(ray_cluster: str, tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl", [{"id": "1", "title": "", "text": "โรงสีเก่าตั้งอยู่ริมแม่น้ำและยังทำงานทุกวัน " * 20}]
    )
    command = [sys.executable, "-m", "jobs.chunk", "--input", str(tmp_path / "a.jsonl")]
    command += ["--output", str(tmp_path / "out"), "--address", ray_cluster]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert "WARNING: mini's tokenizer does not support this language" in done.stderr, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["tokens_per_word"] > 10


def test_a_broken_file_is_named_and_the_others_are_not_cut_twice(corpus: Path, tmp_path: Path) -> None:
    whole = (corpus / "c.jsonl.gz").read_bytes()
    (corpus / "c.jsonl.gz").write_bytes(whole[:-200])
    with pytest.raises(InputError, match=r"c\.jsonl\.gz is truncated.*byte [\d,]+ of .*line \d+") as caught:
        run(corpus, tmp_path / "out", strict=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    left = {p.name + p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("out/_work/*/block-*")}
    assert left
    with pytest.raises(InputError):
        run(corpus, tmp_path / "out", strict=True)
    again = {p.name + p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("out/_work/*/block-*")}
    assert left.items() <= again.items()
    (corpus / "c.jsonl.gz").write_bytes(whole)
    run(corpus, tmp_path / "out")
    assert len({r["doc_id"] for r in chunks_in(tmp_path / "out")}) == 60


def test_a_broken_input_leaves_the_last_result_as_it_was(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    before = chunks_in(tmp_path / "out")
    (corpus / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"a\.jsonl\.gz cannot be decompressed"):
        run(corpus, tmp_path / "out", strict=True)
    manifest = Manifest.load(tmp_path / "out", "chunks")
    manifest.verify(tmp_path / "out", deep=True)
    assert manifest.rows == len(before)


def test_other_settings_are_refused_by_name_and_overwrite_replaces(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(OutputError, match=r"max_tokens was 16, now 12.*--overwrite"):
        run(corpus, tmp_path / "out", max_tokens=12)
    assert bytes_of(tmp_path / "out") == before
    run(corpus, tmp_path / "out", max_tokens=12, overwrite=True)
    found = chunks_in(tmp_path / "out")
    assert max(r["num_tokens"] for r in found) <= 12
    assert min(r["doc_id"] for r in found) == 0


def test_a_folder_with_other_parquet_files_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "part-00000.parquet"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's")
    with pytest.raises(OutputError, match=r"part-00000\.parquet but no record"):
        run(corpus, tmp_path / "out")
    assert foreign.read_bytes() == b"somebody's"


def test_a_corpus_without_an_article_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(
        InputError, match=r"no article was found.*1 records are broken.*a\.jsonl:1: expected the fields"
    ):
        run(tmp_path / "a.jsonl", tmp_path / "out")


def test_command_prints_errors_as_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.chunk", "--input", "none.jsonl", "--output", str(tmp_path / "out")],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "none.jsonl does not exist; expected a Wikipedia dump" in done.stderr
