"""The whole flow: chunk, encode, index, train, evaluate. Reads a corpus, writes one folder.

    python -m jobs.pipeline --input articles.jsonl.gz --output out/mine
    ray job submit --working-dir . -- python -m jobs.pipeline --input s3://… --output /shared/out

Each stage is a child process (`python -m jobs.NAME`) on one Ray cluster, which this process starts or joins. A
stage that is complete for the same inputs and settings is skipped, so a second run does only what is missing.
The bundled sample takes under four minutes on two cores.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from jobs._ray import (
    Address,
    CodecName,
    CodecPath,
    NonSequential,
    PathOrUrl,
    StageRun,
    address_of_cluster,
    connect,
    echo,
    finish,
    path_option,
    run,
    run_stage,
)
from lvm.errors import InputError
from lvm.storage import Location
from lvm.vectors.sequences import MAX_SEED, MIN_ARTICLES

STAGES = ("chunk", "encode", "index", "train", "evaluate")
DEMO_OUTPUT = Path("out/demo")


def stage_arguments(
    stage: str, source: str, output: Location, codec: list[str], limit: int | None, training: list[str]
) -> list[str]:
    """Options of one stage's job."""
    chunks, vectors, index, models = (str(output / d) for d in ("chunks", "vectors", "index", "models"))
    match stage:
        case "chunk":
            limited = [] if limit is None else ["--limit", str(limit)]
            return ["--input", source, "--output", chunks, *codec, *limited]
        case "encode":
            return ["--input", chunks, "--output", vectors, *codec]
        case "index":
            return ["--vectors", vectors, "--output", index]
        case "train":
            return ["--vectors", vectors, "--output", models, *training]
        case _:
            report = str(output / "evaluation")
            return ["--vectors", vectors, "--index", index, "--models", models, "--output", report, *codec]


def main(
    input: Annotated[
        str | None,
        typer.Option(
            help="Wikipedia dump (.xml.bz2), JSON, CSV or Parquet, a folder of these or of text files, or sample."
        ),
    ] = None,
    output: Annotated[PathOrUrl | None, path_option("Output folder; created if missing.")] = None,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N articles.")] = None,
    model: Annotated[str, typer.Option(help="Architectures, comma-separated, all or original.")] = "original",
    recipe: Annotated[str, typer.Option(help="Training recipe: fast, classic or long.")] = "fast",
    max_minutes: Annotated[float | None, typer.Option(help="Maximum training time, minutes.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split by article and of training.")
    ] = 0,
    allow_non_sequential: NonSequential = None,
    demo: Annotated[bool, typer.Option("--demo", hidden=True)] = False,
    address: Address = None,
) -> None:
    """Run every stage, then print the leaderboard, examples and the path of the report."""
    if demo:
        source, output = input or "sample", output or DEMO_OUTPUT
    elif input is None or output is None:
        raise InputError("expected --input PATH and --output DIR; for the bundled sample use `latent demo`")
    else:
        source = input
    output = output.absolute()
    if source != "sample" and "://" not in source:
        source = str(Path(source).absolute())
    codec_options = ["--codec", codec]
    if codec_path is not None:
        codec_options += ["--codec-path", str(codec_path.absolute())]
    training = ["--model", model, "--recipe", recipe, "--seed", str(seed)]
    if max_minutes is not None:
        training += ["--max-minutes", str(max_minutes)]
    if allow_non_sequential is not None:
        training += ["--allow-non-sequential", allow_non_sequential]

    begun = time.perf_counter()
    connect(address)
    cluster = address_of_cluster()
    seconds = {"ray": round(time.perf_counter() - begun, 1)}
    runs: dict[str, StageRun] = {}
    for number, stage in enumerate(STAGES, 1):
        echo(f"[{number}/{len(STAGES)}] {stage}")
        arguments = stage_arguments(stage, source, output, codec_options, limit, training)
        done = runs[stage] = run_stage(stage, [*arguments, "--address", cluster])
        seconds[stage] = round(done.seconds, 1)
        if stage == "chunk" and done.summary["articles"] < MIN_ARTICLES:
            raise InputError(
                f"{source} has {done.summary['articles']} articles; training needs {MIN_ARTICLES} or "
                "more, better hundreds"
            )
        state = "up to date" if done.summary.get("up_to_date") else "done"
        echo(
            f"[{number}/{len(STAGES)}] {stage}: {state}, {done.summary.get('rows', 0):,} rows, {done.seconds:.1f} s"
        )
    for line in runs["evaluate"].answers:
        print(line)
    report = output / "evaluation" / "report.html"
    print(f"\nReport: {report}")
    echo(
        "Gate: whether a model beats every baseline in cosine and in both ranks; the report explains each measure. "
        f'Try:\n  latent predict "The steam engine pumped water out of mines." --run {output}\n'
        f"  latent serve --run {output}"
    )
    finish(
        "pipeline",
        rows={s: r.summary.get("rows") for s, r in runs.items()},
        up_to_date={s: bool(r.summary.get("up_to_date")) for s, r in runs.items()},
        seconds={**seconds, "total": round(time.perf_counter() - begun, 1)},
        paths={"output": str(output), "report": str(report)},
    )


if __name__ == "__main__":
    run(main)
