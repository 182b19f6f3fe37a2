"""Predictors that read codes: the right ones, beside vectors that they read as before."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.corpus import tmd
from lvm.corpus.tmd import Prototypes, coder_name, phrases
from lvm.models import CONFIGS, MODELS, TOYS, build
from lvm.models.codes import AXES, FEATURES, Codes
from lvm.predict.record import load_record, save_record
from lvm.predict.start import solve_start
from tests.doubles import FakeCodec
from tests.unit.models.test_models import PARAMETERS, units
from tests.unit.predict.conftest import MemoryWindows

DIM = 768
each_model = pytest.mark.parametrize("name", MODELS)


def prototypes(dim: int = DIM) -> Prototypes:
    return Prototypes(np.random.default_rng(0).standard_normal((len(phrases()), dim)))


def coded(name: str) -> Any:
    torch.manual_seed(0)
    model = build(name, dataclasses.asdict(TOYS[name]), tmd=True).eval()
    model.tmd.prototypes.copy_(torch.from_numpy(prototypes().vectors))
    return model


def widened(plain: Tensor, like: Tensor) -> Tensor:
    """Zeros for the columns that only `like` has."""
    return F.pad(plain, (0, like.shape[-1] - plain.shape[-1])) if plain.ndim else plain


def test_the_bits_are_those_of_the_nearest_labels_in_any_precision() -> None:
    assert tmd.SIZES == AXES
    assert tmd.Tmd(0, 0, 0).features().shape == (FEATURES,)
    vectors = units(200, 5, DIM)
    codes = Codes(DIM)
    codes.prototypes.copy_(torch.from_numpy(prototypes().vectors))
    near = prototypes().codes(vectors.flatten(0, 1).numpy())
    wanted = np.stack([tmd.unpack(int(code)).features() for code in near])
    assert torch.equal(codes(vectors).flatten(0, 1), torch.from_numpy(wanted))
    assert len(np.unique(wanted, axis=0)) > 500
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes(vectors).flatten(0, 1), torch.from_numpy(wanted))
    beside = codes.beside(vectors.flatten(1))
    assert torch.equal(beside[:, : 5 * DIM], vectors.flatten(1))
    assert torch.equal(beside[:, 5 * DIM :], codes(vectors).flatten(1))


@each_model
def test_vectors_are_read_as_without_codes_and_codes_besides(name: str) -> None:
    model, contexts = coded(name), units(3, 5, DIM)
    plain = build(name, dataclasses.asdict(TOYS[name])).eval()
    own = model.state_dict()
    for key, value in plain.state_dict().items():
        own[key] = widened(value, own[key])
    model.load_state_dict(own)
    torch.testing.assert_close(model(contexts), plain(contexts))
    with torch.no_grad():
        for key in model.state_dict().keys() - {"tmd.prototypes"}:
            if (wider := model.state_dict()[key]).shape != plain.state_dict()[key].shape:
                wider[..., plain.state_dict()[key].shape[-1] :].normal_()
    assert (model(contexts) - plain(contexts)).abs().max() > 1e-4


@each_model
def test_a_record_brings_its_labels_along(name: str, tmp_path: Path) -> None:
    model, contexts = coded(name), units(3, 5, DIM)
    config = {"tmd": coder_name()}
    folder = save_record(tmp_path, name, model, FakeCodec().identity, config, {}, {})
    again = load_record(tmp_path, folder.name)
    assert torch.equal(again.model(contexts), model(contexts))
    assert torch.equal(again.model.tmd.prototypes, model.tmd.prototypes)  # type: ignore[union-attr]


@each_model
def test_a_start_is_solved_with_codes_too_and_all_weights_can_learn(name: str) -> None:
    model = coded(name)
    solve_start(model, MemoryWindows(400))
    if getattr(model, "solves_output", True):
        contexts, targets = (torch.from_numpy(a) for a in MemoryWindows(64, seed=1).batch(slice(None)))
        mean = F.cosine_similarity(contexts.mean(dim=1), targets).mean()
        assert F.cosine_similarity(model.train()(contexts), targets).mean() > mean + 0.2
    contexts, targets = units(8, 5, DIM), units(8, DIM, seed=2)
    output = model.loss(contexts, targets) if hasattr(model, "loss") else model(contexts) @ targets.T
    output.sum().backward()
    for layer in model.reads:
        for tensor in model.get_submodule(layer).parameters():
            assert tensor.grad is not None
            assert tensor.grad.abs().max() > 0


def test_there_are_sixteen_more_inputs_a_vector_and_no_other_weights() -> None:
    more = {"amn": FEATURES * (256 + 256 + 2 * 512), "lstm": FEATURES * 4 * 512}
    for name in MODELS:
        width = getattr(CONFIGS[name](), "width", 512)
        with torch.device("meta"):
            number = sum(p.numel() for p in build(name, tmd=True).parameters())
        assert number == PARAMETERS[name] + more.get(name, width * FEATURES), name
