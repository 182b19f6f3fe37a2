"""The command `latent`: starts jobs as child processes, and imports none of them.

Each stage is a job of its own (`python -m jobs.NAME`), which declares its options; what this command does not
know it passes on unchanged, so `latent encode --help` is the job's own help.
"""

import os
import shlex
import signal
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

CHECKOUT = Path(__file__).resolve().parent.parent

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Documents to vectors, a model that predicts the next vector, and the vector back to text.",
    epilog="Options of a command: latent COMMAND --help. Errors with a traceback: LATENT_TRACEBACK=1.",
)

JOBS = {
    "demo": ("pipeline", "The whole flow on the bundled sample, to predicted text and a report."),
    "run": ("pipeline", "The whole flow on your corpus: --input PATH --output DIR."),
    "chunk": ("chunk", "Articles to chunks within the codec's token limit."),
    "encode": ("encode", "Chunks to vectors."),
    "index": ("index", "Vectors to a FAISS index."),
    "train": ("train", "Vectors to predictors, all architectures at the same time."),
    "sweep": (
        "sweep",
        "Search architectures and settings with Ray Tune: a table of trials, a page, the best models.",
    ),
    "evaluate": ("evaluate", "Predictors against baselines: leaderboard, examples, report."),
    "predict": ("predict", "Five texts, or one text on standard input, to the predicted next text."),
    "generate": ("generate", "Articles to predicted texts: Parquet shards or one file of JSON lines."),
    "export": ("export", "Vectors to training sequences in one NPZ file."),
    "check": ("check", "Say what is wrong with an NPZ file of sequences."),
    "ingest": ("ingest", "Articles to coded, encoded rows of the concept store, once each."),
    "train-writer": ("train_writer", "Fit a writer: any codec's vectors to fluent text."),
    "train-codec": ("train_codec", "Fit a codec (encoder and hypothesizer) on chunks."),
}
"""Command to the job it runs and its line of help."""

CODEC_JOBS = {
    "eval": ("evaluate_codec", "Read-back and neighbour retrieval of a codec on held-out text."),
    "check": (
        "check_codec",
        "A round trip of your texts or the sample's; warns of a pair that does not match.",
    ),
}
"""The same for `latent codec COMMAND`."""

CONCEPT_COMMANDS = {
    "load": "Vector shards into a dataset of the store.",
    "export": "A dataset to vector shards.",
    "publish": "A dataset to a run's vectors and search index.",
    "search": "Rows near a text or vector, by code, source or words.",
    "stats": "What the store holds.",
    "clear": "Remove one dataset; asks.",
}
"""Commands of `latent concepts COMMAND`, all of one job, to their line of help."""

SUBMIT = "Run a command on a Ray cluster: submit --address URL encode --input … ; follows its log."

SERVE = "Text to text over HTTP: --run DIR --port 8000; a page to try it at /."

SERVE_NEEDS = ("fastapi", "starlette", "uvicorn", "pydantic")
"""Packages of the extra `serve`, beside Ray Serve's own part of Ray."""

FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def run_job(job: str, arguments: list[str], folder: str = "jobs") -> int:
    """Run `python -m FOLDER.JOB` from the checkout, with its output as ours; its exit code."""
    if not (CHECKOUT / folder / f"{job}.py").is_file():
        print(
            f"error: no {folder}/{job}.py beside {CHECKOUT / 'lvm'}; jobs run from a checkout of the repository: "
            "clone it and install it with `pip install -e .`",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "-m", f"{folder}.{job}", *arguments]
    print("+ " + shlex.join(["python", *command[1:]]), file=sys.stderr, flush=True)
    python_path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": python_path})
    # Ctrl-C reaches the child by itself (same process group); what is sent to us alone is passed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


def _add(command: str, job: str, line: str, to: typer.Typer = app, *extra: str) -> None:
    def forward(context: typer.Context) -> None:
        raise typer.Exit(run_job(job, [*extra, *context.args]))

    to.command(command, help=line, context_settings=FORWARD)(forward)


for _command, (_job, _line) in JOBS.items():
    _add(_command, _job, _line, app, *(["--demo"] if _command == "demo" else []))

_add("models", "models", "A run's model records: list them.", app, "list")
_add("promote", "models", "Let an alias point to a model that passed its evaluation.", app, "promote")

codec_app = typer.Typer(no_args_is_help=True, help="Measure or try out a codec.")
for _command, (_job, _line) in CODEC_JOBS.items():
    _add(_command, _job, _line, codec_app)
app.add_typer(codec_app, name="codec")

concepts_app = typer.Typer(no_args_is_help=True, help="The concept store in Postgres.")
for _command, _line in CONCEPT_COMMANDS.items():
    _add(_command, "concepts", _line, concepts_app, _command)
app.add_typer(concepts_app, name="concepts")


@app.command("serve", help=SERVE, context_settings=FORWARD)
def _serve(context: typer.Context) -> None:
    if missing := [name for name in SERVE_NEEDS if find_spec(name) is None]:
        print(
            f"error: latent serve needs {', '.join(missing)}, which is not installed; run pip install -e '.[serve]'",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    raise typer.Exit(run_job("launch", context.args, folder="serve"))


@app.command("submit", help=SUBMIT, context_settings=FORWARD | {"allow_interspersed_args": False})
def _submit(context: typer.Context) -> None:
    raise typer.Exit(run_job("submit", context.args))


def _print_version(value: bool) -> None:
    if value:
        print(metadata.version("latent-vector-models"))
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
