"""The array that readers map: what is in it, who writes it, and what it refuses."""

import dataclasses
import errno
import pickle
import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import lvm.vectors.array as array_module
from lvm.errors import IdentityError, InputError, OutputError
from lvm.vectors.array import VectorArray, open_vectors, write_array
from lvm.vectors.sequences import WindowSettings, make_windows
from lvm.vectors.shards import (
    Manifest,
    Shard,
    read_table,
    shards_at_once,
    table_to_vectors,
    with_footer,
    write_table,
)
from tests.doubles import FakeCodec, fake_articles, write_vectors


def rewrite(directory: Path, shard: int, table: pa.Table) -> None:
    """Replace a shard and list it in the manifest, as a job with another content would."""
    manifest = Manifest.load(directory)
    shards = list(manifest.shards)
    shards[shard] = write_table(directory / shards[shard].file, table)
    rows = sum(s.rows for s in shards)
    dataclasses.replace(manifest, shards=tuple(shards), rows=rows).save(directory)


def column(table: pa.Table, name: str, values: object) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


# ---- the array


def test_the_array_holds_every_chunk_in_order_of_article_and_position(array: VectorArray) -> None:
    assert len(array) == 360
    keys = list(zip(array.doc_ids.tolist(), array.positions.tolist(), strict=True))
    assert keys == [(doc, position) for doc in range(30) for position in range(12)]
    articles = fake_articles(30)
    assert array.texts(range(360)) == [text for article in articles for text in article]
    assert array.titles([0, 359]) == ["Article 0", "Article 29"]
    assert array.sources([5]) == ["double"]


def test_a_row_of_the_array_is_the_vector_of_its_text(array: VectorArray) -> None:
    rows = [0, 13, 200, 359]
    expected = FakeCodec().encode_chunks(array.texts(rows)).vectors
    np.testing.assert_array_equal(array.vectors[rows], expected.astype(np.float16))


def test_vectors_stay_on_disk_and_cannot_be_changed(array: VectorArray) -> None:
    assert isinstance(array.vectors, np.memmap)
    assert array.vectors.dtype == np.float16
    with pytest.raises(ValueError, match="read-only"):
        array.vectors[0] = 0


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    write_vectors(tmp_path / "three", fake_articles(12, 8), articles_per_shard=4)
    return tmp_path / "three"


@pytest.fixture(params=["ordered", "reversed"])
def in_parts(
    request: pytest.FixtureRequest, three_shards: Path, tmp_path: Path
) -> tuple[VectorArray, VectorArray]:
    """An array in one part, and the same of shards in this order in three."""
    manifest = Manifest.load(three_shards)
    one = open_vectors(three_shards)
    other = tmp_path / "parts"
    shutil.copytree(three_shards, other)
    shutil.rmtree(other / "_array")
    shards = manifest.shards if request.param == "ordered" else manifest.shards[::-1]
    made = dataclasses.replace(manifest, shards=shards, inputs={"parts": 3})
    assert write_array(other, made, part_rows=40)
    made.save(other)
    return one, open_vectors(other)


def test_parts_are_read_as_one_array(in_parts: tuple[VectorArray, VectorArray]) -> None:
    one, parts = in_parts
    assert len(parts.vectors.parts) == 3
    for name in array_module._ARRAYS:
        if name != "shard_rows":
            np.testing.assert_array_equal(getattr(parts, name), getattr(one, name), err_msg=name)
    assert parts.texts(range(len(one))) == one.texts(range(len(one)))
    again = pickle.loads(pickle.dumps(parts))
    np.testing.assert_array_equal(again.vectors[5:90], one.vectors[5:90])


@pytest.mark.parametrize("reverse", [False, True])
def test_shards_without_rows_are_read_over(three_shards: Path, reverse: bool) -> None:
    manifest, expected = Manifest.load(three_shards), open_vectors(three_shards)
    nothing = read_table(three_shards / "part-00000.parquet").slice(0, 0)
    empty = [write_table(three_shards / f"part-0000{n}.parquet", nothing) for n in (3, 4)]
    order = manifest.shards[::-1] if reverse else manifest.shards
    for shards in ((*order, *empty), (*empty, *order)):
        made = dataclasses.replace(manifest, shards=shards, inputs={"empty": shards[0].file})
        for part_rows in (1000, 33, 32, 1):
            shutil.rmtree(three_shards / "_array")
            assert write_array(three_shards, made, part_rows)
            made.save(three_shards)
            array = open_vectors(three_shards)
            np.testing.assert_array_equal(array.vectors, expected.vectors)
            np.testing.assert_array_equal(array.neighbour_cosines, expected.neighbour_cosines)


