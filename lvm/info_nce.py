"""InfoNCE: a contrastive loss with in-batch negatives."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(predicted: Tensor, targets: Tensor, temperature: float, both_ways: bool = False) -> Tensor:
    """Cross-entropy, nats, of identifying each row's target among the batch's B targets; a float32 scalar.

    predicted, targets: (B, D) unit vectors. both_ways: symmetric, averaged with identifying each target's prediction.
    Source: van den Oord et al. 2018.
    """
    scores = predicted.float() @ targets.float().T / temperature
    own = torch.arange(len(scores), device=scores.device)
    loss = F.cross_entropy(scores, own)
    return (loss + F.cross_entropy(scores.T, own)) / 2 if both_ways else loss
