"""The loss of distillation: predictions and targets in, its terms for every target out, padding left out.

    L = a mean |p - h| + b mean (p - h)^2 + c mean distance(p, h)

with the distance -log sigmoid cos(p, h) (DistilHuBERT, eq. 1: a = c = 1, b = 0) or -cos(p, h) (DPHuBERT). The means
run over targets, valid frames and, for the first two, channels: every target and every frame of speech weighs the same.
(The published code also averages over padded frames.) Here stand sums over the frames of one batch: who has several
batches to a step, in one process or in many, divides by the frames of all of them, and gets the mean over all of them.
"""

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


def distillation_sums(
    predicted: Float[Tensor, "B N T E"],
    targets: Float[Tensor, "B N T E"],
    mask: Bool[Tensor, "B T"],
    weights: LossWeights,
) -> dict[str, Float[Tensor, " N"]]:
    """Compare where `mask` is true, in float32 at least; what stands elsewhere does not matter, NaN included.

    Returns:
        For each of `weights.terms` and each target the sum over frames of the mean over channels.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    # padding becomes (1, 1): finite in all terms and in their gradients
    speech = mask[:, None, :, None]
    predicted = torch.where(speech, predicted.to(dtype), 1.0)
    targets = torch.where(speech, targets.to(dtype), 1.0)
    l1 = (predicted - targets).abs().sum((0, 2, 3)) / predicted.shape[3]
    similarity = torch.nn.functional.cosine_similarity(predicted, targets, dim=3)  # (B, N, T)
    distance = -similarity if weights.form == "raw" else -torch.nn.functional.logsigmoid(similarity)
    cosine = torch.where(mask[:, None, :], distance, 0.0).sum((0, 2))
    total = weights.l1 * l1 + weights.cosine * cosine
    if not weights.l2:
        return {"l1": l1, "cosine": cosine, "total": total}
    l2 = (predicted - targets).square().sum((0, 2, 3)) / predicted.shape[3]
    return {"l1": l1, "l2": l2, "cosine": cosine, "total": total + weights.l2 * l2}
