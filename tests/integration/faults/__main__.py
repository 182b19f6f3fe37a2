"""Run fault schedules from a seed and write a table.

    python -m tests.integration.faults --schedules 200 --seed 0 --rows rows.jsonl --output table.md

With --rows, each schedule's row is added to that file as it ends, and a schedule whose row is there is not run again: a
long run may be stopped at any time and continued by the same command. Table and summary are of all rows.

Exit code 1 when a promise was broken. The last line of stdout is one JSON object.
"""

import argparse
import collections
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.faults.schedules import FAULTS, schedules
from tests.integration.faults.stages import Stages
from tests.integration.faults.world import World, can_mount


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a schedule."""
    lines = [
        "| no. | stage | fault | moment | the disturbed run | done twice | s | held |",
        "| ---: | --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['number']} | {r['stage']} | {r['fault']} | {r['moment']:.2f} | {r['what']} | {r['redone']} "
            f"| {r['seconds']:.1f} | {r['held']} |"
        )
    return "\n".join(lines)


def rows_in(file: Path | None, seed: int, stages: str) -> list[dict[str, Any]]:
    """The rows an earlier run left; none where there is no such file.

    Raises ValueError when they are of other schedules.
    """
    if file is None or not file.exists():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if (row["seed"], row["stages"]) != (seed, stages):
            raise ValueError(
                f"{file} holds schedules of seed {row['seed']} for {row['stages']}, expected seed {seed} for {stages}; "
                "choose another --rows"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(FAULTS), help="which stages, by comma")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first schedule")
    parser.add_argument(
        "--every", type=int, default=1, help="each so-many-th from there: several may share --rows"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="start no schedule after this long")
    parser.add_argument(
        "--rows", type=Path, help="JSON lines of what is done: read first, added to as it grows"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for the undisturbed runs' results, kept for the next run"
    )
    parser.add_argument("--output", type=Path, help="write the table to this file as well, as it grows")
    args = parser.parse_args()
    stages = tuple(args.stages.split(","))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: no cluster stays behind
    mountable = can_mount()
    rows = rows_in(args.rows, args.seed, args.stages)
    done = {r["number"] for r in rows}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as own:
        scratch = str(args.scratch.resolve()) if args.scratch else own
        world = World()
        try:
            prepared = Stages(world, Path(scratch), stages)
            for schedule in schedules(args.schedules, args.seed, stages)[args.first :: args.every]:
                if schedule.number in done:
                    continue
                if time.monotonic() - begun > 60 * args.minutes:
                    break
                started = time.monotonic()
                row = {"seed": args.seed, "stages": args.stages, "number": schedule.number}
                row |= {"stage": schedule.stage, "fault": schedule.fault, "moment": schedule.moment}
                row |= {"what": "", "redone": 0}
                if schedule.fault == "disk full" and not mountable:
                    row |= {"held": "skipped", "what": "no tmpfs may be mounted here; run as root"}
                else:
                    try:
                        outcome = prepared.run(schedule)
                        row |= {"held": "yes", "what": outcome.what, "redone": outcome.redone}
                    except Exception as err:
                        row |= {
                            "held": "NO",
                            "what": f"{type(err).__name__}: {' '.join(str(err).split())[:300]}".replace(
                                scratch, ""
                            ),
                        }
                row["seconds"] = round(time.monotonic() - started, 2)
                rows.append(row)
                if args.rows:
                    with args.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
                if args.output:
                    args.output.write_text(table(rows) + "\n")
        finally:
            world.close()
    print(table(rows))
    held = collections.Counter(r["held"] for r in rows)
    print(
        json.dumps(
            {
                "schedules": len(rows),
                "seed": args.seed,
                "held": held["yes"],
                "broken": held["NO"],
                "skipped": held["skipped"],
                "most_done_twice": max((r["redone"] for r in rows), default=0),
                "by_fault": dict(collections.Counter(f"{r['stage']}: {r['fault']}" for r in rows)),
                "seconds": round(sum(r["seconds"] for r in rows), 1),
            }
        )
    )
    sys.stdout.flush()
    os._exit(1 if held["NO"] else 0)  # threads of disturbed runs may hang for good; this must not


if __name__ == "__main__":
    main()
