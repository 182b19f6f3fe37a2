"""LCM by quantisation: the next vector as a sum of codewords, each predicted given the ones before.

LCM team 2024, "Large Concept Models", arXiv 2412.08821, section 2.4 (Quant-LCM, discrete targets): residual vector
quantisation encodes a vector as one code per level, each for the residual of the levels before; a causal Transformer
over the context, with the partial sum and the level as further inputs, predicts each level's code; the loss is
cross-entropy. Choices: codebooks by k-means over training targets (`prepare`), then fixed; fewer and smaller ones than
the paper's 64 of 8,192, which suit far larger corpora; a small head combines the context's state and the partial sum,
so that the Transformer runs once and not once per level. The prediction sums the expected codeword of each level given
the expected partial sum, as cosine favours a mean; `answer="likeliest"` takes the most likely code instead.

Letters: B batch, T context vectors, D vector length, W width, L levels, K codes of a level.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.errors import InputError
from lvm.models.attention import CausalAttention
from lvm.models.trunk import Trunk, TrunkConfig, wide, with_feed_forward

KMEANS_ROUNDS = 12
"""Iterations of Lloyd's algorithm for each codebook."""


@dataclass(frozen=True)
class LCMQuantConfig(TrunkConfig):
    """Sizes of the network."""

    head_dim: int = 64
    """Must divide the width."""
    levels: int = 8
    """Levels, and so codewords per vector, L."""
    codes: int = 256
    """Codewords per level, K."""
    answer: Literal["expected", "likeliest"] = "expected"
    """Whether the prediction uses the expected or the likeliest codeword of each level."""

    def __post_init__(self) -> None:
        if self.answer not in ("expected", "likeliest"):
            raise InputError(f"answer must be expected or likeliest, got {self.answer!r}")


TOY = LCMQuantConfig(width=32, num_layers=2, head_dim=16, levels=2, codes=8)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6), "levels": (4, 8)}


class LCMQuant(Trunk):
    """Next vector as a sum of codewords."""

    has_steps = False
    solves_output = False
    """The outputs are logits, not vectors, so regression on the targets cannot initialise the last layer."""
    codebooks: Tensor
    config: LCMQuantConfig

    def __init__(self, config: LCMQuantConfig) -> None:
        levels, codes, width, dim = config.levels, config.codes, config.width, config.dim
        attention = partial(CausalAttention, width, config.head_dim)
        super().__init__(config, with_feed_forward(config, attention), positions=True)
        del self.output_proj
        self.register_buffer("codebooks", torch.randn(levels, codes, dim) / math.sqrt(dim))
        self.level = nn.Parameter(torch.randn(levels, width) * 0.02)
        self.partial = nn.Linear(dim, width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.logits = nn.Parameter(torch.randn(levels, codes, width) / math.sqrt(width))

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        features = self.features(contexts)
        total = wide(torch.zeros_like(contexts[:, 0]))
        for level, codebook in enumerate(self.codebooks):
            logits = wide(self._level_logits(features, total, level))
            if self.config.answer == "expected":
                total = total + logits.softmax(dim=-1) @ codebook
            else:
                total = total + codebook[logits.argmax(dim=-1)]
        return F.normalize(total, dim=-1)

    def loss(self, contexts: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the targets' codes in nats, mean over levels and batch, a scalar.

        contexts: (B, T, D), targets: (B, D).
        """
        features = self.features(contexts)
        codes, before = self.quantise(targets)
        total = targets.new_zeros(())
        for level in range(len(self.codebooks)):
            logits = wide(self._level_logits(features, before[:, level], level))
            total = total + F.cross_entropy(logits, codes[:, level])
        return total / len(self.codebooks)

    @torch.no_grad()
    def quantise(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, L), int64, of vectors (B, D), and the partial sum (B, L, D) before each level."""
        total = torch.zeros_like(vectors)
        codes, before = [], []
        for codebook in self.codebooks:
            before.append(total)
            code = nearest(vectors - total, codebook)
            codes.append(code)
            total = total + codebook[code]
        return torch.stack(codes, dim=1), torch.stack(before, dim=1)

    @torch.no_grad()
    def prepare(self, targets: Iterable[Tensor]) -> None:
        """Fit the codebooks by k-means on the residuals of batches (B, D) of training targets, once before training."""
        left = torch.cat(list(targets)).to(self.codebooks)
        for level in range(len(self.codebooks)):
            book = kmeans(left, self.codebooks.shape[1])
            self.codebooks[level] = book
            left = left - book[nearest(left, book)]

    def _level_logits(self, features: Tensor, partial: Tensor, level: int) -> Tensor:
        """(B, K) from the context's features (B, W) and the sum of the levels before (B, D)."""
        # Scale unit vectors to components of about 1, as the states have.
        scaled = partial * math.sqrt(self.config.dim)
        hidden: Tensor = self.head(features + self.partial(scaled.to(features.dtype)) + self.level[level])
        return hidden @ self.logits[level].T


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(B,) index of the nearest of K codewords (K, D) for each of the vectors (B, D)."""
    return (codebook.square().sum(dim=-1) - 2.0 * vectors @ codebook.T).argmin(dim=-1)


def kmeans(vectors: Tensor, count: int) -> Tensor:
    """(count, D) centres of the vectors (N, D), by Lloyd's algorithm, initialised with evenly spaced vectors.

    An empty cluster keeps its centre. With fewer vectors than centres, some centres are duplicates.
    """
    first = torch.linspace(0, len(vectors) - 1, count, device=vectors.device).round().long()
    centres = vectors[first].clone()
    for _ in range(KMEANS_ROUNDS):
        own = nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, own, vectors)
        sizes = torch.bincount(own, minlength=count).to(sums)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1.0), centres)
    return centres
