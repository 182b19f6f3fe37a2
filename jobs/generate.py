"""Predict the next chunks in articles: reads articles, writes one row per prediction, as shards or one JSON lines file.

    python -m jobs.generate --input articles.jsonl.gz --model gru --limit 300 --output predictions.jsonl
    ray job submit --working-dir . -- python -m jobs.generate --input s3://corpus --run /shared/run --output /shared/out

Contexts of the model's length are taken from each article, evenly spread, and the chunks after them are predicted. A
row holds article, title, position (of the predicted chunk), step (1 for the first of --length), context (texts), next
(the true text, null past the article's end), text, source (exact, writer or corpus), extract (the nearest corpus chunk,
with --run), cosine (of the text's vector to the prediction) and cosine_to_next (to the true next vector), both after
subtracting the corpus mean, and log_prob (nats per character under the language model).

Ray Data makes predictions in blocks, each written to a temporary file and renamed: a job that is killed and run again
makes only what is missing. 300 predictions with four drafts each on two cores: see tests/bench/results.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from jobs._ray import (
    Address,
    CodecName,
    CodecPath,
    LanguageModel,
    ModelName,
    PathOrUrl,
    WriterFolder,
    accepted,
    articles_of,
    connect,
    echo,
    finish,
    guarded,
    load_codec_at,
    model_of,
    nodes_with,
    path_option,
    ray_data,
    timing,
    unseen_gpu,
    versions,
)
from jobs._ray import run as run_main
from lvm.codec.ladder import LadderSettings
from lvm.corpus.chunker import Chunker
from lvm.errors import InputError, LvmError, OutputError
from lvm.predict.generate import BATCH_TEXTS, Generator
from lvm.storage import Location
from lvm.vectors.artefact import Artefact
from lvm.vectors.shards import Manifest, Shard, fingerprint, read_table, with_footer, write_bytes, write_table

KIND = "predictions"

SCHEMA = pa.schema(
    [
        ("article", pa.string()),
        ("title", pa.string()),
        ("position", pa.int32()),
        ("step", pa.int32()),
        ("context", pa.list_(pa.string())),
        ("next", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("extract", pa.string()),
        ("cosine", pa.float32()),
        ("cosine_to_next", pa.float32()),
        ("log_prob", pa.float32()),
        ("refusals", pa.list_(pa.string())),
        ("model", pa.string()),
    ]
)


@dataclass(frozen=True)
class GenerateSettings:
    """Everything that determines the predictions, except the articles."""

    model: str
    """Folder name of the model record."""
    decoder: str
    """Digest of codec, decoder and writer (`lvm.codec.ladder.decoder_digest`)."""
    corpus: str
    """Fingerprint of the vectors for corpus answers; empty without --run."""
    length: int
    """Chunks predicted from each context."""
    per_article: int
    """Maximum contexts per article."""
    limit: int | None
    """Maximum contexts in all."""
    ladder: dict[str, Any]
    """How texts are drafted and chosen (`LadderSettings`)."""


@dataclass(frozen=True)
class Loader:
    """Loads a worker's generator."""

    codec: str
    codec_path: Location | None
    writer: Location | None
    language_model: Location | None
    run: Location | None
    model: str
    ladder: LadderSettings

    def __call__(self) -> Generator:
        codec = load_codec_at(self.codec, self.codec_path, self.writer, self.language_model)
        return Generator.load(self.run, self.model, codec, self.ladder)


@dataclass(frozen=True)
class Task:
    """One context and the true chunks after it."""

    article: str
    title: str
    position: int
    context: list[str]
    following: list[str]
    """True texts of the next `length` chunks, fewer at the article's end."""


# ------------------------------------------------------------------------------------------------------ contexts


def tasks_of(
    source: str, generator: Generator, per_article: int, length: int, limit: int | None
) -> Iterator[Task]:
    """Contexts of the articles, in order; articles with too few chunks are skipped."""
    chunker, num_context = Chunker(generator.codec.tokenizer), generator.predictor.context
    left = limit
    for article in articles_of(source):
        (chunks,) = chunker.chunk([article])
        texts = [c.text for c in chunks]
        room = len(texts) - num_context
        if room < 1:
            continue
        number = min(per_article, room)
        for place in np.unique(np.linspace(0, room - 1, number + 2)[1:-1].round().astype(int)).tolist():
            if left is not None and left == 0:
                return
            end = place + num_context
            yield Task(article.article_id, article.title, end, texts[place:end], texts[end : end + length])
            left = None if left is None else left - 1


