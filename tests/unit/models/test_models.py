"""What every architecture must do, one file for all of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvm.errors import InputError
from lvm.models import CONFIGS, MODELS, TOYS, Predictor, build

DIM = 768
PARAMETERS = {
    "amn": 1_510_912,
    "lstm": 5_120_768,
    "gru": 7_095_552,
    "transformer": 17_867_520,
    "transformer-optimized": 17_867_520,
    "mamba2": 10_712_352,
    "s4": 8_878_848,
    "rwkv": 15_371_008,
    "hybrid": 10_109_552,
    "gpt2": 44_497_152,
    "linformer": 13_398_912,
    "performer": 13_398_784,
    "hyena": 13_713_152,
    "retnet": 13_386_496,
    "lcm-diffusion": 13_924_096,
    "lcm-quant": 14_714_880,
}
"""At the default sizes; they identify the architecture."""

OWN_LOSS = [name for name, model in MODELS.items() if hasattr(model, "loss")]
CAUSAL = [name for name in MODELS if name != "amn" and name not in OWN_LOSS]
STEPS = [name for name in CAUSAL if getattr(MODELS[name], "has_steps", False)]

each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def toy() -> Callable[[str], Predictor]:
    def make(name: str) -> Predictor:
        torch.manual_seed(0)
        return MODELS[name](TOYS[name]).eval()

    return make


def units(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@each_model
def test_default_sizes_have_the_pinned_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name](CONFIGS[name]())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_the_documentation_has_these_numbers() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "models.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    assert {row[1].strip(" `"): int(row[4].replace(",", "")) for row in rows} == PARAMETERS
    steps = {row[1].strip(" `") for row in rows if row[5].strip() == "yes"}
    assert steps == {*STEPS}


def test_every_architecture_is_pinned() -> None:
    assert set(PARAMETERS) == set(MODELS) == set(CONFIGS) == set(TOYS)


@each_model
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_the_prediction_is_one_unit_vector_a_context(
    toy: Callable[[str], Predictor], name: str, length: int
) -> None:
    predicted = toy(name)(units(3, length, DIM))
    assert predicted.shape == (3, DIM)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted.norm(dim=-1), torch.ones(3))


@each_model
def test_a_batch_gives_what_its_contexts_give_alone(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name), units(4, 5, DIM)
    alone = torch.cat([model(c[None]) for c in contexts])
    torch.testing.assert_close(model(contexts), alone, atol=1e-5, rtol=0)


@each_model
def test_every_context_vector_counts(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name), units(1, 5, DIM)
    before = model(contexts)
    for place in range(5):
        changed = contexts.clone()
        changed[:, place] = units(1, DIM, seed=7)
        assert (model(changed) - before).abs().max() > 1e-6, place


@pytest.mark.parametrize("name", CAUSAL)
def test_no_place_sees_a_later_vector(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name), units(2, 6, DIM)
    before = model.each_step(contexts)
    assert before.shape == (2, 6, DIM)
    for place in range(1, 6):
        changed = contexts.clone()
        changed[:, place] = units(2, DIM, seed=place)
        after = model.each_step(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-6, rtol=0)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_each_step_ends_with_the_prediction(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name), units(2, 5, DIM)
    torch.testing.assert_close(model.each_step(contexts)[:, -1], model(contexts), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.each_step(contexts)[:, 2], model(contexts[:, :3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STEPS)
def test_one_vector_after_another_gives_what_all_at_once_give(
    toy: Callable[[str], Predictor], name: str
) -> None:
    # 70 places: more than one chunk of every parallel form.
    model, contexts = toy(name).double(), units(2, 70, DIM).double()
    at_once, memory = model.each_step(contexts), None
    for place in range(70):
        predicted, memory = model.step(contexts[:, place], memory)
        torch.testing.assert_close(predicted, at_once[:, place], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("lstm", "gru", "transformer")])
def test_no_place_of_a_long_context_sees_a_later_vector(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name).double(), units(1, 70, DIM).double()
    before = model.each_step(contexts)
    for place in (1, 8, 63, 64, 69):
        changed = contexts.clone()
        changed[:, place] = units(1, DIM, seed=place).double()
        after = model.each_step(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-9, rtol=0)
        assert (after[:, place:] - before[:, place:]).abs().amax(dim=(0, 2)).min() > 1e-9
    torch.testing.assert_close(before[:, -1], model(contexts), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if hasattr(TOYS[name], "head_dim")])
def test_a_head_that_does_not_divide_the_width_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="head_dim must divide the width, got 24 and 32"):
        build(name, dataclasses.asdict(TOYS[name]) | {"head_dim": 24})


@pytest.mark.parametrize("name", CAUSAL)
def test_the_order_of_the_earlier_vectors_counts(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name), units(1, 5, DIM)
    assert (model(contexts) - model(contexts[:, [2, 1, 0, 3, 4]])).abs().max() > 1e-5


@each_model
def test_loss_falls(toy: Callable[[str], Predictor], name: str) -> None:
    # Four topics, each with contexts around one vector and another vector as the answer.
    model = toy(name).train()
    topic = torch.arange(64) % 4
    contexts = F.normalize(units(4, DIM)[topic][:, None] + 0.5 * units(64, 5, DIM, seed=2), dim=-1)
    targets = units(4, DIM, seed=3)[topic]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    if hasattr(model, "prepare"):
        model.prepare([targets])
    losses = []
    for _ in range(30):
        if hasattr(model, "loss"):
            loss = model.loss(contexts, targets)
        else:
            loss = (model(contexts) - targets).square().sum(dim=-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > (0.9 if name in OWN_LOSS else 1.5)
    assert sum(losses[-3:]) < 3 * 0.5 * losses[0]


@each_model
def test_saved_and_loaded_it_gives_equal_outputs(
    toy: Callable[[str], Predictor], name: str, tmp_path: Path
) -> None:
    model, contexts = toy(name), units(3, 5, DIM)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    torch.manual_seed(99)
    again = build(name, dataclasses.asdict(model.config)).eval()
    assert not torch.equal(again(contexts), model(contexts))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(contexts), model(contexts))


@each_model
@pytest.mark.parametrize("length", [5, 70])
def test_in_bfloat16_it_says_nearly_the_same(toy: Callable[[str], Predictor], name: str, length: int) -> None:
    model, contexts, targets = toy(name), units(3, length, DIM), units(3, DIM, seed=2)
    exact = model(contexts)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(contexts)
        output = model.loss(contexts, targets) if name in OWN_LOSS else narrow.sum()
    assert F.cosine_similarity(exact, narrow.float(), dim=-1).min() > 0.995
    output.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@each_model
def test_evaluation_mode_has_no_chance_in_it(toy: Callable[[str], Predictor], name: str) -> None:
    model, contexts = toy(name), units(3, 5, DIM)
    assert torch.equal(model(contexts), model(contexts))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_LOSS])
def test_the_output_layer_on_the_features_makes_the_prediction(
    toy: Callable[[str], Predictor], name: str
) -> None:
    model, contexts = toy(name), units(3, 5, DIM)
    raw = model.output_layer(model.features(contexts))
    if model.adds_mean:
        raw = raw + contexts.mean(dim=1)
    torch.testing.assert_close(model(contexts), F.normalize(raw, dim=-1))


@each_model
def test_started_from_directions_the_features_tell_the_mean(name: str) -> None:
    # The mean of the context is read back from the features by a linear map, which chance does not allow.
    torch.manual_seed(0)
    sizes = {"amn": {"hidden": 128}, "lstm": {"hidden": 64}, "gru": {"hidden": 64}}.get(name)
    if sizes is None:
        sizes = dataclasses.asdict(TOYS[name]) | {"width": 64}
    model = build(name, sizes).eval()
    basis = torch.linalg.qr(torch.randn(DIM, DIM)).Q
    contexts = F.normalize(torch.randn(300, 5, 60) @ basis[:60], dim=-1)
    mean = contexts.mean(dim=1)
    model.start_from(basis[: model.num_directions])
    with torch.no_grad():
        features = torch.cat((model.features(contexts), torch.ones(300, 1)), dim=1)
    read = torch.linalg.lstsq(features[:200], mean[:200]).solution
    assert F.cosine_similarity(features[200:] @ read, mean[200:]).mean() > 0.85


@each_model
def test_started_from_directions_every_weight_can_still_learn(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](TOYS[name]).train()
    model.start_from(torch.linalg.qr(torch.randn(DIM, DIM)).Q[: model.num_directions])
    contexts = units(32, 5, DIM)
    targets = contexts[:, 0].roll(1, dims=-1)
    if hasattr(model, "loss"):
        model.loss(contexts, targets).backward()
    else:
        (model(contexts) - targets).square().sum(dim=-1).mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_attention_of_the_amn_is_shared_out_over_the_context(toy: Callable[[str], Predictor]) -> None:
    model, contexts = toy("amn"), units(3, 5, DIM)
    weights = model.attention(contexts)
    assert weights.shape == (3, 5)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3))


def test_attention_of_the_amn_makes_its_mixture(toy: Callable[[str], Predictor]) -> None:
    # The correction net's input, caught on its way, holds the mean and the vectors mixed by these weights.
    model, contexts = toy("amn"), units(3, 5, DIM)
    seen: list[Tensor] = []
    model.residual_net[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(contexts)
    mixture = (model.attention(contexts)[:, :, None] * contexts).sum(dim=1)
    torch.testing.assert_close(seen[0], torch.cat((contexts.mean(dim=1), mixture), dim=-1), atol=1e-6, rtol=0)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        InputError,
        match=r"unknown model 'mamba3'; expected one of amn, lstm, gru, .*-optimized, mamba2, s4",
    ):
        build("mamba3")


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(InputError, match="hiden"):
        build("lstm", {"hiden": 3})
