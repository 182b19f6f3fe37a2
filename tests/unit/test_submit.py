"""What `latent submit` sends, and how it reads a log; the cluster itself is in tests/integration."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.submit import PARTS, ClusterError, entrypoint, exit_code, follow, working_directory
from lvm.cli import CODEC_JOBS, CONCEPT_COMMANDS, JOBS
from lvm.codec.zoo import FILES
from lvm.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [*JOBS, *(f"codec {name}" for name in CODEC_JOBS), *(f"concepts {name}" for name in CONCEPT_COMMANDS)],
)
def test_every_command_of_latent_that_is_a_job_can_be_submitted(command: str) -> None:
    line = entrypoint([*command.split(), "--output", "a b"])
    assert line.startswith("python -m jobs.")
    assert line.endswith("--output 'a b'")
    module = line.split()[2].removeprefix("jobs.")
    assert (CHECKOUT / "jobs" / f"{module}.py").is_file()


def test_what_is_no_job_is_refused_with_the_list() -> None:
    for command in (["serve"], ["submit", "encode"], ["codec", "train"], ["rm", "-rf"]):
        with pytest.raises(InputError, match="expected one of demo, run, chunk, encode"):
            entrypoint(command)


def test_code_and_shipped_weights_travel_and_nothing_else() -> None:
    with working_directory() as folder:
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert {"jobs/encode.py", "lvm/cli.py", "serve/app.py", "pyproject.toml"} <= files
        assert {f"lvm/codec/weights/mini/{name}" for name in FILES} <= files
        assert not [
            f for f in files if "__pycache__" in f or f.split("/")[0] in ("tests", "out", ".git", ".venv")
        ]
        assert {f.split("/")[0] for f in files} == {p.split("/")[0] for p in PARTS}
    assert not folder.exists()


def test_a_checkout_with_data_in_its_code_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "corpus.parquet").write_bytes(b"0" * 5000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vectors").write_bytes(b"0" * 50_000)  # beside the code: does not travel
    with working_directory(tmp_path, max_bytes=5000):
        pass
    with (
        pytest.raises(InputError, match=r"jobs/corpus\.parquet"),
        working_directory(tmp_path, max_bytes=4999),
    ):
        pass


class FlakyClient:
    """A log of three pieces whose connection breaks once after the second, as a restarted proxy does."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        yield "one\ntw"
        yield "o\n"
        if self.connections == 1:
            raise RuntimeError("closed unexpectedly")
        yield "three\n"

    def get_job_status(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(is_terminal=lambda: True)


def test_a_broken_connection_repeats_and_loses_no_line() -> None:
    client, out = FlakyClient(), io.StringIO()
    asyncio.run(follow(client, "job", out))
    assert client.connections == 2
    assert out.getvalue() == "one\ntwo\nthree\n"


def test_a_silent_cluster_is_given_up_with_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FlakyClient):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            raise OSError("refused")
            yield ""

    monkeypatch.setattr("jobs.submit.RECONNECT_S", 0)
    with pytest.raises(ClusterError, match="latent submit --follow job-7"):
        asyncio.run(follow(Silent(), "job-7", io.StringIO()))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_the_jobs(status: str, code: int | None, expected: int) -> None:
    info = SimpleNamespace(status=status, driver_exit_code=code, message="why")
    assert exit_code(SimpleNamespace(get_job_info=lambda job: info), "job") == expected


def test_a_job_that_cannot_join_a_cluster_says_how_to_reach_it() -> None:
    from jobs._ray import connect

    with pytest.raises(
        InputError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:9 .*latent submit --address"
    ):
        connect("127.0.0.1:9")
