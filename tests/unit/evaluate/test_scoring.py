"""Who is scored on what: samples, held-out articles, and the texts decoded from predictions."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lvm.errors import InputError
from lvm.evaluate.baselines import context_mean, copy_last
from lvm.evaluate.metrics import clustered_interval, cosines
from lvm.evaluate.scoring import (
    CEILING,
    EvaluateSettings,
    EvaluationData,
    Scored,
    at_most,
    fit_corpus_mean,
    fit_nearest_neighbour,
    fit_ridge_regression,
    fit_weighted_mean,
    make_entries,
    model_predictor,
    score_baseline,
    score_model,
    text_sample,
)
from lvm.evaluate.texts import barring, decode_block, measure_texts, part_of, plan_texts
from lvm.models import TOYS, build
from lvm.predict.record import load_record, save_record
from lvm.predict.steer import unit
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.index import Index, build_index
from lvm.vectors.sequences import make_windows
from tests.doubles import Decoded, FakeCodec, fake_articles, fake_codec, write_vectors

SETTINGS = EvaluateSettings(text_windows=12, pool_chunks=60, examples=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_vectors(folder / "vectors", fake_articles(40, 12))
    return folder


@pytest.fixture(scope="module")
def array(folder: Path) -> VectorArray:
    return open_vectors(folder / "vectors")


@pytest.fixture(scope="module")
def index(folder: Path, array: VectorArray) -> Index:
    return build_index(array, folder / "index")


@pytest.fixture(scope="module")
def data(array: VectorArray) -> EvaluationData:
    parts = make_windows(array).split(0)
    sample = text_sample(parts["test"], SETTINGS.text_windows, 0)
    return EvaluationData(**parts, ood={"abroad": parts["val"]}, sample=sample, settings=SETTINGS, threads=1)


@pytest.fixture(scope="module")
def model_folder(folder: Path, array: VectorArray) -> str:
    model = build("amn", asdict(TOYS["amn"]))
    curve = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_cosine": 0.1, "seconds": 1.0}]
    return save_record(folder / "models", "amn", model, array.identity, {}, {"curve": curve}, {}).name


@pytest.fixture(scope="module")
def scored(data: EvaluationData, folder: Path, model_folder: str) -> dict[str, Scored]:
    baselines = {
        "passthrough": copy_last,
        "context mean": context_mean,
        "corpus mean": fit_corpus_mean(data),
        "ridge": fit_ridge_regression(data),
        "weighted mean": fit_weighted_mean(data),
        "nearest neighbour": fit_nearest_neighbour(data),
    }
    made = [score_model(data, "amn", folder / "models", model_folder)]
    made += [score_baseline(data, name, predict) for name, predict in baselines.items()]
    return {one.name: one for one in made}


def test_a_cut_sample_of_windows_keeps_their_order_and_is_the_same_each_time(data: EvaluationData) -> None:
    few = at_most(data.train, 50, seed=3)
    assert len(few) == 50
    assert (np.diff(few.starts) > 0).all()
    assert few.starts.tolist() == at_most(data.train, 50, seed=3).starts.tolist()
    assert few.starts.tolist() != at_most(data.train, 50, seed=4).starts.tolist()
    assert at_most(data.train, 10_000, seed=3) is data.train


def test_text_sample_takes_every_article_before_a_second_window_of_one(data: EvaluationData) -> None:
    num_articles = len(np.unique(data.test.doc_ids))
    assert num_articles == 4
    sample = text_sample(data.test, 6, seed=0)
    assert len(set(sample.doc_ids[:num_articles].tolist())) == num_articles
    assert len(set(sample.starts.tolist())) == len(sample) == 6
    everything = text_sample(data.test, 10_000, seed=0)
    assert sorted(everything.starts.tolist()) == data.test.starts.tolist()


def test_model_scores_are_those_of_its_own_forward_pass(
    data: EvaluationData, scored: dict[str, Scored], folder: Path, model_folder: str
) -> None:
    model = load_record(folder / "models", model_folder).model

    def predict(contexts: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(model(torch.from_numpy(contexts)))

    contexts, targets = data.test.batch(slice(None))
    amn = scored["amn"]
    np.testing.assert_allclose(amn.scores.cosine, cosines(predict(contexts), targets), atol=1e-6)
    val_contexts, val_targets = data.val.batch(slice(None))
    assert amn.val_cosine == pytest.approx(
        float(cosines(predict(val_contexts), val_targets).mean()), abs=1e-6
    )
    assert amn.ood["abroad"].cosine.mean() == pytest.approx(amn.val_cosine)
    assert amn.ood["abroad"].articles.tolist() == data.val.doc_ids.tolist()
    written = amn.controls["as written"]
    np.testing.assert_allclose(written.cosine, amn.scores.cosine, atol=1e-6)
    assert written.in_article.ranks.tolist() == amn.scores.in_article.ranks.tolist()
    assert amn.parameters == sum(
        p.numel() for p in load_record(folder / "models", model_folder).model.parameters()
    )
    assert amn.weight_bytes == 4 * amn.parameters
    assert amn.peak_bytes is not None
    assert amn.peak_bytes > 128 * 768 * 4
    assert scored["ridge"].peak_bytes is None
    assert amn.details["folder"] == model_folder
    assert len(amn.details["curve"]) == 1


def test_a_model_predicts_without_dropout_even_when_it_came_in_training_mode(data: EvaluationData) -> None:
    predict = model_predictor(build("lstm", asdict(TOYS["lstm"])).train(), torch.device("cpu"))
    contexts, _ = data.test.batch(slice(0, 8))
    np.testing.assert_array_equal(predict(contexts), predict(contexts))


def test_only_a_model_with_attention_has_it_and_it_sums_to_one(scored: dict[str, Scored]) -> None:
    attention = scored["amn"].attention
    assert attention is not None
    assert sum(place["mean"] for place in attention) == pytest.approx(1)
    assert scored["ridge"].attention is None


def test_baselines_know_nothing_of_test_articles(data: EvaluationData) -> None:
    train_only = fit_corpus_mean(data)
    _, targets = data.train.batch(slice(None))
    contexts, _ = data.test.batch(slice(0, 1))
    np.testing.assert_allclose(train_only(contexts)[0], unit(targets.mean(axis=0)), atol=1e-5)
    test_docs = set(data.test.doc_ids.tolist())
    assert not test_docs & set(data.train.doc_ids.tolist())
    assert not test_docs & set(data.val.doc_ids.tolist())


def test_barring_marks_rows_of_the_held_out_article_and_of_nothing_else(array: VectorArray) -> None:
    barred = barring(array, np.array([0, 3]))
    rows = np.array([[0, 11, 12, -1], [36, 35, 47, 48]])
    # Row -1 means "no neighbour"; what is said of it takes no part.
    assert barred(rows)[0, :3].tolist() == [True, True, False]
    assert barred(rows)[1].tolist() == [True, False, True, False]


def test_plan_has_each_model_raw_snapped_and_found_then_passthrough_and_the_truth(
    data: EvaluationData, scored: dict[str, Scored], index: Index, array: VectorArray
) -> None:
    plan = plan_texts(data, list(scored.values()), index)
    assert plan.names == (
        ("amn", "raw"),
        ("amn", "snap"),
        ("amn", "found"),
        ("passthrough", "raw"),
        (CEILING, "raw"),
    )
    size = len(data.sample)
    assert plan.block.vectors.shape == (5 * size, 768)
    contexts, targets = data.sample.batch(slice(None))
    np.testing.assert_allclose(plan.block.vectors[3 * size : 4 * size], unit(contexts[:, -1]), atol=1e-6)
    np.testing.assert_allclose(plan.block.vectors[4 * size :], unit(targets), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(plan.block.vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(plan.block.contexts[size], contexts[0])
    assert np.flatnonzero(plan.block.found).tolist() == list(range(2 * size, 3 * size))


def test_snap_of_the_plan_never_uses_the_article_held_out(
    data: EvaluationData, scored: dict[str, Scored], array: VectorArray
) -> None:
    asked: list[np.ndarray] = []

    class Watched:
        """Finds the held-out article's own chunks first, as an index of the whole corpus would."""

        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            order = np.argsort([array.doc_ids != d for d in data.sample.doc_ids], axis=1, kind="stable")
            asked.append(order[:, :k])
            return np.ones((len(queries), k), np.float32), order[:, :k].astype(np.int64)

    plan = plan_texts(data, [scored["amn"]], Watched())  # type: ignore[arg-type]
    contexts, _ = data.sample.batch(slice(None))
    size = len(data.sample)
    snapped = plan.block.vectors[size : 2 * size]
    foreign = [np.flatnonzero(array.doc_ids != d)[:16] for d in data.sample.doc_ids]
    means = unit(np.stack([array.vectors[rows].astype(np.float32).mean(axis=0) for rows in foreign]))
    drift = 0.60 * means + 0.25 * unit(contexts[:, -1]) + 0.15 * unit(contexts.mean(axis=1))
    np.testing.assert_allclose(snapped, unit(drift), atol=1e-4)


