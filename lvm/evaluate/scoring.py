"""Score predictors and baselines on the same windows; decoded texts are in `lvm.evaluate.texts`.

Each function is one task of the evaluate job, or combines the results of tasks. Arguments and results are frozen
dataclasses of arrays, as they are pickled; vector arrays are pickled as paths and memory-mapped again.

Letters: B windows in a batch, S windows in the text sample, T chunks in a context, D vector length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    Float32Array,
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
"""Test windows on which the controls are measured, and training windows on which a baseline's decay is chosen."""

CEILING = "codec ceiling"
"""Name of the text row that decodes the true next vector."""

CodecLoader = Callable[[], "Codec"]
"""Loads the codec, once per worker; must be picklable."""

Form = Literal["raw", "snap", "found"]
"""What is decoded: the prediction, the snapped prediction, or (not decoded) the nearest corpus chunk."""


class Codec(Decoder, Protocol):
    """What this job needs of a codec."""

    @property
    def writer(self) -> TextWriter | None: ...
    @property
    def no_writer(self) -> str | None: ...


@dataclass(frozen=True)
class EvaluateSettings:
    """Sample sizes and limits of an evaluation."""

    examples: int = 3
    """Windows printed and shown with all their texts."""
    text_windows: int = 32
    """Test windows whose predictions are decoded, from as many articles as possible."""
    candidates: int = 2
    """Texts that the writer drafts for each blend."""
    max_test_windows: int = 20_000
    """Most test windows that are scored, sampled at random."""
    max_val_windows: int = 5_000
    """Most validation windows, for the validation cosine."""
    max_ood_windows: int = 5_000
    """Most windows of each out-of-domain set."""
    pool_chunks: int = 10_000
    """Candidates for retrieval over the corpus."""
    resamples: int = 1_000
    """Bootstrap resamples of each confidence interval."""
    seed: int = 0
    """Of these samples. The split's seed comes from the model records."""
    latency_budget_s: float = 0.5
    """Time limit for the latency of one predictor at one batch size, in seconds, beyond its first five calls."""
    ridge: RidgeSettings = field(default_factory=RidgeSettings)

    def __post_init__(self) -> None:
        limits = ("max_test_windows", "max_val_windows", "max_ood_windows")
        for name in ("text_windows", "candidates", "pool_chunks", *limits):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.examples <= self.text_windows:
            raise InputError(
                f"examples must be between 0 and the {self.text_windows} decoded windows, got {self.examples}"
            )


@dataclass(frozen=True)
class EvaluationData:
    """The windows that every predictor is scored on; pickled to the workers, which map the same files."""

    train: Windows
    """At most RidgeSettings.max_train_windows."""
    val: Windows
    test: Windows
    ood: dict[str, Windows]
    """By name of the out-of-domain set."""
    sample: Windows
    """The test windows whose predictions are decoded."""
    settings: EvaluateSettings
    threads: int
    """Of one task."""


@dataclass(frozen=True)
class ArticleScores:
    """Cosine and rank within the article, one value per window."""

    cosine: Float32Array
    in_article: Ranks
    articles: Ints
    """(M,) each window's article."""


@dataclass(frozen=True)
class Scored:
    """One predictor's results, without its latency."""

    name: str
    kind: Literal["model", "baseline"]
    parameters: int
    weight_bytes: int
    details: dict[str, Any]
    scores: WindowScores
    val_cosine: float
    ood: dict[str, ArticleScores]
    controls: dict[str, ArticleScores]
    """By name of the control, on at most MAX_CONTROL_WINDOWS test windows; empty for baselines."""
    sample: Float32Array
    """(S, D) unit predictions for the sample."""
    sample_search: Float32Array
    """(S, D) unit vectors that snapping the sample searches with: the rank head's, or else the predictions."""
    peak_bytes: int | None
    """Working memory of one call at the largest latency batch; None for baselines, as torch's profiler does not see
    numpy's memory."""
    attention: list[dict[str, float]] | None


# ---------------------------------------------------------------------------------------------- predictors


def model_predictor(model: torch.nn.Module, device: torch.device, context: int | None = None) -> Predict:
    """The model as a function over numpy arrays, in evaluation mode on `device`.

    context: how many of the last context vectors the model reads; None for all.
    """
    model = model.to(device).eval()
    read = slice(None) if context is None else slice(-context, None)

    def predict(contexts: Float32Array) -> Float32Array:
        with torch.inference_mode():
            output = model(torch.from_numpy(contexts[:, read]).to(device))
            predicted: Float32Array = output.float().cpu().numpy()
        return predicted

    return predict


