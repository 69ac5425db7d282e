"""Probe heads: the layers of a frozen model in, one score per class out.

An utterance head of SUPERB is a softmax-weighted sum of the L layers, a projection, the mean over valid frames and a
linear layer (s3prl: Featurizer, then `UtteranceLevel` with `MeanPooling`). No nonlinearity stands between the sum and
the mean, the weights sum to one and the biases are constant in time, hence

    mean_t( W (sum_l a_l x_l(t)) + b )  =  W ( sum_l a_l mean_t x_l(t) ) + b

and the mean may as well be taken first, once per utterance. `ProbeHead.forward` is the head as published, over frames;
`ProbeHead.pooled` is *the same function* of the per-layer means, and a hundred times cheaper to train. Normalising a
layer is not linear, so `normalise_layers` happens per frame, before the mean (`pipeline.tasks.features`).
"""

from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def normalise(layers: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """LayerNorm without affine over the feature axis: s3prl's `--upstream_feature_normalize`."""
    return nn.functional.layer_norm(layers, layers.shape[-1:])


def mean_over_frames(frames: Float[Tensor, "B L T D"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B L D"]:
    """The mean of the valid frames; what stands in the padding is never looked at."""
    kept = torch.where(valid[:, None, :, None], frames, 0.0)
    return kept.sum(2) / valid.sum(1).to(frames.dtype)[:, None, None]


class ProbeHead(nn.Module):
    """Weighted sum of layers, Linear D -> P, mean over frames, Linear P -> K."""

    def __init__(self, num_layers: int, width: int, head_width: int, num_classes: int, generator: torch.Generator):
        super().__init__()
        self.layer_scores = nn.Parameter(torch.zeros(num_layers))  # softmax of zeros: every layer counts the same
        self.project = nn.Linear(width, head_width)
        self.classify = nn.Linear(head_width, num_classes)
        for linear in (self.project, self.classify):  # torch's own initialisation, from a generator we hold
            bound = 1 / sqrt(linear.in_features)
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)

    @property
    def layer_weights(self) -> Float[Tensor, " L"]:
        """How much each layer counts; sums to one."""
        return self.layer_scores.softmax(0)

    def forward(self, frames: Float[Tensor, "B L T D"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B K"]:
        """The head as SUPERB defines it, frame by frame: the reference that `pooled` is held against."""
        mixed = torch.einsum("l,bltd->btd", self.layer_weights, frames)
        projected = self.project(mixed)
        return self.classify(mean_over_frames(projected[:, None], valid)[:, 0])

    def pooled(self, means: Float[Tensor, "B L D"]) -> Float[Tensor, "B K"]:
        """The same scores from the mean of every layer over the valid frames."""
        return self.classify(self.project(torch.einsum("l,bld->bd", self.layer_weights, means)))
