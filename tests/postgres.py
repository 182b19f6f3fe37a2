"""A real Postgres for tests: the wheel's, one for the whole run, and a store of its own for each test."""

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
        admin.execute("CREATE EXTENSION vector")
    yield url
    process = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))
    process.send_signal(
        signal.SIGQUIT
    )  # at once; an orderly stop writes a checkpoint of every database first
    process.wait(30)
    shutil.rmtree(folder)


@pytest.fixture
def database(server: str) -> str:
    """URL of an empty schema: a store of its own, made in milliseconds where a database takes a second."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    return f"{server}&options=-csearch_path%3D{name}%2Cpublic"


@pytest.fixture
def plain(server: str) -> str:
    """URL of an empty database whose user may not enable pgvector."""
    name = f"plain_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS modest")
        admin.execute("CREATE ROLE modest LOGIN")
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("GRANT CREATE ON SCHEMA public TO modest")
    return url.replace("postgres:@", "modest:@")
