"""Predictors with their rank heads against every baseline, on the test articles of one vector folder.

    python -m tests.bench.predictor_ranks --vectors out/wiki/vectors --models out/wiki/models --windows 10000

Cosine, reciprocal rank within the article, and recall at 10 among 10,000 chunks, each with its 95 % interval over
articles, with and without the head; and the lead over the best baseline of each, window by window. The last line of
stdout is one JSON object. Nothing is timed.
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lvm.evaluate.baselines import (
    CorpusMean,
    NearestNeighbour,
    RidgeSettings,
    WeightedMean,
    context_mean,
    copy_last,
    fit_ridge,
)
from lvm.evaluate.controls import as_written
from lvm.evaluate.metrics import Pool, Predict, clustered_interval, score_windows, summarise_ranks
from lvm.evaluate.scoring import at_most, score_in_article
from lvm.predict.predictor import load_predictor
from lvm.predict.record import read_aliases
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import WindowSettings, make_windows

POOL = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=10_000, help="test windows scored")
    options = parser.parse_args()
    array = open_vectors(options.vectors)
    parts = make_windows(array, WindowSettings()).split(0)
    test, pool = at_most(parts["test"], options.windows, 0), Pool.draw(array.vectors, POOL, 0)
    settings = RidgeSettings()
    train = at_most(parts["train"], settings.max_train_windows, 0)
    few, val = at_most(train, 5_000, 0), at_most(parts["val"], settings.max_val_windows, 0)

    def reciprocal_rank(predict: Predict) -> float:
        return (
            summarise_ranks(score_in_article(predict, None, array, as_written(few)).in_article)["mrr"] or 0.0
        )

    batches = partial(train.batches, 1024)
    rows: dict[str, tuple[Predict, Predict | None]] = {
        "copy last": (copy_last, None),
        "context mean": (context_mean, None),
        "weighted mean": (WeightedMean.fit(reciprocal_rank), None),
        "corpus mean": (CorpusMean.fit(batches), None),
        "nearest neighbour": (NearestNeighbour.fit(batches), None),
        "ridge": (fit_ridge(batches, partial(val.batches, 1024), settings), None),
    }
    for alias in read_aliases(options.models):
        predictor = load_predictor(alias, options.models)
        rows[f"{alias}, prediction"] = (predictor, None)
        if predictor.record is not None and predictor.record.ranker is not None:
            rows[f"{alias}, rank head"] = (predictor, predictor.search)
    print("| predictor | cosine | MRR in the article | R@10 of 10,000 |")
    print("| --- | --- | --- | --- |")
    found, by_window = {}, {}
    for name, (predict, search) in rows.items():
        scores = score_windows(predict, search, as_written(test), pool, array.vectors, array.doc_ids)
        kept = scores.in_article.candidates > 1  # the same windows for every predictor
        by_window[name] = {
            "cosine": scores.cosine,
            "mrr": 1.0 / scores.in_article.ranks[kept],
            "r10": (scores.in_pool.ranks <= 10).astype(float),
        }
        articles = {"cosine": test.doc_ids, "mrr": test.doc_ids[kept], "r10": test.doc_ids}
        measured = {key: clustered_interval(v, articles[key]) for key, v in by_window[name].items()}
        cells = " | ".join(f"{m.mean:.4f} [{m.low:.4f}, {m.high:.4f}]" for m in measured.values())
        print(f"| {name} | {cells} |", flush=True)
        found[name] = {key: asdict(m) for key, m in measured.items()}
    print("\n| ahead of the best baseline by | cosine | MRR in the article | R@10 of 10,000 |")
    print("| --- | --- | --- | --- |")
    baselines = [name for name in rows if "," not in name]
    for name in (n for n in rows if n.endswith("rank head")):
        cells = []
        for key, values in by_window[name].items():
            best = max(baselines, key=lambda b: float(by_window[b][key].mean()))
            lead = clustered_interval(values - by_window[best][key], articles[key])
            cells.append(f"{lead.mean:+.4f} [{lead.low:+.4f}, {lead.high:+.4f}] ({best})")
        print(f"| {name} | {' | '.join(cells)} |")
    windows = {k: len(v) for k, v in parts.items()}
    counts = {"scored": len(test), "articles": len(np.unique(test.doc_ids))}
    print(json.dumps({"windows": windows, **counts, "rows": found}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