def test_windows_over_parts_are_those_over_one_array(in_parts: tuple[VectorArray, VectorArray]) -> None:
    one, parts = (make_windows(array, WindowSettings(context=3, min_tokens=1)) for array in in_parts)
    np.testing.assert_array_equal(parts.starts, one.starts)
    assert parts.report == one.report
    for found, wanted in zip(parts.batch(slice(0, 60)), one.batch(slice(0, 60)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for name, split in one.split().items():
        np.testing.assert_array_equal(parts.split()[name].doc_ids, split.doc_ids)


def test_what_is_wrong_across_parts_is_refused(three_shards: Path) -> None:
    folder = three_shards
    manifest = Manifest.load(folder)
    table = read_table(folder / "part-00002.parquet")
    elsewhere = read_table(folder / "part-00000.parquet")
    given = {
        "comes 2 times": ("chunk_id", [elsewhere.column("chunk_id")[3].as_py()]),
        "has two chunks at position 0": ("position", [0]),
    }
    for reason, (name, values) in given.items():
        again = column(table, name, [*values, *table.column(name).to_pylist()[1:]])
        if name == "position":
            again = column(again, "doc_id", [0, *table.column("doc_id").to_pylist()[1:]])
        shard = write_table(folder / "part-00002.parquet", again)
        wrong = dataclasses.replace(manifest, shards=(*manifest.shards[:2], shard), inputs={"wrong": name})
        with pytest.raises(InputError, match=reason):
            write_array(folder, wrong, part_rows=40)
    # Ids of another width in the same part change nothing.
    wide = [elsewhere.column("chunk_id")[3].as_py(), *(f"{i:040d}" for i in range(1, table.num_rows))]
    shard = write_table(folder / "part-00002.parquet", column(table, "chunk_id", wide))
    wrong = dataclasses.replace(manifest, shards=(*manifest.shards[:2], shard), inputs={"wrong": "wide"})
    for part_rows in (1000, 40):
        with pytest.raises(InputError, match="comes 2 times"):
            write_array(folder, wrong, part_rows)
    (left,) = [p for p in (folder / "_array").iterdir()]
    assert left.name.startswith(manifest.fingerprint)


def test_rows_are_sorted_even_when_the_shards_are_not(folder: Path, tmp_path: Path) -> None:
    expected = open_vectors(folder)
    shuffled = tmp_path / "shuffled"
    manifest = Manifest.load(folder)
    tables = [read_table(folder / s.file) for s in manifest.shards]
    whole = pa.concat_tables(tables).take(np.random.default_rng(1).permutation(96))
    shards = [write_table(shuffled / f"part-{i:05d}.parquet", whole.slice(i * 40, 40)) for i in range(3)]
    dataclasses.replace(manifest, shards=tuple(shards)).save(shuffled)
    array = open_vectors(shuffled)
    for name in ("vectors", "doc_ids", "positions", "chunk_ids", "num_tokens", "norms", "text_keys"):
        np.testing.assert_array_equal(getattr(array, name), getattr(expected, name))
    assert array.texts(range(96)) == expected.texts(range(96))


def test_the_array_is_made_once_and_again_when_the_vectors_change(folder: Path) -> None:
    first = open_vectors(folder)
    before, norms = np.array(first.vectors[0]), np.array(first.norms)
    made = next((folder / "_array").iterdir())
    inode = made.stat().st_ino
    assert not write_array(folder, Manifest.load(folder))
    assert open_vectors(folder).fingerprint == first.fingerprint
    assert [p.stat().st_ino for p in (folder / "_array").iterdir()] == [inode]
    (made / "norms.npy").unlink()
    (made / "norms.npy").write_bytes(b"cut off")
    assert write_array(folder, Manifest.load(folder))  # a damaged one is made again
    np.testing.assert_array_equal(open_vectors(folder).norms, norms)
    write_vectors(folder, fake_articles(12, 8, seed=1))
    assert open_vectors(folder).fingerprint != first.fingerprint
    assert len(list((folder / "_array").iterdir())) == 1
    assert first.texts([0]) == [fake_articles(12, 8)[0][0]]  # a reader of the old array keeps it
    assert first.texts([95]) == [fake_articles(12, 8)[11][7]]
    np.testing.assert_array_equal(first.vectors[0], before)


def test_a_kill_while_the_array_is_made_leaves_nothing_that_is_taken_for_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(folder / "_array")
    with monkeypatch.context() as patch:
        patch.setattr("lvm.vectors.array._text_key", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_array(folder, Manifest.load(folder))
    assert list((folder / "_array").iterdir()) == []
    (folder / "_array" / ".killed.0123.tmp").mkdir()  # what a kill without warning leaves
    assert write_array(folder, Manifest.load(folder))
    assert len(list((folder / "_array").iterdir())) == 1
    assert len(open_vectors(folder)) == 96


# ---- opening writes nothing


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    """The folder on a mount that takes no write, as another machine's user has it."""
    mounted = subprocess.run(
        ["mount", "--bind", "-o", "ro", str(folder), str(folder)], capture_output=True, check=False
    ).returncode
    if mounted:  # not root: rights do the same
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
    with pytest.raises(OSError, match=r"Read-only|Permission"):
        (folder / "x").write_bytes(b"")
    yield folder
    if mounted:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    else:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_opens(read_only: Path) -> None:
    before = state_of(read_only)
    array = open_vectors(read_only)
    assert array.texts([0, 95]) == [fake_articles(12, 8)[0][0], fake_articles(12, 8)[11][7]]
    assert isinstance(array.vectors, np.memmap)
    assert str(read_only) in str(array.vectors.filename)
    assert state_of(read_only) == before


def test_shards_without_an_array_open_as_before_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    """As folders of earlier versions are: without one, or with one of another layout."""
    expected = open_vectors(folder)
    made = next((folder / "_array").iterdir())
    made.rename(made.with_name(made.name.replace("-2", "-1")))
    before = state_of(folder)
    array = open_vectors(folder)
    assert state_of(folder) == before
    for name in ("vectors", "doc_ids", "positions", "chunk_ids", "num_tokens", "norms", "neighbour_cosines"):
        np.testing.assert_array_equal(getattr(array, name), getattr(expected, name))
    assert array.texts(range(96)) == expected.texts(range(96))
    assert pickle.loads(pickle.dumps(array)).fingerprint == expected.fingerprint
    assert write_array(folder, Manifest.load(folder))
    assert [p.name for p in (folder / "_array").iterdir()] == [f"{expected.fingerprint}-2"]


def test_a_folder_that_cannot_be_written_opens_without_an_array_too(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    shutil.rmtree(folder / "_array")
    read_only = request.getfixturevalue("read_only")
    assert len(open_vectors(read_only)) == 96
    with pytest.raises(OutputError, match="cannot be written"):
        write_array(read_only, Manifest.load(read_only))


def test_texts_are_in_the_shards_alone(folder: Path) -> None:
    made = next((folder / "_array").iterdir())
    text = fake_articles(12, 8)[3][2].encode()
    assert not [p.name for p in made.iterdir() if text[:20] in p.read_bytes()]
    assert {p.name for p in made.iterdir()} == {
        *(f"{n}.npy" for n in ("vectors", "doc_ids", "positions", "chunk_ids", "num_tokens", "truncated")),
        *(f"{n}.npy" for n in ("norms", "neighbour_cosines", "text_keys", "shard_rows")),
        "array.json",
    }


def test_texts_come_in_the_order_asked_for_from_any_shard_and_any_thread(array: VectorArray) -> None:
    texts = [text for article in fake_articles(30) for text in article]
    rows = np.random.default_rng(0).integers(0, 360, 500)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(array.texts, [rows] * 16):
            assert found == [texts[r] for r in rows]
    assert array.texts([]) == []


def test_texts_are_kept_in_memory_up_to_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = read_table(folder / "part-00000.parquet", ["title", "text", "source"]).nbytes
    monkeypatch.setattr("lvm.vectors.array.TEXT_BYTES", int(size * 1.2))
    array = open_vectors(folder)
    expected = [text for article in fake_articles(12, 8) for text in article]
    for _ in range(2):
        assert array.texts(range(96)) == expected
        assert array.shards._kept.currsize <= size * 1.2


def test_a_worker_maps_the_same_files_and_receives_no_vectors(array: VectorArray) -> None:
    assert len(pickle.dumps(array)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)).vectors[5], array.vectors[5])


def test_a_worker_is_told_when_the_vectors_changed_on_the_way(folder: Path) -> None:
    sent = pickle.dumps(open_vectors(folder))
    write_vectors(folder, fake_articles(12, 8, seed=1))
    with pytest.raises(InputError, match="changed while they were in use"):
        pickle.loads(sent)


def test_neighbour_cosines_are_those_of_the_stored_vectors(array: VectorArray) -> None:
    a, b = array.vectors[7].astype(np.float64), array.vectors[8].astype(np.float64)
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert array.neighbour_cosines[7] == pytest.approx(expected, abs=1e-5)
    assert array.neighbour_cosines[359] == 0


def test_text_keys_agree_when_only_case_and_white_space_differ(tmp_path: Path) -> None:
    write_vectors(tmp_path, [["One  two", "one two ", "one three"]])
    keys = open_vectors(tmp_path).text_keys
    assert keys[0] == keys[1] != keys[2]


# ---- what the array refuses


def test_an_unfinished_encode_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run `latent encode`"):
        open_vectors(tmp_path)


def test_a_cut_off_shard_is_refused_by_name(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"part-00001\.parquet has"):
        open_vectors(folder)


def test_shards_of_two_codecs_are_refused_and_both_named(folder: Path) -> None:
    other = FakeCodec("other words")
    table = read_table(folder / "part-00001.parquet")
    rewrite(folder, 1, with_footer(table, {"codec": other.identity.to_dict()}))
    with pytest.raises(IdentityError, match=f"{FakeCodec().identity.digest}.*{other.identity.digest}"):
        open_vectors(folder)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "holds NaN"), (0.0, r"norm 0\.\d+, expected 1")])
