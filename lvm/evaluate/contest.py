"""The contest itself, without Ray: who is scored on what. Texts decoded from predictions: `contest_texts`.

Each function here is one task of the evaluate job, or puts the results of tasks together. Whatever crosses
a process is a frozen dataclass of arrays; vector arrays travel as paths and are mapped again.

Letters: B windows in a batch, S windows in the text sample, T chunks in a context, D = 768.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lvm.codec.ladder import Decoder, TextWriter
from lvm.errors import InputError
from lvm.evaluate.baselines import (
    NEIGHBOUR_WINDOWS,
    Batches,
    CorpusMean,
    NearestNeighbour,
    RidgeSettings,
    WeightedMean,
    describe,
    fit_ridge,
    mean_cosine,
)
from lvm.evaluate.controls import BATCH_WINDOWS, CONTROLS, RowBatch, as_written
from lvm.evaluate.evaluation import Entry, judge
from lvm.evaluate.leaderboard import SEED_MEASURES
from lvm.evaluate.metrics import (
    LATENCY_BATCHES,
    Ints,
    Pool,
    Predict,
    Ranks,
    Spread,
    WindowScores,
    clustered_interval,
    histogram,
    peak_bytes,
    ranks_in_article,
    score_windows,
    summarise_attention,
    summarise_ranks,
)
from lvm.predict.predictor import TrainedPredictor
from lvm.predict.record import Record, load_record
from lvm.predict.steer import unit
from lvm.storage import Location
from lvm.vectors.array import VectorArray
from lvm.vectors.sequences import Windows

MAX_CONTROL_WINDOWS = 5_000
"""Test windows on which the controls are measured, and training windows on which a baseline chooses its weights."""

CEILING = "codec ceiling"
"""Name of the text row that decodes the true next vector itself."""

CodecLoader = Callable[[], "Codec"]
"""Makes the codec, once in each worker; pickled on the way there."""

Form = Literal["raw", "snap", "found"]
"""The prediction itself, the same moved onto the corpus, and the corpus chunk that answers where nothing reads."""


class Codec(Decoder, Protocol):
    """What this job needs of a codec."""

    @property
    def writer(self) -> TextWriter | None: ...
    @property
    def no_writer(self) -> str | None: ...


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured, and on how much."""

    examples: int = 3
    """Windows printed and shown with all their texts."""
    text_windows: int = 32
    """Test windows whose predictions are decoded, as many articles as possible among them."""
    candidates: int = 2
    """Texts drafted for a vector that no text has."""
    max_test_windows: int = 20_000
    """Test windows scored; of more, a random sample over all test articles."""
    max_val_windows: int = 5_000
    """Validation windows for the validation cosine."""
    max_ood_windows: int = 5_000
    """Windows of each out-of-domain set."""
    pool_chunks: int = 10_000
    """Chunks among which the true next one is looked for, beside those of its article."""
    resamples: int = 1_000
    """Draws of articles behind each confidence interval."""
    seed: int = 0
    """Of these samples. The split's own seed comes from the model records."""
    latency_budget_s: float = 0.5
    """Longest timing of one predictor at one batch size, in seconds, beyond its first five calls."""
    ridge: RidgeSettings = field(default_factory=RidgeSettings)
    """The ridge regression's limits and penalties."""

    def __post_init__(self) -> None:
        for name in (
            "text_windows",
            "candidates",
            "max_test_windows",
            "max_val_windows",
            "max_ood_windows",
            "pool_chunks",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.examples <= self.text_windows:
            raise InputError(
                f"examples must be between 0 and the {self.text_windows} decoded windows, got {self.examples}"
            )


@dataclass(frozen=True)
class Contest:
    """What every predictor is scored on; pickled to the workers, which map the same files."""

    train: Windows
    """At most as many as the ridge regression takes."""
    val: Windows
    test: Windows
    ood: dict[str, Windows]
    sample: Windows
    """The test windows whose predictions are decoded."""
    settings: EvaluateSettings
    threads: int
    """Threads of one task."""


@dataclass(frozen=True)
class Found:
    """Measures without a pool, one value a window."""

    cosine: NDArray[np.float32]
    in_article: Ranks
    articles: Ints
    """(M,) each window's article."""


@dataclass(frozen=True)
class Scored:
    """One predictor's part of the evaluation."""

    name: str
    kind: Literal["model", "baseline"]
    parameters: int
    weight_bytes: int
    details: dict[str, Any]
    scores: WindowScores
    val_cosine: float
    ood: dict[str, Found]
    controls: dict[str, Found]
    """By name of the control, on a part of the test windows; models alone have some."""
    sample: NDArray[np.float32]
    """(S, D) unit predictions for the sample."""
    sample_search: NDArray[np.float32]
    """(S, D) unit vectors that the sample's snap searches with; the predictions where there is no rank head."""
    peak_bytes: int | None
    """Working memory of one call at the largest latency batch; None for baselines, whose arrays are numpy's
    and beyond the sight of torch's allocator."""
    attention: list[dict[str, float]] | None


# ---------------------------------------------------------------------------------------------- predictors


def model_predictor(model: torch.nn.Module, device: torch.device, context: int | None = None) -> Predict:
    """The model as a function over numpy arrays, in evaluation mode on `device`.

    context: vectors it reads, the last ones of each context; None is all of them.
    """
    model = model.to(device).eval()
    read = slice(None) if context is None else slice(-context, None)

    def predict(contexts: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            predicted: NDArray[np.float32] = (
                model(torch.from_numpy(contexts[:, read]).to(device)).float().cpu().numpy()
            )
        return predicted

    return predict


def batches_of(windows: Windows) -> Batches:
    """The windows as batches that can be gone through more than once."""
    return partial(windows.batches, BATCH_WINDOWS)


def at_most(windows: Windows, number: int, seed: int) -> Windows:
    """The windows, or a random `number` of them in their order."""
    if len(windows) <= number:
        return windows
    chosen = np.random.default_rng(seed).choice(len(windows), number, replace=False)
    return windows.subset(np.sort(chosen))


def text_sample(windows: Windows, number: int, seed: int) -> Windows:
    """A random `number` of windows, each of another article as long as there are articles."""
    order = np.random.default_rng(seed).permutation(len(windows))
    _, first = np.unique(windows.doc_ids[order], return_index=True)
    leading = np.sort(first)
    rest = np.setdiff1d(np.arange(len(order)), leading)
    return windows.subset(order[np.concatenate([leading, rest])][:number])


# ------------------------------------------------------------------------------------ scoring


def fit_corpus_mean(contest: Contest) -> Predict:
    """The fitted corpus mean."""
    return CorpusMean.fit(batches_of(contest.train))


def fit_ridge_regression(contest: Contest) -> Predict:
    """The fitted ridge regression."""
    torch.set_num_threads(contest.threads)
    settings = contest.settings.ridge
    val = at_most(contest.val, settings.max_val_windows, contest.settings.seed)
    return fit_ridge(batches_of(contest.train), batches_of(val), settings)


def fit_weighted_mean(contest: Contest) -> Predict:
    """The weighted mean that finds best on training windows."""
    train = at_most(contest.train, MAX_CONTROL_WINDOWS, contest.settings.seed)

    def reciprocal_rank(predict: Predict) -> float:
        return summarise_ranks(find(predict, None, train.array, as_written(train)).in_article)["mrr"] or 0.0

    return WeightedMean.fit(reciprocal_rank)


def fit_nearest_neighbour(contest: Contest) -> Predict:
    """What followed the most similar of the training contexts."""
    return NearestNeighbour.fit(batches_of(at_most(contest.train, NEIGHBOUR_WINDOWS, contest.settings.seed)))


def find(predict: Predict, search: Predict | None, array: VectorArray, batches: Iterator[RowBatch]) -> Found:
    """Cosine and rank within the article, of windows in any form."""
    cosine, ranks, candidates, articles = [], [], [], []
    for contexts, targets, context_rows, target_rows in batches:
        predicted, truth = unit(predict(contexts)), unit(targets)
        sought = predicted if search is None else unit(search(contexts))
        found = ranks_in_article(sought, truth, target_rows, context_rows, array.vectors, array.doc_ids)
        cosine.append(np.einsum("bd,bd->b", predicted, truth))
        ranks.append(found.ranks)
        candidates.append(found.candidates)
        articles.append(array.doc_ids[target_rows])
    return Found(
        np.concatenate(cosine),
        Ranks(np.concatenate(ranks), np.concatenate(candidates)),
        np.concatenate(articles),
    )


def score_baseline(contest: Contest, name: str, predict: Predict) -> Scored:
    """Everything measured of a baseline but its latency."""
    details = describe(predict)
    parameters = int(details.pop("parameters"))
    return _score(contest, name, "baseline", predict, parameters, 4 * parameters, details)


def score_model(contest: Contest, name: str, models: Location, folder: str) -> Scored:
    """Everything measured of a model record but its latency."""
    record = load_record(models, folder)
    model = record.model
    parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    predict, search = _predict_and_search(record)
    scored = _score(contest, name, "model", predict, parameters, weight_bytes, model_details(record), search)
    attention = getattr(model, "attention", None)
    if attention is None:
        return scored
    with torch.inference_mode():
        weights = [
            attention(torch.from_numpy(c[:, -record.context :])).numpy()
            for c, _ in contest.test.batches(BATCH_WINDOWS)
        ]
    return replace(scored, attention=summarise_attention(np.concatenate(weights)))


def _predict_and_search(record: Record) -> tuple[Predict, Predict | None]:
    """The record's prediction and its head's vector, from the last vectors of each context; None without a head."""
    predictor, read = TrainedPredictor(record), slice(-record.context, None)
    search = None if record.ranker is None else lambda contexts: predictor.search(contexts[:, read])
    return lambda contexts: predictor(contexts[:, read]), search


def score_seed(contest: Contest, models: Location, folder: str) -> dict[str, float | None]:
    """The measures, SEED_MEASURES, of a record that was trained like one of the contest with another seed."""
    torch.set_num_threads(contest.threads)
    predict, search = _predict_and_search(load_record(models, folder))
    array, settings = contest.test.array, contest.settings
    pool = Pool.draw(array.vectors, settings.pool_chunks, settings.seed)
    scores = score_windows(predict, search, as_written(contest.test), pool, array.vectors, array.doc_ids)
    return {
        "val_cosine": mean_cosine(predict, batches_of(contest.val)),
        "cosine": float(scores.cosine.mean(dtype=np.float64)),
        "in_article_mrr": summarise_ranks(scores.in_article)["mrr"],
        "in_pool_r10": summarise_ranks(scores.in_pool)["r10"],
    }


def over_seeds(entry: Entry, others: Sequence[dict[str, float | None]]) -> dict[str, dict[str, Any]]:
    """A model's measures over its own and other seeds: `Spread.to_dict` by name; without those that a seed lacks."""
    own = {
        "val_cosine": entry["val_cosine"],
        "cosine": entry["cosine"]["mean"],
        "in_article_mrr": entry["in_article"]["mrr"],
        "in_pool_r10": entry["in_pool"]["r10"],
    }
    values = {name: [own[name], *(other[name] for other in others)] for name in SEED_MEASURES}
    return {name: Spread.of(known).to_dict() for name, known in values.items() if None not in known}


def _score(
    contest: Contest,
    name: str,
    kind: Literal["model", "baseline"],
    predict: Predict,
    parameters: int,
    weight_bytes: int,
    details: dict[str, Any],
    search: Predict | None = None,
) -> Scored:
    torch.set_num_threads(contest.threads)
    array, settings = contest.test.array, contest.settings
    pool = Pool.draw(array.vectors, settings.pool_chunks, settings.seed)
    contexts, _ = contest.sample.batch(slice(None))
    _, length, dim = contexts.shape
    scores = score_windows(predict, search, as_written(contest.test), pool, array.vectors, array.doc_ids)
    controls = {}
    if kind == "model":
        some = at_most(contest.test, MAX_CONTROL_WINDOWS, settings.seed)
        controls = {name: find(predict, search, array, windows(some)) for name, windows in CONTROLS.items()}
    return Scored(
        name,
        kind,
        parameters,
        weight_bytes,
        details,
        scores=scores,
        val_cosine=mean_cosine(predict, batches_of(contest.val)),
        ood={name: find(predict, search, w.array, as_written(w)) for name, w in contest.ood.items()},
        controls=controls,
        sample=unit(predict(contexts)),
        sample_search=unit((search or predict)(contexts)),
        peak_bytes=peak_bytes(predict, length, dim, LATENCY_BATCHES[-1], "cpu") if kind == "model" else None,
        attention=None,
    )


def model_details(record: Record) -> dict[str, Any]:
    """What the report shows of a record: its folder, loss curve and provenance."""
    details = {
        "folder": record.folder.name,
        "curve": record.metrics.get("curve", []),
        "config": record.config,
    }
    if "imported_from" in record.config:
        details["warning"] = "imported: it may have been trained on articles that are test articles here"
    return details


def make_entries(
    scored: dict[str, Scored],
    latency: dict[str, list[dict[str, Any]]],
    articles: Ints,
    settings: EvaluateSettings,
) -> list[Entry]:
    """The leaderboard's entries; models carry their lead over the best baseline and the gate's verdict."""

    def interval(values: NDArray[Any], clusters: Ints = articles) -> dict[str, Any]:
        return clustered_interval(values, clusters, settings.resamples, settings.seed).to_dict()

    def reciprocal(ranks: Ranks, clusters: Ints = articles) -> dict[str, Any] | None:
        kept = ranks.candidates > 1  # with one candidate a rank says nothing
        return interval(1.0 / ranks.ranks[kept], clusters[kept]) if kept.any() else None

    def measured(found: Found) -> dict[str, Any]:
        return {
            "cosine": interval(found.cosine, found.articles),
            "mrr": reciprocal(found.in_article, found.articles),
        }

    entries: list[Entry] = []
    for one in scored.values():
        entry: Entry = {
            "name": one.name,
            "kind": one.kind,
            "cosine": interval(one.scores.cosine),
            "margin": interval(one.scores.margin),
            "mse": float(one.scores.squared_error.mean(dtype=np.float64)),
            "norm": float(one.scores.norm.mean(dtype=np.float64)),
            "in_article": summarise_ranks(one.scores.in_article),
            "in_article_mrr": reciprocal(one.scores.in_article),
            "in_pool": summarise_ranks(one.scores.in_pool),
            "in_pool_r10": interval(one.scores.in_pool.ranks <= 10),
            "val_cosine": one.val_cosine,
            "ood": {name: measured(found) for name, found in one.ood.items()},
            "controls": {name: measured(found) for name, found in one.controls.items()},
            "histogram": histogram(one.scores.cosine),
            "latency": latency[one.name],
            "parameters": one.parameters,
            "weight_bytes": one.weight_bytes,
            "peak_bytes": one.peak_bytes,
            "peak_batch": LATENCY_BATCHES[-1],
            "details": one.details,
        }
        if one.attention is not None:
            entry["attention"] = one.attention
        entries.append(entry)
    baselines = [e for e in entries if e["kind"] == "baseline"]
    best = max(baselines, key=lambda e: e["cosine"]["mean"])["name"]
    for entry in entries:
        if entry["kind"] == "model":
            entry["gain"] = interval(scored[entry["name"]].scores.cosine - scored[best].scores.cosine)
            entry["gate"] = judge(entry, baselines)
    return entries
