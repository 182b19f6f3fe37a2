"""Workers that train one model together, each on its part of every batch (PyTorch's DistributedDataParallel).

A step's windows are those that one worker alone would take, and gradients are their mean. So the number of workers
changes the order of sums and what dropout draws, nothing else.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Team:
    """This worker among those of its run, which are the processes of torch's process group."""

    rank: int = 0
    """0 to size - 1; the first one saves, logs and tells."""
    size: int = 1

    @classmethod
    def joined(cls) -> "Team":
        """The process group that this process is in; a team of one where it is in none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def part(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
        """This worker's windows of a batch, and what their mean weighs where the workers' means are averaged.

        A worker for whom none is left takes the first one at no weight, since all have to take part in a step.
        """
        mine = indices[self.rank :: self.size]
        return (mine, len(mine) * self.size / len(indices)) if len(mine) else (indices[:1], 0.0)

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all workers, the same for everyone."""
        if self.size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def of_first(self, value: float) -> float:
        """The first worker's value; clocks differ."""
        return self.sums(value if self.rank == 0 else 0.0)[0]

    def forward(self, model: nn.Module) -> nn.Module:
        """What a step calls with contexts (B, T, D) and targets (B, D), for the model's own scalar loss where it has
        one, else for its prediction (B, D). In a team all weights become the first worker's."""
        step = _Forward(model)
        if self.size == 1:
            return step
        # Not every parameter takes part in every step: Linformer's summaries need long contexts.
        return DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=True)


ALONE = Team()


class _Forward(nn.Module):
    """One call for prediction and own loss: DistributedDataParallel sees calls of `forward` alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, contexts: Tensor, targets: Tensor) -> Tensor:
        own_loss = getattr(self.model, "loss", None)
        output: Tensor = self.model(contexts) if own_loss is None else own_loss(contexts, targets)
        return output
