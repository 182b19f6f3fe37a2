"""Submit a job to a Ray cluster through its Jobs API, follow its log, and end with its exit code.

    latent submit encode --input s3://corpus/chunks --output s3://corpus/vectors
    latent submit --address http://127.0.0.1:8265 --no-wait train --vectors s3://corpus/vectors --output s3://corpus/models
    latent submit --cancel raysubmit_1a2b3c

The upload holds the code, the bundled sample and the bundled weights (PARTS, 76 MB), but no corpus, output or model of
yours. So paths in the job's options are the cluster's: a shared disk, s3:// or gs://. The job's log is
streamed to stdout, ending in its closing line of JSON; this command's own messages go to stderr.

Ctrl-C stops the job, as --cancel does: it gets SIGTERM, and finished work is kept. The same command resumes it. A lost
connection does not stop the job: --follow resumes the log.
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
"""Files and folders of the checkout that are uploaded."""

MAX_UPLOAD_BYTES = 100 * 2**20
"""Maximum size of the upload. Ray keeps the package in the head's memory and rejects 512 MiB."""

STOPPED = 130
"""Exit code of a job that was stopped: the shell's code for Ctrl-C."""

STOP_TIMEOUT_S = 60
"""How long to wait for a stopped job to end. Ray sends SIGKILL RAY_JOB_STOP_WAIT_TIME_S (3 s) after SIGTERM."""

RECONNECT_S = 60
"""How long to keep reconnecting to an unresponsive cluster."""


class ClusterError(LvmError):
    """The cluster does not respond, or rejects the token."""


def entrypoint(command: list[str]) -> str:
    """The shell command that runs a `latent` command on the cluster. Raises InputError on an unknown one."""
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
def working_directory(checkout: Path = CHECKOUT, max_bytes: int = MAX_UPLOAD_BYTES) -> Iterator[Path]:
    """A temporary copy of the files to upload. Raises InputError when it is larger than `max_bytes`."""
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
        if sum(sizes.values()) > max_bytes:
            largest = ", ".join(
                f"{name} ({sizes[name] / 1e6:,.0f} MB)"
                for name in sorted(sizes, key=lambda n: sizes[n], reverse=True)[:3]
            )
            raise InputError(
                f"{checkout} would upload {sum(sizes.values()) / 1e6:,.0f} MB, expected at most "
                f"{max_bytes / 1e6:,.0f}: {largest}. Move data and models out of {', '.join(PARTS[:3])}."
            )
        yield copy


def connect_to(address: str | None) -> Any:
    """A `JobSubmissionClient`. Raises ClusterError when no cluster responds there, or it rejects the token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)  # we print our own messages
    if address is not None:
        # Ray's client prefers this variable to its own argument; here the option takes precedence.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        return JobSubmissionClient()
    except AuthenticationError as err:
        raise ClusterError(
            f"the cluster at {where} asks for its token ({_reason(err)}). Put that token into ~/.ray/auth_token "
            "or RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token."
        ) from err
    # Ray exits when it finds no cluster.
    except (ConnectionError, RuntimeError, ValueError, OSError, SystemExit) as err:
        raise ClusterError(
            f"no Ray cluster responds at {where} ({_reason(err)}). Give the head's dashboard as --address or in "
            "RAY_API_SERVER_ADDRESS, e.g. http://127.0.0.1:8265 with the tunnel of `ray dashboard cluster.yaml`."
        ) from err


def _reason(err: BaseException) -> str:
    """The first sentence of one of Ray's long error messages."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].split(". ")[0].rstrip(".")


async def follow(client: Any, job: str, out: Any = None) -> None:
    """Stream the job's log to `out` (stdout) until the job has ended.

    Raises ClusterError when the cluster does not respond for RECONNECT_S.
    """
    out = out or sys.stdout
    shown = 0
    heard = time.monotonic()
    while True:
        skip = shown  # a new connection restarts at the log's first line
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
            # Ray's HTTP client raises various errors when a proxy or the head goes away.
            if time.monotonic() - heard > RECONNECT_S:
                raise ClusterError(
                    f"lost the connection to the cluster ({err}); the job may still be running. When the cluster is "
                    f"back: latent submit --follow {job}"
                ) from err
        await asyncio.sleep(1)


def stop(client: Any, job: str) -> int:
    """Stop a job, wait until it has ended, and return its exit code. Raises ClusterError when it does not end."""
    echo(f"submit: stopping {job}; finished work is kept")
    client.stop_job(job)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{job} has not ended {STOP_TIMEOUT_S} s after it was stopped; see the dashboard"
            )
        time.sleep(0.2)
    code = exit_code(client, job)
    if code == STOPPED:
        echo("submit: stopped; run the same command to resume")
    return code


def exit_code(client: Any, job: str) -> int:
    """Exit code of an ended job: its own, STOPPED if it was stopped, 1 if it never started."""
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
    """Follow a job to its end and return its exit code. Ctrl-C and SIGTERM stop the job first."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells start background jobs with SIGINT ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        return stop(client, job)
    return exit_code(client, job)


def submit(client: Any, command: list[str], driver_cpus: float = 0) -> str:
    """Upload the code and start the job; returns its id."""
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
            help="The head's dashboard (http://host:8265); default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS."
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and return.")] = False,
    driver_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs of the job's driver; above 0 it runs on a worker node.")
    ] = 0,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Follow a submitted job.")] = None,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Stop a submitted job.")] = None,
) -> None:
    """Run a `latent` command on a Ray cluster, stream its log and return its exit code."""
    if sum([bool(command), follow is not None, cancel is not None]) != 1:
        raise InputError("expected a command to submit, --follow ID or --cancel ID")
    if command:
        entrypoint(command)  # an unknown command fails before connecting
    client = connect_to(address)
    with known_job(follow or cancel):
        if cancel is not None:
            if client.get_job_status(cancel).is_terminal():
                raise InputError(
                    f"{cancel} has already ended ({client.get_job_status(cancel).value.lower()})"
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
    """Raise an InputError in place of Ray's error for an unknown id."""
    try:
        yield
    except RuntimeError as err:
        if "404" not in str(err) and "does not exist" not in str(err):
            raise
        raise InputError(
            f"the cluster has no job {job!r}; expected an id printed by `latent submit`"
        ) from err


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        run(main, pass_on=True)
