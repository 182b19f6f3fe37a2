"""A real Postgres for tests: the wheel's, one for the whole run, and a database of its own for each test."""

import itertools
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import sql

from lvm.vectors.postgres import embedded

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """URL of a server; it stops with this process. Not under pytest's own folder: as root the wheel opens all above."""
    folder = Path(tempfile.mkdtemp(prefix="latent-postgres-"))
    url = embedded(folder / "data")
    with psycopg.connect(
        url, autocommit=True
    ) as admin:  # nothing here outlives the run, so no disk is waited for
        admin.execute("ALTER SYSTEM SET fsync = off")
        admin.execute("SELECT pg_reload_conf()")
    yield url
    process = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))
    process.send_signal(
        signal.SIGQUIT
    )  # at once; an orderly stop writes a checkpoint of every database first
    process.wait(30)
    shutil.rmtree(folder)


@pytest.fixture
def database(server: str) -> str:
    """URL of an empty database."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.replace("/postgres?", f"/{name}?")
