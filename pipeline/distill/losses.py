"""The loss of distillation: predictions and targets in, L1 and cosine terms out, padding left out.

    L = mean |p - h| + w * mean( -log sigmoid cos(p, h) )        (DistilHuBERT, eq. 1)

The means run over heads, valid frames and, for L1, channels: every head and every frame of speech weighs the same. (The
published code also averages over padded frames.)
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class LossTerms(NamedTuple):
    """Scalars."""

    l1: Tensor
    cosine: Tensor
    total: Tensor


def distillation_loss(
    predicted: Float[Tensor, "B N T E"],
    targets: Float[Tensor, "B N T E"],
    mask: Bool[Tensor, "B T"],
    l1_weight: float,
    cosine_weight: float,
) -> LossTerms:
    """Compare where `mask` is true, in float32 at least; what stands elsewhere does not matter, NaN included."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    # padding becomes (1, 1): finite in both terms and in their gradients
    speech = mask[:, None, :, None]
    predicted = torch.where(speech, predicted.to(dtype), 1.0)
    targets = torch.where(speech, targets.to(dtype), 1.0)
    frames = mask.sum() * predicted.shape[1]
    l1 = (predicted - targets).abs().sum() / (frames * predicted.shape[3])
    similarity = torch.nn.functional.cosine_similarity(predicted, targets, dim=3)  # (B, N, T)
    distance = -torch.nn.functional.logsigmoid(similarity)
    cosine = torch.where(mask[:, None, :], distance, 0.0).sum() / frames
    return LossTerms(l1, cosine, l1_weight * l1 + cosine_weight * cosine)