def test_a_stored_vector_that_is_no_unit_vector_is_refused_with_its_chunk(
    folder: Path, value: float, message: str
) -> None:
    table = read_table(folder / "part-00000.parquet")
    vectors = table_to_vectors(table).copy()
    vectors[3, : 768 if value == 0 else 1] = value
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 768)
    rewrite(folder, 0, table.set_column(table.num_columns - 1, table.schema.field("vector"), flat))
    with pytest.raises(InputError, match=rf"part-00000\.parquet.*{table.column('chunk_id')[3]}.*{message}"):
        open_vectors(folder)


def test_vectors_of_another_dimension_are_refused(folder: Path) -> None:
    table = read_table(folder / "part-00000.parquet")
    flat = table_to_vectors(table)[:, :384].copy()
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), 384)
    rewrite(folder, 0, table.drop_columns("vector").append_column("vector", values))
    with pytest.raises(InputError, match=r"part-00000\.parquet has vectors of shape \(64, 384\), expected"):
        open_vectors(folder)


def test_a_chunk_that_comes_twice_is_refused(folder: Path) -> None:
    table = read_table(folder / "part-00001.parquet")
    ids = table.column("chunk_id").to_pylist()
    rewrite(folder, 1, column(table, "chunk_id", [ids[1], *ids[1:]]))
    with pytest.raises(InputError, match=f"chunk {ids[1]} comes 2 times"):
        open_vectors(folder)