def batches_of(windows: Windows) -> Batches:
    """The windows' batches, from the start at each call."""
    return partial(windows.batches, BATCH_WINDOWS)


def at_most(windows: Windows, number: int, seed: int) -> Windows:
    """The windows, or a random `number` of them in the same order."""
    if len(windows) <= number:
        return windows
    chosen = np.random.default_rng(seed).choice(len(windows), number, replace=False)
    return windows.subset(np.sort(chosen))


def text_sample(windows: Windows, number: int, seed: int) -> Windows:
    """A random `number` of windows; none of an article twice before every article has one."""
    order = np.random.default_rng(seed).permutation(len(windows))
    _, first = np.unique(windows.doc_ids[order], return_index=True)
    leading = np.sort(first)
    rest = np.setdiff1d(np.arange(len(order)), leading)
    return windows.subset(order[np.concatenate([leading, rest])][:number])


# ------------------------------------------------------------------------------------ scoring


def fit_corpus_mean(data: EvaluationData) -> Predict:
    """The fitted corpus mean."""
    return CorpusMean.fit(batches_of(data.train))


def fit_ridge_regression(data: EvaluationData) -> Predict:
    """The fitted ridge regression."""
    torch.set_num_threads(data.threads)
    settings = data.settings.ridge
    val = at_most(data.val, settings.max_val_windows, data.settings.seed)
    return fit_ridge(batches_of(data.train), batches_of(val), settings)


def fit_weighted_mean(data: EvaluationData) -> Predict:
    """The weighted mean with the best reciprocal rank on training windows."""
    train = at_most(data.train, MAX_CONTROL_WINDOWS, data.settings.seed)

    def reciprocal_rank(predict: Predict) -> float:
        scores = score_in_article(predict, None, train.array, as_written(train))
        return summarise_ranks(scores.in_article)["mrr"] or 0.0

    return WeightedMean.fit(reciprocal_rank)


def fit_nearest_neighbour(data: EvaluationData) -> Predict:
    """The fitted nearest neighbour."""
    return NearestNeighbour.fit(batches_of(at_most(data.train, NEIGHBOUR_WINDOWS, data.settings.seed)))


def score_in_article(
    predict: Predict, search: Predict | None, array: VectorArray, batches: Iterator[RowBatch]
) -> ArticleScores:
    """Cosine and rank within the article for every window of `batches`. search: as in `score_windows`."""
    cosine, ranks, candidates, articles = [], [], [], []
    for contexts, targets, context_rows, target_rows in batches:
        predicted, truth = unit(predict(contexts)), unit(targets)
        sought = predicted if search is None else unit(search(contexts))
        found = ranks_in_article(sought, truth, target_rows, context_rows, array.vectors, array.doc_ids)
        cosine.append(np.einsum("bd,bd->b", predicted, truth))
        ranks.append(found.ranks)
        candidates.append(found.candidates)
        articles.append(array.doc_ids[target_rows])
    in_article = Ranks(np.concatenate(ranks), np.concatenate(candidates))
    return ArticleScores(np.concatenate(cosine), in_article, np.concatenate(articles))


def score_baseline(data: EvaluationData, name: str, predict: Predict) -> Scored:
    """All measures of a baseline except latency."""
    details = describe(predict)
    parameters = int(details.pop("parameters"))
    return _score(data, name, "baseline", predict, parameters, 4 * parameters, details)


def score_model(data: EvaluationData, name: str, models: Location, folder: str) -> Scored:
    """All measures of a model record except latency."""
    record = load_record(models, folder)
    model = record.model
    parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    predict, search = _predict_and_search(record)
    scored = _score(data, name, "model", predict, parameters, weight_bytes, model_details(record), search)
    attention = getattr(model, "attention", None)
    if attention is None:
        return scored
    with torch.inference_mode():
        weights = [
            attention(torch.from_numpy(c[:, -record.context :])).numpy()
            for c, _ in data.test.batches(BATCH_WINDOWS)
        ]
    return replace(scored, attention=summarise_attention(np.concatenate(weights)))


def _predict_and_search(record: Record) -> tuple[Predict, Predict | None]:
    """The record's predictor and its rank head's, None without one; both read the last vectors of each context."""
    predictor, read = TrainedPredictor(record), slice(-record.context, None)
    search = None if record.ranker is None else lambda contexts: predictor.search(contexts[:, read])
    return lambda contexts: predictor(contexts[:, read]), search


