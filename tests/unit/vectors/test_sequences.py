"""One array, windows as row numbers, and a split that never cuts through an article."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.errors import InputError
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.sequences import Windows, WindowSettings, make_windows, split_articles
from lvm.vectors.shards import Manifest, read_table, write_table
from tests.doubles import fake_articles, write_vectors

OPEN = WindowSettings(min_neighbour_cosine=-1.0, max_neighbour_cosine=1.01, min_tokens=0, allow_repeated=True)
"""No filter at all."""


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


# ---- windows


def test_a_batch_holds_five_neighbours_and_the_chunk_after_them(array: VectorArray, windows: Windows) -> None:
    contexts, targets = windows.batch([0, 8])
    assert contexts.shape == (2, 5, 768)
    assert targets.shape == (2, 768)
    assert contexts.dtype == targets.dtype == np.float32
    # Window 8 is the second of article 1, which begins in row 12.
    np.testing.assert_array_equal(contexts[1], array.vectors[13:18].astype(np.float32))
    np.testing.assert_array_equal(targets[1], array.vectors[18].astype(np.float32))
    assert windows.rows_of_context[8].tolist() == [13, 14, 15, 16, 17]
    assert windows.rows_of_target[8] == 18
    assert windows.doc_ids[8] == 1


@pytest.mark.parametrize("context", [1, 2, 5, 11])
def test_no_window_reaches_into_another_article_whatever_its_length(array: VectorArray, context: int) -> None:
    windows = make_windows(array, dataclasses.replace(OPEN, context=context))
    assert len(windows) == 30 * (12 - context)
    rows = np.column_stack([windows.rows_of_context, windows.rows_of_target])
    assert (array.doc_ids[rows] == windows.doc_ids[:, None]).all()
    assert (np.diff(array.positions[rows], axis=1) == 1).all()


def test_a_gap_in_an_article_is_never_crossed(folder: Path) -> None:
    table = read_table(folder / "part-00000.parquet")
    keep = [
        i for i in range(64) if i != 3
    ]  # position 3 of article 0, whose eight chunks leave three and four
    rewrite(folder, 0, table.take(keep))
    windows = make_windows(open_vectors(folder), dataclasses.replace(OPEN, context=2))
    starts = windows.array.positions[windows.starts[windows.doc_ids == 0]]
    assert starts.tolist() == [0, 4, 5]


def test_two_articles_are_never_joined_where_their_positions_run_on(folder: Path) -> None:
    table = read_table(folder / "part-00000.parquet")
    rewrite(folder, 0, table.take([0, 1, 2, 3, 12, 13, 14, 15]))  # article 0 ends at 3, article 1 begins at 4
    array = open_vectors(folder)
    assert array.positions[:8].tolist() == list(range(8))
    windows = make_windows(array, dataclasses.replace(OPEN, context=2))
    assert windows.starts[:4].tolist() == [0, 1, 4, 5]


def test_windows_store_row_numbers_and_no_vectors(windows: Windows) -> None:
    assert windows.starts.nbytes == 8 * len(windows)
    assert {f.name for f in dataclasses.fields(windows)} == {"array", "starts", "context", "report"}


def test_batches_give_every_window_once_and_in_order(windows: Windows) -> None:
    contexts, targets = zip(*windows.batches(50), strict=True)
    all_contexts, all_targets = windows.batch(range(len(windows)))
    np.testing.assert_array_equal(np.concatenate(contexts), all_contexts)
    np.testing.assert_array_equal(np.concatenate(targets), all_targets)


def test_a_subset_is_taken_by_numbers_or_by_mask(windows: Windows) -> None:
    mask = windows.doc_ids == 3
    np.testing.assert_array_equal(windows.subset(mask).starts, windows.subset(np.flatnonzero(mask)).starts)
    assert len(windows.subset(mask)) == 7


def filtered(directory: Path, articles: list[list[str]], **settings: object) -> Windows:
    write_vectors(directory, articles)
    return make_windows(open_vectors(directory), dataclasses.replace(OPEN, **settings))


def test_windows_whose_neighbours_are_far_apart_on_the_mean_are_dropped(tmp_path: Path) -> None:
    article = ["a b c", "a b d", "a c d", "x y z", "a b c d", "a b e", "a c e", "a d e"]
    windows = filtered(tmp_path, [article], context=2, min_neighbour_cosine=0.55)
    assert windows.starts.tolist() == [0, 4, 5]
    assert windows.report["dropped_jump"] == 3


def test_a_chunk_that_repeats_the_one_before_drops_its_windows(tmp_path: Path) -> None:
    article = ["a b c", "b c d", "c d e", "c d e", "d e f", "e f g", "f g h"]
    windows = filtered(tmp_path, [article], context=2, max_neighbour_cosine=0.99)
    assert windows.starts.tolist() == [0, 3, 4]
    assert windows.report["dropped_near_duplicate"] == 2


def test_short_chunks_drop_their_windows(tmp_path: Path) -> None:
    article = ["a b c", "b c d", "c", "d e f", "e f g", "f g h"]
    windows = filtered(tmp_path, [article], context=1, min_tokens=4)
    assert windows.starts.tolist() == [0, 3, 4]
    assert windows.report["dropped_short_chunk"] == 2


def test_truncated_chunks_drop_their_windows_unless_allowed(tmp_path: Path) -> None:
    article = ["a b c", "b c d", " ".join("long" for _ in range(40)), "d e f", "e f g"]
    windows = filtered(tmp_path, [article], context=1)
    assert windows.starts.tolist() == [0, 3]
    assert windows.report["dropped_truncated"] == 2
    assert len(make_windows(windows.array, dataclasses.replace(OPEN, context=1, allow_truncated=True))) == 4


def test_short_articles_are_dropped_where_asked(tmp_path: Path) -> None:
    articles = [["a b", "b c", "c d"], ["d e", "e f", "f g", "g h"]]
    windows = filtered(tmp_path, articles, context=1, min_chunks=4)
    assert windows.doc_ids.tolist() == [1, 1, 1]
    assert windows.report["dropped_short_article"] == 2


def test_an_article_copied_under_another_title_counts_once(tmp_path: Path) -> None:
    article = fake_articles(1, 8)[0]
    copy = [text.upper() for text in article]
    windows = filtered(tmp_path, [article, copy], allow_repeated=False)
    assert windows.doc_ids.tolist() == [0, 0, 0]
    assert windows.report["dropped_repeated"] == 3


def test_the_report_adds_up(array: VectorArray, windows: Windows) -> None:
    report = windows.report
    dropped = sum(v for k, v in report.items() if k.startswith("dropped_"))
    assert report["candidates"] == report["kept"] + dropped == 210
    assert report["chunks"] == 360
    assert report["articles"] == report["articles_with_window"] == 30
    json.dumps(report)


def test_an_array_without_a_single_window_is_refused_with_the_counts(tmp_path: Path) -> None:
    write_vectors(tmp_path, [["a b", "b c"], ["c d"]])
    with pytest.raises(InputError, match=r"no window of 5 \+ 1 .*3 chunks of 2 articles.*too short"):
        make_windows(open_vectors(tmp_path))


@pytest.mark.parametrize("wrong", [{"context": 0}, {"min_neighbour_cosine": 0.96}])
def test_impossible_window_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        WindowSettings(**wrong)


# ---- split


@given(st.sets(st.integers(0, 2**31 - 1), min_size=10, max_size=300), st.integers(0, 1000))
def test_every_article_is_in_exactly_one_split_of_the_right_size(articles: set[int], seed: int) -> None:
    split = split_articles(sorted(articles), seed)
    parts = [set(part.tolist()) for part in split.values()]
    assert set.union(*parts) == articles
    assert sum(map(len, parts)) == len(articles)
    assert list(map(len, parts[1:])) == [round(len(articles) / 10)] * 2


@given(st.lists(st.integers(0, 2**31 - 1), min_size=10, max_size=100, unique=True), st.randoms())
def test_the_split_does_not_depend_on_order_or_repetition(articles: list[int], random: object) -> None:
    shuffled = articles + articles[:5]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for name, part in split_articles(articles).items():
        np.testing.assert_array_equal(split_articles(shuffled)[name], part)


def test_the_split_is_the_same_on_every_machine_and_version() -> None:
    split = split_articles(range(30), seed=7)
    assert split["val"].tolist() == [3, 11, 12]
    assert split["test"].tolist() == [14, 17, 26]


def test_another_seed_gives_another_split() -> None:
    assert split_articles(range(100), 0)["test"].tolist() != split_articles(range(100), 1)["test"].tolist()


def test_adding_articles_moves_few_of_the_others() -> None:
    before = split_articles(range(1000))
    after = split_articles(range(1100))
    moved = sum(len(np.setdiff1d(before[name], after[name])) for name in before)
    assert moved < 30  # a split by shuffled numbers would move about 340


def test_windows_of_one_article_stay_in_one_split(windows: Windows) -> None:
    parts = windows.split(seed=3)
    docs = {name: set(part.doc_ids.tolist()) for name, part in parts.items()}
    assert not docs["train"] & docs["val"] | docs["train"] & docs["test"] | docs["val"] & docs["test"]
    assert sum(map(len, parts.values())) == len(windows)


def test_filters_and_context_length_move_no_article_to_another_split(array: VectorArray) -> None:
    long = make_windows(array, dataclasses.replace(OPEN, context=9)).split(seed=3)
    short = make_windows(array, dataclasses.replace(OPEN, context=2)).split(seed=3)
    for name in long:
        assert set(long[name].doc_ids.tolist()) <= set(short[name].doc_ids.tolist())


def test_fewer_articles_than_a_split_needs_are_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path, fake_articles(9, 8))
    with pytest.raises(InputError, match=r"at least 10 articles with a window of 5 \+ 1 chunks.*got 9"):
        make_windows(open_vectors(tmp_path)).split()
    with pytest.raises(InputError, match=r"at least 10 articles with a window .* got 9"):
        split_articles(range(9))


def test_a_split_without_a_window_is_refused_by_name(tmp_path: Path) -> None:
    # 100 articles of which only ten training articles are long enough.
    train = set(split_articles(range(100))["train"][:10].tolist())
    articles = fake_articles(100, 8)
    write_vectors(tmp_path, [a if i in train else a[:2] for i, a in enumerate(articles)])
    with pytest.raises(InputError, match="none of the 10 val articles has a window"):
        make_windows(open_vectors(tmp_path)).split()