def test_ids_of_equal_hashes_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvm.vectors.array._hashes", lambda ids: np.zeros(len(ids), np.uint64))
    shutil.rmtree(folder / "_array")
    assert len(open_vectors(folder)) == len(set(open_vectors(folder).chunk_ids.tolist()))
    table = read_table(folder / "part-00001.parquet")
    ids = table.column("chunk_id").to_pylist()
    rewrite(folder, 1, column(table, "chunk_id", [ids[1], *ids[1:]]))
    with pytest.raises(InputError, match=f"chunk {ids[1]} comes 2 times"):
        open_vectors(folder)


def test_ids_may_be_longer_than_ours(folder: Path) -> None:
    table = read_table(folder / "part-00001.parquet")
    ids = [f"{i}-of-another-source" for i in table.column("chunk_id").to_pylist()]
    rewrite(folder, 1, column(table, "chunk_id", ids))
    array = open_vectors(folder)
    assert set(ids) <= set(array.chunk_ids.tolist())
    assert len(array.vectors) == len(array)


@pytest.mark.parametrize("ordered", [True, False])
def test_the_array_is_made_in_memory_that_hardly_grows_with_the_corpus(tmp_path: Path, ordered: bool) -> None:
    peaks = []
    # Far apart, since what two threads read ahead differs from run to run.
    for articles in (400, 2400):
        folder = tmp_path / str(articles)
        texts = [[f"{a} {c}" for c in range(50)] for a in range(articles)]
        made = write_vectors(folder, texts, FakeCodec(dim=8), articles_per_shard=20)
        shards = made.shards if ordered else made.shards[::-1]
        again = dataclasses.replace(made, shards=shards, inputs={"again": 1})
        tracemalloc.start()
        assert write_array(folder, again)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 100_000 < (16 if ordered else 120)  # bytes a chunk, where an id has 32