def score_seed(data: EvaluationData, models: Location, folder: str) -> dict[str, float | None]:
    """SEED_MEASURES of a record that differs from an evaluated one only in its training seed."""
    torch.set_num_threads(data.threads)
    predict, search = _predict_and_search(load_record(models, folder))
    array, settings = data.test.array, data.settings
    pool = Pool.draw(array.vectors, settings.pool_chunks, settings.seed)
    scores = score_windows(predict, search, as_written(data.test), pool, array.vectors, array.doc_ids)
    return {
        "val_cosine": mean_cosine(predict, batches_of(data.val)),
        "cosine": float(scores.cosine.mean(dtype=np.float64)),
        "in_article_mrr": summarise_ranks(scores.in_article)["mrr"],
        "in_pool_r10": summarise_ranks(scores.in_pool)["r10"],
    }


def over_seeds(entry: Entry, others: Sequence[dict[str, float | None]]) -> dict[str, dict[str, Any]]:
    """The fields of `Spread` for each of SEED_MEASURES that all seeds have: the entry's own and the others'."""
    own = {
        "val_cosine": entry["val_cosine"],
        "cosine": entry["cosine"]["mean"],
        "in_article_mrr": entry["in_article"]["mrr"],
        "in_pool_r10": entry["in_pool"]["r10"],
    }
    values = {name: [own[name], *(other[name] for other in others)] for name in SEED_MEASURES}
    return {name: asdict(Spread.of(known)) for name, known in values.items() if None not in known}


def _score(
    data: EvaluationData,
    name: str,
    kind: Literal["model", "baseline"],
    predict: Predict,
    parameters: int,
    weight_bytes: int,
    details: dict[str, Any],
    search: Predict | None = None,
) -> Scored:
    torch.set_num_threads(data.threads)
    array, settings = data.test.array, data.settings
    pool = Pool.draw(array.vectors, settings.pool_chunks, settings.seed)
    contexts, _ = data.sample.batch(slice(None))
    _, length, dim = contexts.shape
    scores = score_windows(predict, search, as_written(data.test), pool, array.vectors, array.doc_ids)
    controls = {}
    if kind == "model":
        some = at_most(data.test, MAX_CONTROL_WINDOWS, settings.seed)
        controls = {n: score_in_article(predict, search, array, order(some)) for n, order in CONTROLS.items()}
    return Scored(
        name,
        kind,
        parameters,
        weight_bytes,
        details,
        scores=scores,
        val_cosine=mean_cosine(predict, batches_of(data.val)),
        ood={n: score_in_article(predict, search, w.array, as_written(w)) for n, w in data.ood.items()},
        controls=controls,
        sample=unit(predict(contexts)),
        sample_search=unit((search or predict)(contexts)),
        peak_bytes=peak_bytes(predict, length, dim, LATENCY_BATCHES[-1], "cpu") if kind == "model" else None,
        attention=None,
    )


def model_details(record: Record) -> dict[str, Any]:
    """A record's folder, loss curve and configuration, for the report."""
    folder, curve = record.folder.name, record.metrics.get("curve", [])
    details = {"folder": folder, "curve": curve, "config": record.config}
    if "imported_from" in record.config:
        details["warning"] = "imported: it may have been trained on articles that are test articles here"
    return details


def make_entries(
    scored: dict[str, Scored],
    latency: dict[str, list[dict[str, Any]]],
    articles: Ints,
    settings: EvaluateSettings,
) -> list[Entry]:
    """The leaderboard's entries. Models also have the gain over the best baseline, and the gate."""

    def interval(values: NDArray[Any], clusters: Ints = articles) -> dict[str, Any]:
        return asdict(clustered_interval(values, clusters, settings.resamples, settings.seed))

    def reciprocal(ranks: Ranks, clusters: Ints = articles) -> dict[str, Any] | None:
        kept = ranks.candidates > 1  # with one candidate a rank means nothing
        return interval(1.0 / ranks.ranks[kept], clusters[kept]) if kept.any() else None

    def intervals(scores: ArticleScores) -> dict[str, Any]:
        mrr = reciprocal(scores.in_article, scores.articles)
        return {"cosine": interval(scores.cosine, scores.articles), "mrr": mrr}

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
            "ood": {name: intervals(scores) for name, scores in one.ood.items()},
            "controls": {name: intervals(scores) for name, scores in one.controls.items()},
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
