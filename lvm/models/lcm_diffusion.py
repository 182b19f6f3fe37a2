"""LCM by diffusion, one-tower: the next vector is denoised step by step.

LCM team 2024, "Large Concept Models", arXiv 2412.08821, section 2.3. x[t] = alpha x0 + sigma e, and the network
predicts x0 from x[t], t and the preceding clean vectors: one causal Transformer over the clean vectors, followed by
the noisy one. Choices: the loss is the squared distance to x0 without weights for t (the paper's simplified
objective); only the last vector of a window is noisy, to match the training loop's targets; a time embedding is added
to the noisy vector; vectors are unit vectors in place of the paper's scaling, so noise has variance 1 / D per
dimension. Sampling is deterministic (DDIM, Song et al. 2020, arXiv 2010.02502) from one seeded noise vector, with
classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) and its rescaling (Lin et al. 2023, arXiv 2305.08891,
section 3.4). Few steps and mild guidance, as the answer is judged by its cosine, not by its diversity.

Letters: B batch, T context vectors, D vector length, W width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.errors import InputError
from lvm.models.attention import CausalAttention
from lvm.models.transformer import sinusoidal_positions
from lvm.models.trunk import Trunk, TrunkConfig, wide, with_feed_forward

Schedule = Literal["cosine", "quadratic", "sigmoid"]
Context = tuple[list[Any], Tensor]
"""Keys and values of each branch, None for a feed-forward, and the mean (B, W) of the last states."""

QUADRATIC_STEPS, BETA_FIRST, BETA_LAST = 100, 0.02, 0.022
SIGMOID_GAMMA, SIGMOID_DELTA = 1.5, -1.0


@dataclass(frozen=True)
class LCMDiffusionConfig(TrunkConfig):
    """Sizes of the network, and settings of sampling."""

    head_dim: int = 64
    """Must divide the width."""
    schedule: Schedule = "cosine"
    """Noise schedule."""
    drop_context: float = 0.15
    """Share of training examples denoised without their context, for guidance."""
    steps: int = 8
    """Sampling steps."""
    guidance: float = 1.5
    """Guidance scale; 1 is no guidance."""
    rescale: float = 0.7
    """Guidance rescaling factor: 1 restores the unguided norm, 0 keeps the guided one."""
    noise_scale: float = 0.6
    """Norm of the initial noise relative to that in training."""
    seed: int = 0
    """Of the initial noise."""

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "quadratic", "sigmoid"):
            raise InputError(f"schedule must be cosine, quadratic or sigmoid, got {self.schedule!r}")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")


TOY = LCMDiffusionConfig(width=32, num_layers=2, head_dim=16, steps=3)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6), "schedule": ("cosine", "quadratic", "sigmoid")}


def signal_and_noise(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """alpha and sigma at times t, 0 (clean) to 1 (most noise); alpha^2 + sigma^2 = 1. In the dtype of t.

    Cosine: Nichol and Dhariwal 2021, arXiv 2102.09672, s = 0.008. Quadratic: the square root of beta rises
    linearly over 100 steps. Sigmoid: sigmoid(delta - gamma logit(t)), the paper's own.
    """
    if schedule == "cosine":
        first = math.cos(0.008 / 1.008 * math.pi / 2)
        alpha = torch.cos((t + 0.008) / 1.008 * math.pi / 2).clamp(min=0.0) / first
    elif schedule == "quadratic":
        number = torch.arange(1, QUADRATIC_STEPS + 1, device=t.device, dtype=t.dtype)
        low, high = math.sqrt(BETA_FIRST), math.sqrt(BETA_LAST)
        beta = (low + number / QUADRATIC_STEPS * (high - low)).square()
        log_kept = F.pad(torch.log1p(-beta).cumsum(0), (1, 0))
        place = t * QUADRATIC_STEPS
        below = place.floor().long().clamp(0, QUADRATIC_STEPS - 1)
        share = place - below
        alpha = (0.5 * (log_kept[below] + share * (log_kept[below + 1] - log_kept[below]))).exp()
    else:
        kept = torch.sigmoid(SIGMOID_DELTA - SIGMOID_GAMMA * torch.logit(t, eps=1e-5))
        whole = torch.sigmoid(SIGMOID_DELTA - SIGMOID_GAMMA * torch.logit(torch.zeros_like(t), eps=1e-5))
        alpha = (kept / whole).sqrt()
    return alpha, (1.0 - alpha.square()).clamp(min=0.0).sqrt()


class LCMDiffusion(Trunk):
    """Next vector by denoising, given the context."""

    has_steps = False
    config: LCMDiffusionConfig

    def __init__(self, config: LCMDiffusionConfig) -> None:
        attention = partial(CausalAttention, config.width, config.head_dim)
        super().__init__(config, with_feed_forward(config, attention), positions=True)
        with torch.no_grad():  # initial outputs at the scale of a unit vector
            for tensor in self.output_proj.parameters():
                tensor.div_(math.sqrt(config.dim))
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D), sampled with the config's seed."""
        return self.sample(contexts, self.config.seed)

    def sample(self, contexts: Tensor, seed: int) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D), all from the one initial noise vector of this seed."""
        config = self.config
        times = torch.linspace(1.0, 0.0, config.steps + 1, device=contexts.device, dtype=wide(contexts).dtype)
        alpha, sigma = signal_and_noise(times, config.schedule)
        x = (config.noise_scale * sigma[0] * self._noise(contexts, seed)).expand(len(contexts), -1)
        context = self._read_context(contexts)
        for step in range(config.steps):
            t = times[step].expand(len(x))
            guess = wide(self.denoise(x, t, contexts.shape[1], context))
            if config.guidance != 1.0:
                free = wide(self.denoise(x, t, contexts.shape[1]))
                guided = free + config.guidance * (guess - free)
                length = guess.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True).clamp_min(1e-8)
                guess = guided * (config.rescale * length + 1.0 - config.rescale)
            if step == config.steps - 1:
                x = guess
            else:
                noise = (x - alpha[step] * guess) / sigma[step].clamp_min(1e-4)
                x = alpha[step + 1] * guess + sigma[step + 1] * noise
        return F.normalize(x, dim=-1)

    def loss(self, contexts: Tensor, targets: Tensor) -> Tensor:
        """Mean squared distance of denoised and true targets, a scalar; t and noise from torch's default generator.

        contexts: (B, T, D), targets: (B, D).
        """
        t = torch.rand(len(targets), device=targets.device)
        noise = torch.randn_like(targets) / math.sqrt(targets.shape[-1])
        alpha, sigma = signal_and_noise(t, self.config.schedule)
        noisy = alpha[:, None] * targets + sigma[:, None] * noise
        alone = torch.rand(len(targets), device=targets.device) < self.config.drop_context
        total = targets.new_zeros(())
        for rows, context in ((~alone, True), (alone, False)):
            if rows.any():
                read = self._read_context(contexts[rows]) if context else None
                guess = self.denoise(noisy[rows], t[rows], contexts.shape[1], read)
                total = total + (wide(guess) - targets[rows]).square().sum()
        return total / len(targets)

    def denoise(self, noisy: Tensor, t: Tensor, place: int, context: Context | None = None) -> Tensor:
        """(B, D) prediction of the clean vectors from the noisy ones (B, D) at times t (B,), 0 to 1.

        place: the vector's position, T. context: of `_read_context`; None for no context.
        """
        output: Tensor = self.output_proj(self._noisy_features(noisy, t, place, context))
        return output

    def features(self, contexts: Tensor) -> Tensor:
        """(B, W) inputs of the output layer for pure noise after contexts (B, T, D)."""
        noise = self._noise(contexts, self.config.seed).expand(len(contexts), -1)
        t = torch.ones(len(contexts), device=contexts.device, dtype=contexts.dtype)
        return self._noisy_features(noise, t, contexts.shape[1], self._read_context(contexts))

    def _noisy_features(self, noisy: Tensor, t: Tensor, place: int, context: Context | None) -> Tensor:
        # Time embedding with a thousand steps, as usual for diffusion models.
        codes = sinusoidal_positions(1001, self.config.width, noisy)
        x = self.embed(noisy[:, None], place) + self.time(codes[(1000 * t).round().long()])[:, None]
        memories, mean = context or ([None] * len(self.branches), torch.zeros_like(x[:, 0]))
        for branch, memory in zip(self.branches, memories, strict=True):
            x, _ = branch(x, memory)
        return self._read(x[:, 0], mean)

    def _read_context(self, contexts: Tensor) -> Context:
        """Cached keys and values, and mean state, of contexts (B, T, D)."""
        x, memories = self.embed(contexts), []
        for branch in self.branches:
            x, memory = branch(x)
            memories.append(memory)
        return memories, x.mean(dim=1)

    def _noise(self, like: Tensor, seed: int) -> Tensor:
        """(1, D) noise of norm about 1; drawn on the CPU, to be the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        dim = self.config.dim
        return (torch.randn(1, dim, generator=generator) / math.sqrt(dim)).to(like.device, wide(like).dtype)
