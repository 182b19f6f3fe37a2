"""The two LCMs: noise schedules, sampling and loss by their formulas; codebooks and codes by their definition."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.errors import InputError
from lvm.models import lcm_diffusion, lcm_quant
from lvm.models.lcm_diffusion import LCMDiffusion, LCMDiffusionConfig, signal_and_noise
from lvm.models.lcm_quant import LCMQuant, LCMQuantConfig, kmeans

DIM = 768
SCHEDULES = ("cosine", "quadratic", "sigmoid")


def units(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture
def diffusion() -> LCMDiffusion:
    torch.manual_seed(0)
    return LCMDiffusion(lcm_diffusion.TOY).eval()


@pytest.fixture
def quant() -> LCMQuant:
    torch.manual_seed(0)
    return LCMQuant(lcm_quant.TOY).eval()


# ---- diffusion


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_from_clean_to_noise_and_keeps_the_variance(schedule: str) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = signal_and_noise(t, schedule)  # type: ignore[arg-type]
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t))
    assert alpha[0] == pytest.approx(1.0)
    assert (alpha.diff() <= 0).all()
    assert alpha[-1] < 0.4


def test_the_schedules_are_their_formulas() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    f = lambda x: math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    expected = [math.sqrt(f(x) / f(0)) for x in (0.25, 0.5)]
    torch.testing.assert_close(signal_and_noise(t, "cosine")[0], torch.tensor(expected, dtype=torch.float64))

    kept = 1.0
    for number in range(1, 51):
        root = math.sqrt(0.02) + number / 100 * (math.sqrt(0.022) - math.sqrt(0.02))
        kept *= 1 - root**2
        if number == 25:
            quarter = kept
    expected = [math.sqrt(quarter), math.sqrt(kept)]
    torch.testing.assert_close(
        signal_and_noise(t, "quadratic")[0], torch.tensor(expected, dtype=torch.float64)
    )

    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = [math.sqrt(sigmoid(-1 - 1.5 * math.log(x / (1 - x)))) for x in (0.25, 0.5)]
    torch.testing.assert_close(
        signal_and_noise(t, "sigmoid")[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="cosine, quadratic or sigmoid, got 'linear'"):
        LCMDiffusionConfig(schedule="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_is_ddim_with_guidance_written_out(guidance: float) -> None:
    torch.manual_seed(0)
    config = replace(lcm_diffusion.TOY, steps=4, guidance=guidance)
    model = LCMDiffusion(config).double().eval()
    contexts = units(2, 5, DIM).double()
    noise = torch.randn(1, DIM, generator=torch.Generator().manual_seed(3)) / math.sqrt(DIM)
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    f = [math.cos((t + 0.008) / 1.008 * math.pi / 2) for t in times]
    alphas = [max(x, 0.0) / math.cos(0.008 / 1.008 * math.pi / 2) for x in f]
    sigmas = [math.sqrt(max(0.0, 1 - a * a)) for a in alphas]
    for row in range(2):
        # One context at a time, with the tower run over the whole row: clean vectors, then the noisy one.
        x = 0.6 * sigmas[0] * noise[0].double()
        for step in range(4):
            with_context = whole_row(model, contexts[row], x, times[step])
            guess = with_context
            if guidance != 1.0:
                without = whole_row(model, None, x, times[step])
                guess = without + guidance * (with_context - without)
                guess = 0.7 * guess * with_context.norm() / guess.norm() + 0.3 * guess
            noise_there = (x - alphas[step] * guess) / max(sigmas[step], 1e-4)
            x = alphas[step + 1] * guess + sigmas[step + 1] * noise_there
        torch.testing.assert_close(model.sample(contexts, seed=3)[row], x / x.norm(), atol=1e-6, rtol=0)


def whole_row(model: LCMDiffusion, context: Tensor | None, noisy: Tensor, t: float) -> Tensor:
    """(D,) the guess, by one run of the causal tower over all places, without a memory."""
    from lvm.models.transformer import sinusoidal_positions

    code = sinusoidal_positions(1001, model.config.width, noisy)[round(1000 * t)]
    last = model.embed(noisy[None, None], start=5) + model.time(code)
    row = last if context is None else torch.cat((model.embed(context[None]), last), dim=1)
    states = model.states(row)[0]
    mean = torch.zeros_like(states[0]) if context is None else states[:-1].mean(dim=0)
    return model.output_proj(model.norm(states[-1] + model.pool * mean))


def test_the_loss_is_the_squared_distance_to_what_was_clean(diffusion: LCMDiffusion) -> None:
    contexts, targets = units(6, 5, DIM), units(6, DIM, seed=2)
    torch.manual_seed(11)
    loss = diffusion.loss(contexts, targets)
    torch.manual_seed(11)
    t, noise, alone = torch.rand(6), torch.randn(6, DIM) / math.sqrt(DIM), torch.rand(6) < 0.15
    assert alone.any()
    assert not alone.all()
    alpha, sigma = signal_and_noise(t, "cosine")
    total = 0.0
    for row in range(6):
        noisy = alpha[row] * targets[row] + sigma[row] * noise[row]
        guess = whole_row(diffusion, None if alone[row] else contexts[row], noisy, t[row].item())
        total += (guess - targets[row]).square().sum().item()
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)


def test_the_answer_is_the_seeds_and_no_other_chance(diffusion: LCMDiffusion) -> None:
    contexts = units(3, 5, DIM)
    first = diffusion(contexts)
    torch.manual_seed(99)
    assert torch.equal(diffusion(contexts), first)
    assert torch.equal(diffusion.sample(contexts, seed=0), first)
    assert not torch.equal(diffusion.sample(contexts, seed=1), first)


def test_the_guess_without_context_knows_none(diffusion: LCMDiffusion) -> None:
    noisy, t = units(2, DIM), torch.full((2,), 0.5)
    free = diffusion.denoise(noisy, t, 5)
    given = diffusion.denoise(noisy, t, 5, diffusion._read_context(units(2, 5, DIM, seed=4)))
    assert (free - given).abs().max() > 1e-6


# ---- quantised


def test_codes_are_the_nearest_of_what_is_left_over(quant: LCMQuant) -> None:
    vectors = units(7, DIM)
    codes, before = quant.quantise(vectors)
    for row in range(7):
        total = torch.zeros(DIM)
        for level in range(2):
            torch.testing.assert_close(before[row, level], total)
            distances = [(vectors[row] - total - word).norm().item() for word in quant.codebooks[level]]
            assert codes[row, level] == min(range(8), key=distances.__getitem__)
            total = total + quant.codebooks[level][codes[row, level]]


def test_prepared_codebooks_say_the_vectors_better_level_by_level(quant: LCMQuant) -> None:
    vectors = F.normalize(units(12, DIM)[torch.arange(240) % 12] + 0.3 * units(240, DIM, seed=2), dim=-1)

    def left() -> list[float]:
        codes, before = quant.quantise(vectors)
        whole = before[:, 1] + quant.codebooks[1][codes[:, 1]]
        return [(vectors - part).square().sum(dim=-1).mean().item() for part in (before[:, 1], whole)]

    quant.prepare(vectors.split(100))
    one, two = left()
    assert one < 0.6
    assert two < 0.8 * one


def test_kmeans_finds_separate_clusters() -> None:
    centres = units(4, 8)
    found = kmeans(centres[torch.arange(40) % 4] + 0.01 * units(40, 8, seed=2), 4)
    assert (torch.cdist(centres, found).amin(dim=1) < 0.02).all()


def test_kmeans_with_fewer_vectors_than_centres_stays_finite() -> None:
    assert torch.isfinite(kmeans(units(3, 8), 6)).all()


def test_the_loss_is_the_cross_entropy_of_the_codes(quant: LCMQuant) -> None:
    contexts, targets = units(5, 5, DIM), units(5, DIM, seed=2)
    codes, _ = quant.quantise(targets)
    features, total = quant.features(contexts), 0.0
    for row in range(5):
        partial = torch.zeros(DIM)
        for level in range(2):
            mixed = features[row] + quant.partial(partial * math.sqrt(DIM)) + quant.level[level]
            probability = torch.softmax(quant.logits[level] @ quant.head(mixed), dim=0)
            total -= math.log(probability[codes[row, level]].item())
            partial = partial + quant.codebooks[level][codes[row, level]]
    assert quant.loss(contexts, targets).item() == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("answer", ["expected", "likeliest"])
def test_the_answer_is_the_sum_of_its_codewords(answer: str) -> None:
    torch.manual_seed(0)
    model = LCMQuant(replace(lcm_quant.TOY, answer=answer)).eval()  # type: ignore[arg-type]
    contexts = units(3, 5, DIM)
    features = model.features(contexts)
    for row in range(3):
        total = torch.zeros(DIM)
        for level in range(2):
            mixed = features[row] + model.partial(total * math.sqrt(DIM)) + model.level[level]
            probability = torch.softmax(model.logits[level] @ model.head(mixed), dim=0)
            if answer == "likeliest":
                probability = F.one_hot(probability.argmax(), 8).float()
            total = total + probability @ model.codebooks[level]
        torch.testing.assert_close(model(contexts)[row], F.normalize(total, dim=0), atol=1e-5, rtol=0)


def test_an_unknown_answer_is_refused() -> None:
    with pytest.raises(InputError, match="expected or likeliest, got 'best'"):
        LCMQuantConfig(answer="best")  # type: ignore[arg-type]
