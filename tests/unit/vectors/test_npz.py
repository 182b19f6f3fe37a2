"""NPZ files: three layouts out and in, no pickles, and a check that names all that is wrong."""

import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvm.errors import IdentityError, InputError
from lvm.vectors.npz import export_npz, import_npz
from lvm.vectors.npz_check import LAYOUTS, Layout, check_npz
from lvm.vectors.sequences import Windows
from tests.doubles import FakeCodec

Arrays = dict[str, np.ndarray]


@pytest.fixture
def exported(windows: Windows, tmp_path: Path) -> Callable[[Layout], Path]:
    def export(layout: Layout) -> Path:
        export_npz(windows, tmp_path / f"{layout}.npz", layout)
        return tmp_path / f"{layout}.npz"

    return export


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return {k: arrays[k] for k in arrays.files}


def changed(path: Path, **changes: Any) -> Path:
    """The file with arrays replaced; None removes one."""
    arrays = {k: v for k, v in (load(path) | changes).items() if v is not None}
    np.savez(path.with_name("changed.npz"), **arrays)
    return path.with_name("changed.npz")


def problems(path: Path) -> list[str]:
    return [str(p) for p in check_npz(path).problems]


def only_problem(path: Path) -> str:
    found = problems(path)
    assert len(found) == 1, found
    return found[0]


# ---- export and import


def test_layout_sequences_holds_vectors_texts_and_ids(windows: Windows, exported: Any) -> None:
    arrays = load(exported("sequences"))
    contexts, targets = windows.batch(range(len(windows)))
    np.testing.assert_array_equal(arrays["context_vectors"], contexts)
    np.testing.assert_array_equal(arrays["target_vectors"], targets)
    assert arrays["context_vectors"].dtype == np.float32
    assert arrays["context_texts"].shape == (210, 5)
    assert arrays["context_texts"].dtype.kind == arrays["sequence_ids"].dtype.kind == "U"
    assert arrays["context_texts"][8].tolist() == windows.array.texts(windows.rows_of_context[8])
    assert arrays["target_texts"].tolist() == windows.array.texts(windows.rows_of_target)
    assert arrays["sequence_ids"][8] == windows.array.chunk_ids[18]
    np.testing.assert_array_equal(arrays["article_ids"], windows.doc_ids)


def test_layout_documents_names_article_and_place_of_each_target(windows: Windows, exported: Any) -> None:
    arrays = load(exported("documents"))
    assert arrays["doc_ids"].dtype == arrays["positions"].dtype == np.int32
    assert (arrays["doc_ids"][8], arrays["positions"][8]) == (1, 6)
    assert set(arrays) == {"context_vectors", "target_vectors", "doc_ids", "positions", "codec"}