def predict_block(generator: Generator, tasks: Sequence[Task], length: int) -> pa.Table:
    """Prediction rows of these contexts: all first chunks, then all second ones, and so on."""
    rows: list[dict[str, Any]] = []
    centre = generator.centre
    for step, predictions in enumerate(generator.continue_all([task.context for task in tasks], length)):
        texts = [p.text for p in predictions]
        truths = [t.following[step] if step < len(t.following) else None for t in tasks]
        given = [t or " " for t in texts] + [t for t in truths if t is not None]
        encoded = iter(generator.codec.encode_chunks(given).vectors - centre)
        own = [next(encoded) for _ in texts]
        true = [None if t is None else next(encoded) for t in truths]
        for task, p, text, a, b in zip(tasks, predictions, texts, own, true, strict=True):
            rows.append(
                {
                    "article": task.article,
                    "title": task.title,
                    "position": task.position + step,
                    "step": step + 1,
                    "context": task.context,
                    "next": task.following[step] if step < len(task.following) else None,
                    "text": text,
                    "source": p.answer.source,
                    "extract": None if p.extract is None else p.extract.text,
                    "cosine": _cosine(a, p.vector - centre),
                    "cosine_to_next": None if b is None else _cosine(a, b),
                    "log_prob": p.answer.log_prob,
                    "refusals": list(p.answer.refusals),
                    "model": p.model,
                }
            )
    return pa.Table.from_pylist(rows, SCHEMA)


def _cosine(a: Any, b: Any) -> float:
    return float(a @ b / max(1e-9, float(np.linalg.norm(a) * np.linalg.norm(b))))


# ------------------------------------------------------------------------------------------------------- blocks


class BlockWriter:
    """Ray Data's stateful worker: holds codec, model and corpus, and predicts blocks."""

    def __init__(self, load: Loader, target: Location, length: int) -> None:
        self.target, self.length = target, length
        self.note = unseen_gpu()
        self.failure: LvmError | None = None
        try:
            self.generator = load()
        except LvmError as err:
            self.failure = err

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (block,) = batch["block"].tolist()
        record = json.loads(block)

        def work() -> dict[str, Any]:
            if self.failure is not None:
                raise self.failure
            table = predict_block(self.generator, [Task(**t) for t in record["tasks"]], self.length)
            return asdict(write_table(self.target / record["file"], with_footer(table, record["footer"])))

        row = guarded(work, file=record["file"], rows=0, bytes=0, sha256="", note=self.note)
        return {name: [value] for name, value in row.items()}


