"""What every job shares: joining a Ray cluster, one-line errors, and the closing line of JSON."""

import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from lvm.errors import LvmError

CHECKOUT = Path(__file__).resolve().parent.parent

START_TIMEOUT_S = 600
"""Longest wait for a cluster to come up with the CPUs or GPUs a job asks for: nodes of a cloud take minutes, and what
nobody has never comes."""

_joined: list[bool] = []
"""Not empty once this process has joined a cluster by `connect`."""

Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join (host:port, ray://… or auto); none starts one on this machine."),
]


def connect(address: str | None) -> None:
    """Join the cluster at `address`, else the one this process was submitted to, else a local one.

    Workers import `lvm` and `jobs` from this checkout. On a cluster that is not this machine's own, the
    checkout must be the job's working directory (`ray job submit --working-dir .`).
    """
    import ray

    if ray.is_initialized():
        return
    _joined.append(True)
    # Ray 2.60 turns to its new defaults for these; said here so that no warning hides our own lines.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    starts_one = address is None and "RAY_ADDRESS" not in os.environ
    if starts_one:
        # Four trainings at once are some twenty small processes; Ray warns from four times this number.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "6")
    python_path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    # Idle OpenMP threads of a worker sleep. Spinning, as they do by default, two workers of two threads on two
    # busy cores took five times as long for a training step as one thread each.
    workers = {"PYTHONPATH": python_path, "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        address=address,
        runtime_env={"env_vars": workers},
        logging_level=logging.WARNING,
        log_to_driver=os.environ.get("LATENT_RAY_LOGS") == "1",
        include_dashboard=False if starts_one else None,
    )


def address_of_cluster() -> str:
    """Address under which child processes join the cluster this process is on."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def versions() -> dict[str, str]:
    """Versions of what decides a job's numbers."""
    names = ("latent-vector-models", "ray", "torch", "numpy", "pyarrow", "faiss-cpu")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def say(line: str) -> None:
    """One line for the person watching, on stderr; stdout is for answers."""
    print(line, file=sys.stderr, flush=True)


def finish(summary: dict[str, Any]) -> None:
    """Leave the cluster and print the closing line of JSON on stdout; the last thing a job does.

    Ray prints warnings of its own to a driver's stdout at any time, so the driver goes first; but not from a
    cluster that was joined before `connect`, which is somebody else's.
    """
    if _joined:
        import ray

        ray.shutdown()
    print(json.dumps({**summary, "versions": versions()}), flush=True)


def run(main: Callable[..., None]) -> None:
    """Run a job's `main` as a command: options from its signature, LvmError as one line and exit code 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except LvmError as error:
        if os.environ.get("LATENT_TRACEBACK") == "1":
            raise
        say(f"error: {error}")
        sys.exit(1)