def test_layout_split_keeps_articles_apart_and_marks_every_vector_real(
    windows: Windows, exported: Any
) -> None:
    arrays = load(exported("split"))
    parts = windows.split(0)
    for name, part in parts.items():
        np.testing.assert_array_equal(arrays[f"{name}_targets"], part.batch(range(len(part)))[1])
        assert arrays[f"{name}_masks"].shape == (len(part), 5)
        assert arrays[f"{name}_masks"].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_exported_passes_the_check_and_names_its_codec(exported: Any, layout: Layout) -> None:
    report = check_npz(exported(layout))
    assert report.problems == []
    assert report.ok
    assert report.layout == layout
    assert report.identity == FakeCodec().identity
    assert (report.context, report.dim, sum(report.rows.values())) == (5, 768, 210)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_imported_equals_what_was_exported(windows: Windows, exported: Any, layout: Layout) -> None:
    parts = import_npz(exported(layout), FakeCodec().identity)
    expected = windows.split(0) if layout == "split" else {"all": windows}
    assert set(parts) == set(expected)
    for name, part in parts.items():
        for got, wanted in zip(
            part.batch(range(len(part))), expected[name].batch(range(len(expected[name]))), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(part.doc_ids, expected[name].doc_ids)
        assert part.masks.all()


def test_imported_sequences_are_split_by_article(exported: Any) -> None:
    parts = import_npz(exported("sequences"))["all"].split(0)
    docs = [set(np.unique(p.doc_ids).tolist()) for p in parts.values()]
    assert sum(map(len, docs)) == len(set.union(*docs)) == 30
    assert parts["val"].extras["target_texts"].shape == (len(parts["val"]),)


def test_sequences_that_name_no_article_cannot_be_split(exported: Any) -> None:
    sequences = dataclasses.replace(import_npz(exported("sequences"))["all"], doc_ids=None)
    with pytest.raises(InputError, match="name no articles"):
        sequences.split()


def test_the_same_windows_give_the_same_file(windows: Windows, tmp_path: Path) -> None:
    export_npz(windows, tmp_path / "a.npz")
    export_npz(windows, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_failed_export_leaves_no_file(
    windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvm.vectors.npz._codec_member", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_npz(windows, tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layout_is_refused_with_the_three_names(windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'rows'; expected one of sequences, documents, split"):
        export_npz(windows, tmp_path / "a.npz", "rows")  # type: ignore[arg-type]


def test_a_file_of_another_codec_is_refused(exported: Any) -> None:
    with pytest.raises(IdentityError, match=r"sequences\.npz"):
        import_npz(exported("sequences"), FakeCodec("other").identity)


def test_an_import_lists_every_problem(exported: Any) -> None:
    path = changed(exported("documents"), doc_ids=np.zeros(3), positions=None)
    with pytest.raises(InputError, match=r"(?s)cannot be imported.*positions: expected.*doc_ids: expected"):
        import_npz(path)


# ---- pickles


def test_an_object_array_is_refused_unopened_with_the_cure(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = load(exported("sequences"))["target_texts"].astype(object)
    path = changed(exported("sequences"), target_texts=texts)
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("the pickle was opened"))
    message = only_problem(path)
    assert message.startswith("target_texts: expected numbers or unicode text, got an object array (210,)")
    assert 'np.array(texts, dtype="U")' in message
    with pytest.raises(InputError, match="object array"):
        import_npz(path)


def test_a_pickle_that_would_run_code_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "trap.npz", metadata=np.array([Trap()], dtype=object))
    assert not check_npz(tmp_path / "trap.npz").ok
    assert not (tmp_path / "ran").exists()


# ---- what a check finds


def test_a_file_that_is_no_zip_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    assert "expected a zip archive of .npy arrays" in only_problem(tmp_path / "a.npz")


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*a\.npz"):
        check_npz(tmp_path / "a.npz")


def test_a_cut_off_file_is_found(exported: Any, tmp_path: Path) -> None:
    whole = exported("documents").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in only_problem(tmp_path / "cut.npz")


def test_a_flipped_bit_in_the_vectors_is_found(exported: Any) -> None:
    path = exported("documents")
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1  # the lowest bit of one number of context_vectors: no norm shows it
    path.write_bytes(data)
    message = only_problem(path)
    assert message.startswith(
        "context_vectors: expected readable data to its end, got damaged data (Bad CRC-32"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_is_found_in_every_array_and_named(exported: Any, layout: Layout) -> None:
    path = exported(layout)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        data = bytearray(whole)
        # Behind the header of the array; in a deflated member, of its stream.
        # (The member's own head has two fields of no fixed length.)
        head = 30 + int.from_bytes(whole[info.header_offset + 26 : info.header_offset + 28], "little")
        head += int.from_bytes(whole[info.header_offset + 28 : info.header_offset + 30], "little")
        data[info.header_offset + head + info.compress_size * 3 // 4] ^= 1
        path.write_bytes(data)
        names = [p.where for p in check_npz(path).problems]
        assert names[:1] == [info.filename.removesuffix(".npy")], (info.filename, names)
        path.write_bytes(whole)


def test_arrays_of_no_layout_list_the_layouts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", vectors=np.zeros((2, 768)))
    message = only_problem(tmp_path / "a.npz")
    assert "sequences: context_vectors" in message
    assert "got vectors" in message


def test_a_missing_array_is_named(exported: Any) -> None:
    path = changed(exported("sequences"), target_texts=None)
    assert only_problem(path).startswith("target_texts: expected this array in layout sequences")


def test_an_array_under_another_tools_name_says_what_to_rename(exported: Any) -> None:
    vectors = load(exported("documents"))["context_vectors"]
    path = changed(exported("documents"), context_vectors=None, context_sequences=vectors)
    assert "Rename context_sequences to context_vectors." in only_problem(path)


@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_nan_and_infinity_are_found_with_their_place(exported: Any, poison: float) -> None:
    vectors = load(exported("documents"))["context_vectors"]
    vectors[100, 3, 7] = poison
    vectors[101] = poison
    message = only_problem(changed(exported("documents"), context_vectors=vectors))
    assert "NaN or infinity in 6 vectors, the first in row 100, position 3" in message


def test_a_norm_that_is_not_one_is_found_with_its_place_and_cure(exported: Any) -> None:
    vectors = load(exported("documents"))["target_vectors"]
    vectors[50] *= 27
    message = only_problem(changed(exported("documents"), target_vectors=vectors))
    assert "1 of another norm, the first: norm 26.9998" in message
    assert "in row 50" in message
    assert "np.linalg.norm" in message


def test_another_dimension_is_found(exported: Any) -> None:
    arrays = load(exported("documents"))
    path = changed(
        exported("documents"),
        context_vectors=arrays["context_vectors"][..., :384],
        target_vectors=arrays["target_vectors"][..., :384],
        codec=None,
    )
    assert [p.split(", got")[0] for p in problems(path)] == [
        "context_vectors: expected vectors of 768 numbers",
        "target_vectors: expected vectors of 768 numbers",
    ]


def test_flat_contexts_are_found(exported: Any) -> None:
    vectors = load(exported("documents"))["context_vectors"].reshape(210, -1)
    message = only_problem(changed(exported("documents"), context_vectors=vectors))
    assert "expected shape (N, T, D), got shape (210, 3840)" in message


def test_a_target_without_a_context_is_found(exported: Any) -> None:
    vectors = load(exported("documents"))["target_vectors"][:-1]
    message = only_problem(changed(exported("documents"), target_vectors=vectors))
    assert message.startswith("target_vectors: expected 210 rows, as context_vectors has, got 209")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.complex64])
def test_vectors_that_are_no_floats_are_found(exported: Any, dtype: Any) -> None:
    vectors = load(exported("documents"))["target_vectors"].astype(dtype)
    message = only_problem(changed(exported("documents"), target_vectors=vectors))
    assert f"expected float16, float32 or float64, got {np.dtype(dtype)}" in message


def test_float16_and_columns_first_are_read_as_well(exported: Any) -> None:
    arrays = load(exported("documents"))
    path = changed(
        exported("documents"),
        context_vectors=np.asfortranarray(arrays["context_vectors"]),
        target_vectors=arrays["target_vectors"].astype(np.float16),
    )
    assert problems(path) == []
    assert import_npz(path)["all"].targets.dtype == np.float32


def test_byte_strings_are_not_text(exported: Any) -> None:
    texts = load(exported("sequences"))["target_texts"].astype("S")
    message = only_problem(changed(exported("sequences"), target_texts=texts))
    assert message.startswith("target_texts: expected unicode text, got |S")


def test_one_text_a_vector_is_asked_for(exported: Any) -> None:
    texts = load(exported("sequences"))["context_texts"][:, :4]
    message = only_problem(changed(exported("sequences"), context_texts=texts))
    assert "context_texts: expected shape (210, 5), got shape (210, 4)" in message


def test_a_repeated_sequence_id_is_found(exported: Any) -> None:
    ids = load(exported("sequences"))["sequence_ids"].copy()
    ids[4] = ids[3]
    message = only_problem(changed(exported("sequences"), sequence_ids=ids))
    assert f"{ids[3]} 2 times" in message


def test_document_numbers_must_be_int32_from_zero_and_each_place_once(exported: Any) -> None:
    path = exported("documents")
    arrays = load(path)
    wide = changed(path, doc_ids=arrays["doc_ids"].astype(np.int64))
    assert only_problem(wide).startswith("doc_ids: expected int32, got int64")
    negative = arrays["positions"].copy()
    negative[9] = -1
    assert "got -1 in row 9" in only_problem(changed(path, positions=negative))
    twice = arrays["positions"].copy()
    twice[1] = twice[0]
    assert "article 0, position 5, 2 times" in only_problem(changed(path, positions=twice))


def test_an_article_in_two_splits_is_found(exported: Any) -> None:
    arrays = load(exported("split"))
    ids = arrays["test_doc_ids"].copy()
    ids[0] = arrays["train_doc_ids"][0]
    message = only_problem(changed(exported("split"), test_doc_ids=ids))
    assert message.startswith(
        "train_doc_ids and test_doc_ids: expected no article in two splits, got 1 in both"
    )


def test_padding_may_be_zero_where_the_mask_says_so(exported: Any) -> None:
    arrays = load(exported("split"))
    contexts, masks = arrays["val_contexts"].copy(), arrays["val_masks"].copy()
    contexts[2, :2] = 0
    assert "norm 0.0000 in row 2, position 0" in only_problem(
        changed(exported("split"), val_contexts=contexts)
    )
    masks[2, :2] = False
    assert problems(changed(exported("split"), val_contexts=contexts, val_masks=masks)) == []
    masks[2] = False
    assert "only padding in row 2" in only_problem(
        changed(exported("split"), val_contexts=contexts, val_masks=masks)
    )


def test_masks_must_be_flags_of_the_shape_of_their_contexts(exported: Any) -> None:
    masks = load(exported("split"))["val_masks"]
    assert "val_masks: expected shape" in only_problem(changed(exported("split"), val_masks=masks[:, :3]))
    assert "bool, or 0 and 1" in only_problem(changed(exported("split"), val_masks=masks * 2))
    assert problems(changed(exported("split"), val_masks=masks.astype(np.float32))) == []


def test_splits_of_two_context_lengths_are_found(exported: Any) -> None:
    arrays = load(exported("split"))
    path = changed(
        exported("split"), val_contexts=arrays["val_contexts"][:, :3], val_masks=arrays["val_masks"][:, :3]
    )
    assert "one context length in all splits, got train 5, val 3, test 5" in only_problem(path)


def test_an_empty_file_of_sequences_is_found(exported: Any) -> None:
    arrays = load(exported("documents"))
    path = changed(exported("documents"), **{k: arrays[k][:0] for k in arrays if k != "codec"})
    assert "expected at least one sequence, got none" in only_problem(path)


def test_a_damaged_codec_identity_is_found(exported: Any) -> None:
    record = FakeCodec().identity.to_dict() | {"max_tokens": 64}
    path = changed(exported("documents"), codec=np.array(json.dumps(record)))
    assert only_problem(path).startswith("codec: expected a codec identity as JSON")


def test_a_file_without_a_codec_is_usable_with_a_note(exported: Any) -> None:
    path = changed(exported("documents"), codec=None)
    report = check_npz(path)
    assert report.ok
    assert "names no codec" in report.notes[0]
    assert import_npz(path)["all"].identity is None
    assert import_npz(path, FakeCodec().identity)["all"].identity == FakeCodec().identity


def test_every_problem_is_reported_at_once(exported: Any) -> None:
    arrays = load(exported("documents"))
    contexts, targets = arrays["context_vectors"].copy(), arrays["target_vectors"].copy()
    contexts[0, 0, 0] = np.nan
    targets[1] *= 2
    path = changed(
        exported("documents"),
        context_vectors=contexts,
        target_vectors=targets,
        doc_ids=arrays["doc_ids"].astype(np.float64),
        positions=None,
    )
    assert sorted(p.split(":")[0] for p in problems(path)) == [
        "context_vectors",
        "doc_ids",
        "positions",
        "target_vectors",
    ]


def test_a_foreign_member_is_named_and_a_damaged_one_is_a_problem(exported: Any) -> None:
    path = exported("documents")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.txt", "hello")
        archive.writestr("extra.npy", b"garbage")
    report = check_npz(path)
    assert [p.where for p in report.problems] == ["extra"]
    assert "README.txt is not an .npy array and is ignored" in report.notes
