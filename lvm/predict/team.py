"""Data-parallel training of one model (PyTorch's DistributedDataParallel): each worker takes a part of every batch.

The batches are those of a single worker, and gradients are averaged over their windows. So the number of workers
changes only the order of summation and the dropout masks.
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
    """A worker's rank and the number of workers in torch's process group."""

    rank: int = 0
    """0 to size - 1; rank 0 saves and logs."""
    size: int = 1

    @classmethod
    def joined(cls) -> "Team":
        """The team of the current process group; a team of one if there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def part(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
        """This worker's windows of a batch, and the weight of their mean in the average over workers.

        A worker without windows gets the first one with weight 0, since all workers must take part in a step.
        """
        mine = indices[self.rank :: self.size]
        return (mine, len(mine) * self.size / len(indices)) if len(mine) else (indices[:1], 0.0)

    def all_reduce(self, *values: float) -> list[float]:
        """The sum of each value over all workers; the same result on each."""
        if self.size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def broadcast(self, value: float) -> float:
        """The value of rank 0."""
        return self.all_reduce(value if self.rank == 0 else 0.0)[0]

    def forward(self, model: nn.Module) -> nn.Module:
        """A module that maps contexts (B, T, D) and targets (B, D) to the model's own scalar loss if it has one, else
        to its predictions (B, D). With several workers, it copies the weights of rank 0 to the others."""
        step = _Forward(model)
        if self.size == 1:
            return step
        # Some steps leave parameters unused: Linformer's summaries need long contexts.
        return DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=True)


ALONE = Team()


class _Forward(nn.Module):
    """Computes prediction or loss in `forward`, the only method that DistributedDataParallel intercepts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, contexts: Tensor, targets: Tensor) -> Tensor:
        own_loss = getattr(self.model, "loss", None)
        output: Tensor = self.model(contexts) if own_loss is None else own_loss(contexts, targets)
        return output
