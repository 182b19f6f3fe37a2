"""The command `latent`: runs jobs as child processes and imports none of them.

Each stage is a separate job (`python -m jobs.NAME`) that declares its own options. Options are passed on unchanged,
so `latent encode --help` shows the job's help.
"""

import os
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
    "demo": ("pipeline", "Run all stages on the bundled sample."),
    "run": ("pipeline", "Run all stages on your corpus: --input PATH --output DIR."),
    "chunk": ("chunk", "Cut articles into chunks within the codec's token limit."),
    "encode": ("encode", "Encode chunks as vectors."),
    "index": ("index", "Build a FAISS index of vectors."),
    "train": ("train", "Train predictors in parallel."),
    "sweep": ("sweep", "Search architectures and settings with Ray Tune."),
    "evaluate": ("evaluate", "Compare predictors with baselines: leaderboard, examples, report."),
    "predict": ("predict", "Predict the text that follows some chunks, or a text on standard input."),
    "generate": ("generate", "Predict the next chunks in articles, to Parquet shards or a JSON lines file."),
    "export": ("export", "Export training sequences as an NPZ file."),
    "check": ("check", "Validate an NPZ file of training sequences."),
    "ingest": ("ingest", "Add articles to the concept store."),
    "train-writer": ("train_writer", "Fit a writer for a codec's vectors."),
    "train-codec": ("train_codec", "Fit a codec (encoder and hypothesizer)."),
}
"""Command to its job and help text."""

CODEC_JOBS = {
    "eval": ("evaluate_codec", "Measure a codec's read-back and retrieval on held-out text."),
    "check": ("check_codec", "Encode and decode some texts; warn if encoder and decoder do not match."),
}
"""The same for `latent codec COMMAND`."""

CONCEPT_COMMANDS = {
    "load": "Load vector shards into a dataset.",
    "export": "Export a dataset as vector shards.",
    "publish": "Publish a dataset as a run's vectors and search index.",
    "search": "Search by text or vector, with filters.",
    "stats": "Show the datasets in the store.",
    "clear": "Remove a dataset, after confirmation.",
}
"""Help text of each `latent concepts COMMAND`; all belong to one job."""

SUBMIT = "Run a command on a Ray cluster and follow its log: submit --address URL encode --input …"

SERVE = "Serve a run over HTTP, with a demo page at /: --run DIR --port 8000."

SERVE_NEEDS = ("fastapi", "starlette", "uvicorn", "pydantic")
"""Packages of the extra `serve`, in addition to Ray Serve."""

FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def run_job(job: str, arguments: list[str], folder: str = "jobs", name: str = "latent") -> int:
    """Run `python -m FOLDER.JOB` from the checkout, its output passed through; returns its exit code. name: the command
    in its help and usage errors."""
    if not (CHECKOUT / folder / f"{job}.py").is_file():
        print(
            f"error: no {folder}/{job}.py next to {CHECKOUT / 'lvm'}; jobs run from a checkout of the repository: "
            "clone it and install it with `pip install -e .`",
            file=sys.stderr,
        )
        return 1
    command = [sys.executable, "-m", f"{folder}.{job}", *arguments]
    python_path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": python_path, "LATENT_COMMAND": name})
    # Ctrl-C also reaches the child (same process group); SIGTERM has to be passed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


def _add(command: str, job: str, line: str, to: typer.Typer = app, *extra: str, name: str = "") -> None:
    def forward(context: typer.Context) -> None:
        raise typer.Exit(run_job(job, [*extra, *context.args], name=name or f"latent {command}"))

    to.command(command, help=line, context_settings=FORWARD)(forward)


for _command, (_job, _line) in JOBS.items():
    _add(_command, _job, _line, app, *(["--demo"] if _command == "demo" else []))

_add("models", "models", "List the models of a run, or the bundled ones.", app, "models", name="latent")
_add(
    "promote",
    "models",
    "Point an alias to a model that passed its evaluation.",
    app,
    "promote",
    name="latent",
)

codec_app = typer.Typer(no_args_is_help=True, help="Measure or check a codec.")
for _command, (_job, _line) in CODEC_JOBS.items():
    _add(_command, _job, _line, codec_app, name=f"latent codec {_command}")
app.add_typer(codec_app, name="codec")

concepts_app = typer.Typer(no_args_is_help=True, help="The concept store in Postgres.")
for _command, _line in CONCEPT_COMMANDS.items():
    _add(_command, "concepts", _line, concepts_app, _command, name="latent concepts")
app.add_typer(concepts_app, name="concepts")


@app.command("serve", help=SERVE, context_settings=FORWARD)
def _serve(context: typer.Context) -> None:
    if missing := [name for name in SERVE_NEEDS if find_spec(name) is None]:
        print(
            f"error: latent serve needs {', '.join(missing)}, which is not installed; run pip install -e '.[serve]'",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    raise typer.Exit(run_job("launch", context.args, folder="serve", name="latent serve"))


@app.command("submit", help=SUBMIT, context_settings=FORWARD | {"allow_interspersed_args": False})
def _submit(context: typer.Context) -> None:
    raise typer.Exit(run_job("submit", context.args, name="latent submit"))


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
