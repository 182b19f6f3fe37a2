"""List a run's model records or the bundled ones, or promote one: point an alias to it if its evaluation passed the
gate.

    latent models
    latent models --run out/mine
    latent promote --run out/mine gru --alias best

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
from lvm.predict.record import (
    CONFIG,
    METRICS,
    load_record,
    read_aliases,
    read_json,
    record_folders,
    resolve,
    set_alias,
)
from lvm.storage import Location, location, plain_name
from lvm.vectors.shards import write_bytes

PROMOTIONS = "promotions.jsonl"
"""Log of promotions, one per line, next to the aliases."""

RunFolder = Annotated[
    PathOrUrl, typer.Option("--run", parser=location, metavar="PATH", help="Folder of the run.")
]


def described(models: Location) -> list[dict[str, Any]]:
    """A row per record, newest first: name, aliases, architecture, parameters, context, val cosine, created. A damaged
    record's row has `damaged` instead, with the reason."""
    aliases = read_aliases(models)
    rows = []
    for folder in reversed(record_folders(models)):
        row = {
            "record": folder.name,
            "aliases": sorted(a for a, name in aliases.items() if name == folder.name),
        }
        try:
            config, metrics = read_json(folder / CONFIG), read_json(folder / METRICS)
            cosine = metrics.get("val_cosine")
            row |= {
                "architecture": str(config["model"]),
                "parameters": int(config.get("parameters", 0)) or None,
                "context": config.get("windows", {}).get("context"),
                "rank_head": "rank" in config,
                "val_cosine": None if cosine is None else float(cosine),
                "created": str(config.get("created", "")),
                "codec": str(config["codec"]["digest"]),
            }
        except (InputError, ValueError, TypeError, KeyError, AttributeError) as err:
            row["damaged"] = f"{type(err).__name__}: {err}"
        rows.append(row)
    return rows


def gate_of(evaluation: Location, folder: str) -> str:
    """The gate's result in words for this record in this evaluation; starts with "pass" if it passed. Raises InputError
    if the record was not evaluated."""
    path = evaluation / "evaluation.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; run `latent evaluate` first, or promote with --force REASON"
        )
    try:
        found = json.loads(path.read_text())
        if found.get("schema") != SCHEMA:
            raise InputError(
                f"{path} has schema {found.get('schema')!r}, expected {SCHEMA!r}; run `latent evaluate` again"
            )
        for entry in found["entries"]:
            if entry["kind"] == "model" and entry["details"].get("folder") == folder:
                return gate_word(entry["gate"])
        known = ", ".join(e["details"]["folder"] for e in found["entries"] if e["kind"] == "model")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        raise InputError(
            f"{path} is damaged ({type(err).__name__}: {err}); run `latent evaluate` again"
        ) from err
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
    if run_folder is not None and not run_folder.is_dir():
        raise InputError(f"--run {run_folder} is no folder; expected the --output of `latent run`")
    rows = described(models)
    table = Table("record", "alias", "parameters", "context", "rank head", "val cosine", "created", box=None)
    for row in rows:
        if "damaged" in row:
            echo(f"{row['record']} is damaged ({row['damaged']}); train that model again and delete it")
            continue
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
    plain_name("--alias", alias)
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
    path = models / PROMOTIONS
    try:
        held = path.read_text() if path.exists() else ""
    except (OSError, ValueError) as err:
        raise InputError(f"{path} cannot be read ({err}), so nothing was promoted; move it away") from err
    set_alias(models, alias, folder)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "alias": alias,
        "record": folder.name,
        "before": before,
        "gate": gate,
    }
    held += "\n" if held and not held.endswith("\n") else ""
    write_bytes(path, (held + json.dumps(entry, ensure_ascii=False) + "\n").encode())
    echo(f"{alias} now points to {folder.name} ({gate}); before: {before or 'nothing'}")
    finish("promote", seconds=round(time.perf_counter() - started, 3), **entry)


COMMANDS = {"models": list_models, "promote": promote}

if __name__ == "__main__":
    run(COMMANDS)
