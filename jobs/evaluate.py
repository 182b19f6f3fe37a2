"""Evaluate predictors on held-out articles: reads vectors, index and models, writes one folder.

    python -m jobs.evaluate --vectors out/vectors --index out/index --models out/models --output out/eval
    ray job submit --working-dir . -- python -m jobs.evaluate --vectors /shared/vectors …

Writes evaluation.json (everything, one versioned record), leaderboard.md and report.html (one self-contained
file), each under a temporary name and then renamed. Prints the leaderboard and examples of decoded text.
Scoring and decoding run as parallel Ray tasks; latency is measured afterwards in this process, one model at a
time, undisturbed by our own work. If all three files exist for the same inputs and settings, nothing is
computed again.
"""

import json
import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer

from jobs._ray import (
    Address,
    CodecName,
    CodecPath,
    PathOrUrl,
    connect,
    echo,
    finish,
    get,
    load_codec_at,
    nodes_with,
    path_option,
    progress_bar,
    run,
    timing,
    unseen_gpu,
    versions,
    worker_device,
)
from lvm.codec.ladder import decoder_digest
from lvm.errors import InputError
from lvm.evaluate.baselines import context_mean, copy_last
from lvm.evaluate.evaluation import RULES, SCHEMA, Evaluation, gate_word
from lvm.evaluate.leaderboard import example_text, headline, leaderboard, markdown_page, ranking
from lvm.evaluate.metrics import LATENCY_BATCHES, Predict, measure_latency
from lvm.evaluate.scoring import (
    CodecLoader,
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
    over_seeds,
    score_baseline,
    score_model,
    score_seed,
    text_sample,
)
from lvm.evaluate.table import as_text
from lvm.evaluate.texts import Block, TextAnswer, TextPlan, decode_block, measure_texts, part_of, plan_texts
from lvm.predict.record import Record, load_record, read_aliases, series_of
from lvm.predict.steer import CONTEXT_CHUNKS
from lvm.storage import Location
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.artefact import finished_result
from lvm.vectors.index import load_index
from lvm.vectors.sequences import MAX_CONTEXT, WindowSettings, make_windows
from lvm.vectors.shards import Manifest, sweep_temporaries, write_bytes, write_json

MAX_THREADS = 8
"""Maximum threads of a scoring task; predictors are too small to use more."""

NUM_BASELINES = 6

FILES = ("evaluation.json", "leaderboard.md", "report.html")


@dataclass(frozen=True)
class Paths:
    """Input folders and the output folder."""

    vectors: Location
    index: Location
    models: Location
    output: Location
    ood: tuple[Location, ...] = ()


# ------------------------------------------------------------------------------------------------- the stage


