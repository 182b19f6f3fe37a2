"""Check an NPZ file of training sequences and report every problem; changes nothing, does not start Ray.

Reads the file block by block, in seconds per gigabyte. Exit code 1 if there are problems.

    python -m jobs.check sequences.npz
    ray job submit --working-dir . -- python -m jobs.check sequences.npz
"""

import time
from dataclasses import asdict
from typing import Annotated

import typer

from jobs._ray import PathOrUrl, echo, finish, run, timing
from lvm.storage import local_input, location
from lvm.vectors.npz_check import check_npz
from lvm.vectors.shards import DIM


def main(
    file: Annotated[
        PathOrUrl,
        typer.Argument(
            parser=location, metavar="FILE", help="NPZ file: layout sequences, documents or split."
        ),
    ],
    dim: Annotated[int, typer.Option(help="Expected dimension of the vectors.")] = DIM,
) -> None:
    """Check an NPZ file of training sequences."""
    started = time.perf_counter()
    with local_input(file) as opened:
        report = check_npz(opened, dim)
    counts = ", ".join(f"{split} {rows:,}" for split, rows in report.rows.items())
    echo(f"{file}: layout {report.layout or 'unknown'}, sequences: {counts or 'none'}")
    for note in report.notes:
        echo(f"  note: {note}")
    for problem in report.problems:
        echo(f"  problem: {problem}")
    echo("no problems found" if report.ok else f"problems found: {len(report.problems)}")
    rows = sum(report.rows.values())
    finish(
        "check",
        ok=report.ok,
        layout=report.layout,
        rows=rows,
        **timing(started, rows),
        paths=[str(file)],
        codec=None if report.identity is None else report.identity.to_dict(),
        problems=[asdict(p) for p in report.problems],
        notes=report.notes,
    )
    if not report.ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
