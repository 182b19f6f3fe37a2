"""Ensemble of predictors: the weighted sum of their unit vectors, normalised.

The mean of unit vectors, normalised, has the best mean cosine to them. The weights are a softmax over one logit per
member: all 0 is the plain mean, others are learned on held-out windows (`lvm.predict.ensemble`). Members keep their
architecture and sizes; all weights are in one file, with the members' indices as prefixes.

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
    """The members of an ensemble."""

    dim: int = 768
    """Length of a vector, D."""
    members: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Each has `model`, a key of MODELS; `sizes`, fields of its config; `context`, how many of the last vectors it
    reads; and `tmd`, true where it reads codes."""


class Ensemble(nn.Module):
    """normalize(sum of weight * prediction)."""

    def __init__(self, config: EnsembleConfig, build: Callable[..., nn.Module]) -> None:
        """build: `lvm.models.build`."""
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
        """(M,) weights of the members, with sum 1."""
        return self.logits.softmax(dim=0)