def test_two_chunks_in_one_place_are_refused(folder: Path) -> None:
    table = read_table(folder / "part-00001.parquet")
    rewrite(folder, 1, column(table, "position", [1, *table.column("position").to_pylist()[1:]]))
    with pytest.raises(InputError, match="article 8 has two chunks at position 1"):
        open_vectors(folder)


def test_a_damaged_array_is_refused_with_the_folder_to_delete(folder: Path) -> None:
    open_vectors(folder)
    path = next((folder / "_array").iterdir()) / "vectors.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"vectors\.npy is damaged .* delete .*_array"):
        open_vectors(folder)


@pytest.mark.parametrize("listed", ["[]", "{"])
def test_an_array_whose_list_is_damaged_is_refused_with_the_folder_to_delete(
    folder: Path, listed: str
) -> None:
    (next((folder / "_array").iterdir()) / "array.json").write_text(listed)
    for use in (lambda: open_vectors(folder), lambda: write_array(folder, Manifest.load(folder))):
        with pytest.raises(InputError, match=r"array\.json is damaged .* delete .*_array"):
            use()


def test_a_column_of_another_length_is_refused(folder: Path) -> None:
    np.save(next((folder / "_array").iterdir()) / "shard_rows.npy", np.arange(5))
    with pytest.raises(InputError, match=r"shard_rows\.npy has 5 rows, expected 96"):
        open_vectors(folder)


def test_a_temporary_folder_without_room_is_named_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(folder / "_array")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lvm.vectors.array._save", full)
    with pytest.raises(OutputError, match=r"No space left.*TMPDIR.*latent encode"):
        open_vectors(folder)


def test_vectors_of_another_codec_are_refused_by_name(array: VectorArray) -> None:
    array.require_codec(FakeCodec().identity, "model lstm")
    with pytest.raises(IdentityError, match="model lstm"):
        array.require_codec(FakeCodec("other").identity, "model lstm")


def test_few_large_shards_are_held_at_once() -> None:
    def at_once(rows: int) -> int:
        return shards_at_once([Shard("part-00000.parquet", rows, 1, "")], 768, 8)

    assert at_once(2048) == 8
    assert at_once(16_384) == 5  # 256 MiB of vectors of 3 KiB
    assert at_once(1_000_000) == 1
    assert shards_at_once([], 768, 8) == 8


def test_threads_read_ahead_in_order_and_no_further_than_they_may() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.01 * (number % 2))  # the even ones overtake
        return number

    results = array_module._in_threads(work, range(100), array_module.READERS)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(begun) <= 10 + array_module.READERS
    results.close()
    assert len(begun) <= 11 + array_module.READERS
