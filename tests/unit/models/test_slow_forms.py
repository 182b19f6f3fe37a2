"""Each mixer against its paper's formula, written out place by place in float64, from the mixer's own weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.models import convolution
from lvm.models.attention import CausalAttention
from lvm.models.convolution import ShortConvolution, causal_convolution
from lvm.models.hyena import HyenaConfig, HyenaOperator
from lvm.models.linformer import BlockAttention
from lvm.models.mamba2 import SSD
from lvm.models.performer import EPSILON, FavorAttention, orthogonal_features
from lvm.models.recurrence import fading_sum
from lvm.models.retnet import Retention
from lvm.models.rwkv import ChannelMix, RWKVConfig, TimeMix, wkv
from lvm.models.s4 import S4D

LENGTH = 19
TIGHT = {"atol": 1e-11, "rtol": 1e-9}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(mixer: nn.Module, seed: int = 5) -> nn.Module:
    """The mixer in float64, with every parameter moved off its starting value."""
    torch.manual_seed(seed)
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def through(layer: nn.Linear, x: Tensor) -> Tensor:
    y = layer.weight @ x
    return y if layer.bias is None else y + layer.bias


# ---- sums that fade


@pytest.mark.parametrize("chunk", [1, 4, 19, 64])
def test_the_fading_sum_is_the_recurrence(chunk: int) -> None:
    q, k, v = normal(2, 3, LENGTH, 4), normal(2, 3, LENGTH, 4, seed=1), normal(2, 3, LENGTH, 5, seed=2)
    log_decay = -normal(2, 3, LENGTH, seed=3).abs()
    first = normal(2, 3, 4, 5, seed=4)
    y, last = fading_sum(q, k, v, log_decay, first, chunk)
    for b in range(2):
        for h in range(3):
            state = first[b, h]
            for t in range(LENGTH):
                state = log_decay[b, h, t].exp() * state + torch.outer(k[b, h, t], v[b, h, t])
                torch.testing.assert_close(y[b, h, t], q[b, h, t] @ state, **TIGHT)
            torch.testing.assert_close(last[b, h], state, **TIGHT)


def test_the_fading_sum_of_a_strong_decay_does_not_overflow() -> None:
    ones = torch.ones(1, 1, 64, 2)
    y, state = fading_sum(ones, ones, ones, torch.full((1, 1, 64), -100.0))
    torch.testing.assert_close(y, torch.full_like(y, 2.0))
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_wkv_is_the_recurrence(chunk: int) -> None:
    r, k, v = (normal(2, 3, LENGTH, 4, seed=s) for s in range(3))
    log_w, u = -normal(2, 3, LENGTH, 4, seed=3).exp(), normal(3, 4, seed=4)
    first = normal(2, 3, 4, 4, seed=5)
    y, last = wkv(r, k, v, log_w, u, first, chunk)
    for b in range(2):
        for h in range(3):
            state = first[b, h]
            for t in range(LENGTH):
                taken = torch.outer(k[b, h, t], v[b, h, t])
                expected = r[b, h, t] @ (state + torch.diag(u[h]) @ taken)
                torch.testing.assert_close(y[b, h, t], expected, **TIGHT)
                state = torch.diag(log_w[b, h, t].exp()) @ state + taken
            torch.testing.assert_close(last[b, h], state, **TIGHT)


# ---- convolutions


@pytest.mark.parametrize("direct_places", [0, 1_000], ids=["fft", "direct"])
@pytest.mark.parametrize("length", [1, 2, 33, 100])
def test_the_causal_convolution_is_the_direct_sum(
    monkeypatch: pytest.MonkeyPatch, direct_places: int, length: int
) -> None:
    monkeypatch.setattr(convolution, "DIRECT_PLACES", direct_places)
    u, kernel = normal(2, 3, length), normal(3, length, seed=1)
    y = causal_convolution(u, kernel)
    for t in range(length):
        expected = sum(kernel[:, s] * u[:, :, t - s] for s in range(t + 1))
        torch.testing.assert_close(y[:, :, t], expected, **TIGHT)


def test_the_short_convolution_goes_on_from_its_memory() -> None:
    conv = made(ShortConvolution(3, 4))
    x, taps, bias = normal(2, 7, 3), conv.conv.weight[:, 0], conv.conv.bias
    y, _ = conv(x)
    for t in range(7):
        expected = bias + sum(taps[:, 3 - s] * x[:, t - s] for s in range(min(4, t + 1)))
        torch.testing.assert_close(y[:, t], expected, **TIGHT)
    first, memory = conv(x[:, :2])
    second, _ = conv(x[:, 2:], memory)
    torch.testing.assert_close(torch.cat((first, second), dim=1), y, **TIGHT)


# ---- state spaces


def test_s4d_is_the_complex_recurrence_of_its_paper() -> None:
    block = made(S4D(width=4, state=3))
    x = normal(2, LENGTH, 4)
    y, _ = block(x)
    a = torch.complex(-block.log_decay.exp(), block.frequency)
    dt_a = block.log_dt.exp()[:, None] * a
    b, c = (dt_a.exp() - 1) / a, torch.complex(block.c[0], block.c[1])
    state = torch.zeros(2, 4, 3, dtype=torch.complex128)
    for t in range(LENGTH):
        state = dt_a.exp() * state + b * x[:, t, :, None]
        z = F.gelu(2 * (c * state).sum(dim=-1).real + block.skip * x[:, t])
        torch.testing.assert_close(y[:, t], F.glu(block.out(z), dim=-1), **TIGHT)


def test_s4d_starts_as_s4d_lin() -> None:
    block = S4D(width=2, state=4)
    torch.testing.assert_close(block.log_decay.exp(), torch.full((2, 4), 0.5))
    torch.testing.assert_close(block.frequency, torch.pi * torch.arange(4.0).expand(2, 4))


def test_mamba2_is_its_recurrence() -> None:
    block = made(SSD(width=4, state=3, head_dim=2, expand=2, taps=4))
    x = normal(1, LENGTH, 4)
    y, _ = block(x)
    taps, taps_bias = block.conv.conv.weight[:, 0], block.conv.conv.bias
    inputs, states = [], torch.zeros(4, 3, 2, dtype=torch.float64)
    for t in range(LENGTH):
        projected = block.in_proj.weight @ x[0, t]
        gate, mixed, dt = projected[:8], projected[8:22], projected[22:]
        inputs.append(mixed)
        mixed = taps_bias + sum(taps[:, 3 - s] * inputs[t - s] for s in range(min(4, t + 1)))
        mixed = mixed * torch.sigmoid(mixed)
        values, b, c = mixed[:8].view(4, 2), mixed[8:11], mixed[11:]
        step = torch.log1p((dt + block.dt_bias).exp())
        rows = []
        for head in range(4):
            a = -block.log_a[head].exp()
            states[head] = (step[head] * a).exp() * states[head] + step[head] * torch.outer(b, values[head])
            rows.append(c @ states[head] + block.skip[head] * values[head])
        z = torch.cat(rows) * gate * torch.sigmoid(gate)
        z = block.norm.weight * z / (z.square().mean() + 1e-5).sqrt()
        torch.testing.assert_close(y[0, t], block.out.weight @ z, **TIGHT)


def test_mamba2_starts_with_steps_and_decays_in_the_papers_ranges() -> None:
    block = SSD(width=64, state=3, head_dim=2, expand=2, taps=4)
    steps = F.softplus(block.dt_bias)
    assert steps.min() >= 0.001 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert block.log_a.exp().min() >= 1.0
    assert block.log_a.exp().max() <= 16.0


# ---- RWKV-6


def test_rwkvs_time_mix_is_its_recurrence() -> None:
    config = RWKVConfig(width=6, head_dim=3, num_layers=3, shift_rank=2, decay_rank=2)
    mix = made(TimeMix(config, layer=1))
    x = normal(1, LENGTH, 6)
    y, _ = mix(x)
    downs, state = mix.shift_down.chunk(5, dim=1), torch.zeros(2, 3, 3, dtype=torch.float64)
    u = mix.bonus.view(2, 3)
    for t in range(LENGTH):
        here = x[0, t]
        back = (x[0, t - 1] if t else torch.zeros_like(here)) - here
        low = here + back * mix.mix
        for_w, for_k, for_v, for_r, for_g = (
            here + back * (mix.mixes[i] + torch.tanh(low @ downs[i]) @ mix.shift_up[i]) for i in range(5)
        )
        w = torch.exp(-torch.exp(mix.decay + torch.tanh(for_w @ mix.decay_down) @ mix.decay_up)).view(2, 3)
        r, k, v = mix.receptance(for_r).view(2, 3), mix.key(for_k).view(2, 3), mix.value(for_v).view(2, 3)
        rows = []
        for h in range(2):
            taken = torch.outer(k[h], v[h])
            row = r[h] @ (state[h] + u[h][:, None] * taken)
            rows.append((row - row.mean()) / (row.var(unbiased=False) + 64e-5).sqrt())
            state[h] = w[h][:, None] * state[h] + taken
        normed = torch.cat(rows) * mix.norm.weight + mix.norm.bias
        gate = mix.gate(for_g)
        torch.testing.assert_close(y[0, t], mix.out(normed * gate * torch.sigmoid(gate)), **TIGHT)


def test_rwkvs_channel_mix_is_its_formula() -> None:
    mix = made(ChannelMix(RWKVConfig(width=6, head_dim=3, num_layers=3), layer=1))
    x = normal(1, LENGTH, 6)
    y, _ = mix(x)
    for t in range(LENGTH):
        here, before = x[0, t], x[0, t - 1] if t else torch.zeros(6, dtype=torch.float64)
        for_k = here * (1 - mix.mix_key) + before * mix.mix_key
        for_r = here * (1 - mix.mix_receptance) + before * mix.mix_receptance
        inner = torch.relu(mix.key(for_k)) ** 2
        torch.testing.assert_close(y[0, t], torch.sigmoid(mix.receptance(for_r)) * mix.out(inner), **TIGHT)


# ---- attention and what stands for it


def test_attention_is_the_softmax_over_the_past() -> None:
    block = made(CausalAttention(6, head_dim=3))
    x = normal(1, LENGTH, 6)
    y, _ = block(x)
    q, k, v = block.qkv(x)[0].chunk(3, dim=-1)
    for t in range(LENGTH):
        heads = []
        for at in (slice(0, 3), slice(3, 6)):
            weights = torch.softmax(k[: t + 1, at] @ q[t, at] / math.sqrt(3), dim=0)
            heads.append(weights @ v[: t + 1, at])
        torch.testing.assert_close(y[0, t], through(block.out, torch.cat(heads)), **TIGHT)


def test_retention_is_the_quadratic_form_of_its_paper() -> None:
    block = made(Retention(8, head_dim=4))
    x = normal(1, LENGTH, 8)
    y, _ = block(x)
    q, k, v = block.query(x)[0], block.key(x)[0], block.value(x)[0]
    rate = 10_000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)

    def turn(row: Tensor, place: int) -> Tensor:
        return torch.view_as_complex(row.reshape(2, 2)) * torch.polar(torch.ones_like(rate), place * rate)

    for n in range(LENGTH):
        heads = []
        for head in range(2):
            gamma, at = 1.0 - 2.0 ** (-5 - head), slice(4 * head, 4 * head + 4)
            total = torch.zeros(8, dtype=torch.float64)
            for m in range(n + 1):
                score = (turn(q[n, at], n) * turn(k[m, at], m).conj()).sum().real / 2.0  # the root of 4
                total += gamma ** (n - m) * score * v[m, 8 * head : 8 * head + 8]
            heads.append((total - total.mean()) / (total.var(unbiased=False) + 1e-5).sqrt())
        gate = through(block.gate, x[0, n])
        expected = through(block.out, gate * torch.sigmoid(gate) * torch.cat(heads))
        torch.testing.assert_close(y[0, n], expected, atol=1e-10, rtol=1e-8)


def test_favor_attention_is_its_quadratic_form() -> None:
    block = made(FavorAttention(6, head_dim=3, num_features=8))
    x = normal(1, LENGTH, 6)
    y, _ = block(x)
    q, k, v = block.qkv(x)[0].chunk(3, dim=-1)
    scale = 3**-0.25
    for t in range(LENGTH):
        heads = []
        for at in (slice(0, 3), slice(3, 6)):
            of_q = block.features @ (scale * q[t, at])
            of_q = (of_q - of_q.max()).exp() + EPSILON
            weights = torch.stack(
                [
                    of_q
                    @ (
                        (block.features @ (scale * k[s, at]) - 0.5 * (scale * k[s, at]).square().sum()).exp()
                        + EPSILON
                    )
                    for s in range(t + 1)
                ]
            )
            heads.append((weights / weights.sum()) @ v[: t + 1, at])
        torch.testing.assert_close(y[0, t], through(block.out, torch.cat(heads)), **TIGHT)


def test_favor_attention_nears_softmax_attention_with_more_features() -> None:
    x = 0.5 * normal(4, LENGTH, 16)
    exact = made(CausalAttention(16, head_dim=8))
    wanted = exact(x)[0]
    errors = []
    for count in (8, 4096):
        torch.manual_seed(1)
        block = FavorAttention(16, head_dim=8, num_features=count).double()
        block.qkv, block.out = exact.qkv, exact.out
        errors.append((block(x)[0] - wanted).norm() / wanted.norm())
    assert errors[1] < 0.02
    assert errors[1] < 0.15 * errors[0]


def test_favor_features_are_orthogonal_with_gaussian_lengths() -> None:
    torch.manual_seed(0)
    rows = orthogonal_features(64, 16)
    for block in rows.split(16):
        unit = F.normalize(block, dim=1)
        torch.testing.assert_close(unit @ unit.T, torch.eye(16), atol=1e-5, rtol=0)
    assert rows.square().sum(dim=1).mean() == pytest.approx(16, rel=0.2)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, LENGTH])
def test_block_attention_sees_summaries_and_its_own_block(length: int) -> None:
    block = made(BlockAttention(6, head_dim=3, block=4, rank=2))
    x = normal(1, length, 6)
    y, _ = block(x)
    q, k, v = block.qkv(x)[0].chunk(3, dim=-1)
    for t in range(length):
        heads = []
        for at in (slice(0, 3), slice(3, 6)):
            keys, values = [], []
            for low in range(0, t // 4 * 4, 4):
                keys.append(block.key_summary @ k[low : low + 4, at])
                values.append(block.value_summary @ v[low : low + 4, at])
            keys.append(k[t // 4 * 4 : t + 1, at])
            values.append(v[t // 4 * 4 : t + 1, at])
            weights = torch.softmax(torch.cat(keys) @ q[t, at] / math.sqrt(3), dim=0)
            heads.append(weights @ torch.cat(values))
        torch.testing.assert_close(y[0, t], through(block.out, torch.cat(heads)), **TIGHT)


def test_hyena_is_gates_and_direct_sums() -> None:
    config = HyenaConfig(width=3, order=2, scale=8, bands=2, filter_width=4)
    block = made(HyenaOperator(config))
    x = normal(1, LENGTH, 3)
    y, _ = block(x)
    projected = block.in_proj(x)[0]
    taps, bias = block.conv.conv.weight[:, 0], block.conv.conv.bias
    short = torch.stack(
        [bias + sum(taps[:, 2 - s] * projected[t - s] for s in range(min(3, t + 1))) for t in range(LENGTH)]
    )
    z, *gates = short.chunk(3, dim=-1)
    filters = torch.zeros(2, LENGTH, 3, dtype=torch.float64)
    net = block.filters
    for t in range(LENGTH):
        place = torch.tensor([t / 8.0], dtype=torch.float64)
        code = torch.cat(
            (place, *(f(2 * math.pi * place * b) for f in (torch.cos, torch.sin) for b in (1, 2)))
        )
        hidden = torch.sin(net.frequency * net.second(torch.sin(net.frequency * net.first(code))))
        filters[:, t] = net.last(hidden).view(2, 3) * torch.exp(-place * net.rate.abs())
    for gate, kernel, skip in zip(gates, filters, block.skip, strict=True):
        convolved = [sum(kernel[s] * z[t - s] for s in range(t + 1)) + skip * z[t] for t in range(LENGTH)]
        z = gate * torch.stack(convolved)
    torch.testing.assert_close(y[0], block.out(z), **TIGHT)


def test_hyenas_windows_fade_to_a_hundredth_as_its_code_has_it() -> None:
    rate = HyenaOperator(HyenaConfig(width=8)).filters.rate
    torch.testing.assert_close(torch.exp(-0.3 * rate[-1]), torch.tensor(0.01))
    torch.testing.assert_close(torch.exp(-1.5 * rate[0]), torch.tensor(0.01))
