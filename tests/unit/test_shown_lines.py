"""What a job shows of the lines that Ray's C++ code writes to its stderr."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, time
from jobs._ray import echo, without_false_alarm
with without_false_alarm():
    os.write(2, b"[x E 1] core_worker.cc:1: Actor 7 has constructor argu")
    time.sleep(0.3)  # the pipe's other end reads half a line
    os.write(2, b"ments in the object store and max_restarts > 0.\\n[x E 2] raylet.cc:2: lost\\n")
    echo("encode: \\N{HORIZONTAL ELLIPSIS} half")
    os.write(2, b"no end of line")
os.write(2, b"\\nafter\\n")
"""


def stderr_of(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, check=True
    )
    return done.stderr.decode()


@pytest.mark.parametrize("shown", ["0", "1"])
def test_a_false_alarm_is_hidden_and_nothing_else(shown: str) -> None:
    said = stderr_of(LATENT_RAY_LOGS=shown, PYTHONIOENCODING="utf-8").splitlines()
    assert ("constructor arguments" in "".join(said)) == (shown == "1")
    assert {"[x E 2] raylet.cc:2: lost", "encode: … half", "no end of line", "after"} <= set(said)


def test_a_stderr_that_knows_few_letters_ends_no_job() -> None:
    assert "encode: \\u2026 half" in stderr_of(LATENT_RAY_LOGS="0", PYTHONIOENCODING="ascii:backslashreplace")


def test_a_closed_stderr_holds_nobody_up() -> None:
    script = (
        SCRIPT + "with without_false_alarm():\n    [os.write(2, b'x' * 999 + b'\\n') for _ in range(500)]\n"
    )
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", script], stderr=writer) as job:
        os.close(writer)
        os.close(reader)
        job.wait(60)