def evaluate(
    paths: Paths,
    load: CodecLoader,
    settings: EvaluateSettings,
    overwrite: bool = False,
    address: str | None = None,
    context: int | None = None,
) -> tuple[Evaluation, bool]:
    """The evaluation in `paths.output`, and whether it existed before.

    Models trained on other vectors, or on another split than the newest model's, are left out and named. Models of
    different context lengths are scored on the same targets: windows of `context` vectors, by default the longest
    context of any model; each model reads the last ones.
    Raises IdentityError when vectors, index, models and codec do not match; InputError when no model is left;
    OutputError when the folder holds an evaluation with other settings.
    """
    began = time.perf_counter()
    array = open_vectors(paths.vectors)
    index = load_index(paths.index)
    index.require_array(array)
    entrants = choose_entrants(current_records(paths.models), array, context)
    records = entrants.records
    seeds = other_seeds(paths.models, records)
    ood = {_ood_name(p): open_vectors(p) for p in paths.ood}
    if len(ood) < len(paths.ood):
        raise InputError(
            f"--ood folders {', '.join(map(str, paths.ood))} do not have different names; rename one"
        )
    codec = load()
    identity = codec.identity
    array.require_codec(identity, "the loaded codec")
    for name, foreign in ood.items():
        array.require_codec(foreign.identity, f"--ood {name}")
    chosen = json.loads(json.dumps(asdict(settings)))
    inputs = {
        "schema": SCHEMA,
        "codec": identity.digest,
        "decoder": decoder_digest(codec, codec.writer),
        "vectors": array.fingerprint,
        "index": index.directory.name,
        "models": {name: record.folder.name for name, record in records.items()},
        "left_out": list(entrants.left_out),
        "ood": {name: foreign.fingerprint for name, foreign in ood.items()},
    }
    if seeds:
        inputs["seeds"] = seeds
    if entrants.windows.context != CONTEXT_CHUNKS:
        inputs["context"] = entrants.windows.context
    if codec.no_writer is not None:
        echo(f"evaluate: {codec.no_writer}")
    del codec
    for name, reason in entrants.left_out.items():
        echo(f"evaluate: {name} is left out: {reason}")
    found = find_evaluation(paths.output, chosen, inputs, overwrite)
    if found is not None:
        return found, True

    windows = make_windows(array, entrants.windows)
    parts = windows.split(entrants.seed)
    test = at_most(parts["test"], settings.max_test_windows, settings.seed)
    connect(address)
    cpus, gpus, largest = cluster_size()
    data = EvaluationData(
        train=at_most(parts["train"], settings.ridge.max_train_windows, settings.seed),
        val=at_most(parts["val"], settings.max_val_windows, settings.seed),
        test=test,
        ood={
            name: at_most(make_windows(foreign, entrants.windows), settings.max_ood_windows, settings.seed)
            for name, foreign in ood.items()
        },
        sample=text_sample(test, settings.text_windows, settings.seed),
        settings=settings,
        threads=threads_per_task(cpus, largest, len(records) + NUM_BASELINES),
    )
    seconds = {"prepare": time.perf_counter() - began}

    began = time.perf_counter()
    echo(
        f"evaluate: {len(test):,} test windows of {len(np.unique(test.doc_ids)):,} articles, "
        f"{len(records)} models, {NUM_BASELINES} baselines"
    )
    scored, baselines = score_all(data, {n: r.folder.name for n, r in records.items()}, paths.models)
    trained_alike = score_seeds(data, seeds, paths.models)
    seconds["score"] = time.perf_counter() - began

    began = time.perf_counter()
    plan = plan_texts(data, list(scored.values()), index)
    texts = decode_all(array, plan, load, paths.index, cpus, gpus, settings.candidates)
    text, examples = measure_texts(data, plan, texts)
    seconds["decode"] = time.perf_counter() - began

    began = time.perf_counter()
    echo("evaluate: measuring latency, one predictor at a time")
    device = worker_device()
    predictors = baselines | {n: model_predictor(r.model, device, r.context) for n, r in records.items()}
    latency = {
        name: [
            asdict(
                measure_latency(predict, test.context, identity.dim, b, budget_s=settings.latency_budget_s)
            )
            for b in LATENCY_BATCHES
        ]
        for name, predict in predictors.items()
    }
    seconds["latency"] = time.perf_counter() - began

    manifest = Manifest.load(paths.vectors, "vectors")
    evaluation: Evaluation = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": chosen,
        "inputs": inputs,
        "provenance": {
            "codec": identity.to_dict(),
            "vectors": {
                "directory": str(paths.vectors),
                "fingerprint": array.fingerprint,
                "chunks": len(array),
                "articles": len(np.unique(array.doc_ids)),
                "source": manifest.source,
                "licence": manifest.licence,
            },
            "index": {"version": index.directory.name, "settings": index.manifest.settings},
            "machine": machine(device),
            "versions": versions(),
        },
        "split": {
            "seed": entrants.seed,
            "left_out": entrants.left_out,
            "windows": {name: len(part) for name, part in parts.items()},
            "articles": {name: len(np.unique(part.doc_ids)) for name, part in parts.items()},
            "test_windows": len(test),
            "test_articles": len(np.unique(test.doc_ids)),
            "ridge_windows": len(data.train),
            "report": windows.report,
        },
        "rules": dict(RULES),
        "entries": make_entries(scored, latency, test.doc_ids, settings),
        "text_windows": len(data.sample),
        "text": text,
        "examples": examples,
        "seconds": {name: round(s, 3) for name, s in seconds.items()},
    }
    for entry in evaluation["entries"]:
        if others := trained_alike.get(entry["name"]):
            entry["seeds"] = over_seeds(entry, others)
    # The record is written last: its presence means that all three files are there.
    write(paths.output, evaluation)
    return evaluation, False


