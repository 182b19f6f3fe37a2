"""Serve a run's models over HTTP, on this machine or on a cluster, until Ctrl-C.

    python -m serve.launch --run out/demo --port 8000
    LATENT_API_KEYS=... python -m serve.launch --run out/demo --host 0.0.0.0

The same application as `serve deploy serve/config.yaml`. Prints the address to stdout once the service responds.
SIGUSR1 rolls out the models that the run's aliases point to now, without downtime.
"""

import json
import logging
import os
import queue
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from lvm.codec.identity import require_same_codec
from lvm.errors import InputError, LvmError
from lvm.storage import location
from serve.front import FrontArgs, environment
from serve.guard import LOOPBACK, check_keys, read_keys
from serve.settings import ServeArgs, SmoothingArgs, require_run

CHECKOUT = Path(__file__).resolve().parent.parent
LOGS: dict[str, Any] = {"encoding": "JSON", "log_level": "INFO", "enable_access_log": False}


def main(
    run: Annotated[
        Any,
        typer.Option(
            parser=location,
            metavar="PATH",
            help="Folder of `latent run` or `latent demo`, also s3:// or gs://; default: the bundled predictors, "
            "without a corpus.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any address other than loopback requires an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    model: Annotated[str | None, typer.Option(help="Default model.")] = None,
    codec: Annotated[str | None, typer.Option(help="Codec name; default: the run's codec.")] = None,
    codec_path: Annotated[Path | None, typer.Option(help="Folder of your own codec.")] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key per line, in addition to LATENT_API_KEYS (comma-separated)."
        ),
    ] = None,
    inbox: Annotated[
        Path | None,
        typer.Option(help="Folder that /v1/ingest writes articles to; default: articles are refused."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Dataset of the concept store, for /v1/ingest and /v1/search."),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="LATENT_DATABASE_URL",
            show_envvar=True,
            metavar="URL",
            help="Server of the dataset, postgresql://USER@HOST:PORT/DATABASE; default: a local Postgres.",
        ),
    ] = None,
    smoothing_url: Annotated[
        str, typer.Option(help="OpenAI-compatible chat endpoint that rewords answers.")
    ] = "",
    smoothing_model: Annotated[str, typer.Option(help="Model name at that endpoint.")] = "",
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may call the service, such as https://app.example.org; repeatable."
        ),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="Any other setting: --set limits.max_texts=8 --set decoder.max_replicas=2."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join (host:port or auto); default: start a local one.")
    ] = None,
) -> None:
    """Start the service, and run until a signal arrives."""
    if run is None:
        say("serving the bundled predictors, without a corpus; --run DIR serves your own run")
    elif not run.is_dir():
        raise InputError(
            f"no folder {run}; expected the output of `latent run`, or no --run for the bundled predictors"
        )
    hashes = [] if api_keys_file is None else read_keys(api_keys_file)
    from_environment = [k.strip() for k in os.environ.get("LATENT_API_KEYS", "").split(",") if k.strip()]
    hashes += check_keys(from_environment, "LATENT_API_KEYS")
    if host not in LOOPBACK and not hashes:
        raise InputError(
            f"--host {host} opens the service to a network without an API key; set LATENT_API_KEYS or --api-keys-file, "
            "or keep the default host 127.0.0.1"
        )
    record: dict[str, Any] = {
        "run": "" if run is None else str(run.absolute()),
        "codec": codec,
        "codec_path": None if codec_path is None else str(codec_path.absolute()),
        "default_model": model,
        "api_keys_sha256": hashes,
        "inbox": "" if inbox is None else str(inbox.absolute()),
        "dataset": dataset or "",
        "cors_origins": cors_origin or [],
        "smoothing": SmoothingArgs(url=smoothing_url, model=smoothing_model).model_dump(),
    }
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:  # one machine
        record["inline"] = "encoder,predictor,retriever"
    else:
        record["database_url"] = database_url or ""
    for entry in set or []:
        put(record, entry)
    record["inline"] = [part for part in record.get("inline", "").split(",") if part]
    args = parse(record)
    if args.dataset:
        open_store(args, database_url, address)
    with claim(host, port) as held:
        port = held.getsockname()[1]
        start(args, host, port, address)
    wait_for_proxy(host, port)
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # after Ray installed its handlers
        signal.signal(number, lambda n, _: signals.put(n))
    shown = f"[{host}]" if ":" in host else host
    if sys.stdout.isatty():
        print(f"serving at http://{shown}:{port}; Ctrl-C stops it", flush=True)
    else:
        print(json.dumps({"url": f"http://{shown}:{port}", "pid": os.getpid()}), flush=True)
    while signals.get() == signal.SIGUSR1:
        try:
            deploy(args)
            say("rolled out")
        except (LvmError, RuntimeError) as err:  # the running version stays
            say(f"error: not rolled out: {err}")
    say("stopping: requests in flight have ten seconds to finish")
    shut_down()


