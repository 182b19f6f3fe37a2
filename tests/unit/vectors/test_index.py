"""The search index: right neighbours, one codec, published in one step."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from lvm.errors import IdentityError, InputError
from lvm.vectors import index as index_module
from lvm.vectors.array import Part, VectorArray, open_vectors
from lvm.vectors.index import (
    DividedIndex,
    Index,
    IndexSettings,
    build_index,
    find_index,
    load_index,
    measure_recall,
    published,
)
from lvm.vectors.shards import Manifest, Shard
from tests.doubles import FakeCodec, fake_articles, write_vectors

LISTS = IndexSettings(flat_below=100)
"""Lists even for a small array."""


def exact(array: VectorArray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float32) @ np.asarray(array.vectors, np.float32).T
    rows = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.fixture(scope="module")
def flat(array: VectorArray, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(array, tmp_path_factory.mktemp("flat"))


@pytest.fixture(scope="module")
def lists(large_array: VectorArray, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(large_array, tmp_path_factory.mktemp("lists"))


@pytest.fixture(scope="module")
def coded(large_array: VectorArray, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(large_array, tmp_path_factory.mktemp("coded"), IndexSettings(coded_from=5000))


def test_lists_of_codes_find_more_since_the_best_are_compared_exactly(
    large_array: VectorArray, lists: Index, coded: Index
) -> None:
    settings = coded.manifest.settings
    assert (settings["type"], settings["nlist"], settings["probes"]) == ("IVF_PQ4_REFINED", 64, 64)
    assert not IndexSettings().coded(99_999)
    assert IndexSettings().coded(100_000)
    assert coded.manifest.report["recall_stored"] > max(0.9, lists.manifest.report["recall_stored"])
    queries = large_array.vectors[:40].astype(np.float32)
    scores, rows = coded.search(queries, 16)
    true = np.einsum("bd,bkd->bk", queries, large_array.vectors[rows].astype(np.float32))
    np.testing.assert_allclose(scores, true, atol=1e-3)  # and not a code's guess
    np.testing.assert_array_equal(rows[:, 0], np.arange(40))
    _, one_list = coded.search(queries, 16, probes=1)
    assert (one_list != rows).any()
    np.testing.assert_allclose(coded.reconstruct([7, 4000]), large_array.vectors[[7, 4000]], atol=1e-3)
    again = load_index(coded.directory.parents[1])
    np.testing.assert_array_equal(again.search(queries, 16)[1], rows)
    _, many = coded.search(queries[:2], 3000, probes=1)
    assert all(len(set(r)) == 3000 for r in many.tolist())


@pytest.fixture(scope="module", params=["coded", "lists", "flat"])
def parted(
    request: pytest.FixtureRequest, large_array: VectorArray, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Index, Index]:
    """An index in three parts, and the same vectors in one."""
    kind = {"coded": {"coded_from": 1000}, "lists": {}, "flat": {"flat_below": 10_000}}[request.param]
    folders = [tmp_path_factory.mktemp(name) for name in ("parts", "one")]
    three, one = IndexSettings(flat_below=1000, part_vectors=1700), IndexSettings(flat_below=1000)
    return tuple(  # type: ignore[return-value]
        build_index(large_array, folder, dataclasses.replace(settings, **kind))
        for folder, settings in zip(folders, (three, one), strict=True)
    )


def test_parts_are_searched_together(large_array: VectorArray, parted: tuple[Index, Index]) -> None:
    three, one = parted
    assert [s.rows for s in three.manifest.shards] == [1666, 1667, 1667]
    assert (three.manifest.settings["parts"], len(three)) == (3, len(large_array))
    assert "parts" not in one.manifest.settings
    queries = large_array.vectors[::250].astype(np.float32)
    everywhere = 10_000
    for found, wanted in zip(
        three.search(queries, 9, everywhere), exact(large_array, queries, 9), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert three.manifest.report["recall_stored"] >= one.manifest.report["recall_stored"] - 0.02
    rows = [0, 1665, 1666, 3332, 3333, 4999]
    np.testing.assert_allclose(three.reconstruct(rows), large_array.vectors[rows], atol=1e-3)
    _, all_rows = three.search(queries[:1], len(three))
    assert sorted(all_rows[0].tolist()) == list(range(len(three)))


def test_shares_of_the_parts_find_what_the_whole_index_finds(
    large_array: VectorArray, parted: tuple[Index, Index]
) -> None:
    three, one = parted
    folder = three.directory.parents[1]
    shares = [load_index(folder, share, 2) for share in range(2)]
    assert [(s.first, len(s)) for s in shares] == [(0, 1666), (1666, 3334)]
    np.testing.assert_allclose(shares[1].reconstruct([0, 1668]), large_array.vectors[[1666, 3334]], atol=1e-3)
    divided = DividedIndex(
        *published(folder, 2),
        None,
        searchers=lambda queries, k, probes: [s.search(queries, min(k, len(s)), probes) for s in shares],
    )
    divided.require_array(large_array)
    queries = large_array.vectors[::250].astype(np.float32)
    for found, wanted in zip(divided.search(queries, 9), three.search(queries, 9), strict=True):
        np.testing.assert_array_equal(found, wanted)
    # More than the smaller share has, which then searches all its lists.
    scores, rows = divided.search(queries, 2000)
    assert (scores >= three.search(queries, 2000)[0] - 1e-6).all()
    assert all(len(set(r)) == 2000 for r in rows.tolist())
    with pytest.raises(InputError, match="expected an integer of 1 to 5000"):
        divided.search(queries, 5001)
    with pytest.raises(InputError, match="has 3 parts, expected at least 4"):
        load_index(folder, 0, 4)
    with pytest.raises(InputError, match="has 1 part, expected at least 2"):
        published(one.directory.parents[1], 2)


def test_recall_is_measured_against_the_nearest_of_all_parts(large_array: VectorArray, coded: Index) -> None:
    queries = large_array.vectors[::250].astype(np.float32)
    near = [index_module._nearest_in_part(large_array, queries, 9, 3, number) for number in range(3)]
    scores = np.concatenate([found for found, _ in near], axis=1)
    rows = np.concatenate([found for _, found in near], axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :9]
    wanted_scores, wanted_rows = exact(large_array, queries, 9)
    np.testing.assert_allclose(np.take_along_axis(scores, best, 1), wanted_scores, atol=1e-5)
    np.testing.assert_array_equal(np.take_along_axis(rows, best, 1), wanted_rows)
    assert measure_recall(large_array, coded, parts=3) == measure_recall(large_array, coded)


def test_parts_that_an_earlier_try_built_are_taken(large_array: VectorArray, tmp_path: Path) -> None:
    settings = IndexSettings(part_vectors=2500)

    def one_and_no_more(build: Part, numbers: range) -> Iterable[Shard]:
        yield build(numbers[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(large_array, tmp_path, settings, one_and_no_more)
    assert find_index(large_array, tmp_path, settings) is None
    (part,) = tmp_path.rglob("part-*.faiss")
    made = part.stat().st_mtime_ns
    built = build_index(large_array, tmp_path, settings)
    assert part.stat().st_mtime_ns == made
    assert len(built.manifest.shards) == 2
    part.write_bytes(part.read_bytes()[:-1])  # published and damaged since: not taken
    assert len(build_index(large_array, tmp_path, settings)) == len(large_array)


def test_exact_vectors_stay_on_disk(coded: Index, lists: Index, flat: Index) -> None:
    maps = Path("/proc/self/maps").read_text()
    for index in (coded, lists, flat):
        assert str(index.directory / "index.faiss") in maps


@pytest.mark.parametrize(
    ("num_vectors", "num_lists"),
    [
        (1, 0),
        (4095, 0),
        (4096, 64),
        (16_000, 64),
        (100_000, 256),
        (300_000, 512),
        (500_000, 512),
        (1_500_000, 512),
        (2_097_151, 512),
        (2_097_152, 1024),
        (4_000_000, 1024),
        (10**7, 2048),
        (10**9, 2048),
    ],
)
def test_the_number_of_lists_follows_the_size(num_vectors: int, num_lists: int) -> None:
    assert IndexSettings().num_lists(num_vectors) == num_lists


@pytest.mark.parametrize(
    ("num_vectors", "kind", "nlist", "probes"),
    [
        (4000, "FLAT", 0, 16),
        (50_000, "IVF_FLAT", 128, 16),
        (500_000, "IVF_PQ4_REFINED", 512, 64),
        (1_500_000, "IVF_PQ4_REFINED", 512, 64),
        (4_000_000, "IVF_PQ4_REFINED", 1024, 128),
        (8_000_000, "IVF_PQ4_REFINED", 1024, 128),
    ],
)
def test_what_names_a_version_changes_for_large_parts_alone(
    num_vectors: int, kind: str, nlist: int, probes: int
) -> None:
    """Up to 2 million vectors these are the settings of earlier releases: their indexes are still found."""
    wanted = {
        "type": kind,
        "metric": "inner product",
        "nlist": nlist,
        "probes": probes,
        "training_per_list": 64,
        "seed": 0,
    }
    wanted |= {"candidates": 8} if kind == "IVF_PQ4_REFINED" else {}
    wanted |= {"parts": 2} if num_vectors == 8_000_000 else {}
    assert index_module._settings_record(IndexSettings(), num_vectors) == wanted


@pytest.mark.parametrize("coded_from", [1000, 10**6])
def test_more_lists_are_probed_in_proportion_and_find_no_less(
    large_array: VectorArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coded_from: int
) -> None:
    monkeypatch.setattr(index_module, "SETTLED_LISTS", 16)
    monkeypatch.setattr(index_module, "LIST_VECTORS", 64)
    settings = IndexSettings(flat_below=1000, probes=3, coded_probes=3, coded_from=coded_from)
    few = build_index(large_array, tmp_path / "few", dataclasses.replace(settings, max_lists=16)).manifest
    many = build_index(large_array, tmp_path / "many", settings).manifest
    assert (few.settings["nlist"], few.settings["probes"]) == (16, 3)
    assert (many.settings["nlist"], many.settings["probes"]) == (64, 12)
    for recall in ("recall_stored", "recall_blended"):
        assert few.report[recall] < 0.95  # there is something to lose
        assert many.report[recall] >= few.report[recall] - 0.005


def test_a_small_index_is_exact(array: VectorArray, flat: Index) -> None:
    queries = array.vectors[::50].astype(np.float32)
    scores, rows = flat.search(queries, 5)
    wanted_scores, wanted_rows = exact(array, queries, 5)
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)
    np.testing.assert_array_equal(rows[:, 0], wanted_rows[:, 0])
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert flat.manifest.settings["type"] == "FLAT"
    assert flat.manifest.report["recall_stored"] == flat.manifest.report["recall_blended"] == 1.0


def test_a_stored_vector_finds_itself_first(large_array: VectorArray, lists: Index) -> None:
    rows = np.arange(0, 5000, 97)
    scores, found = lists.search(large_array.vectors[rows], 3)
    np.testing.assert_array_equal(found[:, 0], rows)
    np.testing.assert_allclose(scores[:, 0], 1.0, atol=1e-3)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_large_index_has_lists_and_says_how_much_it_finds(large_array: VectorArray, lists: Index) -> None:
    assert lists.manifest.settings["type"] == "IVF_FLAT"
    assert lists.manifest.settings["nlist"] == lists.store.nlist == 64
    assert lists.manifest.settings["probes"] == 16
    report = lists.manifest.report
    assert 0.5 < report["recall_stored"] < 1.0
    assert 0.5 < report["recall_blended"] <= 1.0


def test_the_recorded_recall_is_the_share_of_true_neighbours_found(
    large_array: VectorArray, lists: Index
) -> None:
    random = np.random.default_rng(0)
    rows = np.sort(random.choice(5000, 256, replace=False))
    queries = large_array.vectors[rows].astype(np.float32)
    _, wanted = exact(large_array, queries, 16)
    _, found = lists.search(queries, 16)
    share = np.mean([len({*w} & {*f}) / 16 for w, f in zip(wanted.tolist(), found.tolist(), strict=True)])
    assert lists.manifest.report["recall_stored"] == pytest.approx(share, abs=0.005)


def test_looking_into_all_lists_finds_everything(large_array: VectorArray, lists: Index) -> None:
    queries = large_array.vectors[:20].astype(np.float32)
    scores, _ = lists.search(queries, 16, probes=64)
    np.testing.assert_allclose(scores, exact(large_array, queries, 16)[0], atol=1e-5)


def test_a_query_whose_lists_are_too_short_still_gets_k_rows(large_array: VectorArray, lists: Index) -> None:
    _, rows = lists.search(large_array.vectors[:3], 3000, probes=1)
    assert (rows >= 0).all()
    assert all(len(set(r)) == 3000 for r in rows.tolist())


def test_vectors_come_back_as_they_were_stored(large_array: VectorArray, lists: Index, flat: Index) -> None:
    np.testing.assert_array_equal(lists.reconstruct([7, 4999]), large_array.vectors[[7, 4999]])
    assert flat.reconstruct([3]).shape == (1, 768)
    with pytest.raises(InputError, match="between 0 and 359, got 360"):
        flat.reconstruct([360])


def test_an_index_finds_the_same_after_loading(large_array: VectorArray, lists: Index) -> None:
    again = load_index(lists.directory.parent.parent)
    for a, b in zip(
        again.search(large_array.vectors[:9], 4), lists.search(large_array.vectors[:9], 4), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert again.identity == FakeCodec().identity


@pytest.mark.parametrize("shape", [(768,), (2, 384), (1, 1, 768)])
def test_a_query_of_another_shape_is_refused(flat: Index, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(B, 768\)"):
        flat.search(np.zeros(shape, np.float32), 1)


def test_a_query_with_nan_is_refused_with_its_number(flat: Index) -> None:
    queries = np.ones((3, 768), np.float32)
    queries[2, 5] = np.nan
    with pytest.raises(InputError, match="query 2 holds NaN"):
        flat.search(queries, 1)


@pytest.mark.parametrize("k", [0, 361])
def test_k_outside_the_index_is_refused(array: VectorArray, flat: Index, k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}; expected an integer of 1 to 360"):
        flat.search(array.vectors[:1], k)


def test_an_index_is_refused_for_vectors_of_another_codec_or_another_job(
    tmp_path: Path, array: VectorArray, flat: Index
) -> None:
    flat.require_array(array)
    write_vectors(tmp_path / "other", fake_articles(3), FakeCodec("other"))
    with pytest.raises(IdentityError, match="cannot be combined"):
        flat.require_array(open_vectors(tmp_path / "other"))
    write_vectors(tmp_path / "later", fake_articles(3))
    with pytest.raises(InputError, match="run `latent index` again"):
        flat.require_array(open_vectors(tmp_path / "later"))


# ---- publishing


def test_a_second_build_changes_nothing(array: VectorArray, tmp_path: Path) -> None:
    first = build_index(array, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert build_index(array, tmp_path).directory == first.directory
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_other_vectors_give_a_new_version_and_the_last_two_are_kept(tmp_path: Path) -> None:
    names = []
    for seed in range(4):
        write_vectors(tmp_path / "vectors", fake_articles(3, seed=seed))
        names.append(build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index").directory.name)
        assert (tmp_path / "index" / "CURRENT").read_text().strip() == names[-1]
    assert {p.name for p in (tmp_path / "index" / "versions").iterdir()} == set(names[-2:])


def test_a_reader_keeps_its_version_while_the_next_two_are_published(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(10))
    index = build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index", LISTS)
    query = open_vectors(tmp_path / "vectors").vectors[:1].astype(np.float32)
    before = index.search(query, 3)
    for seed in (1, 2):
        write_vectors(tmp_path / "vectors", fake_articles(10, seed=seed))
        build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index", LISTS)
    np.testing.assert_array_equal(index.search(query, 3)[1], before[1])


def test_a_kill_before_publishing_leaves_the_old_version_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vectors(tmp_path / "vectors", fake_articles(3))
    first = build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index")
    write_vectors(tmp_path / "vectors", fake_articles(3, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index")
    assert load_index(tmp_path / "index").directory == first.directory
    second = build_index(open_vectors(tmp_path / "vectors"), tmp_path / "index")
    assert second.directory != first.directory
    assert {p.name for p in (tmp_path / "index" / "versions").iterdir()} == {
        first.directory.name,
        second.directory.name,
    }


def test_other_settings_give_another_version(array: VectorArray, tmp_path: Path) -> None:
    build_index(array, tmp_path)
    assert find_index(array, tmp_path) is not None
    assert find_index(array, tmp_path, LISTS) is None
    assert build_index(array, tmp_path, LISTS).manifest.settings["nlist"] == 16


def test_a_damaged_index_is_refused_and_built_again(array: VectorArray, tmp_path: Path) -> None:
    index = build_index(array, tmp_path)
    file = index.directory / "index.faiss"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert find_index(array, tmp_path) is None
    file.write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"index\.faiss has"):
        load_index(tmp_path)
    build_index(array, tmp_path)
    assert find_index(array, tmp_path) is not None


def test_a_folder_without_an_index_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run `latent index`"):
        load_index(tmp_path)
    (tmp_path / "CURRENT").write_text("gone\n")
    with pytest.raises(InputError, match=r"no .*gone/manifest\.json"):
        load_index(tmp_path)


def test_recall_of_an_index_that_finds_nothing_right_is_near_zero(array: VectorArray, tmp_path: Path) -> None:
    index = build_index(array, tmp_path)

    class Backwards:
        ntotal, d = 360, 768

        def search(self, queries: np.ndarray, k: int, params: object) -> tuple[np.ndarray, np.ndarray]:
            scores, rows = index.store.search(queries, 360)
            return scores[:, ::-1][:, :k].copy(), rows[:, ::-1][:, :k].copy()

    assert measure_recall(array, dataclasses.replace(index, store=Backwards()))["recall_stored"] < 0.1
    shutil.rmtree(tmp_path)
