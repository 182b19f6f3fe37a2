"""The rank head: it finds the next chunk where the prediction does not, leaves the predictor alone, and is stored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lvm import WindowSettings, fit, load_predictor, make_windows, open_vectors
from lvm.errors import InputError, TrainingError
from lvm.models import MODELS, TOYS, build
from lvm.predict.ranking import RankHead, RankSettings, features_of, fit_rank_head, near_windows, rank_loss
from lvm.predict.training import FAST, Recipe
from lvm.vectors.array import VectorArray
from tests.doubles import FakeCodec, fake_articles, write_vectors

BRIEF = RankSettings(places=4, windows_a_place=16, windows=4_000, learning_rate=2e-3)


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> VectorArray:
    """40 articles of 12 chunks in 96-d vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    write_vectors(folder, fake_articles(40), FakeCodec(dim=96))
    return open_vectors(folder)


def test_a_context_of_any_length_gives_unit_vectors_and_the_last_vectors_are_read() -> None:
    head = RankHead(context=3, dim=8, features=0)
    torch.nn.init.normal_(head.add.weight)
    contexts = F.normalize(torch.randn(4, 5, 8), dim=-1)
    found = head(contexts)
    assert torch.allclose(found.norm(dim=1), torch.ones(4))
    assert torch.equal(found, head(contexts[:, -3:]))
    short = head(contexts[:, -2:])
    assert torch.equal(short, head(torch.cat((torch.zeros(4, 1, 8), contexts[:, -2:]), dim=1)))
    assert not torch.allclose(short, found)


def test_before_training_it_weighs_later_vectors_more() -> None:
    contexts = F.normalize(torch.randn(4, 3, 8), dim=-1)
    expected = F.normalize(0.49 * contexts[:, 0] + 0.7 * contexts[:, 1] + contexts[:, 2], dim=-1)
    assert torch.allclose(RankHead(3, 8, 0)(contexts), expected, atol=1e-6)


def test_the_loss_is_cross_entropy_without_what_stands_in_the_own_context() -> None:
    found, targets = (F.normalize(torch.randn(3, 8), dim=-1) for _ in range(2))
    target_rows, context_rows = np.array([5, 6, 9]), np.array([[3, 4], [4, 5], [7, 8]])
    expected = []
    for i in range(3):
        scores = {j: float(found[i] @ targets[j]) / 0.1 for j in range(3)}
        if i == 1:
            del scores[0]  # row 5 stands in its context
        expected.append(-scores[i] + np.log(sum(np.exp(s) for s in scores.values())))
    got = rank_loss(found, targets, target_rows, context_rows, 0.1)
    assert float(got) == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_batch_is_of_windows_near_each_other_in_few_articles(array: VectorArray) -> None:
    windows = make_windows(array, WindowSettings(context=2)).split(0)["train"]
    rows = near_windows(windows, replace(BRIEF, span=2), np.random.default_rng(0))
    assert len(np.unique(windows.doc_ids[rows])) <= 4
    assert len(rows) == len(np.unique(rows)) <= 4 * 5
    wide = near_windows(windows, replace(BRIEF, places=1, span=100), np.random.default_rng(0))
    assert len(np.unique(windows.doc_ids[wide])) == 1


@pytest.mark.parametrize("name", ["gru", "amn", "lcm-quant"])
def test_it_learns_to_find_and_the_predictor_stays(name: str, array: VectorArray) -> None:
    windows = make_windows(array, WindowSettings(context=2)).split(0)["train"]
    torch.manual_seed(0)
    model = build(name, {**vars(TOYS[name]), "dim": 96})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses: list[float] = []
    head = fit_rank_head(model, windows, BRIEF, log=lambda row: losses.append(row["rank_loss"]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    contexts, targets = (torch.from_numpy(a) for a in windows.batch(slice(0, 64)))
    rows = windows.rows_of_target[:64], windows.rows_of_context[:64]
    untrained = RankHead(**head.sizes)
    with torch.no_grad():
        features = features_of(model.eval(), contexts)
        assert (features is None) == (name == "lcm-quant")
        trained, start = (rank_loss(h(contexts, features), targets, *rows, 0.05) for h in (head, untrained))
    assert trained < start - 0.05
    assert losses


def test_every_architecture_has_features_or_says_that_it_has_none() -> None:
    for name in MODELS:
        found = features_of(build(name, {**vars(TOYS[name])}), torch.zeros(2, 3, TOYS[name].dim))
        assert found is None or found.shape[0] == 2, name


def test_a_record_keeps_its_head_and_a_damaged_one_is_refused(array: VectorArray, tmp_path: Path) -> None:
    recipe = replace(FAST, epochs=1, rank=BRIEF, bfloat16=False)
    fitted = fit(array, tmp_path, "gru", recipe, device="cpu")
    assert fitted.record is not None
    contexts = make_windows(array).batch(slice(0, 8))[0]
    found = fitted.search(contexts)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert not np.allclose(found, fitted(contexts), atol=0.01)
    again = load_predictor("gru", tmp_path)
    assert np.array_equal(again.search(contexts), found)
    assert "Rank head" in (fitted.record.folder / "MODEL_CARD.md").read_text()
    without = fit(array, tmp_path, "gru", replace(recipe, rank=None), device="cpu")
    assert without.name != fitted.name
    assert np.array_equal(without.search(contexts), without(contexts))
    file = Path(str(fitted.record.folder / "rank.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match=r"rank\.safetensors has SHA-256"):
        load_predictor(fitted.name, tmp_path)


def test_settings_that_make_no_sense_are_refused_and_a_recipe_keeps_them(array: VectorArray) -> None:
    with pytest.raises(InputError, match="temperature must be above 0, got 0"):
        RankSettings(temperature=0)
    assert Recipe.from_dict(FAST.to_dict()) == FAST
    windows = make_windows(array).split(0)["train"]
    with pytest.raises(TrainingError, match="the rank head's loss is"):
        fit_rank_head(build("amn", {"dim": 96}), windows, replace(BRIEF, learning_rate=float("inf")))


def test_it_goes_on_from_a_head_of_the_same_sizes(array: VectorArray) -> None:
    train = make_windows(array, WindowSettings(context=3)).split(0)["train"]
    model = build("amn", {"dim": 96})
    torch.manual_seed(0)
    given = RankHead(3, 96, model.features(torch.zeros(1, 3, 96)).shape[1])
    torch.nn.init.normal_(given.add.weight)
    still = replace(BRIEF, learning_rate=1e-9)
    assert torch.allclose(
        fit_rank_head(model, train, still, start=given).add.weight, given.add.weight, atol=1e-4
    )
    other = RankHead(4, 96, given.sizes["features"])
    assert float(fit_rank_head(model, train, still, start=other).add.weight.detach().abs().max()) < 1e-4
