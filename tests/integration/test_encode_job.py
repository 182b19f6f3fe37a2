"""The encode job on a real Ray: nothing lost, nothing twice, nothing redone, and refusals that say why."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from jobs._ray import in_tasks
from jobs.encode import (
    EncodeResult,
    EncodeSettings,
    encode_chunks,
    finished_shard,
    footer_of,
    require_same_ids,
)
from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import Chunker
from lvm.corpus.records import Article
from lvm.corpus.tmd import Prototypes, coder_name
from lvm.errors import IdentityError, InputError, OutputError
from lvm.storage import temporary_name
from lvm.vectors.array import array_folder, open_vectors, write_array
from lvm.vectors.shards import (
    Manifest,
    read_footer,
    read_table,
    table_to_vectors,
    write_table,
)
from tests.doubles import (
    FakeCodec,
    FakeTokenizer,
    broken_codec,
    fake_articles,
    fake_codec,
    phrases_only_codec,
    write_chunks,
)
from tests.integration.conftest import CHECKOUT


def encode(folder: Path, load: Callable[[], Any] = fake_codec, **options: Any) -> EncodeResult:
    return encode_chunks(folder / "chunks", folder / "vectors", load, **options)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each shard: a rewritten one has others."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("part-*.parquet")}


def ids_and_vectors(folder: Path) -> tuple[list[str], np.ndarray]:
    tables = [read_table(p) for p in sorted(folder.glob("part-*.parquet"))]
    ids = [i for t in tables for i in t.column("chunk_id").to_pylist()]
    return ids, np.concatenate([table_to_vectors(t) for t in tables])


@pytest.fixture(scope="module")
def encoded_once(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of 40 made-up articles in five shards, and their vectors."""
    folder = tmp_path_factory.mktemp("encoded")
    write_chunks(folder / "chunks", fake_articles(40))
    result = encode(folder)
    assert not result.up_to_date
    assert len(result.encoded) == 5
    return folder


@pytest.fixture
def folder(encoded_once: Path, tmp_path: Path) -> Path:
    """A copy of finished chunks and vectors that a test may change."""
    shutil.copytree(encoded_once, tmp_path / "copy")
    return tmp_path / "copy"


# ---- a whole run


def test_every_chunk_comes_out_once_with_the_vector_of_its_text(encoded_once: Path) -> None:
    chunks = [read_table(p) for p in sorted((encoded_once / "chunks").glob("part-*.parquet"))]
    shards = sorted((encoded_once / "vectors").glob("part-*.parquet"))
    for before, path in zip(chunks, shards, strict=True):
        after = read_table(path)
        for name in ("chunk_id", "doc_id", "position", "title", "text", "source"):
            assert after.column(name).equals(before.column(name))
        expected = FakeCodec().encode_chunks(before.column("text").to_pylist())
        np.testing.assert_array_equal(table_to_vectors(after), expected.vectors.astype(np.float16))
        np.testing.assert_array_equal(after.column("norm").to_numpy(), expected.norms)
        assert read_footer(path)["codec"] == FakeCodec().identity.to_dict()


