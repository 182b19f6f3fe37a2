"""Submit a job to a Ray cluster through its Jobs API, follow its log, and end with its exit code.

    latent submit encode --input s3://corpus/chunks --output s3://corpus/vectors
    latent submit --address http://127.0.0.1:8265 --no-wait train --vectors s3://corpus/vectors --output s3://corpus/models
    latent submit --cancel raysubmit_1a2b3c

What travels is the code, the bundled sample and the weights of `mini` (PARTS, 35 MB); no corpus, no output, no
trained model. So the paths in the job's options are the cluster's: a disk that every node sees, or s3:// and gs://.
The job's log goes to stdout as it comes, its closing line of JSON last; what this command says itself goes to stderr.

Ctrl-C stops the job, as --cancel does: it gets SIGTERM, and what it had finished is kept. The same command then
goes on from there. A lost connection stops nothing: --follow takes the log up again.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs._ray import CHECKOUT, echo, run
from lvm.cli import CODEC_JOBS, CONCEPT_COMMANDS, JOBS
from lvm.errors import InputError, LvmError

PARTS = ("jobs", "lvm", "serve", "data/sample", "pyproject.toml", "README.md", "LICENSE")
"""What travels to the cluster, of the checkout."""

MAX_UPLOAD_BYTES = 100 * 2**20
"""Most the parts may weigh. Ray keeps the package in the head's memory and refuses 512 MiB."""

STOPPED = 130
"""Exit code of a job that was stopped: the shell's code for Ctrl-C."""

STOP_TIMEOUT_S = 60
"""How long a stopped job may take to end. Ray sends SIGKILL RAY_JOB_STOP_WAIT_TIME_S (3 s) after SIGTERM."""

RECONNECT_S = 60
"""How long a cluster may be silent before following its log is given up."""


class ClusterError(LvmError):
    """The cluster does not answer, or refuses the token."""


def entrypoint(command: list[str]) -> str:
    """The shell line that runs a command of `latent` on the cluster. Raises InputError on an unknown one."""
    jobs = {name: job for name, (job, _) in JOBS.items()}
    jobs |= {f"codec {name}": job for name, (job, _) in CODEC_JOBS.items()}
    jobs |= {f"concepts {name}": f"concepts {name}" for name in CONCEPT_COMMANDS}
    words = 2 if command[:1] in (["codec"], ["concepts"]) else 1
    name = " ".join(command[:words])
    if name not in jobs:
        raise InputError(f"no job {name!r} to submit; expected one of {', '.join(jobs)}")
    demo = ["--demo"] if name == "demo" else []
    return shlex.join(["python", "-m", *f"jobs.{jobs[name]}".split(), *demo, *command[words:]])


@contextmanager
def working_directory(checkout: Path = CHECKOUT, most_bytes: int = MAX_UPLOAD_BYTES) -> Iterator[Path]:
    """A copy of what travels; gone afterwards. Raises InputError when it weighs more than `most_bytes`."""
    with tempfile.TemporaryDirectory(prefix="latent-submit-") as folder:
        copy = Path(folder)
        for part in PARTS:
            source = checkout / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
                shutil.copytree(source, copy / part, ignore=ignored)
            elif source.is_file():
                shutil.copy2(source, copy / part)
        sizes = {p.relative_to(copy): p.stat().st_size for p in copy.rglob("*") if p.is_file()}
        if sum(sizes.values()) > most_bytes:
            largest = ", ".join(
                f"{name} ({sizes[name] / 1e6:,.0f} MB)"
                for name in sorted(sizes, key=lambda n: sizes[n], reverse=True)[:3]
            )
            raise InputError(
                f"{checkout} would send {sum(sizes.values()) / 1e6:,.0f} MB, expected at most "
                f"{most_bytes / 1e6:,.0f}: {largest}. Move data and models out of {', '.join(PARTS[:3])}."
            )
        yield copy


def connect_to(address: str | None) -> Any:
    """A `JobSubmissionClient`. Raises ClusterError when no cluster answers there, or it refuses the token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)  # the few lines that matter are ours
    if address is not None:
        # Ray's client lets this variable win over its own argument; what was typed is to win here.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        return JobSubmissionClient()
    except AuthenticationError as err:
        raise ClusterError(
            f"the cluster at {where} asks for its token ({_reason(err)}). Put that token into ~/.ray/auth_token "
            "or RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token."
        ) from err
    # Ray exits where it finds no cluster by itself.
    except (ConnectionError, RuntimeError, ValueError, OSError, SystemExit) as err:
        raise ClusterError(
            f"no Ray cluster answers at {where} ({_reason(err)}). Give the head's dashboard as --address or in "
            "RAY_API_SERVER_ADDRESS, e.g. http://127.0.0.1:8265 with the tunnel of `ray dashboard cluster.yaml`."
        ) from err


def _reason(err: BaseException) -> str:
    """The first sentence of an error of Ray, whose messages are pages."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].split(". ")[0].rstrip(".")


