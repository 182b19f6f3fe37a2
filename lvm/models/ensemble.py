"""Several predictors asked at once: their unit vectors, weighted and summed.

The mean of unit vectors is the vector with the best mean cosine to them all. Weights are a softmax over one number a
member: 0 for each is the plain mean, and others are learned on held-out windows (`lvm.predict.ensemble`). Members keep
their own architecture and sizes; the weights lie in one file with the members' numbers before their names.

Letters: B batch, T context vectors, D vector length, M members.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class EnsembleConfig:
    """What it is made of."""

    dim: int = 768
    """Length of a vector, D."""
    members: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Each with `model`, a key of MODELS, `sizes`, the fields of its config, `context`, how many of the last vectors it
    reads, and `tmd`, true where it reads their codes."""


class Ensemble(nn.Module):
    """normalize(sum of weight times prediction)."""

    def __init__(self, config: EnsembleConfig, build: Callable[..., nn.Module]) -> None:
        """build: makes a member from its name, its sizes and whether it reads codes."""
        super().__init__()
        self.config = config
        self.members = nn.ModuleList(
            build(m["model"], dict(m["sizes"]), m.get("tmd", False)) for m in config.members
        )
        self.logits = nn.Parameter(torch.zeros(len(self.members)))

    def forward(self, contexts: Tensor) -> Tensor:
        """(B, D) unit vectors from contexts (B, T, D)."""
        each = zip(self.members, self.config.members, strict=True)
        return self.combine(torch.stack([member(contexts[:, -m["context"] :]) for member, m in each]))

    def combine(self, predicted: Tensor) -> Tensor:
        """(B, D) unit vectors from the members' (M, B, D)."""
        return F.normalize(torch.einsum("m,mbd->bd", self.weights, predicted), dim=-1)

    @property
    def weights(self) -> Tensor:
        """(M,) shares of the members; they sum to 1."""
        return self.logits.softmax(dim=0)