def test_a_core_that_another_job_holds_is_not_waited_for(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr("jobs.encode.START_TIMEOUT_S", 60)  # then the job gives up

    @ray.remote(num_cpus=1)
    class Holder:
        def here(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray.get(holder.here.remote(), timeout=60)
    try:
        write_chunks(tmp_path / "chunks", fake_articles(40))
        assert len(encode(tmp_path).encoded) == 5
    finally:
        ray.kill(holder)


def test_the_manifest_says_where_the_vectors_come_from(folder: Path) -> None:
    manifest = Manifest.load(folder / "vectors", "vectors")
    manifest.verify(folder / "vectors", deep=True)
    chunks = Manifest.load(folder / "chunks")
    assert len(open_vectors(folder / "vectors")) == 480
    assert manifest.inputs == {"chunks": chunks.fingerprint}
    assert manifest.identity == FakeCodec().identity
    assert manifest.rows == chunks.rows == 480
    assert (manifest.source, manifest.licence) == (chunks.source, chunks.licence)
    assert manifest.settings == {"codec": FakeCodec().identity.digest, "dtype": "float16"}
    assert manifest.versions["ray"]


def test_truncated_chunks_are_counted_and_float32_is_stored_where_asked(
    ray_cluster: str, tmp_path: Path
) -> None:
    long = " ".join(f"word{i}" for i in range(50))
    write_chunks(tmp_path / "chunks", [["short one", long], [long, "short two"]])
    assert encode(tmp_path, dtype="float32").manifest.report["truncated"] == 2
    table = read_table(tmp_path / "vectors" / "part-00000.parquet")
    assert table.column("truncated").to_pylist() == [False, True, True, False]
    assert table.column("num_tokens").to_pylist() == [3, 51, 51, 3]
    assert table_to_vectors(table).dtype == np.float32
    assert open_vectors(tmp_path / "vectors").vectors.dtype == np.float32


# ---- a second run


def test_a_second_run_skips_finished_shards(folder: Path) -> None:
    before = stamps(folder / "vectors")
    second = encode(folder)
    assert second.up_to_date
    assert second.encoded == ()
    assert second.manifest == Manifest.load(folder / "vectors")
    assert stamps(folder / "vectors") == before


def test_the_job_writes_the_array_that_readers_map_and_makes_it_for_shards_that_have_none(
    folder: Path,
) -> None:
    made = array_folder(folder / "vectors", Manifest.load(folder / "vectors"))
    assert (made / "array.json").exists()
    before = stamps(folder / "vectors")
    shutil.rmtree(made.parent)  # as earlier versions left it
    again = encode(folder)
    assert (again.up_to_date, again.encoded) == (False, ())
    assert (made / "array.json").exists()
    assert stamps(folder / "vectors") == before
    assert encode(folder).up_to_date


def test_tasks_write_the_parts_of_an_array(ray_cluster: str, folder: Path) -> None:
    vectors = folder / "vectors"
    manifest, expected = Manifest.load(vectors), open_vectors(vectors)
    shutil.rmtree(vectors / "_array")
    writers = []

    def each(part: Callable[[int], Any], numbers: range) -> Iterable[Any]:
        writers.append(len(numbers))
        return in_tasks(None, part, numbers)

    largest = max(s.rows for s in manifest.shards)
    assert write_array(vectors, manifest, part_rows=largest, each=each)
    assert writers == [len(manifest.shards)]
    array = open_vectors(vectors)
    assert len(array.vectors.parts) == len(manifest.shards) > 1
    np.testing.assert_array_equal(array.vectors, expected.vectors)
    np.testing.assert_array_equal(array.neighbour_cosines, expected.neighbour_cosines)
    assert array.texts(range(len(array))) == expected.texts(range(len(expected)))

    damage(vectors / manifest.shards[1].file, "flipped")
    shutil.rmtree(vectors / "_array")
    with pytest.raises(InputError, match=r"part-00001\.parquet"):
        write_array(vectors, manifest, part_rows=largest, each=each)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(data[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        path.write_bytes(flipped)


@pytest.mark.parametrize("finished", [True, False], ids=["after-the-end", "after-a-kill"])
def test_only_damaged_shards_are_redone(ray_cluster: str, folder: Path, finished: bool) -> None:
    manifest = Manifest.load(folder / "vectors")
    ids, vectors = ids_and_vectors(folder / "vectors")
    before = stamps(folder / "vectors")
    # What keeps its size is found on its own: with another shard gone, all would be looked at anyway.
    damages = {3: "flipped bit"} if finished else {0: "missing", 1: "cut off", 2: "empty", 3: "flipped bit"}
    for number, how in damages.items():
        damage(folder / "vectors" / f"part-{number:05d}.parquet", how)
    if not finished:
        (folder / "vectors" / "manifest.json").unlink()
        temporary_name(folder / "vectors" / "part-00001.parquet").write_bytes(b"half a shard")
    result = encode(folder)
    assert result.encoded == tuple(f"part-{i:05d}.parquet" for i in damages)
    after = stamps(folder / "vectors")
    assert {n for n in before if after[n] != before[n]} == set(result.encoded)
    assert result.manifest.fingerprint == manifest.fingerprint
    again_ids, again_vectors = ids_and_vectors(folder / "vectors")
    assert again_ids == ids
    np.testing.assert_array_equal(again_vectors, vectors)
    assert {p.name for p in (folder / "vectors").iterdir()} == {
        *before,
        "manifest.json",
        "settings.json",
        "_array",
    }
    assert open_vectors(folder / "vectors").chunk_ids.tolist() == ids


def test_a_shard_counts_as_finished_only_with_its_own_footer_and_ids(folder: Path) -> None:
    chunks = Manifest.load(folder / "chunks").shards[1]
    source, target = folder / "chunks" / chunks.file, folder / "vectors" / chunks.file
    footer = footer_of(chunks, FakeCodec().identity, EncodeSettings(FakeCodec().identity.digest))
    whole = finished_shard(target, source, footer)
    assert whole is not None
    assert whole[0] == Manifest.load(folder / "vectors").shards[1]
    for other in (
        footer_of(chunks, FakeCodec("other").identity, EncodeSettings(FakeCodec().identity.digest)),
        footer_of(chunks, FakeCodec().identity, EncodeSettings(FakeCodec().identity.digest, "float32")),
        footer_of(dataclasses.replace(chunks, sha256="0" * 64), FakeCodec().identity, EncodeSettings("x")),
    ):
        assert finished_shard(target, source, other) is None
    table = read_table(target)
    write_table(target, table.slice(1))  # a row is gone, the footer is right
    assert read_footer(target) == footer
    assert finished_shard(target, source, footer) is None


def test_changed_chunks_are_encoded_again_and_the_rest_stays(ray_cluster: str, folder: Path) -> None:
    before = stamps(folder / "vectors")
    articles = fake_articles(40)
    articles[9] = fake_articles(1, seed=5)[0]  # in the second shard
    write_chunks(folder / "chunks", articles)
    result = encode(folder)
    assert result.encoded == ("part-00001.parquet",)
    after = stamps(folder / "vectors")
    assert {n for n in after if after[n] != before[n]} == {"part-00001.parquet"}
    assert open_vectors(folder / "vectors").texts([9 * 12]) == [articles[9][0]]


def test_vectors_of_chunks_that_are_gone_are_removed(folder: Path) -> None:
    (folder / "chunks" / "part-00004.parquet").unlink()
    write_chunks(folder / "chunks", fake_articles(32))
    result = encode(folder)
    assert result.encoded == ()
    assert sorted(stamps(folder / "vectors")) == [f"part-{i:05d}.parquet" for i in range(4)]
    assert result.manifest.rows == 32 * 12


# ---- codes


def codes_of(folder: Path) -> list[tuple[int, float]]:
    tables = [read_table(p) for p in sorted((folder / "vectors").glob("part-*.parquet"))]
    assert {t.schema.names[-2:] == ["tmd_code", "tmd_confidence"] for t in tables} == {True}
    return [
        pair
        for t in tables
        for pair in zip(*(t.column(n).to_pylist() for n in t.schema.names[-2:]), strict=True)
    ]


def test_codes_are_written_with_the_vectors_or_added_to_them_and_are_the_same(
    ray_cluster: str, folder: Path, tmp_path: Path
) -> None:
    plain = read_footer(folder / "vectors" / "part-00000.parquet")
    _, vectors = ids_and_vectors(folder / "vectors")
    # Of a codec that can encode the labels' phrases alone: the vectors must be those that were there.
    added = encode(folder, phrases_only_codec, tmd=True)
    assert (len(added.encoded), added.up_to_date) == (5, False)
    np.testing.assert_array_equal(ids_and_vectors(folder / "vectors")[1], vectors)
    footer = read_footer(folder / "vectors" / "part-00000.parquet")
    assert footer == {**plain, "settings": {**plain["settings"], "tmd": coder_name()}}
    assert added.manifest.inputs["tmd"] == coder_name()
    prototypes = Prototypes.of(lambda texts: FakeCodec().encode_chunks(texts).vectors)
    codes, confidences = prototypes.code(vectors.astype(np.float32))
    assert [c for c, _ in codes_of(folder)] == codes.tolist()
    assert [c for _, c in codes_of(folder)] == pytest.approx(confidences.tolist())
    assert len(set(codes.tolist())) > 100
    assert len(open_vectors(folder / "vectors")) == 480  # whose reader knows no codes
    write_chunks(tmp_path / "new" / "chunks", fake_articles(40))
    at_once = encode(tmp_path / "new", tmd=True)
    assert at_once.manifest.fingerprint == added.manifest.fingerprint
    assert encode(folder, phrases_only_codec, tmd=True).up_to_date


def test_a_folder_that_has_codes_keeps_them_and_gets_those_of_new_labels(
    ray_cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = encode(folder, tmd=True)
    assert encode(folder).up_to_date
    assert Manifest.load(folder / "vectors").fingerprint == coded.manifest.fingerprint
    before = stamps(folder / "vectors")
    (folder / "vectors" / "part-00002.parquet").unlink()
    assert encode(folder).encoded == ("part-00002.parquet",)
    assert len(codes_of(folder)) == 480
    after = stamps(folder / "vectors")
    assert {n for n in after if after[n] != before[n]} == {"part-00002.parquet"}
    monkeypatch.setattr("jobs.encode.coder_name", lambda: "prototype of other phrases")
    assert len(encode(folder, phrases_only_codec).encoded) == 5
    assert len(codes_of(folder)) == 480


# ---- refusals


def test_chunks_cut_with_another_tokenizer_are_refused_before_ray_starts(tmp_path: Path) -> None:
    other = FakeTokenizer(seed="other words")
    write_chunks(tmp_path / "chunks", fake_articles(2), tokenizer=other)
    with pytest.raises(IdentityError) as refusal:
        encode(tmp_path)
    message = str(refusal.value)
    assert other.sha256[:16] in message
    assert FakeTokenizer().sha256[:16] in message
    assert "Run `latent chunk` with --codec fake" in message
    assert not (tmp_path / "vectors").exists()


def test_chunks_longer_than_the_codec_takes_are_refused(tmp_path: Path) -> None:
    write_chunks(tmp_path / "chunks", fake_articles(2), tokenizer=FakeTokenizer(max_tokens=64))
    with pytest.raises(IdentityError, match=r"have up to 64 tokens, codec fake .* takes 32"):
        encode(tmp_path)


def test_nan_from_the_encoder_is_refused_with_shard_and_chunk_and_other_shards_are_kept(
    ray_cluster: str, tmp_path: Path
) -> None:
    articles = fake_articles(24, 4)
    articles[11][2] = "a poison chunk"
    write_chunks(tmp_path / "chunks", articles)
    chunk = read_table(tmp_path / "chunks" / "part-00001.parquet").column("chunk_id")[3 * 4 + 2]
    with pytest.raises(InputError, match=rf"part-00001\.parquet: .*row 14 \(id {chunk}\) holds NaN"):
        encode(tmp_path, broken_codec)
    left = {p.name for p in (tmp_path / "vectors").iterdir()}
    assert left == {"part-00000.parquet", "part-00002.parquet", "settings.json"}


def other_codec_on_workers() -> FakeCodec:
    """The codec asked for in this process, another one in a worker, as a node with old weights has."""
    import ray

    return FakeCodec(seed="old weights" if ray.get_runtime_context().get_actor_id() else "words")


def test_a_worker_with_another_codec_is_refused(ray_cluster: str, tmp_path: Path) -> None:
    write_chunks(tmp_path / "chunks", fake_articles(2))
    with pytest.raises(IdentityError, match=r"this job holds vectors of codec fake .* the worker on"):
        encode(tmp_path, other_codec_on_workers)
    assert stamps(tmp_path / "vectors") == {}


def test_vectors_of_another_codec_are_never_mixed_in(ray_cluster: str, folder: Path) -> None:
    before = stamps(folder / "vectors")
    with pytest.raises(OutputError, match=r"made with other settings: codec was .* now .* --overwrite"):
        encode(folder, lambda: FakeCodec("other"))
    assert stamps(folder / "vectors") == before
    result = encode(folder, lambda: FakeCodec("other"), overwrite=True)
    assert len(result.encoded) == 5
    assert result.manifest.identity == FakeCodec("other").identity


def test_a_folder_begun_with_another_number_type_is_refused(folder: Path) -> None:
    (folder / "vectors" / "manifest.json").unlink()
    with pytest.raises(OutputError, match="dtype was 'float16', now 'float32'"):
        encode(folder, dtype="float32")


def test_a_missing_chunk_shard_is_refused_by_name(folder: Path) -> None:
    damage(folder / "chunks" / "part-00003.parquet", "missing")
    with pytest.raises(InputError, match=r"part-00003\.parquet is missing"):
        encode(folder)


def test_a_chunk_that_comes_twice_is_refused(ray_cluster: str, folder: Path) -> None:
    manifest = Manifest.load(folder / "chunks")
    shutil.copy(folder / "chunks" / "part-00000.parquet", folder / "chunks" / "part-00005.parquet")
    again = dataclasses.replace(manifest.shards[0], file="part-00005.parquet")
    shards = (*manifest.shards, again)
    dataclasses.replace(manifest, shards=shards, rows=manifest.rows + again.rows).save(folder / "chunks")
    with pytest.raises(InputError, match=r"comes 2 times \(96 chunks come more than once\)"):
        encode(folder)
    assert not (folder / "vectors" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), "lacks {0}: expected the 96 ids .* got 95 .1 missing, 0 unexpected"),
        (lambda t: pa.concat_tables([t.slice(1), t.slice(0, 1)]), "has another order"),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "has another order: .* got 97"),
    ],
)
def test_ids_that_went_in_must_come_out(
    folder: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    path = folder / "vectors" / "part-00002.parquet"
    table = read_table(path)
    write_table(path, change(table))
    first = table.column("chunk_id")[0].as_py()
    with pytest.raises(InputError, match=r"part-00002\.parquet " + message.format(first)):
        require_same_ids(folder / "chunks" / path.name, path)


def test_unfinished_chunks_and_the_input_as_output_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run `latent chunk`"):
        encode(tmp_path)
    write_chunks(tmp_path / "chunks", fake_articles(2))
    with pytest.raises(OutputError, match="is the --input"):
        encode_chunks(tmp_path / "chunks", tmp_path / "chunks", fake_codec)


# ---- the command, with the shipped codec


def command(source: Path, target: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.encode", "--input", str(source), "--output", str(target), *options]


def run_command(source: Path, target: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the closing line of JSON ({} where there is none), and stderr."""
    done = subprocess.run(
        command(source, target, *options),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def real_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled sample cut for the shipped codec, in small shards, as the chunk job leaves it."""
    tokenizer = load_tokenizer("mini")
    chunker = Chunker(tokenizer)
    articles = []
    for path in sorted((CHECKOUT / "data" / "sample").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            article = Article(record["id"], record["title"], record["text"], "sample")
            articles.append([c.text for c in chunker.chunk([article])[0]])
    folder = tmp_path_factory.mktemp("real") / "chunks"
    write_chunks(folder, articles, articles_per_shard=2, tokenizer=tokenizer)
    return folder


def require_complete_summary(summary: dict[str, Any], target: Path, num_shards: int) -> None:
    """The closing line of a first run holds what the pipeline reads."""
    assert summary["stage"] == "encode"
    assert summary["rows"] == summary["encoded_rows"] == Manifest.load(target, "vectors").rows
    assert summary["up_to_date"] is False
    assert summary["redone"] == summary["shards"] == num_shards
    assert summary["paths"] == [str(target)]
    assert summary["rows_per_second"] > 0
    assert summary["codec"]["name"] == "mini"
    assert {"ray", "torch"} <= set(summary["versions"])


@pytest.mark.slow
def test_a_kill_halfway_and_a_second_run_give_the_ids_and_vectors_of_an_undisturbed_run(
    ray_cluster: str, real_chunks: Path, tmp_path: Path
) -> None:
    num_shards = len(Manifest.load(real_chunks).shards)
    target = tmp_path / "killed"
    child = subprocess.Popen(
        command(real_chunks, target),
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while len(stamps(target)) < 3:
            assert child.poll() is None, "the job ended before it was killed"
            assert time.monotonic() < deadline, "no three shards in four minutes"
            time.sleep(0.001)
        started = psutil.Process(child.pid).children(recursive=True)
    finally:
        if child.returncode is None:  # not yet reaped, so the number is still its own
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    # Ray's own processes end by themselves once the one that started them is gone.
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
    survived = stamps(target)
    assert 3 <= len(survived) < num_shards, "the kill came too late to be halfway"
    assert not (target / "manifest.json").exists()
    temporary_name(target / "part-00001.parquet").write_bytes(b"half a shard")

    code, summary, stderr = run_command(real_chunks, target, "--address", ray_cluster)
    assert code == 0, stderr
    assert summary["redone"] == num_shards - len(survived)
    assert f"keeping {len(survived)} of {num_shards} shards that are finished" in stderr
    after = stamps(target)
    assert {name: after[name] for name in survived} == survived
    assert list(target.glob(".*.tmp")) == []

    undisturbed = tmp_path / "undisturbed"
    code, summary, stderr = run_command(real_chunks, undisturbed, "--address", ray_cluster)
    assert code == 0, stderr
    assert ".cc:" not in stderr  # Ray's own log, where nothing is wrong
    require_complete_summary(summary, undisturbed, num_shards)
    ids, vectors = ids_and_vectors(target)
    wanted_ids, wanted_vectors = ids_and_vectors(undisturbed)
    assert ids == wanted_ids
    assert len(set(ids)) == len(ids) == Manifest.load(real_chunks).rows
    np.testing.assert_array_equal(vectors, wanted_vectors)
    assert Manifest.load(target).fingerprint == Manifest.load(undisturbed).fingerprint

    code, summary, stderr = run_command(real_chunks, target, "--address", ray_cluster)
    assert (code, summary["up_to_date"], summary["redone"]) == (0, True, 0)
    assert "is up to date" in stderr
    assert stamps(target) == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codec", "nope"], "error: unknown codec 'nope'; expected one of gtr-ielab, gtr-jxe, mini"),
        (["--codec-path", "/nowhere"], "error: codec folder /nowhere lacks config.json"),
    ],
)
def test_a_wrong_codec_is_one_line_and_an_exit_code(
    real_chunks: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, summary, stderr = run_command(real_chunks, tmp_path / "vectors", *options)
    assert code == 1
    assert summary == {}
    assert stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in stderr
    assert not (tmp_path / "vectors").exists()


def test_a_refusal_of_a_worker_is_one_line_and_an_exit_code(ray_cluster: str, tmp_path: Path) -> None:
    write_chunks(tmp_path / "chunks", [["One short text."]], tokenizer=load_tokenizer("mini"))
    damage(tmp_path / "chunks" / "part-00000.parquet", "flipped bit")
    code, _, stderr = run_command(tmp_path / "chunks", tmp_path / "vectors", "--address", ray_cluster)
    assert code == 1
    assert "error: chunk shard" in stderr.splitlines()[-1]
    assert "part-00000.parquet has SHA-256" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def fails_at_one(folder: Path, number: int) -> int:
    if number == 1:
        raise OSError(28, "No space left on device")
    time.sleep(5 if number > 1 else 0)
    (folder / str(number)).touch()
    return number


def test_after_an_error_the_tasks_left_are_cancelled_and_its_reason_is_kept(
    ray_cluster: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$") as caught:
        list(in_tasks(None, partial(fails_at_one, tmp_path), range(6), num_cpus=1))
    assert caught.value.errno == 28
    time.sleep(12)  # uncancelled, all of them would have left their number by now
    # Of four, two may be starting at the moment of the error, and Ray may miss those.
    assert len(list(tmp_path.iterdir())) <= 1 + 2