async def follow(client: Any, job: str, out: Any = None) -> None:
    """Write the job's log to `out` (stdout) as it comes; returns when the job has ended.

    Raises ClusterError when the cluster is silent for RECONNECT_S.
    """
    out = out or sys.stdout
    shown = 0
    heard = time.monotonic()
    while True:
        skip = shown  # a new connection begins with the log's first line again
        try:
            async for text in client.tail_job_logs(job):
                heard = time.monotonic()
                new, skip = text[skip:], max(0, skip - len(text))
                shown += len(new)
                out.write(new)
                out.flush()
            if client.get_job_status(job).is_terminal():
                return
        except Exception as err:
            # Whatever the HTTP client under Ray's own raises when a proxy or the head goes away.
            if time.monotonic() - heard > RECONNECT_S:
                raise ClusterError(
                    f"lost the cluster ({err}); the job may go on without us. When the cluster answers again: "
                    f"latent submit --follow {job}"
                ) from err
        await asyncio.sleep(1)


def stop(client: Any, job: str) -> int:
    """Stop a job and wait until it has ended; the exit code. Raises ClusterError when it does not end."""
    echo(f"submit: stopping {job}; what it has finished is kept")
    client.stop_job(job)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{job} has not ended {STOP_TIMEOUT_S} s after it was told to; see the dashboard"
            )
        time.sleep(0.2)
    code = exit_code(client, job)
    if code == STOPPED:
        echo("submit: stopped; the same command goes on from what is finished")
    return code


def exit_code(client: Any, job: str) -> int:
    """Exit code of an ended job: its own, STOPPED where it was stopped, 1 where it never started."""
    from ray.job_submission import JobStatus

    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    if info.driver_exit_code is None or not 0 < info.driver_exit_code < 256:
        echo(f"error: {job} failed: {(info.message or 'no message').strip().splitlines()[-1]}")
        return 1
    return int(info.driver_exit_code)


def watch(client: Any, job: str) -> int:
    """Follow a job to its end; its exit code. Ctrl-C and SIGTERM stop the job first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts without it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        return stop(client, job)
    return exit_code(client, job)


def submit(client: Any, command: list[str], driver_cpus: float = 0) -> str:
    """Send the code and start the job; its id."""
    line = entrypoint(command)
    with working_directory() as folder:
        job: str = client.submit_job(
            entrypoint=line,
            runtime_env={"working_dir": str(folder)},
            entrypoint_num_cpus=driver_cpus,
            metadata={"latent": shlex.join(command)},
        )
    return job


def main(
    command: Annotated[
        list[str] | None, typer.Argument(help="A command of `latent` and its options, e.g. encode --input …")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Dashboard of the head (http://host:8265); else RAY_API_SERVER_ADDRESS, RAY_ADDRESS."
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's id and return at once.")
    ] = False,
    driver_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs of the job's own process; above 0 it leaves the head.")
    ] = 0,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Follow a job submitted before.")] = None,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Stop a job submitted before.")] = None,
) -> None:
    """Run a command of `latent` on a Ray cluster; its log, then its exit code, are this command's."""
    if sum([bool(command), follow is not None, cancel is not None]) != 1:
        raise InputError("expected a command to submit, or one of --follow ID and --cancel ID")
    if command:
        entrypoint(command)  # refused before any connection
    client = connect_to(address)
    with known_job(follow or cancel):
        if cancel is not None:
            if client.get_job_status(cancel).is_terminal():
                raise InputError(
                    f"{cancel} has ended already ({client.get_job_status(cancel).value.lower()})"
                )
            stop(client, cancel)
            return
        if follow is not None:
            raise typer.Exit(watch(client, follow))
    assert command is not None
    job = submit(client, command, driver_cpus)
    if no_wait:
        print(job)
        return
    echo(f"submit: {job}; Ctrl-C stops it, `latent submit --cancel {job}` from elsewhere")
    raise typer.Exit(watch(client, job))


@contextmanager
def known_job(job: str | None) -> Iterator[None]:
    """Turn Ray's answer to an unknown id into an InputError."""
    try:
        yield
    except RuntimeError as err:
        if "404" not in str(err) and "does not exist" not in str(err):
            raise
        raise InputError(
            f"the cluster knows no job {job!r}; expected an id that `latent submit` printed"
        ) from err


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        run(main, pass_on=True)
