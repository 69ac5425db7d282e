"""The loss of distillation: predictions and targets in, its terms out, padding left out.

    L = a mean |p - h| + b mean (p - h)^2 + c mean distance(p, h)

with the distance -log sigmoid cos(p, h) (DistilHuBERT, eq. 1: a = c = 1, b = 0) or -cos(p, h) (DPHuBERT). The means
run over heads, valid frames and, for the first two, channels: every head and every frame of speech weighs the same. (The
published code also averages over padded frames.) Of several teachers it is the weighted mean of the teachers' losses.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Cosine = Literal["log_sigmoid", "raw"]


class LossWeights(NamedTuple):
    """What of each term is in the whole."""

    l1: float
    l2: float
    cosine: float
    form: Cosine
    """How far a cosine is: -log sigmoid cos, or -cos."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that are computed, the whole at the end. l2 costs memory: only where it counts."""
        return ("l1", *(["l2"] if self.l2 else []), "cosine", "total")


def distillation_loss(
    predicted: Float[Tensor, "B N T E"],
    targets: Float[Tensor, "B N T E"],
    mask: Bool[Tensor, "B T"],
    weights: LossWeights,
) -> dict[str, Float[Tensor, ""]]:
    """Compare where `mask` is true, in float32 at least; what stands elsewhere does not matter, NaN included.

    Returns:
        A scalar for each of `weights.terms`.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    # padding becomes (1, 1): finite in all terms and in their gradients
    speech = mask[:, None, :, None]
    predicted = torch.where(speech, predicted.to(dtype), 1.0)
    targets = torch.where(speech, targets.to(dtype), 1.0)
    frames = mask.sum() * predicted.shape[1]
    l1 = (predicted - targets).abs().sum() / (frames * predicted.shape[3])
    similarity = torch.nn.functional.cosine_similarity(predicted, targets, dim=3)  # (B, N, T)
    distance = -similarity if weights.form == "raw" else -torch.nn.functional.logsigmoid(similarity)
    cosine = torch.where(mask[:, None, :], distance, 0.0).sum() / frames
    total = weights.l1 * l1 + weights.cosine * cosine
    if not weights.l2:
        return {"l1": l1, "cosine": cosine, "total": total}
    l2 = (predicted - targets).square().sum() / (frames * predicted.shape[3])
    return {"l1": l1, "l2": l2, "cosine": cosine, "total": total + weights.l2 * l2}


def mean_over_groups(
    losses: Sequence[dict[str, Float[Tensor, ""]]], shares: Sequence[float]
) -> dict[str, Float[Tensor, ""]]:
    """Term by term the weighted mean; shares add up to 1, so that a learning rate means the same for any number."""
    (first, *others), (share, *other_shares) = losses, shares
    mean = {name: share * term for name, term in first.items()}
    for loss, share in zip(others, other_shares, strict=True):
        mean = {name: term + share * loss[name] for name, term in mean.items()}
    return mean
