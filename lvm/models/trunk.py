"""The residual stream that the later architectures share: they differ in what mixes the places, not around it.

    vectors -> Linear -> x + mixer(norm(x)), again and again -> read-out -> norm -> Linear -> unit vector

The read-out is the last place, plus `pool` times the mean of the places so far. `pool` is one number a channel
and 0 in a random start, which is the papers' read-out; the solved start (`lvm.predict.start`) sets it so that the
features carry the context's mean, as the other architectures' do.

A mixer takes (B, T, W) and the memory of the places before, None at the beginning, and gives (B, T, W) and the
memory after. So the parallel form and the step form are one function: all places at once, or one after another.
Its last layer is called `out`.

Letters: B batch, T context vectors, D vector length, W width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.errors import InputError
from lvm.models.transformer import sinusoidal_positions


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: sums over places are not for bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class FeedForward(nn.Module):
    """Two layers with GELU between, place by place."""

    def __init__(self, width: int, inner: int, approximate: str = "none") -> None:
        """approximate: of the GELU, "none" or "tanh"."""
        super().__init__()
        self.approximate = approximate
        self.up = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """(B, T, W) from (B, T, W); it needs no memory."""
        return self.out(F.gelu(self.up(x), approximate=self.approximate)), None


class Branch(nn.Module):
    """x + dropout(mixer(norm(x)))."""

    def __init__(self, mixer: nn.Module, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """(B, T, W) and the mixer's memory after these places."""
        mixed, memory = self.mixer(self.norm(x), memory)
        return x + self.dropout(mixed), memory


@dataclass(frozen=True)
class Memory:
    """What `Trunk.step` hands on."""

    length: int
    """Places so far."""
    total: Tensor
    """(B, W) sum of the last layer's states so far."""
    branches: tuple[Any, ...]
    """One mixer's memory each."""


class Trunk(nn.Module):
    """Next vector from the last place of a residual stream."""

    adds_mean = False
    """The output layer alone makes the prediction."""
    reads = ("input_proj",)
    """Layers that read vectors."""
    has_steps = True
    """Whether every mixer has a memory, so that `step` works."""

    def __init__(
        self,
        config: Any,
        mixers: Sequence[nn.Module],
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        positions: bool = False,
    ) -> None:
        """config: has dim, width and dropout. positions: add sine and cosine codes, for mixers blind to order."""
        super().__init__()
        if (head := getattr(config, "head_dim", None)) and config.width % head:
            raise InputError(f"head_dim must divide the width, got {head} and {config.width}")
        self.config = config
        self.positions = positions
        self.input_proj = nn.Linear(config.dim, config.width)
        self.branches = nn.ModuleList(Branch(m, norm(config.width), config.dropout) for m in mixers)
        self.pool = nn.Parameter(torch.zeros(config.width))
        self.norm = norm(config.width)
        self.output_proj = nn.Linear(config.width, config.dim)

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        return F.normalize(wide(self.output_layer(self.features(contexts))), dim=-1)

    def each_step(self, contexts: Tensor) -> Tensor:
        """(B, T, D) unit vectors: place t holds the prediction from contexts[:, : t + 1]."""
        states = self.states(self.embed(contexts))
        counts = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
        features = self._read(states, states.cumsum(dim=1) / counts)
        return F.normalize(wide(self.output_proj(features)), dim=-1)

    def step(self, vectors: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(B, D) unit vectors from the next vectors (B, D) of contexts whose memory this is; the memory after."""
        if not self.has_steps:
            raise NotImplementedError(f"{type(self).__name__} reads whole contexts alone")
        length = memory.length if memory else 0
        x = self.embed(vectors[:, None], length)
        after = []
        for number, branch in enumerate(self.branches):
            x, kept = branch(x, memory.branches[number] if memory else None)
            after.append(kept)
        total = x[:, 0] + (memory.total if memory else 0.0)
        features = self._read(x[:, 0], total / (length + 1))
        predicted = F.normalize(wide(self.output_proj(features)), dim=-1)
        return predicted, Memory(length + 1, total, tuple(after))

    def features(self, contexts: Tensor) -> Tensor:
        """(B, W) inputs of the output layer from contexts (B, T, D)."""
        states = self.states(self.embed(contexts))
        return self._read(states[:, -1], states.mean(dim=1))

    @property
    def output_layer(self) -> nn.Linear:
        """The last layer; its output, scaled to norm 1, is the prediction."""
        return self.output_proj

    @property
    def num_directions(self) -> int:
        """Rows `start_from` takes."""
        width: int = self.config.width
        return width

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Set the layers so that `features` carry the context's mean and its last vector.

        directions: (W, D) orthonormal rows along which the vectors vary most. What the mixers add is cut to a
        tenth; the mean counts eight times, as in the Transformer's start. Position codes are taken out of the
        input again as far as those of five places have them in common.
        """
        width: int = self.config.width
        self.input_proj.weight.copy_(directions * math.sqrt(width))
        self.input_proj.bias.zero_()
        if self.positions:
            self.input_proj.bias.sub_(sinusoidal_positions(5, width, directions).mean(dim=0))
        self.pool.fill_(8.0)
        for branch in self.branches:
            assert isinstance(branch, Branch)
            for tensor in branch.mixer.get_submodule("out").parameters():
                tensor.mul_(0.1)

    def embed(self, vectors: Tensor, start: int = 0) -> Tensor:
        """(B, T, W) inputs of the first branch from vectors (B, T, D); the first is at place `start`."""
        x = wide(self.input_proj(vectors))  # the stream stays wide; what the branches add may be narrower
        if self.positions:
            x = x + sinusoidal_positions(start + x.shape[1], self.config.width, x)[start:]
        return x

    def states(self, x: Tensor) -> Tensor:
        """(B, T, W) after all branches from (B, T, W) before them."""
        for branch in self.branches:
            x, _ = branch(x)
        return x

    def _read(self, states: Tensor, mean: Tensor) -> Tensor:
        features: Tensor = self.norm(states + self.pool * mean)
        return features
