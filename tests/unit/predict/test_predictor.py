"""Predictors by name and folder, as functions over arrays; the Generator without a corpus, in batches."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm import Codec, Generator, InputError, Prediction, TrainedPredictor, load_codec, load_predictor
from lvm.errors import IdentityError
from lvm.models import TOYS, build
from lvm.predict import generate, predictor
from lvm.predict.predictor import SHIPPED
from lvm.predict.record import read_aliases, save_record, set_alias
from tests.doubles import FakeCodec

SMALL = FakeCodec(dim=48)
TEXT = (
    "The steam engine was first used to pump water out of mines. James Watt added a separate condenser in 1765. "
    "His engines needed a quarter of the coal. Within thirty years there were five hundred of them in England."
)
OTHER = "Bread is made of flour and water."


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained toy GRU of 48-d vectors and contexts of three."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    network = build("gru", {**asdict(TOYS["gru"]), "dim": 48}).eval()
    record = save_record(folder, "gru", network, SMALL.identity, {"windows": {"context": 3}}, {}, {})
    set_alias(folder, "gru", record)
    return folder


# ---- load_predictor


def test_what_ships_loads_by_name_and_a_record_by_alias_folder_and_path(models: Path) -> None:
    assert load_predictor().name == load_predictor("gru").name == read_aliases(SHIPPED)["gru"]
    assert load_predictor("amn").name == read_aliases(SHIPPED)["amn"]
    (record,) = models.glob("gru-*")
    ways = [("gru", models), (record.name, str(models)), (record, None), (str(models / "gru"), None)]
    for name, folder in ways:
        found = load_predictor(name, folder)
        assert (found.name, found.context) == (record.name, 3)
    assert load_predictor("passthrough").name == "passthrough"


def test_a_folder_of_that_name_does_not_take_the_place_of_what_ships(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = models.glob("gru-*")
    shutil.copytree(record, tmp_path / "gru")
    monkeypatch.chdir(tmp_path)
    assert load_predictor("gru").name == read_aliases(SHIPPED)["gru"]
    assert load_predictor("./gru").context == load_predictor(tmp_path / "gru").context == 3


def test_a_predictor_there_is_not_is_refused_with_those_there_are(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model 'lstm'; expected a bundled one \(.*gru.*\), passthrough"):
        load_predictor("lstm")
    with pytest.raises(InputError, match=r"no model .*nowhere"):
        load_predictor(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no model 'lstm' in .*; there are: gru"):
        load_predictor("lstm", models)


def test_a_record_whose_context_was_edited_is_refused(models: Path, tmp_path: Path) -> None:
    (record,) = models.glob("gru-*")
    shutil.copytree(record, tmp_path / "gru-1-2")
    config = tmp_path / "gru-1-2" / "config.json"
    config.write_text(config.read_text().replace('"context": 3', '"context": "3"'))
    with pytest.raises(InputError, match="says context '3', expected a whole number of 1 or more"):
        _ = load_predictor(tmp_path / "gru-1-2").context


# ---- calling one


def test_a_batch_equals_its_singles_whatever_the_batches(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = load_predictor("gru", models)
    contexts = unit(7, 3, 48)
    whole = predict(contexts)
    assert (whole.shape, whole.dtype) == ((7, 48), np.float32)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    monkeypatch.setattr(predictor, "BATCH_CONTEXTS", 3)
    np.testing.assert_allclose(predict(contexts), whole, atol=1e-6)
    singles = np.concatenate([predict(c[None].astype(np.float64)) for c in contexts])
    np.testing.assert_allclose(singles, whole, atol=1e-6)
    assert predict(unit(2, 9, 48)).shape == (2, 48)
    assert predict(np.empty((0, 3, 48), np.float32)).shape == (0, 48)


@pytest.mark.parametrize("shape", [(3, 48), (2, 3, 768), (2, 0, 48), (48,)])
def test_contexts_of_another_shape_are_refused(models: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=re.escape(f"contexts have shape {shape}, expected (B, T, 48)")):
        load_predictor("gru", models)(np.zeros(shape, np.float32))


def test_passthrough_is_the_last_vector_of_any_length() -> None:
    contexts = unit(2, 4, 12)
    assert np.array_equal(load_predictor("passthrough")(contexts), contexts[:, -1])


# ---- Generator


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("mini", device="cpu")


@pytest.fixture(scope="module")
def generator(codec: Codec) -> Generator:
    return Generator(codec, load_predictor("amn"))


def texts_of(predictions: list[list[Prediction]]) -> list[list[str]]:
    return [[p.text for p in own] for own in predictions]


def test_it_continues_texts_without_a_corpus(generator: Generator, codec: Codec) -> None:
    made = generator.generate([TEXT, OTHER], length=3)
    assert [len(own) for own in made] == [3, 3]
    for own, mode in zip(made, ("repeat_pad", "repeat_pad"), strict=True):
        for p in own:
            assert p.text
            assert p.source in ("writer", "exact")
            if p.source == "writer":
                ours = codec.encode_chunks([p.text]).vectors[0]
                assert p.cosine == pytest.approx(float(ours @ p.vector), abs=2e-2)
            assert p.extract is None
        assert own[0].context.mode == mode
        assert own[1].context.texts[-1] == own[0].text
        assert own[2].context.texts[-2:] == (own[0].text, own[1].text)


def test_batches_hold_so_many_texts_and_keep_their_order(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "BATCH_TEXTS", 2)
    sizes: list[int] = []
    step = generator.next_chunks

    def counted(contexts: Any, fill: Any) -> list[Prediction]:
        sizes.append(len(contexts))
        return step(contexts, fill)

    monkeypatch.setattr(generator, "next_chunks", counted)
    made = generator.generate([TEXT, OTHER, TEXT])
    assert sizes == [2, 1]
    last = [own[0].context.texts[-1] for own in made]
    assert last[0] == last[2] == TEXT.partition("1765. ")[2]
    assert last[1] == OTHER
    np.testing.assert_allclose(made[0][0].vector, made[2][0].vector, atol=1e-5)
    assert generator.generate([]) == []


def test_context_and_dimension_come_from_the_record(models: Path) -> None:
    small = Generator(SMALL, load_predictor("gru", models))  # type: ignore[arg-type]
    words = " ".join(f"word{i}" for i in range(31 * 6))  # six chunks of 31 words
    with pytest.warns(UserWarning, match="are not fluent: the fake codec has no writer"):
        ((prediction,),) = small.generate([words])
    assert prediction.vector.shape == (48,)
    assert prediction.context.vectors.shape == (3, 48)
    assert prediction.context.mode == "seq"
    assert prediction.context.texts[-1].split()[-1] == "word185"
    assert prediction.text.startswith("text of ")


def test_what_does_not_belong_together_is_refused(codec: Codec, models: Path) -> None:
    with pytest.raises(IdentityError, match=r"model gru-.*the loaded codec"):
        Generator(codec, load_predictor("gru", models))
    with pytest.raises(InputError, match=r"the predictor is str; expected what lvm\.load_predictor"):
        Generator(codec, "gru")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a snap needs a corpus"):
        Generator(codec, TrainedPredictor(None), snapped=True)
    with pytest.raises(InputError, match="pass both or neither"):
        Generator(codec, TrainedPredictor(None), index=object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        ("one text", 1, "expected a list of texts, got one str; write generate([text])"),
        (["a", 3], 1, "text 1 of 2 is int, expected str"),
        (["a", " \n"], 1, "text 1 of 2 has no words; leave it out"),
        (["a"], 0, "length is 0; expected an integer of 1 or more"),
        (["a"], 1.5, "length is 1.5; expected an integer"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    generator: Generator, texts: Any, length: Any, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        generator.generate(texts, length)
