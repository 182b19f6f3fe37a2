"""`lvm.fit`: vectors of any length and any context to a record with the best weights, and no training twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm import InputError, OutputError, WindowSettings, fit, load_predictor, make_windows, open_vectors
from lvm.codec.zoo import load_codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.corpus.tmd import Prototypes, coder_name
from lvm.errors import IdentityError
from lvm.models import ORIGINAL
from lvm.predict import training
from lvm.predict.ensemble import make_ensemble
from lvm.predict.predictor import SHIPPED
from lvm.predict.record import load_record, read_aliases
from lvm.predict.runs import bundled_start
from lvm.predict.training import FAST, evaluate
from lvm.vectors.array import VectorArray
from tests.doubles import FakeCodec, fake_articles, write_vectors

BRIEF = replace(FAST, epochs=4, batch_windows=64, patience=None, bfloat16=False)
THREE = WindowSettings(context=3)


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> VectorArray:
    """40 articles of 12 chunks in 96-d vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    write_vectors(folder, fake_articles(40), FakeCodec(dim=96))
    return open_vectors(folder)


@pytest.mark.parametrize("model", ORIGINAL)
def test_it_fits_vectors_of_any_length_and_contexts_of_any(
    model: str, array: VectorArray, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = []
    brief = replace(BRIEF, epochs=2)
    fitted = fit(array, tmp_path, model, brief, windows=THREE, device="cpu", log=rows.append)
    assert fitted.record is not None
    assert fitted.context == 3
    assert fitted.record.config["sizes"]["dim"] == 96
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    # The weights are those of the best epoch, not of the last.
    parts = make_windows(array, THREE).split(0)
    val = parts["val"]
    best = max(row["val_cosine"] for row in rows)
    assert evaluate(fitted.record.model, val.batches(64)).cosine == pytest.approx(best, abs=1e-5)
    assert fitted.record.metrics["val_cosine"] == best
    contexts, targets = val.batch(slice(None))
    assert (fitted(contexts) * targets).sum(1).mean() == pytest.approx(best, abs=1e-3)
    corpus_mean = parts["train"].batch(slice(None))[1].mean(0)
    assert best > (targets @ (corpus_mean / np.linalg.norm(corpus_mean))).mean() + 0.02
    assert read_aliases(tmp_path) == {model: fitted.name}
    assert load_predictor(tmp_path / model).name == fitted.name


def test_the_best_epochs_weights_are_kept_when_later_ones_are_worse(
    array: VectorArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rate that grows until it spoils what was learnt.
    monkeypatch.setattr(training, "learning_rate", lambda recipe, peak, done: 1e-3 if done < 0.5 else 3.0)
    fitted = fit(array, tmp_path, "lstm", replace(BRIEF, max_gradient_norm=None), device="cpu")
    assert fitted.record is not None
    curve = fitted.record.metrics["curve"]
    assert fitted.record.metrics["best_epoch"] < 4
    assert curve[-1]["val_cosine"] < fitted.record.metrics["val_cosine"] - 0.01
    val = make_windows(array).split(0)["val"]
    found = evaluate(fitted.record.model, val.batches(64)).cosine
    assert found == pytest.approx(fitted.record.metrics["val_cosine"], abs=1e-5)


def test_the_same_again_trains_nothing_and_another_seed_does(array: VectorArray, tmp_path: Path) -> None:
    once = replace(BRIEF, epochs=1)
    first = fit(array, str(tmp_path), "amn", once)
    rows: list[dict[str, Any]] = []
    assert fit(array, tmp_path, "amn", once, log=rows.append).name == first.name
    assert rows == []
    other = fit(array, tmp_path, "amn", once, seed=1)
    assert other.name != first.name
    assert read_aliases(tmp_path) == {"amn": other.name}
    # Asked for again, the first is what the alias means.
    assert fit(array, tmp_path, "amn", once).name == first.name == read_aliases(tmp_path)["amn"]


def test_a_model_that_reads_codes_is_a_record_like_any_other(array: VectorArray, tmp_path: Path) -> None:
    once = replace(BRIEF, epochs=1)
    prototypes = Prototypes.of(lambda texts: FakeCodec(dim=96).encode_chunks(texts).vectors)
    plain = fit(array, tmp_path, "gru", once, device="cpu")
    coded = fit(array, tmp_path, "gru", once, device="cpu", prototypes=prototypes)
    assert read_aliases(tmp_path) == {"gru": plain.name, "gru-tmd": coded.name}
    assert fit(array, tmp_path, "gru", once, prototypes=prototypes).name == coded.name
    assert coded.record is not None
    assert plain.record is not None
    assert coded.record.config["tmd"] == coder_name()
    assert coded.record.config["parameters"] == plain.record.config["parameters"] + 16 * 512
    assert coder_name() in (coded.record.folder / "MODEL_CARD.md").read_text()
    contexts, targets = make_windows(array).split(0)["val"].batch(slice(None))
    loaded = load_predictor(tmp_path / "gru-tmd")
    assert (loaded(contexts) * targets).sum(1).mean() == pytest.approx(
        coded.record.metrics["val_cosine"], abs=1e-3
    )
    assert np.array_equal(loaded.search(contexts), coded.search(contexts))
    folder, _ = make_ensemble(tmp_path, array, {"a": plain.name, "b": coded.name}, 2)
    both = load_record(tmp_path, folder.name).model
    chosen = sorted([plain, coded], key=lambda p: -p.record.metrics["val_cosine"])  # type: ignore[union-attr]
    summed = sum(
        w * p(contexts)
        for w, p in zip(both.weights.tolist(), chosen, strict=True)  # type: ignore[union-attr, operator]
    )
    predicted = both(torch.from_numpy(contexts)).detach().numpy()
    np.testing.assert_allclose(predicted, summed / np.linalg.norm(summed, axis=1)[:, None], atol=1e-5)


def test_a_seed_gives_the_same_weights_on_one_thread(array: VectorArray, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        once = replace(BRIEF, epochs=1)
        one, two = (fit(array, tmp_path / n, "gru", once, device="cpu") for n in ("one", "two"))
    finally:
        torch.set_num_threads(threads)
    contexts = make_windows(array).batch(slice(0, 5))[0]
    assert np.array_equal(one(contexts), two(contexts))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> VectorArray:
    """The bundled sample in vectors of the bundled codec."""
    folder, codec = tmp_path_factory.mktemp("sample"), load_codec("mini", device="cpu")
    chunker = Chunker(codec.tokenizer)
    chunks = [[c.text for c in article] for article in chunker.chunk(list(read_articles("sample")))]
    write_vectors(folder, chunks, codec)
    return open_vectors(folder)


def test_on_a_small_corpus_it_starts_from_the_bundled_model_and_says_so(
    sample: VectorArray, tmp_path: Path
) -> None:
    recipe = replace(FAST, epochs=2)
    started, fresh = fit(sample, tmp_path, "amn", recipe), fit(sample, tmp_path, "amn", recipe, fresh=True)
    assert started.record is not None
    assert fresh.record is not None
    assert started.record.folder != fresh.record.folder
    bundled = read_aliases(SHIPPED)["amn"]
    assert started.record.config["bundled"] == bundled
    assert f"| Start | the bundled {bundled} |" in (started.record.folder / "MODEL_CARD.md").read_text()
    assert "bundled" not in fresh.record.config
    assert started.record.metrics["val_cosine"] > fresh.record.metrics["val_cosine"]
    # It is a model of this corpus, not a copy.
    theirs = load_predictor("amn").record
    assert theirs is not None
    assert started.record.config["weights_sha256"] != theirs.config["weights_sha256"]


def test_only_few_windows_of_the_bundled_codec_start_from_a_bundled_model(
    sample: VectorArray, array: VectorArray
) -> None:
    assert bundled_start(sample, "amn", 49_999) == read_aliases(SHIPPED)["amn"]
    assert bundled_start(sample, "amn", 50_000) is None
    assert bundled_start(sample, "lstm", 100) is None
    assert bundled_start(array, "amn", 100) is None


def test_what_cannot_be_fitted_is_refused(array: VectorArray, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vectors are str, expected what lvm\.open_vectors returns"):
        fit(str(array.directory), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown model 'mamba'; expected one of amn"):
        fit(array, tmp_path, "mamba")
    with pytest.raises(InputError, match="unknown recipe 'slow'; expected one of fast"):
        fit(array, tmp_path, "amn", "slow")
    with pytest.raises(InputError, match="unknown device 'abacus'"):
        fit(array, tmp_path, "amn", device="abacus")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        fit(array, tmp_path / "file", "amn")
    with pytest.raises(OutputError, match="holds vectors, expected models"):
        fit(array, array.directory, "amn")
    fit(array, tmp_path / "models", "amn", replace(BRIEF, epochs=1))
    write_vectors(tmp_path / "other", fake_articles(12), FakeCodec("other", dim=96))
    with pytest.raises(IdentityError, match="encoder_sha256"):
        fit(open_vectors(tmp_path / "other"), tmp_path / "models", "amn")
    assert json.loads((tmp_path / "models" / "aliases.json").read_text()).keys() == {"amn"}