def test_snap_of_the_plan_searches_with_the_head_that_searches(
    data: EvaluationData, scored: dict[str, Scored]
) -> None:
    asked: list[np.ndarray] = []

    class Watched:
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            asked.append(queries)
            return np.ones((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)

    head = unit(np.random.default_rng(3).normal(size=scored["amn"].sample.shape))
    plan_texts(data, [replace(scored["amn"], sample_search=head)], Watched())  # type: ignore[arg-type]
    np.testing.assert_array_equal(asked[0], head)


class RubbishCodec(FakeCodec):
    """Decodes every vector to a text the ladder must refuse."""

    def decode(self, vectors: np.ndarray, steps: int = 0) -> Decoded:
        return Decoded(
            ["aaaa"] * len(vectors), np.zeros(len(vectors), np.float32), np.zeros(len(vectors), np.int32)
        )


def test_a_block_comes_back_with_its_number_and_the_cosine_of_each_text(
    data: EvaluationData, scored: dict[str, Scored], index: Index, array: VectorArray, folder: Path
) -> None:
    plan = plan_texts(data, [], index)
    block = part_of(plan.block, np.arange(3, 7))
    number, said = decode_block(RubbishCodec, folder / "index", array, 5, block, 1)
    assert number == 5
    assert [s.answer.source for s in said] == ["corpus"] * 4
    texts = [s.answer.text for s in said]
    rows = [int(np.flatnonzero([t == text for t in array.texts(np.arange(len(array)))])[0]) for text in texts]
    # The vector is a chunk of the held-out article; the nearest text must still be a foreign one.
    assert all(array.doc_ids[row] != doc for row, doc in zip(rows, block.doc_ids, strict=True))
    again = fake_codec().encode_chunks(texts).vectors
    assert {s.answer.attempts[-1].text for s in said} == {"aaaa"}
    assert [s.text_cosine for s in said] == pytest.approx(
        np.einsum("bd,bd->b", again, block.truths).tolist(), abs=1e-5
    )


def test_text_rows_and_examples_take_each_text_from_its_place(
    data: EvaluationData, scored: dict[str, Scored], index: Index, array: VectorArray, folder: Path
) -> None:
    plan = plan_texts(data, [scored["amn"]], index)
    _, said = decode_block(fake_codec, folder / "index", array, 0, plan.block, 1)
    text, examples = measure_texts(data, plan, said)
    assert [(t["name"], t["form"]) for t in text] == list(plan.names)
    assert text[-1]["vector_cosine"] == pytest.approx(1)
    assert text[0]["vector_cosine"] == pytest.approx(
        float(cosines(scored["amn"].sample, plan.block.truths[: len(data.sample)]).mean()), abs=1e-6
    )
    assert all(sum(t["sources"].values()) == len(data.sample) for t in text)
    assert len(examples) == SETTINGS.examples
    example = examples[1]
    assert example["context"] == array.texts(data.sample.rows_of_context[1])
    assert [example["truth"]] == array.texts(data.sample.rows_of_target[1:2])
    size = len(data.sample)
    assert [d["text"] for d in example["decoded"]] == [said[n * size + 1].answer.text for n in range(5)]
    assert [d["name"] for d in example["decoded"]] == ["amn", "amn", "amn", "passthrough", CEILING]
    found = text[2]
    assert (found["form"], found["sources"], found["log_prob"]) == ("found", {"corpus": size}, None)
    assert 0 < found["distinct_2"] <= 1


def test_entries_carry_the_lead_over_the_best_baseline_window_by_window(
    data: EvaluationData, scored: dict[str, Scored]
) -> None:
    latency = {name: [{"batch": 1, "mean_ms": 1.0}] for name in scored}
    entries = {e["name"]: e for e in make_entries(scored, latency, data.test.doc_ids, SETTINGS)}
    baselines = [e for e in entries.values() if e["kind"] == "baseline"]
    best = max(baselines, key=lambda e: e["cosine"]["mean"])["name"]
    lead = scored["amn"].scores.cosine - scored[best].scores.cosine
    expected = clustered_interval(lead, data.test.doc_ids)
    assert entries["amn"]["gain"] == asdict(expected)
    assert entries["amn"]["gate"]["checks"][0]["name"] == "cosine"
    assert "gate" not in entries["ridge"]
    assert entries["passthrough"]["margin"]["mean"] == pytest.approx(
        entries["passthrough"]["cosine"]["mean"] - 1
    )
    assert entries["passthrough"]["norm"] == pytest.approx(1, abs=1e-5)


def test_more_examples_than_decoded_windows_are_refused() -> None:
    with pytest.raises(InputError, match="between 0 and the 32 decoded windows, got 65"):
        EvaluateSettings(examples=65)
    with pytest.raises(InputError, match="pool_chunks must be at least 1, got 0"):
        EvaluateSettings(pool_chunks=0)
