"""Run fault schedules from a seed and write a table.

    python -m tests.integration.faults --schedules 200 --seed 0 --output table.md

Exit code 1 when a promise was broken. The last line of stdout is one JSON object.
"""

import argparse
import collections
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(FAULTS), help="which stages, by comma")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first schedule")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no schedule after this long")
    parser.add_argument("--output", type=Path, help="write the table to this file as well, as it grows")
    args = parser.parse_args()
    stages = tuple(args.stages.split(","))
    mountable = can_mount()
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as scratch:
        world = World()
        try:
            prepared = Stages(world, Path(scratch), stages)
            for schedule in schedules(args.schedules, args.seed, stages)[args.first :]:
                if time.monotonic() - begun > 60 * args.minutes:
                    break
                started = time.monotonic()
                row = {"number": schedule.number, "stage": schedule.stage, "fault": schedule.fault}
                row |= {"moment": schedule.moment, "what": "", "redone": 0}
                if schedule.fault == "disk full" and not mountable:
                    row |= {"held": "skipped", "what": "no tmpfs may be mounted here; run as root"}
                else:
                    try:
                        outcome = prepared.run(schedule)
                        row |= {"held": "yes", "what": outcome.what, "redone": outcome.redone}
                    except Exception as err:
                        row |= {
                            "held": "NO",
                            "what": f"{type(err).__name__}: {' '.join(str(err).split())[:300]}",
                        }
                row["seconds"] = time.monotonic() - started
                rows.append(row)
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
                "seconds": round(time.monotonic() - begun, 1),
            }
        )
    )
    sys.exit(1 if held["NO"] else 0)


if __name__ == "__main__":
    main()
