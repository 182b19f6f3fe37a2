"""A service whose run lies on S3: fetched by checksum when it starts, and a newer model taken up without a restart."""

import os
import signal
from pathlib import Path

import pytest

from lvm.errors import InputError
from lvm.predict.record import set_alias
from lvm.storage import RemotePath, files_below, upload, upload_folder
from serve.settings import ServeArgs, models_of, require_run
from tests.integration.serving import add_model, make_run, running
from tests.integration.test_serve_faults import wait_for

pytestmark = pytest.mark.slow


def put_run(run: Path, target: RemotePath) -> None:
    for part in ("vectors", "index", "models"):
        upload_folder(run / part, target / part, last="manifest.json")


def test_a_run_on_s3_is_served_and_a_new_model_is_taken_up(
    tmp_path: Path, bucket: RemotePath, own_cache: Path
) -> None:
    run = make_run(tmp_path / "run", num_articles=8, models=("lstm",))
    put_run(run, bucket / "runs/wiki")
    with running(None, "--run", str(bucket / "runs/wiki"), "--model", "lstm") as service:

        def fetched() -> set[Path]:
            return {f for f in own_cache.rglob("*") if f.suffix in (".faiss", ".npy")}

        first = fetched()
        assert {f.suffix for f in first} == {".faiss", ".npy"}
        assert len(list((own_cache / "locks").iterdir())) == 1
        found = service.post("/v1/search", {"query": "Steam engines.", "k": 3})
        assert found.status == 200, found.body

        def folder() -> str:
            reply = service.post("/v1/generate", {"text": "Steam.", "cache": False})
            assert reply.status == 200, reply.body
            return str(reply.json["model"]["folder"])

        before = folder()
        record = add_model(run, "lstm")
        for file in files_below(record):
            assert isinstance(file, Path)
            with file.open("rb") as opened:
                upload(opened, bucket / "runs/wiki/models" / record.name / file.name)
        set_alias(bucket / "runs/wiki/models", "lstm", bucket / "runs/wiki/models" / record.name)
        assert folder() == before
        os.kill(service.launcher, signal.SIGUSR1)
        wait_for("the new model answers", lambda: folder() == record.name, 300)
        # Vectors and index are those of before, none fetched a second time; texts come when they are read.
        assert fetched() == first


def test_a_damaged_index_on_s3_is_refused_and_named(tmp_path: Path, bucket: RemotePath) -> None:
    from lvm.vectors.index import load_index

    run = make_run(tmp_path / "run", num_articles=4, models=("lstm",))
    put_run(run, bucket / "run")
    (file,) = [f for f in files_below(bucket / "run/index") if str(f).endswith(".faiss")]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match="it changed or is damaged"):
        load_index(bucket / "run/index")


def test_what_is_no_run_on_s3_is_refused_with_its_url(bucket: RemotePath) -> None:
    args = ServeArgs(run=str(bucket / "nothing"))
    with pytest.raises(InputError, match=f"{bucket}/nothing has no vectors/"):
        require_run(args.run)
    assert models_of(args.run) == bucket / "nothing/models"