def open_store(args: ServeArgs, url: str | None, address: str | None) -> None:
    """Wait until the concept store responds, and pass its address to the local gateways in the environment.

    Raises DatabaseError if the server accepts no connection, IdentityError if the dataset and the run have different
    codecs, InputError on a cluster without an address.
    """
    from lvm.vectors.concepts import ConceptStore
    from lvm.vectors.entries import require_name
    from lvm.vectors.postgres import embedded

    require_name(args.dataset)
    url = url or args.database_url
    if not url and address is not None:
        raise InputError("--dataset on a cluster needs --database-url, a server that every node can reach")
    url = url or embedded()
    with ConceptStore(url) as store:
        if store.missing:
            say(f"vectors are stored as real[] and searched by a scan: {store.missing}")
        found = store.find(args.dataset)
        if found is not None and args.run:
            vectors = require_run(args.run).identity
            require_same_codec(found.identity, vectors, f"dataset {args.dataset!r}", f"{args.run}/vectors")
    # Not an argument of the application, which Ray displays: it may contain a password.
    os.environ["LATENT_DATABASE_URL"] = url


def put(record: dict[str, Any], entry: str) -> None:
    """Apply an entry "a.b=value" to nested dictionaries. Raises InputError if it is malformed."""
    path, equals, value = entry.partition("=")
    if not equals or not all(path.split(".")):
        raise InputError(f"--set {entry!r}: expected NAME=VALUE, such as limits.max_texts=8")
    *folders, last = path.split(".")
    place = record
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {entry!r}: {folder} is not a group of settings")
    place[last] = value


def parse(record: dict[str, Any]) -> ServeArgs:
    """The validated settings. Raises InputError that names the first invalid one."""
    from pydantic import ValidationError

    try:
        return ServeArgs.model_validate(record)
    except ValidationError as err:
        first = err.errors()[0]
        name = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        if not name:  # of several settings together
            raise InputError(f"settings: {said}; serve/settings.py lists all") from err
        raise InputError(
            f"setting {name}: {said}, got {first['input']!r}; serve/settings.py lists all"
        ) from err


def claim(host: str, port: int) -> socket.socket:
    """A socket that reserves the port (0: any free one) until the proxy binds it, as Ray's own processes take free
    ports when they start. Raises InputError if another process listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            port = probe.getsockname()[1]
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # shared with the proxy, which listens
        held.bind((host, port))
    except OSError as err:
        raise InputError(
            f"cannot listen on {host}, port {port} ({err.strerror}); choose another --port"
        ) from err
    return held


def wait_for_proxy(host: str, port: int, seconds: float = 60) -> None:
    """Wait until the proxy routes requests to the application, a moment after the application runs."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://{shown}:{port}/-/routes", timeout=5) as reply:
                if "/" in json.load(reply):
                    return
        except (OSError, ValueError):
            pass
        if time.monotonic() > until:
            raise RuntimeError(f"the proxy on port {port} does not respond; its log is in Ray's log folder")
        time.sleep(0.1)


def start(args: ServeArgs, host: str, port: int, address: str | None) -> None:
    """Join or start Ray, start Serve and run the application; returns when it responds."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default niceness of 15 suits batch jobs; replicas serve waiting users.
    os.environ.setdefault("RAY_worker_niceness", "0")
    python_path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if p)
    if address is None:
        # For the proxies, which ignore runtime environments. On a cluster the nodes' environments have these.
        front = FrontArgs(
            api_keys_sha256=tuple(args.api_keys_sha256),
            api_keys_file=args.api_keys_file,
            max_body_bytes=args.limits.max_body_bytes,
        )
        os.environ.update(environment(front), PYTHONPATH=python_path)
    if not shows_ray_logs():
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(
            lambda record: "authentication is enabled" not in record.getMessage()
        )
    ray.init(
        address=address or "local",  # with None Ray would join the last cluster started here, even a dead one
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},
        logging_level=logging.WARNING,
        log_to_driver=shows_ray_logs(),
        include_dashboard=False if address is None else None,
    )
    options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=75)
    serve.start(
        proxy_location=ProxyLocation.EveryNode, http_options=options, logging_config=LoggingConfig(**LOGS)
    )
    deploy(args)


def deploy(args: ServeArgs) -> None:
    """Run the application, or replace the running one; returns when it responds."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from serve.app import build

    serve.run(build(args), name="latent", logging_config=LoggingConfig(**LOGS))


def shut_down() -> None:
    """End the application, and Ray if this process started it."""
    import ray
    from ray import serve

    if not shows_ray_logs():  # they call the controller's orderly end a lost task
        logging.getLogger("ray").setLevel(logging.CRITICAL)
    serve.shutdown()
    ray.shutdown()


def shows_ray_logs() -> bool:
    """Whether the user asked for all that Ray logs."""
    return os.environ.get("LATENT_RAY_LOGS") == "1"


def say(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app(prog_name=os.environ.get("LATENT_COMMAND"))
    except LvmError as error:
        if os.environ.get("LATENT_TRACEBACK") == "1":
            raise
        say(f"error: {error}")
        sys.exit(1)
