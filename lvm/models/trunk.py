"""The residual network that most architectures share; they differ only in their mixers.

    vectors -> Linear -> x + mixer(norm(x)), repeated -> read-out -> norm -> Linear -> unit vector

The read-out is the last position, plus `pool` times the mean over positions. `pool` has one number per channel. It is 0
when randomly initialised, which is the papers' read-out; the solved start (`lvm.predict.start`) sets it so that the
features carry the context's mean.

A mixer maps (B, T, W) and its memory of earlier positions, None at first, to (B, T, W) and the new memory. The parallel
and the recurrent form are thus one function, applied to all positions at once or one by one. Its last layer is `out`.

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


@dataclass(frozen=True)
class TrunkConfig:
    """Sizes that all architectures with a trunk have."""

    dim: int = 768
    """Length of a vector, D."""
    width: int = 512
    """Width of the residual stream, W."""
    num_layers: int = 4
    """Mixers, each with its feed-forward where the architecture has one."""
    dropout: float = 0.1
    """Applied to the output of each mixer and feed-forward."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: bfloat16 is too narrow for sums over positions."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, position by position."""

    def __init__(self, width: int, inner: int, approximate: str = "none") -> None:
        """approximate: the GELU's, "none" or "tanh"."""
        super().__init__()
        self.approximate = approximate
        self.up = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """(B, T, W) from (B, T, W), without memory."""
        return self.out(F.gelu(self.up(x), approximate=self.approximate)), None


def with_feed_forward(
    config: TrunkConfig, mixer: Callable[[], nn.Module], factor: int = 4, approximate: str = "none"
) -> list[nn.Module]:
    """config.num_layers times: a new mixer, and a feed-forward of `factor` times the width."""
    mixers: list[nn.Module] = []
    for _ in range(config.num_layers):
        mixers += [mixer(), FeedForward(config.width, factor * config.width, approximate)]
    return mixers


class Branch(nn.Module):
    """x + dropout(mixer(norm(x)))."""

    def __init__(self, mixer: nn.Module, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """(B, T, W) and the mixer's new memory."""
        mixed, memory = self.mixer(self.norm(x), memory)
        return x + self.dropout(mixed), memory


@dataclass(frozen=True)
class Memory:
    """State of `Trunk.step`."""

    length: int
    """Positions so far."""
    total: Tensor
    """(B, W) sum of the last layer's states so far."""
    branches: tuple[Any, ...]
    """The memory of each mixer."""


class Trunk(nn.Module):
    """Next vector from the last position of a residual stream."""

    adds_mean = False
    """The prediction is the output layer's alone."""
    reads = ("input_proj",)
    """Names of the layers that take vectors."""
    has_steps = True
    """Whether every mixer has a memory, so that `step` works."""

    def __init__(
        self,
        config: TrunkConfig,
        mixers: Sequence[nn.Module],
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        positions: bool = False,
    ) -> None:
        """positions: add sinusoidal codes, for mixers that ignore order."""
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
        """(B, T, D) unit vectors: position t is the prediction from contexts[:, : t + 1]."""
        states = self.states(self.embed(contexts))
        counts = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
        features = self._read(states, states.cumsum(dim=1) / counts)
        return F.normalize(wide(self.output_proj(features)), dim=-1)

    def step(self, vectors: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """(B, D) predictions after one more context vector each (B, D), as unit vectors, and the new memory."""
        if not self.has_steps:
            raise NotImplementedError(f"{type(self).__name__} only takes whole contexts")
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
        """Number of rows of `start_from`'s directions."""
        return self.config.width

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """Initialise the layers so that `features` carry the context's mean and its last vector.

        directions: (W, D) orthonormal rows, the vectors' principal directions. The mixers' outputs are scaled to a
        tenth; the mean has weight eight, as in the Transformer's start. The mean of the first five position codes is
        subtracted from the input.
        """
        width = self.config.width
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
        """(B, T, W) inputs of the first branch from vectors (B, T, D) at positions `start` and after."""
        x = wide(self.input_proj(vectors))  # the residual stream stays in float32, under autocast too
        if self.positions:
            x = x + sinusoidal_positions(start + x.shape[1], self.config.width, x)[start:]
        return x

    def states(self, x: Tensor) -> Tensor:
        """(B, T, W) output of all branches from their input (B, T, W)."""
        for branch in self.branches:
            x, _ = branch(x)
        return x

    def _read(self, states: Tensor, mean: Tensor) -> Tensor:
        features: Tensor = self.norm(states + self.pool * mean)
        return features
