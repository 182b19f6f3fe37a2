"""List a run's model records or the bundled ones, or promote one: point an alias to it if its evaluation passed the
gate.

    python -m jobs.models list
    python -m jobs.models list --run out/mine
    python -m jobs.models promote --run out/mine gru --alias best

A promotion requires that exactly this record passed the gate in RUN/evaluation/evaluation.json: a lead over every
baseline in cosine and in both ranks, out-of-domain cosine if measured, and speed. `--force REASON` skips the check.
Each promotion is logged as a line of promotions.jsonl. Aliases are replaced atomically; other aliases and the record
that the alias pointed to before are kept. Does not start Ray.
"""

import json
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs._ray import PathOrUrl, echo, finish, path_option, run
from lvm.errors import InputError
from lvm.evaluate.evaluation import SCHEMA, gate_word
from lvm.predict.predictor import SHIPPED
from lvm.predict.record import CONFIG, METRICS, load_record, read_aliases, record_folders, resolve, set_alias
from lvm.storage import Location, location

PROMOTIONS = "promotions.jsonl"
"""Log of promotions, one per line, next to the aliases."""

RunFolder = Annotated[
    PathOrUrl, typer.Option("--run", parser=location, metavar="PATH", help="Folder of the run.")
]


def described(models: Location) -> list[dict[str, Any]]:
    """A row per record, newest first: name, aliases, architecture, parameters, context, val cosine, created."""
    aliases = read_aliases(models)
    rows = []
    for folder in reversed(record_folders(models)):
        config, metrics = (json.loads((folder / file).read_text()) for file in (CONFIG, METRICS))
        rows.append(
            {
                "record": folder.name,
                "aliases": sorted(a for a, name in aliases.items() if name == folder.name),
                "architecture": config["model"],
                "parameters": config.get("parameters"),
                "context": config.get("windows", {}).get("context"),
                "rank_head": "rank" in config,
                "val_cosine": metrics.get("val_cosine"),
                "created": config.get("created", ""),
                "codec": config["codec"]["digest"],
            }
        )
    return rows


def gate_of(evaluation: Location, folder: str) -> str:
    """The gate's result in words for this record in this evaluation; starts with "pass" if it passed. Raises InputError
    if the record was not evaluated."""
    path = evaluation / "evaluation.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; run `latent evaluate` first, or promote with --force REASON"
        )
    found = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has schema {found.get('schema')!r}, expected {SCHEMA!r}; run `latent evaluate` again"
        )
    for entry in found["entries"]:
        if entry["kind"] == "model" and entry["details"].get("folder") == folder:
            return gate_word(entry["gate"])
    known = ", ".join(e["details"]["folder"] for e in found["entries"] if e["kind"] == "model")
    raise InputError(
        f"{path} evaluated {known}, not {folder}; run `latent evaluate` again, or promote with --force REASON"
    )


def list_models(
    run_folder: Annotated[
        PathOrUrl | None, path_option("Folder of the run. Default: the bundled models.", "--run")
    ] = None,
) -> None:
    """List the records of a run, or the bundled ones, newest first."""
    started = time.perf_counter()
    models = SHIPPED if run_folder is None else run_folder / "models"
    rows = described(models)
    table = Table("record", "alias", "parameters", "context", "rank head", "val cosine", "created", box=None)
    for row in rows:
        cosine = row["val_cosine"]
        table.add_row(
            row["record"],
            ", ".join(row["aliases"]),
            f"{row['parameters']:,}" if row["parameters"] else "-",
            str(row["context"] or "-"),
            "yes" if row["rank_head"] else "no",
            "-" if cosine is None else f"{cosine:.4f}",
            row["created"][:16].replace("T", " "),
        )
    if rows:
        Console(stderr=True, width=max(120, Console(stderr=True).width)).print(table)
    else:
        echo(f"{models} has no model yet; run `latent train`")
    seconds = round(time.perf_counter() - started, 3)
    finish("models", rows=len(rows), seconds=seconds, models=rows)


def promote(
    model: Annotated[str, typer.Argument(help="Alias or record to promote.")],
    run_folder: RunFolder,
    alias: Annotated[str, typer.Option(help="Alias to point to it.")] = "best",
    evaluation: Annotated[PathOrUrl | None, path_option("Evaluation; default: RUN/evaluation.")] = None,
    force: Annotated[str | None, typer.Option(metavar="REASON", help="Promote without the gate.")] = None,
) -> None:
    """Point an alias to a record that passed its evaluation's gate."""
    started = time.perf_counter()
    models = (run_folder / "models").resolve()
    if not alias or "/" in alias or alias.startswith("."):
        raise InputError(f"--alias is {alias!r}, expected a plain name such as best")
    folder = resolve(models, model)
    load_record(models, folder.name)  # a damaged record must fail here, not in the service
    before = read_aliases(models).get(alias)
    if force is None:
        gate = gate_of(evaluation or run_folder / "evaluation", folder.name)
        if not gate.startswith("pass"):
            raise InputError(f"{folder.name} is not promoted: {gate}; --force REASON promotes it anyway")
    else:
        if not force.strip():
            raise InputError("--force is empty, expected a reason")
        gate = f"forced: {force.strip()}"
    set_alias(models, alias, folder)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "alias": alias,
        "record": folder.name,
        "before": before,
        "gate": gate,
    }
    path = models / PROMOTIONS
    held = path.read_text() if path.exists() else ""
    path.write_text(held + json.dumps(entry, ensure_ascii=False) + "\n")
    echo(f"{alias} now points to {folder.name} ({gate}); before: {before or 'nothing'}")
    finish("promote", seconds=round(time.perf_counter() - started, 3), **entry)


COMMANDS = {"list": list_models, "promote": promote}

if __name__ == "__main__":
    run(COMMANDS)