def find_evaluation(
    output: Location, settings: dict[str, Any], inputs: dict[str, Any], overwrite: bool
) -> Evaluation | None:
    """The evaluation in `output` if it has these inputs and settings, else None.

    Raises OutputError when it was made with other settings and `overwrite` is off.
    """
    found: Evaluation | None = finished_result(output, FILES[0], settings, overwrite)
    whole = all((output / name).exists() for name in FILES)
    return found if found is not None and whole and found.get("inputs") == inputs else None


def write(output: Location, evaluation: Evaluation) -> None:
    """Write the three files, evaluation.json last, after removing temporary files of a killed run."""
    from lvm.evaluate.report import html_page  # imports matplotlib, which no worker needs

    output.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(output)
    (output / FILES[0]).unlink(missing_ok=True)
    write_bytes(output / FILES[1], markdown_page(evaluation).encode())
    write_bytes(output / FILES[2], html_page(evaluation).encode())
    write_json(output / FILES[0], evaluation)


def current_records(models: Location) -> dict[str, Record]:
    """Every model that has an alias, by alias. Raises InputError when there is none."""
    names = read_aliases(models)
    if not names:
        raise InputError(f"no trained model in {models}; expected at least one, run `latent train` first")
    once: dict[str, str] = {}
    for alias, folder in names.items():
        once.setdefault(folder, alias)  # a promoted model also has its architecture's alias
    return {alias: load_record(models, alias) for alias in once.values()}


@dataclass(frozen=True)
class Entrants:
    """The models to evaluate, and the split."""

    records: dict[str, Record]
    windows: WindowSettings
    """The models' window filters, and the context length of the test windows."""
    seed: int
    """Seed of the split by article."""
    left_out: dict[str, str]
    """Alias to the reason why that model is left out."""


def choose_entrants(records: dict[str, Record], array: VectorArray, context: int | None = None) -> Entrants:
    """The models trained on these vectors with the newest model's split.

    context: of the test windows; None for the longest context of any model. A model trained on other vectors or with
    another split may have seen these test articles, so it is left out. Raises IdentityError when a model's codec
    differs, InputError when no model is left.
    """
    left_out: dict[str, str] = {}
    split: tuple[WindowSettings, int] | None = None
    fitting: dict[str, Record] = {}
    for name, record in sorted(records.items(), key=lambda item: item[1].config["created"], reverse=True):
        array.require_codec(record.identity, f"model {record.folder.name}")
        config = record.config
        made_from = config.get("vectors", {}).get("fingerprint")
        if made_from != array.fingerprint:
            left_out[name] = (
                f"{record.folder.name} was trained on vectors {made_from}, these are {array.fingerprint}"
            )
            continue
        own = replace(WindowSettings(**config["windows"]), context=1), int(config["seed"])
        split = split or own
        if own != split:
            left_out[name] = (
                f"{record.folder.name} was trained with another split: seed {own[1]}, "
                f"{WindowSettings(**config['windows'])}"
            )
            continue
        fitting[name] = record
    if split is None:
        raise InputError(
            f"no model was trained on the vectors in {array.directory}: {'; '.join(left_out.values())}. "
            "Run `latent train` on these vectors."
        )
    longest = context or max(record.context for record in fitting.values())
    windows = replace(split[0], context=longest)
    return Entrants({name: fitting[name] for name in records if name in fitting}, windows, split[1], left_out)


