"""Ensembles: the best members, weights that are worth their while, a record like any other."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lvm.errors import InputError
from lvm.models import TOYS, Ensemble, EnsembleConfig, build
from lvm.predict.ensemble import cosine_of, learn_weights, make_ensemble
from lvm.predict.record import load_record, read_aliases, save_record, set_alias
from lvm.vectors.array import VectorArray, open_vectors
from lvm.vectors.sequences import WindowSettings, make_windows
from tests.doubles import FakeCodec, fake_articles, write_vectors


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> VectorArray:
    folder = tmp_path_factory.mktemp("ensemble") / "vectors"
    write_vectors(folder, fake_articles(30))
    return open_vectors(folder)


def save(models: Path, array: VectorArray, name: str, cosine: float, context: int = 3, seed: int = 0) -> str:
    torch.manual_seed(len(name) + context)
    config = {
        "seed": seed,
        "windows": dataclasses.asdict(WindowSettings(context=context)),
        "vectors": {"fingerprint": array.fingerprint},
    }
    model = build(name, dataclasses.asdict(TOYS[name]))
    return save_record(models, name, model, FakeCodec().identity, config, {"val_cosine": cosine}, {}).name


def test_its_answer_is_the_weighted_sum_of_unit_vectors() -> None:
    torch.manual_seed(0)
    sizes = [
        {"model": n, "sizes": dataclasses.asdict(TOYS[n]), "context": c} for n, c in (("amn", 5), ("s4", 2))
    ]
    model: Ensemble = build("ensemble", {"members": sizes}).eval()
    model.logits.data.copy_(torch.tensor([0.3, -0.4]))
    contexts = F.normalize(torch.randn(3, 5, 768), dim=-1)
    one, two = model.members[0](contexts), model.members[1](contexts[:, -2:])
    share = torch.tensor([0.3, -0.4]).exp()
    expected = F.normalize((share[0] * one + share[1] * two) / share.sum(), dim=-1)
    torch.testing.assert_close(model(contexts), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(contexts).norm(dim=-1), torch.ones(3))


def test_learned_weights_find_the_member_that_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(200, 16, generator=generator), dim=-1)
    noise = F.normalize(torch.randn(3, 200, 16, generator=generator), dim=-1)
    predicted = F.normalize(torch.tensor([2.0, 0.5, 0.0])[:, None, None] * truth + noise, dim=-1)
    logits = learn_weights(predicted, truth)
    weights = logits.softmax(dim=0)
    assert weights[0] > weights[1] > weights[2]
    # As good as any of a fine grid of weights.
    grid = torch.tensor(
        [[a, b, 1 - a - b] for a in torch.linspace(0, 1, 41) for b in torch.linspace(0, 1 - a, 41)]
    )
    best = max(cosine_of(w.clamp_min(1e-9).log(), predicted, truth) for w in grid)
    assert cosine_of(logits, predicted, truth) > best - 1e-3


def test_the_best_members_make_a_record_like_any_other(array: VectorArray, tmp_path: Path) -> None:
    names = {"amn": 0.5, "lstm": 0.1, "mamba2": 0.4}
    members = {n: save(tmp_path, array, n, c, context=2 if n == "amn" else 3) for n, c in names.items()}
    folder, there = make_ensemble(tmp_path, array, members, max_members=2)
    assert not there
    set_alias(tmp_path, "ensemble", folder)
    record = load_record(tmp_path, "ensemble")
    assert record.name == "ensemble"
    assert record.context == 3
    assert record.config["members"] == [members["amn"], members["mamba2"]]
    val = make_windows(array, WindowSettings(context=3)).split(0)["val"]
    contexts, targets = (torch.from_numpy(a) for a in val.batch(slice(None)))
    parts = [load_record(tmp_path, m) for m in record.config["members"]]
    with torch.inference_mode():
        answers = torch.stack([p.model(contexts[:, -p.context :]) for p in parts])
        combined = F.normalize(torch.einsum("m,mvd->vd", record.model.weights, answers), dim=-1)
        torch.testing.assert_close(record.model(contexts), combined, atol=1e-6, rtol=0)
        cosine = F.cosine_similarity(record.model(contexts), targets).mean().item()
    assert record.metrics["val_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert record.metrics["val_windows"] == len(val)
    second = record.metrics["second_half"]
    uneven = len({round(w, 3) for w in record.metrics["weights"]}) > 1
    assert uneven == (second["learned_weights"] > second["mean"])

    again, there = make_ensemble(tmp_path, array, members, max_members=2)
    assert there
    assert again == folder
    assert read_aliases(tmp_path) == {"ensemble": folder.name}


def test_members_of_another_split_or_too_few_are_refused(array: VectorArray, tmp_path: Path) -> None:
    one = save(tmp_path, array, "amn", 0.5)
    with pytest.raises(InputError, match="at least 2 trained models for an ensemble, got 1"):
        make_ensemble(tmp_path, array, {"amn": one}, max_members=3)
    other = save(tmp_path, array, "lstm", 0.4, seed=1)
    with pytest.raises(InputError, match="must share filters and split"):
        make_ensemble(tmp_path, array, {"amn": one, "lstm": other}, max_members=3)


def test_an_ensemble_of_nothing_known_is_refused() -> None:
    with pytest.raises(InputError, match="unknown model 'rnn'"):
        Ensemble(EnsembleConfig(members=[{"model": "rnn", "sizes": {}, "context": 5}]), build)
