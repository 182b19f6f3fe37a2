"""What is wrong with an argument of the public functions is an InputError with what was expected, not a traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lvm
from lvm.arguments import floats, whole
from lvm.devices import usable_device
from lvm.errors import InputError
from lvm.predict.record import load_record, read_aliases, set_alias
from lvm.predict.steer import FILLS
from lvm.storage import location
from tests.doubles import fake_articles, write_vectors


@pytest.fixture(scope="module")
def codec() -> Any:
    return lvm.load_codec("mini")


@pytest.fixture(scope="module")
def gru() -> Any:
    return lvm.load_predictor("gru")


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("arguments") / "vectors"
    write_vectors(folder, fake_articles(12))
    return lvm.open_vectors(folder)


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2)])
def test_integers_of_numpy_are_integers(value: Any) -> None:
    found = whole("k", value)
    assert (found, type(found)) == (2, int)


@pytest.mark.parametrize("value", [True, 1.5, "2", None, 0, float("nan"), np.array([1, 2])])
def test_what_is_no_integer_in_range_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^k is .*; expected an integer of 1 to 9"):
        whole("k", value, 1, 9)


@pytest.mark.parametrize(
    "value",
    ["01", [[1.0], [1.0, 2.0]], (n for n in (1.0,)), None, {"a": 1}, torch.ones(2, requires_grad=True)],
)
def test_what_are_no_numbers_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^got \w+ as vectors .*expected numbers"):
        floats("vectors", value, "numbers (B, D)")


WRONG: dict[str, Callable[[Any, Any, Any], Any]] = {
    "half a character": lambda c, p, a: lvm.chunk("a\ud800b", c),
    "no codec": lambda c, p, a: lvm.chunk("x", None),  # type: ignore[arg-type]
    "steps: float": lambda c, p, a: c.decode(c.encode("a"), steps=1.5),
    "steps: None": lambda c, p, a: c.decode(c.encode("a"), steps=[None]),
    "steps: many": lambda c, p, a: c.decode(c.encode("a"), steps=6),
    "target": lambda c, p, a: c.decode(c.encode("a"), target_cosine=float("nan")),
    "starts: str": lambda c, p, a: c.decode(c.encode(["a", "b"]), starts="ab"),
    "starts: int": lambda c, p, a: c.decode(c.encode(["a", "b"]), starts=["a", 3]),
    "contexts: str": lambda c, p, a: p("a"),
    "contexts: ragged": lambda c, p, a: p([[[1.0]], [[1.0], [2.0]]]),
    "contexts: NaN": lambda c, p, a: p(np.full((1, 5, 768), np.nan, np.float32)),
    "contexts: huge": lambda c, p, a: p(np.full((1, 5, 768), 1e30, np.float32)),
    "fill": lambda c, p, a: lvm.Generator(c, p).generate(["A text."], fill="x"),  # type: ignore[arg-type]
    "chunks: str": lambda c, p, a: lvm.Generator(c, p).next_chunks("abc"),
    "context: text": lambda c, p, a: lvm.WindowSettings(context="5"),  # type: ignore[arg-type]
    "context: endless": lambda c, p, a: lvm.make_windows(a, lvm.WindowSettings(context=10**9)),
    "windows of a path": lambda c, p, a: lvm.make_windows("vectors"),  # type: ignore[arg-type]
    "settings: int": lambda c, p, a: lvm.make_windows(a, 5),  # type: ignore[arg-type]
    "seed: float": lambda c, p, a: lvm.make_windows(a).split(1.5),  # type: ignore[arg-type]
    "seed: long": lambda c, p, a: lvm.make_windows(a).split(10**23),
    "batch of -1": lambda c, p, a: list(lvm.make_windows(a).batches(-1)),
    "last: float": lambda c, p, a: lvm.make_windows(a).last(1.5),  # type: ignore[arg-type]
    "path: empty": lambda c, p, a: lvm.open_vectors(""),
    "path: None": lambda c, p, a: lvm.load_index(None),  # type: ignore[arg-type]
    "path: zero byte": lambda c, p, a: lvm.load_index("a\0b"),
    "path: endless": lambda c, p, a: lvm.load_predictor("gru", "x" * 5000),
    "device: unknown": lambda c, p, a: lvm.load_codec("mini", device="cuda:99"),
    "device: meta": lambda c, p, a: lvm.load_predictor("gru", device="meta"),
    "shares": lambda c, p, a: lvm.load_index("x", shares=0),
    "share": lambda c, p, a: lvm.load_index("x", share=1),
    "version": lambda c, p, a: lvm.load_index("x", version="../y"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str, codec: Any, gru: Any, array: Any) -> None:
    with pytest.raises(InputError) as caught:
        WRONG[name](codec, gru, array)
    assert "\n" not in str(caught.value)


def test_large_vectors_are_scaled_and_not_called_infinite(codec: Any) -> None:
    vector = codec.encode("A short text.")
    assert codec.decode(vector * 1e30).texts == codec.decode(vector).texts


def test_every_fill_is_known(codec: Any, gru: Any) -> None:
    for fill in FILLS:
        assert len(lvm.Generator(codec, gru).generate(["The river is long."], fill=fill)) == 1


def test_no_windows_are_a_subset_too(array: Any) -> None:
    assert len(lvm.make_windows(array).subset([])) == 0


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="torch cannot use device 'cuda' here"):
        usable_device("cuda")


@pytest.mark.parametrize("alias", ["", " ", "a/b", "a\\b", "a\nb", ".hidden", "x" * 300, "passthrough"])
def test_aliases_are_plain_names(tmp_path: Path, alias: str) -> None:
    with pytest.raises(InputError, match=r"plain name|already"):
        set_alias(tmp_path, alias, tmp_path / "gru-1")


def test_an_alias_does_not_hide_a_record(tmp_path: Path) -> None:
    for name in ("gru-1", "amn-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(InputError, match="amn-1 is the name of a record already"):
        set_alias(tmp_path, "amn-1", tmp_path / "gru-1")
    assert read_aliases(tmp_path) == {}


@pytest.mark.parametrize(
    "config", ['{"codec": null}', '{"codec": {}}', '{"rank": "x"}', '{"model": ["amn"]}']
)
def test_an_edited_record_is_refused(tmp_path: Path, config: str) -> None:
    import json
    import shutil

    from lvm.predict.predictor import SHIPPED

    source = next(SHIPPED.glob("amn-*"))
    shutil.copytree(source, tmp_path / "models" / source.name)
    path = tmp_path / "models" / source.name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **json.loads(config)}))
    with pytest.raises(InputError):
        load_record(location(tmp_path / "models"), source.name)
