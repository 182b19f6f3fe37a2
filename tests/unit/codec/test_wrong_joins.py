"""Whatever two artefacts of different codecs meet, the refusal names both codecs and both artefacts.

Refusals that need Ray or HTTP are in tests/integration (encode, train, evaluate, serving); GTR's two contracts in
test_gtr.py.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from lvm.codec.identity import CodecIdentity
from lvm.errors import IdentityError
from lvm.models import TOYS, build
from lvm.predict.generate import Generator
from lvm.predict.predictor import load_predictor
from lvm.predict.record import save_record, set_alias
from lvm.vectors.array import open_vectors
from lvm.vectors.index import build_index, load_index
from lvm.vectors.npz import export_npz, import_npz
from lvm.vectors.sequences import make_windows
from lvm.vectors.shards import read_table, with_footer, write_table
from tests.doubles import FakeCodec, fake_articles, write_vectors

OURS, THEIRS = FakeCodec(), FakeCodec("other words")


def make_run(run: Path, codec: FakeCodec) -> Path:
    """Vectors, index, an untrained toy model and an NPZ file, all of one codec."""
    write_vectors(run / "vectors", fake_articles(16), codec)
    array = open_vectors(run / "vectors")
    build_index(array, run / "index")
    export_npz(make_windows(array), run / "sequences.npz")
    model = build("lstm", asdict(TOYS["lstm"]))
    set_alias(run / "models", "lstm", save_record(run / "models", "lstm", model, codec.identity, {}, {}, {}))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "ours", OURS), make_run(folder / "theirs", THEIRS)


def shards_in_one_folder(ours: Path, theirs: Path) -> None:
    mixed = ours.parent / "mixed"
    write_vectors(mixed, fake_articles(16), OURS)
    path = mixed / "part-00001.parquet"
    write_table(path, with_footer(read_table(path), {"codec": THEIRS.identity.to_dict()}))
    shutil.rmtree(mixed / "_array")  # made before they were mixed
    open_vectors(mixed)


def vectors_and_index(ours: Path, theirs: Path) -> None:
    load_index(theirs / "index").require_array(open_vectors(ours / "vectors"))


def vectors_and_codec(ours: Path, theirs: Path) -> None:
    open_vectors(ours / "vectors").require_codec(THEIRS.identity, "the loaded codec")


def model_and_codec(ours: Path, theirs: Path) -> None:
    Generator(OURS, load_predictor("lstm", theirs / "models"))  # type: ignore[arg-type]


def a_run_and_the_codec_it_is_used_with(ours: Path, theirs: Path) -> None:
    Generator.load(ours, "passthrough", THEIRS)  # type: ignore[arg-type]


def a_run_with_the_index_of_another(ours: Path, theirs: Path) -> None:
    index, vectors = load_index(theirs / "index"), open_vectors(ours / "vectors")
    Generator(OURS, load_predictor("lstm", ours / "models"), index, vectors)  # type: ignore[arg-type]


def npz_and_codec(ours: Path, theirs: Path) -> None:
    import_npz(theirs / "sequences.npz", OURS.identity)


JOINS: dict[Callable[[Path, Path], None], tuple[str, str]] = {
    shards_in_one_folder: ("manifest of", "part-00001.parquet"),
    vectors_and_index: ("index ", "vectors"),
    vectors_and_codec: ("vectors", "the loaded codec"),
    model_and_codec: ("model lstm-", "the loaded codec"),
    a_run_and_the_codec_it_is_used_with: ("vectors", "the loaded codec"),
    a_run_with_the_index_of_another: ("index ", "vectors"),
    npz_and_codec: ("the codec asked for", "sequences.npz"),
}


@pytest.mark.parametrize("join", JOINS, ids=lambda join: join.__name__)
def test_the_wrong_join_is_refused_with_both_names(
    join: Callable[[Path, Path], None], runs: tuple[Path, Path]
) -> None:
    with pytest.raises(IdentityError) as caught:
        join(*runs)
    message = str(caught.value)
    for named in (str(OURS.identity), str(THEIRS.identity), *JOINS[join]):
        assert named in message
    assert "differ in encoder_sha256" in message
    assert message.endswith("Encode both with one codec.")


def test_the_right_joins_are_none(runs: tuple[Path, Path]) -> None:
    for run, codec in zip(runs, (OURS, THEIRS), strict=True):
        assert Generator.load(run, "lstm", codec).predictor.name.startswith("lstm-")  # type: ignore[arg-type]
        assert len(import_npz(run / "sequences.npz", codec.identity)["all"].contexts) == 16 * 7


def test_an_identity_is_stored_with_every_artefact(runs: tuple[Path, Path]) -> None:
    ours = runs[0]
    manifest = json.loads((ours / "vectors" / "manifest.json").read_text())
    (record,) = (ours / "models").glob("lstm-*/config.json")
    for stored in (manifest["codec"], json.loads(record.read_text())["codec"]):
        assert CodecIdentity.from_dict(stored) == OURS.identity
    assert load_index(ours / "index").identity == OURS.identity
