"""Ten fault schedules against the real jobs on a cluster of three nodes; the command that ran hundreds, in short."""

import json
import subprocess
import sys

import pytest

from tests.integration.conftest import CHECKOUT
from tests.integration.faults.schedules import FAULTS, schedules


def test_schedules_follow_from_the_seed_and_take_every_fault() -> None:
    assert schedules(30, 1) == schedules(40, 1)[:30]
    assert schedules(30, 1) != schedules(30, 2)
    met = {(s.stage, s.fault) for s in schedules(200, 0)}
    assert met == {(stage, fault) for stage, faults in FAULTS.items() for fault in faults}


@pytest.mark.slow
def test_ten_schedules_lose_nothing_and_double_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.faults", "--schedules", "10", "--stages", "encode,index"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
    assert summary["held"] + summary["skipped"] == 10