def other_seeds(models: Location, records: dict[str, Record]) -> dict[str, list[str]]:
    """By alias, the folders of records that differ from its record only in the training seed; without empty lists."""
    found = {
        name: [folder.name for folder in series_of(models, record) if folder.name != record.folder.name]
        for name, record in records.items()
    }
    return {name: folders for name, folders in found.items() if folders}


def cluster_size() -> tuple[int, int, int]:
    """CPUs and GPUs of the Ray cluster, and the CPUs of its largest node. Raises InputError when it gets no CPU."""
    nodes = nodes_with()
    cpus = [int(n.get("CPU", 0)) for n in nodes]
    return sum(cpus), int(sum(n.get("GPU", 0) for n in nodes)), max(cpus)


def threads_per_task(cpus: int, largest: int, num_tasks: int) -> int:
    """CPUs of each of `num_tasks` scoring tasks: its share of the cluster, but no more than one node has, as it would
    never be scheduled."""
    return max(1, min(MAX_THREADS, largest, cpus // num_tasks))


def as_they_finish(references: Sequence[Any]) -> Iterator[Any]:
    """Results of Ray tasks in the order they finish; if one fails, the rest are cancelled."""
    import ray

    pending = list(references)
    try:
        while pending:
            done, pending = ray.wait(pending)
            yield get(done[0])
    finally:
        for left in pending:
            ray.cancel(left)


def score_all(
    data: EvaluationData, folders: dict[str, str], models: Location
) -> tuple[dict[str, Scored], dict[str, Predict]]:
    """Scores of every predictor, by name, and the fitted baselines. All are scored in parallel."""
    import ray

    def task(function: Callable[..., Any], *arguments: Any) -> Any:
        remote = ray.remote(num_cpus=data.threads)(function)
        return remote.remote(*arguments)

    shared = ray.put(data)
    models = models.resolve()
    # The ridge regression takes longest and is scored after its fit, so it is submitted first.
    fits = {
        "ridge": fit_ridge_regression,
        "nearest neighbour": fit_nearest_neighbour,
        "weighted mean": fit_weighted_mean,
        "corpus mean": fit_corpus_mean,
    }
    fitting = {name: task(fit, shared) for name, fit in fits.items()}
    baselines: dict[str, Any] = {"passthrough": copy_last, "context mean": context_mean, **fitting}
    assert len(baselines) == NUM_BASELINES
    tasks = [task(score_model, shared, name, models, folder) for name, folder in folders.items()]
    tasks += [task(score_baseline, shared, name, predict) for name, predict in baselines.items()]
    with progress_bar("score", len(tasks), "predictors") as advance:
        scored = {}
        for one in as_they_finish(tasks):
            scored[one.name] = one
            advance(1)
    fitted = baselines | {name: get(found) for name, found in fitting.items()}
    return {name: scored[name] for name in (*folders, *baselines)}, fitted


def score_seeds(
    data: EvaluationData, seeds: dict[str, list[str]], models: Location
) -> dict[str, list[dict[str, float | None]]]:
    """`score_seed` of these folders, by alias. All are scored in parallel."""
    import ray

    if not seeds:
        return {}
    remote = ray.remote(num_cpus=data.threads)(score_seed)
    shared = ray.put(data)
    tasks = {n: [remote.remote(shared, models.resolve(), f) for f in folders] for n, folders in seeds.items()}
    for _ in as_they_finish([reference for references in tasks.values() for reference in references]):
        pass
    return {name: get(references) for name, references in tasks.items()}


def decode_all(
    array: VectorArray,
    plan: TextPlan,
    load: CodecLoader,
    index: Location,
    cpus: int,
    gpus: int,
    candidates: int,
) -> list[TextAnswer]:
    """Texts of the plan's vectors, in order, decoded by one task per GPU, or per CPU if there are no GPUs.

    Warns once if a task was assigned a GPU that torch cannot see.
    """
    import ray

    parts = np.array_split(np.arange(len(plan.block.vectors)), gpus or cpus)
    remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(decode_part)
    shared = ray.put(array)
    tasks = [
        remote.remote(load, index.resolve(), shared, number, part_of(plan.block, part), candidates)
        for number, part in enumerate(parts)
        if len(part)
    ]
    decoded: dict[int, list[TextAnswer]] = {}
    noted = False
    with progress_bar("decode", len(plan.block.vectors), "texts") as advance:
        for note, number, answers in as_they_finish(tasks):
            if note and not noted:  # once is enough
                echo(f"evaluate: {note}")
                noted = True
            decoded[number] = answers
            advance(len(answers))
    return [one for number in sorted(decoded) for one in decoded[number]]


def decode_part(
    load: CodecLoader, index: Location, array: VectorArray, number: int, block: Block, candidates: int
) -> tuple[str, int, list[TextAnswer]]:
    """`decode_block` in a task, preceded by `unseen_gpu`'s warning."""
    return unseen_gpu(), *decode_block(load, index, array, number, block, candidates)


def machine(device: torch.device) -> str:
    """The machine that latency was measured on, and its load."""
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, "
        f"{torch.get_num_threads()} threads, latency on {name}{load}"
    )


def _ood_name(folder: Location) -> str:
    """The folder's name, or its parent's name for the `vectors` of a run."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "vectors" else folder.name


# --------------------------------------------------------------------------------------------------- command


def main(
    vectors: Annotated[PathOrUrl, path_option("Folder that `latent encode` wrote.")],
    index: Annotated[PathOrUrl, path_option("Folder that `latent index` wrote, of the same vectors.")],
    models: Annotated[PathOrUrl, path_option("Folder that `latent train` wrote, on the same vectors.")],
    output: Annotated[PathOrUrl, path_option("Folder for the record, leaderboard and report.")],
    ood: Annotated[list[PathOrUrl] | None, path_option("Out-of-domain vectors; repeatable.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Test windows shown with all their texts.")] = 3,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_CONTEXT,
            help="Vectors before each target; default: the longest context of any model; each reads the last ones it "
            "needs.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an evaluation made with other settings.")] = False,
    address: Address = None,
) -> None:
    """Score models and baselines on the test articles; print and save the leaderboard and examples."""
    started = time.perf_counter()
    settings = EvaluateSettings(examples=examples)
    paths = Paths(vectors, index, models, output, tuple(ood or ()))
    load = partial(load_codec_at, codec, None if codec_path is None else codec_path.resolve())
    evaluation, up_to_date = evaluate(paths, load, settings, overwrite, address, context)
    if up_to_date:
        echo(f"evaluate: {output} is up to date")
    print_result(evaluation)
    rows = evaluation["split"]["test_windows"]
    best = ranking(evaluation)[0]
    finish(
        "evaluate",
        rows=rows,
        **timing(started, rows),
        paths=[str(output / name) for name in FILES],
        up_to_date=up_to_date,
        redone=0 if up_to_date else 1,
        cosine={e["name"]: round(e["cosine"]["mean"], 4) for e in ranking(evaluation)},
        best=best["name"],
        gate={e["name"]: gate_word(e["gate"]) for e in evaluation["entries"] if "gate" in e},
        codec=evaluation["provenance"]["codec"],
    )


def print_result(evaluation: Evaluation) -> None:
    """The leaderboard and the examples, on stdout."""
    print(as_text(leaderboard(evaluation)))
    print()
    print(textwrap.fill(headline(evaluation), 120))
    for number, example in enumerate(evaluation["examples"], 1):
        print()
        print(example_text(example, number))


if __name__ == "__main__":
    run(main)
