"""Shards and manifests: whole or absent, checked, and refused when other settings made them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.errors import InputError, OutputError
from lvm.storage import temporary_name
from lvm.vectors import shards
from lvm.vectors.artefact import Artefact
from lvm.vectors.shards import (
    CHUNK_SCHEMA,
    Manifest,
    fingerprint,
    read_footer,
    read_table,
    sweep_temporaries,
    table_to_vectors,
    vector_schema,
    vectors_to_table,
    with_footer,
    write_bytes,
    write_table,
)
from tests.doubles import Encoded, FakeCodec, chunk_table, fake_articles, write_chunks


@pytest.fixture
def chunks() -> pa.Table:
    return chunk_table(fake_articles(3, 4))


def encode(table: pa.Table) -> Encoded:
    return FakeCodec().encode_chunks(table.column("text").to_pylist())


def to_table(table: pa.Table, encoded: Encoded, **changes: object) -> pa.Table:
    fields = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)} | changes
    return vectors_to_table(table, **fields)


def test_fingerprint_ignores_the_order_of_keys_and_sees_every_value() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1, "b": [2]}) != fingerprint({"a": 1, "b": [3]})
    assert len(fingerprint({})) == 16


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_come_back_from_a_shard_in_order_with_their_text(
    tmp_path: Path, chunks: pa.Table, dtype: shards.VectorType
) -> None:
    encoded = encode(chunks)
    write_table(tmp_path / "part-00000.parquet", to_table(chunks, encoded, dtype=dtype))
    table = read_table(tmp_path / "part-00000.parquet")
    assert table.schema.equals(vector_schema(768, dtype))
    vectors = table_to_vectors(table)
    assert vectors.dtype == dtype
    np.testing.assert_array_equal(vectors, encoded.vectors.astype(dtype))
    assert table.column("text").to_pylist() == chunks.column("text").to_pylist()
    np.testing.assert_array_equal(table.column("norm").to_numpy(), encoded.norms)


def test_a_stored_vector_is_a_plain_fixed_size_list_that_any_parquet_reader_opens(
    tmp_path: Path, chunks: pa.Table
) -> None:
    write_table(tmp_path / "a.parquet", to_table(chunks, encode(chunks)))
    kind = pq.read_schema(tmp_path / "a.parquet").field("vector").type
    assert kind == pa.list_(pa.float16(), 768) == vector_schema().field("vector").type
    assert not isinstance(kind, pa.BaseExtensionType)


def test_a_slice_of_a_vector_table_gives_its_own_rows(chunks: pa.Table) -> None:
    table = to_table(chunks, encode(chunks))
    np.testing.assert_array_equal(table_to_vectors(table.slice(5, 3)), table_to_vectors(table)[5:8])


def test_vectors_of_an_empty_table_have_no_rows_but_their_width(chunks: pa.Table) -> None:
    assert table_to_vectors(to_table(chunks, encode(chunks)).slice(0, 0)).shape == (0, 768)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_vector_with_nan_or_infinity_is_refused_with_its_row_and_id(
    chunks: pa.Table, poison: float
) -> None:
    encoded = encode(chunks)
    encoded.vectors[7, 100] = poison
    with pytest.raises(InputError, match=f"row 7 .id {chunks.column('chunk_id')[7]}. holds NaN or infinity"):
        to_table(chunks, encoded)


def test_a_vector_whose_norm_is_not_one_is_refused_with_its_row(chunks: pa.Table) -> None:
    encoded = encode(chunks)
    encoded.vectors[4] *= 1.01
    with pytest.raises(InputError, match=r"row 4 .* norm 1\.0100, expected 1"):
        to_table(chunks, encoded)


def test_rounding_to_float16_leaves_norms_inside_the_tolerance() -> None:
    random = np.random.default_rng(0).standard_normal((2000, 768)).astype(np.float32)
    unit = random / np.linalg.norm(random, axis=1, keepdims=True)
    shards.require_unit_vectors(unit.astype(np.float16), 768, "rounded")


def test_another_number_of_vectors_than_chunks_is_refused(chunks: pa.Table) -> None:
    encoded = encode(chunks)
    with pytest.raises(InputError, match=r"\{'vectors': 11\} for 12 chunks"):
        to_table(chunks, encoded, vectors=encoded.vectors[:-1])


def test_a_table_without_vectors_is_refused_with_its_columns(chunks: pa.Table) -> None:
    with pytest.raises(InputError, match="no column `vector`, only chunk_id, doc_id"):
        table_to_vectors(chunks)


def test_vectors_stored_as_variable_lists_are_refused() -> None:
    with pytest.raises(InputError, match="expected a fixed-size list of float16 or float32"):
        table_to_vectors(pa.table({"vector": [[1.0, 2.0], [3.0]]}))


def test_a_missing_vector_is_refused() -> None:
    table = pa.table({"vector": pa.array([[1.0, 0.0], None], pa.list_(pa.float32(), 2))})
    with pytest.raises(InputError, match="rows without a vector"):
        table_to_vectors(table)


def test_a_failed_write_leaves_neither_shard_nor_temporary_file(
    tmp_path: Path, chunks: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lvm.vectors.shards.os.replace", full_disk)
    with pytest.raises(OutputError, match=r"cannot be written \(no space left\); make room"):
        write_table(tmp_path / "part-00000.parquet", chunks)
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, chunks: pa.Table) -> None:
    first = write_table(tmp_path / "a.parquet", with_footer(chunks, {"x": 1}))
    second = write_table(tmp_path / "b.parquet", with_footer(chunks, {"x": 1}))
    assert first.sha256 == second.sha256 == shards.file_sha256(tmp_path / "a.parquet")
    assert first.bytes == (tmp_path / "a.parquet").stat().st_size
    assert first.rows == 12


def test_the_footer_says_what_a_shard_was_made_from(tmp_path: Path, chunks: pa.Table) -> None:
    write_table(tmp_path / "a.parquet", with_footer(chunks, {"codec": "x", "n": 3}))
    assert read_footer(tmp_path / "a.parquet") == {"codec": "x", "n": 3}
    write_table(tmp_path / "b.parquet", chunks)
    assert read_footer(tmp_path / "b.parquet") == {}


def test_a_flipped_bit_in_a_shard_is_found_on_reading(tmp_path: Path, chunks: pa.Table) -> None:
    path = tmp_path / "part-00003.parquet"
    write_table(path, to_table(chunks, encode(chunks)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"part-00003\.parquet is damaged"):
        read_table(path)


def test_a_cut_off_shard_is_named(tmp_path: Path, chunks: pa.Table) -> None:
    path = tmp_path / "part-00003.parquet"
    write_table(path, chunks)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-00003\.parquet is damaged: expected a complete Parquet file"):
        read_footer(path)


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"part-00009\.parquet is missing"):
        read_table(tmp_path / "part-00009.parquet")


def test_sweeping_removes_temporary_files_and_nothing_else(tmp_path: Path) -> None:
    stray = temporary_name(tmp_path / "part-00000.parquet")
    stray.write_bytes(b"half")
    (tmp_path / "part-00001.parquet").write_bytes(b"whole")
    assert sweep_temporaries(tmp_path) == [stray.name]
    assert [p.name for p in tmp_path.iterdir()] == ["part-00001.parquet"]


def test_small_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    write_bytes(tmp_path / "sub" / "CURRENT", b"one")
    before = (tmp_path / "sub" / "CURRENT").stat().st_ino
    write_bytes(tmp_path / "sub" / "CURRENT", b"two")
    assert (tmp_path / "sub" / "CURRENT").read_bytes() == b"two"
    assert (tmp_path / "sub" / "CURRENT").stat().st_ino != before


# ---- manifests


def test_a_manifest_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = write_chunks(tmp_path, fake_articles(20, 4))
    loaded = Manifest.load(tmp_path, "chunks")
    assert loaded == saved
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.rows == 80
    assert len(loaded.shards) == 3


def test_the_fingerprint_ignores_date_and_versions_and_sees_the_rest(tmp_path: Path) -> None:
    manifest = write_chunks(tmp_path, fake_articles(10, 4))
    same = dataclasses.replace(manifest, created="2001-01-01", versions={"numpy": "0"}, report={})
    assert same.fingerprint == manifest.fingerprint
    changed = dataclasses.replace(manifest.shards[0], sha256="0" * 64)
    for other in (
        dataclasses.replace(manifest, settings={"max_tokens": 33}),
        dataclasses.replace(manifest, inputs={"other": 1}),
        dataclasses.replace(manifest, shards=(changed, *manifest.shards[1:])),
        dataclasses.replace(manifest, codec=FakeCodec().identity.to_dict()),
    ):
        assert other.fingerprint != manifest.fingerprint


def test_an_unfinished_folder_names_the_command_that_finishes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run `latent encode` with --output"):
        Manifest.load(tmp_path, "vectors")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "chunks", "shards": 3}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="is not a manifest of this project"):
        Manifest.load(tmp_path, "chunks")


def test_many_shards_are_listed_in_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = write_chunks(tmp_path, fake_articles(20), 4)
    monkeypatch.setattr(shards, "MOST_IN_JSON", 3)
    few.save(tmp_path)
    (path,) = tmp_path.glob("shards-*.parquet")
    record = json.loads((tmp_path / "manifest.json").read_bytes())
    assert record["shards"]["file"] == path.name
    assert record["shards"]["rows"] == len(few.shards) == 5
    assert Manifest.load(tmp_path, "chunks") == few
    again = dataclasses.replace(few, inputs={"another": 1})
    again.save(tmp_path)
    assert Manifest.load(tmp_path) == again
    (path,) = tmp_path.glob("shards-*.parquet")  # that of before is gone
    for content in (path.read_bytes()[:-9], None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(
            InputError, match=r"manifest\.json is not a manifest .*its list of shards.*Delete it"
        ):
            Manifest.load(tmp_path)
    monkeypatch.setattr(shards, "MOST_IN_JSON", 5)
    few.save(tmp_path)
    assert Manifest.load(tmp_path) == few
    assert not [*tmp_path.glob("shards-*.parquet")]


def test_a_list_whose_shards_are_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_IN_JSON", 3)
    write_chunks(tmp_path, fake_articles(20), 4)
    (path,) = tmp_path.glob("shards-*.parquet")
    listed = read_table(path).to_pylist()
    listed[2]["sha256"] = "0" * 64
    write_table(path, pa.Table.from_pylist(listed))
    with pytest.raises(InputError, match="edited or damaged"):
        Manifest.load(tmp_path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    write_chunks(tmp_path, fake_articles(2, 4))
    record = json.loads((tmp_path / "manifest.json").read_text())
    record["settings"]["max_tokens"] = 64
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="edited or damaged"):
        Manifest.load(tmp_path, "chunks")


def test_a_manifest_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_chunks(tmp_path, fake_articles(2, 4))
    with pytest.raises(InputError, match="holds chunks, expected vectors"):
        Manifest.load(tmp_path, "vectors")


def test_a_manifest_whose_row_count_is_not_that_of_its_shards_is_refused(tmp_path: Path) -> None:
    manifest = write_chunks(tmp_path, fake_articles(2, 4))
    with pytest.raises(InputError, match="says 9 rows but its shards hold 8"):
        dataclasses.replace(manifest, rows=9)


def test_verify_names_a_shard_that_is_missing_cut_off_or_changed(tmp_path: Path) -> None:
    manifest = write_chunks(tmp_path, fake_articles(20, 4))
    manifest.verify(tmp_path, deep=True)
    path = tmp_path / "part-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    manifest.verify(tmp_path)  # the size is right
    with pytest.raises(InputError, match=r"part-00001\.parquet has SHA-256"):
        manifest.verify(tmp_path, deep=True)
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"part-00001\.parquet has [\d,]+ bytes, expected"):
        manifest.verify(tmp_path)
    path.unlink()
    (tmp_path / "part-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"part-00001\.parquet is missing \(1 more"):
        manifest.verify(tmp_path)


# ---- output folders

SETTINGS = {"tokenizer_sha256": "a", "max_tokens": 32}


def finished(directory: Path) -> Manifest:
    manifest = dataclasses.replace(write_chunks(directory, fake_articles(2, 4)), settings=SETTINGS)
    manifest.save(directory)
    return manifest


def test_an_empty_folder_is_free_to_use(tmp_path: Path) -> None:
    assert Artefact(tmp_path / "new", "chunks", SETTINGS).current({}) is None
    Artefact(tmp_path / "new", "chunks", SETTINGS).claim()
    assert json.loads((tmp_path / "new" / "settings.json").read_text())["settings"] == SETTINGS


def test_a_finished_folder_of_the_same_settings_and_inputs_is_found(tmp_path: Path) -> None:
    manifest = finished(tmp_path)
    assert Artefact(tmp_path, "chunks", SETTINGS).current(manifest.inputs) == manifest


def test_tuples_in_settings_equal_the_lists_json_makes_of_them(tmp_path: Path) -> None:
    Artefact(tmp_path, "chunks", {"sizes": (1, 2)}).claim()
    Artefact(tmp_path, "chunks", {"sizes": (1, 2)}).claim()


def test_a_folder_made_from_other_inputs_has_to_be_redone(tmp_path: Path) -> None:
    finished(tmp_path)
    assert Artefact(tmp_path, "chunks", SETTINGS).current({"articles": 3}) is None


def test_a_folder_with_a_missing_shard_has_to_be_redone(tmp_path: Path) -> None:
    manifest = finished(tmp_path)
    (tmp_path / "part-00000.parquet").unlink()
    assert Artefact(tmp_path, "chunks", SETTINGS).current(manifest.inputs) is None


def test_a_folder_of_other_settings_is_refused_untouched_and_the_setting_named(tmp_path: Path) -> None:
    finished(tmp_path)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    other = {**SETTINGS, "max_tokens": 64}
    with pytest.raises(OutputError, match="max_tokens was 32, now 64"):
        Artefact(tmp_path, "chunks", other).current({})
    with pytest.raises(OutputError, match=r"now 64\. Choose another --output or pass --overwrite"):
        Artefact(tmp_path, "chunks", other).claim()
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def test_a_folder_begun_with_other_settings_is_refused_before_it_has_a_manifest(tmp_path: Path) -> None:
    Artefact(tmp_path, "chunks", SETTINGS).claim()
    with pytest.raises(OutputError, match="tokenizer_sha256 was 'a', now 'b'"):
        Artefact(tmp_path, "chunks", {**SETTINGS, "tokenizer_sha256": "b"}).claim()


def test_overwrite_removes_what_other_settings_made_and_spares_other_files(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    Artefact(tmp_path, "chunks", {**SETTINGS, "max_tokens": 64}).claim(overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "settings.json"]


def test_overwrite_never_removes_what_another_stage_made(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(OutputError, match="holds chunks, expected vectors"):
        Artefact(tmp_path, "vectors", {"codec": "x"}).claim(overwrite=True)
    assert (tmp_path / "part-00000.parquet").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        Artefact(tmp_path / "out", "chunks", SETTINGS).claim()


def test_begin_takes_the_manifest_away_but_keeps_the_claim(tmp_path: Path) -> None:
    finished(tmp_path)
    Artefact(tmp_path, "chunks", SETTINGS).begin()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(OutputError, match="max_tokens was 32, now 64"):
        Artefact(tmp_path, "chunks", {**SETTINGS, "max_tokens": 64}).claim()


def test_the_chunk_schema_is_the_first_part_of_the_vector_schema() -> None:
    assert vector_schema().names == [*CHUNK_SCHEMA.names, "truncated", "norm", "vector"]