def generate(
    source: str,
    target: Location,
    load: Loader,
    length: int,
    per_article: int,
    limit: int | None,
    overwrite: bool = False,
    address: str | None = None,
) -> tuple[Manifest, int]:
    """Make `target` hold exactly the predictions; returns the manifest, and how many this run made."""
    generator = load()
    if generator.codec.no_writer is not None:
        echo(f"generate: {generator.codec.no_writer}")
    corpus = "" if generator.array is None else generator.array.fingerprint
    settings = GenerateSettings(
        generator.predictor.name,
        generator.ladder.digest,
        corpus,
        length,
        per_article,
        limit,
        asdict(load.ladder),
    )
    predictions = Artefact(target, KIND, asdict(settings), lambda line: echo(f"generate: {line}"))
    predictions.claim(overwrite)
    blocks: list[dict[str, Any]] = []
    tasks: list[Task] = []

    def close() -> None:
        if tasks:
            content = [asdict(t) for t in tasks]
            footer = {"settings": fingerprint(asdict(settings)), "contexts": fingerprint(content)}
            blocks.append({"file": f"part-{len(blocks):05d}.parquet", "tasks": content, "footer": footer})
            tasks.clear()

    for task in tasks_of(source, generator, per_article, length, limit):
        tasks.append(task)
        if len(tasks) == BATCH_TEXTS:
            close()
    close()
    if not blocks:
        raise InputError(
            f"no article of {source} has {generator.predictor.context + 1} chunks or more; expected longer articles"
        )
    del generator
    inputs = {"contexts": fingerprint([b["footer"] for b in blocks])}
    done = predictions.current(inputs)
    if done is not None:
        return done, 0
    predictions.begin()
    shards = {b["file"]: predictions.finished(b["file"], b["footer"]) for b in blocks}
    pending = [b for b in blocks if shards[b["file"]] is None]
    if len(pending) < len(blocks):
        echo(f"generate: keeping {len(blocks) - len(pending)} of {len(blocks)} blocks that are finished")
    made = 0
    if pending:
        connect(address)
        data = ray_data()
        nodes = nodes_with()
        gpus = int(sum(n.get("GPU", 0) for n in nodes))
        cpus = int(sum(n.get("CPU", 0) for n in nodes))
        # A writer's weights take 0.6 GB, and one actor with two threads is faster than two with one each.
        threads = min(max(1, cpus // max(1, gpus)), max(int(n.get("CPU", 1)) for n in nodes), 8)
        actors = max(1, min(len(pending), gpus or cpus // threads))
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": threads}
        rows = data.from_items(
            [{"block": json.dumps(b)} for b in pending], override_num_blocks=len(pending)
        ).map_batches(
            BlockWriter,
            fn_constructor_args=(load, target.resolve(), length),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            **resources,
        )
        num_texts = sum(len(b["tasks"]) for b in pending) * length
        with closing(accepted(rows.iter_rows(), "generate", len(pending), num_texts, "texts")) as rows_made:
            for row in rows_made:
                shards[row["file"]] = Shard(**row)
                made += row["rows"]
    listed = tuple(s for s in shards.values() if s is not None)
    manifest = Manifest(
        kind=KIND,
        settings=asdict(settings),
        inputs=inputs,
        shards=listed,
        rows=sum(s.rows for s in listed),
        source=source,
        versions=versions(),
    )
    predictions.publish(manifest)
    return manifest, made


def require_own_file(output: Location) -> None:
    """Raise OutputError if `output` exists and does not begin with a prediction."""
    if not output.exists():
        return
    with output.open("rb") as file:
        first = file.readline()
    try:
        own = {"source", "refusals", "cosine"} <= json.loads(first or b"{}").keys()
    except (ValueError, AttributeError):
        own = False
    if not own:
        raise OutputError(
            f"--output {output} exists and holds no predictions; choose another name, or pass --overwrite to replace it"
        )


def rows_of(target: Location, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """All predictions, in order."""
    for shard in manifest.shards:
        yield from read_table(target / shard.file).to_pylist()


# ------------------------------------------------------------------------------------------------------ command


def main(
    input: Annotated[str, typer.Option(help="Articles in any format of `latent chunk`, or sample.")],
    output: Annotated[PathOrUrl, path_option("Folder of shards to write, or one file ending in .jsonl.")],
    model: ModelName = None,
    run: Annotated[
        PathOrUrl | None,
        path_option("Folder of `latent run`, for its models and corpus; default: the bundled models."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of contexts.")] = None,
    per_article: Annotated[int, typer.Option(min=1, help="Contexts per article, evenly spread.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Chunks to predict after each context.")] = 1,
    candidates: Annotated[int, typer.Option(min=1, help="Drafts per vector; the best is returned.")] = 4,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    writer: WriterFolder = None,
    language_model: LanguageModel = None,
    overwrite: Annotated[bool, typer.Option(help="Replace predictions made with other settings.")] = False,
    address: Address = None,
) -> None:
    """Predict the next chunks in articles; a second run makes only what is missing."""
    began = time.perf_counter()
    ladder = LadderSettings(candidates=candidates)
    one_file = str(output).endswith(".jsonl")
    if one_file and output.is_dir():
        raise OutputError(f"--output {output} is a folder, expected a file; choose another name")
    if one_file and not overwrite:
        require_own_file(output)
    target = output.with_name(f"{output.name}.parts") if one_file else output
    load = Loader(codec, codec_path, writer, language_model, run, model_of(run, model), ladder)
    manifest, made = generate(input, target, load, length, per_article, limit, overwrite, address)
    predictions = list(rows_of(target, manifest))
    if one_file:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        write_bytes(output, lines.encode())
        if isinstance(target, os.PathLike):
            shutil.rmtree(target)
    sources = [row["source"] for row in predictions]
    finish(
        "generate",
        rows=manifest.rows,
        made=made,
        **timing(began, made),
        paths=[str(output)],
        up_to_date=made == 0,
        sources={name: sources.count(name) for name in ("exact", "writer", "corpus")},
        refused=sum(bool(row["refusals"]) for row in predictions),
        settings=manifest.settings,
    )


if __name__ == "__main__":
    run_main(main)
